"`runs`: the runs of a folder, the best first, and what unfinished ones lack."
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aptos_fastai.common.console import format_duration, plural, say, table
from aptos_fastai.common.disclaimer import DISCLAIMER
from aptos_fastai.common.io import AptosError, digest, file_hash, read_record, verify_file
from aptos_fastai.data.spreadsheet import first_few
from aptos_fastai.pipeline.compare import read_results, say_precisions, trained_in
from aptos_fastai.pipeline.fit import BASE
from aptos_fastai.pipeline.other_runs import read_run_recipe
from aptos_fastai.pipeline.run_recipe import RECIPE, of_demo
from aptos_fastai.pipeline.summary import OUT_OF_FOLD, SYNTHETIC, by_value, interval_text, validated
from aptos_fastai.recipe.files import read_ini, shipped_folder
from aptos_fastai.recipe.sections import Ini
from aptos_fastai.run_folder import FINISHED

if TYPE_CHECKING:
    import pandas as pd

STARTED = 'summary.json', 'run.json', RECIPE, 'running.json', '.lock'      # a run folder has one of these
SHOWN_KEYS = 4                               # changed keys of a run that are shown
UNKNOWN_KEYS = 'unknown: older version'
BEST_OF_SEVERAL = 'The best of several runs was chosen on the images of its kappa, which is then optimistic.'


@dataclass
class Result:
    "A finished run: a row of the table and its changed keys"
    name: str
    model: str                               # the stage or ensemble that is submitted
    result: dict                             # its entry of `stages` in summary.json
    images: str                              # SHA-256 of ids and grades of the images that validated it
    changed: list[str]                       # SECTION.KEY=VALUE, or `UNKNOWN_KEYS`
    seconds: float                           # training time of all stages
    date: str
    synthetic: bool
    precision: str                           # of all stages: `trained_in`


def list_runs(folder: str) -> None:
    "Print the runs in `folder`. Raises `AptosError` if there are none"
    roots = run_folders(Path(folder))
    found, lacking = [], []
    for root in roots:
        try: found.append(read_result(root))
        except AptosError as e: lacking.append(f'{root.name}: {e}')
    if found: show_results(found)
    for line in lacking: say(line, 'yellow')


def run_folders(folder: Path) -> list[Path]:
    "Return the run folders in `folder`. Raises `AptosError` if there are none"
    if not folder.is_dir(): raise AptosError(f'{folder}: no such folder. Name the folder of --runs.')
    if (folder / 'run.json').is_file(): raise AptosError(f'{folder}: is a run folder. Name the folder that it is in.')
    found = [o for o in sorted(folder.iterdir()) if o.is_dir() and any((o / name).exists() for name in STARTED)]
    if not found: raise AptosError(f'{folder}: has no run. Name the folder of --runs, or train one with `all`.')
    return found


# One run

def read_result(root: Path) -> Result:
    "Return the result of a run. Raises `AptosError`, which says what it lacks"
    if not (root / 'summary.json').is_file(): raise AptosError(f'not finished; {progress_text(root)}')
    try:
        outputs = (read_record(root / 'summary.json') or {})['outputs']
        verify_file(root / 'oof.csv', outputs['oof.csv'], 'Run `all` again.')
        summary, oof = read_results(root)
        check_recipe(root, summary)
        return _result(root, summary, validated(oof, summary['submission']['node']))
    except (KeyError, StopIteration):
        raise AptosError(f'{root / "summary.json"}: written by an older version. Run `all` again.') from None


def _result(root: Path, summary: dict, valid: 'pd.DataFrame') -> Result:
    "Return the result of a finished run; `valid` are the rows of oof.csv that its model has validated"
    node = summary['submission']['node']
    images = valid[['source', 'id_code', 'diagnosis']].sort_values(['source', 'id_code']).to_numpy().tolist()
    return Result(root.name, node, next(o for o in summary['stages'] if o['stage'] == node),
                  images=digest([images, summary['synthetic']]), changed=changed_of(root),
                  seconds=sum(o['seconds'] for o in summary['stages']), date=summary['date'],
                  synthetic=summary['synthetic'],
                  precision=trained_in(summary, [o['stage'] for o in summary['stages']]))


def check_recipe(root: Path, summary: dict) -> None:
    "Raise `AptosError` if the recipe of a run is not the one that its results are of"
    recorded = summary.get('recipe_sha256')
    if recorded is None: return              # of an older version, which stored no recipe
    if not (root / RECIPE).is_file(): raise AptosError(f'{RECIPE} is missing. Run `all` again with its --recipe.')
    if file_hash(root / RECIPE) == recorded: return
    raise AptosError(f'its results are of an earlier {RECIPE}. Run `all {root}`.')


