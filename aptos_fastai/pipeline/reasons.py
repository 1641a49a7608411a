"Why a stage would be trained: what differs between the record of a fold and what the recipe and the tables say now."
from itertools import groupby
from typing import Any

from aptos_fastai.common.console import plural
from aptos_fastai.common.io import digest, read_record
from aptos_fastai.recipe.sections import Stage
from aptos_fastai.run_folder import RESCORED, WEIGHTS, Run, training_settings

NEVER = 'never trained'
OLDER = 'written by an older version'
CHECKPOINT_RECORD = 'checkpoint.json'        # of training/checkpoint.py, which imports PyTorch


def training_reasons(run: Run, todo: dict[str, list[int]]) -> list[str]:
    "Return a line for each stage in `todo` (stage -> folds), or for those of its folds with equal reasons"
    lines: dict[str, list[str]] = {}
    for name, folds in todo.items():
        texts = [(k, '; '.join(fold_reasons(run, name, k, todo))) for k in folds]
        for text, group in groupby(sorted(texts, key=lambda o: (o[1], o[0])), key=lambda o: o[1]):
            numbers = [k for k, _ in group]
            all_folds = len(numbers) == run.recipe.stages[name].folds
            lines.setdefault(text, []).append(name if all_folds else f'{name} {folds_text(numbers)}')
    return [f'{", ".join(names)}: {text}' for text, names in lines.items()]


def folds_text(folds: list[int]) -> str:
    "Return 'fold 0' or 'folds 0 1'"
    return f'fold{"s" if len(folds) > 1 else ""} {" ".join(map(str, folds))}'


def fold_reasons(run: Run, name: str, fold: int, todo: dict[str, list[int]]) -> list[str]:
    "Return why a fold in `todo` is to be trained"
    record = run.record(name, fold)
    if not record: return [_unfinished(run, name, fold)]
    if 'inputs' not in record: return [OLDER]
    trained_again = list(dict.fromkeys(
        m for m, k in run.parent_networks(name, fold).values() if k in todo.get(m, [])))
    now = run.inputs(name, fold)
    found = [*_changed_settings(run, name, record),
             *_changed_recipe(run.recipe.stages[name], record, now),
             *_changed_sources(run, name, record, now),
             *(f'{m} is trained again' for m in trained_again),
             *(_changed_parents(run, name, fold, record) if not trained_again else []),
             *(f'{file} is missing or has another size' for file in sorted(run.damaged_files(name, fold) - RESCORED))]
    found = found or _changed_ensembles(run, name, record, now)
    return found or [OLDER]                  # whose fingerprint held what this version leaves out


def _unfinished(run: Run, name: str, fold: int) -> str:
    "Return why a fold without a record is to be trained"
    checkpoint = read_record(run.fold_dir(name, fold) / CHECKPOINT_RECORD)
    return f'unfinished after {plural(checkpoint["epochs"], "epoch")}' if checkpoint else NEVER


def _changed_settings(run: Run, name: str, record: dict) -> list[str]:
    "Return the changed keys of a stage that its weights depend on"
    stage = run.recipe.stages[name]
    now = {k: v for k, v in training_settings(stage).items() if k != 'weights'}
    if record['settings'].get('balance'): now['balance'] = stage.balance        # an empty one is left out
    lines = [*changed_keys(record['settings'], now), *_changed_weights(run, name, record)]
    precision = run.changed_precision(name, record)
    return [*lines, f'precision: {record["precision"]} -> {precision}'] if precision else lines


def _changed_weights(run: Run, name: str, record: dict) -> list[str]:
    "Return the change of the initial weights; those of a file are compared by content"
    stage = run.recipe.stages[name]
    if stage.init: return []
    if not stage.weights_file or not record.get('loaded'):
        return changed_keys(dict(weights=record['settings']['weights']), dict(weights=stage.weights))
    if not run.changed_weights(name, record): return []
    if stage.weights not in run.file_hashes: return [f'weights: {stage.weights}: no such file']
    return [f'weights: {stage.weights} has another content']


def changed_keys(old: dict, new: dict, section: str = '') -> list[str]:
    "Return 'key: old -> new' of the keys of `new` that differ; 'key = new is a key of this version' if `old` lacks it"
    lines = []
    for key, value in new.items():
        if key not in old: lines.append(f'{OLDER}, without the key {section}{key}')
        elif digest(old[key]) != digest(value):
            lines.append(f'{section}{key}: {_text(old[key])} -> {_text(value)}')
    return lines


def _text(value: Any) -> str:
    "Return a value as a recipe has it"
    return (' '.join(map(str, value)) if isinstance(value, list | tuple) else str(value)) or '(empty)'


