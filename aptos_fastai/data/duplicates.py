"""Find duplicate images across tables, under whichever ids, so that all copies share a fold and a grade.

Perceptual hashes name the candidates; registration of the two prepared images confirms them.
"""
import base64
from collections.abc import Callable
from functools import lru_cache, partial

import cv2
import numpy as np
import pandas as pd

from aptos_fastai.common.console import say
from aptos_fastai.data.decode import ImageError
from aptos_fastai.data.retina import Prep
from aptos_fastai.data.store import read_square

NEAR = 84                                    # differing bits of 576; measured in `data.retina.perceptual_hash`
NEIGHBOURS = 128                             # rows that `near_pairs` compares each row with
WORDS = 36                                   # 16-bit words of a hash

# Mirrored copies and quarter turns: whether rows and columns are swapped, rows reversed, columns reversed. The third
# quarter turn is the first one seen from the other image
TURNS = ((False, False, True), (False, True, False), (False, True, True), (True, False, False), (True, True, True),
         (True, False, True))
NEAR_TURNED = 60                             # differing bits of the turned hash: 40 in copies, 130 in others of IDRiD
WORDS_TURNED = 9                             # compared words: a pair at 40 bits shares one with probability .96
NEIGHBOURS_TURNED = 32
MOST_TURNED = 50_000                         # images; among more, turned copies are not searched

# The second look at a pair, measured by benchmarks/duplicates.py
LOOK_SIDE = 128                              # side of the registered images, pixels
LOOK_RADIUS = .8                             # compared part of the retina, share of its radius: without the rim
LOOK_BAND = 1., 3.                           # standard deviations of the Gaussians whose difference is registered
MIN_CORRELATION = .88                        # of the registered images
MAX_SHIFT = 4.                               # of the registration, pixels
MAX_STRETCH = .05                            # of the registration: the largest change of an entry of its matrix

Edges = list[tuple[np.ndarray, np.ndarray]]  # arrays of rows (from, to)


