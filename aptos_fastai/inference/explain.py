"Heat maps of where in an image its score comes from: gradient times activation of early feature maps."
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from aptos_fastai.common.console import Bars, plural, say
from aptos_fastai.common.disclaimer import DISCLAIMER
from aptos_fastai.common.io import AptosError, check_output_folder, write_bytes, write_csv
from aptos_fastai.common.privacy import patient_data
from aptos_fastai.data.decode import decode
from aptos_fastai.data.retina import Circle, Prep, crop_box
from aptos_fastai.data.spreadsheet import read_spreadsheet, safe_cell
from aptos_fastai.inference.backends import to_tensor
from aptos_fastai.inference.eyes import GRADED_ALONE
from aptos_fastai.inference.find_images import find_images
from aptos_fastai.inference.grader import Grader, Squares, load_grader
from aptos_fastai.inference.model_spec import SYNTHETIC_MODEL
from aptos_fastai.inference.views import undo_view, views
from aptos_fastai.metrics import GRADE_NAMES
from aptos_fastai.training.networks import as_maps, features_and_scores

HEATMAP_SIDE = 112                           # pixels
# The maps used are at most this many times smaller than the image. The hottest place lies on a lesion in 94 % of images
# at 8, in 19 % on the last maps, at 32 (benchmarks/explain.py).
MAX_REDUCTION = 8
DISPLAY_SIDE = 1024                          # longest side of a drawn image, pixels
INDEX = 'index.csv'
Box = tuple[int, int, int, int]              # x0, x1, y0, y1 in an image, pixels
CAPTION_HEIGHT = 30                          # pixels


def heatmap_layer(net: torch.nn.Module) -> torch.nn.Module:
    """Return the deepest layer whose feature maps are at most `MAX_REDUCTION` times smaller than the image.

    Where all are smaller, as in a plain transformer, it is the last but one of the largest maps: the patches that the
    last layer gives do not reach a score from the class token.
    """
    body: Any = net.get_submodule('0.model')           # a timm network
    fine = [o['module'] for o in body.feature_info if o['reduction'] <= MAX_REDUCTION]
    smallest = min(o['reduction'] for o in body.feature_info)
    largest_maps = [o['module'] for o in body.feature_info if o['reduction'] == smallest]
    return _named_layer(body, fine[-1] if fine else largest_maps[-2:][0]) or net.get_submodule('0')


def _named_layer(body: torch.nn.Module, name: str) -> torch.nn.Module | None:
    "Return the layer that timm's list of features names, of several the last one; None if there is none"
    layers, number = dict(body.named_modules()), name.rpartition('.')[2]
    names = name, f'blocks.{number}', f'stages.{number}'           # Twins and MViT call theirs block.NUMBER
    layer = next((layers[o] for o in names if o in layers), None)
    return layer[-1] if isinstance(layer, torch.nn.ModuleList) else layer


