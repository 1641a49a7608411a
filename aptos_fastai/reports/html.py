"Self-contained HTML pages from the templates: no request leaves them; light and dark; they print."
import base64
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from aptos_fastai.common.io import write_bytes

_templates = Environment(loader=PackageLoader('aptos_fastai.reports'), autoescape=lambda name: name.endswith('.html'), undefined=StrictUndefined,
                         trim_blocks=True, lstrip_blocks=True)


@dataclass
class Table:
    "Rows for the page: numbers align right, a `Bar` is drawn"
    columns: list[str]
    rows: list[list]
    caption: str = ''


@dataclass
class Bar:
    "A bar of this share of the whole"
    share: float


@dataclass
class Figure:
    "A drawing with its title and what is to be read from it"
    title: str
    svg: Markup
    caption: str = ''


@dataclass
class EmbeddedImage:
    "A JPEG that the page carries in itself"
    uri: str
    alt: str
    width: int
    height: int


def image(im: np.ndarray, alt: str, quality: int = 85) -> EmbeddedImage:
    "The uint8 RGB image for a page"
    data = base64.b64encode(cv2.imencode('.jpg', im[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]).decode()
    return EmbeddedImage(f'data:image/jpeg;base64,{data}', alt, im.shape[1], im.shape[0])


def render(template: str, **values) -> str:
    "A template with its values; one that is missing is an error"
    return _templates.get_template(template).render(**values)


def write_html(path: Path, template: str, **values):
    "The page of a template (title, note, warning and what the template asks for) at `path`"
    write_bytes(path, render(template, **values).encode())
