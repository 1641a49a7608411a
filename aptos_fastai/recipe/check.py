"Check that a recipe can run: its graph of stages, tables, folds and labels."
from collections.abc import Iterable
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, NoReturn

from aptos_fastai.recipe.files import preset_files
from aptos_fastai.recipe.graph import Recipe
from aptos_fastai.recipe.sections import (
    COLUMNS_OF_FUSION,
    COLUMNS_OF_SCORES,
    ConfigError,
    Ensemble,
    Refer,
    Stage,
    Table,
    parse_thresholds,
)
from aptos_fastai.recipe.values import check_choice


def require_name(recipe: Recipe, name: str, names: Iterable[str]) -> str:
    "Return `name`, a stage or ensemble. Raises `ConfigError` if it is not one of `names`"
    known = list(names)
    kind = 'stage or ensemble' if recipe.ensembles.keys() & known else 'stage'
    return check_choice(name, known, f'{name}: no such {kind} in {recipe.path}')


def require_table(recipe: Recipe, name: str) -> str:
    "Return `name`. Raises `ConfigError` if the recipe has no such table, for a preset with how to use it"
    advice = f'; to use the preset: [table.NAME] preset = {name}' if name in preset_files() else ''
    return check_choice(name, recipe.tables, f'{name}: no such table in {recipe.path}{advice}')


def checked(recipe: Recipe) -> Recipe:
    "Return the recipe with the order of its stages. Raises `ConfigError` if something cannot run"
    order = _check_graph(recipe)
    return replace(recipe, order=order, stages=_with_inherited_stats(recipe.stages, order))


def _with_inherited_stats(stages: dict[str, Stage], order: Iterable[str]) -> dict[str, Stage]:
    "Return the stages with `mean` and `std` of the stage that they start from (`init`), where their own are empty"
    found = dict(stages)
    for s in (found[name] for name in order if name in found):
        if not s.init: continue
        parent = found[s.init]
        found[s.name] = replace(s, mean=s.mean or parent.mean, std=s.std or parent.std)
    return found


def _fail(r: Recipe, section: str, key: str, value: Any, why: str) -> NoReturn:
    if isinstance(value, tuple): value = ' '.join(map(str, value))
    raise ConfigError(f'{r.path} [{section}] {key} = {value}: {why}')


def _check_graph(r: Recipe) -> tuple[str, ...]:
    "Return the names of stages and ensembles, parents first. Raises `ConfigError` if something cannot run"
    if not r.stages: raise ConfigError(f'{r.path}: no section [stage.NAME]. Add at least one stage.')
    shared = set(r.stages) & set(r.ensembles)
    if shared: raise ConfigError(f'{r.path} [ensemble.{min(shared)}]: a stage has the same name. Rename one of them.')
    _check_column_names(r)
    for t in r.tables.values(): _check_table(r, t)
    for s in r.stages.values():
        _check_training(r, s)
        _check_init(r, s)
        _check_sources(r, s)
    for e in r.ensembles.values(): _check_members(r, e)
    order = _topological_order(r)
    for s in r.stages.values(): _check_folds(r, s)
    for s in r.stages.values(): _check_held_out(r, s)
    for s in r.stages.values(): _check_hard_labels(r, s)
    for s in r.stages.values(): _check_fitted_labels(r, s)
    for s in r.stages.values(): _check_validated(r, s)
    for e in r.ensembles.values(): _check_ensemble(r, e)
    _check_submit(r)
    return order


def _topological_order(r: Recipe) -> tuple[str, ...]:
    "Return the names of stages and ensembles, parents first. Raises `ConfigError` for a cycle"
    try: return tuple(TopologicalSorter({name: node.parents for name, node in r.nodes.items()}).static_order())
    except CycleError as e:
        raise ConfigError(f'{r.path}: the stages form a cycle: {" -> ".join(e.args[1])}. '
                          'Change `init` or `train` of one of them.') from None


