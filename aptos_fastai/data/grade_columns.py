"What the columns of a CSV say of grades: which can hold them, and which only seem to."
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from aptos_fastai.common.console import plural
from aptos_fastai.data.grades import BLANK, FEWEST_ROWS, read_grade, refuse_english_scale, ungradable_text
from aptos_fastai.data.spreadsheet import TableError, first_few
from aptos_fastai.metrics import GRADES

_DR = r'(^|[^a-z])dr([^a-z]|$)'
DR_NAME = re.compile(f'retinopat|icdr|{_DR}')
GRADE_NAME = re.compile(f'diagnos|{DR_NAME.pattern}')
WEAK_GRADE_NAME = re.compile(                # needs the values of grades, too
    r'grade|level|label|class|stage|severity|befund|stufe|klasse|schwere|niveau|'
    r'(^|[^a-z])(grado?s?|stade|stadi(o|um)|estadio|gravedad|gravit[éà]|classe)([^a-z]|$)')
OTHER_DISEASE = re.compile(
    r'edema|oedema|dme|quality|gradab|referable|clarity|artifact|glaucoma|amd|cataract|hypertens|ckd|kidney|'
    r'(^|[^a-z])rop([^a-z]|$)')
OTHER_THING = re.compile(OTHER_DISEASE.pattern + '|risk|field|lens|confidence|education|camera|visit')
OTHER_GRADE = re.compile(OTHER_THING.pattern + r'|(^|[^a-z])(id|no|nr|number|name)([^a-z]|$)')
PREDICTION_NAME = re.compile(
    r'predict(?!or)|y_hat|softmax|logits?([^a-z]|$)|(^|[^a-z])(preds?([^a-z]|$|class|grade|score|label)|'
    r'prob(s|abilit|[^a-z]|$)|(ai|model)[ _-]?(score|grade|output|result|confidence))')
PLAIN_NAME = re.compile(
    r'((retinopathy|retina|dr|final|true|image)[ _-]?)?(grade|level|severity|stage|label|class|diagnosis)s?')
REFERABLE_NAME = re.compile(r'referable|referral|binary')
SCALE_NAME = re.compile(r'icdr')             # the international scale, which has the grades 0 to 4
OTHER_SCALE = re.compile(r'sdrg|scottish|etdrs|nhs|english')
MADE_OF_GRADE = re.compile(
    'binary|refer|label|grade|level|stage|sever|diagnos|retinopat|^(type|class|category)$|'
    '(^|[^a-z])(any|vt|st|np|r|p)?dr([^a-z]|$)')
PLACE_NAME = re.compile(                     # may go with the grade, and is no grade
    'clinic|klinik|site|hospital|cent(er|re|rum)|ward|practice|camera|kamera|device|scanner|doctor|physician|country')
UNGRADABLE = re.compile(r'|ungrad.*|unread.*|poor.*|bad.*|not? grad.*|n/?a|nan|none|null|u|x|5|5\.0|6|9|99|-1')
WORD = r'^(?![ivIV]+$).*[^\W\d_]{2}'           # text with a word, no Roman number
MOSTLY = .8                                  # of the values of a column that nearly has grades
FEWEST_NAMED = 3                             # rows of a name that has another number, at least
AGREE = .9                                   # of the rows in which a yes or no is that of a grade from some grade on


