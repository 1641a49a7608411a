"Understand the grades that graders wrote: numbers, Roman numerals, words, several columns, values for ungradable."
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from aptos_fastai.data.spreadsheet import TableError, count, first_few
from aptos_fastai.metrics import GRADES
from aptos_fastai.recipe.sections import Table

_DISEASE = '(dr|(diabetic )?retinopathy)'
_NONPROLIFERATIVE = f'( (npdr|nonproliferative( {_DISEASE})?|{_DISEASE}))?'
GRADE_WORDS = (                              # patterns of the grades 0 to 4, beside numbers, in lower case
    f'nodr|none|normal|healthy|no( (apparent )?{_DISEASE})?|r0',
    f'(npdr )?mild{_NONPROLIFERATIVE}|i|r1',
    f'(npdr )?moderate{_NONPROLIFERATIVE}|ii|r2',
    f'(npdr )?severe{_NONPROLIFERATIVE}|iii|r3',
    f'pdr|proliferat(iv)?e( {_DISEASE})?|iv|r4')
_NAMES_GRADE = re.compile(
    r'^[0-4](?!\d)|(^|[^a-z])((grade|level|stage|class|dr|g)[ _]?[0-4]\w?|r[0-4]\w*|i{1,3}[ab]?|iv|mild|moderate|'
    r'severe|minimal|normal|healthy|background|no signs|n?pdr|dr|abnormal\w*|proliferat\w*|retinopath\w*|mod|sev|prp|'
    r'laser\w*|etdrs|leicht\w*|mittel\w*|schwer\w*|leve|lieve|l[ée]g[èe]re?|moderad\w*|mod[ée]r\w*|grave)([^a-z]|$)|'
    r'[0-4](?!\d)|^\d\d$')
BLANK = 'blank'                              # in the key `ungradable`: an empty cell
MOST_ODD = 8                                 # values that are listed to be named as ungradable
FEWEST_ROWS = 10                             # a table with so many rows has more than one grade


@lru_cache(10_000)
def read_grade(text: str) -> float:
    """Return the grade that a cell means: 2, 2.0, '2,0', II, 'moderate', 'grade 2', '2 - moderate'; NaN otherwise.

    Names are those of the international scale, as 'No apparent retinopathy' (Wilkinson et al. 2003), and usual ones.
    """
    if text.strip().startswith('-'): return np.nan
    plain = ' '.join(re.sub(r'[_\-():;\[\]]|[.,](?!\d)', ' ', text.casefold()).split())
    plain = plain.replace('non proliferative', 'nonproliferative')
    plain = re.sub(r'^(grade|level|class|stage|dr)s? ?(?=\d|[iv]+$)', '', plain)     # grade3, DR 2, level II
    if np.isfinite(grade := _named(plain)) or np.isfinite(grade := _number(plain)): return grade
    first, rest = plain.partition(' ')[::2]                                          # 2 - moderate
    if np.isnan(_number(first)): rest, first = plain.rpartition(' ')[::2]            # moderate (2)
    return _number(first) if _number(first) == _named(rest) else np.nan


def _names_grade(text: str) -> bool:
    "Return whether a cell names a grade or has a number, so that it hardly means ungradable"
    return bool(_NAMES_GRADE.search(text.casefold()))


def _named(text: str) -> float:
    return next((float(grade) for grade, words in enumerate(GRADE_WORDS) if re.fullmatch(words, text)), np.nan)


def _number(word: str) -> float:
    try: value = float(word.replace(',', '.'))
    except ValueError: return np.nan
    return value if value in range(GRADES) else np.nan


def grade_texts(csv: Path, df: pd.DataFrame, table: Table) -> pd.Series:
    "Return the text of each row's grade: of the one of the table's grade columns that is filled"
    if table.grade in df: return df[table.grade]
    columns = df[list(table.grade_columns)]
    filled = columns.ne('').sum(axis=1)
    several = df[table.id][filled > 1]
    if len(several):
        raise TableError(f'{csv}: {count(several, "row")} with a grade in more than one of the columns '
                         f'{", ".join(table.grade_columns)}: {first_few(several)}. Set `grade` to the one that counts.')
    return columns.agg(''.join, axis=1)


def is_ungradable(texts: pd.Series, table: Table) -> pd.Series:
    "Return which rows have a value that means ungradable (the table's key `ungradable`)"
    values = {'' if value == BLANK else _canonical(value) for value in table.ungradable_values}
    return texts.map(_canonical).isin(values)


def _canonical(text: str) -> str:
    "Return a text for comparison: without case; 5, 5.0, 05 and 5,0 are equal"
    try: return f'{float(text.replace(",", ".")):g}'
    except ValueError: return text.casefold()


def refuse_english_scale(csv: Path, texts: pd.Series) -> None:
    "Raise `TableError` for the grades of English screening, as R0, R3A or R2M1: its R3 is proliferative"
    words = set(texts.str.casefold().str.replace('[ /,-]', '', regex=True)) - {''}
    letters = {word for word in words if re.fullmatch(r'r\d[a-z]?(m\d[a-z]?)?(p\d)?', word)}
    if letters and letters == words and 'r4' not in letters:
        shown = first_few([word.upper() for word in sorted(letters)])
        raise TableError(f'{csv}: the grades {shown} look like those of the English screening programme, whose R3 is '
                         'proliferative and which has no R4. Write 0 to 4 of the international scale.')


def ungradable_text(texts: pd.Series) -> str:
    "Return values for the key `ungradable`: those of `texts` that name no grade, or VALUE for none or too many"
    found = [text or BLANK for text in texts.unique() if not _names_grade(text)]
    return ' | '.join(found) if 0 < len(found) <= MOST_ODD else 'VALUE'


def read_grades(csv: Path, texts: pd.Series, ids: pd.Series, table: Table) -> np.ndarray:
    "Return the grades as float32 (n,). Raises `TableError` for anything but the grades 0 to 4, and for one grade alone"
    refuse_english_scale(csv, texts)
    grades = texts.map({text: read_grade(text) for text in texts.unique()})
    bad = grades.isna()
    if bad.any():
        shown = [f'{i} = {v or "(empty)"}' for i, v in zip(ids[bad], texts[bad], strict=True)]
        raise TableError(f'{csv}: {count(shown, "invalid value")} in column {", ".join(table.grade_columns)}: '
                         f'{first_few(shown)}. Grades are whole numbers from 0 to 4. If a value means that an image '
                         f'cannot be graded, name it: --ungradable "{ungradable_text(texts[bad])}", or the key '
                         '`ungradable` of a recipe.')
    if len(grades) >= FEWEST_ROWS and grades.nunique() == 1:
        like = ' It looks like a sample submission.' if grades.iloc[0] == 0 else ''
        raise TableError(f'{csv}: all {len(grades)} grades are {grades.iloc[0]:.0f}.{like} Set csv and grade to the '
                         'file and the column with the grades of the graders.')
    return grades.to_numpy(np.float32)
