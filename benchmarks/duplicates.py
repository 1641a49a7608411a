"""Measure false pairs and recall of the duplicate search: python benchmarks/duplicates.py FOLDER-OF-IMAGES [--count N]

For sharp and for defocused images (Gaussian blur, standard deviation as a share of the retina's diameter) it counts
pairs of different images, and copies that are found, by the perceptual hash alone and after the second look.
"""
import argparse
import base64
import time
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np

from aptos_fastai.common.console import say, table
from aptos_fastai.data.decode import decode
from aptos_fastai.data.duplicates import NEAR, is_same_image, texture
from aptos_fastai.data.retina import Circle, Prep, crop_square, find_retina, perceptual_hash

PREP = Prep(size=256)
BLURS = 0., .01, .02, .03
TAIL = 200                                   # closest pairs of different images, to extrapolate from
LARGE = 40_000                               # images to extrapolate to


def defocus(im: np.ndarray, circle: Circle, share: float) -> np.ndarray:
    return cv2.GaussianBlur(im, (0, 0), share * 2 * circle.r) if share else im


def reencode(im: np.ndarray, scale: float, quality: int) -> np.ndarray:
    small = cv2.resize(im, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return cv2.imdecode(cv2.imencode('.jpg', small, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)


def brighten(im: np.ndarray) -> np.ndarray:
    brighter = np.clip(im * 1.15 + 5, 0, 255)
    return np.where(im.max(2, keepdims=True) > 20, brighter, 0).astype(np.uint8)


COPIES = {
    'JPEG quality 40': lambda im: reencode(im, 1, 40),
    '0.6 of the size, quality 80': lambda im: reencode(im, .6, 80),
    'a third of the size, quality 75': lambda im: reencode(im, .34, 75),
    '15 % brighter': brighten,
    'gamma 0.75': lambda im: (255 * (im / 255) ** .75).astype(np.uint8),
}


def hash_and_texture(im: np.ndarray, circle: Circle) -> tuple[np.ndarray, np.ndarray]:
    sq = crop_square(im, circle, PREP)
    return np.frombuffer(base64.b64decode(perceptual_hash(sq)), np.uint64), texture(sq)


def closest_pairs(hashes: np.ndarray, without: set[tuple[int, int]]) -> tuple[list[tuple[int, int]], np.ndarray]:
    "Return all pairs of rows but those in `without`, the closest first, and their differing bits"
    bits = np.array([np.bitwise_count(hashes ^ row).sum(1) for row in hashes], int)
    i, j = np.triu_indices(len(hashes), 1)
    order = np.argsort(bits[i, j], kind='stable')
    pairs = [(a, b) for a, b in zip(i[order].tolist(), j[order].tolist(), strict=True) if (a, b) not in without]
    return pairs, np.array([bits[pair] for pair in pairs])


def expected_pairs(bits: np.ndarray, count: int) -> float:
    "Return the number of pairs within `NEAR` bits to expect of `count` images, from an exponential tail of `bits`"
    limit = bits[TAIL]
    scale = np.mean(limit - bits[:TAIL])
    return TAIL * np.exp((NEAR - limit) / scale) * (count * (count - 1) / 2) / len(bits)


def measure_pairs(sets: dict[float, list[tuple]]) -> list[list[str]]:
    "Return a row per blur: pairs of different images, false ones by the hash and after the second look, expectation"
    rows, copies = [], set()
    for share, found in sets.items():
        hashes, textures = np.array([o[0] for o in found]), [o[1] for o in found]
        pairs, bits = closest_pairs(hashes, copies)
        if not share:                        # real duplicates in the folder
            copies = {p for p in pairs[:(bits <= NEAR).sum()] if is_same_image(textures[p[0]], textures[p[1]])}
            pairs, bits = closest_pairs(hashes, copies)
        near = int((bits <= NEAR).sum())
        confirmed = [is_same_image(textures[i], textures[j]) for i, j in pairs[:max(near, TAIL)]]
        rows.append([f'{share:.0%}', f'{len(pairs):,}', int(bits[0]), near, sum(confirmed[:near]),
                     f'{sum(confirmed)} of {len(confirmed)}', f'{expected_pairs(bits, LARGE):,.2g}'])
    say(f'{len(copies)} pairs are copies already and left out')
    return rows


def measure_copies(images: list[np.ndarray], circles: list[Circle], sets: dict[float, list[tuple]]) -> list[list[str]]:
    "Return a row per kind of copy: share found by the hash, and after the second look, for each blur"
    rows = []
    for name, copy in COPIES.items():
        row = [name]
        for share, found in sets.items():
            by_hash, by_both = [], []
            for im, circle, (bits, structure) in zip(images, circles, found, strict=False):
                changed = np.ascontiguousarray(copy(defocus(im, circle, share)))
                bits2, structure2 = hash_and_texture(changed, find_retina(changed))
                by_hash.append(np.bitwise_count(bits ^ bits2).sum() <= NEAR)
                by_both.append(by_hash[-1] and is_same_image(structure, structure2))
            row.append(f'{100 * np.mean(by_hash):.0f} / {100 * np.mean(by_both):.0f}')
        rows.append(row)
    return rows


def main(folder: Path, count: int) -> None:
    cv2.setNumThreads(1)
    files = sorted(p for p in folder.rglob('*') if p.suffix.lower() in ('.jpg', '.jpeg', '.png'))[:count]
    images = [decode(p.read_bytes(), 512)[0] for p in files]
    circles = [find_retina(im) for im in images]
    sets = {share: [hash_and_texture(defocus(im, c, share), c) for im, c in zip(images, circles, strict=True)]
            for share in BLURS}
    table(f'pairs of different images, of {len(images)}',
          ['blur', 'pairs', 'least bits', 'near', 'confirmed', 'of closest', 'near at 40,000'], measure_pairs(sets))
    say(f'near: within {NEAR} bits. of closest: pairs that the second look confirms among the closest {TAIL}. near at '
        f'40,000: pairs within {NEAR} bits to expect of {LARGE:,} such images, before the second look.')
    few = images[:len(images) // 3]
    table(f'% of {len(few)} copies found: by the hash / after the second look',
          ['copy', *(f'blur {share:.0%}' for share in BLURS)], measure_copies(few, circles, sets))
    structures = [structure for _, structure in sets[0.][:100]]
    start = time.perf_counter()
    for a, b in pairwise(structures): is_same_image(a, b)
    say(f'second look: {1e3 * (time.perf_counter() - start) / (len(structures) - 1):.1f} ms per pair')


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('folder', type=Path)
    p.add_argument('--count', type=int, default=516, help='images to use')
    args = p.parse_args()
    main(args.folder, args.count)
