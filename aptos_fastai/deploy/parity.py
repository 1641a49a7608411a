"Compare backends and precisions with PyTorch f32 on the same images: scores, grades and referrals."
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch

from aptos_fastai.common.console import Bars, say, table
from aptos_fastai.data.retina import Prep, prepare_sizes
from aptos_fastai.inference.backends import MAX_DIFFERENCE, PACKAGES, changed_text
from aptos_fastai.inference.grader import Grader, load_grader
from aptos_fastai.inference.model_spec import ModelSpec
from aptos_fastai.inference.views import mean_and_sd
from aptos_fastai.metrics import grade_scores, wilson_interval
from aptos_fastai.training.precision import has_bf16

COMPARED = ('onnx', 'f32'), ('openvino', 'f32'), ('openvino', 'bf16'), ('torch', 'bf16'), ('torch', 'fp16')
PARITY_IMAGES = 200                          # images on which backends are compared
BATCH = 16                                   # of them at a time
# Largest share of changed grades and of changed referrals. An f32 score differs by rounding, so that one image of 200
# may lie on a threshold. In bf16 and fp16 one image may always change: 4 grades and 2 referrals of 200
MAX_GRADES_CHANGED = dict(f32=.005, bf16=.02, fp16=.02)
MAX_REFERRALS_CHANGED = dict(f32=.005, bf16=.01, fp16=.01)
ALWAYS_ALLOWED = dict(f32=0, bf16=1, fp16=1)


Jpegs = dict[int, bytes]                     # the prepared squares of an image by their sides


class ParityImages(NamedTuple):
    "Prepared images on which backends are compared"
    jpegs: list[Jpegs]
    origin: str                              # in words, with their numbers


class Predictions(NamedTuple):
    "What one backend predicts of the parity images, each (n,)"
    scores: np.ndarray
    grades: np.ndarray                       # -1: the gate refuses the image
    referable: np.ndarray                    # yes, no, or ungradable


def parity_images(root: Path, model: ModelSpec, n: int = 0) -> ParityImages:
    """Return `n` (default `PARITY_IMAGES`) images of the run's store, equally many of each table.

    Each is at all sides that the model's members read. If the store has fewer such images, all of them and synthetic
    ones.
    """
    n, store = n or PARITY_IMAGES, root.parent / 'prepared'
    preps = [replace(model.prep, size=side) for side in sorted(set(model.prepared.values()))]
    folders = [folder for folder in sorted((store / model.prep.name).glob('*')) if folder.is_dir()]
    tables = [images_at_all_sides(store, folder.name, preps) for folder in folders]
    files = {by_prep[model.prep]: by_prep for table in tables for by_prep in table}
    chosen = spread_over_tables([[by_prep[model.prep] for by_prep in table] for table in tables], n)
    jpegs = [{prep.size: file.read_bytes() for prep, file in files[name].items()} for name in chosen]
    parts = [(len(jpegs), 'images of the run'), (n - len(jpegs), 'synthetic images')]
    origin = ' and '.join(f'{count} {name}' for count, name in parts if count)
    return ParityImages([*jpegs, *synthetic_images(n - len(jpegs), preps)], origin)


def images_at_all_sides(store: Path, table: str, preps: Sequence[Prep]) -> list[dict[Prep, Path]]:
    "Return the files of the images of a table's folder that are stored by each of `preps`, in the order of their names"
    files = [{f.name.removesuffix(prep.suffix).rpartition('.')[0]: f for f in (store / prep.name / table).glob('*.jpg')}
             for prep in preps]
    names = sorted(set.intersection(*map(set, files)))
    return [{prep: of_prep[name] for prep, of_prep in zip(preps, files, strict=True)} for name in names]


