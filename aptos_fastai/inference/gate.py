"The gate: which images a model may grade. It travels with the model."
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load, save

from aptos_fastai.common.io import write_bytes
from aptos_fastai.metrics import upper_quantile

COMPONENTS = 64                              # of the features that are modelled one by one
ACCEPTED_HOW = .01                           # accept a way to find the retina from this fraction of training images
ACCEPTED_FLAG = .05                          # accept a flag from this fraction of them
COLOUR_QUANTILES = .001, .999                # of the training images
COLOUR_MARGIN = .25                          # added to both ends (logarithm of a ratio)
FUNDUS_COLOURS = dict(red_green=(.05, 2.), green_blue=(-.35, 3.5))   # always accepted: other cameras, white balances
ROUNDING = 1e-3                              # added to the limit: backends round differently
HOW = 'circle', 'box', 'whole'
REASONS = {
    'multiple': 'more than one retina',
    'dark': 'too dark',
    'bright': 'too bright',
    'blurred': 'blurred',
    'cut-off': 'retina cut off',
}
NO_RETINA = 'no retina found'
NOT_COLOUR = 'not a colour fundus image'
UNLIKE_TRAINING = 'unlike the training images'
SCORE_OUTSIDE = 'score outside the range of the validation images'
SCORE_MARGIN = .25                           # added to both ends of that range


