"""Check that predictions came from a model: `verify MODEL grades.csv`.

Three questions, each of which can refute: are the CSV and patients.csv the ones that were written, by this very model
(their audit file); does every row follow from its score by the model's thresholds and operating point; does the model
give a sample of the images the same predictions again, and can unreadable images still not be read?
"""
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path, PurePath

import numpy as np
import pandas as pd
import torch

import aptos_fastai
from aptos_fastai.common.console import Bars, plural, say
from aptos_fastai.common.io import AptosError, file_hash, read_record
from aptos_fastai.data.spreadsheet import unsafe_cell
from aptos_fastai.decisions import DECISION_COLUMNS, NOT_GRADABLE, P_COLUMNS, UNGRADABLE
from aptos_fastai.inference.audit import (
    AUDIT_FORMAT,
    OWN_KEYS,
    audit_file,
    audit_record,
    differing_parts,
    processed_text,
)
from aptos_fastai.inference.backends import MAX_DIFFERENCE
from aptos_fastai.inference.eyes import EyesSpec
from aptos_fastai.inference.find_images import ImageEntry, find_images
from aptos_fastai.inference.grader import COLUMNS, Grader, load_grader
from aptos_fastai.inference.model_spec import ModelSpec, read_model
from aptos_fastai.inference.patients import PATIENTS
from aptos_fastai.metrics import GRADE_NAMES, apply_thresholds

SAME_MACHINE = 1e-3                          # difference of a score in f32 with the same backend on the same device
ROUNDING = 5e-5                              # of a number with four decimals
NEEDED = ['file', 'score', 'grade']          # columns of a CSV that can be verified
NUMBERS = ['score', 'own_score', 'score_sd', 'grade', 'grade_low', 'grade_high', *P_COLUMNS]
ALWAYS = ['flags', 'ungradable']             # of a repeated prediction must be equal, ...
SETS = ['grade_low', 'grade_high']           # ... and these where its score is the same to `SAME_MACHINE`, or unproven
NOT_FOUND = 'image not found; give what predict was given as --images'
REPLACED = 'the image was changed or replaced (SHA-256 differs)'
SHOWN = 10                                   # rows whose contradictions are printed
NOT_KNOWN = ('no {}: an older version or another program wrote the CSV, or `predict` was stopped just before it wrote '
             'this file. Its model, version, backend and time are not known. Nor is the prevalence: probabilities are '
             'not compared. Nor whether rows were removed')


@dataclass
class Findings:
    "What speaks against the predictions (`reasons`), what a reader should know (`notes`), and what was found right"
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    agreed: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)

    def check(self, wrong: str, right: str) -> None:
        "Add a reason if there is one, else what was found right"
        if wrong: self.reasons.append(wrong)
        else: self.agreed.append(right)

    def check_rows(self, df: pd.DataFrame, wrong: dict[int, str], what: str, right: str) -> None:
        "Add the rows that are `wrong` as a reason, '3 of 20 … differ', with the first of them; others as details"
        rows = [f'row {i + 1} ({PurePath(df.file[i]).name}): {wrong[i]}' for i in sorted(wrong)]
        self.check(f'{len(rows)} {what} ({rows[0]})' if rows else '', right)
        self.details += rows[:SHOWN]


def verify_grades(model: str, grades: str, sample: int | None = 20, images: Sequence[str] = (),
                  root: str | None = None, sheet: str = '') -> None:
    """`verify MODEL GRADES`: say that the predictions in a CSV came from a model. Raises `AptosError` if they did not.

    Predicts `sample` of the images again, or all of them (None). `images` are what `predict` was given; without them
    the files that the column file names are read.
    """
    if sample is not None and sample < 1: raise AptosError(f'--sample {sample}: choose a number from 1, or --all.')
    file = Path(grades)
    spec, _ = read_model(model)
    rows, audit, found = read_grades(file), None, Findings()
    try: audit = read_audit(file)
    except AptosError as e: found.reasons.append(str(e).removesuffix('.'))
    if audit: check_audit(found, file, audit, spec)
    elif not found.reasons: found.notes.append(NOT_KNOWN.format(audit_file(file)))
    entries = find_images(images, root, sheet) if images else []
    if not audit: check_unproven(found, file, rows, entries)
    found.check_rows(rows, contradictions(rows, spec, audit),
                     f'of {len(rows)} rows do not follow from their scores by the thresholds and operating point',
                     f'every row follows from its score ({plural(len(rows), "row")})')
    chosen, failed = sampled(rows, sample, file_hash(file)), np.flatnonzero(rows.score.isna())
    grader, why_other = grader_of(model, audit)
    if why_other: found.notes.append(why_other)
    repeat(found, grader, rows, chosen, audit, find_again(rows, chosen, audit, entries))
    read_again(found, grader, rows, find_again(rows, failed, audit, entries))
    if not audit and len(chosen) < rows.score.notna().sum():
        found.reasons.append('without its audit file the rows that were not predicted again may be of another model; '
                             'add --all')
    conclude(found, file, spec, 'its predictions' if audit else f'the {len(rows)} rows that are there')


