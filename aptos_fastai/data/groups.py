"Find which images share a fold: those of a patient (a column, or a pattern in ids) or of a block of ids; and the eye."
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from aptos_fastai.common.console import plural
from aptos_fastai.data.locate import without_image_suffix
from aptos_fastai.data.spreadsheet import TableError, first_few, read_spreadsheet
from aptos_fastai.recipe import Table

ROW = '(row)'                                # column: which row of the CSV held an image, beside others of its patient
UNKNOWN = '', 'na', 'n/a', 'nan', 'none', 'null', 'unknown', '?', '-'      # in a column of patients
EYES = {side: eye for eye, sides in dict(
    left='l left os og oi oe la links linkes gauche izquierdo izquierda esquerdo sinistro',
    right='r right od ra rechts rechtes droit droite derecho derecha direito destro').items() for side in sides.split()}
EYES_OF_NAMES = EYES.keys() - {'la', 'ra', 'oe', 'oi'}           # words that say an eye in the name of a file
EYE_NOUNS = 'eye', 'auge', 'oeil', 'œil', 'ojo', 'olho', 'occhio'
EYE_EXAMPLES = 'L, R, left, right, OS, OD, OG, LA, RA, links, rechts, gauche, droit, izquierdo, derecho'


def find_groups(csv: Path, df: pd.DataFrame, ids: pd.Series, table: Table) -> tuple[pd.Series, str]:
    """Return TABLE:PATIENT or TABLE:block K of each row, and a note of rows without a patient (each its own group).

    Raises `TableError` if no row has a patient although the table says where they are.
    """
    if table.block: return _blocks(ids, table), ''
    if not (table.patient or table.pairs or table.group):
        return f'{table.name}:' + (df[ROW] if ROW in df else ids), ''
    patients = _patients(csv, df, ids, table)
    missing = ids[patients.isna()]
    name = next(name for name in ('patient', 'pairs', 'group') if getattr(table, name))
    key = f'[table.{table.name}] {name} = {getattr(table, name)}'
    if len(missing) == len(ids): raise TableError(f'{csv}: {key}: {_no_patient(ids, table)}')
    groups = f'{table.name}:' + patients.fillna(df[ROW] if ROW in df else ids)
    if not len(missing): return groups, ''
    each = 'it is' if len(missing) == 1 else 'each is'
    verb = dict(patient='is empty in', pairs='does not list', group='does not match')[name]
    noun = 'rows' if table.patient else 'ids'
    return groups, (f'{key}: {verb} {len(missing)} of {len(ids)} {noun} ({first_few(missing)}); {each} a patient of '
                    'its own. Correct that if it is wrong.')


def _no_patient(ids: pd.Series, table: Table) -> str:
    if table.patient: return f'the column is empty in all {len(ids)} rows. Name another, or remove the key.'
    if table.pairs: return f'the file lists none of the {len(ids)} ids, for example {ids.iloc[0]}. Name another file.'
    return (f'matches none of the {len(ids)} ids, for example {ids.iloc[0]}. Put the part that is the patient in '
            'parentheses, or remove group and set block = 10 if patients are unknown.')


def _patients(csv: Path, df: pd.DataFrame, ids: pd.Series, table: Table) -> pd.Series:
    "Return the patient of each row; NaN where there is none"
    if table.pairs: return ids.map(_bare).map(_read_pairs(csv.parent / table.pairs))
    texts = df[table.patient] if table.patient else ids.str.extract(table.group).iloc[:, 0]
    texts = texts.str.casefold().str.replace(r'^(\d+)[.,]0+$', r'\1', regex=True)       # 17.0, as spreadsheets write 17
    return texts.where(~texts.isin(UNKNOWN), np.nan) if table.patient else texts.replace('', np.nan)


def _read_pairs(file: Path) -> dict[str, str]:
    "Return the patient of each image, from a CSV of which each row lists the images of one patient"
    if not file.is_file():
        raise TableError(f'{file}: no such file. It lists the images of each patient; get it where the images come '
                         'from. With an empty key `pairs` the patients are unknown.')
    patients: dict[str, str] = {}
    for i, row in enumerate(read_spreadsheet(file, header=False).to_numpy(), 1):
        names = [_bare(name) for name in row if name]
        joined = {patients[name] for name in names if name in patients}      # rows that share an image are one patient
        for name in [*names, *(other for other, patient in patients.items() if patient in joined)]:
            patients[name] = f'row {i}'
    return patients


