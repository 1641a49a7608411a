"Read a CSV, or folders named by grade, and the images into one checked frame per table."
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from aptos_fastai.common.console import plural, say
from aptos_fastai.data.dicom import TAGGED, with_tags
from aptos_fastai.data.grade_columns import GradeColumns
from aptos_fastai.data.grades import grade_texts, is_ungradable, read_grade, read_grades
from aptos_fastai.data.groups import ROW, eye_note, eyes, find_groups, patients_text, shared_patients
from aptos_fastai.data.locate import NO_IMAGE, ImageLocator, files_below, is_image, without_suffix
from aptos_fastai.data.relabels import apply_relabels
from aptos_fastai.data.spreadsheet import (
    SPREADSHEETS,
    TableError,
    collected,
    count,
    first_few,
    raise_all,
    read_spreadsheet,
    require_column,
)
from aptos_fastai.metrics import GRADES
from aptos_fastai.recipe.graph import Recipe
from aptos_fastai.recipe.sections import Table
from aptos_fastai.recipe.smaller import without_tables

PATIENT_OF_EYE = 'patient_of_eye'            # column: the group as read; that of duplicates becomes one for all of them
MISSING_IMAGES = 'missing_images.csv'        # ids without an image that were left out, where results are written
ARCHIVE = re.compile(r'\.(zip|7z|rar|tar|tgz|gz|bz2|xz|zst)(\.\d+)?$')
SHOWN_PROBLEMS = 3                           # of ids that cannot be matched with one image
RENAME = 'Rename one, or set the column name in the recipe; header = no if the first row is no header.'


@dataclass
class TableContents:
    "A table as it was understood: its frame, and notes for a person to check"
    frame: pd.DataFrame
    notes: list[str] = field(default_factory=list)
    ungradable: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=['id_code', 'path']))
    missing: list[str] = field(default_factory=list)         # ids without an image, which were left out


def find_folder(table: Table, data: Path) -> Path:
    "Return the first of the table's folders under `data` that has its CSV, or its images. Raises `TableError`"
    tried, wanted = [data / f for f in table.folders], table.csv or table.images
    for folder in tried:
        if (folder / wanted).is_file() if table.csv else (folder / wanted).is_dir(): return folder
    content = ' or '.join(folder for folder in table.folders if folder != '.') or wanted
    below = [f'--data {folder}' for folder in folders_below(table, data)]
    advice = (f'Use {" or ".join(below)}.' if below else
              f'Set --data to the folder that contains {content}, or use --data demo for synthetic images.')
    raise TableError(f'[table.{table.name}]: {wanted} not found in {" or ".join(map(str, tried))}. {advice}'
                     f'{archives_text(data)}')


def folders_below(table: Table, data: Path) -> list[Path]:
    "Return the folders up to two levels below `data` in which a table has its CSV and its images"
    below = [folder for pattern in ('*', '*/*') for folder in sorted(data.glob(pattern)) if folder.is_dir()]
    return [folder for folder in below if (folder / table.csv).is_file() and table.csv
            and (folder / table.images).is_dir()]


def only_folder(table: Table, data: Path) -> Path:
    """Return `data`, or the only folder up to two levels below it that has the CSV and the images of a table.

    Raises `TableError` where there are several, and names the tables that are there where there is none.
    """
    if not data.is_dir() or any((data / folder / table.csv).is_file() for folder in table.folders): return data
    found = folders_below(table, data)
    if len(found) == 1: return found[0]
    if found:
        raise TableError(f'{data}: {table.csv} and {table.images} are in {count(found, "folder")}: {first_few(found)}. '
                         f'Choose one: --data {found[0]}.')
    files = [file for pattern in ('*', '*/*', '*/*/*') for file in sorted(data.glob(pattern))]
    tables = [file.relative_to(data) for file in files if file.suffix.lower() in ('.csv', '.txt', *SPREADSHEETS)]
    raise TableError(f'{data}: no {table.csv} with {table.images} in this folder or two levels below. Tables there: '
                     f'{first_few(tables) or "none"}. For one of another name: fit CSV IMAGES --hours H.'
                     f'{archives_text(data)}')


def archives_text(data: Path) -> str:
    "Return ' Archives there, to unpack first: a.zip, b/train.zip.001.', or '' if a folder has none"
    files = [file for pattern in ('*', '*/*') for file in sorted(data.glob(pattern)) if file.is_file()]
    found = [file.relative_to(data) for file in files if ARCHIVE.search(file.name.lower())]
    return f' Archives there, to unpack first: {first_few(found)}.' if found else ''


