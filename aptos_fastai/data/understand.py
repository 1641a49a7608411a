"Understand a table without a recipe: which column is the id, the grade, the patient and the eye, and why."
import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from aptos_fastai.common.console import plural
from aptos_fastai.data.grade_columns import (
    GRADE_NAME,
    MOSTLY,
    OTHER_GRADE,
    OTHER_SCALE,
    PREDICTION_NAME,
    REFERABLE_NAME,
    SCALE_NAME,
    UNGRADABLE,
    WEAK_GRADE_NAME,
    GradeColumns,
)
from aptos_fastai.data.grades import BLANK, read_grade
from aptos_fastai.data.groups import EYE_PAIRS, EYES, EYES_OF_NAMES, UNKNOWN, not_eyes, patient_key, read_eyes
from aptos_fastai.data.id_order import compare_id_orders
from aptos_fastai.data.locate import ImageLocator, files_below, has_image_suffix, is_image, without_image_suffix
from aptos_fastai.data.spreadsheet import (
    TableError,
    collected,
    first_few,
    raise_all,
    read_spreadsheet,
    require_column,
)
from aptos_fastai.data.tables import TableContents, is_class_folder, table_contents
from aptos_fastai.recipe.files import preset_files
from aptos_fastai.recipe.read import parse_table, preset_table, read_recipe
from aptos_fastai.recipe.sections import COLUMNS_OF_SCORES, Table, split_names

Ask = Callable[[str, list[str]], str]        # a question and its possible answers -> one of them

SAMPLE = 200                                 # rows that are searched among the images
MOST_LOCATED = 5_000                         # rows whose folders are compared with their grades
RARE = .05                                   # of the images may lie in a folder of another grade: it is only said
PRESET_KEYS = (                              # of a table that is recognised as that of a preset
    'id', 'grade', 'ungradable', 'patient', 'pairs', 'group', 'block', 'eye', 'carry', 'where', 'sheet', 'relabels')
NEIGHBOUR_BLOCK = 10                         # ids in a group if neighbours have equal grades and patients are unknown
ID_SHARE = .5                                # of the values of a column that name images, at least, for a candidate
MOST_VALUES = 20                             # of a column that is carried
MOST_IMAGES = 10                             # of a patient, mostly: with more a column may be something else
ID_NAMES = (                                 # the first that a table has counts
    'id_code', 'image', 'image_id', 'file', 'filename', 'file name', 'image name', 'path', 'datei', 'dateiname', 'bild',
    'fichier', 'archivo', 'imagen', 'id', 'name')
PATIENT_NAME = re.compile(                   # of `plain` names, as all below
    r'patient|paciente|paziente|pacjent|пациент|患者|病人|subject|person(?!nel)|uhid|hospital.?(no|nr|num|id)|'
    r'(^|[^a-z])(pid|mrn|examination|study|participant|pat|pat.?nr|fall.?(nr|nummer)|case.?(id|no|nr|number))([^a-z]|$)')
PART_NAME = re.compile(                      # of training and test rows
    r'(^|[^a-z])(split|subset|usage|partition|(data)?set|fold|is_?train|is_?test|train_test)([^a-z]|$)')
NO_PATIENT = re.compile(
    r'(^|[^a-z])age([^a-z]|$)|sex|gender|site|clinic|date|name|race|ethnic|birth|dob|visit|status|eye|type|grade|level|'
    r'bmi|smok|weight|height|diabet|consent')