def conclude(found: Findings, file: Path, spec: ModelSpec, what: str) -> None:
    "Print the notes and the conclusion on `what`. Raises `AptosError` if there are reasons against it"
    for text in found.notes: say(f'note: {text}', 'yellow')
    for text in found.agreed: say(f'ok: {text}')
    for text in found.details: say(f'differs: {text}')
    if found.reasons:
        raise AptosError(f'{file}: not verified as predictions of {spec.name} ({spec.key}): '
                         f'{"; ".join(found.reasons)}.')
    say(f'{file}: verified: {what} came from {spec.name} ({spec.key})', 'bold')


def read_grades(file: Path) -> pd.DataFrame:
    "Return the rows of a CSV of predictions: numbers, and texts as they were before they were made safe"
    if not file.is_file(): raise AptosError(f'{file}: no such file.')
    try: df = pd.read_csv(file, dtype=str, keep_default_na=False)
    except ValueError as e: raise AptosError(f'{file}: is no CSV of predictions ({e}).') from None
    missing = [name for name in NEEDED if name not in df]
    if missing: raise AptosError(f'{file}: has no column {", ".join(missing)}, so it is no CSV that predict wrote.')
    if not len(df): raise AptosError(f'{file}: has no rows, so there is nothing to verify.')
    for name in [o for o in NUMBERS if o in df]:
        values = pd.to_numeric(df[name], errors='coerce')
        bad = values.isna() & (df[name] != '')
        if bad.any(): raise AptosError(f'{file}: row {bad.idxmax() + 1}: {name} is {df[name][bad].iloc[0]}, no number.')
        df[name] = values
    texts = [name for name in df if name not in NUMBERS]
    df[texts] = df[texts].map(unsafe_cell)
    return df


# The audit file

def read_audit(csv: Path) -> dict | None:
    "Return the audit file of a CSV; None without one. Raises `AptosError` if it was edited or is of another version"
    audit = read_record(audit_file(csv))
    if audit is None or (audit.keys() >= OWN_KEYS and audit.get('format') == AUDIT_FORMAT): return audit
    raise AptosError(f'{audit_file(csv)}: another version or another program wrote it')


def check_audit(found: Findings, file: Path, audit: dict, spec: ModelSpec) -> None:
    "Compare the CSV and the model with what the audit file says of them"
    unchanged = file_hash(file) == audit['csv_sha256']
    found.check('' if unchanged else f'the CSV was changed since predict wrote it ({audit["finished"]})',
                f'the CSV is as predict wrote it ({audit["finished"]}) with {processed_text(audit)}')
    check_patients(found, file.with_name(PATIENTS), audit.get('patients_sha256'))
    parts = differing_parts(audit['digests'], spec.digests)
    found.check(f'made by a model with other {", ".join(parts)} ({audit["model"]}, {audit["digests"]["model"]})'
                if parts else '', 'weights, thresholds, gate and operating point are those of the model')
    if not parts and audit['model'] != spec.name: found.notes.append(f'the model was called {audit["model"]} then')
    now = dict(aptos_fastai=aptos_fastai.__version__, torch=torch.__version__)
    found.notes.extend(f'made with {name} {audit[name]}; this is {current}' for name, current in now.items()
                       if audit[name] != current)


def check_patients(found: Findings, patients: Path, recorded: str | None) -> None:
    "Compare patients.csv with its recorded SHA-256; None: predict wrote none"
    if recorded is None:
        if patients.is_file(): found.notes.append(f'{patients} is of another call and is not verified')
    elif not patients.is_file(): found.reasons.append(f'{PATIENTS}, which predict wrote beside it, is missing')
    else:
        same = file_hash(patients) == recorded
        found.check('' if same else f'{PATIENTS} was changed or replaced since predict wrote it',
                    f'{PATIENTS} is as predict wrote it')