def with_present_tables(recipe: Recipe, data: Path) -> tuple[Recipe, str]:
    "Return the recipe without its optional tables of which `data` has neither CSV nor images; and a text that says so"
    missing = [t for t in recipe.used_tables if t.optional == 'yes' and not _is_there(t, data)]
    if not missing: return recipe, ''
    smaller = without_tables(recipe, [t.name for t in missing])
    what = ', '.join(f'{t.csv} and {t.images}' if t.csv else t.images for t in missing)
    lost = [name for name in recipe.order if name not in smaller.nodes]
    without = f', without {", ".join(lost)}' if lost else ''
    return smaller, (f'{", ".join(t.name for t in missing)}: {what} not found in {data}; the recipe runs without this '
                     f'table{without}. The model is {smaller.submit.final}.')


def _is_there(table: Table, data: Path) -> bool:
    "Return whether the CSV or the images of a table are there; `images` = . proves nothing"
    names = {name.casefold() for name in (table.csv, table.images) if name not in ('', '.')}
    there = {path.name.casefold() for folder in table.folders if (data / folder).is_dir()
             for path in (data / folder).iterdir()}
    return bool(names & there) or any((data / folder / name).exists() for folder in table.folders
                                      for name in (table.csv, table.images) if name not in ('', '.'))


def read_table(table: Table, data: Path) -> pd.DataFrame:
    """Read `table` under the folder `data`, one row per image.

    Columns: id_code, diagnosis (float32; NaN if the table is ungraded), path, group, source, eye (if the table has it),
    those of `carry` and, if the table has patients and eyes, `PATIENT_OF_EYE`. Raises `TableError` for a missing file,
    folder or column, no rows, invalid grades, duplicate ids, missing images.
    """
    return table_contents(table, data).frame


def table_contents(table: Table, data: Path, skip_missing: bool = False) -> TableContents:
    """Read `table` as `read_table` does; return its frame and what a person should check.

    With `skip_missing` rows without an image are left out, if not all are. One `TableError` names all that is wrong
    with ids, images, grades, patients and eyes.
    """
    if not data.is_dir():
        raise TableError(f'{data}: data folder not found. Check --data, or use --data demo for synthetic images.')
    folder = find_folder(table, data)
    images = folder / table.images
    notes: list[str] = []
    if not images.is_dir():
        raise TableError(f'{images}: image folder not found. Put the images there, or change the key `images`.')
    locator = ImageLocator(images, loose=True, within=images.resolve().parent)
    csv, df = _rows(folder, table, notes)
    n, lost, faults = len(df), list[str](), list[TableError]()
    if table.graded:
        texts = grade_texts(csv, df, table)
        ungradable = is_ungradable(texts, table)
        not_graded, lost = _ungradable_images(csv, df[table.id][ungradable], n, table, locator, notes, faults)
        df, texts = (o[~ungradable].reset_index(drop=True) for o in (df, texts))
    ids = df[table.id].rename(table.id)
    paths, absent = _match_images(csv, df, ids, n, locator, skip_missing, faults)
    lost += ids[absent].tolist()
    if lost:
        notes.append(f'{len(lost)} of {n} ids have no image and are left out: {first_few(lost)}')
        df, ids = (o[~absent].reset_index(drop=True) for o in (df, ids))
        if table.graded: texts = texts[~absent].reset_index(drop=True)
        paths = [path for path, is_absent in zip(paths, absent, strict=True) if not is_absent]
    frame, notes_of_patients = _frame(csv, df, texts if table.graded else None, paths, table, faults)
    notes += [*notes_of_patients, *_image_notes(locator, n, table)]
    if not table.graded and table.csv: notes += _unused_grades(csv, df, table)
    if not table.graded: return TableContents(frame, notes, missing=lost)
    if table.relabels:
        frame, ungradable_now, note = apply_relabels(frame, table, folder)
        not_graded = pd.concat([not_graded, ungradable_now[['id_code', 'path']]], ignore_index=True)
        notes.append(note)
    missing = sorted(set(range(GRADES)) - set(frame.diagnosis))
    if missing:
        notes.append(f'no image has grade {", ".join(map(str, missing))}: these images can neither teach nor test it')
    return TableContents(frame, notes, not_graded, lost)