def _changed_recipe(stage: Stage, record: dict, now: dict) -> list[str]:
    "Return what has changed in the sections of the recipe that all stages depend on; `now` are `Run.inputs`"
    old = record['prep']
    is_of_stage = old['size'] == record['settings']['size'] and now['prep']['size'] == stage.size
    prep = {k: v for k, v in now['prep'].items() if k != 'size' or not is_of_stage}        # else its size says it
    augment = now['augment'] if record['augment'] else {}                                  # a linear probe has none
    return [*changed_keys(record['augment'], augment, '[augment] '),
            *changed_keys(old, prep, '[images] '),
            *changed_keys(dict(seed=record['seed']), dict(seed=now['seed']))]


def _changed_sources(run: Run, name: str, record: dict, new: dict) -> list[str]:
    "Return what has changed in `init`, and in the tables and labels of `train`; `new` are `Run.inputs`"
    stage, old = run.recipe.stages[name], record['inputs']
    settings, lines = record['settings'], []
    if old['init'] != new['init']: lines += changed_keys(dict(init=settings['init']), dict(init=stage.init))
    if len(old['train']) != len(new['train']):
        return lines + changed_keys(dict(train=settings['train']), dict(train=stage.train))
    for before, now, was, entry in zip(old['train'], new['train'], settings['train'], stage.train, strict=True):
        if before == now: continue
        if was != entry and before['ids'] != now['ids']: lines.append(f'train: {was} -> {entry}')
        else: lines += _changed_table(run, entry.rpartition(':')[2], before, now)
        if before['teacher'] != now['teacher'] and was != entry: lines.append(f'labels of {was} -> {entry}')
        if before['teacher'] and now['teacher']:
            labels = changed_keys(_label_facts(before, now), _label_facts(now, before))
            lines += [f'pseudo-labels {entry}, {line}' for line in labels]
    return list(dict.fromkeys(lines))


def _label_facts(facts: dict, other: dict) -> dict:
    "Return what determines pseudo-labels besides the networks; `fit_views` are by default the `views`"
    found = {key: facts[key] for key in ('labels', 'thresholds', 'views')}
    return dict(found, fit_views=facts.get('fit_views', facts['views'])) if 'fit_views' in {*facts, *other} else found


def _changed_table(run: Run, table: str, old: dict, new: dict) -> list[str]:
    "Return what has changed in the images and grades of a table"
    def differs(key: str) -> bool: return old[key] != new[key]
    lines = []
    if differs('images'): lines.append(f'{old["images"]} -> {new["images"]} images')
    elif differs('ids'): lines.append('other ids or another order')
    if differs('by_grade'): lines.append(f'images of grades 0-4: {_text(old["by_grade"])} -> {_text(new["by_grade"])}')
    elif differs('grades') and not differs('ids'): lines.append('grades changed')
    is_prepared = 'pixel_sha256' in run.frames[table]
    if not lines and differs('pixels'): lines.append('image files changed' if is_prepared else 'images to prepare')
    if not lines and differs('targets'): lines.append('duplicates with conflicting grades changed')
    if not lines and differs('folds'): lines.append('other folds')
    if old.get('held_out') != new.get('held_out'): lines.append('other images are left out: they are copies of '
                                                                'validation images of stages that build on this one')
    if old.get('left_out') != new.get('left_out'): lines.append('other images are left out: they are copies of images '
                                                                'of this fold in another table')
    if 'balance' in old and 'balance' in new and differs('balance'): lines.append('the column of balance changed')
    if differs('validates'): lines.append(f'{"validates" if new["validates"] else "no longer validates"} this stage')
    return [f'table {table}: {", ".join(lines)}'] if lines else []


def _changed_parents(run: Run, name: str, fold: int, record: dict) -> list[str]:
    "Return the finished parents that a fold was not trained from"
    used = record['parents'].values()
    again = [m for m, k in run.parent_networks(name, fold).values()
             if (parent := run.record(m, k)) and parent['files'][WEIGHTS]['sha256'] not in used]
    return [f'{m} was trained again' for m in dict.fromkeys(again)]


def _changed_ensembles(run: Run, name: str, record: dict, now: dict) -> list[str]:
    "Return the ensembles that label for a stage and are not those that its record knows"
    entries = zip(record['inputs']['train'], now['train'], run.recipe.stages[name].sources, strict=True)
    return [f'members or weights of [ensemble.{teacher}] changed' for before, after, (teacher, _) in entries
            if teacher in run.recipe.ensembles and before['teacher'] != after['teacher']]
