"""Time thresholds, intervals and the report: python benchmarks/grades.py [IMAGES]

- Thresholds are compared with Nelder-Mead (scipy) on the same scores.
- The bootstrap interval is compared with resampling images one set at a time.
- The report is written for a synthetic run of IMAGES validation images (default 35,000); its time and size are printed.
"""
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from safetensors.torch import save

from aptos_fastai.common.console import Bars, table
from aptos_fastai.common.io import file_hash, write_bytes, write_csv, write_record
from aptos_fastai.data.demo import CAMERAS, generate_fundus
from aptos_fastai.data.retina import prepare
from aptos_fastai.data.store import jpeg_hash, store_folder, stored_column
from aptos_fastai.inference.gate import FeatureDistance, gate_rules
from aptos_fastai.metrics import MIDPOINTS, GradeThresholds, apply_thresholds, kappa_interval, quadratic_kappa
from aptos_fastai.pipeline.run_gate import gate_result
from aptos_fastai.pipeline.summary import oof_table, summarise
from aptos_fastai.recipe.read import read_recipe
from aptos_fastai.recipe.sections import Stage
from aptos_fastai.reports.run_report import write_report
from aptos_fastai.run_folder import FEATURES, HISTORY, PREDS, WEIGHTS, Run
from aptos_fastai.training.networks import create_model

RECIPE = Path(__file__).parents[1] / 'recipes/one_table.ini'
GRADE_SHARES = (.73, .07, .15, .03, .02)     # of EyePACS 2015
DIFFERENT_IMAGES = 50                        # the images of a synthetic table share so many files
EPOCHS = 12

rng = np.random.default_rng(0)


def random_scores(grades: np.ndarray) -> np.ndarray:
    "Return scores that depend on the grades as a network's do"
    return .6 * grades + .2 + rng.normal(0, .45, len(grades))


def scores_and_grades(n: int) -> tuple[np.ndarray, np.ndarray]:
    "Return `n` scores and their grades, distributed as in EyePACS 2015"
    grades = rng.choice(5, n, p=GRADE_SHARES)
    return random_scores(grades), grades


def timed(function, *args):
    "Return the seconds that a call takes, and its result"
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def fitted_kappa(scores, grades) -> float:
    "Return kappa at the best thresholds"
    return GradeThresholds().fit(scores, grades).kappa_


def nelder_mead_kappa(scores, grades) -> float:
    "Return kappa at the thresholds that Nelder-Mead finds"
    from scipy.optimize import minimize

    def loss(thresholds): return -quadratic_kappa(apply_thresholds(scores, np.sort(thresholds)), grades)
    return -minimize(loss, MIDPOINTS, method='Nelder-Mead').fun


def resampled_kappas(predicted, grades, n: int = 100) -> list[float]:
    "Return kappa of `n` resampled sets of images"
    samples = rng.integers(0, len(grades), (n, len(grades)))
    return [quadratic_kappa(predicted[rows], grades[rows]) for rows in samples]


# A synthetic finished run

