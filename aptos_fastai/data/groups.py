"Find which images share a fold: those of a patient (a column, or a pattern in ids) or of a block of ids; and the eye."
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from aptos_fastai.common.console import plural
from aptos_fastai.data.locate import without_image_suffix
from aptos_fastai.data.spreadsheet import TableError, count, first_few, read_spreadsheet
from aptos_fastai.recipe.sections import Table

ROW = '(row)'                                # column: which row of the CSV held an image
WHOLE_NUMBER = r'^(\d+)[.,]0+$'              # 17.0, as spreadsheets write 17
UNKNOWN = '', 'na', 'n/a', 'nan', 'none', 'null', 'unknown', '?', '-'      # in a column of patients
EYE_PAIRS = [tuple(pair.split('/')) for pair in (                # words for left and right
    'l/r left/right os/od og/od oi/od oe/od la/ra links/rechts linkes/rechtes gauche/droit gauche/droite '
    'izquierdo/derecho izquierda/derecha esquerdo/direito sinistro/destro sx/dx le/re lt/rt s/d g/d i/d e/d').split()]
EYES = {word: eye for pair in EYE_PAIRS for word, eye in zip(pair, ('left', 'right'), strict=True)}
LETTERS = {'s', 'd', 'g', 'i', 'e'}          # in a column they are eyes only where two of a pair are all that occurs
AMBIGUOUS = LETTERS | {'la', 'ra', 'oe', 'oi', 'le', 're', 'lt', 'rt', 'sx', 'dx'}   # alone in a name: nothing
EYES_OF_NAMES = EYES.keys() - AMBIGUOUS
EYE_NOUNS = 'eye', 'auge', 'oeil', 'œil', 'ojo', 'olho', 'occhio'
EYE_EXAMPLES = 'L, R, left, right, OS, OD, OG, LA, RA, links, rechts, gauche, droit, izquierdo, derecho'


def find_groups(csv: Path, df: pd.DataFrame, ids: pd.Series, table: Table) -> tuple[pd.Series, list[str]]:
    """Return TABLE:PATIENT or TABLE:block K of each row, and notes of what a person should check.

    A row without a patient is a group of its own. Patients that differ in case, blanks or leading zeros are one: it is
    worse if a patient is in two folds than if two patients share one. Raises `TableError` if no row has a patient
    although the table says where they are.
    """
    if table.block: return _blocks(ids, table), []
    nobody = df[ROW] if len(table.id_columns) > 1 else ids
    if not (table.patient or table.pairs or table.group): return f'{table.name}:' + nobody, []
    patients = _patients(csv, df, ids, table)
    missing = ids[patients.isna()]
    name = next(name for name in ('patient', 'pairs', 'group') if getattr(table, name))
    key = f'[table.{table.name}] {name} = {getattr(table, name)}'
    if len(missing) == len(ids): raise TableError(f'{csv}: {key}: {_no_patient(ids, table)}')
    taken = patients.isin(set(nobody[patients.isna()]))      # called as the id of a row that has no patient
    patients = patients.where(~taken, 'Patient ' + patients)
    groups = f'{table.name}:' + patients.fillna(nobody)
    notes = [f'{key}: {text}; each is one patient here. Correct that if they are different people'
             for text in patient_variants(_patient_texts(df, ids, table))]
    if not len(missing): return groups, notes
    each = 'it is' if len(missing) == 1 else 'each is'
    verb = dict(patient='is empty in', pairs='does not list', group='does not match')[name]
    noun = 'rows' if table.patient else 'ids'
    note = (f'{key}: {verb} {len(missing)} of {len(ids)} {noun} ({first_few(missing)}); {each} a patient of its own. '
            'Correct that if it is wrong.')
    return groups, [note, *notes]


def _no_patient(ids: pd.Series, table: Table) -> str:
    if table.patient: return f'the column is empty in all {len(ids)} rows. Name another, or remove the key.'
    if table.pairs: return f'the file lists none of the {len(ids)} ids, for example {ids.iloc[0]}. Name another file.'
    return (f'matches none of the {len(ids)} ids, for example {ids.iloc[0]}. Put the part that is the patient in '
            'parentheses, or remove group and set block = 10 if patients are unknown.')


def _patients(csv: Path, df: pd.DataFrame, ids: pd.Series, table: Table) -> pd.Series:
    "Return the patient of each row; NaN where there is none"
    if table.pairs: return ids.map(_bare).map(_read_pairs(csv.parent / table.pairs))
    texts = _patient_texts(df, ids, table).str.casefold().str.replace(WHOLE_NUMBER, r'\1', regex=True)
    texts = texts.where(~texts.isin(UNKNOWN if table.patient else ['']), np.nan)
    return texts.groupby(texts.map(patient_key, na_action='ignore')).transform('first')


