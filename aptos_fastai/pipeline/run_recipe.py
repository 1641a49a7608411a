"What a run was made with: recipe.ini and run.json in its folder, by which commands open the run again."
import configparser
import io
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from aptos_fastai.common.io import AptosError, read_record, write_bytes
from aptos_fastai.recipe.files import read_ini
from aptos_fastai.recipe.graph import Recipe
from aptos_fastai.recipe.read import override, read_recipe
from aptos_fastai.recipe.sections import ConfigError, Ini, Stage
from aptos_fastai.run_folder import Run

RECIPE = 'recipe.ini'
# Folders beside the runs: the prepared images and the demo's tables
TAKEN = re.compile(r'prepared|demo(-\d+){3}-seed\d+')


def check_name(name: str) -> None:
    "Raise `AptosError` if a run cannot have this name"
    if not re.fullmatch(r'\w[\w.-]*', name):
        raise AptosError(f'--name {name}: not the name of a folder. Use letters, digits, - _ and ., no . or - first.')
    if TAKEN.fullmatch(name): raise AptosError(f'--name {name}: a folder of images has this name. Choose another one.')


def relative_to_root(root: Path, path: Path) -> str:
    "Return a path from the run folder, which stays the same when both are moved together"
    try: return Path(os.path.relpath(path.resolve(), root.resolve())).as_posix()
    except ValueError: return path.resolve().as_posix()      # another drive on Windows


def is_stored(recipe: Recipe, root: Path) -> bool:
    "Return whether a recipe was read from the recipe.ini of the run folder `root`"
    return recipe.path.resolve() == (root / RECIPE).resolve()


def of_demo(record: dict) -> bool:
    "Return whether a run.json is of a run on the built-in demo, with its sections [demo]"
    return record.get('demo', record['synthetic'])       # older records: only the demo was marked synthetic


def ini_text(sections: Ini) -> str:
    "Return sections as the text of a recipe, which `read_ini` reads"
    parser = configparser.ConfigParser(interpolation=None, default_section='\0')
    parser.optionxform = str                 # type: ignore  # keys are case-sensitive
    parser.read_dict(sections)
    file = io.StringIO()
    parser.write(file)
    return file.getvalue()


def commented_text(sections: Ini, lines: Iterable[str], reasons: dict[str, str]) -> str:
    "Return sections as the text of a recipe with `lines` before them and, above each key, its reason (SECTION.KEY)"
    text = [f'# {line}' for line in lines]
    for section, keys in sections.items():
        text += ['', f'[{section}]']
        for key, value in keys.items():
            reason = reasons.get(f'{section}.{key}')
            text += [*([f'# {reason}'] if reason else []), f'{key} = {value}']
    return '\n'.join(text) + '\n'


@contextmanager
def parsed(sections: Ini, file: Path) -> Iterator[Recipe]:
    """Yield the recipe of sections that are to be written to `file`; inside the block a temporary file has them.

    Raises `AptosError` if it cannot run; its message names `file`.
    """
    temporary = file.with_name(f'.{file.name}')
    write_bytes(temporary, ini_text(sections).encode())
    try: yield read_recipe(temporary)
    except AptosError as e: raise type(e)(str(e).replace(str(temporary), str(file))) from None
    finally: temporary.unlink()


def sets_applied(sections: Ini, sets: Iterable[str]) -> Ini:
    "Return sections with SECTION.KEY=VALUE of --set"
    found = {section: dict(keys) for section, keys in sections.items()}
    for text in sets: override(found, text)
    return found


def section_and_key(text: str) -> tuple[str, str]:
    "Return the section and the key of SECTION.KEY=VALUE"
    section, _, key = text.partition('=')[0].strip().rpartition('.')
    return section, key


def keep_sections(sections: Ini, recipe: Recipe) -> Ini:
    "Return the sections of those tables, stages and ensembles that `recipe` has, with what it submits"
    kept = {*(f'table.{n}' for n in recipe.tables), *(f'stage.{n}' for n in recipe.stages),
            *(f'ensemble.{n}' for n in recipe.ensembles)}
    found = {name: dict(keys) for name, keys in sections.items() if '.' not in name or name in kept}
    submit = recipe.submit
    keys = found.get('submit', {}) | dict(table=submit.table, final=submit.final, also=' '.join(submit.also))
    found['submit'] = {key: value for key, value in keys.items() if value}       # an empty key reads as no key
    return found