def check_unproven(found: Findings, csv: Path, df: pd.DataFrame, entries: Sequence[ImageEntry]) -> None:
    "Check what only an audit file would prove: that no column is missing, and no row was copied or removed"
    if missing := [name for name in COLUMNS if name not in df]:
        found.reasons.append(f'without its audit file every column is needed; missing: {", ".join(missing)}')
    again = df.index[df.file.map(os.path.abspath).duplicated() & (df.file != '')]
    found.check_rows(df, dict.fromkeys(again, 'an earlier row has the same file'), f'of {len(df)} rows are duplicates',
                     'no file has two rows')
    if entries:
        differ = f'{plural(len(df), "row")}, but --images names {plural(len(entries), "image")}'
        found.check(differ if len(entries) != len(df) else '', f'as many rows as images: {len(df)}')
    patients = csv.with_name(PATIENTS)
    if patients.is_file(): found.notes.append(f'{patients} is not verified: only the audit file would prove it')


# Rows and their scores

def contradictions(df: pd.DataFrame, spec: ModelSpec, audit: dict | None) -> dict[int, str]:
    """Return row -> what contradicts the model's thresholds, operating point, calibration or the row's own cells.

    Probabilities depend on the prevalence: without the audit file they are not compared.
    """
    found: dict[int, str] = {}
    error = df.get('error', pd.Series('', df.index)) != ''
    ungradable = df.get('ungradable', pd.Series('', df.index)) != ''
    for i in df.index[error == df.score.notna()]:
        found[i] = 'has a score and an error' if error[i] else 'has no score and no error'
    empty = df[error | ungradable]
    for i in empty.index[empty.grade.notna()]: found.setdefault(i, f'grade {empty.grade[i]:g}, but no grade is due')
    failed = df[error & df.score.isna()]
    nothing = dict.fromkeys(('grade_name', *DECISION_COLUMNS), '')
    _compare_texts(found, failed, [pd.DataFrame(nothing, failed.index)])
    refused = df[ungradable & ~error]
    _compare_texts(found, refused, [pd.DataFrame(_ungradable_texts(spec), refused.index)])
    graded = df[~error & ~ungradable & df.score.notna()]
    prevalence = audit['prevalence'] if audit else None
    if spec.eyes: found |= fusion_contradictions(graded, spec.eyes, audit)
    graded = graded[~is_fused(graded)] if spec.eyes else graded
    variants = [expected(graded, graded.score + shift, spec, prevalence) for shift in (0., -ROUNDING, ROUNDING)]
    _compare_texts(found, graded, variants)
    if {*SETS} <= {*df}:
        outside = ~graded.grade.between(graded.grade_low, graded.grade_high)
        for i in graded.index[outside]: found.setdefault(i, 'its grade is not in its prediction set')
    for name in [o for o in P_COLUMNS if audit and o in df and spec.decision.probabilities]:
        values = np.array([o[name] for o in variants])
        low, high = values.min(0) - 2 * ROUNDING, values.max(0) + 2 * ROUNDING
        wrong = ~((graded[name] >= low) & (graded[name] <= high))
        for i in graded.index[wrong]:
            found.setdefault(i, f'{name} {_cell(graded[name][i])}, expected {variants[0][name][i]:.4f}')
    return found


def is_fused(df: pd.DataFrame) -> pd.Series:
    "Return which rows say that they are graded by both eyes"
    return df.get('fused', pd.Series('', df.index)) == 'yes'


def fusion_contradictions(graded: pd.DataFrame, eyes: EyesSpec, audit: dict | None) -> dict[int, str]:
    "Return row -> what contradicts the fusion of the model: who is fused, with which score, and what follows from that"
    if not {'own_score', 'fused'} <= {*graded}:
        return dict.fromkeys(graded.index, 'has no own_score and fused, but the model fuses both eyes')
    people = pd.DataFrame({name: graded.get(name, pd.Series('', graded.index)) for name in ('patient', 'eye')})
    new = eyes.fused_rows(graded.own_score, people, True, audit['prevalence'] if audit else None)
    new.index = graded.index[new.index]
    due, found = graded.index.isin(new.index), {}
    for i in graded.index[due != is_fused(graded)]: found[i] = f'fused {graded.fused[i]}, but that does not follow'
    alone, fused = graded[~due], graded[due]
    for i in alone.index[alone.score != alone.own_score]: found.setdefault(i, 'not fused, but score is not own_score')
    p_columns = [name for name in P_COLUMNS if audit and name in fused and eyes.decision.probabilities]
    for name in ['score', *p_columns]:
        for i in fused.index[~((fused[name] - new[name]).abs() <= 2 * ROUNDING)]:
            found.setdefault(i, f'{name} {_cell(fused[name][i])}, expected {new[name][i]:.4f} by both eyes')
    exact = [name for name in ('grade', 'grade_name', *SETS, *DECISION_COLUMNS) if name in fused]
    for name in exact:
        for i in fused.index[fused[name] != new[name]]:
            found.setdefault(i, f'{name} {_cell(fused[name][i])}, expected {_cell(new[name][i])} by both eyes')
    return found


