"""Leave out who the images show: numbers instead of ids, file names, patients and hashes.

The order of rows is kept: row N is image N of the input, so that only who has the input can tell whose row it is.
"""
from dataclasses import replace
from typing import TYPE_CHECKING

import pandas as pd

from aptos_fastai.inference.subgroups import TOO_MANY, UNKNOWN

if TYPE_CHECKING:                            # the modules that these are of import PyTorch
    from aptos_fastai.inference.evaluate import Evaluation

ERROR = 'cannot be found or read'            # instead of an error's text, which can name files
ID_RANGE = 'id range'                        # kind of clusters that are named by ids
NAMED = 'table', 'camera', 'visual cluster'  # kinds whose names say nothing of people; others are columns of a table
NOTE = ('De-identified: rows are numbered in the order of the table; ids, patients, hashes and carried columns are '
        'left out; subgroups are numbered')
HASHES = 'image_sha256', 'pixel_sha256'      # whoever has an image finds it by its hash


def pseudonyms(keys: pd.Series, letter: str) -> pd.Series:
    "Return P001, P002, … for patients (`letter` P) in the order of their first image; '' stays empty"
    names = {key: f'{letter}{i:03}' for i, key in enumerate(keys[keys != ''].drop_duplicates(), 1)}
    return keys.map(names | {'': ''})


def without_names(df: pd.DataFrame, id_column: str) -> pd.DataFrame:
    "Return rows with their number in `id_column`, no hashes, and errors that name no file; all texts"
    numbers = pd.Series(range(1, len(df) + 1), df.index).astype(str)
    changed = dict.fromkeys((name for name in HASHES if name in df), '')
    return df.assign(**{id_column: numbers}, **changed, error=df.error.where(df.error == '', ERROR))


def without_people(evaluation: 'Evaluation') -> 'Evaluation':
    """Return an evaluation without ids, patients and hashes of images, and without the columns that its table carries.

    Ids become numbers behind a hash of the table's place, so that `compare` matches images of the same table only.
    Values of subgroups are numbered: 'site 1', 'site 2', …; 'unknown' stays.
    """
    from aptos_fastai.inference.evaluate import COLUMNS
    rows = without_names(evaluation.predictions[COLUMNS], 'id_code')
    rows = rows.assign(id_code=evaluation.record['table']['place'][:6] + '-' + rows.id_code,
                       group=pseudonyms(rows.group, 'G'))
    record = record_without_people(evaluation.record)
    return replace(evaluation, record=record, predictions=rows, reasons=[], missing=[])


def record_without_people(record: dict) -> dict:
    "Return the record of an evaluation without file names, and with numbered subgroups: see `without_people`"
    from aptos_fastai.inference.evaluate import subgroup_warning
    if record.get('notes') == [NOTE]: return record
    before = record['subgroups']
    after = [dict(o, values=_numbered(o['values'], o['column'])) for o in before]
    texts = {subgroup_warning(old['column'], a): subgroup_warning(old['column'], b)
             for old, new in zip(before, after, strict=True)
             for a, b in zip(old['values'], new['values'], strict=True)}
    warnings = [texts.get(text, text) for text in record['warnings']]
    return dict(record, unreadable=[], notes=[NOTE], subgroups=after, warnings=warnings)


def without_ids(summary: dict) -> dict:
    "Return a run's summary without the ids of images: ranges of ids are numbered, the largest errors have none"
    clusters = [dict(o, clusters=_numbered(o['clusters'], 'range')) if o['kind'] == ID_RANGE else o
                for o in summary['clusters']]
    errors = [dict(o, id_code='') for o in summary.get('largest_errors', [])]
    return dict(summary, clusters=clusters, largest_errors=errors)


def without_values(summary: dict) -> dict:
    "Return `without_ids` of a run's summary in which values of the columns that tables carry are numbered: 'site 1'"
    summary = without_ids(summary)
    carried = {column for o in summary['tables'] for column in o['carried']}
    of_columns = [o for o in summary['clusters'] if o['kind'] in carried or o['kind'] not in (*NAMED, ID_RANGE)]
    found = {o['kind']: [c['name'] for c in o['clusters']] for o in of_columns}
    for column, counts in (item for o in summary['tables'] for item in o['carried'].items()):
        found[column] = list(dict.fromkeys([*found.get(column, []), *counts]))
    new = {column: {name: name if name in (UNKNOWN, TOO_MANY) else f'{column} {i}' for i, name in enumerate(names, 1)}
           for column, names in found.items()}
    clusters = [o if o not in of_columns else dict(o, clusters=[
        dict(c, name=new[o['kind']][c['name']]) for c in o['clusters']]) for o in summary['clusters']]
    tables = [dict(o, carried={column: {new[column][name]: n for name, n in counts.items()}
                               for column, counts in o['carried'].items()}) for o in summary['tables']]
    return dict(summary, clusters=clusters, tables=tables)


def _numbered(groups: list[dict], noun: str) -> list[dict]:
    "Return groups of images called 'range 1', 'range 2', … (`noun` range)"
    return [o if o['name'] == UNKNOWN else dict(o, name=f'{noun} {i}') for i, o in enumerate(groups, 1)]
