"Write the recipe that `fit` trains by, or `configure`: recipes/one_table.ini with tables and settings as understood."
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path

from aptos_fastai.common.console import say
from aptos_fastai.common.io import AptosError, check_output_file, write_bytes
from aptos_fastai.common.program import COMMAND
from aptos_fastai.data.tables import only_folder, with_present_tables
from aptos_fastai.data.understand import PRESET_KEYS, Ask, Understood, relative, understand_table
from aptos_fastai.pipeline.configure import configure, configured_hours, unused_sets
from aptos_fastai.pipeline.deadline import Deadline
from aptos_fastai.pipeline.graph import check_same_data
from aptos_fastai.pipeline.run_recipe import commented_text, keep_sections, parsed, section_and_key, sets_applied
from aptos_fastai.recipe.files import read_ini, shipped_folder
from aptos_fastai.recipe.read import read_recipe
from aptos_fastai.recipe.sections import Ini, Table
from aptos_fastai.recipe.smaller import without_tables

BASE = 'recipes/one_table.ini'
GRADED, UNGRADED = 'train', 'test'           # tables of `BASE`
KEYS_OF_TABLE = (*PRESET_KEYS, 'header')     # that --set may give; the others follow from the arguments of `fit`


def understand_tables(csv: str | Path, images: str | Path, unlabelled: str | Path, ask: Ask | None,
                      keys: dict[str, str], sets: Iterable[str] = ()) -> dict[str, Understood]:
    "Return the graded table of a CSV and its images, and the ungraded one of a CSV or folder `unlabelled`, if given"
    own = sets_applied({}, sets)
    skip = own.get('images', {}).get('skip_unreadable') == 'yes'
    keys = {key: value for key, value in own.get(f'table.{GRADED}', {}).items() if key in KEYS_OF_TABLE} | keys
    tables = {GRADED: understand_table(csv, images, name=GRADED, graded=True, ask=ask, skip_missing=skip, **keys)}
    if str(unlabelled) and Path(unlabelled).resolve() == Path(images or csv).resolve():
        raise AptosError(f'{unlabelled}: is the folder of the graded images. Name a folder of other images, or none.')
    if str(unlabelled):
        tables[UNGRADED] = understand_table(unlabelled, name=UNGRADED, graded=False, ask=ask, skip_missing=skip)
    return tables


def write_fit_recipe(tables: dict[str, Understood], file: Path, sets: Iterable[str],
                     deadline: Deadline | None = None) -> Path:
    """Write the recipe of the tables to `file`, with a reason beside each key that was chosen; return its data folder.

    `sets` are SECTION.KEY=VALUE. With a `deadline` its settings are chosen for the time that is left; one that was
    chosen for as many hours stays. Another recipe is replaced if nothing was trained by it; else `AptosError` is
    raised, before anything is written.
    """
    data, sets = tables[GRADED].data, list(sets)
    ini = base_sections([UNGRADED] if UNGRADED not in tables else [])
    for name, understood in tables.items(): ini[f'table.{name}'] = table_keys(understood, data)
    own = sets_applied(ini, sets)
    check_same_data(file.parent, data, demo=False)
    if deadline and is_continued(file, ini, sets, deadline.hours):
        say(f'goes on with {file}')
        unused = ' '.join(unused_sets(sets, ini, read_ini(file)))
        if unused: say(f'not used: --set {unused}, because the recipe lacks it', 'yellow')
        return data
    if deadline: check_unused(file, deadline.hours)
    header = [f'Written by fit from {BASE}. Change it and run it: {COMMAND} all --recipe {file.name} --data FOLDER']
    header += [f'{name}: {reason}' for name, understood in tables.items() for reason in understood.reasons]
    if deadline:
        chosen = configure(ini, sets, data, file, file.parent, deadline.budget, deadline.hours)
        text = commented_text(chosen.ini, [*header, *chosen.lines], chosen.reasons)
        for line in chosen.lines: say(line)
    else:
        with parsed(own, file): text = commented_text(own, header, {})
    if file.is_file() and _keys(file.read_text(encoding='utf-8')) == _keys(text): say(f'goes on with {file}')
    elif file.is_file():
        check_unused(file, deadline.hours if deadline else None)
        old = file.replace(f'{file}.old')
        say(f'{file}: replaced, because nothing was trained by it; the earlier one is {old}', 'yellow')
    write_bytes(file, text.encode())
    return data


