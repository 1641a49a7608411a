"Fuse the scores of both eyes in a run ([submit] eyes = fused): whose eye an image shows, fit, and cross-fitted grades."
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pandas as pd

from aptos_fastai.common.io import digest
from aptos_fastai.data.tables import PATIENT_OF_EYE
from aptos_fastai.inference.eyes import EyesSpec, cross_fitted, fellow_scores, fit_eyes
from aptos_fastai.recipe.sections import ConfigError
from aptos_fastai.recipe.smaller import postpone_stages
from aptos_fastai.run_folder import Run

MIN_PATIENTS = 30                            # with both eyes among the validation images; fewer fit no fusion
KEYS = ['source', 'id_code']


def people_of(run: Run, images: pd.DataFrame) -> pd.DataFrame:
    "Return patient and eye of each image (source, id_code), in order; '' where they are unknown"
    known = pd.concat(run.frames.values()).set_index(KEYS).reindex(columns=[PATIENT_OF_EYE, 'eye'])
    rows = known.loc[list(zip(images.source, images.id_code, strict=True))].fillna('')
    return rows.reset_index(drop=True).set_axis(['patient', 'eye'], axis=1)


def check_eyes(run: Run) -> None:
    "Raise `ConfigError` if the eyes are to be fused and too few validated patients have images of both"
    if run.recipe.submit.eyes != 'fused' or (n := patients_with_both(run)) >= MIN_PATIENTS: return
    raise ConfigError(f'{run.recipe.path} [submit] eyes = fused: {n} patients have validation images of both eyes, at '
                      f'least {MIN_PATIENTS} are needed. Validate more folds or images, or set eyes = single.')


def patients_with_both(run: Run) -> int:
    "Return how many patients have images of both eyes among those that validate the model"
    final = run.recipe.submit.final
    stage = next(iter(run.recipe.members(final)))
    images = pd.concat([run.validation_images(stage, k) for k in run.folds_of(final)], ignore_index=True)
    people = people_of(run, images)
    both = np.isfinite(fellow_scores(np.zeros(len(people)), people.patient, people.eye))
    return people.patient[both].nunique()


def without_stages(run: Run, names: Iterable[str]) -> Run:
    "Return the run without some stages (`postpone_stages`); its eyes are single if too few patients have both"
    smaller = replace(run, recipe=postpone_stages(run.recipe, names))
    if smaller.recipe.submit.eyes != 'fused' or patients_with_both(smaller) >= MIN_PATIENTS: return smaller
    return replace(smaller, recipe=smaller.recipe.with_single_eyes())


def paired(run: Run, oof: pd.DataFrame) -> pd.DataFrame:
    "Return the rows of `oof` (source, id_code, score …) that have a fellow, with its score `fellow`, sorted by id"
    people = people_of(run, oof)
    fellow = fellow_scores(oof.score, people.patient, people.eye)
    return oof.assign(fellow=fellow)[np.isfinite(fellow)].sort_values(KEYS, ignore_index=True)


def fit_run_eyes(run: Run, valid: pd.DataFrame) -> tuple[EyesSpec | None, list[str]]:
    "Return what grades by both eyes and warnings; None without fusion. `valid` are the images that validated the model"
    submit = run.recipe.submit
    if submit.eyes != 'fused': return None, []
    rows = paired(run, valid)
    chosen_on = f'fused out-of-fold scores of {run.recipe.name}/{submit.final}, {len(rows)} images'
    return fit_eyes(rows, run.parts(rows), submit.thresholds, run.recipe.refer, submit.coverage, chosen_on)


def fused_columns(run: Run, oof: pd.DataFrame) -> pd.DataFrame:
    "Return source, id_code, fused_score and fused_grade, cross-fitted, of the out-of-fold images that have a fellow"
    rows = paired(run, oof)
    fused = cross_fitted(rows, run.parts(rows), run.recipe.submit.thresholds)
    return fused[KEYS].assign(fused_score=fused.score, fused_grade=fused.grade)


def eyes_digest(run: Run) -> str:
    "Return the SHA-256 of the patients and eyes that a fusion depends on; empty without fusion"
    if run.recipe.submit.eyes != 'fused': return ''
    return digest({name: people_of(run, frame).to_numpy().tolist() for name, frame in run.frames.items()})