def _check_column_names(r: Recipe) -> None:
    "Check that no stage or ensemble is named like another column of the files in which it is a column"
    taken = {*COLUMNS_OF_SCORES, *(f'{name}_grade' for name in r.nodes)}
    if r.submit.eyes == 'fused': taken |= COLUMNS_OF_FUSION
    for name in r.nodes:
        kind = 'stage' if name in r.stages else 'ensemble'
        if name in taken:
            raise ConfigError(f'{r.path} [{kind}.{name}]: {name} is a column of scores.csv or oof.csv. '
                              'Choose another name.')
    for t in r.tables.values():
        for name in t.carried:
            if name in taken or name in r.nodes:
                _fail(r, f'table.{t.name}', 'carry', name, 'oof.csv has a column or a stage of this name. Rename it.')


def _check_table(r: Recipe, t: Table) -> None:
    "Check that a table's images are grouped in one way only, and that its grades are where they can be"
    if t.grade and t.grade != 'folder' and not t.csv:
        _fail(r, f'table.{t.name}', 'grade', t.grade, 'this table has no csv. Write grade = folder if the sub-folders '
              'of `images` are named by grade, or set csv.')
    if t.relabels and not t.grade:
        _fail(r, f'table.{t.name}', 'relabels', t.relabels, 'this table has no grades. Set grade, or remove relabels.')
    if len(t.id_columns) > 1 and t.grade and len(t.grade_columns) != len(t.id_columns):
        _fail(r, f'table.{t.name}', 'grade', t.grade, f'enter a column for each of the columns of id: {t.id}.')
    if len(t.id_columns) > 1 and t.eye:
        _fail(r, f'table.{t.name}', 'eye', t.eye, 'a row of this table holds both eyes. Remove it.')
    ways = [key for key in ('patient', 'pairs', 'group', 'block') if getattr(t, key)]
    if len(ways) > 1:
        advice = f'this table has the key {ways[0]}, too. Remove {ways[0]} or {ways[1]}.'
        _fail(r, f'table.{t.name}', ways[1], getattr(t, ways[1]), advice)


def _check_training(r: Recipe, s: Stage) -> None:
    "Check that the keys of a stage that say how it trains do not contradict each other"
    section = f'stage.{s.name}'
    if s.layer_decay < 1 and s.lr_div > 1:
        _fail(r, section, 'layer_decay', s.layer_decay, f'the body\'s rate is lowered by lr_div = {s.lr_div:g}, too. '
              'Set lr_div = 1, or layer_decay = 1.')
    if s.schedule == 'constant' and s.warmup != Stage.warmup:
        _fail(r, section, 'warmup', s.warmup, 'schedule = constant has no warm-up. Set schedule = one_cycle, or remove '
              'it.')
    if not s.epochs and not s.freeze_epochs:
        _fail(r, section, 'epochs', s.epochs, 'nothing is trained. Set epochs, or freeze_epochs for a linear probe.')


def _network(s: Stage) -> str:
    "Return what must be equal for a stage to start from another one's weights"
    units = 'one unit' if s.loss in ('smooth_l1', 'mse') else s.loss
    return f'{s.arch} + {s.head} + {units}'


def _check_init(r: Recipe, s: Stage) -> None:
    "Check that the parent stage exists and has the same network"
    if not s.init: return
    if s.init not in r.stages: _fail(r, f'stage.{s.name}', 'init', s.init, _no_stage(r))
    parent = r.stages[s.init]
    if _network(parent) != _network(s):
        _fail(r, f'stage.{s.name}', 'init', s.init, f'that stage is {_network(parent)}, this one is {_network(s)}. '
              'Use the same arch, head and loss.')


