"Synthetic fundus images in Kaggle's folder layout: the embedded default and the tests' data. They show no eye of anybody."
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from aptos_fastai.common.distributed import cores

VERSION = 1                                   # raised whenever an image changes: an older demo is then painted anew


@dataclass(frozen=True)
class Camera:
    "What a camera makes of a retina: the frame and the circle in it, colour, sharpness, noise"
    width: int
    height: int
    radius: float                             # of the circle, part of the frame's height
    tint: tuple[float, float, float]
    blur: float                               # sigma, pixels
    noise: float                              # sigma, grey levels
    notch: bool = False


CAMERAS = dict(
    wide15=Camera(384, 256, .47, (1., .95, .9), .7, 2.),
    cut15=Camera(352, 264, .58, (1.05, 1.05, .8), .9, 3.),              # circle cut off at top and bottom
    notch15=Camera(320, 304, .48, (.9, .85, 1.1), .6, 2., notch=True),
    square19=Camera(288, 288, .495, (1., 1.1, 1.), .5, 1.),
    tight19=Camera(320, 240, .64, (1.1, .95, .75), .8, 2.),
    wide19=Camera(416, 277, .48, (.95, 1., .8), .6, 1.5, notch=True))


def _blobs(rng, side: int, cells: int) -> np.ndarray:
    "Smooth noise (side, side) of mean 0 and about unit spread"
    return cv2.resize(rng.normal(size=(cells, cells)).astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC)


def _blend(im: np.ndarray, mask: np.ndarray, colour, strength: float = 1.):
    "Paints `colour` (RGB, 0-1) on `im` where the uint8 `mask` says"
    a = mask.astype(np.float32)[..., None] * (strength / 255)
    im += a * (np.float32(colour) - im)


