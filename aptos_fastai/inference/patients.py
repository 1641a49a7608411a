"""From graded images to patients: whose eye an image shows, and one result for each patient, that of the worse eye.

A patient or an eye comes from a column of the CSV of images, from a pattern in file names, or from DICOM tags.
"""
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from pandas.core.groupby import DataFrameGroupBy

from aptos_fastai.common.console import say
from aptos_fastai.common.io import AptosError, write_csv
from aptos_fastai.common.privacy import LEAVE_OUT, patient_data
from aptos_fastai.data.dicom import EYE, PATIENT, DicomTags, is_dicom, patient_keys, read_tags
from aptos_fastai.data.groups import UNKNOWN, eye_note, eye_of_name, not_eyes, patient_variants, read_eyes
from aptos_fastai.data.spreadsheet import first_few, has_columns, safe_cell
from aptos_fastai.decisions import DO_NOT_REFER, NOT_GRADABLE, REFER, UNCERTAIN_REFER, UNGRADABLE
from aptos_fastai.inference.deidentify import pseudonyms, without_names
from aptos_fastai.inference.eyes import EyesSpec, fused_text
from aptos_fastai.inference.find_images import ImageEntry
from aptos_fastai.inference.gate import GateSpec

PATIENTS = 'patients.csv'
COLUMNS = ['patient', 'images', 'left_grade', 'right_grade', 'grade', 'decision', 'referable', 'sight_threatening',
           'p_referable', 'eyes_gradable', 'missing', 'ungradable']
DICOM = 'dicom'                              # value of --patient and --eye: from the tags
SIDES = 'left', 'right'
MISSING_EYE = 'ungradable', 'ignore'         # what a missing or ungradable eye makes of a patient who is not referred
REFERRED = REFER, UNCERTAIN_REFER
UNREADABLE = 'cannot be read'
UNKNOWN_PEOPLE = ('the model grades by both eyes of a patient, but patients are unknown here: every image is graded '
                  'alone. Add --patient and --eye.')


@dataclass(frozen=True)
class Choices:
    "The options of `predict` about patients"
    patient: str = ''                        # column of the CSV, pattern, or `dicom`; empty: the tags, if all have them
    eye: str = ''
    missing_eye: str = 'ungradable'          # of `MISSING_EYE`
    deidentify: bool = False                 # leave ids, file names and hashes out of the outputs

    def check(self) -> None:
        "Raise `AptosError` for an unknown choice"
        if self.missing_eye in MISSING_EYE: return
        raise AptosError(f'--missing-eye {self.missing_eye}: choose one of {", ".join(MISSING_EYE)}.')


DEFAULTS = Choices()


# Whose eye an image shows

def identify(entries: Sequence[ImageEntry], patient: str, eye: str) -> tuple[pd.DataFrame | None, list[str]]:
    """Return the columns patient, eye and, from DICOM tags, device of each image, and notes; None without patients.

    `patient` and `eye` are a column of the CSV of images, a regular expression with a group in parentheses, or `dicom`.
    If both are empty and every image is a DICOM file that names both, they are those of the tags. Raises `AptosError`.
    """
    notes = []
    patient, eye = (DICOM if source in (PATIENT, EYE) else source for source in (patient, eye))
    tags = _dicom_tags(entries, required=DICOM in (patient, eye), wanted=not patient and not eye)
    if not patient and not eye:
        if not tags: return None, []
        patient = eye = DICOM
        notes.append('patients, eyes and cameras: from the DICOM tags (--patient and --eye choose others)')
    if not patient: raise AptosError(f'--eye {eye}: patients are unknown. Add --patient COLUMN_OR_PATTERN.')
    df = pd.DataFrame(dict(patient=_patients(entries, patient, tags)))
    df['eye'] = _eyes(entries, eye, tags) if eye else ''
    if DICOM in (patient, eye): df['device'] = [o.device if o else '' for o in tags]
    return df, [*notes, *_notes(df, entries, patient, eye)]


