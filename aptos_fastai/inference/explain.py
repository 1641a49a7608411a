"Where in an image its score comes from: gradient times activation of early feature maps, through GeM, laid over the original."
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from aptos_fastai.common.console import Bars, say
from aptos_fastai.common.io import AptosError, write_bytes
from aptos_fastai.data.decode import decode
from aptos_fastai.data.retina import Circle, crop_box
from aptos_fastai.inference.grade_files import find_images
from aptos_fastai.inference.grader import Grader, load_grader
from aptos_fastai.inference.views import unview, views
from aptos_fastai.metrics import GRADE_NAMES

SIDE = 112                                   # of a heat map, pixels
STRIDE = 8                                   # of the maps: .19 of the hottest places are lesions on the last ones (32), here .94 (benchmarks/explain.py)
SHOWN = 1024                                 # longest side of what is drawn, pixels


def heat_layer(net: torch.nn.Sequential) -> torch.nn.Module:
    "The deepest feature maps that are at most `STRIDE` times smaller than the image"
    stages = net[0].model.feature_info
    return net[0].model.get_submodule([o['module'] for o in stages if o['reduction'] <= STRIDE][-1])


def contributions(net: torch.nn.Sequential, x: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
    """(n, 3, side, side) -> (n, h, w): what each place of the maps of `layer` adds to the score, times their number.

    Gradient times activation, place by place (HiResCAM, Draelos and Carin 2020), rather than Grad-CAM's mean gradient (Selvaraju et al. 2017): GeM weighs
    each place by its own size. On the last maps the places add up to the score less the head's constant, for GeM is homogeneous of degree one (Euler).
    """
    kept = []
    hook = layer.register_forward_hook(lambda m, i, o: kept.append(o))
    try:
        with torch.enable_grad(): grad, = torch.autograd.grad(net(x.clone().requires_grad_()).sum(), kept)
    finally: hook.remove()
    maps = kept[0].detach()
    return (grad * maps).sum(1) * maps.shape[-1] * maps.shape[-2]


def heat(grader: Grader, squares: dict[int, np.ndarray]) -> np.ndarray:
    "Prepared squares by side -> (n, SIDE, SIDE): the mean over the model's networks, or over the views, each turned back, of a single one"
    out = 0.
    for m, net in grader.nets:
        x, tta = grader.tensor(m, squares[m.size]), m.tta if len(grader.nets) == 1 else 'none'
        parts = [unview(contributions(net, v, heat_layer(net)), i) for i, v in enumerate(views(x, tta))]
        mean = torch.stack(parts).mean(0)[:, None]
        out = out + m.weight * F.interpolate(mean, (SIDE, SIDE), mode='bicubic', align_corners=False)[:, 0]
    return out.cpu().numpy()


def lay_over(im: np.ndarray, hot: np.ndarray, box: tuple[int, int, int, int], score: float) -> np.ndarray:
    """The image (uint8 RGB) with the heat of its square, which covers `box` (x0, x1, y0, y1), where that raises the score: the hottest place in full,
    fainter where the whole `score` is below 1"""
    x0, x1, y0, y1 = box
    h, w = im.shape[:2]
    spread = cv2.resize(np.maximum(hot, 0).astype(np.float32), (x1 - x0, y1 - y0), interpolation=cv2.INTER_CUBIC)
    full = np.zeros((h, w), np.float32)
    u, uu, v, vv = max(x0, 0), min(x1, w), max(y0, 0), min(y1, h)
    full[v:vv, u:uu] = spread[v - y0:vv - y0, u - x0:uu - x0]
    full = (full / max(float(hot.max()), 1e-9)).clip(0, 1) * np.clip(score, .2, 1)
    colour = cv2.applyColorMap((255 * full).astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1]
    a = .75 * full[..., None] ** .8
    return (im * (1 - a) + colour * a).round().astype(np.uint8)


def explained(grader: Grader, data: bytes) -> tuple[np.ndarray, np.ndarray, dict]:
    "The original and the same with its heat (uint8 RGB, at most `SHOWN` wide), and the row of its grade. Raises `ImageError`, `AptosError`"
    squares, info = grader.prepared(data)
    if squares is None: raise AptosError(info['error'])
    im, (w, h) = decode(data, SHOWN)
    k = SHOWN / max(im.shape[:2])
    if k < 1: im = cv2.resize(im, None, fx=k, fy=k, interpolation=cv2.INTER_AREA)
    k = max(im.shape[:2]) / max(w, h)
    box = crop_box(*im.shape[:2], Circle(info['x'] * k, info['y'] * k, info['r'] * k, info['how']), grader.model.prep)
    hot = heat(grader, {n: s[None] for n, s in squares.items()})[0]
    row = grader.grade([''], [(squares, info)]).iloc[0].to_dict()
    return im, lay_over(im, hot, box, row['score']), row


def words(row: dict) -> str:
    "A grade for people"
    g = row['grade']
    return f'grade {g} {GRADE_NAMES[g]} ({row["grade_low"]}-{row["grade_high"]}), score {row["score"]:.2f} {row["flags"]}'


def captioned(im: np.ndarray, heated: np.ndarray, row: dict) -> np.ndarray:
    "Both side by side with the grade in words below"
    out = cv2.copyMakeBorder(np.hstack([im, heated]), 0, 30, 0, 0, cv2.BORDER_CONSTANT)
    return cv2.putText(out, words(row), (6, len(out) - 9), cv2.FONT_HERSHEY_SIMPLEX, .55, (235, 235, 235), 1, cv2.LINE_AA)


def explain_files(model: str, given: Iterable[str], output: str):
    "`explain MODEL IMAGES`: <output>/<name>.png for each. Raises `AptosError` at the end where some could not be read"
    files, grader, out = find_images(given), load_grader(model), Path(output)
    if out.exists() and not out.is_dir(): raise AptosError(f'{out}: is a file; give a folder with -o')
    bad, seen = [], {}
    with Bars() as bars, bars(f'explaining by {grader.model.name}', len(files), 'images') as bar:
        for i, f in enumerate(files, 1):
            stem = Path(f).stem
            seen[stem] = seen.get(stem, 0) + 1
            name = stem if seen[stem] == 1 else f'{stem}-{seen[stem]}'
            try: write_bytes(out / f'{name}.png', cv2.imencode('.png', captioned(*explained(grader, Path(f).read_bytes()))[..., ::-1])[1].tobytes())
            except (AptosError, OSError) as e: bad.append(f'{f} {e}')
            bar.to(i)
    say(f'{len(files) - len(bad)} images -> {out}')
    if bad: raise AptosError(f'{len(bad)} of {len(files)} images could not be explained: {"; ".join(bad[:3])}')
