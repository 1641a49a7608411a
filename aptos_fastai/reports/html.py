"Render self-contained HTML pages: no external requests, light and dark mode, printable."
import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from aptos_fastai.common.io import write_bytes
from aptos_fastai.reports.colours import GRADES_DARK, GRADES_LIGHT

_environment = Environment(loader=PackageLoader('aptos_fastai.reports'),
                           autoescape=select_autoescape(['html']), undefined=StrictUndefined,
                           trim_blocks=True, lstrip_blocks=True)
_environment.globals['grade_colours'] = list(zip(GRADES_LIGHT, GRADES_DARK, strict=True))


@dataclass
class Table:
    "A table; numbers align right and a `Bar` becomes a drawn bar."
    columns: list[str]
    rows: list[list]
    caption: str = ''
    whole: bool = False                      # as wide as the page, in a section whose parts stand side by side


@dataclass
class Bar:
    "A table cell that shows a share between 0 and 1 as a bar."
    share: float


@dataclass
class Figure:
    "An inline SVG with its title and caption."
    title: str
    svg: Markup
    caption: str = ''
    whole: bool = False


@dataclass
class Section:
    "A heading and what follows it; `grid` places the parts side by side where the screen is wide enough."
    heading: str
    parts: Sequence[Table | Figure | str]
    grid: bool = False


@dataclass
class EmbeddedImage:
    "A JPEG inside the HTML, as a data URI."
    uri: str
    alt: str
    width: int
    height: int


def data_uri(im: np.ndarray, quality: int = 85) -> str:
    "Return the uint8 RGB image as the data URI of a JPEG of `quality` 0-100."
    jpeg = cv2.imencode('.jpg', im[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return 'data:image/jpeg;base64,' + base64.b64encode(jpeg.tobytes()).decode()


def png_uri(im: np.ndarray) -> str:
    "Return the uint8 grey image (height, width) as the data URI of a PNG."
    png = cv2.imencode('.png', im, [cv2.IMWRITE_PNG_COMPRESSION, 9])[1]
    return 'data:image/png;base64,' + base64.b64encode(png.tobytes()).decode()


def embed_image(im: np.ndarray, alt: str, quality: int = 85) -> EmbeddedImage:
    "Embed the uint8 RGB image in HTML; `alt` is its text for screen readers."
    height, width = im.shape[:2]
    return EmbeddedImage(data_uri(im, quality), alt, width, height)


def render(template: str, **values: Any) -> str:
    "Render a template; a missing value raises `jinja2.UndefinedError`."
    return _environment.get_template(template).render(**values)


def write_html(path: Path, template: str, **values: Any) -> None:
    "Render a template and write it to `path` atomically."
    write_bytes(path, render(template, **values).encode())