def expected(df: pd.DataFrame, scores: pd.Series, spec: ModelSpec, prevalence: float | None) -> pd.DataFrame:
    "Return what the model makes of `scores`, with the prediction sets that the rows have"
    grade = apply_thresholds(scores, spec.thresholds)
    high = df.grade_high.fillna(0) if 'grade_high' in df else pd.Series(0, df.index)
    decided = spec.decision.decide(scores, grade, high, prevalence)
    names = [GRADE_NAMES[g] for g in grade]
    return pd.DataFrame(dict(grade=grade, grade_name=names, **decided), index=df.index)


def _ungradable_texts(spec: ModelSpec) -> dict:
    "Return the texts of a row that the gate refused"
    second = UNGRADABLE if len([o for o in spec.decision.points if o.name == 'referable']) > 1 else ''
    return dict(grade_name=UNGRADABLE, decision=NOT_GRADABLE, referable=UNGRADABLE, sight_threatening=UNGRADABLE,
                referable_high_specificity=second)


def _compare_texts(found: dict[int, str], df: pd.DataFrame, variants: Sequence[pd.DataFrame]) -> None:
    "Add each row whose grade and texts are those of none of `variants`"
    names = [o for o in ('grade', 'grade_name', *DECISION_COLUMNS) if o in df and o in variants[0]]
    if not names or not len(df): return
    agree = np.array([(df[names] == o[names]).to_numpy() for o in variants])
    for i in np.flatnonzero(~agree.all(2).any(0)):
        name = names[int(np.flatnonzero(~agree[0, i])[0])]
        was, right = (_cell(o[name].iloc[i]) for o in (df, variants[0]))
        found.setdefault(df.index[i], f'{name} {was}, expected {right}')


def _cell(value: object) -> str:
    "Return a cell as text for a message"
    if value is None or value == '' or value != value: return 'empty'
    return f'{value:g}' if isinstance(value, float) else str(value)


# A sample, predicted again

def sampled(df: pd.DataFrame, n: int | None, seed: str) -> np.ndarray:
    """Return up to `n` rows with a score, one drawn from each of `n` equal stretches of the file; None: all of them.

    The draw depends on the content of the file, so that it cannot be known before the file is edited.
    """
    rows = np.flatnonzero(df.score.notna())
    if n is None or n >= len(rows): return rows
    rng = np.random.default_rng(int(seed[:16], 16))
    return np.array([rng.choice(stretch) for stretch in np.array_split(rows, n)])


def find_again(df: pd.DataFrame, chosen: np.ndarray, audit: dict | None,
               entries: Sequence[ImageEntry]) -> dict[int, Path | None]:
    "Return the image file of each chosen row, one of `entries` if there are any; None if it is not found"
    if not entries: return {i: _existing(df.file[i]) for i in chosen}
    if audit and audit['options'].get('deidentify'):
        if len(entries) != len(df):
            raise AptosError(f'--images: {len(entries)} images, but the de-identified CSV has {len(df)} rows. Give '
                             'exactly what predict was given, in the same order.')
        return {i: entries[i].path for i in chosen}
    return {i: _entry_of(df.file[i], entries) for i in chosen}


def _existing(file: str) -> Path | None: return Path(file) if file and Path(file).is_file() else None