def _patient_texts(df: pd.DataFrame, ids: pd.Series, table: Table) -> pd.Series:
    "Return the patient of each row as it is written, in the column or in the id; NaN where a pattern does not match"
    if table.pairs: return pd.Series(np.nan, ids.index, object)
    return df[table.patient] if table.patient else ids.str.extract(table.group).iloc[:, 0]


def patient_key(text: str) -> str:
    "Return what is equal for one patient written in several ways: 7, 007 and 7.0; P1, p1, P01 and 'p 1'"
    text = re.sub(WHOLE_NUMBER, r'\1', text.strip().casefold())
    text = re.sub(r'(?<!\d)\s+|\s+(?!\d)', '', text)
    return re.sub(r'(?<!\d)0+(?=\d)', '', text)


def patient_variants(texts: Iterable[str]) -> list[str]:
    "Return ['2 patients are written in several ways (7 = 007, P1 = p1)'], or nothing if none is"
    written: dict[str, dict[str, None]] = {}
    for text in texts:
        if isinstance(text, str): written.setdefault(patient_key(text), {})[text] = None
    several = [' = '.join(found) for key, found in written.items() if len(found) > 1 and key not in UNKNOWN]
    verb = 'is' if len(several) == 1 else 'are'
    return [f'{count(several, "patient")} {verb} written in several ways ({first_few(several)})'] if several else []


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


def shared_patients(tables: Iterable[Table], frames: dict[str, pd.DataFrame]) -> Iterator[tuple[str, str]]:
    "Yield the name of a table and a note where its patients are called as those of an earlier table"
    known: dict[str, dict[str, str]] = {}
    for table in tables:
        if table.name not in frames or not (table.patient or table.group): continue
        df, prefix = frames[table.name], f'{table.name}:'
        patients = df.group[df.group != prefix + df.id_code].str.removeprefix(prefix)
        own = {patient_key(text): text for text in patients.unique() if not text.startswith('row ')}
        for other, theirs in known.items():
            both = [' = '.join(dict.fromkeys([theirs[key], own[key]])) for key in own if key in theirs]
            if both: yield table.name, (
                f'{count(both, "patient")} with the name or number of one of [table.{other}] ({first_few(both)}): they '
                'count as different people and may lie in different folds. If they are the same, put both tables into '
                'one CSV')
        known[table.name] = own


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
    word = _word_of_eye(text)
    return EYES.get(word, '') if word not in LETTERS else ''


def read_eyes(texts: Iterable[str]) -> dict[str, str]:
    "Return what `read_eye` does for each text of a column; S and D, G, I or E count if the column has no other word"
    words = {text: _word_of_eye(text) for text in texts}
    found = {word for text, word in words.items() if text.casefold() not in UNKNOWN}
    is_pair = any(found == {*pair} for pair in EYE_PAIRS)
    return {text: EYES.get(word, '') if is_pair else read_eye(text) for text, word in words.items()}


def _word_of_eye(text: str) -> str:
    "Return the only word of a text beside that for eye, in lower case; '' if there are more"
    words = [word for word in text.casefold().replace('.', '').split() if word not in EYE_NOUNS]
    return words[0] if len(words) == 1 else ''


def eye_of_name(name: str) -> str:
    "Return the only eye that the words of an id or a file name say: right for '12_R_1.png'; '' for none or both"
    words = re.split(r'[\W\d_]+', without_image_suffix(name).casefold())
    found = {EYES[word] for word in words if word in EYES_OF_NAMES}
    return found.pop() if len(found) == 1 else ''


def not_eyes(texts: Iterable[str]) -> str:
    "Return the end of an error about texts that name no eye: which words do, and that numbers do not"
    found = list(texts)
    has_numbers = any(re.match(r'\d+([.,]0+)?(\s|$)', text) for text in found)
    has_letters = any(_word_of_eye(text.partition(' (')[0]) in LETTERS for text in found)       # D (a.png)
    numbers = ' Which eye a number means is not known: write L and R.' if has_numbers else ''
    letters = ' D is right only beside S, G, I or E alone, and these are left only beside D: write L and R.'
    return f'{first_few(found) or "nothing"}. Expected are {EYE_EXAMPLES}.{numbers}{letters if has_letters else ""}'


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
    found = texts.map(read_eyes(texts.unique()))
    bad = texts[found.eq('') & ~texts.str.casefold().isin(UNKNOWN)]
    if len(bad) or not found.any():
        raise TableError(f'{csv}: [table.{table.name}] eye = {table.eye}: found {not_eyes(sorted(set(bad)))}')
    return found