def _vessel(rng, masks, kind, p, angle, width, length, bend, depth=0):
    "One vessel from `p` as a walk that bends and tapers; branches leave it"
    n = 20
    turn = angle + np.cumsum(bend / n + rng.normal(0, .07, n))
    way = np.vstack([p, p + np.cumsum(length / n * np.c_[np.cos(turn), np.sin(turn)], 0)])
    for k in range(4):
        part = (way[k * n // 4:(k + 1) * n // 4 + 1] * 16).round().astype(np.int32)
        cv2.polylines(masks[kind], [part], False, 255, max(1, round(width * (1 - .18 * k))), cv2.LINE_AA, 4)
    for i in np.flatnonzero(rng.random(n) < .13 - .03 * depth) if depth < 2 else ():
        _vessel(rng, masks, kind, way[i + 1], turn[i] + rng.choice([-1, 1]) * rng.uniform(.4, .9), width * .6,
                length * rng.uniform(.25, .5), bend * .3, depth + 1)


def _vessels(rng, im, disc, side, out):
    "Arteries (thinner, lighter) and veins (wider, darker): arcades around the macula on one side, short ones on the other. `out` is +1 or -1: away from it"
    masks = {k: np.zeros((side, side), np.uint8) for k in ('artery', 'vein')}
    for kind, width in (('vein', .021), ('artery', .014)):
        for up in (-1, 1):
            start = disc + rng.normal(0, .012 * side, 2)
            a = np.arctan2(up, -.25 * out) + rng.normal(0, .15)          # upwards, then over the macula
            turn = up * out * rng.uniform(1.2, 1.7)
            _vessel(rng, masks, kind, start, a, width * side, side * rng.uniform(.62, .8), turn)
            a = np.arctan2(up * .9, out) + rng.normal(0, .2)
            _vessel(rng, masks, kind, start, a, width * .8 * side, side * .3, rng.normal(0, .3))
    _blend(im, cv2.GaussianBlur(masks['artery'], (0, 0), .6), (.62, .2, .08), .75)
    _blend(im, cv2.GaussianBlur(masks['vein'], (0, 0), .6), (.42, .1, .05), .85)


def _background(rng, side, disc, macula):
    "Orange-red ground with choroidal texture, the dark macula, the bright disc and its cup"
    at = np.arange(side, dtype=np.float32)
    im = np.empty((side, side, 3), np.float32)
    im[:] = np.float32([.72, .36, .15]) * rng.uniform(.85, 1.12) * rng.uniform(.93, 1.07, 3).astype(np.float32)
    im *= (1 + .05 * _blobs(rng, side, 6) + .03 * _blobs(rng, side, 24))[..., None]

    def bell(c, s): return np.outer(*(np.exp(-(at - np.float32(o)) ** 2 / (2 * (s * side) ** 2)) for o in c[::-1]))[..., None]
    im *= (1 - .42 * bell(macula, .065)) * (1 + .25 * bell(disc, .16))   # the nerve fibres around the disc are paler
    r = side * rng.uniform(.062, .078)
    for k, colour, soft in ((1., (.98, .78, .48), .18), (.5, (1., .92, .72), .25)):
        d = np.hypot((at - np.float32(disc[0]))[None] * 1.08, (at - np.float32(disc[1]))[:, None]) / np.float32(r * k)
        a = 1 / (1 + np.exp(np.minimum((d - 1) / soft * 3, 30)))[..., None]
        im += a * (np.float32(colour) - im)
    return im


# Lesions. Microaneurysms are drawn about three times life size: in life they are 10-100 micrometres, and would be lost at 64 px.

COUNTS = {0: {}, 1: dict(ma=(3, 6)), 2: dict(ma=(6, 11), haem=(3, 6), exudate=(1, 3)),
          3: dict(ma=(9, 15), haem=(11, 17), exudate=(1, 3), cotton=(2, 4)),
          4: dict(ma=(6, 12), haem=(5, 12), exudate=(1, 3), neo=(2, 3), boat=(1, 2))}


def _place(rng, side, disc, macula, quadrant=None):
    "A point of the retina off the disc and the fovea; in a quadrant where one is named"
    while True:
        t, r = rng.uniform(0, 2 * np.pi), side * .44 * np.sqrt(rng.uniform(.02, 1))
        if quadrant is not None: t = (quadrant + rng.uniform(0, 1)) * np.pi / 2
        p = side / 2 + r * np.array([np.cos(t), np.sin(t)])
        if np.hypot(*(p - disc)) > .11 * side and np.hypot(*(p - macula)) > .05 * side: return p


def _spot(mask, p, r, rng, ragged=0.):
    "A round or ragged spot of radius `r` pixels"
    n = 14
    t = np.arange(n) * 2 * np.pi / n
    rr = r * (1 + ragged * rng.uniform(-1, 1, n))
    pts = np.c_[p[0] + rr * np.cos(t), p[1] + rr * np.sin(t)]
    cv2.fillPoly(mask, [(pts * 16).round().astype(np.int32)], 255, cv2.LINE_AA, 4)


def _draw(kind, rng, m, p, side) -> float:
    "Draws one lesion on the mask of its kind; returns its radius in pixels"
    if kind == 'ma': r = side * rng.uniform(.010, .014); _spot(m, p, r, rng)
    elif kind == 'haem': r = side * rng.uniform(.018, .034); _spot(m, p, r, rng, .35)
    elif kind == 'cotton': r = side * rng.uniform(.03, .045); _spot(m, p, r, rng, .3)
    elif kind == 'exudate':
        r = side * rng.uniform(.04, .06)
        for _ in range(rng.integers(7, 14)): _spot(m, p + rng.normal(0, r / 2, 2), side * rng.uniform(.006, .014), rng, .3)
    elif kind == 'neo':
        r = side * rng.uniform(.05, .08)
        for _ in range(9): _vessel(rng, {'m': m}, 'm', p + rng.normal(0, r / 5, 2), rng.uniform(0, 6.3), 1.4 * side / 330, r * 1.8, rng.normal(0, 4), 2)
    else:                                                                # preretinal blood sinks: flat above, round below
        r = side * rng.uniform(.09, .14)
        cv2.ellipse(m, tuple(p.astype(int).tolist()), (int(r), int(r * .75)), rng.uniform(-12, 12), 0, 180, 255, -1, cv2.LINE_AA)
    return float(r)


_looks = dict(exudate=((1., .9, .5), .9, .5), cotton=((.95, .88, .72), .75, 2.5), ma=((.38, .04, .03), .9, .4), haem=((.36, .03, .03), .92, .8),
              neo=((.45, .06, .05), .9, .4), boat=((.33, .02, .03), .94, 1.2))      # colour, strength, blur (pixels)


def _lesions(rng, im, grade, disc, macula, side) -> list[dict]:
    "Paints the lesions of `grade` and returns where they are, pixels of the retina's square"
    found = []
    for kind, (colour, strength, blur) in _looks.items():
        lo, hi = COUNTS[grade].get(kind, (0, -1))
        if hi < 0: continue
        m = np.zeros((side, side), np.uint8)
        for i in range(rng.integers(lo, hi + 1)):
            near_disc = kind == 'neo' and i == 0
            p = disc + rng.normal(0, .06 * side, 2) if near_disc else _place(rng, side, disc, macula, i % 4 if kind == 'haem' else None)
            found.append(dict(kind=kind, x=float(p[0]), y=float(p[1]), radius=_draw(kind, rng, m, p, side)))
        _blend(im, cv2.GaussianBlur(m, (0, 0), blur), colour, strength)
    return found


def paint_fundus(rng: np.random.Generator, grade: int, camera: str, right_eye: bool) -> tuple[np.ndarray, list[dict]]:
    "An image (uint8 HxWx3 RGB) of an eye of `grade`, and its lesions: kind, x, y, radius in pixels of the image"
    cam = CAMERAS[camera]
    r = cam.height * cam.radius * rng.uniform(.985, 1.015)
    side, out = int(2 * r), 1 if right_eye else -1                        # a right eye's disc lies on the right
    disc = np.array([.5 + out * rng.uniform(.22, .3), .5 + rng.normal(0, .02)]) * side
    macula = np.array([.5 - out * rng.uniform(.03, .1), .52 + rng.normal(0, .015)]) * side
    im = _background(rng, side, disc, macula)
    _vessels(rng, im, disc, side, out)
    found = _lesions(rng, im, grade, disc, macula, side)
    o = np.arange(side, dtype=np.float32) / (side / 2) - 1
    d = np.hypot(o[None], o[:, None])
    im *= (np.clip(1.12 - .38 * d * d, 0, 1.1) * np.clip((1 - d) * side / 3, 0, 1)).astype(np.float32)[..., None]    # vignette, soft edge
    return _expose(rng, im, cam, found)


def _expose(rng, retina, cam: Camera, found: list[dict]) -> tuple[np.ndarray, list[dict]]:
    "The retina's square through the camera: frame, tint, blur, notch, noise"
    side = len(retina)
    x0, y0 = int((cam.width - side) / 2 + rng.normal(0, 2)), int((cam.height - side) / 2 + rng.normal(0, 2))
    frame = np.zeros((cam.height, cam.width, 3), np.float32)
    u, v, uu, vv = max(x0, 0), max(y0, 0), min(x0 + side, cam.width), min(y0 + side, cam.height)
    frame[v:vv, u:uu] = retina[v - y0:vv - y0, u - x0:uu - x0]
    if cam.notch: cv2.circle(frame, (int(x0 + side * .93), int(y0 + side * .25)), int(side * .035), (0, 0, 0), -1)
    frame = cv2.GaussianBlur(frame * np.float32(cam.tint), (0, 0), cam.blur * rng.uniform(.8, 1.3)) * 255 * rng.uniform(.85, 1.1)
    frame += cam.noise * cv2.resize(rng.standard_normal((cam.height // 2, cam.width // 2, 3), np.float32), (cam.width, cam.height))
    moved = [{**o, 'x': round(o['x'] + x0, 1), 'y': round(o['y'] + y0, 1), 'radius': round(o['radius'], 1)} for o in found]
    return frame.clip(0, 255).astype(np.uint8), moved


# The tables

SHARES15, SHARES19 = (.40, .15, .20, .13, .12), (.36, .16, .22, .13, .13)


def _spread(n: int, shares) -> np.ndarray:
    "`n` grades in these shares, every grade present"
    counts = np.maximum(1, np.floor(np.array(shares) * n)).astype(int)
    counts[0] += n - counts.sum()
    return np.repeat(np.arange(5), counts)


def _plan(pretrain: int, train: int, test: int, seed: int, camera_by_grade: bool) -> pd.DataFrame:
    "A row an image: file, id_code, table, grade, camera, right_eye"
    rng, rows = np.random.default_rng([seed, 0]), []
    cams = {y: [c for c in CAMERAS if c.endswith(y)] for y in ('15', '19')}

    def camera(y, grade): return cams[y][grade % 3] if camera_by_grade and rng.random() < .8 else str(rng.choice(cams[y]))
    for i, g in enumerate(rng.permutation(_spread((pretrain + 1) // 2, SHARES15))):
        cam = camera('15', g)
        other = g if rng.random() < .87 else int(np.clip(g + rng.choice([-1, 1]), 0, 4))     # both eyes agree in 87 % (FACTS of EyePACS)
        for eye, grade in (('left', g), ('right', other)):
            name = f'{10 + 3 * i}_{eye}'
            rows.append((f'diabetic-retinopathy-detection/train/{name}.jpeg', name, 'pretrain', int(grade), cam, eye == 'right'))
    for table, n in (('train', train), ('test', test)):
        for g in rng.permutation(_spread(n, SHARES19)):
            name = f'{rng.integers(0, 2**48):012x}'
            rows.append((f'aptos2019-blindness-detection/{table}_images/{name}.png', name, table, int(g), camera('19', g), bool(rng.random() < .5)))
    return pd.DataFrame(rows, columns=['file', 'id_code', 'table', 'grade', 'camera', 'right_eye'])


def _paint_file(folder: Path, seed: int, row) -> list[dict]:
    im, found = paint_fundus(np.random.default_rng([seed, 1, row.Index]), row.grade, row.camera, row.right_eye)
    opts = [cv2.IMWRITE_JPEG_QUALITY, 90] if row.file.endswith('jpeg') else [cv2.IMWRITE_PNG_COMPRESSION, 1]
    ok, data = cv2.imencode(Path(row.file).suffix, im[..., ::-1], opts)
    (folder / row.file).write_bytes(data.tobytes())
    return [dict(id_code=row.id_code, **o) for o in found]


def _write_csvs(folder: Path, plan: pd.DataFrame, lesions: list[dict]):
    old, new = folder / 'diabetic-retinopathy-detection', folder / 'aptos2019-blindness-detection'
    part = {t: p.rename(columns=dict(grade='diagnosis')) for t, p in plan.groupby('table')}
    part['pretrain'][['id_code', 'diagnosis']].set_axis(['image', 'level'], axis=1).to_csv(old / 'trainLabels.csv', index=False)
    part['train'][['id_code', 'diagnosis']].to_csv(new / 'train.csv', index=False)
    part['test'][['id_code']].to_csv(new / 'test.csv', index=False)
    part['test'][['id_code']].assign(diagnosis=0).to_csv(new / 'sample_submission.csv', index=False)
    part['test'][['id_code', 'diagnosis']].to_csv(new / 'test_grades.csv', index=False)
    pd.DataFrame(lesions, columns=['id_code', 'kind', 'x', 'y', 'radius']).to_csv(new / 'lesions.csv', index=False)


def write_demo(folder: Path, *, pretrain: int = 600, train: int = 480, test: int = 160, seed: int = 42, camera_by_grade: bool = False,
               progress: Callable[[int, int], None] | None = None) -> Path:
    """Writes the demo's tables under `folder` as Kaggle's archives unpack, whole or not at all; nothing where they stand already.

    `aptos2019-blindness-detection/test_grades.csv` (what the test images were painted as) and `lesions.csv` are for checks: no recipe reads them.
    `camera_by_grade` plants a shortcut. Raises `FileExistsError` where `folder` holds anything else.
    """
    folder, wanted = Path(folder), dict(version=VERSION, pretrain=pretrain, train=train, test=test, seed=seed, camera_by_grade=camera_by_grade)
    note = folder / 'demo.json'
    had = json.loads(note.read_text()) if note.is_file() else None
    if had == wanted: return folder
    if had and {**had, 'version': VERSION} != wanted: raise FileExistsError(f'{folder}: holds a demo with other settings ({had})')
    if not had and folder.exists() and any(folder.iterdir()): raise FileExistsError(f'{folder}: is not empty and holds no demo')
    tmp = folder.with_name(f'.{folder.name}.{os.getpid()}.tmp')
    for o in ('diabetic-retinopathy-detection/train', 'aptos2019-blindness-detection/train_images', 'aptos2019-blindness-detection/test_images'):
        (tmp / o).mkdir(parents=True)
    try:
        plan = _plan(pretrain, train, test, seed, camera_by_grade)
        lesions = []
        with ThreadPoolExecutor(cores()) as pool:
            for i, found in enumerate(pool.map(lambda r: _paint_file(tmp, seed, r), plan.itertuples())):
                lesions += found if plan.table[i] != 'pretrain' else []
                if progress: progress(i + 1, len(plan))
        _write_csvs(tmp, plan, lesions)
        (tmp / 'README.txt').write_text(f'SYNTHETIC images, painted by aptos_fastai.demo version {VERSION}, seed {seed}. They are no medical data.\n')
        (tmp / 'demo.json').write_text(json.dumps(wanted))
        if folder.exists(): shutil.rmtree(folder) if had else folder.rmdir()
        tmp.rename(folder)
    finally: shutil.rmtree(tmp, ignore_errors=True)
    return folder