def near_pairs(bits: np.ndarray, near: int = NEAR, n_words: int = WORDS,
               neighbours: int = NEIGHBOURS) -> list[tuple[int, int]]:
    """Return the pairs of rows of `bits` (n x bytes, uint8, all different) that differ in at most `near` bits.

    Compares only rows that share one of their 36 16-bit words: a pair at 58 bits shares one with probability .999,
    a pair at 84 bits with .95. Rows that share a word are sorted by the two words after it, and each is compared with
    the next `neighbours`: of 128, all of them up to about 40,000 images. The work stays linear for a million images,
    where it finds .82 of the pairs at 58 bits and .99 of those at 40 (simulated with words of 500 values). Of the words
    `n_words` are compared, evenly spread.
    """
    words, longs = bits.view(np.uint16).T, bits.view(np.uint64)
    found: set[tuple[int, int]] = set()
    for k in range(0, len(words), len(words) // n_words):
        word = words[k]
        second, third = words[(k + 1) % len(words)], words[(k + 2) % len(words)]
        order = np.lexsort((third, second, word))
        for step in range(1, min(len(word), neighbours + 1)):
            i, j = order[:-step], order[step:]
            shared = word[i] == word[j]
            if not shared.any(): break
            i, j = i[shared], j[shared]
            close = np.bitwise_count(longs[i] ^ longs[j]).sum(1, dtype=np.int32) <= near
            i, j = i[close], j[close]
            found.update(zip(np.minimum(i, j).tolist(), np.maximum(i, j).tolist(), strict=True))
    return sorted(found)


def known_bits(hashes: pd.Series) -> np.ndarray:
    "Return the bits of different perceptual hashes, uint64 (n, 9), without a black image's: it is like no other"
    bits = _bits(np.unique(hashes)).view(np.uint64)
    return bits[bits.any(1)]


def near_known(hashes: pd.Series, known: np.ndarray, near: int = NEAR) -> np.ndarray:
    """Return whether each of `hashes` (perceptual) differs in at most `near` bits from one of `known` (`known_bits`).

    It compares all pairs, because `near_pairs` misses some: 0.1 s for 1,000 images and 1,000 known ones.
    """
    unique, row = np.unique(hashes, return_inverse=True)
    found = [bool(len(known)) and o.any() and np.bitwise_count(known ^ o).sum(1, dtype=np.int32).min() <= near
             for o in _bits(unique).view(np.uint64)]
    return np.array(found, bool)[row]


def _bits(hashes) -> np.ndarray:
    "Return the bits of perceptual hashes, uint8 (n, 72)."
    return np.stack([np.frombuffer(base64.b64decode(o), np.uint8) for o in hashes])


def _first_row_with_key(keys: pd.Series) -> np.ndarray:
    "Return for each row the first row with the same key."
    codes = pd.factorize(keys)[0]
    return np.unique(codes, return_index=True)[1][codes]


def _first_row_connected(n: int, edges: Edges) -> np.ndarray:
    "Return for each of `n` rows the smallest row that it is connected to; `edges` are arrays of rows (from, to)."
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    start, end = (np.concatenate(o) for o in zip(*edges, strict=True))
    graph = coo_array((np.ones(len(start), bool), (start, end)), shape=(n, n))
    labels = connected_components(graph, directed=False)[1]
    return np.unique(labels, return_index=True)[1][labels]


def _similar_hashes(hashes: pd.Series) -> Edges:
    "Return edges between rows of equal or near perceptual hashes; a black image (all bits 0) is like no other."
    unique = hashes.drop_duplicates()
    bits = _bits(unique)
    is_black = ~bits.any(1)
    unique, bits = unique[~is_black], bits[~is_black]
    rows = np.flatnonzero(hashes.isin(unique))
    pairs = np.array(near_pairs(bits), int).reshape(-1, 2)
    first = unique.index.to_numpy()          # the first row with each hash
    return [(rows[_first_row_with_key(hashes.iloc[rows])], rows), (first[pairs[:, 0]], first[pairs[:, 1]])]


def _turned_copies(hashes: pd.Series, turn: tuple[bool, bool, bool]) -> Edges:
    "Return the edges from rows to those that have nearly the same perceptual hash once they are turned"
    unique = hashes.drop_duplicates()
    bits = _bits(unique)
    unique, bits = unique[bits.any(1)], bits[bits.any(1)]
    pairs = near_pairs(np.concatenate([bits, turned_bits(bits, turn)]), NEAR_TURNED, WORDS_TURNED, NEIGHBOURS_TURNED)
    n, first = len(bits), unique.index.to_numpy()
    edges = np.array([(i, j - n) for i, j in pairs if i < n <= j and i != j - n], int).reshape(-1, 2)
    return [(first[edges[:, 0]], first[edges[:, 1]])]


def turned_bits(bits: np.ndarray, turn: tuple[bool, bool, bool]) -> np.ndarray:
    """Return the bits (n, 72) that the perceptual hashes of the turned images have, nearly.

    An image that is mirrored has the same frequencies, those of odd order with the other sign.
    """
    swapped, *reversed_axes = turn
    signs = np.unpackbits(bits, axis=1).reshape(-1, 24, 24)
    if swapped: signs = signs.transpose(0, 2, 1)
    odd = np.arange(1, 25) % 2 == 1
    rows, columns = (odd & is_reversed for is_reversed in reversed_axes)
    return np.packbits((signs ^ (rows[:, None] ^ columns)).reshape(len(bits), -1), axis=1)


def turned(a: np.ndarray, turn: tuple[bool, bool, bool]) -> np.ndarray:
    "Return a square with rows and columns swapped, then rows and columns reversed, as `turn` says"
    swapped, rows, columns = turn
    return np.ascontiguousarray((a.T if swapped else a)[::-1 if rows else 1, ::-1 if columns else 1])


# The second look

@lru_cache(1)
def _look_mask() -> np.ndarray:
    "Return uint8 `LOOK_SIDE` x `LOOK_SIDE`: 255 in the part of the retina that is compared, else 0."
    offset = np.arange(LOOK_SIDE) - (LOOK_SIDE - 1) / 2
    distance = np.hypot(offset[:, None], offset)
    return np.where(distance < LOOK_RADIUS * LOOK_SIDE / 2, 255, 0).astype(np.uint8)


def texture(sq: np.ndarray) -> np.ndarray:
    "Return the fine structure of a prepared square for `is_same_image`: vessels and lesions, without illumination."
    green = cv2.resize(sq[..., 1], (LOOK_SIDE, LOOK_SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    fine, coarse = (cv2.GaussianBlur(green, (0, 0), sigma) for sigma in LOOK_BAND)
    return fine - coarse


def is_same_image(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether two `texture`s are of one photograph: they correlate once `b` is registered to `a`.

    Registers by an affine map that maximises the correlation (ECC, Evangelidis and Psarakis 2008). Copies need almost
    none, because the circle of the retina aligns them; different images are bent to fit each other, and rejected.
    """
    still = np.eye(2, 3, dtype=np.float32)
    criteria = cv2.TERM_CRITERIA_COUNT + cv2.TERM_CRITERIA_EPS, 30, 1e-4
    try: correlation, warp = cv2.findTransformECC(a, b, still.copy(), cv2.MOTION_AFFINE, criteria, _look_mask(), 5)
    except cv2.error: return False           # no registration was found, or one of the images has no structure
    change = np.abs(warp - still)
    is_small = change[:, :2].max() <= MAX_STRETCH and change[:, 2].max() <= MAX_SHIFT
    return bool(is_small and correlation >= MIN_CORRELATION)


def _confirm(df: pd.DataFrame, edges: Edges, prep: Prep, turn: tuple[bool, bool, bool] = (False,) * 3) -> Edges:
    """Return the `edges` between rows whose prepared images, the second one turned, `is_same_image` finds equal.

    A pair with an image that is not in the store, or that was changed there, counts as equal: the image is prepared
    before anything uses it, or stops the run.
    """
    read: Callable[[str], np.ndarray] = lru_cache(4096)(partial(_read_texture, prep=prep))

    def confirmed(i: int, j: int) -> bool:
        try: return is_same_image(read(df.stored.iat[i]), turned(read(df.stored.iat[j]), turn))
        except ImageError: return True

    pixels, kept = pd.factorize(df.pixel_sha256)[0], []
    for start, end in edges:
        same = pixels[start] == pixels[end]
        for k in np.flatnonzero(~same): same[k] = confirmed(start[k], end[k])
        kept.append((start[same], end[same]))
    return kept


def _read_texture(path: str, prep: Prep) -> np.ndarray:
    return texture(read_square(path, prep, LOOK_SIDE))


# Groups

def group_duplicates(frames: dict[str, pd.DataFrame], prep: Prep | None = None) -> dict[str, pd.DataFrame]:
    """Add a column `duplicate_group` to prepared `frames` and merge the groups of duplicates.

    `duplicate_group` is equal for copies of an image, in whichever table: equal pixels, or a near perceptual hash, also
    mirrored or after quarter turns, that a second look at the images prepared with `prep` confirms; without `prep` the
    hash alone decides.
    Groups that share a duplicate become one `group`, so that neither a patient nor an image is on both sides of a fold.
    """
    df = pd.concat(frames.values(), ignore_index=True)
    rows = np.arange(len(df))
    same_pixels = _first_row_with_key(df.pixel_sha256), rows
    similar = _similar_hashes(df.perceptual_hash)
    if prep: similar = _confirm(df, similar, prep)
    for turn in TURNS if len(df) <= MOST_TURNED else ():
        copies = _turned_copies(df.perceptual_hash, turn)
        similar += _confirm(df, copies, prep, turn) if prep else copies
    if len(df) > MOST_TURNED: say(f'{len(df)} images: mirrored and rotated copies are not searched', 'yellow')
    duplicate_group = _first_row_connected(len(df), [same_pixels, *similar])
    same_group = _first_row_with_key(df.group), rows
    first = _first_row_connected(len(df), [(duplicate_group, rows), same_group])
    df = df.assign(duplicate_group=duplicate_group, group=df.group.to_numpy()[first])
    return _split_by_table(df, frames)


def resolve_conflicts(frames: dict[str, pd.DataFrame], how: str) -> dict[str, pd.DataFrame]:
    """Add a column `target`, the grade that an image is trained towards, for duplicates with different grades.

    `how` = keep: its own grade; mean: the mean grade of its group; drop: remove the graded images of such groups.
    """
    df = pd.concat(frames.values(), ignore_index=True)
    is_graded, grades = df.diagnosis.notna(), df.groupby('duplicate_group').diagnosis
    df['target'] = df.diagnosis
    if how == 'mean': df['target'] = grades.transform('mean').where(is_graded).astype(np.float32)
    if how == 'drop': df = df[~is_graded | (grades.transform('nunique') < 2)]
    return _split_by_table(df, frames)


def _split_by_table(df: pd.DataFrame, names) -> dict[str, pd.DataFrame]:
    return {n: df[df.source == n].reset_index(drop=True) for n in names}


def duplicates_table(frames: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of images that have duplicates.

    Columns: duplicate_group, source, id_code, diagnosis, conflict (the group has different grades).
    """
    df = pd.concat(frames.values(), ignore_index=True)
    df = df[df.duplicate_group.duplicated(keep=False)]
    df = df.sort_values(['duplicate_group', 'source', 'id_code'], kind='stable')
    df = df.assign(conflict=df.groupby('duplicate_group').diagnosis.transform('nunique') > 1)
    return df[['duplicate_group', 'source', 'id_code', 'diagnosis', 'conflict']]
