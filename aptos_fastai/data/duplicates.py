"Images that stand in the tables more than once, under other ids: one group, one fold, one grade."
import base64
from collections.abc import Iterator

import numpy as np
import pandas as pd

NEAR = 84                                    # of 576 bits; `data.retina.perceptual_hash` tells what was measured
NEIGHBOURS = 128


def _root(parent: np.ndarray, i: int) -> int:
    while parent[i] != i: parent[i] = i = parent[parent[i]]
    return i


def _join(parent: np.ndarray, pairs) -> np.ndarray:
    "Joins the sets of each pair; the smallest row stands for a set"
    for i, j in pairs:
        a, b = _root(parent, i), _root(parent, j)
        parent[max(a, b)] = min(a, b)
    return parent


def _same(keys: pd.Series) -> Iterator[tuple[int, int]]:
    "(first row with the key, each further row with it)"
    codes = pd.factorize(keys)[0]
    first = np.unique(codes, return_index=True)[1][codes]
    rows = np.arange(len(codes))
    return zip(first[first != rows].tolist(), rows[first != rows].tolist(), strict=True)


def near_pairs(bits: np.ndarray, near: int = NEAR) -> list[tuple[int, int]]:
    """Pairs of rows of `bits` (n x bytes, uint8, rows all different) that differ in at most `near` bits.

    Only rows that share one of the 36 16-bit words are compared: a pair at 58 bits shares one with probability .999, at 84 with .95. Of the rows that share
    a word, sorted by the two words after it, each is compared with the `NEIGHBOURS` next ones: all of them up to some 40,000 images, and the work
    stays linear for a million, where .82 of the pairs at 58 bits are found, .99 at 40 (simulated with words of 500 values).
    """
    words, longs, found = bits.view(np.uint16).T, bits.view(np.uint64), set()
    for k, w in enumerate(words):
        order = np.lexsort((words[(k + 2) % len(words)], words[(k + 1) % len(words)], w))
        for step in range(1, min(len(w), NEIGHBOURS + 1)):
            i, j = order[:-step], order[step:]
            same = w[i] == w[j]
            if not same.any(): break
            i, j = i[same], j[same]
            close = np.bitwise_count(longs[i] ^ longs[j]).sum(1, dtype=np.int32) <= near
            found.update(zip(np.minimum(i, j)[close].tolist(), np.maximum(i, j)[close].tolist(), strict=True))
    return sorted(found)


def group_duplicates(frames: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """`frames`, prepared, with a column `duplicate` (images that are the same, in whichever table) and their groups process_group over duplicates,
    so that neither a patient nor an image is on both sides of a fold."""
    df = pd.concat(frames.values(), ignore_index=True)
    hashes = df.perceptual_hash.drop_duplicates()
    bits = np.stack([np.frombuffer(base64.b64decode(o), np.uint8) for o in hashes])
    hashes, bits = hashes[bits.any(1)], bits[bits.any(1)]                   # a black image looks like nothing
    seen = df.perceptual_hash.isin(hashes).to_numpy()
    rows = np.flatnonzero(seen)
    duplicate = _join(np.arange(len(df)), [*_same(df.pixel_sha256), *((rows[i], rows[j]) for i, j in _same(df.perceptual_hash[seen])),
                                      *((hashes.index[i], hashes.index[j]) for i, j in near_pairs(bits))])
    duplicate = np.array([_root(duplicate, i) for i in range(len(df))])
    group = _join(duplicate.copy(), _same(df.group))
    df = df.assign(duplicate=duplicate, group=[df.group[_root(group, i)] for i in range(len(df))])
    return {n: df[df.source == n].reset_index(drop=True) for n in frames}


def resolve_conflicts(frames: dict[str, pd.DataFrame], how: str) -> dict[str, pd.DataFrame]:
    """`frames` with a column `target`, what an image is trained towards: its grade, or with `how` = mean that of its duplicates.
    With drop, graded images whose duplicates have other grades are left out."""
    df = pd.concat(frames.values(), ignore_index=True)
    grades = df.groupby('duplicate').diagnosis
    df['target'] = grades.transform('mean').where(df.diagnosis.notna()).astype(np.float32) if how == 'mean' else df.diagnosis
    if how == 'drop': df = df[df.diagnosis.isna() | (grades.transform('nunique') < 2)]
    return {n: df[df.source == n].reset_index(drop=True) for n in frames}


def duplicates_table(frames: dict[str, pd.DataFrame]) -> pd.DataFrame:
    "The rows of images that stand there more than once: duplicate, source, id_code, diagnosis, conflict (their grades differ)"
    df = pd.concat(frames.values(), ignore_index=True)
    df = df[df.duplicate.duplicated(keep=False)].sort_values(['duplicate', 'source', 'id_code'], kind='stable')
    return df.assign(conflict=df.groupby('duplicate').diagnosis.transform('nunique') > 1)[['duplicate', 'source', 'id_code', 'diagnosis', 'conflict']]
