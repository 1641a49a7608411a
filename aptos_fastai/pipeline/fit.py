"Write the recipe that `fit` trains by: recipes/one_table.ini with the tables as they were understood."
from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path

from aptos_fastai.common.io import AptosError, write_bytes
from aptos_fastai.data.understand import Ask, Understood, relative, understand_table
from aptos_fastai.pipeline.graph import check_same_data
from aptos_fastai.recipe import Table, override, read_ini, read_recipe, shipped_folder

BASE = 'recipes/one_table.ini'
GRADED, UNGRADED = 'train', 'test'           # tables of `BASE`


def understand_tables(csv: str | Path, images: str | Path, unlabelled: str | Path, ask: Ask | None,
                      keys: dict[str, str]) -> dict[str, Understood]:
    "Return the graded table of a CSV and its images, and the ungraded one of a CSV or folder `unlabelled`, if given"
    tables = {GRADED: understand_table(csv, images, name=GRADED, graded=True, ask=ask, **keys)}
    if str(unlabelled) and Path(unlabelled).resolve() == Path(images or csv).resolve():
        raise AptosError(f'{unlabelled}: is the folder of the graded images. Name a folder of other images, or none.')
    if str(unlabelled): tables[UNGRADED] = understand_table(unlabelled, name=UNGRADED, graded=False, ask=ask)
    return tables


def write_fit_recipe(tables: dict[str, Understood], file: Path, sets: Iterable[str]) -> Path:
    """Write the recipe of the tables to `file`, with a reason beside each key that was chosen; return its data folder.

    `sets` are SECTION.KEY=VALUE. Raises `AptosError`, before anything is written.
    """
    data = tables[GRADED].data
    base = shipped_folder() / BASE
    ini = read_ini(base)
    for text in sets: override(ini, text)
    ini[f'table.{GRADED}'] = table_keys(tables[GRADED], data)
    if UNGRADED in tables: ini[f'table.{UNGRADED}'] = table_keys(tables[UNGRADED], data)
    else: _leave_out_ungraded(ini, base)
    lines = [f'# Written by fit from {BASE}. Change it and run it: run.py all --recipe {file.name} --data FOLDER']
    for name, understood in tables.items(): lines += [f'# {name}: {reason}' for reason in understood.reasons]
    for section, keys in ini.items(): lines += ['', f'[{section}]', *(f'{k} = {v}' for k, v in keys.items())]
    text = '\n'.join(lines) + '\n'
    _check(text, file)
    if file.is_file() and _keys(file.read_text(encoding='utf-8')) != _keys(text):
        raise AptosError(f'{file.parent}: an earlier fit wrote another recipe here. Choose another --name, or delete '
                         'this folder.')
    check_same_data(file.parent, data, demo=False)
    write_bytes(file, text.encode())
    return data


def table_keys(understood: Understood, data: Path) -> dict[str, str]:
    "Return the keys of [table.NAME] that are no defaults, with paths from the folder `data`"
    table = understood.table
    keys = {f.name: str(getattr(table, f.name)) for f in fields(Table)
            if f.default is not MISSING and getattr(table, f.name) != f.default}
    if understood.data != data: keys['folder'] = relative(understood.data, data)
    return keys


def _leave_out_ungraded(ini: dict[str, dict[str, str]], base: Path) -> None:
    "Remove the ungraded table and the stages that need it"
    recipe = read_recipe(base).without([UNGRADED])
    kept = {*(f'table.{n}' for n in recipe.tables), *(f'stage.{n}' for n in recipe.stages),
            *(f'ensemble.{n}' for n in recipe.ensembles)}
    for section in list(ini):
        if '.' in section and section not in kept: del ini[section]
    submit = recipe.submit
    ini['submit'] |= dict(table=submit.table, final=submit.final, also=' '.join(submit.also))


def _keys(text: str) -> list[str]: return [line for line in text.splitlines() if not line.startswith('#')]


def _check(text: str, file: Path) -> None:
    "Raise `AptosError` if a recipe of this text cannot run; its message names the later file"
    temporary = file.with_name(f'.{file.name}')
    write_bytes(temporary, text.encode())
    try: read_recipe(temporary)
    except AptosError as e: raise AptosError(str(e).replace(str(temporary), str(file))) from None
    finally: temporary.unlink()