def _frame(csv: Path, df: pd.DataFrame, texts: pd.Series | None, paths: list[str], table: Table,
           faults: list[TableError]) -> tuple[pd.DataFrame, list[str]]:
    """Return the frame of a table's rows with the `texts` of their grades, and notes of patients and eyes.

    Raises `TableError` for `faults` and for what is wrong with grades, patients and eyes.
    """
    ids = df[table.id].rename(table.id)
    frame = pd.DataFrame(dict(id_code=ids, diagnosis=np.full(len(df), np.nan, np.float32), path=paths))
    if texts is not None:
        with collected(faults): frame['diagnosis'] = read_grades(csv, texts, _names(df, ids), table)
    if not (faults and TAGGED & {table.patient, table.eye}):                # tags of images that are not there
        df = with_tags(df, paths, [table.patient, table.eye, *table.carry_columns])
        with collected(faults): frame['group'], notes = find_groups(csv, df, ids, table)
        if table.eye:
            with collected(faults): sides = eyes(csv, df, ids, table)
    raise_all(csv, faults)
    frame['source'] = table.name
    for column in table.carry_columns: frame[column] = df[column]
    if table.eye:
        frame['eye'] = sides
        notes += filter(None, [eye_note(ids, sides, frame.group)])
    if table.names_eyes: frame[PATIENT_OF_EYE] = frame.group
    return frame, notes


def describe(table: Table, contents: TableContents) -> str:
    "Return what a table holds: '413 images, 120 patients, eyes left 60 right 60, images of grade 0-4: 9 8 7 6 5'"
    df = contents.frame
    parts = [count(df, 'image'), patients_text(df, table)]
    eyes_seen = df.eye.replace('', 'unknown').value_counts() if table.eye else {}
    if len(eyes_seen): parts.append('eyes ' + ' '.join(f'{name} {n}' for name, n in eyes_seen.items()))
    if table.graded:
        parts.append('images of grade 0-4: ' + ' '.join(str(int((df.diagnosis == g).sum())) for g in range(GRADES)))
    if len(contents.ungradable): parts.append(f'{len(contents.ungradable)} ungradable')
    return ', '.join(parts)


def read_tables(recipe: Recipe, data: Path) -> dict[str, pd.DataFrame]:
    "Read every table that the recipe uses; returns name -> frame."
    return {name: contents.frame for name, contents in read_contents(recipe, data).items()}


def read_contents(recipe: Recipe, data: Path) -> dict[str, TableContents]:
    "Read every table that the recipe uses, with the notes of each"
    skip = recipe.images.skip_unreadable == 'yes'
    found = {t.name: table_contents(t, Path(data), skip) for t in recipe.used_tables}
    for name, note in shared_patients(recipe.used_tables, {o: contents.frame for o, contents in found.items()}):
        found[name].notes.append(note)
    return found


# Rows

def _rows(folder: Path, table: Table, notes: list[str]) -> tuple[Path, pd.DataFrame]:
    "Return the CSV of a table and its rows; without a CSV, its folder of images and a row for each of them; add notes"
    if table.csv: return folder / table.csv, _read_rows(folder / table.csv, table, notes)
    images = folder / table.images
    return images, _class_folders(images, table) if table.graded else _folder_rows(images, table)


def _read_rows(csv: Path, table: Table, notes: list[str]) -> pd.DataFrame:
    "Return the rows of a table's CSV that `where` chooses. Raises `TableError` if it lacks a column of the recipe"
    df = read_spreadsheet(csv, header=table.header == 'yes', sheet=table.sheet, notes=notes)
    needed = [*table.id_columns, *table.grade_columns, *table.carry_columns, *filter(None, [table.patient])]
    faults: list[TableError] = []
    for column in needed:
        with collected(faults):
            if column not in TAGGED: require_column(csv, df, column, RENAME)
    raise_all(csv, faults)
    if not len(df): raise TableError(f'{csv}: no rows. Write one row per image.')
    if table.where:
        column, value = table.where_column_and_value
        require_column(csv, df, column, 'Change the key `where`.')
        values, df = sorted(set(df[column])), df[df[column] == value]
        if not len(df): raise TableError(f'{csv}: no row has {column} = {value}. Its values are {first_few(values)}.')
    df = df.assign(**{ROW: 'row ' + df.index.astype(str)})
    return df.reset_index(drop=True) if len(table.id_columns) == 1 else _a_row_per_image(df, table)


