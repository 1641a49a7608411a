"""What preparing images once is worth: python benchmarks/images.py FOLDER-OF-ORIGINALS

One core, ratios against the published loader (whole decode, square bilinear resize, augmentation in Pillow, every epoch), which is restated here.
Both sides take turns on each image, so that a busy machine slows both. Without a folder the synthetic demo, enlarged to 12 megapixels, is measured.
"""
import io
import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision import transforms as T

from aptos_fastai.common.console import table
from aptos_fastai.data.decode import decode
from aptos_fastai.data.retina import Prep, crop_square, find_retina, prepare
from aptos_fastai.data.store import _hash, read_square
from aptos_fastai.recipe import Augment
from aptos_fastai.training.loaders import FundusAugment

PREP, AUGMENT = Prep(size=512), Augment(on='image')
MEAN, STD = (.485, .456, .406), (.229, .224, .225)


def published_read(path: Path, size: int) -> Image.Image: return Image.open(path).convert('RGB').resize((size, size), Image.BILINEAR)

published_augment = T.Compose([T.ColorJitter(.1, .2, .2, .1), T.RandomApply([T.GaussianBlur(3, (.1, 2.))], .5),
                               T.RandomAffine(180, (.2, .2), (.8, 1.2), .2), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)])


def our_image(path: Path, size: int, i: int) -> torch.Tensor:
    a = FundusAugment(AUGMENT).apply(read_square(path, PREP, size), [0, 0, i])
    return (torch.from_numpy(a).permute(2, 0, 1).float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def race(theirs, ours, paths: list[tuple], rounds: int) -> tuple[float, float]:
    "Median milliseconds of both, in turns over (their argument, our argument) of each image"
    took = [], []
    for k in range(rounds):
        for pair in paths:
            for f, arg, out in zip((theirs, ours), pair, took, strict=True):
                t = time.perf_counter()
                f(arg, k)
                out.append(time.perf_counter() - t)
    return tuple(1e3 * float(np.median(o)) for o in took)


def demo_originals(folder: Path, n: int = 6):
    "Painted images at 4000 x 3000"
    from aptos_fastai.data.demo import write_demo
    d = write_demo(folder / 'demo', pretrain=20, train=20, test=5)
    for p in sorted(d.rglob('*.png'))[:n]:
        cv2.imwrite(str(folder / f'{p.stem}.jpg'), cv2.resize(cv2.imread(str(p)), (4000, 3000), interpolation=cv2.INTER_CUBIC))
    return sorted(folder.glob('*.jpg'))


def store_error(paths: list[Path]) -> tuple[float, float]:
    "(mean kB an image of the store, mean grey-level error against the same crop kept losslessly)"
    sizes, errors = [], []
    for p in paths:
        data = p.read_bytes()
        jpeg = prepare(data, PREP)[0]
        im, _ = decode(data, PREP.size)
        exact = crop_square(im, find_retina(im), PREP).astype(int)
        got = cv2.imdecode(np.frombuffer(jpeg, np.uint8), 1)[..., ::-1]
        sizes.append(len(jpeg) / 1e3); errors.append(abs(got - exact).mean())
    return float(np.mean(sizes)), float(np.mean(errors))


def memory_growth(data: list[bytes], n: int = 1000) -> tuple[float, float]:
    "Peak MB of this process after `n` / 5 and after `n` images prepared"
    def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for i in range(n):
        prepare(data[i % len(data)], PREP)
        if i == n // 5: first = peak()
    return first, peak()


def main(folder: str = ''):
    torch.set_num_threads(1); cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        jpegs = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in ('.jpg', '.jpeg')) if folder else demo_originals(tmp)
        if not jpegs: sys.exit(f'error: {folder}: holds no JPEG originals')
        pngs, stored = [], []
        for p in jpegs:
            jpeg = prepare(p.read_bytes(), PREP)[0]
            stored.append(tmp / f'{p.stem}.{_hash(jpeg)}{PREP.suffix}')
            stored[-1].write_bytes(jpeg)
        for p in jpegs[:6]: pngs.append(tmp / f'{p.stem}.png'); Image.open(p).save(pngs[-1])
        rows = []

        def row(what, pair): rows.append([what, f'{pair[0]:.1f}', f'{pair[1]:.2f}', f'x {pair[0] / pair[1]:.1f}'])
        def ours(p, _): return prepare(p.read_bytes(), PREP)
        row('JPEG original -> 512 px', race(lambda p, _: np.asarray(published_read(p, 512)), ours, [(p, p) for p in jpegs], 2))
        row('PNG original -> 512 px', race(lambda p, _: np.asarray(published_read(p, 512)), ours, [(p, p) for p in pngs], 2))
        pairs = list(zip(jpegs, stored, strict=True))
        for size in (512, 256):
            def theirs(p, _, s=size): return published_augment(published_read(p, s))
            def ours_at(p, k, s=size): return our_image(p, s, k)
            row(f'a training image at {size} px', race(theirs, ours_at, pairs, 3))
        row('read alone at 512 px', race(lambda p, _: np.asarray(published_read(p, 512)), lambda p, _: read_square(p, PREP, 512), pairs, 3))
        kb, error = store_error(jpegs)
        first, last = memory_growth([p.read_bytes() for p in jpegs])
    sizes = {Image.open(io.BytesIO(p.read_bytes())).size for p in jpegs} if folder else {(4000, 3000)}
    table(f'{len(jpegs)} originals of {", ".join(f"{w} x {h}" for w, h in sorted(sizes))}; one core of {os.cpu_count()}, {platform.machine()}',
          ['milliseconds an image', 'published', 'here', 'ratio'], rows, right=('published', 'here', 'ratio'))
    print(f'store at 512 px: {kb:.0f} kB an image (35,126: {kb * 35126 / 1e6:.1f} GB), {error:.2f} grey levels off a lossless one on average')
    print(f'peak memory of one worker: {first:.0f} MB after 200 images, {last:.0f} MB after 1,000')


if __name__ == '__main__': main(*sys.argv[1:])