PERSONAL = re.compile('|'.join((              # is never carried: names, births, addresses, numbers, texts, staff
    r'(?<!device.)(?<!camera.)(?<!hospital.)(?<!clinic.)(?<!site.)(?<!center.)(?<!centre.)name|initial|alias|apellid',
    r'nom(e|bre)?([^a-z]|$)|cognome|surnom|sobrenome|nazwisk|p[rř][ií]jmen|jm[eé]no|фио|фамил|имя|姓名|名前|paciente',
    r'paziente|pacjent|пациент|患者|病人|^pat(ient)?$|birth|dob|d\.o\.b|yob|jahrgang|geb(oren|urt)|naiss|nascita',
    r'(^|[^a-z]|pat)geb(dat|[^a-z]|$)|nacim|nascim|nac([^a-z]|$)|urodz|出生|address|adress|anschrift|direcci|indirizz',
    r'endere[cç]|stra(ss|ß)e|street|wohnort|village|post.?(code|al)|zip|stadt([^a-z]|$)',
    r'(^|[^a-z])(plz|city|town|ort|ville|ciudad|cidade|citt[aà]|miasto|tel|fax|handy|nhs|nif|cpf|user|kin)([^a-z]|$)',
    r'e.?mail|(?<!smart)(?<!i)(?<!i_)phone|telef|mobile(?!.?(unit|camera|device|clinic|van))|mrn|ssn|passport|insur|versich',
    r'guardian|comment|note|remark|observa|bemerk|anmerk|kommentar|notiz|(grad|label|annotat|read)[a-z]*by([^a-z]|$)',
    r'(^|[^a-z])(by|von|par|durch)$|(^|[^a-z])(grader|reader|rater|reviewer|assessor)s?([^a-z]|$)|annotat(or|eur)',
    r'(^|[^a-z])clinicians?([^a-z]|$)|adjudicator|screener(?!.?type)|technologist|gutachter|lecteur|befunder|auswerter',
    r'sachbearb|behandler|zuweiser|physician|doctor|arzt|ärzt|m[eé]d(ec|ico)|lekarz|врач|医生|医師|surgeon|consultant',
    r'ophthalmolog|optometri|oftalm|nurse|schwester|untersucher|examiner|operator|operador|photograph(er|$)|techni[ck]i')))
NUMBER_NAME = re.compile(r'(^|[^a-z])(id|no|nr|num|number|code|key|pid|mrn)([^a-z]|$)|id$')
EYE_NAME = re.compile(
    r'eye|auge|œil|oeil|lateral|(^|[^a-z])(side|seite|côté|lado|lato|oculus|ojo|olho|occhio)([^a-z]|$)')
EYE_PATTERN = r'(?i)[_\-. ]({})\d*(?:\.\w+)?$'               # of words for the eyes: left|right
PATIENT_PATTERN = r'(?i)^(.+?)[_\-. ]+(?:{})\d*(?:\.\w+)?$'


@dataclass(frozen=True)
class Understood:
    "A table as keys of a recipe, the folder that its paths begin at, and why: a line for each decision"
    table: Table
    data: Path
    reasons: list[str] = field(default_factory=list)
    skip_missing: bool = False               # leave out rows without an image

    @cached_property
    def contents(self) -> TableContents:
        "The table's images and grades, read once. Raises `TableError`"
        return table_contents(self.table, self.data, self.skip_missing)


def find_table(name: str, images: str = '', recipe: str = '', data: str = '', ask: Ask | None = None,
               skip_missing: bool = False, **keys: str) -> Understood:
    """Return the graded table that `name` names: a CSV or a folder, else a table of the recipe, else a preset.

    `images` is the folder of images of a CSV, `data` that of a recipe or a preset; `keys` (keys of [table.NAME]) change
    how a CSV or a folder is understood. With `skip_missing` rows without an image are left out. Raises `AptosError`.
    """
    if Path(name).exists():
        return understand_table(name, images, graded=True, ask=ask, skip_missing=skip_missing, **keys)
    known: dict[str, Table] = read_recipe(recipe).tables if recipe else {}
    if name not in known and name not in preset_files():
        tables = f', or a table of {recipe}: {", ".join(known)}' if recipe else ''
        raise TableError(f'{name}: no such file, and no such table. Give a CSV, a folder with a sub-folder for each '
                         f'grade, a preset ({", ".join(preset_files())}){tables}.')
    if not data: raise TableError(f'{name}: add --data FOLDER, the folder that has this table.')
    table = known[name] if name in known else preset_table(name)
    source = f'[table.{name}] of {recipe}' if name in known else f'the preset {name}'
    return Understood(table, Path(data), [f'table: {source}'], skip_missing)