def _a_row_per_image(df: pd.DataFrame, table: Table) -> pd.DataFrame:
    "Return a row for each image of rows that hold several; the columns of ids and of grades become one each"
    grades = table.grade_columns or (None,) * len(table.id_columns)
    rest = df.drop(columns=[*table.id_columns, *table.grade_columns])
    parts = [rest.assign(**{table.id: df[image]}, **({table.grade: df[grade]} if grade else {}))
             for image, grade in zip(table.id_columns, grades, strict=True)]
    rows = pd.concat(parts)
    return rows[rows[table.id] != ''].reset_index(drop=True)


def _folder_rows(images: Path, table: Table) -> pd.DataFrame:
    "Return a row for each image in a folder and its sub-folders"
    rows = [file.relative_to(images).as_posix() for file in files_below(images) if is_image(file)]
    if rows:
        folders = {row.partition('/')[0] for row in rows if '/' in row}
        if folders and all(is_class_folder(name, table) for name in folders):
            say(f'{table.name}: images lie in folders named by grade. To use these grades: grade = folder.', 'yellow')
        bare = [without_suffix(row) for row in rows]
        return pd.DataFrame({table.id: bare if len(set(bare)) == len(rows) else rows})
    raise TableError(f'[table.{table.name}]: {images} has no images. Set `images` to the folder of images.')


def _class_folders(images: Path, table: Table) -> pd.DataFrame:
    "Return a row for each image in sub-folders that are named by grade (0 to 4, or its name) or as `ungradable`"
    folders = [f for f in sorted(images.iterdir()) if f.is_dir() and is_class_folder(f.name, table)]
    rows = [[file.relative_to(images).as_posix(), folder.name]
            for folder in folders for file in files_below(folder) if is_image(file)]
    if rows: return pd.DataFrame(rows, columns=[table.id, table.grade_columns[0]])
    raise TableError(f'[table.{table.name}]: grade = folder, but {images} has no images in folders named 0 to 4 or by '
                     'the names of grades. Set csv and grade, or sort the images into such folders.')


def is_class_folder(name: str, table: Table) -> bool:
    "Return whether a folder's name is a grade, or a value that means ungradable"
    return bool(np.isfinite(read_grade(name)) or is_ungradable(pd.Series([name]), table)[0])


def _ungradable_images(csv: Path, ids: pd.Series, n: int, table: Table, locator: ImageLocator, notes: list[str],
                       faults: list[TableError]) -> tuple[pd.DataFrame, list[str]]:
    """Return id_code and path of the images, of `n`, that are ungradable by their graders; note their number.

    Beside them the ids of those that have no image. Appends ids that fit several images to `faults`.
    """
    if len(ids):
        notes.append(f'{len(ids)} of {plural(n, "image")} left out: ungradable by their graders (ungradable = '
                     f'{table.ungradable})')
    if len(ids) == n: raise TableError(f'[table.{table.name}]: all {n} images are ungradable.')
    rows, missing, unclear = [], [], []
    for name in ids:
        try: rows.append([name, str(locator(name))])
        except LookupError as e:
            if name and str(e).startswith(NO_IMAGE): missing.append(name)
            elif name: unclear.append(f'{name}: {e}')
    if unclear: faults.append(TableError(_unclear_images(csv, n, unclear)))
    return pd.DataFrame(rows, columns=['id_code', 'path']), missing


# Images

def _match_images(csv: Path, df: pd.DataFrame, ids: pd.Series, n: int, locator: ImageLocator, skip_missing: bool,
                  faults: list[TableError]) -> tuple[list[str], np.ndarray]:
    """Return the image path of each id, of a table of `n`, and which are left out because they have none.

    An id is a file name or path, with or without its suffix. Appends to `faults` rows without an id, duplicate ids, ids
    that fit several images, and ids without an image, unless `skip_missing` and another id has one.
    """
    paths, problems = [], {}
    for name in ids:
        try: paths.append(str(locator(name)))
        except LookupError as e:
            paths.append(name)
            if name: problems[name] = str(e)
    filled, twice = ids != '', ids.duplicated()
    same_file = pd.Series(paths, index=ids.index).duplicated()
    missing = [name for name, problem in problems.items() if problem.startswith(NO_IMAGE)]
    unclear = [f'{name}: {problem}' for name, problem in problems.items() if name not in missing]
    skips = skip_missing and len(set(ids[filled])) > len(missing)
    if not filled.all(): faults.append(TableError(_empty_ids(csv, ids.name, _names(df, ids)[~filled])))
    with collected(faults):
        _refuse_repeated(csv, ids[twice & filled], 'duplicate value', f'in column {ids.name}')
    with collected(faults):
        of_another = f'in column {ids.name} of an image that another row names'
        _refuse_repeated(csv, ids[same_file & filled & ~twice], 'id', of_another)
    if unclear: faults.append(TableError(_unclear_images(csv, n, unclear)))
    if missing and not skips: faults.append(TableError(_missing_images(csv, n, missing, locator.root)))
    return paths, ids.isin(missing if skips and not faults else []).to_numpy()