def _check_sources(r: Recipe, s: Stage) -> None:
    "Check the tables that a stage trains on, their teachers and weights"
    section = f'stage.{s.name}'
    for entry, (teacher, table) in zip(s.train, s.sources, strict=True):
        if table not in r.tables: _fail(r, section, 'train', entry, _no_table(r))
        graded = r.tables[table].graded
        if teacher and teacher not in r.nodes: _fail(r, section, 'train', entry, _no_node(r))
        if teacher and graded: _fail(r, section, 'train', entry, f'this table is graded. Write {table} alone.')
        if not teacher and not graded:
            _fail(r, section, 'train', entry, f'this table is ungraded. Write STAGE:{table} for pseudo-labels.')
    if all(teacher for teacher, _ in s.sources):
        _fail(r, section, 'train', s.train, 'all tables are pseudo-labelled. Add a graded table.')
    if s.source_weights and (len(s.source_weights) != len(s.train) or not all(s.source_weights)):
        _fail(r, section, 'source_weights', s.source_weights,
              f'enter one number above 0 for each of the {len(s.train)} entries of train.')
    lacking = [table for _, table in s.sources if s.balance and s.balance not in r.tables[table].carried]
    if lacking:
        _fail(r, section, 'balance', s.balance, f'the table {lacking[0]} does not carry this column. Add it to the key '
              f'carry of [table.{lacking[0]}].')


def _check_validated(r: Recipe, s: Stage) -> None:
    "Check which tables validate a stage: no ancestor was trained on the images of a fold that validates the stage"
    section = f'stage.{s.name}'
    for table in s.validate:
        if table not in s.graded_tables:
            _fail(r, section, 'validate', table, f'no graded table of `train`. Accepted: {", ".join(s.graded_tables)}.')
    parents = [m for parent in s.parents for m in r.members(parent) if m in r.stages]
    for m in dict.fromkeys(parents): _check_parent_validated(r, s, r.stages[m], set())


def _check_parent_validated(r: Recipe, s: Stage, ancestor: Stage, seen: set[str]) -> None:
    "Check an ancestor of a stage, and its own"
    if ancestor.name in seen: return
    seen.add(ancestor.name)
    leaked = [t for t in s.validated_tables if t in ancestor.graded_tables and t not in ancestor.validated_tables]
    if leaked:
        _fail(r, f'stage.{s.name}', 'validate', s.validate or s.validated_tables,
              f'its parent {ancestor.name} trains on every fold of {leaked[0]}. Set validate of {ancestor.name} to '
              f'{" ".join([*ancestor.validated_tables, leaked[0]])}.')
    for parent in ancestor.parents:
        for m in r.members(parent):
            if m in r.stages: _check_parent_validated(r, s, r.stages[m], seen)


def _check_folds(r: Recipe, s: Stage) -> None:
    "Check that the folds of a stage exist, and that its parents train them too, or train one that serves them all"
    section = f'stage.{s.name}'
    if s.folds > r.splits: _fail(r, section, 'folds', s.folds, f'the maximum is [recipe] splits = {r.splits}.')
    for parent in (o for o in s.parents if o in r.nodes):
        n = r.folds_of(parent)
        if 1 < n < s.folds:
            _fail(r, section, 'folds', s.folds, f'its parent {parent} trains only {n}. Use at most {n}, or set folds '
                  f'of {parent} to {s.folds}, or to 1 if it trains on other tables.')


def _check_held_out(r: Recipe, s: Stage) -> None:
    "Check that a stage whose one fold serves several of another does not train on the tables that validate that one"
    leaked = [t for t in r.held_out_tables(s.name) if t in s.graded_tables]
    if leaked:
        _fail(r, f'stage.{s.name}', 'folds', s.folds, f'it trains on {leaked[0]}, whose folds validate a stage that '
              'builds on it and trains more of them. Set folds of both to the same number.')


def _check_hard_labels(r: Recipe, s: Stage) -> None:
    "Check that no hard label comes from thresholds that were fitted on the images that validate the student"
    if s.labels != 'hard': return
    for teacher in dict.fromkeys(name for name, _ in s.sources if name):
        node = r.nodes[teacher]
        thresholds = node.thresholds if isinstance(node, Stage) else r.submit.thresholds
        folds = min((r.stages[m].folds for m in r.members(teacher) if m in r.stages), default=2)
        if folds > 1 or parse_thresholds(thresholds): continue
        section = f'stage.{teacher}' if isinstance(node, Stage) else 'submit'
        _fail(r, f'stage.{s.name}', 'labels', s.labels, f'its teacher {teacher} has one fold, so its thresholds are '
              f'fitted on the images that validate {s.name}. Set folds = 2 or more for both, or [{section}] '
              'thresholds = 0.5 1.5 2.5 3.5.')