def synthetic_run(root: Path, n: int) -> Run:
    "Write a finished run of one_table.ini on `n` graded and `n` // 10 ungraded images"
    recipe = read_recipe(RECIPE)
    run = Run(recipe, root, root / 'runs' / recipe.name, {})
    cv2.imwrite(str(root / 'image.jpg'), np.zeros((64, 64, 3), np.uint8))
    run.frames['train'] = synthetic_table(run, root / 'image.jpg', 'train', n, first_group=0)
    run.frames['test'] = synthetic_table(run, root / 'image.jpg', 'test', n // 10, first_group=n)
    for name, stage in recipe.stages.items(): write_stage(run, name, stage)
    return run


def synthetic_table(run: Run, original: Path, name: str, n: int, first_group: int) -> pd.DataFrame:
    "Write the store of a table of `n` images, two a patient; return its frame. `train` is graded and has 5 folds"
    rows = np.arange(n)
    frame = pd.DataFrame(dict(id_code=[f'{name}{i:06}' for i in rows], path=str(original), source=name))
    frame['group'] = [f'{name}:{i // 2}' for i in rows]
    frame['diagnosis'] = scores_and_grades(n)[1].astype(np.float32) if name == 'train' else np.float32('nan')
    folder = store_folder(frame, run.store, run.prep)
    folder.mkdir(parents=True)
    prepared = [prepare(fundus_png(i), run.prep) for i in range(DIFFERENT_IMAGES)]
    files = [folder / f'{i}.{jpeg_hash(jpeg)}{run.prep.suffix}' for i, (jpeg, _) in enumerate(prepared)]
    for file, (jpeg, _) in zip(files, prepared, strict=True): write_bytes(file, jpeg)
    records = [dict(id_code=id_code, bytes=1, mtime=1, **prepared[i % DIFFERENT_IMAGES][1], stored='', error='')
               for i, id_code in enumerate(frame.id_code)]
    write_csv(folder / 'prepared.csv', pd.DataFrame(records))
    found = {name: [prepared[i % DIFFERENT_IMAGES][1][name] for i in rows]
             for name in ('how', 'flags', 'red_green', 'green_blue')}
    stored = [str(files[i % DIFFERENT_IMAGES]) for i in rows]
    return frame.assign(**found, stored=stored, **{stored_column(run.prep.size): stored}, pixel_sha256=frame.id_code,
                        target=frame.diagnosis, duplicate_group=rows + first_group,
                        fold=rows // 2 % 5 if name == 'train' else -1)


def fundus_png(i: int) -> bytes:
    "Return a generated fundus image as PNG; grade and camera change with `i`"
    camera = list(CAMERAS)[i % len(CAMERAS)]
    rgb = generate_fundus(rng, i % 5, camera, True)[0]
    return cv2.imencode('.png', rgb[..., ::-1])[1].tobytes()


def write_stage(run: Run, name: str, stage: Stage) -> None:
    "Write the files of a finished stage with random scores and weights"
    train = run.frames['train']
    epoch = np.arange(EPOCHS)
    history = pd.DataFrame(dict(epoch=epoch, train_loss=1 / (epoch + 1), valid_loss=1.1 / (epoch + 1),
                                kappa=.9 - .5 / (epoch + 1), lr=1e-3, kept=epoch == EPOCHS - 1))
    for k in range(stage.folds):
        folder, valid = run.fold_dir(name, k), train[train.fold == k]
        scores = random_scores(valid.diagnosis.to_numpy())
        write_csv(folder / PREDS, valid[['id_code', 'source', 'diagnosis', 'fold']].assign(
            score=scores, feature_distance=rng.gamma(9, size=len(valid))))
        FeatureDistance.fit(rng.normal(size=(100, 8))).write(folder / FEATURES)
        write_csv(folder / HISTORY, history)
        write_bytes(folder / WEIGHTS, save(create_model(stage.arch, stage.head, stage.size).state_dict()))
        write_record(folder / 'stage.json', dict(
            files={f: dict(sha256=file_hash(folder / f)) for f in (PREDS, WEIGHTS, FEATURES)}, seconds=1.,
            fold=k, gate=dict(asdict(run.recipe.gate), rules=gate_rules(train)), kept_epoch=EPOCHS - 1,
            kept_kappa=.85, versions={}, synthetic=True, settings=asdict(stage), prep=asdict(run.prep),
            images=dict(train=len(train) - len(valid), valid=len(valid))))


def report(run: Run) -> None:
    "Write oof table, summary and report of a synthetic run"
    test = run.frames['test']
    scores = scores_and_grades(len(test))[0]
    predictions = pd.DataFrame(dict(
        id_code=test.id_code, score=scores, grade=apply_thresholds(scores, MIDPOINTS), grade_low=0, grade_high=2,
        score_sd=np.abs(rng.normal(0, .1, len(scores))), ungradable=''))
    with Bars() as bars:
        oof = oof_table(run)
        summary = dict(summarise(run, oof), gate=gate_result(run, predictions))
        write_report(run, summary, oof, predictions, bars)


# The table

def threshold_row(scores, grades) -> list[str]:
    seconds, kappa = timed(fitted_kappa, scores, grades)
    reference_seconds, reference_kappa = timed(nelder_mead_kappa, scores, grades)
    name = f'thresholds of {len(scores)} scores (kappa {kappa:.4f}; Nelder-Mead {reference_kappa:.4f})'
    return [name, f'{seconds:.3f} s', f'{reference_seconds:.2f} s', f'{reference_seconds / seconds:.0f}']


def interval_row(scores, grades) -> list[str]:
    predicted = apply_thresholds(scores, MIDPOINTS)
    seconds, _ = timed(kappa_interval, predicted, grades)
    reference_seconds = 100 * timed(resampled_kappas, predicted, grades)[0]      # 100 resamples timed, 10,000 needed
    return [f'10,000 resamples of {len(grades):,} images', f'{seconds:.2f} s', f'{reference_seconds:.2f} s',
            f'{reference_seconds / seconds:.0f}']


def report_row(n: int) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        run = synthetic_run(Path(folder), n)
        seconds, _ = timed(report, run)
        size = (run.root / 'report.html').stat().st_size / 1e6
    return [f'report of {n} images, {size:.1f} MB', f'{seconds:.1f} s', '', '']


def main(images: str = '35000') -> None:
    n = int(images)
    scores, grades = scores_and_grades(n)
    rows = [threshold_row(scores, grades), interval_row(scores[:3662], grades[:3662]), report_row(n)]
    table(f'{n} images', ['what', 'here', 'reference', 'ratio'], rows,
          right=('here', 'reference', 'ratio'), wrap=('what',))


if __name__ == '__main__': main(*sys.argv[1:])