def spread_over_tables(tables: Sequence[Sequence[Path]], n: int) -> list[Path]:
    "Return up to `n` files, equally many of each table where it has so many, evenly spaced in each"
    chosen: list[Path] = []
    smallest_first = sorted(tables, key=len)
    for i, files in enumerate(smallest_first):
        wanted = min(len(files), (n - len(chosen)) // (len(smallest_first) - i))
        chosen += [files[k * len(files) // wanted] for k in range(wanted)]
    return chosen


def synthetic_images(n: int, preps: Sequence[Prep]) -> list[Jpegs]:
    "Return `n` images of the demo, of all grades and cameras, prepared at the sides of `preps`"
    from aptos_fastai.data.demo import CAMERAS, generate_fundus
    rng, cameras = np.random.default_rng(0), list(CAMERAS)
    jpegs = []
    for i in range(n):
        im, _ = generate_fundus(rng, i % 5, cameras[i % len(cameras)], True)
        png = cv2.imencode('.png', im[..., ::-1])[1].tobytes()
        jpegs.append(prepare_sizes(png, preps[0], [prep.size for prep in preps])[0])
    return jpegs


def compare_backends(folder: Path, jpegs: list[Jpegs]) -> list[dict]:
    """Compare every backend and precision that this machine has with PyTorch f32, on the same prepared images.

    Returns a dict for each: maximum and mean difference of a score; numbers of changed grades and referrals, and their
    95 % intervals as shares; seconds; and whether all are within the bounds.
    """
    with Bars() as bars:
        expected = predict_jpegs(load_grader(folder), jpegs, bars)
        return [comparison(backend, precision, expected, folder, jpegs, bars) for backend, precision in COMPARED
                if find_spec(PACKAGES[backend]) is not None and has_precision(precision)]


def has_precision(precision: str) -> bool:
    "Return whether this machine computes in a precision: bf16 in hardware, fp16 on a GPU"
    if precision == 'fp16': return torch.cuda.is_available()
    return precision != 'bf16' or has_bf16()


def comparison(backend: str, precision: str, expected: Predictions, folder: Path, jpegs: list[Jpegs],
               bars: Bars) -> dict:
    "Return how far the predictions of a backend are from the `expected` ones"
    start = time.monotonic()
    found = predict_jpegs(load_grader(folder, backend, precision), jpegs, bars)
    seconds = time.monotonic() - start
    difference, n = np.abs(found.scores - expected.scores), len(jpegs)
    largest = float(difference.max())
    grades, referrals = ((getattr(found, o) != getattr(expected, o)).sum() for o in ('grades', 'referable'))
    record = dict(backend=backend, precision=precision, images=n, max_difference=largest,
                  mean_difference=float(difference.mean()), grades_changed=int(grades),
                  grades_interval=list(wilson_interval(int(grades), n)), referrals_changed=int(referrals),
                  referrals_interval=list(wilson_interval(int(referrals), n)), bound=MAX_DIFFERENCE[precision],
                  seconds=round(seconds, 1))
    within = within_bounds(precision, largest, int(grades), int(referrals), n)
    return dict(record, within_bounds=within)


def predict_jpegs(grader: Grader, jpegs: list[Jpegs], bars: Bars) -> Predictions:
    "Return what a grader predicts of prepared images"
    model, parts = grader.model, []
    with bars(f'comparing {grader.backend} {grader.precision}', len(jpegs), 'images') as bar:
        for i in range(0, len(jpegs), BATCH):
            batch = jpegs[i:i + BATCH]
            images = [model.squares(o) for o in batch]
            squares = {size: np.stack([o[size] for o in images]) for size in model.sizes}
            parts.append(_predict(grader, squares))
            bar.to(i + len(batch))
    return Predictions(*map(np.concatenate, zip(*parts, strict=True)))


def _predict(grader: Grader, squares: dict[int, np.ndarray]) -> Predictions:
    "Return the predictions of a batch. The gate judges features and score only: the rest does not depend on a backend"
    model = grader.model
    members, distances = grader.scores_and_distances(squares)
    scores, _ = mean_and_sd(members)
    fold_scores = model.fold_scores([mean for _, mean, _ in members])
    grades, _, high = grade_scores(scores, model.thresholds, grader.prediction_sets, fold_scores)
    referable = model.decision.decide(scores, grades, high, grader.prevalence)['referable'].astype('<U10')
    refused = np.zeros(len(scores), bool) if model.gate.limit is None else ~(distances <= model.gate.limit)
    if model.gate.scores: refused |= (scores < model.gate.scores[0]) | (scores > model.gate.scores[1])
    return Predictions(scores, np.where(refused, -1, grades), np.where(refused, 'ungradable', referable))


def within_bounds(precision: str, max_difference: float, grades: int, referrals: int, images: int) -> bool:
    "Return whether scores, grades and referrals differ as little as they must in this precision"
    def allowed(share: float) -> int: return max(ALWAYS_ALLOWED[precision], int(share * images + 1e-9))
    return (max_difference <= MAX_DIFFERENCE[precision] and grades <= allowed(MAX_GRADES_CHANGED[precision])
            and referrals <= allowed(MAX_REFERRALS_CHANGED[precision]))


def show_parity(parity: list[dict], images: ParityImages) -> None:
    "Show how much each backend differs"
    rows = [[f'{o["backend"]} {o["precision"]}', f'{o["max_difference"]:.1e}', _changed(o, 'grades'),
             _changed(o, 'referrals'), 'yes' if o['within_bounds'] else 'no'] for o in parity]
    table(f'compared with PyTorch f32 on {images.origin}',
          ['backend', 'score, max.', 'grades (95 % CI)', 'referrals (95 % CI)', 'within bounds'], rows)
    for o in parity:
        if not o['within_bounds']:
            say(f'{o["backend"]} {o["precision"]}: predict refuses it with this bundle', 'yellow')
    if not has_bf16(): say('bf16 was not compared: this device does not support it', 'yellow')


def _changed(parity: dict, what: str) -> str:
    "Return '8 of 200 (2–8 %)'"
    return changed_text(parity, what).replace(f' {what}', '').replace('95 % CI ', '')
