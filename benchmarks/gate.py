"""What the gate refuses, and what it costs: python benchmarks/gate.py FOLDER_OF_IDRID MODEL [TABLE.csv]

FOLDER_OF_IDRID holds train.csv, train_images/ and test_images/; MODEL is a finished run on it, or a stage folder.
Each graded image is judged by the networks of its own validation fold. The other images are made here, from IDRiD or
from nothing; scikit-image's sample photographs are used where it is installed (pip install scikit-image pooch).
"""
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from aptos_fastai.common.console import say, table
from aptos_fastai.data.decode import decode
from aptos_fastai.inference.grader import Grader
from aptos_fastai.inference.model_spec import read_model

COPIES = 20                                  # images of each kind
SIDES = 600, 800                             # of the generated ones, pixels
SAMPLES = ('astronaut brick camera cat cell chelsea clock coffee coins grass gravel horse hubble_deep_field '
           'immunohistochemistry moon page rocket text').split()
Image = np.ndarray                           # uint8 RGB


def png(im: Image) -> bytes:
    "Return the bytes of an image file"
    return cv2.imencode('.png', im[..., ::-1])[1].tobytes()


# Images that are made from nothing

def black_frame(rng) -> Image: return rng.integers(0, 2, (*SIDES, 3)).astype(np.uint8)


def noise(rng) -> Image: return rng.integers(0, 256, (*SIDES, 3)).astype(np.uint8)


def page_of_text(rng) -> Image:
    "Draw lines of random letters on white"
    im = np.full((*SIDES, 3), 245, np.uint8)
    for y in range(40, SIDES[0] - 20, 28):
        line = ''.join(rng.choice(list('abcdefgh ijklm nopqr'), 50))
        cv2.putText(im, line, (20, y), cv2.FONT_HERSHEY_SIMPLEX, .6, (20, 20, 20), 1)
    return im


def xray_like(rng) -> Image:
    "Draw a grey disc with soft clouds"
    clouds = cv2.GaussianBlur(rng.normal(0, 180, SIDES).astype(np.float32), (0, 0), 15)
    disc = cv2.circle(np.zeros(SIDES, np.float32), (400, 300), 280, 1., -1)
    return _grey(disc * (120 + clouds))


def oct_like(rng) -> Image:
    "Draw wavy bright layers on black, with speckle"
    im = np.zeros(SIDES, np.float32)
    x = np.arange(SIDES[1])
    phase = rng.uniform(0, 6)
    for layer in range(6):
        y = 200 + layer * 25 + 20 * np.sin(x / 120 + phase)
        for column in x: cv2.circle(im, (int(column), int(y[column])), 6, float(rng.uniform(80, 220)), -1)
    return _grey(cv2.GaussianBlur(im, (0, 0), 2) + rng.normal(0, 12, SIDES))


def _grey(im: np.ndarray) -> Image:
    "Return a grey image as RGB"
    return np.repeat(im.clip(0, 255).astype(np.uint8)[..., None], 3, 2)


MADE: dict[str, Callable] = {'black frame': black_frame, 'noise': noise, 'page of text': page_of_text,
                             'X-ray-like': xray_like, 'OCT-like': oct_like}


# Images that are made from fundus images

def two_eyes(a: Image, b: Image) -> Image:
    "Put two images side by side"
    height = min(len(a), len(b))
    return np.hstack([a[:height], b[:height]])


def touching_eyes(a: Image, b: Image) -> Image:
    "Put two images side by side without the black between their retinas"
    def lit_columns(im): return im[:, im.max((0, 2)) > 30]
    return two_eyes(lit_columns(a), lit_columns(b))