def progress_text(root: Path) -> str:
    "Return how far a run has come, and how to go on: '3 of 10 folds trained (not yet student). Run `all runs/x`.'"
    record = read_record(root / 'run.json')
    if not record: return 'its images are not prepared yet. Run the same command again.'
    if not (root / RECIPE).is_file(): return f'no {RECIPE} (older version). Run `all` again with its --recipe.'
    stages = read_run_recipe(root / RECIPE, root.parent, root.name, demo=of_demo(record)).stages
    left = {name: [k for k in range(s.folds) if not (root / name / f'fold{k}' / FINISHED).is_file()]
            for name, s in stages.items()}
    total, missing = sum(s.folds for s in stages.values()), sum(map(len, left.values()))
    not_yet = f' (not yet {first_few([name for name, folds in left.items() if folds])})' if missing else ''
    return f'{total - missing} of {plural(total, "fold")} trained{not_yet}. Run `all {root}`.'


# Changed keys

def changed_of(root: Path) -> list[str]:
    "Return the keys that a run's recipe changes: 'stage.lr=0.01', …"
    record = read_record(root / 'run.json') or {}
    if 'sets' not in record or not (root / RECIPE).is_file(): return [UNKNOWN_KEYS]
    sections = read_ini(root / RECIPE)
    base = base_recipe(root, (root / record['recipe']).resolve(), sections)
    return list(record['sets'] if base is None else changed_keys(sections, base, of_demo(record)))


def changed_text(changed: list[str], in_all: Collection[str] = ()) -> str:
    "Return changed keys as text, 'stage.lr=0.01, stage.bs=8 and 2 more', those that are not `in_all` runs first"
    changed = sorted(changed, key=lambda text: text in in_all)
    more = f' and {len(changed) - SHOWN_KEYS} more' if len(changed) > SHOWN_KEYS else ''
    return (', '.join(changed[:SHOWN_KEYS]) + more) or 'none'


def base_recipe(root: Path, file: Path, sections: Ini) -> Ini | None:
    """Return what the recipe of a run is compared with: the shipped one of the name of its `file`, or this file.

    If `fit` wrote the file, the shipped one that it is made from, with its own tables and submission (of `sections`).
    None if `file` is not there any more.
    """
    if file.parent == root.resolve():
        own = {name: keys for name, keys in sections.items() if name.partition('.')[0] in ('table', 'submit')}
        return read_ini(shipped_folder() / BASE) | own
    shipped = [o for o in (shipped_folder() / file.name, shipped_folder() / 'recipes' / file.name) if o.is_file()]
    if shipped: return read_ini(shipped[0])
    return read_ini(file) if file.is_file() else None


def changed_keys(sections: Ini, base: Ini, demo: bool) -> Iterator[str]:
    """Yield 'SECTION.KEY=VALUE' of each key that `sections` give another value than `base`.

    A value of --set is in [stage] and in [demo.stage]: it is named once, and without `demo` nothing of the demo. Ranges
    of `tune` change no result.
    """
    for name, keys in sections.items():
        kind = name.partition('.')[0]
        if kind == 'tune' or kind == 'demo' and not demo: continue
        plain = sections.get(name.removeprefix('demo.'), {}) if name.startswith('demo.') else {}
        before = base.get(name, {})
        for key, value in keys.items():
            if value.split() == before.get(key, '').split() or plain.get(key) == value: continue
            yield f'{name}.{key}={" ".join(value.split())}'
        yield from (f'{name}.{key} removed' for key in before if key not in keys)


# The table

def show_results(found: list[Result]) -> None:
    "Print the table of finished runs, in groups that were validated on the same images, the best first"
    found = sorted(found, key=lambda o: (-o.result['kappa'], o.name))
    groups = {images: f'group {i}' for i, images in enumerate(dict.fromkeys(o.images for o in found), 1)}
    found = sorted(found, key=lambda o: list(groups).index(o.images))
    table('finished runs', ['run', 'model', 'kappa (95 % CI)', 'images', 'trained', 'date'],
          [result_row(o, groups[o.images] if len(groups) > 1 else '') for o in found],
          right=('images',), wrap=('run', 'model', 'trained'))
    say('Keys changed against the shipped recipe of the same name, or the file of the recipe as it is now:')
    in_all = set.intersection(*(set(o.changed) for o in found)) if len(found) > 1 else set()
    for o in found: say(f'  {o.name}: {changed_text(o.changed, in_all)}')
    say_precisions({o.name: o.precision for o in found})
    resampled = by_value({o.name: o.result['resampled'] for o in found})
    say(f'Intervals: bootstrap over {resampled}. trained: all stages and folds. *: has warnings, see its report.html.',
        'dim')
    if len(groups) > 1:
        say('The groups were validated on different images: kappas are comparable within a group only. `compare` takes '
            'the images that runs have in common.', 'yellow')
    if len(found) > 1: say(BEST_OF_SEVERAL, 'yellow')
    say(OUT_OF_FOLD, 'yellow')
    say(DISCLAIMER, 'dim')
    if any(o.synthetic for o in found): say(SYNTHETIC, 'yellow')


def result_row(o: Result, group: str) -> list:
    "Return a row of the table"
    kappa = interval_text(o.result['kappa'], o.result['kappa_interval']) + ('*' if o.result['warnings'] else '')
    name, images = o.name + (' (SYNTHETIC)' if o.synthetic else ''), o.result['validated']
    return [name, o.model, kappa, f'{images}, {group}' if group else images, format_duration(o.seconds), o.date]