def _dicom_tags(entries: Sequence[ImageEntry], required: bool, wanted: bool) -> list[DicomTags | None]:
    "Return the tags of each image; if only `wanted`, nothing unless every image names patient and eye"
    tags: list[DicomTags | None] = []
    if not required and not wanted: return tags
    for entry in entries:
        found = read_tags(entry.path) if entry.path else None
        if not required and not (found and found.patient and found.eye): return []
        tags.append(found)
    if any(tags): return tags
    if any(entry.path and is_dicom(entry.path) for entry in entries):
        raise AptosError(f'--patient {DICOM}: DICOM tags cannot be read. Run pip install pydicom.')
    raise AptosError(f'--patient {DICOM}: none of the images is a DICOM file. Name a column or a pattern.')


def _patients(entries: Sequence[ImageEntry], source: str, tags: Sequence[DicomTags | None]) -> list[str]:
    "Return the patient of each image, '' where there is none; the same key of two DICOM issuers is two patients"
    keys = patient_keys(tags) if source == DICOM else _texts(entries, source, '--patient')
    keys = ['' if key.casefold() in UNKNOWN else key for key in keys]
    if not any(keys): raise AptosError(f'--patient {source}: gives no patient for any of the {len(entries)} images, '
                                       f'for example {entries[0]}. Name another column or pattern.')
    return keys


def _eyes(entries: Sequence[ImageEntry], source: str, tags: Sequence[DicomTags | None]) -> list[str]:
    "Return left, right, or '' where the eye is unknown, of each image. Raises `AptosError` for another value"
    if source == DICOM: return [o.eye if o else '' for o in tags]
    texts = _texts(entries, source, '--eye')
    eyes = read_eyes(texts)
    found = [eyes[text] for text in texts]
    bad = [f'{text} ({entry.id or entry})' for text, eye, entry in zip(texts, found, entries, strict=True)
           if not eye and text.casefold() not in UNKNOWN]
    if bad or not any(found):
        raise AptosError(f'--eye {source}: found {not_eyes(bad)}')
    return found


def _texts(entries: Sequence[ImageEntry], source: str, option: str) -> list[str]:
    "Return what a column of the CSV, or the group of a pattern, gives for each image; '' where there is nothing"
    columns = list(dict.fromkeys(name for entry in entries for name in entry.cells))
    if source in columns: return [entry.cells.get(source, '') for entry in entries]
    try: pattern = re.compile(source)
    except re.error as e: raise AptosError(f'{option} {source}: is no regular expression ({e}).') from None
    if pattern.groups < 1:
        where = f'Columns of the CSV: {", ".join(columns)}.' if columns else 'The images do not come from a CSV.'
        raise AptosError(f'{option} {source}: no such column, and no pattern with a group in parentheses. {where}')
    return [_matched(pattern, entry, source.count('/')) for entry in entries]


def _matched(pattern: re.Pattern, entry: ImageEntry, folders: int) -> str:
    "Return the first group of a pattern in an image's id or file name, preceded by as many `folders`"
    path = Path(str(entry)).as_posix().split('/')
    found = pattern.search('/'.join(path[-1 - folders:]) if folders or not entry.id else entry.id)
    return (found[1] or '').strip() if found else ''


def _notes(df: pd.DataFrame, entries: Sequence[ImageEntry], patient: str, eye: str) -> list[str]:
    "Return what a person should check: images without patient or eye, eyes that contradict their names"
    notes, names = [], pd.Series(list(map(str, entries)))
    nobody = names[df.patient == '']
    if len(nobody):
        notes.append(f'--patient {patient}: {len(nobody)} of {len(df)} images have no patient ({first_few(nobody)}); '
                     f'each is a row of its own in {PATIENTS}')
    notes += [f'--patient {patient}: {text}; each way of writing is a patient of its own here. Write one way for one '
              'patient' for text in patient_variants(df.patient)]
    unknown = names[df.eye == '']
    if not eye: notes.append("eyes unknown: a patient's worst image counts and no eye is missing (--eye names them)")
    elif len(unknown):
        notes.append(f'--eye {eye}: {len(unknown)} of {len(df)} images show an unknown eye ({first_few(unknown)})')
    contradiction = eye_note(list(map(_name_with_eye, entries)), df.eye, df.patient)
    if contradiction: notes.append(f'--eye {eye}: {contradiction}')
    return notes


def _name_with_eye(entry: ImageEntry) -> str:
    "Return which of an image's id and file name says an eye, else the latter"
    names = entry.id, entry.name or Path(str(entry)).name
    return next(filter(eye_of_name, names), names[-1])


