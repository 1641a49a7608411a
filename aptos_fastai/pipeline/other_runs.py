"""Members of ensembles from other runs: `[ensemble.both] members = teacher ../other/finetune_256`.

The path is relative to the run folder. The stage, its ancestors and their tables become part of the recipe, named
OTHER_STAGE, so that lineage, scores and reports treat them as its own; `pipeline.share` takes their finished folds
from that run alone, and again if they were trained again there. They are never trained here.
"""
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from aptos_fastai.common.io import AptosError, read_record
from aptos_fastai.pipeline.reasons import OLDER, fold_reasons
from aptos_fastai.pipeline.run_recipe import RECIPE, of_demo
from aptos_fastai.pipeline.share import has_weights_of
from aptos_fastai.recipe.graph import Recipe
from aptos_fastai.recipe.read import read_recipe, run_name
from aptos_fastai.recipe.sections import ConfigError, Ensemble, Parts, Stage, Table
from aptos_fastai.recipe.values import did_you_mean
from aptos_fastai.run_folder import FINISHED, Run


@dataclass(frozen=True)
class MembersOfRuns:
    "Put the stages that ensembles name by path into the recipe of the run in `root`; `within`: runs that name it so"
    root: Path
    demo: bool
    within: tuple[Path, ...] = ()

    def __call__(self, recipe: Path, parts: Parts) -> Parts:
        "Return tables, stages and ensembles with those of other runs. Raises `ConfigError`"
        for e in parts.ensembles.values():
            names = tuple(self._add(f'{recipe} [ensemble.{e.name}] members = {m}', m, parts) if '/' in m else m
                          for m in e.members)
            if len(set(names)) < len(names):
                raise ConfigError(f'{recipe} [ensemble.{e.name}] members = {" ".join(e.members)}: one is named twice.')
            parts.ensembles[e.name] = replace(e, members=names)
        return parts

    def _add(self, where: str, member: str, parts: Parts) -> str:
        "Add the stage that the path `member` names, and what it builds on, to `parts`; return its name there"
        folder, name = (self.root / member).resolve().parent, Path(member).name
        other = self._recipe_of(where, folder)
        if name not in other.stages:
            raise ConfigError(f'{where}: {folder} has no such stage{did_you_mean(name, other.stages)} Choose from: '
                              f'{", ".join(other.stages)}.')
        prefix, needed = re.sub(r'\W+', '_', folder.name), _ancestors(other, name)
        names = {node: f'{prefix}_{node}' for node in needed} | {'': ''}
        tables = {table: _table_name(parts.tables, other.tables[table], prefix)
                  for node in needed if node in other.stages for _, table in other.stages[node].sources}
        for old, new in tables.items(): parts.tables.setdefault(new, replace(other.tables[old], name=new))
        for old in needed:
            _add_node(where, parts, other, old, names, tables)
            if old not in other.stages: continue
            if parts.other_runs.setdefault(names[old], folder / old) != folder / old:
                raise ConfigError(f'{where}: {parts.other_runs[names[old]].parent} and {folder} would both be '
                                  f'{names[old]} here. Rename one of the two runs.')
        return names[name]

    def _recipe_of(self, where: str, folder: Path) -> Recipe:
        record = read_record(folder / 'run.json')
        if not record or not (folder / RECIPE).is_file():
            raise ConfigError(f'{where}: no run in {folder}. Enter a path from the run folder {self.root}: '
                              '../OTHER/STAGE.')
        if of_demo(record) != self.demo:
            raise ConfigError(f'{where}: one of the two runs is on the built-in demo, the other is not.')
        within = (*self.within, self.root.resolve())
        if folder in within: raise ConfigError(f'{where}: {folder} takes members from this run. Leave one of them out.')
        return read_recipe(folder / RECIPE, demo=self.demo, resolve=MembersOfRuns(folder, self.demo, within))


def read_run_recipe(recipe: str | Path, runs: str | Path, name: str = '', *, demo: bool,
                    sets: Sequence[str] = ()) -> Recipe:
    """Return the checked recipe of the run <runs>/<name>, with the members that are stages of other runs.

    Without `name` it is that of the recipe. Raises `ConfigError`.
    """
    root = Path(runs) / (name or run_name(Path(recipe), demo))
    parsed = read_recipe(recipe, demo=demo, sets=sets, resolve=MembersOfRuns(root, demo))
    return replace(parsed, name=root.name)


def _ancestors(recipe: Recipe, node: str) -> list[str]:
    "Return a stage and the stages and ensembles that it depends on"
    found = {node: None}
    for parent in recipe.nodes[node].parents: found |= dict.fromkeys(_ancestors(recipe, parent))
    return list(found)


def _table_name(tables: dict[str, Table], table: Table, prefix: str) -> str:
    "Return the name of another run's table: that of an equal one of this recipe, else a free one"
    same = [name for name, own in tables.items() if replace(table, name=name) == own]
    if same: return table.name if table.name in same else same[0]
    return table.name if table.name not in tables else f'{prefix}_{table.name}'


def _add_node(where: str, parts: Parts, other: Recipe, old: str, names: dict[str, str], tables: dict[str, str]) -> None:
    "Add a stage or ensemble of another run under its new name"
    new, known = names[old], {**parts.stages, **parts.ensembles}.get(names[old])
    node: Stage | Ensemble
    if old in other.stages:
        stage = other.stages[old]
        train = tuple(f'{names[teacher]}:{tables[table]}' if teacher else tables[table]
                      for teacher, table in stage.sources)
        node = parts.stages[new] = replace(stage, name=new, init=names[stage.init], train=train,
                                           validate=tuple(tables[table] for table in stage.validate))
    else:
        e = other.ensembles[old]
        node = parts.ensembles[new] = replace(e, name=new, members=tuple(names[m] for m in e.members))
    if known not in (None, node): raise ConfigError(f'{where}: this recipe has another {new}. Rename it.')


def check_other_runs(run: Run, stages: Collection[str]) -> None:
    "Raise `AptosError` if one of `stages` that is named by path is not what the other run has finished"
    for name, folder in run.recipe.other_runs.items():
        if name not in stages: continue
        for k in range(run.recipe.stages[name].folds):
            if not run.finished(name, k) or not has_weights_of(run, name, k):
                raise AptosError(_why_not(run, name, k, folder / f'fold{k}'))


def _why_not(run: Run, name: str, fold: int, folder: Path) -> str:
    if not (folder / FINISHED).is_file(): return f'{folder}: not finished. Train it in its own run first.'
    there = replace(run, shared={(name, fold): folder})
    reasons = fold_reasons(there, name, fold, {})
    reasons = [o for o in reasons if not o.startswith('init: ') and o != OLDER]          # a parent has a new name here
    if not reasons: return f'{folder}: cannot be a member here: its parents or files have changed. Train it again.'
    return (f'{folder}: cannot be a member here: {"; ".join(reasons)}. A member of another '
            'run has the images, folds, [images] and [augment] of this one.')