def _names(df: pd.DataFrame, ids: pd.Series) -> pd.Series:
    "Return how messages name each row: by its id, or 'row 3' of the CSV"
    return ids.where(ids != '', df[ROW]) if ROW in df else ids


def _empty_ids(csv: Path, column: str, rows: pd.Series) -> str:
    "Return the message for rows without an id"
    return (f'{csv}: {count(rows, "row")} without an id in column {column}: {first_few(rows)}. Write the names of '
            'their images, or remove these rows.')


def _refuse_repeated(csv: Path, repeated: pd.Series, noun: str, where: str) -> None:
    ids = repeated.unique()
    if not len(ids): return
    raise TableError(f'{csv}: {count(ids, noun)} {where}: {first_few(ids)}. Keep one row per image.')


def _image_notes(locator: ImageLocator, n: int, table: Table) -> list[str]:
    "Return notes of ids that were matched loosely and of images that no row names, with their folders"
    notes = []
    if locator.loosely:
        notes.append(f'{locator.loosely} of {n} ids differ from their file in folder, suffix, case or accents')
    unused = Counter(file.rpartition('/')[0] or '.' for file in locator.unused())
    if unused and not table.where:
        folders = f' (folders {first_few(unused)})' if set(unused) != {'.'} else ''
        notes.append(f'{plural(unused.total(), "image")} in {locator.root} without a row{folders}')
    return notes


def _unused_grades(csv: Path, df: pd.DataFrame, table: Table) -> list[str]:
    "Return a note if an ungraded table has a column of grades"
    columns = [c for c in df if c not in (table.id, ROW, *table.carry_columns)]
    found = GradeColumns(csv, df).named_as_grades(columns)
    return [f'its grades (column {", ".join(found)}) are not used: the recipe takes this table as ungraded. To measure '
            f'a model on them: evaluate MODEL {csv}'] if found else []


def _missing_images(csv: Path, n: int, missing: list[str], root: Path) -> str:
    "Return the message for ids that name no image"
    return (f'{csv}: {len(missing)} of {n} ids have no image in {root}: {first_few(missing)}. '
            'Add the images or remove these rows. To leave them out: [images] skip_unreadable = yes (--set '
            'images.skip_unreadable=yes); for evaluate and operating_point --skip-missing.')


def _unclear_images(csv: Path, n: int, problems: list[str]) -> str:
    "Return the message for ids that name several images, or one that may not be used"
    more = '; …' if len(problems) > SHOWN_PROBLEMS else ''
    shown = '; '.join(problems[:SHOWN_PROBLEMS])
    return f'{csv}: {len(problems)} of {n} ids cannot be matched with one image: {shown}{more}.'


# The order of a submission

def read_order(table: Table, data: Path) -> list[str]:
    """Return the ids of the submission in order: those of the table's `order` CSV, or the table's own if there is none.

    Raises `TableError` if the two lists contain different ids.
    """
    folder = find_folder(table, data)
    own = _rows(folder, table, [])[1][table.id].tolist()
    csv = folder / table.order
    if not csv.is_file(): return own         # nor is the folder itself, where there is no `order`
    df = read_spreadsheet(csv)
    require_column(csv, df, 'id_code', RENAME)
    _refuse_repeated(csv, df.id_code[df.id_code.duplicated()], 'duplicate value', 'in column id_code')
    ids = df.id_code.tolist()
    differing = sorted(set(ids) ^ set(own))
    if differing:
        raise TableError(f'{csv}: {count(differing, "id")} in only one of this file and {table.csv}: '
                         f'{first_few(differing)}. List the same images in both.')
    return ids
