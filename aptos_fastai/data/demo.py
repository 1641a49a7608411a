"""Generate synthetic fundus images in Kaggle's folder layout: the built-in default data and the tests' data.

They show no real eye and have no clinical meaning.
"""
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from aptos_fastai.common.distributed import cores

VERSION = 1                                   # increase it when any image changes: older demos are then regenerated
NOTE = 'demo.json'                            # settings of a demo, in its folder
COLOUR = Sequence[float]                      # RGB, 0-1


@dataclass(frozen=True)
class Camera:
    "How a camera shows a retina: the frame, the circle in it, colour, sharpness and noise."
    width: int
    height: int
    radius: float                             # of the circle, as a fraction of the frame's height
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


# The retina

def _smooth_noise(rng: np.random.Generator, side: int, cells: int) -> np.ndarray:
    "Return noise (side, side) of mean 0 and about unit SD that varies over side / cells pixels."
    coarse = rng.normal(size=(cells, cells)).astype(np.float32)
    return cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)


def _blend(im: np.ndarray, alpha: np.ndarray, colour: COLOUR):
    "Blend `colour` into `im` in place; `alpha` (h, w, 1) is 0-1."
    im += alpha * (np.asarray(colour, np.float32) - im)


def _blend_mask(im: np.ndarray, mask: np.ndarray, blur: float, colour: COLOUR, strength: float):
    "Blend `colour` into `im` in place where a uint8 mask, blurred by `blur` pixels, is set."
    soft = cv2.GaussianBlur(mask, (0, 0), blur)
    _blend(im, soft.astype(np.float32)[..., None] * (strength / 255), colour)