@dataclass(frozen=True)
class GradeColumns:
    "The columns of a CSV, as columns of grades"
    file: Path
    df: pd.DataFrame = field(repr=False)

    def count(self, column: str) -> int:
        "Return how many different grades a column has"
        return self.df[column].map(read_grade).nunique()

    def has_grades(self, column: str) -> bool:
        "Return whether every value is a grade, or means ungradable, and some are grades"
        unique = self.df[column].unique()
        others = [o for o in unique if np.isnan(read_grade(o))]
        return len(others) < len(unique) and all(UNGRADABLE.fullmatch(o.casefold()) for o in others)

    def named_as_grades(self, columns: Sequence[str]) -> list[str]:
        "Return the columns that by name and values hold grades of retinopathy, more than two"
        names = {c: c.casefold() for c in columns}
        return [c for c, name in names.items() if (GRADE_NAME.search(name) or WEAK_GRADE_NAME.search(name))
                and not OTHER_GRADE.search(name) and not PREDICTION_NAME.search(name)
                and self.has_grades(c) and self.count(c) > 2]

    def is_yes_or_no(self, *columns: str) -> bool:
        "Return whether columns have 0 and 1 alone, in enough rows to be hardly grades"
        grades = self.df[[*columns]].map(read_grade).to_numpy(float)
        return {*grades[np.isfinite(grades)]} == {0, 1} and len(self.df) >= FEWEST_ROWS

    def without_yes_or_no(self, columns: list[str]) -> list[str]:
        """Return those of `columns` that have more than 0 and 1, if one of them plainly is of retinopathy; else all.

        That is by its name, or because the columns of 0 and 1 say whether it has reached some grade.
        """
        found = [column for column in columns if not self.is_yes_or_no(column)]
        rest = [column for column in columns if column not in found]
        if any(DR_NAME.search(column.casefold()) or PLAIN_NAME.fullmatch(column.casefold())
               and all(self._is_threshold(o, column) for o in rest) for column in found): return found
        return columns

    def _is_threshold(self, yes_or_no: str, column: str) -> bool:
        "Return whether a yes or no is that of reaching some grade of a column, in nearly all rows with yes and with no"
        both = self.df[[yes_or_no, column]].map(read_grade).dropna()
        yes = both[yes_or_no] == 1
        agree = [((both[column] >= grade) == yes).groupby(yes).mean().min() for grade in range(1, GRADES)]
        return max(agree) >= AGREE

    def filled_in_turn(self, columns: Sequence[str]) -> list[str]:
        "Return two columns of which exactly one is filled in each row; an empty list if there are none"
        for i, a in enumerate(columns):
            for b in columns[i + 1:]:
                filled = self.df[a] != '', self.df[b] != ''
                if (filled[0] ^ filled[1]).all() and filled[0].any() and filled[1].any(): return [a, b]
        return []

    def give(self, grades: Sequence[str], column: str) -> bool:
        "Return whether the columns `grades` give the value of `column`, which is named as made of the grade"
        name = column.casefold()
        if PLACE_NAME.search(name) or not MADE_OF_GRADE.search(name): return False
        known = self.df[[*grades]].agg(' '.join, axis=1)
        return len(self.df) >= 3 * known.nunique() and self.df.groupby(known)[column].nunique().max() == 1

    def other_code(self, column: str, others: Sequence[str]) -> str:
        """Say which of `others` has names of grades that `column` numbers otherwise, with examples; or an empty text.

        So it is if names are numbered as in the alphabet, which some libraries do, or two of them are swapped. A second
        reader seldom gives all images of a grade the same other grade.
        """
        for other in others:
            if OTHER_THING.search(other.casefold()) or PREDICTION_NAME.search(other.casefold()): continue
            rows = self.df[[column, other]][self.df[other].str.contains(WORD)]
            rows = rows[rows.map(read_grade).notna().all(axis=1)]
            if rows[other].map(read_grade).nunique() < 3: continue
            usual = rows[column].groupby(rows[other]).agg(lambda o: o.mode()[0])       # text of each name
            is_usual = rows[column] == rows[other].map(usual)
            of_name = is_usual.groupby(rows[other]).agg(['size', 'mean'])
            codes = usual[(of_name['size'] >= FEWEST_NAMED) & (of_name['mean'] >= AGREE)]
            wrong = [f'{name} is {code}' for name, code in codes.items() if read_grade(name) != read_grade(code)]
            if wrong and is_usual.mean() >= AGREE: return f'{other} numbers the grades otherwise: {first_few(wrong)}'
        return ''

    def other_folder(self, column: str, folders: pd.Series) -> tuple[str, float]:
        """Say how many images lie in `folders` named by another grade than their own, with examples, and their share.

        Folders called by numbers can be patients, cameras or parts: they count if one of them is 0, with a share of 0.
        """
        are_words = folders.str.fullmatch('[0-4]').mean() < .5
        if not are_words and not (folders == '0').any(): return '', 0.
        named = folders.map(read_grade).where(folders.str.contains(WORD if are_words else '^[0-4]$'))
        grades = self.df.loc[folders.index, column].map(read_grade)
        wrong = named.notna() & grades.notna() & (named != grades)
        if named.nunique() < 3 or named.notna().mean() < MOSTLY or not wrong.any(): return '', 0.
        pairs = pd.DataFrame(dict(folder=folders, grade=self.df.loc[folders.index, column]))[wrong].drop_duplicates()
        shown = first_few([f'grade {grade} in {folder}/' for folder, grade in pairs.itertuples(index=False)])
        found = ' that were found' if len(folders) < len(self.df) else ''
        text = f'{wrong.sum()} of {len(folders)} images{found} lie in a folder of another grade: {shown}'
        return text, float(wrong.mean()) if are_words else 0.

    # What is hardly a column of grades raises `TableError`

    def refuse_yes_or_no(self, columns: Sequence[str]) -> None:
        "Refuse columns of 0 and 1 alone"
        if not self.is_yes_or_no(*columns): return
        raise TableError(f'{self.file}: column {", ".join(columns)} has only the grades 0 and 1, so it looks like a '
                         'yes or no (referable, any retinopathy). If they are grades, add --grade '
                         f'"{" | ".join(columns)}".')

    def refuse_another_disease(self, columns: Sequence[str]) -> None:
        "Refuse a column of 0 and 1 that is named as something else than retinopathy"
        for column in columns:
            if OTHER_DISEASE.search(column.casefold()) and self.is_yes_or_no(column):
                raise TableError(f'{self.file}: column {column} has only 0 and 1, which by its name are no grades of '
                                 'retinopathy. Name the column of grades.')

    def refuse_one_hot(self, columns: list[str]) -> None:
        "Refuse columns of 0 and 1, of several grades, of which a row has the 1 in one, or none: its place is the grade"
        grades = self.df[columns].map(read_grade)
        ones = grades.sum(axis=1)
        if len(columns) < 3 or not grades.isin([0, 1]).all(axis=None) or ones.max() != 1: return
        if ones.mean() < .5 and not _name_all_grades(columns): return
        raise TableError(f'{self.file}: the columns {", ".join(columns)} have at most one 1 in each row. Write one '
                         'column with the grade, 0 to 4, and name it: --grade COLUMN.')

    def refuse_one_of_several(self, column: str) -> None:
        "Refuse a column of 0 and 1 that is one of those named by a grade, of which a row has a 1 in one"
        named = [c for c in self.df if _name_grade(c) and {*map(read_grade, self.df[c].unique())} <= {0, 1}]
        if column in named: self.refuse_one_hot(named)

    def refuse_without_0(self, columns: Sequence[str]) -> None:
        "Refuse grades without a 0: their scale may begin at 1"
        texts = sorted(set(self.df[[*columns]].to_numpy().ravel()) - {''})
        if len(self.df) < FEWEST_ROWS or any(read_grade(t) == 0 for t in texts): return
        raise TableError(f'{self.file}: column {", ".join(columns)} has no grade 0 (it has {first_few(texts)}). If its '
                         'scale begins at 1, write 0 to 4 of the international scale; if not, add --grade '
                         f'"{" | ".join(columns)}".')

    def refuse_nearly_grades(self, columns: Sequence[str], least: float) -> None:
        """Refuse the one of `columns` that has most grades beside other values.

        Its share of grades is `least`, if its name is that of grades; another column has mostly grades.
        """
        columns = [c for c in columns if not OTHER_GRADE.search(c.casefold()) and not self.has_grades(c)]
        shares = {c: float(np.isfinite(self.df[c].map(read_grade)).mean()) for c in columns}
        shares = {c: share for c, share in shares.items() if share < 1 and (
            share >= least and _is_named_as_grades(c) or share >= MOSTLY and self.count(c) > 2)}
        if not shares: return
        column = max(shares, key=shares.__getitem__)
        odd = sorted(text for text in self.df[column].unique() if np.isnan(read_grade(text)))
        rows, shown = int(self.df[column].isin(odd).sum()), [text or BLANK for text in odd]
        named = ungradable_text(pd.Series(odd))
        values = self.df[column]
        refuse_english_scale(self.file, values[~values.str.casefold().str.fullmatch(UNGRADABLE)])
        advice = f'Correct them, or name those that mean ungradable: --grade "{column}" --ungradable "{named}".'
        if rows > len(self.df) / 2: advice = 'Write them as 0 to 4 in another column, and name it: --grade COLUMN.'
        raise TableError(f'{self.file}: column {column} has values that are no grades: {first_few(shown)} ({rows} of '
                         f'{plural(len(self.df), "row")}). Grades are 0 to 4, I to IV or English words. {advice}')


def _name_all_grades(columns: Sequence[str]) -> bool:
    "Return whether columns are named as the grades 1 to 4 by numbers, or as 1 to 3 by words: mild, dr_mild, grade II"
    grades = {read_grade(text) for column in columns for text in (column, _end(column))}
    return {1, 2, 3} <= grades and (4 in grades or not any(_end(column).isdigit() for column in columns))


def _name_grade(column: str) -> bool:
    "Return whether the name of a column is that of a grade in words"
    return any(np.isfinite(read_grade(text)) for text in (column, _end(column))) and not _end(column).isdigit()


def _end(column: str) -> str:
    "Return the last word of the name of a column, or its number: mild of dr_mild, 1 of label1"
    return re.sub(r'^.*[^a-z0-9](?=.)|^[a-z]+(?=\d)', '', column.casefold())


def _is_named_as_grades(column: str) -> bool:
    return bool(GRADE_NAME.search(column.casefold()) or WEAK_GRADE_NAME.search(column.casefold()))