def find_people(entries: Sequence[ImageEntry], choices: Choices) -> pd.DataFrame | None:
    "Return what `identify` returns and print its notes; with `deidentify` patients are P001, P002, …"
    people, notes = identify(entries, choices.patient, choices.eye)
    for note in notes: say(note, 'yellow')
    if people is None or not choices.deidentify: return people
    return people.assign(patient=pseudonyms(people.patient, 'P'))


# One result for each patient

def patient_table(images: pd.DataFrame, missing_eye: str = 'ungradable') -> pd.DataFrame:
    """Return one row (`COLUMNS`) for each patient, in the order of their first image.

    `images` has the columns of a graded image, patient and eye. The result is that of the worse eye; of several images
    of an eye the worst gradable one counts. A patient with an eye that is missing or not gradable is not gradable,
    unless another image is referred; with `missing_eye` = ignore the other eye decides. Where no image of a patient
    says which eye it shows, the images count as eyes, and none is missing.
    """
    rows = [_patient_row(key, rows, missing_eye) for key, rows in by_patient(images)]
    df = pd.DataFrame(rows, columns=COLUMNS)
    integers = ['left_grade', 'right_grade', 'grade', 'eyes_gradable']
    return df.astype(dict.fromkeys(integers, 'Int64') | dict(p_referable='Float64'))


def by_patient(images: pd.DataFrame) -> DataFrameGroupBy:
    "Group graded images by patient, in the order of their first image; an image without a patient is one of its own"
    keys = images.patient.where(images.patient != '', 'image ' + images.file.astype(str))
    return images.groupby(keys.to_numpy(), sort=False)


def _patient_row(key: str, images: pd.DataFrame, missing_eye: str) -> list:
    "Return the row of one patient"
    gradable = images[images.grade.notna() & (images.decision != NOT_GRADABLE)]
    eyes_known = (images.eye != '').any()
    missing = [side for side in SIDES if side not in set(images.eye)] if eyes_known else []
    reasons = _ungradable_eyes(images, gradable)
    incomplete = bool(missing or reasons) and missing_eye != 'ignore' or not len(gradable)
    decision = _decision(gradable.decision, incomplete)
    known = decision != NOT_GRADABLE
    left, right = (_worst(gradable.grade[gradable.eye == side]) for side in SIDES)
    return [key, len(images), left, right, _worst(gradable.grade) if known else pd.NA, decision,
            _answer(gradable.referable, incomplete), _answer(gradable.sight_threatening, incomplete),
            _worst(gradable.p_referable) if known else pd.NA,
            len(set(gradable.eye) - {''}) if eyes_known else pd.NA, ' '.join(missing), '; '.join(reasons)]


def _ungradable_eyes(images: pd.DataFrame, gradable: pd.DataFrame) -> list[str]:
    """Return 'left: blurred' for each eye without a gradable image.

    An ungradable image of an unknown eye counts as such an eye, unless both eyes have a gradable image.
    """
    if set(SIDES) <= set(gradable.eye): return []
    rest = images.drop(gradable.index)
    rest = rest[(rest.eye == '') | ~rest.eye.isin(gradable.eye)]
    reasons = rest.ungradable.where(rest.ungradable != '', UNREADABLE)
    named = zip(rest.eye.where(rest.eye != '', 'unknown eye'), reasons, strict=True)
    return list(dict.fromkeys(f'{eye}: {reason}' for eye, reason in named))


def _decision(decisions: pd.Series, incomplete: bool) -> str:
    "Return the decision on a patient from those on the gradable images"
    for found in REFERRED:
        if (decisions == found).any(): return found
    return NOT_GRADABLE if incomplete else DO_NOT_REFER


def _answer(answers: pd.Series, incomplete: bool) -> str:
    "Return yes if any gradable image says so; else ungradable if an eye is not known; '' if the model does not say"
    if (answers == 'yes').any(): return 'yes'
    if incomplete: return UNGRADABLE
    return 'no' if (answers == 'no').any() else ''


def _worst(values: pd.Series) -> object:
    "Return the highest value; NA if there is none"
    values = values.dropna()
    return values.max() if len(values) else pd.NA


