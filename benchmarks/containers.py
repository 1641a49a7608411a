"""Measure how the container of an image changes its score: python benchmarks/containers.py MODEL FOLDER-OF-JPEGS

Each JPEG is decoded in full, and its pixels are saved as PNG, BMP and TIFF. The scores of these files are compared with
that of the JPEG, and so are those of JPEGs that are reduced by scaling the DCT (to 1/8, 1/4 or 1/2, then by means of
pixels). The times of decoding alternate with the fastest of them, so that a busy machine slows both.
"""
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from aptos_fastai import load_grader
from aptos_fastai.common.console import table
from aptos_fastai.data import retina
from aptos_fastai.data.decode import box_mean, decode, decode_jpeg, reduction

Decoder = Callable[..., tuple[np.ndarray, tuple[int, int]]]


def scaled_decoder(scale: int) -> Decoder:
    "Return `decode` for JPEGs, whose DCT is scaled to 1/`scale` at least."
    def decode_scaled(data: bytes, min_side: int, max_pixels: int = 0):
        size = Image.open(io.BytesIO(data)).size
        factor = reduction(min(size), min_side)
        first = min(scale, factor)
        return box_mean(decode_jpeg(data, first), factor // first), size
    return decode_scaled


DCT = {f'JPEG, DCT to 1/{scale}': scaled_decoder(scale) for scale in (8, 4, 2)}
REFERENCE = next(iter(DCT))


def save(im: Image.Image, fmt: str) -> bytes:
    f = io.BytesIO()
    im.save(f, fmt)
    return f.getvalue()


def jobs_of(jpeg: bytes) -> dict[str, tuple[Decoder, bytes]]:
    "Return the decoder and the file of each row of the table."
    im = Image.fromarray(np.asarray(Image.open(io.BytesIO(jpeg)).convert('RGB')))
    files = {'JPEG': jpeg} | {fmt: save(im, fmt) for fmt in ('PNG', 'BMP', 'TIFF')}
    return {name: (f, jpeg) for name, f in DCT.items()} | {name: (decode, data) for name, data in files.items()}


def score(grader, decoder: Decoder, data: bytes) -> float:
    retina.decode = decoder
    try: return float(grader.grade([''], [grader.prepare(data)]).score[0])
    finally: retina.decode = decode


def milliseconds(decoder: Decoder, data: bytes, side: int) -> float:
    start = time.perf_counter()
    decoder(data, side)
    return 1e3 * (time.perf_counter() - start)


def main(model: str, folder: str):
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    grader = load_grader(model)
    scores, times = [], []
    files = sorted(Path(folder).glob('*.jp*g'))
    for file in files:
        jobs = jobs_of(file.read_bytes())
        scores.append({name: score(grader, *job) for name, job in jobs.items()})
        times.append({name: [milliseconds(*job, side) for side in (320, 512)] for name, job in jobs.items()})
    rows = []
    medians = {name: np.median([o[name] for o in times], 0) for name in times[0]}
    for name in times[0]:
        differences = [abs(o[name] - o['PNG']) for o in scores]
        speed = [f'{ms:.0f} ({ms / of:.1f} ×)' for ms, of in zip(medians[name], medians[REFERENCE], strict=True)]
        rows.append([name, f'{max(differences):.3f}', f'{np.mean(differences):.3f}', *speed])
    table(f'{len(files)} JPEGs, {grader}; one core; ratios: {REFERENCE}',
          ['container', 'largest', 'mean difference of scores', 'ms at 320', 'ms at 512'], rows,
          right=('largest', 'mean difference of scores', 'ms at 320', 'ms at 512'))


if __name__ == '__main__': main(*sys.argv[1:])