@dataclass
class FeatureDistance:
    """Distance of an image from the training images in a network's pooled features.

    Mahalanobis distance (Lee et al. 2018, arXiv:1807.03888) under probabilistic PCA (Tipping and Bishop 1999), which
    needs fewer images than a full covariance matrix. With z = `components` (k, C) @ (x - `mean`):

    distance^2 = sum of z^2 / `variances` (k,) + (|x - mean|^2 - |z|^2) / `residual`
    """
    mean: np.ndarray
    components: np.ndarray
    variances: np.ndarray
    residual: float

    @classmethod
    def fit(cls, features: np.ndarray) -> 'FeatureDistance':
        "Fit to the features (n, C) of training images; few images get fewer components than `COMPONENTS`"
        x = np.asarray(features, np.float64)
        n, channels = x.shape
        mean = x.mean(0)
        _, singular, directions = np.linalg.svd(x - mean, full_matrices=False)
        variances = singular ** 2 / n
        k = min(COMPONENTS, n // 4, channels - 1)
        smallest = max(float(variances.sum()), 1.) * 1e-9              # channels that never change
        residual = max(float(variances[k:].sum()) / (channels - k), smallest)
        def rounded(a: np.ndarray) -> np.ndarray: return a.astype(np.float32)           # as it is read from a file
        return cls(rounded(mean), rounded(directions[:k]), rounded(np.maximum(variances[:k], residual)),
                   float(np.float32(residual)))

    def distances(self, features: np.ndarray) -> np.ndarray:
        "Return the distance (n,) of each row of `features` (n, C)"
        offset = np.asarray(features, np.float64) - self.mean
        projected = offset @ self.components.astype(np.float64).T
        rest = np.maximum((offset ** 2).sum(1) - (projected ** 2).sum(1), 0)
        return np.sqrt((projected ** 2 / self.variances).sum(1) + rest / self.residual)

    def write(self, file: Path) -> None:
        "Write it as safetensors"
        arrays = dict(mean=self.mean, components=self.components, variances=self.variances,
                      residual=np.array([self.residual], np.float32))
        write_bytes(file, save({name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}))

    @classmethod
    def from_bytes(cls, data: bytes) -> 'FeatureDistance':
        "Return the one that `write` wrote"
        o = {name: tensor.numpy() for name, tensor in load(data).items()}
        return cls(o['mean'], o['components'], o['variances'], float(o['residual'][0]))


@dataclass(frozen=True)
class GateSpec:
    """What a model accepts as a gradable fundus image. The default accepts everything.

    `limit` is the largest accepted feature distance: the mean over networks, each divided by its stage's
    `Run.distance_unit`; None: not checked. A colour range limits the logarithm of the ratio of two mean channels
    inside the retina; empty: not checked.
    """
    limit: float | None = None
    how: tuple[str, ...] = HOW               # accepted ways in which the retina was found
    flags: tuple[str, ...] = tuple(REASONS)  # accepted flags, of those that can refuse an image
    red_green: tuple[float, ...] = ()
    green_blue: tuple[float, ...] = ()
    ungradable: str = 'refer'                # refer | exclude: whether ungradable images count as referable
    scores: tuple[float, ...] = ()           # lowest and highest accepted score; empty: not checked
    reject: float = 0.                       # fraction of the validation images that `limit` may refuse

    def reasons(self, found: dict, distance: float, score: float) -> list[str]:
        "Return why an image gets no grade; `found` is what `prepare` found, `distance` its mean feature distance"
        flags = str(found['flags']).split()
        reasons = [text for flag, text in REASONS.items() if flag in flags and flag not in self.flags]
        if found['how'] not in self.how: reasons.insert(0, NO_RETINA)
        colours = [(found['red_green'], self.red_green), (found['green_blue'], self.green_blue)]
        if not all(ends[0] <= value <= ends[1] for value, ends in colours if ends): reasons.append(NOT_COLOUR)
        if self.limit is not None and not distance <= self.limit: reasons.append(UNLIKE_TRAINING)
        if self.scores and not self.scores[0] <= score <= self.scores[1]: reasons.append(SCORE_OUTSIDE)
        return reasons

    def count_text(self, referable: Iterable[str]) -> str:
        "Return the counts of a column `referable`: '3 referable, 5 not referable, 1 ungradable (…), 2 unreadable'"
        values = list(referable)
        yes, no, ungradable, unreadable = (values.count(o) for o in ('yes', 'no', 'ungradable', ''))
        text = f'{yes} referable, {no} not referable, {ungradable} ungradable'
        if ungradable and self.ungradable == 'exclude':
            text += ' (not counted as referable: [gate] ungradable = exclude)'
        elif ungradable: text += f' (counted as referable, {yes + ungradable} in all: [gate] ungradable = refer)'
        return f'{text}, {unreadable} unreadable' if unreadable else text


def gate_rules(images: pd.DataFrame) -> dict:
    """Return rules of `GateSpec` that accept images like the training images.

    `images` has the columns how, flags, red_green and green_blue. Accepted are the circle, each other `how` of at least
    1 % of the images, each flag of at least 5 % of them, and `FUNDUS_COLOURS` together with the range of their colours
    plus a margin. A grey image has both values near 0.
    """
    flags = [set(text.split()) for text in images['flags']]
    colours = {}
    for name, (lowest, highest) in FUNDUS_COLOURS.items():
        low, high = np.quantile(images[name], COLOUR_QUANTILES)
        colours[name] = (min(lowest, round(float(low) - COLOUR_MARGIN, 4)),
                         max(highest, round(float(high) + COLOUR_MARGIN, 4)))
    return dict(
        how=tuple(o for o in HOW if o == 'circle' or (images.how == o).mean() >= ACCEPTED_HOW),
        flags=tuple(o for o in REASONS if np.mean([o in of_image for of_image in flags]) >= ACCEPTED_FLAG),
        **colours)


def fit_gate(rules: Iterable[dict], distances: np.ndarray, scores: np.ndarray, reject: float,
             ungradable: str) -> GateSpec:
    """Return the gate of a model. `rules` are those of its networks; `distances` and `scores` (n,) are out-of-fold.

    At most the fraction `reject` of the validation images lies beyond the limit; 0: no limit, for scores either.
    """
    limit = None if reject == 0 else float(upper_quantile(distances, reject)) * (1 + ROUNDING)
    ends = (float(np.min(scores)) - SCORE_MARGIN, float(np.max(scores)) + SCORE_MARGIN) if reject else ()
    return GateSpec(limit, **merge_rules(rules), scores=ends, ungradable=ungradable, reject=reject)


def merge_rules(rules: Iterable[dict]) -> dict:
    "Return rules that accept everything that at least one of `rules` accepts; networks can have different tables"
    rules = list(rules)
    accepted = {key: tuple(o for o in known if any(o in r[key] for r in rules))
                for key, known in (('how', HOW), ('flags', tuple(REASONS)))}
    colours = {key: (min(r[key][0] for r in rules), max(r[key][1] for r in rules))
               for key in FUNDUS_COLOURS}
    return accepted | colours


def gate_of_record(record: dict) -> GateSpec:
    "Return the gate that a JSON record holds (`asdict` of a `GateSpec`)"
    values: dict[str, Any] = {key: tuple(o) if isinstance(o, list) else o for key, o in record.items()}
    return GateSpec(**values)


def reasons_of(gate: GateSpec, images: pd.DataFrame, distances: Iterable[float], scores: Iterable[float]) -> list[str]:
    "Return the reasons, joined by '; ', for each row of `images` (columns how, flags, red_green, green_blue)"
    rows = images[['how', 'flags', 'red_green', 'green_blue']].to_dict('records')
    return ['; '.join(gate.reasons(*of_image)) for of_image in zip(rows, distances, scores, strict=True)]