def hires_cam(net: torch.nn.Module, x: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
    """Return what each place of the feature maps of `layer` adds to the score, times the number of places.

    `x` is (n, 3, side, side), the result (n, h, w). This is gradient times activation, place by place (HiResCAM,
    Draelos and Carin 2020), instead of Grad-CAM's mean gradient (Selvaraju et al. 2017), because GeM weighs each place
    by its own value. On the last maps the mean over places is the score minus the head's bias, because GeM is
    homogeneous of degree one (Euler). If the score does not depend on the layer, the body's own maps are taken.
    """
    body = net.get_submodule('0')
    with torch.enable_grad():
        kept, score = layer_outputs(net, x.clone().requires_grad_(), {layer, body})
        maps = kept.get(layer, kept[body])
        grad, grad_of_body = torch.autograd.grad(score.sum(), [maps, kept[body]], allow_unused=True)
    if grad is None: layer, maps, grad = body, kept[body], grad_of_body          # CoaT
    product = layer_maps(grad * maps.detach(), net, layer).sum(1)
    return product * product.shape[-1] * product.shape[-2]


def layer_outputs(net: torch.nn.Module, x: torch.Tensor,
                  layers: Iterable[torch.nn.Module]) -> tuple[dict[torch.nn.Module, torch.Tensor], torch.Tensor]:
    "Return what layers put out for images, as far as they are called, and the scores"
    kept: dict[torch.nn.Module, torch.Tensor] = {}

    def keep(layer, args, output):
        "Keep the output; of several maps (HRNet) the first, largest ones, of several tokens (CrossViT, TNT) the last"
        several = output if isinstance(output, list | tuple) else [output]
        per_image = [o for o in several if len(o) == len(x)]
        kept[layer] = per_image[0 if per_image[0].ndim == 4 else -1]
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try: return kept, features_and_scores(net, x)[1]
    finally:
        for hook in hooks: hook.remove()


def layer_maps(output: torch.Tensor, net: torch.nn.Module, layer: torch.nn.Module) -> torch.Tensor:
    "Return the output of a layer as maps (N, C, h, w)"
    body: Any = net.get_submodule('0.model')
    if hasattr(body, 'reroll') and layer in list(body.blocks):     # Hiera's tokens are not in the order of the image
        output = body.reroll(output, list(body.blocks).index(layer))
    return as_maps(output, body)


def heatmap(grader: Grader, squares: Squares) -> np.ndarray:
    """Return the heat maps (n, HEATMAP_SIDE, HEATMAP_SIDE) of prepared squares: side -> (n, side, side, 3).

    They are the weighted mean over the model's networks; a single network gives the mean over its views.
    """
    members = grader.model.members
    total = torch.zeros((), device=grader.device)
    for member in members:
        net = grader.net(member)
        x = to_tensor(member, squares[member.size], grader.device)
        tta = member.tta if len(members) == 1 else 'none'
        maps = [undo_view(hires_cam(net, v, heatmap_layer(net)), tta, i) for i, v in enumerate(views(x, tta))]
        mean = torch.stack(maps).mean(0)[:, None]
        scaled = F.interpolate(mean, (HEATMAP_SIDE, HEATMAP_SIDE), mode='bicubic', align_corners=False)[:, 0]
        total = total + member.weight * scaled
    return total.cpu().numpy()


def spread_heatmap(hot: np.ndarray, box: Box, shape: tuple[int, ...], score: float) -> np.ndarray:
    """Return how much each pixel of an image of `shape` raises the score: (height, width) float32, 1 is the hottest.

    The heat map `hot` covers `box` (x0, x1, y0, y1) of the image, which may reach beyond its edges. A score below 1
    makes all of it fainter.
    """
    x0, x1, y0, y1 = box
    height, width = shape
    positive = np.maximum(hot, 0).astype(np.float32)
    scaled = cv2.resize(positive, (x1 - x0, y1 - y0), interpolation=cv2.INTER_CUBIC)
    left, right, top, bottom = max(x0, 0), min(x1, width), max(y0, 0), min(y1, height)
    heat = np.zeros((height, width), np.float32)
    heat[top:bottom, left:right] = scaled[top - y0:bottom - y0, left - x0:right - x0]
    return (heat / max(float(hot.max()), 1e-9)).clip(0, 1) * np.float32(np.clip(score, .2, 1))


def overlay_heatmap(im: np.ndarray, hot: np.ndarray, box: Box, score: float) -> np.ndarray:
    "Draw the places that raise the score over an image (uint8 RGB), as `spread_heatmap` places them"
    heat = spread_heatmap(hot, box, im.shape[:2], score)
    colour = cv2.applyColorMap((255 * heat).astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1]
    opacity = .75 * heat[..., None] ** .8
    return (im * (1 - opacity) + colour * opacity).round().astype(np.uint8)


def explain_image(grader: Grader, data: bytes) -> tuple[np.ndarray, np.ndarray, dict]:
    """Return an image, the image with its heat map, and the row of its grade.

    `data` is the content of the image file. Both images are uint8 RGB, their longest side at most `DISPLAY_SIDE`.
    Raises `AptosError` if the file cannot be read.
    """
    squares, info = grader.prepare(data)
    if squares is None: raise AptosError(info['error'])
    im, hot, box = locate_heatmap(grader, data, squares, info)
    row = grader.grade([''], [(squares, info)]).iloc[0].to_dict()
    return im, overlay_heatmap(im, hot, box, row['score']), row


def displayed(data: bytes, side: int, found: dict, prep: Prep) -> tuple[np.ndarray, Box]:
    """Return an image (uint8 RGB, its longest side at most `side`) and the box of it that is prepared by `prep`.

    `data` is the content of the image file, `found` the circle (x, y, r, how, stretch) that `prepare` found in it.
    """
    im, original_size = decode(data, side)
    shrink = side / max(im.shape[:2])
    if shrink < 1: im = cv2.resize(im, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
    height, width = im.shape[:2]
    k = max(height, width) / max(original_size)
    circle = Circle(found['x'] * k, found['y'] * k, found['r'] * k, found['how'], found['stretch'])
    return im, crop_box(height, width, circle, prep)


def locate_heatmap(grader: Grader, data: bytes, squares: Squares, info: dict) -> tuple[np.ndarray, np.ndarray, Box]:
    """Return an image (uint8 RGB, its longest side `DISPLAY_SIDE`), its heat map, and the box of the image it covers.

    `data` is the content of the image file, `squares` and `info` are what `Grader.prepare` gave for it.
    """
    im, box = displayed(data, DISPLAY_SIDE, info, grader.model.prep)
    return im, heatmap(grader, {side: square[None] for side, square in squares.items()})[0], box


def grade_text(row: dict) -> str:
    "Return a grade, or why there is none, as a line of text"
    if row['ungradable']: return f'not gradable: {row["ungradable"]}'
    grade = f'grade {row["grade"]} {GRADE_NAMES[row["grade"]]}'
    return f'{grade} (prediction set {row["grade_low"]}-{row["grade_high"]}), score {row["score"]:.2f} {row["flags"]}'


def side_by_side(im: np.ndarray, overlay: np.ndarray, row: dict, notice: str = DISCLAIMER) -> np.ndarray:
    "Return an image and its overlay side by side; the grade and `notice` are the caption"
    pair, lines, font, scale = np.hstack([im, overlay]), (grade_text(row), notice), cv2.FONT_HERSHEY_SIMPLEX, .55
    width = 12 + max(cv2.getTextSize(text, font, scale, 1)[0][0] for text in lines)
    out = cv2.copyMakeBorder(pair, 0, 2 * CAPTION_HEIGHT, 0, max(0, width - pair.shape[1]), cv2.BORDER_CONSTANT)
    for i, text in enumerate(lines):
        origin = 6, len(pair) + (i + 1) * CAPTION_HEIGHT - 9
        out = cv2.putText(out, text, origin, font, scale, (235, 235, 235), 1, cv2.LINE_AA)
    return out


def explain_files(model: str, paths: Iterable[str], output: str, *, root: str | None = None, sheet: str = '') -> None:
    """`explain MODEL IMAGES`: write <output>/<name>.png for each image, and <output>/index.csv: file, output, error.

    An earlier index in the folder is kept: its other images keep their outputs. Raises `AptosError` at the end if some
    could not be read.
    """
    folder = Path(output)
    check_output_folder(folder)
    entries, grader = find_images(list(paths), root, sheet), load_grader(model)
    old = _read_index(folder / INDEX)
    files = [safe_cell(str(entry)) for entry in entries]
    kept = [row for row in old if row['file'] not in files]
    names = _unique_stems(map(str, entries), taken=[row['output'] for row in kept])
    rows = []
    with Bars() as bars, bars(f'explaining with {grader.model.name}', len(entries), 'images') as bar:
        for entry, file, name in zip(entries, files, names, strict=True):
            error = entry.error or _explain_file(grader, Path(str(entry)), folder / f'{name}.png')
            rows.append(dict(file=file, output='' if error else safe_cell(f'{name}.png'), error=safe_cell(error)))
            bar.to(len(rows))
    write_csv(folder / INDEX, pd.DataFrame([*kept, *rows]))
    failed = [f'{row["file"]}: {row["error"]}' for row in rows if row['error']]
    say(f'{plural(len(rows) - len(failed), "image")} -> {folder}; {INDEX} names the file of each')
    say(patient_data(folder, 'holds copies of the images and their file names'), 'dim')
    say(DISCLAIMER, 'dim')
    if grader.model.synthetic: say(SYNTHETIC_MODEL, 'yellow')
    if grader.model.eyes: say(GRADED_ALONE, 'yellow')
    if failed: raise AptosError(f'{len(failed)} of {len(rows)} images could not be explained: {"; ".join(failed[:3])}')


def _read_index(file: Path) -> list[dict]:
    "Return the rows of an earlier index.csv; none if there is none. Raises `AptosError` for another file of this name"
    if not file.is_file(): return []
    df = read_spreadsheet(file)
    if list(df) != ['file', 'output', 'error']:
        raise AptosError(f'{file}: is not a file that explain wrote. Choose another folder with -o.')
    return df.to_dict('records')


def _explain_file(grader: Grader, file: Path, output: Path) -> str:
    "Write an image beside its heat map; return the error if it could not be read"
    notice = f'SYNTHETIC model. {DISCLAIMER}' if grader.model.synthetic else DISCLAIMER
    try: drawn = side_by_side(*explain_image(grader, file.read_bytes()), notice)
    except OSError as e: return f'cannot be read ({e.strerror})'
    except AptosError as e: return str(e)
    write_bytes(output, cv2.imencode('.png', drawn[..., ::-1])[1].tobytes())
    return ''


def _unique_stems(files: Iterable[str], taken: Iterable[str] = ()) -> list[str]:
    "Return the names of files without suffix, with -2, -3, … where `taken` or an earlier one has it, in any case"
    taken = {Path(name).stem.casefold() for name in taken}
    names = []
    for file in files:
        stem = name = Path(file).stem
        for number in count(2):
            if name.casefold() not in taken: break
            name = f'{stem}-{number}'
        taken.add(name.casefold())
        names.append(name)
    return names