def understand_table(csv: str | Path, images: str | Path = '', *, name: str = 'train', graded: bool = True,
                     ask: Ask | None = None, skip_missing: bool = False, **keys: str) -> Understood:
    """Return the table of a CSV (or .xlsx) and a folder of images, or of a folder alone; see `Understood`.

    Columns are chosen by their names and contents; `keys` (keys of [table.NAME]: id, grade, patient …) override that.
    Where two columns would do, `ask` chooses; without it that raises `TableError`, which names both. With
    `skip_missing` rows without an image are left out.
    """
    file = Path(csv)
    if file.is_dir() and Path(images).is_file():
        raise TableError(f'{file}: is a folder, and {images} a file. The table comes first, then the folder of images.')
    if file.is_dir(): return _understand_folder(file, name, graded, keys)
    if not file.is_file(): raise TableError(f'{file}: no such file or folder.')
    folder = Path(images) if str(images) else file.parent
    if folder.is_file(): raise TableError(f'{folder}: is a file. Unpack it if it is an archive, and give the folder.')
    if not folder.is_dir(): raise TableError(f'{folder}: no such folder of images.')
    keys = dict(csv=file.name, images=relative(folder, file.parent), **keys)
    table = _Columns(file, folder, keys, ask).table(name, graded, skip_missing)
    return table if not graded else _with_blocks(table)


def relative(path: Path, start: Path) -> str:
    "Return a path as it is seen from the folder `start`"
    try: return Path(os.path.relpath(path.resolve(), start.resolve())).as_posix()
    except ValueError: return path.resolve().as_posix()      # another drive on Windows


def _understand_folder(folder: Path, name: str, graded: bool, keys: dict[str, str]) -> Understood:
    "Return the table of a folder: of its sub-folders named by grade, or ungraded"
    keys = dict(keys, images='.')
    if not graded: return Understood(parse_table(name, keys), folder, [f'images: all below {folder}'])
    table = parse_table(name, dict(keys, grade='folder'))
    names = [o.name for o in sorted(folder.iterdir()) if o.is_dir()]
    ungradable = [name for name in names if np.isnan(read_grade(name)) and UNGRADABLE.fullmatch(name.casefold())]
    if ungradable and 'ungradable' not in keys: table = replace(table, ungradable=' | '.join(ungradable))
    found = [name for name in names if is_class_folder(name, table)]
    others = [name for name in names if name not in found and any(map(is_image, files_below(folder / name)))]
    if found and others:
        raise TableError(f'{folder}: the folders {", ".join(others)} hold images but are named by no grade. Rename or '
                         'move them; a folder called ungradable is left out.')
    if found and not any(read_grade(name) == 0 for name in found):
        raise TableError(f'{folder}: no folder is grade 0 (it has {", ".join(found)}). If the scale begins at 1, '
                         'rename the folders to 0 to 4 of the international scale.')
    if not found:
        below = [name for name in names if any(o.is_dir() and is_class_folder(o.name, table)
                                               for o in (folder / name).iterdir())]
        advice = 'Give a CSV with grades, or sort the images into such folders.'
        if below: advice = f'Its sub-folders {", ".join(below)} have: name one of them, as {folder / below[0]}.'
        raise TableError(f'{folder}: has no folders named by grade (0 to 4, or names of grades). {advice}')
    left_out = [f'ungradable: {table.ungradable} (folders)'] if table.ungradable else []
    understood = Understood(table, folder, [f'grade: the sub-folders {", ".join(found)}', *left_out])
    return understood if {'group', 'block', 'eye'} & keys.keys() else _with_eyes_of_names(understood)


def _with_eyes_of_names(understood: Understood) -> Understood:
    """Return a table of class folders with patients and eyes if the names of all images end in the eye.

    Not if a name is in two folders, because the patients of each folder may be numbered from 1.
    """
    names = understood.contents.frame.id_code.str.partition('/')[2]
    pattern = _patients_by_eye(names)
    if not pattern: return understood
    bare = names.map(without_image_suffix).str.casefold()
    twice = bare[bare.duplicated()].unique()
    if len(twice):
        why = (f'patient: unknown (the names end in the eye, but several folders have the same: {first_few(twice)}; '
               'each folder may number its own patients)')
        return replace(understood, reasons=[*understood.reasons, why])
    eye, patient = EYE_PATTERN.format(_last_words(names)), pattern.replace('^', '^[^/]*/', 1)
    reasons = [f'group, eye: every name ends in the eye ({first_few(names[:2])})']
    return Understood(replace(understood.table, group=patient, eye=eye), understood.data, understood.reasons + reasons)


def _with_blocks(understood: Understood) -> Understood:
    "Return the table with `block` where patients are unknown and neighbouring ids have equal grades"
    table = understood.table
    if table.grouped_by != 'images': return understood
    tests = compare_id_orders(understood.contents.frame, seed=0)
    if not any(test.is_related for test in tests): return understood
    why = (f'; neighbouring ids have equal grades: {NEIGHBOUR_BLOCK} neighbours are one group '
           f'(block = {NEIGHBOUR_BLOCK})')
    reasons = [reason + why * reason.startswith('patient: unknown') for reason in understood.reasons]
    return replace(understood, table=replace(table, block=NEIGHBOUR_BLOCK), reasons=reasons)