def base_sections(missing: Iterable[str]) -> Ini:
    "Return the sections of `BASE` without `missing` tables and the stages that need them"
    base = shipped_folder() / BASE
    recipe = read_recipe(base)
    missing = list(missing)
    return keep_sections(read_ini(base), without_tables(recipe, missing)) if missing else read_ini(base)


def is_continued(file: Path, ini: Ini, sets: Sequence[str], hours: float) -> bool:
    """Return whether `file` has the recipe of an earlier fit for as many hours, on the tables of `ini` with `sets`.

    Those of `sets` that it did not use do not count.
    """
    if not file.is_file() or configured_hours(file) != f'{hours:g}': return False
    there, own = read_ini(file), sets_applied(ini, sets)
    unused = unused_sets(sets, ini, there)
    def tables(sections: Ini) -> Ini: return {k: v for k, v in sections.items() if k.startswith('table.')}
    if tables(own) != tables(there): return False
    used = (section_and_key(text) for text in sets if text not in unused)
    return all(there.get(section, {}).get(key) == own[section][key] for section, key in used)


def check_unused(file: Path, hours: float | None) -> None:
    "Raise `AptosError` if stages have begun to train by the recipe of an earlier fit in `file`, which is another one"
    if not file.is_file() or not any(file.parent.glob('*/fold*')): return
    earlier = configured_hours(file)
    old, new = (f'fit --hours {o}' if o else 'fit without --hours' for o in (earlier, f'{hours:g}' if hours else ''))
    other = f'{old}, not {new}' if old != new else f'{old} with other tables or keys'
    raise AptosError(f'{file.parent}: an earlier fit wrote another recipe here ({other}) and trains by it. Repeat that '
                     'command, choose another --name, or delete this folder.')


def write_configured_recipe(data: Path, file: Path, runs: Path, sets: Sequence[str], hours: float) -> None:
    """Write the recipe of `BASE` for a data folder with settings for a number of hours, and print why.

    Raises `AptosError`, before anything is written.
    """
    check_output_file(file)
    if file.exists(): raise AptosError(f'{file}: already exists. Choose another file with -o, or delete it.')
    base = read_recipe(shipped_folder() / BASE)
    given, data = data, only_folder(base.tables[GRADED], data)
    if data != given: say(f'tables found in {data}')
    present, left_out = with_present_tables(base, data)
    if left_out: say(left_out, 'yellow')
    ini = base_sections([name for name in (GRADED, UNGRADED) if name not in present.tables])
    chosen = configure(ini, sets, data, file, runs / file.stem, 3600 * hours, hours)
    command = f'{COMMAND} all --recipe {shlex.quote(str(file))} --data {shlex.quote(str(data))} --hours {hours:g}'
    write_bytes(file, commented_text(chosen.ini, [f'Written by configure from {BASE}. Run it: {command}',
                                                  *chosen.lines], chosen.reasons).encode())
    for line in chosen.lines: say(line)
    say(f'recipe -> {file}\nto train: {command}')


def table_keys(understood: Understood, data: Path) -> dict[str, str]:
    "Return the keys of [table.NAME] that are no defaults, with paths from the folder `data`"
    table = understood.table
    keys = {f.name: str(getattr(table, f.name)) for f in fields(Table)
            if f.default is not MISSING and getattr(table, f.name) != f.default}
    if understood.data != data: keys['folder'] = relative(understood.data, data)
    return keys


def _keys(text: str) -> list[str]:
    "Return the lines of a recipe that say something: no comments, no keys without a value, no `label_tta` like `tta`"
    lines = [line for line in text.splitlines() if not line.startswith('#') and not line.rstrip().endswith('=')]
    return [line for line in lines if line.removeprefix('label_') not in lines or not line.startswith('label_tta')]

