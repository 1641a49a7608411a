"Choose another operating point for a finished model, and write it as a new bundle."
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from aptos_fastai.common.console import say, table
from aptos_fastai.common.disclaimer import DISCLAIMER
from aptos_fastai.common.io import AptosError, check_output_folder, read_record
from aptos_fastai.decisions import LEVELS, OperatingPoint
from aptos_fastai.deploy.bundle import build_bundle, rewrite_bundle
from aptos_fastai.deploy.parity import parity_images, show_parity
from aptos_fastai.inference.evaluate import Choices, evaluate_table
from aptos_fastai.inference.model_spec import BUNDLE, ModelSpec, read_model
from aptos_fastai.inference.referral import fit_points
from aptos_fastai.inference.validation_scores import validation_scores
from aptos_fastai.metrics import stratified_group_parts
from aptos_fastai.recipe.sections import Refer
from aptos_fastai.reports.evaluation_report import evaluated
from aptos_fastai.reports.parts import measure_text

USELESS = .5                                 # a specificity below it is warned of
OF_POINTS = 'operating point'                # begins every warning of an operating point


@dataclass(frozen=True)
class Scores:
    "Scores of graded images that choose an operating point: `df` has score, diagnosis, group; parts share no group"
    df: pd.DataFrame
    parts: np.ndarray
    origin: str                              # in words
    over: str                                # what a group is


def write_operating_point(model: str, refer: Refer, output: str = '', graded: str = '', skip_missing: bool = False,
                          **where) -> Path:
    """`operating-point MODEL`: write a bundle with the operating points of `refer`; return its folder.

    They are chosen on the model's out-of-fold scores or on the table `graded`, whose arguments for `evaluate_table` are
    `where`; images that the model was trained on are left out, and with `skip_missing` rows without an image. Weights,
    grades and probabilities stay as they are. Raises `AptosError` if the folder exists or no point can be chosen.
    """
    if skip_missing and not graded: raise AptosError('--skip-missing: name the graded images with --table.')
    spec, root = read_model(model)
    if spec.eyes:
        raise AptosError(f'{model}: grades by both eyes of a patient, whose operating points are fitted by `all` only. '
                         'Set them in [refer] of the recipe and run `all`, which trains nothing.')
    folder = Path(output) if output else default_folder(Path(model), refer)
    if folder.exists(): raise AptosError(f'{folder}: already exists. Choose another folder with -o.')
    check_output_folder(folder.parent)
    scores = table_scores(model, graded, skip_missing, **where) if graded else own_scores(model)
    points, warnings = fit_points(refer, scores.df, scores.parts, scores.origin)
    if not points: raise AptosError(f'{model}: {"; ".join(warnings)}. Choose on a table that has both.')
    changed = with_points(spec, points, [*warnings, *useless(points)])
    temp = folder.with_name(f'.{folder.name}.tmp')
    shutil.rmtree(temp, ignore_errors=True)
    try:
        images = parity_images(root, spec)
        if read_record(root / BUNDLE): parity = rewrite_bundle(changed, root, temp, images, spec.digests)
        else: parity = build_bundle(changed, root, temp, images, validation_scores(model), spec.digests)
        temp.rename(folder)
    finally: shutil.rmtree(temp, ignore_errors=True)
    show_parity(parity, images)
    show_points(spec, changed, scores)
    say(f'bundle -> {folder} (model {changed.key}; before: {spec.key})')
    return folder


def default_folder(model: Path, refer: Refer) -> Path:
    "Return the folder of a new bundle: beside a bundle, in the folder of a run or stage"
    targets = dict.fromkeys(f'{target}_{value:g}' for target, _, value in refer.targets(LEVELS))
    name = f'bundle_{"_".join(targets)}'
    return (model.resolve().parent if read_record(model / BUNDLE) else model) / name


def own_scores(model: str) -> Scores:
    "Return the out-of-fold scores of a model's validation images"
    df = validation_scores(model)
    origin = f'out-of-fold scores of its {len(df)} validation images'
    return Scores(df, df.part.to_numpy(), origin, 'patients where known')


def table_scores(model: str, graded: str, skip_missing: bool = False, **where) -> Scores:
    "Return a model's scores of the images of a graded table that it was not trained on"
    evaluation = evaluate_table(model, graded, choices=Choices(skip_missing=skip_missing), **where)
    df = evaluated(evaluation).reset_index(drop=True)
    table_record = evaluation.record['table']
    ungradable = int((df.ungradable != '').sum())
    if ungradable:
        say(f'{graded}: the gate rejects {ungradable} of {len(df)} images: they are referred as ungradable, whatever '
            'their score, and count here all the same', 'yellow')
    origin = f'scores of {len(df)} images of {table_record["name"]} ({table_record["csv"] or "class folders"})'
    if evaluation.record['seen_unknown']: origin += f'; {evaluation.record["seen_unknown"]}'
    return Scores(df, stratified_group_parts(df.diagnosis, df.group), origin, table_record['grouped_by'])


def with_points(spec: ModelSpec, points: Sequence[OperatingPoint], warnings: Sequence[str]) -> ModelSpec:
    "Return a model with other operating points; warnings of its former ones are dropped"
    kept = [text for text in spec.warnings if OF_POINTS not in text]
    return replace(spec, decision=replace(spec.decision, points=tuple(points)), warnings=(*kept, *warnings))


def useless(points: Sequence[OperatingPoint]) -> list[str]:
    "Return a warning of each operating point that tells little apart: it calls most of the negative images positive"
    found = [(o.label, o.specificity['value']) for o in points]
    return [f'{OF_POINTS} for {name} retinopathy: specificity {value:.2f}, so that most images without it are called '
            'positive' for name, value in found if value is not None and value < USELESS]


def show_points(before: ModelSpec, after: ModelSpec, scores: Scores) -> None:
    "Print the operating points before and after"
    rows = [[when, o.label, o.target_text, f'{o.threshold:.3f}', measure_text(o.sensitivity),
             measure_text(o.specificity)]
            for when, model in (('before', before), ('now', after)) for o in model.decision.points]
    columns = ['', 'retinopathy', 'chosen for', 'score ≥', 'sensitivity (95 % CI)', 'specificity (95 % CI)']
    table(f'operating points of {after.name}', columns, rows, wrap=columns[-2:])
    say(f'Chosen on {scores.origin}. Sensitivity and specificity are cross-fitted over {scores.over}: an image had no '
        'part in the threshold that calls it. A referral is apart from the grade: grades are unchanged.', 'dim')
    for text in after.warnings: say(f'warning: {text}', 'yellow')
    say(DISCLAIMER, 'dim')