class _Columns:
    "Decides what each column of a CSV is; `reasons` says why"
    def __init__(self, file: Path, images: Path, keys: dict[str, str], ask: Ask | None):
        self.file, self.keys, self.ask = file, dict(keys), ask
        self.reasons: list[str] = []
        self.locator = ImageLocator(images, loose=True, within=images.resolve().parent)
        sheet = keys.get('sheet', '')
        df = read_spreadsheet(file, header=False, sheet=sheet, notes=[])
        self.given = list(keys)
        header = keys.get('header') or ('no' if self._is_row(df.iloc[0].tolist()) else 'yes')
        if header == 'yes': df = read_spreadsheet(file, sheet=sheet, notes=[])
        elif 'header' not in keys: self._decide('header', 'no', 'the first row already names an image')
        bad = [column for column in df if '|' in column]
        if bad: raise TableError(f'{file}: column {bad[0]} has a | in its name, which separates columns. Rename it.')
        self.df, self.grades = df, GradeColumns(file, df)
        self._use_preset()

    def _use_preset(self) -> None:
        "Take the keys of the preset whose CSV has this name and these columns"
        for name in preset_files():
            preset = preset_table(name)
            columns = [*preset.id_columns, *preset.grade_columns]
            if Path(preset.csv).name != self.file.name or preset.header == 'no': continue
            if not preset.graded or not set(columns) <= set(self.df): continue
            for key in PRESET_KEYS:
                value = getattr(preset, key)
                if not value or key in self.keys: continue
                if key in ('pairs', 'relabels') and not (self.file.parent / value).is_file(): continue
                if key == 'where' and value.partition('=')[0].strip() not in self.df: continue
                self._decide(key, str(value), f'as the preset {name}')
            return

    def _is_row(self, cells: list[str]) -> bool:
        "Return whether the first row holds an image and a grade rather than names of columns"
        return any(has_image_suffix(cell) or self._has_image(cell) for cell in cells if cell)

    def _has_image(self, name: str) -> bool:
        with suppress(LookupError): return bool(self.locator(name))
        return False

    def _decide(self, key: str, value: str, why: str) -> None:
        self.keys[key] = value
        self.reasons.append(f'{key}: {value} ({why})')

    def table(self, name: str, graded: bool, skip_missing: bool) -> Understood:
        "Return the table with every column decided"
        for key in ('id', 'patient', *(['grade'] if graded else [])):
            for column in self._columns(key):
                require_column(self.file, self.df, column, f'Choose one of them: --{key} COLUMN.')
        self.reasons += [f'{key}: {self.keys[key] or "none"} (given)' for key in self.given
                         if key not in ('csv', 'images')]
        if 'id' not in self.keys: self._find_id()
        if graded and REFERABLE_NAME.search(self.keys.get('grade', '').casefold()):
            raise TableError(f'{self.file}: column {self.keys["grade"]} says whether an image is referable, which is '
                             'no grade of 0 to 4. Name the column of grades.')
        if graded:
            self.grades.refuse_another_disease(self._columns('grade'))
            for column in self._columns('grade'): self.grades.refuse_one_of_several(column)
        if graded and 'grade' not in self.keys:
            faults: list[TableError] = []
            with collected(faults):
                self._find_grade()
                if 'ungradable' not in self.keys: self.grades.refuse_without_0(self._columns('grade'))
            if faults: self._raise_with_ids(faults, name, skip_missing)
        if graded and 'ungradable' not in self.keys: self._find_ungradable()
        if graded and not self.has_row_per_patient and len(self._columns('grade')) == 1: self._compare_grades()
        if not {'patient', 'group', 'pairs', 'block'} & self.keys.keys(): self._find_patient()
        if 'eye' not in self.keys: self._find_eye()
        if graded and 'carry' not in self.keys: self._find_carried()
        return Understood(parse_table(name, self.keys), self.file.parent, self.reasons, skip_missing)

    def _raise_with_ids(self, faults: list[TableError], name: str, skip_missing: bool) -> None:
        "Raise what is wrong with the grades, and with it what is wrong with ids and images"
        kept = 'csv', 'images', 'id', 'header', 'sheet', 'where'
        ungraded = parse_table(name, {key: value for key, value in self.keys.items() if key in kept})
        with collected(faults): table_contents(ungraded, self.file.parent, skip_missing)
        raise_all(self.file, faults)

    def _choose(self, key: str, columns: list[str], what: str) -> str:
        "Return the only one of `columns`, or the one that the user chooses"
        if len(columns) == 1: return columns[0]
        if self.ask: return self.ask(f'{self.file.name}: which column is {what}?', columns)
        raise TableError(f'{self.file}: {what} can be in {len(columns)} columns: {", ".join(columns)}. Choose one: '
                         f'--{key} COLUMN.')

    def _columns(self, key: str) -> tuple[str, ...]:
        "Return the columns that a key names"
        return split_names(self.keys.get(key, ''))

    @property
    def has_row_per_patient(self) -> bool:
        "Whether a row holds several images"
        return len(self._columns('id')) > 1

    def _others(self, *keys: str) -> list[str]:
        "Return the columns that none of these keys has taken"
        taken = {name for key in keys for name in self._columns(key)}
        return [column for column in self.df if column not in taken]

    def _find_id(self) -> None:
        share = image_shares(self.df, self._has_image)
        best = max(share.values(), default=0)
        if not best:
            files = first_few(self.locator.files[:3]) or 'nothing'
            named = [f' {c} has {first_few(self.df[c][:3])}.' for c in self.df if c.casefold() in ID_NAMES]
            raise TableError(f'{self.file}: no column names images in {self.locator.root}, which has {files}. Its '
                             f'columns are {", ".join(self.df)}.{"".join(named[:1])} {self._as_numbers()}Give the '
                             'folder of the images, or --id COLUMN.')
        columns = sorted((c for c, s in share.items() if s >= ID_SHARE or s == best), key=id_rank)
        if len(columns) == 2 and not self._same_images(*columns) and _are_sides(*columns):
            return self._decide('id', ' | '.join(columns), 'a row holds the two images of a patient')
        columns = [c for c in columns if c == columns[0] or not self._same_images(columns[0], c)]
        named = [c for c in columns if c.casefold() in ID_NAMES]
        column = named[0] if len(named) == 1 else self._choose('id', columns, 'the image')
        rest = f'; not {", ".join(c for c in columns if c != column)}' if len(columns) > 1 else ''
        why = f'{100 * share[column]:.0f} % of its values name an image in {self.locator.root}'
        self._decide('id', column, why + rest)

    def _as_numbers(self) -> str:
        "Return a hint if a column has the names of images as numbers: 7 or 7.0 for 007.png"
        stems = {re.sub(r'^0+(?=\d)', '', without_image_suffix(file.rpartition('/')[2])) for file in self.locator.files}
        for column in self.df:
            numbers = self.df[column].str.extract(r'^0*(\d+)(?:\.0)?$')[0]
            if numbers.nunique() > len(self.df) / 2 and numbers.isin(stems).mean() >= ID_SHARE:
                return (f'Column {column} has the names of images as numbers, without zeros in front or with .0, as a '
                        'spreadsheet writes them: correct it. ')
        return ''

    def _same_images(self, a: str, b: str) -> bool:
        "Return whether two columns name the same images"
        rows = self.df.head(SAMPLE)
        with suppress(LookupError):
            rows = rows[rows[a].map(self._has_image) & rows[b].map(self._has_image)]
            pairs = list(zip(rows[a], rows[b], strict=True))
            return bool(pairs) and all(self.locator(x) == self.locator(y) for x, y in pairs)
        return False

    def _find_grade(self) -> None:
        columns = self._others('id', 'patient')
        others = [c for c in columns if self.grades.has_grades(c)]
        possible = [c for c in others
                    if not OTHER_GRADE.search(c.casefold()) and not PREDICTION_NAME.search(c.casefold())]
        named = [c for c in possible if GRADE_NAME.search(c.casefold())]
        weak = [c for c in possible if WEAK_GRADE_NAME.search(c.casefold())]
        unnamed = [c for c in possible if self.grades.count(c) > 2]
        if self.has_row_per_patient: return self._find_grade_of_sides(others)
        if named:                            # a second column that would do
            least = max(3, max(map(self.grades.count, named)) - 1)
            named += [c for c in weak if c not in named and self.grades.count(c) >= least]
        if weak:
            most = max(map(self.grades.count, weak))
            weak += [c for c in unnamed if c not in weak and self.grades.count(c) > most]
        for candidates, why in ((named, 'by its name and values'), (weak, 'by its name and values'),
                                (unnamed, 'its values are grades')):
            sides = self.grades.filled_in_turn(candidates)
            if sides:
                self.grades.refuse_yes_or_no(sides)
                return self._decide('grade', ' | '.join(sides), 'one of them is filled in each row')
            if candidates is unnamed: self.grades.refuse_nearly_grades(columns, MOSTLY)
            if not candidates: continue
            chosen = self._choose_grade(candidates)
            rest = [c for c in others if c != chosen]
            text = f'; not {", ".join(rest)}' if rest else ''
            return self._decide('grade', chosen, why + text)
        self.grades.refuse_nearly_grades(columns, 0)
        self.grades.refuse_one_hot([c for c in others if c not in self.df.columns[self.df.nunique() > 2]])
        raise TableError(f'{self.file}: no column has grades (0 to 4, I to IV, or words such as moderate). Its columns '
                         f'are {", ".join(self.df)}. Name the column: --grade COLUMN.')

    def _choose_grade(self, columns: list[str]) -> str:
        """Return the column of grades: that of more than yes or no, of the international scale, or the user's choice.

        Raises `TableError` if there is none.
        """
        self.grades.refuse_one_hot(columns)
        if len(columns) == 2 and _are_sides(*columns):
            raise TableError(f'{self.file}: {columns[0]} and {columns[1]} are grades of both eyes, but a row names one '
                             f'image ({self.keys["id"]}). Give each image a row with its own grade, or, if a row has '
                             'two images, name both columns: --id "LEFT | RIGHT".')
        columns = self.grades.without_yes_or_no(columns)
        for column in columns: self.grades.refuse_one_of_several(column)
        others = [c for c in columns if OTHER_SCALE.search(c.casefold())]
        of_scale = [c for c in columns if SCALE_NAME.search(c.casefold())]
        is_clear = len(of_scale) == 1 and len(others) == len(columns) - 1
        chosen = self._choose('grade', of_scale if is_clear else columns, 'the grade')
        self.grades.refuse_yes_or_no([chosen])
        return chosen

    def _find_grade_of_sides(self, candidates: list[str]) -> None:
        "Find the grade of each image where a row holds two"
        found = []
        sides, grades = sides_of(self._columns('id')), sides_of(candidates)
        for image in self._columns('id'):
            mine = [c for c in candidates if grades[c] == sides[image]
                    and not any(o.search(c.casefold()) for o in (OTHER_GRADE, PREDICTION_NAME))]
            if not mine:
                raise TableError(f'{self.file}: no column has the grade of {image}. Name both columns: --grade '
                                 '"LEFT | RIGHT".')
            found.append(self._choose('grade', self.grades.without_yes_or_no(mine), f'the grade of {image}'))
        self.grades.refuse_yes_or_no(found)
        self._decide('grade', ' | '.join(found), 'one for each image of a row')

    def _compare_grades(self) -> None:
        "Refuse grades that another column or the folders of the images contradict; if they were `given`, say so"
        column, = self._columns('grade')
        others = [c for c in self._others('id', 'grade', 'patient') if self.grades.has_grades(c)]
        folders = {}
        rows = np.unique(np.linspace(0, len(self.df) - 1, MOST_LOCATED).astype(int))
        for i, name in self.df[self.keys['id']].iloc[rows].items():
            with suppress(LookupError): folders[i] = self.locator(name).parent.name
        in_folder, share = self.grades.other_folder(column, pd.Series(folders, dtype=str))
        for text, is_rare in ((self.grades.other_code(column, others), False), (in_folder, share < RARE)):
            if not text: continue
            if 'grade' in self.given or is_rare: self.reasons.append(f'grade: CHECK {column}: {text}')
            else: raise TableError(f'{self.file}: column {column} may not hold the grades: {text}. Correct it, or name '
                                   'the column that holds them: --grade COLUMN.')

    def _find_ungradable(self) -> None:
        columns = [self.df[name] for name in self._columns('grade')]
        texts = pd.concat(columns) if self.has_row_per_patient else pd.concat(columns, axis=1).agg(''.join, axis=1)
        values = sorted({t for t in texts.unique() if np.isnan(read_grade(t)) and UNGRADABLE.fullmatch(t.casefold())})
        if not values: return
        shown = ' | '.join(value or BLANK for value in values)
        counted = texts[texts.isin(values)].value_counts()
        each = ': ' + ', '.join(f'{value or BLANK} {counted[value]}' for value in values) if len(values) > 1 else ''
        rows = plural(counted.sum(), 'row')
        self._decide('ungradable', shown, f'{rows} without a grade{each}; to change: --ungradable')

    def _find_patient(self) -> None:
        named = [c for c in self._others('id', 'grade') if PATIENT_NAME.search(plain(c))]
        columns = [c for c in named if self.df[c].nunique() > 1 and not NO_PATIENT.search(plain(c))]
        columns = [c for c in columns if NUMBER_NAME.search(plain(c))] or columns
        by_eye = '' if self.has_row_per_patient else _patients_by_eye(self.df[self.keys['id']])
        if by_eye: columns = [c for c in columns if self.df[c].nunique() < len(self.df)]
        if columns:
            column = self._choose('patient', columns, 'the patient')
            n = self.df[column][~self.df[column].str.casefold().isin(UNKNOWN)].map(patient_key).nunique()
            noun = 'row' if self.has_row_per_patient else 'image'
            few = '; CHECK whether so few are right, else --patient COLUMN' if n * MOST_IMAGES < len(self.df) else ''
            text = f'by its name; {plural(n, "patient")} of {plural(len(self.df), noun)}{few}'
            self._decide('patient', column, text)
            return
        if self.has_row_per_patient: return self.reasons.append('patient: a row of the CSV')
        if by_eye:
            ids = self.df[self.keys['id']]
            self._decide('group', by_eye, f'every id ends in the eye: {first_few(ids[:2])}')
        else:
            why = _why_no_patients(self.df[self.keys['id']])
            maybe = [c for c in self._others('id', 'grade') if self._may_be_patients(c)]
            hint = f'; {" or ".join(maybe)} may be the patient: if so, --patient COLUMN' if maybe else ''
            self.reasons.append(f'patient: unknown (no column; {why}{hint})')

    def _may_be_patients(self, column: str) -> bool:
        "Return whether most values of a column are those of several rows, as numbers of patients are, but of few"
        rows = self.df[column][~self.df[column].str.casefold().isin(UNKNOWN)].value_counts()
        return len(rows) > MOST_VALUES and 2 <= rows.median() <= rows.max() <= MOST_IMAGES \
            and not NO_PATIENT.search(plain(column))

    def _find_eye(self) -> None:
        if self.has_row_per_patient: return
        columns = [c for c in self._others('id', 'grade', 'patient') if EYE_NAME.search(c.casefold())]
        found = {c: read_eyes(self.df[c].unique()) for c in columns}
        odd = {c: [o for o, eye in found[c].items() if not eye and o.casefold() not in UNKNOWN] for c in columns}
        good = [c for c in columns if not odd[c] and any(found[c].values())]
        if good: return self._decide('eye', good[0], 'by its name and values')
        named = [c for c in columns if 0 < len(odd[c]) and self.df[c].nunique() <= MOST_VALUES]
        for c in named: self.reasons.append(f'eye: not {c}, which has {not_eyes(odd[c])}')
        words = _last_words(self.df[self.keys['id']])
        if words: self._decide('eye', EYE_PATTERN.format(words), 'every id ends in the eye')

    def _find_carried(self) -> None:
        "Carry further columns of few values: subgroups of the report. Others may name people, and stay where they are"
        others = self._others('id', 'grade', 'patient', 'eye')
        patients = self.df[self.keys['patient']].nunique() if self.keys.get('patient') else len(self.df) // 3
        most = min(MOST_VALUES, max(patients, 4) // 2)       # with more, a column tells patients apart
        names = [c for c in others if 1 < self.df[c].nunique() <= most and c not in COLUMNS_OF_SCORES
                 and not PREDICTION_NAME.search(c.casefold())]
        people = [c for c in names if PERSONAL.search(plain(c))]
        if people: self.reasons.append(f'not carried: {", ".join(people)} (may name people; to carry columns all the '
                                       'same: --set "table.train.carry=COLUMN | COLUMN")')
        names = [c for c in names if c not in people]
        ages = [c for c in others if c.casefold() == 'age' and c not in names]
        made = [c for c in names if self.grades.give(self._columns('grade'), c)]
        if made: self.reasons.append(f'not carried: {", ".join(made)} (goes with the grade: one value for each)')
        names = [c for c in names if c not in made]
        if names or ages: self._decide('carry', ' | '.join(names + ages), 'few values each: subgroups of the reports')
        for c in names:
            if PART_NAME.search(c.casefold()) and not self.keys.get('where', '').startswith(c):
                values = first_few(sorted(self.df[c].unique()))
                self.reasons.append(f'all rows are used, whatever their {c} ({values}); to use some alone: --set '
                                    f'"table.train.where={c} = VALUE"')


def plain(column: str) -> str:
    "Return the name of a column in lower case, with accents as one letter and 'GraderID' as 'grader_id'"
    parts = re.sub(r'(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])', '_', unicodedata.normalize('NFC', column))
    return parts.casefold()


def image_shares(df: pd.DataFrame, has_image: Callable[[str], bool]) -> dict[str, float]:
    "Return which share of a sample of its values names images, for each column of mostly different values"
    rows = df.iloc[np.linspace(0, len(df) - 1, min(SAMPLE, len(df))).astype(int)]
    unlike = [column for column in df if rows[column].nunique() > len(rows) / 2]
    return {column: float(np.mean([has_image(o) for o in rows[column] if o])) for column in unlike}


def id_rank(column: str) -> int:
    "Return the place of a column's name among those of ids; names that say nothing come last"
    return ID_NAMES.index(column.casefold()) if column.casefold() in ID_NAMES else len(ID_NAMES)


def sides_of(columns: Iterable[str]) -> dict[str, str]:
    """Return left or right for each column whose name says so, else an empty text.

    Ambiguous words, as s and d, count only at the end of a name, and beside a column that ends in the fellow.
    """
    words = {column: re.findall(r'[a-z]+', re.sub(r"(?<=[a-z])(?=[A-Z])|\b[dlDL]['’]", '_', column).casefold())
             for column in columns}
    ends = {found[-1] for found in words.values() if found}
    paired = {word for pair in EYE_PAIRS if {*pair} <= ends for word in pair}
    said = {column: [word for word in found if word in EYES_OF_NAMES] or [word for word in found[-1:] if word in paired]
            for column, found in words.items()}
    return {column: EYES[found[0]] if found else '' for column, found in said.items()}


def _are_sides(a: str, b: str) -> bool: return {*sides_of([a, b]).values()} == {'left', 'right'}


def _last_words(ids: pd.Series) -> str:
    """Return the words for eyes in which every id ends, 'left|right'; empty if one ends in none.

    Both eyes must occur; ambiguous words, as s and d, must be a pair and the only two.
    """
    found = set(_ends(ids))
    is_pair = any(found == {*pair} for pair in EYE_PAIRS)
    are_words = found <= EYES_OF_NAMES and {EYES[word] for word in found} == {'left', 'right'}
    return '|'.join(word for word in EYES if word in found) if is_pair or are_words else ''


def _ends(ids: pd.Series) -> pd.Series:
    "Return the word for an eye in which each id ends, in lower case; NaN if it ends in none"
    return ids.str.extract(EYE_PATTERN.format('|'.join(EYES)))[0].str.casefold()


def _why_no_patients(ids: pd.Series) -> str:
    "Return why `_patients_by_eye` finds none: which ids, or which words, are odd"
    if _last_words(ids): return 'the ids end in the eye, but no two are of one patient'
    ends = _ends(ids)
    odd = ids[ends.isna()]
    if len(odd) > (1 - MOSTLY) * len(ids): return 'no eye at the end of the ids'
    if len(odd): return f'{len(odd)} of {len(ids)} ids {"does" if len(odd) == 1 else "do"} not end in the eye: ' \
                        f'{first_few(odd)}'
    return f'the ids end in {first_few(sorted(set(ends)))}, which are not known to be the two eyes'


def _patients_by_eye(ids: pd.Series) -> str:
    "Return the pattern of patients if ids end in an eye and show which images are of one patient, else an empty text"
    words = _last_words(ids)
    pattern = PATIENT_PATTERN.format(words)
    return pattern if words and ids.str.extract(pattern)[0].nunique() < len(ids) else ''