def counts_text(patients: pd.DataFrame, gate: GateSpec) -> str:
    "Return the counts of patients as text: '12 patients: 3 referred, 7 not referred, 2 not gradable (…)'"
    referred, no = patients.decision.isin(REFERRED).sum(), (patients.decision == DO_NOT_REFER).sum()
    ungradable = (patients.decision == NOT_GRADABLE).sum()
    noun = 'patient' if len(patients) == 1 else 'patients'
    text = f'{len(patients)} {noun}: {referred} referred, {no} not referred, {ungradable} not gradable'
    if not ungradable: return text
    if gate.ungradable == 'exclude': return f'{text} (not counted as referred: [gate] ungradable = exclude)'
    return f'{text} (counted as referred, {referred + ungradable} in all: [gate] ungradable = refer)'


# The files

def check_patients_free(grades: Path, people: pd.DataFrame | None, overwrite: bool) -> None:
    """Raise `AptosError` if the patients.csv beside `grades` exists; with `overwrite`, if `predict` did not write it.

    Without patients it stays, and a line says that it is of another call.
    """
    file = grades.with_name(PATIENTS)
    if people is None:
        if file.exists(): say(f'{file}: is of another call; this one knows no patients and leaves it', 'yellow')
        return
    if grades.name == PATIENTS: raise AptosError(f'{file}: is where the patients go. Choose another file with -o.')
    if not file.exists(): return
    if not overwrite:
        raise AptosError(f'{file}: already exists. Choose a file in another folder with -o, or add --overwrite.')
    if has_columns(file, COLUMNS): return
    raise AptosError(f'{file}: is not a CSV that predict wrote, so it is not replaced. Choose a file in another folder '
                     'with -o.')


def write_with_people(part: Path, grades: Path, people: pd.DataFrame | None, choices: Choices, gate: GateSpec,
                      eyes: EyesSpec | None = None, prevalence: float | None = None) -> None:
    """Write the finished rows in `part` to `grades`, with their patients or de-identified; write patients.csv before.

    With `eyes` images are graded by both eyes of their patient, where both are there.
    """
    df = pd.read_csv(part, dtype=str, keep_default_na=False)
    if choices.deidentify: df = without_names(df.loc[:, 'file':], 'file')
    if eyes: df = with_fused(df, eyes, people, prevalence)
    if people is not None:
        patients = patient_table(_as_numbers(df.join(people)), choices.missing_eye)
        write_csv(grades.with_name(PATIENTS), patients.assign(patient=patients.patient.map(safe_cell)))
        say(f'{counts_text(patients, gate)} -> {grades.with_name(PATIENTS)}')
        df = df.join(people.map(safe_cell))
    write_csv(grades, df)


def with_fused(df: pd.DataFrame, eyes: EyesSpec, people: pd.DataFrame | None, prevalence: float | None) -> pd.DataFrame:
    """Return the rows (texts) of grades.csv with own_score and fused (yes, no), those that have a fellow by both eyes.

    What the gate refuses is graded by no other eye, and no other eye by it.
    """
    if people is None: say(UNKNOWN_PEOPLE, 'yellow')
    known = pd.DataFrame(dict(patient='', eye=''), df.index) if people is None else people
    usable = (df.score != '') & (df.ungradable == '')
    new = eyes.fused_rows(pd.to_numeric(df.score), known, usable, prevalence).map(_cell_text)
    fused = df.index.isin(new.index)
    df = df.assign(own_score=df.score, fused=np.where(fused, 'yes', 'no'))
    df.loc[new.index, new.columns] = new
    say(fused_text(fused))
    return df


def _cell_text(value: object) -> str:
    "Return a cell as grades.csv has it"
    if isinstance(value, float): return '' if value != value else f'{value:.4f}'
    return str(value)


def _as_numbers(df: pd.DataFrame) -> pd.DataFrame:
    "Return texts of grades.csv with the numbers that `patient_table` needs"
    return df.assign(grade=pd.to_numeric(df.grade).astype('Int64'), p_referable=pd.to_numeric(df.p_referable))


def privacy_text(grades: Path, people: pd.DataFrame | None, choices: Choices) -> str:
    "Return the line that says what the files of `predict` hold of patients"
    files = grades.name if people is None else f'{grades.name} and {PATIENTS}'
    if choices.deidentify: return f'{files}: de-identified; row N of {grades.name} is image N of the input'
    keys = '' if people is None else ', and keys of patients'
    return patient_data(files, f'file names, ids and hashes of images{keys}', LEAVE_OUT)