def store_recipe(run: Run, replace: bool) -> dict:
    """Write the run's recipe, with the values of --set, to recipe.ini in its folder; return what run.json says of it.

    `recipe` is the file that it was read from and `folder` that from which paths of weights are meant, both relative to
    the run folder; `sets` are the values of --set. Without `replace` a recipe that is there stays.
    """
    record, file, recipe = read_record(run.root / 'run.json') or {}, run.root / RECIPE, run.recipe
    known = {key: record[key] for key in ('recipe', 'folder', 'sets')} if 'sets' in record else {}
    if known and file.is_file() and not replace: return known
    data = ini_text(recipe.sections).encode()
    if not file.is_file() or file.read_bytes() != data: write_bytes(file, data)
    if known and is_stored(recipe, run.root): return dict(known, sets=merged_sets(known['sets'], recipe.sets))
    return dict(recipe=relative_to_root(run.root, recipe.path), folder=relative_to_root(run.root, Path()),
                sets=list(recipe.sets))


def check_same_model(run: Run) -> None:
    "Raise `AptosError` if the recipe submits another stage, or blends other members, than that of the run folder"
    file = run.root / RECIPE
    if is_stored(run.recipe, run.root) or not file.is_file(): return
    stored, now = sets_applied(read_ini(file), run.recipe.sets), run.recipe.sections
    ensembles = sorted(section for section in stored.keys() | now.keys() if section.startswith('ensemble.'))
    keys = [*((section, key) for section in ensembles for key in ('members', 'weights')),
            *(('submit', key) for key in ('final', 'also', 'table', 'eyes'))]
    for section, key in keys:
        there, here = (o.get(section, {}).get(key, '') for o in (stored, now))
        if there.split() == here.split(): continue
        raise AptosError(f'{run.recipe.path} [{section}] {key} = {here or "(none)"}: the run {run.root} has '
                         f'{there or "(none)"}. Take its recipe with --run {run.root}, or change it with `all`.')


def merged_sets(old: list[str], new: tuple[str, ...]) -> list[str]:
    "Return earlier and new values of --set, of each key the last one"
    return list({section_and_key(text): text for text in (*old, *new)}.values())


def check_weights_folder(run: Run, stage: Stage) -> None:
    "Raise `ConfigError` if a file of weights is missing here, but is where the run was started before"
    file, record = stage.weights_file, read_record(run.root / 'run.json') or {}
    if not file or Path(file).exists() or not is_stored(run.recipe, run.root): return
    there = (run.root / record['folder'] / file).resolve()
    if not there.exists(): return
    raise ConfigError(f'weights = {file}: not found from this folder. Run the command where the run was started, or '
                      f'add --set stage.{stage.name}.weights={there}')


def options_of(folder: str, data: str = '') -> dict[str, str]:
    """Return what `load_run` needs to open the run in `folder` again: recipe, data, runs and name.

    `data` is where its data is now, if it was moved. Raises `AptosError`.
    """
    root = Path(folder) if Path(folder).name not in ('', '..') else Path(folder).resolve()
    record, file = read_record(root / 'run.json'), root / RECIPE
    if root.is_file(): raise AptosError(f'{folder}: is a file, no run folder. To look at a table: inspect {folder}')
    if not record: raise AptosError(f'{folder}: not a run folder (no run.json). `runs` lists the runs of a folder.')
    if not file.is_file() or 'sets' not in record:
        raise AptosError(f'{root}: has no {RECIPE}, as an older version made it. Run `all` once more with --recipe, '
                         '--data and --runs; finished stages are not trained again.')
    recorded = (root / record['data']).resolve()
    if not data and not of_demo(record) and not recorded.is_dir():
        raise AptosError(f'{root / "run.json"}: its data folder {recorded} is not there. If it was moved, say where '
                         'it is with --data FOLDER.')
    data = data or ('demo' if of_demo(record) else str(recorded))
    return dict(recipe=str(file), data=data, runs=str(root.parent), name=root.name)