def _bare(name: str) -> str:
    "Return an image's name without its folder and suffix, in lower case"
    return without_image_suffix(name.replace('\\', '/').rpartition('/')[2]).casefold()


def natural_order(ids: pd.Series) -> np.ndarray:
    "Return the positions of ids in natural order: a2 before a10"
    def key(text: str) -> list[tuple[int, str]]:
        parts = re.split(r'([0-9]+)', text)              # text and number in turn
        return [(int(part), '') if i % 2 else (0, part) for i, part in enumerate(parts)]
    return np.array(sorted(range(len(ids)), key=lambda i: key(ids.iloc[i])), int)


def _blocks(ids: pd.Series, table: Table) -> pd.Series:
    "Return TABLE:block K of each id: `block` neighbouring ids in natural order are one group"
    block = np.empty(len(ids), int)
    block[natural_order(ids)] = np.arange(len(ids)) // table.block
    return f'{table.name}:block ' + pd.Series(block, ids.index).astype(str)


def patients_text(frame: pd.DataFrame, table: Table) -> str:
    "Return how many patients the images of a table are of: '120 patients', or 'patients unknown'."
    n = frame.group.nunique()
    if table.grouped_by == 'patients': return plural(n, 'patient')
    return f'patients unknown, {n} {table.grouped_by}' if table.block else 'patients unknown'


def read_eye(text: str) -> str:
    "Return left or right for a cell such as L, OS, 'right eye', 'linkes Auge' or 'œil droit'; '' for another text"
    words = [word for word in text.casefold().replace('.', '').split() if word not in EYE_NOUNS]
    return EYES.get(words[0], '') if len(words) == 1 else ''


def eye_of_name(name: str) -> str:
    "Return the only eye that the words of an id or a file name say: right for '12_R_1.png'; '' for none or both"
    words = re.split(r'[\W\d_]+', without_image_suffix(name).casefold())
    found = {EYES[word] for word in words if word in EYES_OF_NAMES}
    return found.pop() if len(found) == 1 else ''


def eye_note(names: Sequence[str], eyes: Sequence[str], patients: Sequence[str] | None = None) -> str:
    """Return a warning if ids or file names that say which eye they show contradict `eyes`; else ''.

    Where names say one eye only, the word may mean something else, and counts for nothing.
    """
    df = pd.DataFrame(dict(file=list(names), eye=list(eyes), said=[eye_of_name(name) for name in names]))
    if not {'left', 'right'} <= set(df.said): return ''
    wrong = df[(df.eye != '') & (df.said != '') & (df.eye != df.said)]
    if not len(wrong): return ''
    shown = first_few([f'{name} is {eye}' for name, eye in zip(wrong.file, wrong.eye, strict=True)])
    twice = _twice(df.assign(patient=list(patients))) if patients is not None else 0
    more = f'; {plural(twice, "patient")} with one eye twice where the names say both' if twice else ''
    return (f'the eye contradicts the name of {plural(len(wrong), "image")} of {len(df)} ({shown}){more}. Correct the '
            'eyes or the names')


def _twice(df: pd.DataFrame) -> int:
    "Return how many patients have images of one eye alone although the names say both"
    found = df[df.patient != ''].groupby('patient').agg(eyes=('eye', 'nunique'), said=('said', 'nunique'))
    return int(((found.eyes == 1) & (found.said == 2)).sum())


def eyes(csv: Path, df: pd.DataFrame, ids: pd.Series, table: Table) -> pd.Series:
    "Return left or right for each row, from the column or the pattern `eye`. Raises `TableError` for another value"
    texts = df[table.eye] if table.eye in df else ids.str.extract(table.eye).iloc[:, 0].fillna('')
    found = texts.map({text: read_eye(text) for text in texts.unique()})
    bad = texts[found.eq('') & ~texts.str.casefold().isin(UNKNOWN)]
    if len(bad) or not found.any():
        shown = first_few(sorted(set(bad))) or 'nothing'
        raise TableError(f'{csv}: [table.{table.name}] eye = {table.eye}: found {shown}. Expected are '
                         f'{EYE_EXAMPLES}.')
    return found
