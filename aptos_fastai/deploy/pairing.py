"Patients from graded images, for the page and `/api/patients`: the rules are those of `inference/patients.py`."
from typing import Any

import pandas as pd

from aptos_fastai.data.groups import EYE_EXAMPLES, UNKNOWN, read_eye
from aptos_fastai.decisions import DO_NOT_REFER, NOT_GRADABLE, REFER, UNCERTAIN_REFER
from aptos_fastai.deploy.batching import as_json
from aptos_fastai.deploy.web import RequestError, text_of
from aptos_fastai.inference.patients import MISSING_EYE, by_patient, patient_table
from aptos_fastai.metrics import GRADES

MAX_ROWS = 5000                              # images in one request
MAX_BODY = 16_000_000                        # bytes of one request
DECISIONS = REFER, UNCERTAIN_REFER, DO_NOT_REFER, NOT_GRADABLE
ANSWERS = '', 'yes', 'no', 'ungradable'
TEXTS = 'file', 'patient', 'ungradable'      # of each row
CHOICES = dict(decision=('', *DECISIONS), referable=ANSWERS, sight_threatening=ANSWERS)


def patients_of(body: Any) -> dict:
    """Return the patients of graded images: their rows, the numbers of their images, and counts.

    `body` has `rows`, each a row of `/api/predict` with patient and eye, and `missing_eye`. Raises `RequestError`.
    """
    if not isinstance(body, dict) or not isinstance(body.get('rows'), list):
        raise RequestError(400, 'send a JSON object with the key rows: a list of graded images')
    if len(body['rows']) > MAX_ROWS: raise RequestError(413, f'at most {MAX_ROWS} rows in one request')
    missing_eye = body.get('missing_eye', MISSING_EYE[0])
    if missing_eye not in MISSING_EYE: raise RequestError(400, f'missing_eye: choose one of {", ".join(MISSING_EYE)}')
    rows = [read_row(row, f'rows[{i}]') for i, row in enumerate(body['rows'])]
    if not rows: return dict(patients=[], counts=count_decisions([]))
    df = pd.DataFrame(rows).astype(dict(grade='Int64', p_referable='Float64'))
    patients = as_json(patient_table(df, missing_eye))
    for patient, numbers in zip(patients, image_numbers(df), strict=True): patient['rows'] = numbers
    return dict(patients=patients, counts=count_decisions([p['decision'] for p in patients]))


def read_row(row: Any, name: str) -> dict:
    "Return what pairing needs of a row. Raises `RequestError` that names row and key"
    if not isinstance(row, dict): raise RequestError(400, f'{name}: is no JSON object')
    out = {key: text_of(row, key, f'{name}.') for key in (*TEXTS, *CHOICES)}
    for key, accepted in CHOICES.items():
        if out[key] not in accepted: raise RequestError(400, f'{name}.{key}: {out[key]!r} is none of {accepted}')
    text = text_of(row, 'eye', f'{name}.').strip().casefold()
    eye = read_eye(text)
    if not eye and text not in UNKNOWN:
        raise RequestError(400, f'{name}.eye: {text!r} is none of {EYE_EXAMPLES}; empty where it is unknown')
    grade = number_of(row, 'grade', name, GRADES - 1)
    if grade is not None and grade != int(grade): raise RequestError(400, f'{name}.grade: {grade} is no whole number')
    return dict(out, eye=eye, grade=grade, p_referable=number_of(row, 'p_referable', name, 1))


def number_of(row: dict, key: str, name: str, highest: float) -> float | None:
    "Return a number of a row from 0 to `highest`; None if it is missing or null"
    value = row.get(key)
    if value is None: return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= highest:
        raise RequestError(400, f'{name}.{key}: enter a number from 0 to {highest}, or null')
    return value


def image_numbers(df: pd.DataFrame) -> list[list[int]]:
    "Return the numbers of the images of each patient, from 0, in the order of `patient_table`"
    return [group.index.tolist() for _, group in by_patient(df)]


def count_decisions(decisions: list[str]) -> dict[str, int]:
    "Return how many patients there are, and how many have each decision"
    return dict(patients=len(decisions), **{decision: decisions.count(decision) for decision in DECISIONS})