def _check_fitted_labels(r: Recipe, s: Stage) -> None:
    "Check that no label comes from weights of an ensemble that were fitted on the images that validate the student"
    for entry, (teacher, _) in zip(s.train, s.sources, strict=True):
        if not r.is_fitted(teacher) or r.folds_of(teacher) > 1: continue
        _fail(r, f'stage.{s.name}', 'train', entry, f'the weights of {teacher} are fitted on its only fold, whose '
              f'images validate {s.name}. Set folds of its members to 2 or more, or give [ensemble.{teacher}] weights '
              'as numbers.')


def _check_members(r: Recipe, e: Ensemble) -> None:
    "Check that the members of an ensemble are stages"
    for m in e.members:
        if '/' in m: _fail(r, f'ensemble.{e.name}', 'members', m, 'only commands on a run find stages of other runs.')
        if m not in r.stages: _fail(r, f'ensemble.{e.name}', 'members', m, _no_stage(r))


def _check_ensemble(r: Recipe, e: Ensemble) -> None:
    "Check that the same tables validate all members of an ensemble"
    validated = {m: sorted(r.stages[m].validated_tables) for m in e.members}
    first = e.members[0]
    for m, tables in validated.items():
        if tables != validated[first]:
            _fail(r, f'ensemble.{e.name}', 'members', e.members,
                  f'{m} is validated on {" ".join(tables)}, {first} on {" ".join(validated[first])}. Set the key '
                  '`validate` of the stages to the same tables.')


def _check_submit(r: Recipe) -> None:
    "Check what is submitted, and for which table"
    for key, names in [('final', [r.submit.final]), ('also', r.submit.also)]:
        for name in names:
            if name not in r.nodes: _fail(r, 'submit', key, name, _no_node(r))
    check_refer(r.path, r.refer)
    _check_eyes(r)
    table = r.submit.table
    if not table: return
    if table not in r.tables: _fail(r, 'submit', 'table', table, _no_table(r))
    if r.tables[table].graded: _fail(r, 'submit', 'table', table, 'this table is graded. Name an ungraded table.')


def _check_eyes(r: Recipe) -> None:
    "Check that eyes can be fused: a table that validates the model names patients and eyes, and so does the test table"
    if r.submit.eyes != 'fused': return
    if not r.names_eyes(r.submit.final):
        validated = dict.fromkeys(table for m in r.members(r.submit.final) for table in r.stages[m].validated_tables)
        _fail(r, 'submit', 'eyes', r.submit.eyes, f'no table that validates {r.submit.final} ({", ".join(validated)}) '
              'names both patients and eyes. Set the keys eye and patient (or pairs, group) of one, or eyes = single.')
    test = r.tables.get(r.submit.table)
    if test and not test.names_eyes:
        _fail(r, 'submit', 'eyes', r.submit.eyes, f'the table {test.name} does not name both patients and eyes. Set '
              'its keys eye and patient (or pairs, group), or eyes = single.')


def check_refer(path: Path, refer: Refer) -> None:
    "Check that a fixed threshold stands alone"
    if not refer.threshold or not (refer.sensitivity or refer.specificity): return
    raise ConfigError(f'{path} [refer] threshold: a fixed score has no target. Remove it, or remove sensitivity and '
                      'specificity.')


def _no_stage(r: Recipe) -> str: return f'no such stage. Stages: {", ".join(r.stages)}.'


def _no_node(r: Recipe) -> str: return f'no such stage or ensemble. Accepted: {", ".join(r.nodes)}.'


def _no_table(r: Recipe) -> str: return f'no such table. Tables: {", ".join(r.tables)}.'
