"""Measure what preparing images once saves: python benchmarks/images.py [FOLDER-OF-ORIGINALS]

Compare this package on one core with the published loader, which is restated here: full decode, bilinear resize to a
square and augmentation in Pillow, every epoch. Both run in turns on each image, so that a busy machine slows both.
Without a folder, six images of the synthetic demo are measured, enlarged to 12 megapixels.
"""
import os
import platform
import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision import transforms as T

from aptos_fastai.common.console import table
from aptos_fastai.data.decode import decode
from aptos_fastai.data.demo import write_demo
from aptos_fastai.data.retina import Prep, crop_square, find_retina, prepare
from aptos_fastai.data.store import jpeg_hash, read_square
from aptos_fastai.recipe.sections import Augment
from aptos_fastai.training.loaders import FundusAugment

PREP, AUGMENT = Prep(size=512), Augment(mode='image')
MEAN, STD = (.485, .456, .406), (.229, .224, .225)
EYEPACS = 35_126                             # images of the 2015 training table


def published_read(path: Path, size: int) -> Image.Image:
    return Image.open(path).convert('RGB').resize((size, size), Image.BILINEAR)


published_augment = T.Compose([
    T.ColorJitter(.1, .2, .2, .1),
    T.RandomApply([T.GaussianBlur(3, (.1, 2.))], .5),
    T.RandomAffine(180, (.2, .2), (.8, 1.2), .2),
    T.RandomHorizontalFlip(),
    T.ToTensor(),
    T.Normalize(MEAN, STD)])


def our_training_image(path: Path, size: int, i: int) -> torch.Tensor:
    "Return an augmented, normalised image as training reads it from the store."
    im = FundusAugment(AUGMENT).apply(read_square(path, PREP, size), [0, 0, i])
    mean, std = (torch.tensor(o)[:, None, None] for o in (MEAN, STD))
    return (torch.from_numpy(im).permute(2, 0, 1).float() / 255 - mean) / std


def race(published, ours, paths: list[tuple], rounds: int) -> tuple[float, float]:
    """Return the median milliseconds of both functions.

    `paths` holds (path for `published`, path for `ours`) of each image; each function takes a path and the round.
    """
    seconds: tuple[list[float], list[float]] = [], []
    for k in range(rounds):
        for pair in paths:
            for f, path, times in zip((published, ours), pair, seconds, strict=True):
                start = time.perf_counter()
                f(path, k)
                times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(seconds[0])), 1e3 * float(np.median(seconds[1]))


def write_demo_originals(folder: Path, n: int = 6) -> list[Path]:
    "Write `n` generated images of 4000 x 3000 pixels."
    demo = write_demo(folder / 'demo', pretrain=20, train=20, test=5)
    for file in sorted(demo.rglob('*.png'))[:n]:
        im = cv2.resize(cv2.imread(str(file)), (4000, 3000), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f'{file.stem}.jpg'), im)
    return sorted(folder.glob('*.jpg'))


def find_originals(folder: str) -> list[Path]:
    files = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in ('.jpg', '.jpeg'))
    if not files: sys.exit(f'error: {folder}: no JPEG files')
    return files


def write_stored(originals: list[Path], folder: Path) -> list[Path]:
    "Prepare the originals as the store does; returns the files."
    files = []
    for original in originals:
        jpeg, _ = prepare(original.read_bytes(), PREP)
        files.append(folder / f'{original.stem}.{jpeg_hash(jpeg)}{PREP.suffix}')
        files[-1].write_bytes(jpeg)
    return files


def write_pngs(originals: list[Path], folder: Path) -> list[Path]:
    files = [folder / f'{p.stem}.png' for p in originals]
    for original, file in zip(originals, files, strict=True): Image.open(original).save(file)
    return files


def measure_store(originals: list[Path]) -> tuple[float, float]:
    "Return the mean kB of a stored image and its mean grey-level error against the same crop without compression."
    sizes, errors = [], []
    for file in originals:
        data = file.read_bytes()
        jpeg, _ = prepare(data, PREP)
        im, _ = decode(data, PREP.size)
        exact = crop_square(im, find_retina(im), PREP).astype(int)
        stored = cv2.imdecode(np.frombuffer(jpeg, np.uint8), 1)[..., ::-1]
        sizes.append(len(jpeg) / 1e3)
        errors.append(abs(stored - exact).mean())
    return float(np.mean(sizes)), float(np.mean(errors))


def peak_memory() -> float:
    "Return the peak MB of this process."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_memory(originals: list[Path], n: int = 1000) -> tuple[float, float]:
    "Return the peak MB after `n` / 5 and after `n` prepared images."
    data, early = [p.read_bytes() for p in originals], 0.
    for i in range(n):
        prepare(data[i % len(data)], PREP)
        if i == n // 5: early = peak_memory()
    return early, peak_memory()


def measure_speed(jpegs: list[Path], pngs: list[Path], stored: list[Path]) -> list[list[str]]:
    "Return a table row per job: what, published ms, our ms, ratio."
    rows = []

    def add_row(what: str, times: tuple[float, float]):
        rows.append([what, f'{times[0]:.1f}', f'{times[1]:.2f}', f'{times[0] / times[1]:.1f} ×'])

    def read_512(path, _): return np.asarray(published_read(path, 512))
    def prepare_file(path, _): return prepare(path.read_bytes(), PREP)
    def prepare_fast(path, _): return prepare(path.read_bytes(), replace(PREP, jpeg='fast'))
    add_row('JPEG original to 512 px', race(read_512, prepare_file, [(p, p) for p in jpegs], 2))
    add_row('the same, jpeg = fast', race(read_512, prepare_fast, [(p, p) for p in jpegs], 2))
    add_row('PNG original to 512 px', race(read_512, prepare_file, [(p, p) for p in pngs], 2))
    pairs = list(zip(jpegs, stored, strict=True))
    for size in (512, 256):
        def published(path, _, size=size): return published_augment(published_read(path, size))
        def ours(path, k, size=size): return our_training_image(path, size, k)
        add_row(f'training image at {size} px', race(published, ours, pairs, 3))
    add_row('reading alone at 512 px', race(read_512, lambda path, _: read_square(path, PREP, 512), pairs, 3))
    return rows


def main(folder: str = ''):
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        jpegs = find_originals(folder) if folder else write_demo_originals(tmp)
        sizes = sorted({Image.open(p).size for p in jpegs})
        rows = measure_speed(jpegs, write_pngs(jpegs[:6], tmp), write_stored(jpegs, tmp))
        kb, error = measure_store(jpegs)
        early, late = measure_memory(jpegs)
    shown = ', '.join(f'{w} x {h}' for w, h in sizes)
    table(f'{len(jpegs)} originals of {shown}; one core of {os.cpu_count()}, {platform.machine()}',
          ['milliseconds per image', 'published', 'ours', 'ratio'], rows, right=('published', 'ours', 'ratio'))
    print(f'store at 512 px: {kb:.0f} kB per image ({EYEPACS:,} images: {kb * EYEPACS / 1e6:.1f} GB), '
          f'mean error {error:.2f} grey levels')
    print(f'peak memory of one worker: {early:.0f} MB after 200 images, {late:.0f} MB after 1,000')


if __name__ == '__main__': main(*sys.argv[1:])
