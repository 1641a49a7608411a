"The gate of a run: fitted out-of-fold, applied to its validation and test images."
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pandas as pd

from aptos_fastai.common.console import Bars
from aptos_fastai.inference.gate import GateSpec, fit_gate, reasons_of
from aptos_fastai.pipeline.scores import stage_scores
from aptos_fastai.run_folder import Run


def run_gate(run: Run, node: str) -> GateSpec:
    "Return the gate of a stage or ensemble: rules from its training images, limit from out-of-fold distances"
    rules = [run.finished_record(m, k)['gate']['rules'] for m in run.recipe.members(node) for k in run.folds_of(node)]
    gate = run.recipe.gate
    scores = run.oof(node).score.to_numpy()
    return fit_gate(rules, run.out_of_fold_distances(node), scores, gate.reject, gate.ungradable)


def table_distances(run: Run, node: str, table: str, bars: Bars) -> np.ndarray:
    "Return the feature distance (n,) of each image of a table: the mean over members and folds"
    folds = run.folds_of(node)
    parts = [weight / len(folds) / run.distance_unit(m) * stage_scores(run, m, table, k, bars).feature_distance
             for m, weight in run.member_weights(node).items() for k in folds]
    return np.sum(parts, 0)


def ungradable_test(run: Run, scores: np.ndarray, bars: Bars) -> list[str]:
    "Return for each image of the submission's table, with these `scores`, why it is ungradable; empty: it is gradable"
    submit = run.recipe.submit
    distances = table_distances(run, submit.final, submit.table, bars)
    return reasons_of(run_gate(run, submit.final), run.frames[submit.table], distances, scores)


def ungradable_validated(run: Run) -> list[str]:
    "Return the same for each validation image of the submitted stage or ensemble, by out-of-fold distances"
    node = run.recipe.submit.final
    oof = run.oof(node)
    images = pd.concat(run.frames.values()).set_index(['source', 'id_code'])
    images = images.loc[list(zip(oof.source, oof.id_code, strict=True))]
    return reasons_of(run_gate(run, node), images, run.out_of_fold_distances(node), oof.score)


def gate_result(run: Run, scores: pd.DataFrame | None) -> dict:
    "Return how many validation and test images are ungradable, and why; `scores` is scores.csv, None without tests"
    validation = dict(validation=_counts(ungradable_validated(run)))
    return validation if scores is None else validation | dict(test=_counts(scores.ungradable.fillna('')))


def _counts(reasons: Iterable[str]) -> dict:
    "Return the numbers of images, of ungradable ones and of each reason; an image can have several"
    texts = list(reasons)
    each = Counter(reason for text in texts for reason in text.split('; ') if reason)
    return dict(images=len(texts), ungradable=sum(map(bool, texts)), reasons=dict(each.most_common()))