CHANGED: dict[str, Callable] = {
    'two eyes side by side': two_eyes,
    'two eyes, touching': touching_eyes,
    'inverted fundus': lambda a, b: 255 - a,
    'fundus, red and blue swapped': lambda a, b: a[..., ::-1],
    'greyscale fundus': lambda a, b: _grey(a[..., 1]),
    'fundus, blurred (1.5 % of its height)': lambda a, b: cv2.GaussianBlur(a, (0, 0), .015 * len(a)),
    'fundus at a quarter of the brightness': lambda a, b: (a * .25).astype(np.uint8),
    'half a fundus': lambda a, b: a[:, :a.shape[1] // 2],
}


def sample_photographs() -> Iterator[tuple[str, Image]]:
    "Yield the name and pixels of scikit-image's sample images; none if it is not installed"
    if find_spec('skimage') is None: return
    from skimage import data
    for name in SAMPLES:
        try: im = np.asarray(getattr(data, name)())
        except (OSError, ModuleNotFoundError, AttributeError): continue    # it would have to be downloaded
        if im.ndim > 3: im = im[0]
        if im.dtype == bool: im = im * np.uint8(255)
        yield name, _grey(im) if im.ndim == 2 else im[..., :3]


# The table

def reasons(grader: Grader, files: list[bytes]) -> list[str]:
    "Return the column ungradable for the bytes of image files"
    images = [grader.prepare(data) for data in files]
    found: list[str] = []
    for i in range(0, len(images), 16):
        part = images[i:i + 16]
        found += grader.grade([''] * len(part), part).ungradable.tolist()
    return found


def out_of_fold(model, root: Path, folder: Path) -> list[str]:
    "Return the reasons for each graded image, by the networks of the fold that it validates"
    found: list[str] = []
    for fold in sorted({m.fold for m in model.members}):
        members = [m for m in model.members if m.fold == fold]
        total = sum(m.weight for m in members)
        of_fold = replace(model, members=tuple(replace(m, weight=m.weight / total) for m in members))
        ids = pd.read_csv((root / members[0].file).parent / 'preds.csv', dtype=dict(id_code=str)).id_code
        found += reasons(Grader(of_fold, root), [image_bytes(folder / 'train_images', i) for i in ids])
    return found


def image_bytes(folder: Path, name: str) -> bytes:
    "Return the bytes of the image with this id"
    return next(folder.glob(f'{name}.*')).read_bytes()


def row(name: str, found: list[str]) -> list:
    "Return a row of the table: share refused and the frequency of each reason"
    each = Counter(reason for text in found for reason in text.split('; ') if reason)
    refused = sum(map(bool, found))
    why = ', '.join(f'{reason} {count}' for reason, count in each.most_common())
    return [name, len(found), f'{100 * refused / max(len(found), 1):.1f} %', why]


def main(folder: Path, path: str, csv: str = '') -> None:
    "Print the table; write it to `csv`"
    model, root = read_model(path)
    grader, rng = Grader(model, root), np.random.default_rng(0)
    rows = [row('IDRiD, graded, out-of-fold', out_of_fold(model, root, folder)),
            row('IDRiD, other images', reasons(grader, [f.read_bytes() for f in sorted(folder.glob('test_images/*'))]))]
    for name, make in MADE.items(): rows.append(row(name, reasons(grader, [png(make(rng)) for _ in range(COPIES)])))
    files = sorted((folder / 'test_images').glob('*'))
    pairs = [[decode(f.read_bytes())[0] for f in (files[i], files[i + 1])] for i in range(0, 2 * COPIES, 2)]
    for name, change in CHANGED.items(): rows.append(row(name, reasons(grader, [png(change(a, b)) for a, b in pairs])))
    samples = dict(sample_photographs())
    if samples:
        found = reasons(grader, [png(im) for im in samples.values()])
        rows.append(row("scikit-image's sample photographs", found))
        say('accepted: ' + (', '.join(n for n, text in zip(samples, found, strict=True) if not text) or 'none'))
        from skimage import data
        rows.append(row("scikit-image's fundus photograph", reasons(grader, [png(data.retina())])))
    columns = ['images', 'n', 'refused', 'reasons (an image can have several)']
    table(f'{model.name}: {len(model.members)} networks, limit {model.gate.limit}', columns, rows, wrap=columns[-1:])
    if csv: pd.DataFrame(rows, columns=columns).to_csv(csv, index=False)


if __name__ == '__main__':
    if len(sys.argv) < 3: sys.exit(__doc__)
    main(Path(sys.argv[1]), *sys.argv[2:])