def _draw_vessel(rng: np.random.Generator, mask: np.ndarray, start: np.ndarray, angle: float, width: float,
                 length: float, bend: float, depth: int = 0):
    "Draw a vessel from the point `start` as a random walk that bends and tapers, and its branches."
    n = 20
    angles = angle + np.cumsum(bend / n + rng.normal(0, .07, n))
    steps = length / n * np.c_[np.cos(angles), np.sin(angles)]
    path = np.vstack([start, start + np.cumsum(steps, 0)])
    for quarter in range(4):
        points = (path[quarter * n // 4:(quarter + 1) * n // 4 + 1] * 16).round().astype(np.int32)
        thickness = max(1, round(width * (1 - .18 * quarter)))
        cv2.polylines(mask, [points], False, 255, thickness, cv2.LINE_AA, 4)
    if depth == 2: return
    for i in np.flatnonzero(rng.random(n) < .13 - .03 * depth):
        branch_angle = angles[i] + rng.choice([-1, 1]) * rng.uniform(.4, .9)
        branch_length = length * rng.uniform(.25, .5)
        _draw_vessel(rng, mask, path[i + 1], branch_angle, width * .6, branch_length, bend * .3, depth + 1)


def _draw_vessels(rng: np.random.Generator, im: np.ndarray, disc: np.ndarray, outward: int):
    """Draw veins (wide, dark) and arteries (narrow, light) that leave the optic disc.

    The arcades go around the macula; short vessels go the other way, `outward` (+1 or -1).
    """
    side = len(im)
    veins, arteries = np.zeros((side, side), np.uint8), np.zeros((side, side), np.uint8)
    for mask, width in ((veins, .021), (arteries, .014)):
        for up in (-1, 1):
            start = disc + rng.normal(0, .012 * side, 2)
            angle = np.arctan2(up, -.25 * outward) + rng.normal(0, .15)         # upwards, then over the macula
            bend = up * outward * rng.uniform(1.2, 1.7)
            _draw_vessel(rng, mask, start, angle, width * side, side * rng.uniform(.62, .8), bend)
            angle = np.arctan2(up * .9, outward) + rng.normal(0, .2)
            _draw_vessel(rng, mask, start, angle, width * .8 * side, side * .3, rng.normal(0, .3))
    _blend_mask(im, arteries, .6, (.62, .2, .08), .75)
    _blend_mask(im, veins, .6, (.42, .1, .05), .85)


def _gaussian(side: int, centre: np.ndarray, sigma: float) -> np.ndarray:
    "Return a Gaussian (side, side, 1) of height 1 around `centre` (x, y)."
    at = np.arange(side, dtype=np.float32)
    x, y = (np.exp(-(at - np.float32(o)) ** 2 / (2 * sigma ** 2)) for o in centre)
    return np.outer(y, x)[..., None]


def _background(rng: np.random.Generator, side: int, disc: np.ndarray, macula: np.ndarray) -> np.ndarray:
    "Return an orange-red retina (side, side, 3) with choroidal texture, dark macula, bright optic disc and cup."
    im = np.empty((side, side, 3), np.float32)
    brightness = rng.uniform(.85, 1.12)
    im[:] = np.array([.72, .36, .15], np.float32) * brightness * rng.uniform(.93, 1.07, 3).astype(np.float32)
    im *= (1 + .05 * _smooth_noise(rng, side, 6) + .03 * _smooth_noise(rng, side, 24))[..., None]
    dark_macula = 1 - .42 * _gaussian(side, macula, .065 * side)
    pale_nerve_fibres = 1 + .25 * _gaussian(side, disc, .16 * side)
    im *= dark_macula * pale_nerve_fibres
    disc_radius = side * rng.uniform(.062, .078)
    _draw_disc(im, disc, disc_radius, (.98, .78, .48), .18)
    _draw_disc(im, disc, disc_radius * .5, (1., .92, .72), .25)          # the cup
    return im


def _draw_disc(im: np.ndarray, centre: np.ndarray, radius: float, colour: COLOUR, softness: float):
    "Blend an ellipse into `im` in place; its edge is `softness` of its radius wide."
    at = np.arange(len(im), dtype=np.float32)
    x, y = at - np.float32(centre[0]), at - np.float32(centre[1])
    distance = np.hypot(x[None] * 1.08, y[:, None]) / np.float32(radius)
    _blend(im, 1 / (1 + np.exp(np.minimum((distance - 1) / softness * 3, 30)))[..., None], colour)


# Lesions. Microaneurysms are drawn about three times their real size (10-100 micrometres): they would vanish at 64 px.

COUNTS: dict[int, dict[str, tuple[int, int]]] = {       # grade -> kind -> fewest and most lesions in an image
    0: {},
    1: dict(ma=(3, 6)),
    2: dict(ma=(6, 11), haem=(3, 6), exudate=(1, 3)),
    3: dict(ma=(9, 15), haem=(11, 17), exudate=(1, 3), cotton=(2, 4)),
    4: dict(ma=(6, 12), haem=(5, 12), exudate=(1, 3), neo=(2, 3), boat=(1, 2))}

STYLES = dict(                                # kind -> colour, strength, blur (pixels), in the order of drawing
    exudate=((1., .9, .5), .9, .5),
    cotton=((.95, .88, .72), .75, 2.5),       # cotton-wool spots
    ma=((.38, .04, .03), .9, .4),             # microaneurysms
    haem=((.36, .03, .03), .92, .8),          # haemorrhages
    neo=((.45, .06, .05), .9, .4),            # new vessels
    boat=((.33, .02, .03), .94, 1.2))         # preretinal (boat-shaped) haemorrhages


def _random_point(rng: np.random.Generator, side: int, disc: np.ndarray, macula: np.ndarray,
                  quadrant: int | None = None) -> np.ndarray:
    "Return a point (x, y) of the retina outside the optic disc and the fovea, in `quadrant` if given."
    while True:
        angle = rng.uniform(0, 2 * np.pi)
        radius = side * .44 * np.sqrt(rng.uniform(.02, 1))
        if quadrant is not None: angle = (quadrant + rng.uniform(0, 1)) * np.pi / 2
        p = side / 2 + radius * np.array([np.cos(angle), np.sin(angle)])
        if np.hypot(*(p - disc)) > .11 * side and np.hypot(*(p - macula)) > .05 * side: return p


def _draw_spot(rng: np.random.Generator, mask: np.ndarray, p: np.ndarray, radius: float, raggedness: float = 0.):
    "Draw a round or ragged spot of `radius` pixels."
    n = 14
    angles = np.arange(n) * 2 * np.pi / n
    radii = radius * (1 + raggedness * rng.uniform(-1, 1, n))
    points = np.c_[p[0] + radii * np.cos(angles), p[1] + radii * np.sin(angles)]
    cv2.fillPoly(mask, [(points * 16).round().astype(np.int32)], 255, cv2.LINE_AA, 4)


def _draw_exudates(rng: np.random.Generator, mask: np.ndarray, p: np.ndarray) -> float:
    side = len(mask)
    radius = side * rng.uniform(.04, .06)
    for _ in range(rng.integers(7, 14)):
        at = p + rng.normal(0, radius / 2, 2)
        _draw_spot(rng, mask, at, side * rng.uniform(.006, .014), .3)
    return radius


def _draw_new_vessels(rng: np.random.Generator, mask: np.ndarray, p: np.ndarray) -> float:
    side = len(mask)
    radius = side * rng.uniform(.05, .08)
    for _ in range(9):
        start = p + rng.normal(0, radius / 5, 2)
        angle, bend = rng.uniform(0, 6.3), rng.normal(0, 4)
        _draw_vessel(rng, mask, start, angle, 1.4 * side / 330, radius * 1.8, bend, 2)
    return radius


def _draw_boat(rng: np.random.Generator, mask: np.ndarray, p: np.ndarray) -> float:
    "Draw preretinal blood: it sinks, so it is flat above and round below."
    radius = len(mask) * rng.uniform(.09, .14)
    x, y = p.astype(int).tolist()
    cv2.ellipse(mask, (x, y), (int(radius), int(radius * .75)), rng.uniform(-12, 12), 0, 180, 255, -1, cv2.LINE_AA)
    return radius


SPOTS = dict(ma=(.010, .014, 0.), haem=(.018, .034, .35), cotton=(.03, .045, .3))       # least, most radius, raggedness
CLUSTERS = dict(exudate=_draw_exudates, neo=_draw_new_vessels, boat=_draw_boat)


def _draw_lesion(kind: str, rng: np.random.Generator, mask: np.ndarray, p: np.ndarray) -> float:
    "Draw one lesion on the mask of its kind; returns its radius in pixels."
    if kind in CLUSTERS: return float(CLUSTERS[kind](rng, mask, p))
    least, most, raggedness = SPOTS[kind]
    radius = len(mask) * rng.uniform(least, most)
    _draw_spot(rng, mask, p, radius, raggedness)
    return float(radius)


def _draw_lesions(rng: np.random.Generator, im: np.ndarray, grade: int,
                  disc: np.ndarray, macula: np.ndarray) -> list[dict]:
    "Draw the lesions of `grade` on `im`; returns kind, x, y and radius of each, pixels of `im`."
    side, found = len(im), []
    for kind, (colour, strength, blur) in STYLES.items():
        if kind not in COUNTS[grade]: continue
        fewest, most = COUNTS[grade][kind]
        mask = np.zeros((side, side), np.uint8)
        for i in range(rng.integers(fewest, most + 1)):
            if kind == 'neo' and i == 0: p = disc + rng.normal(0, .06 * side, 2)         # new vessels at the disc
            else: p = _random_point(rng, side, disc, macula, i % 4 if kind == 'haem' else None)
            radius = _draw_lesion(kind, rng, mask, p)
            found.append(dict(kind=kind, x=float(p[0]), y=float(p[1]), radius=radius))
        _blend_mask(im, mask, blur, colour, strength)
    return found


# The image

def generate_fundus(rng: np.random.Generator, grade: int, camera: str,
                    right_eye: bool) -> tuple[np.ndarray, list[dict]]:
    "Generate a uint8 HxWx3 RGB image of an eye of `grade`, and its lesions: kind, x, y, radius in pixels."
    cam = CAMERAS[camera]
    radius = cam.height * cam.radius * rng.uniform(.985, 1.015)
    side = int(2 * radius)
    outward = 1 if right_eye else -1                        # the optic disc of a right eye lies on the right
    disc = np.array([.5 + outward * rng.uniform(.22, .3), .5 + rng.normal(0, .02)]) * side
    macula = np.array([.5 - outward * rng.uniform(.03, .1), .52 + rng.normal(0, .015)]) * side
    retina = _background(rng, side, disc, macula)
    _draw_vessels(rng, retina, disc, outward)
    lesions = _draw_lesions(rng, retina, grade, disc, macula)
    retina *= _vignette(side)
    return _photograph(rng, retina, cam, lesions)


def _vignette(side: int) -> np.ndarray:
    "Return the brightness (side, side, 1) of a circle that darkens outwards and has a soft edge."
    at = np.arange(side, dtype=np.float32) / (side / 2) - 1
    d = np.hypot(at[None], at[:, None])
    shade, edge = np.clip(1.12 - .38 * d * d, 0, 1.1), np.clip((1 - d) * side / 3, 0, 1)
    return (shade * edge).astype(np.float32)[..., None]


def _photograph(rng: np.random.Generator, retina: np.ndarray, cam: Camera,
                lesions: list[dict]) -> tuple[np.ndarray, list[dict]]:
    "Return the retina as the camera shows it, and the lesions moved into the camera's frame."
    side = len(retina)
    x0, y0 = int((cam.width - side) / 2 + rng.normal(0, 2)), int((cam.height - side) / 2 + rng.normal(0, 2))
    left, top = max(x0, 0), max(y0, 0)
    right, bottom = min(x0 + side, cam.width), min(y0 + side, cam.height)
    frame = np.zeros((cam.height, cam.width, 3), np.float32)
    frame[top:bottom, left:right] = retina[top - y0:bottom - y0, left - x0:right - x0]
    if cam.notch:
        cv2.circle(frame, (int(x0 + side * .93), int(y0 + side * .25)), int(side * .035), (0, 0, 0), -1)
    tint = np.array(cam.tint, np.float32)
    frame = cv2.GaussianBlur(frame * tint, (0, 0), cam.blur * rng.uniform(.8, 1.3)) * 255 * rng.uniform(.85, 1.1)
    grain = rng.standard_normal((cam.height // 2, cam.width // 2, 3), np.float32)
    frame += cam.noise * cv2.resize(grain, (cam.width, cam.height))
    moved = [dict(kind=o['kind'], x=round(o['x'] + x0, 1), y=round(o['y'] + y0, 1), radius=round(o['radius'], 1))
             for o in lesions]
    return frame.clip(0, 255).astype(np.uint8), moved


# The tables

SHARES15, SHARES19 = (.40, .15, .20, .13, .12), (.36, .16, .22, .13, .13)     # share of each grade, by year
FOLDERS = ('diabetic-retinopathy-detection/train', 'aptos2019-blindness-detection/train_images',
           'aptos2019-blindness-detection/test_images')


def _grades(n: int, shares: Sequence[float]) -> np.ndarray:
    "Return `n` sorted grades in these shares, each grade at least once."
    counts = np.maximum(1, np.floor(np.array(shares) * n)).astype(int)
    counts[0] += n - counts.sum()
    return np.repeat(np.arange(5), counts)


def plan_demo(pretrain: int, train: int, test: int, seed: int, camera_by_grade: bool) -> pd.DataFrame:
    "Return what to generate, one row per image: file, id_code, table, grade, camera, right_eye."
    rng, rows = np.random.default_rng([seed, 0]), []
    cameras = {year: [c for c in CAMERAS if c.endswith(year)] for year in ('15', '19')}

    def draw_camera(year, grade) -> str:
        if camera_by_grade and rng.random() < .8: return cameras[year][grade % 3]
        return str(rng.choice(cameras[year]))

    for i, left in enumerate(rng.permutation(_grades((pretrain + 1) // 2, SHARES15))):
        camera = draw_camera('15', left)
        same = rng.random() < .87            # the share of EyePACS patients with equal grades in both eyes
        right = left if same else int(np.clip(left + rng.choice([-1, 1]), 0, 4))
        for eye, grade in (('left', left), ('right', right)):
            name = f'{10 + 3 * i}_{eye}'
            rows.append((f'{FOLDERS[0]}/{name}.jpeg', name, 'pretrain', int(grade), camera, eye == 'right'))
    for table, n, folder in (('train', train, FOLDERS[1]), ('test', test, FOLDERS[2])):
        for grade in rng.permutation(_grades(n, SHARES19)):
            name = f'{rng.integers(0, 2**48):012x}'
            camera, right_eye = draw_camera('19', grade), bool(rng.random() < .5)
            rows.append((f'{folder}/{name}.png', name, table, int(grade), camera, right_eye))
    return pd.DataFrame(rows, columns=['file', 'id_code', 'table', 'grade', 'camera', 'right_eye'])


def _write_image(folder: Path, seed: int, row) -> list[dict]:
    "Generate and write the image of one row; returns its lesions."
    rng = np.random.default_rng([seed, 1, row.Index])
    im, lesions = generate_fundus(rng, row.grade, row.camera, row.right_eye)
    options = [cv2.IMWRITE_JPEG_QUALITY, 90] if row.file.endswith('jpeg') else [cv2.IMWRITE_PNG_COMPRESSION, 1]
    data = cv2.imencode(Path(row.file).suffix, im[..., ::-1], options)[1]
    (folder / row.file).write_bytes(data.tobytes())
    return [dict(id_code=row.id_code, **o) for o in lesions]


def _write_csvs(folder: Path, plan: pd.DataFrame, lesions: list[dict]):
    plan = plan.rename(columns=dict(grade='diagnosis'))
    pretrain, train, test = (plan[plan.table == t] for t in ('pretrain', 'train', 'test'))
    old, new = folder / 'diabetic-retinopathy-detection', folder / 'aptos2019-blindness-detection'
    labels = pretrain[['id_code', 'diagnosis']].set_axis(['image', 'level'], axis=1)
    labels.to_csv(old / 'trainLabels.csv', index=False)
    train[['id_code', 'diagnosis']].to_csv(new / 'train.csv', index=False)
    test[['id_code']].to_csv(new / 'test.csv', index=False)
    test[['id_code']].assign(diagnosis=0).to_csv(new / 'sample_submission.csv', index=False)
    test[['id_code', 'diagnosis']].to_csv(new / 'test_grades.csv', index=False)
    pd.DataFrame(lesions, columns=['id_code', 'kind', 'x', 'y', 'radius']).to_csv(new / 'lesions.csv', index=False)


def write_demo(folder: Path, *, pretrain: int = 600, train: int = 480, test: int = 160, seed: int = 42,
               camera_by_grade: bool = False, progress: Callable[[int, int], None] | None = None) -> Path:
    """Write the demo's tables under `folder` in the layout of Kaggle's archives, atomically, unless they exist.

    No recipe reads `aptos2019-blindness-detection/test_grades.csv` (the grades of the generated test images) and
    `lesions.csv`: they are for checks. `camera_by_grade` adds a shortcut: the camera predicts the grade.
    Raises `FileExistsError` if `folder` contains anything else.
    """
    folder = Path(folder)
    settings = dict(version=VERSION, pretrain=pretrain, train=train, test=test, seed=seed,
                    camera_by_grade=camera_by_grade)
    note = folder / NOTE
    existing = json.loads(note.read_text(encoding='utf-8')) if note.is_file() else None
    if existing == settings: return folder
    if existing and {**existing, 'version': VERSION} != settings:
        raise FileExistsError(f'{folder}: contains a demo with other settings ({existing})')
    if not existing and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f'{folder}: is not empty and contains no demo')
    tmp = folder.with_name(f'.{folder.name}.{os.getpid()}.tmp')
    try:
        _write_tables(tmp, plan_demo(pretrain, train, test, seed, camera_by_grade), seed, progress)
        readme = f'SYNTHETIC DEMO: images generated by aptos_fastai, version {VERSION}, seed {seed}. No patient data.\n'
        (tmp / 'README.txt').write_text(readme, encoding='utf-8')
        (tmp / NOTE).write_text(json.dumps(settings), encoding='utf-8')
        if existing: shutil.rmtree(folder)               # of an earlier version
        try:
            if folder.exists(): folder.rmdir()
            tmp.rename(folder)
        except OSError:                                  # another process has written the same demo meanwhile
            if not note.is_file() or json.loads(note.read_text(encoding='utf-8')) != settings: raise
    finally: shutil.rmtree(tmp, ignore_errors=True)
    return folder


def holds_demo_images(paths: Iterable[str | Path]) -> bool:
    "Return True if one of the images lies in a folder of images that `write_demo` wrote"
    folders = {Path(folder).resolve() for folder in {os.path.dirname(path) for path in paths}}
    return any('/'.join(folder.parts[-2:]) in FOLDERS and _is_demo(folder.parents[1]) for folder in folders)


def _is_demo(folder: Path) -> bool:
    note = folder / NOTE
    try: settings = json.loads(note.read_text(encoding='utf-8'))
    except (OSError, ValueError): return False           # none, or a file of this name that someone else wrote
    return isinstance(settings, dict) and 'camera_by_grade' in settings


def _write_tables(folder: Path, plan: pd.DataFrame, seed: int, progress: Callable[[int, int], None] | None):
    "Write the images on all cores, then the CSVs."
    for o in FOLDERS: (folder / o).mkdir(parents=True)
    lesions: list[dict] = []
    with ThreadPoolExecutor(cores()) as pool:
        results = pool.map(lambda row: _write_image(folder, seed, row), plan.itertuples())
        for i, found in enumerate(results):
            if plan.table[i] != 'pretrain': lesions += found
            if progress: progress(i + 1, len(plan))
    _write_csvs(folder, plan, lesions)