def _entry_of(file: str, entries: Sequence[ImageEntry]) -> Path | None:
    "Return the image whose id or path is `file`; else the one whose path ends like it, the longer the better"
    for entry in entries:
        if file in (entry.id, entry.name, str(entry.path)): return entry.path

    def common(entry: ImageEntry) -> int:
        own = entry.path.parts if entry.path else ()
        pairs = zip(reversed(PurePath(file).parts), reversed(own), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    best = max(entries, key=common)
    return best.path if common(best) else None


def repeat(found: Findings, grader: Grader, df: pd.DataFrame, chosen: np.ndarray, audit: dict | None,
           files: dict[int, Path | None]) -> None:
    "Predict the chosen rows again and compare"
    if not len(chosen):
        found.reasons.append('no row has a score, so no prediction can be repeated')
        return
    tolerance, exact = tolerance_of(audit, audit_record(grader))
    fused = is_fused(df) & bool(grader.model.eyes)
    if grader.model.eyes and 'own_score' in df: df = df.assign(score=df.own_score)       # the rest follows from these
    wrong = {i: NOT_FOUND for i, file in files.items() if file is None}
    largest = 0.
    for i, new in predict_again(grader, {i: file for i, file in files.items() if file is not None}):
        numbers = ['score'] if audit else ['score', 'score_sd']
        difference = difference_of(df.loc[i], new, tolerance, exact and not fused[i], numbers)
        if difference: wrong[i] = difference
        else: largest = max(largest, abs(df.score[i] - new.score))
    how = f'{grader.backend} {grader.precision}; scores differ by up to {largest:.4f}, allowed is {tolerance:g}'
    found.check_rows(df, wrong, f'of {len(chosen)} repeated predictions differ',
                     f'{len(chosen)} of {int(df.score.notna().sum())} predictions repeated: equal ({how})')


def read_again(found: Findings, grader: Grader, df: pd.DataFrame, files: dict[int, Path | None]) -> None:
    "Read the images of rows without a score again: an error that is not there now is a reason"
    if not files: return
    wrong, recorded = {}, df.get('image_sha256', pd.Series('', df.index))
    for i, file in files.items():
        if file is None:
            if recorded[i]: wrong[i] = NOT_FOUND               # else predict did not find it either
            continue
        squares, new = grader.read(file)
        if recorded[i] and recorded[i] != new['image_sha256']: wrong[i] = REPLACED
        elif squares is not None: wrong[i] = 'has no prediction, but its image can be read'
    found.check_rows(df, wrong, f'of {len(files)} unreadable images differ',
                     f'{len(files)} unreadable images cannot be read now, either')


def predict_again(grader: Grader, files: dict[int, Path]) -> Iterator[tuple[int, pd.Series]]:
    "Yield each row number of `files` with the prediction of its image"
    rows, done = iter(files), 0
    with Bars() as bars, bars('predicting again', len(files), 'images') as bar:
        for part in grader.stream(files.values()):
            for (_, new), i in zip(part.iterrows(), rows, strict=False): yield i, new      # `part` first: it ends first
            bar.to(done := done + len(part))


def grader_of(model: str, audit: dict | None) -> tuple[Grader, str]:
    "Return a grader with the recorded backend, precision and prevalence; or PyTorch in f32, and why"
    if not audit: return load_grader(model), ''
    try: return load_grader(model, audit['backend'], audit['precision'], audit['prevalence']), ''
    except AptosError as e:
        grader = load_grader(model, prevalence=audit['prevalence'])
        return grader, f'torch f32 repeats what {audit["backend"]} {audit["precision"]} predicted: {e}'


def tolerance_of(audit: dict | None, current: dict) -> tuple[float, bool]:
    """Return how much a score may differ, and whether prediction sets must be equal.

    They must on the same machine and backend in f32, and without an audit file: decisions follow from them.
    """
    if not audit: return MAX_DIFFERENCE['f32'], True
    same = all(audit[key] == current[key] for key in ('backend', 'precision', 'device', 'processor'))
    if same and audit['precision'] == 'f32': return SAME_MACHINE, True
    return MAX_DIFFERENCE[audit['precision']], False


def difference_of(old: pd.Series, new: pd.Series, tolerance: float, exact: bool,
                  numbers: Sequence[str] = ('score',)) -> str:
    """Return how a repeated prediction differs from its row; '' if it does not. Grades follow from scores: see above.

    `numbers` are the columns that may differ by `tolerance`.
    """
    if new.error: return f'the image {new.error}'
    if old.get('image_sha256') and old.image_sha256 != new.image_sha256:
        return REPLACED
    for name in [o for o in numbers if o in old]:
        if not abs(old[name] - new[name]) <= tolerance + ROUNDING: return f'{name} {old[name]:.4f}, now {new[name]:.4f}'
    for name in [o for o in ALWAYS + SETS * exact if o in old]:
        a, b = (_cell('' if pd.isna(o) else o) for o in (old[name], new[name]))
        if a != b: return f'{name} {a}, now {b}'
    return ''
