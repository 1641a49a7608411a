"The run folder: its paths, which stages are finished, and the files they wrote. Imports no torch."
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property, lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd

from aptos_fastai.common.io import AptosError, digest, file_hash, is_trusted, read_record, verify_file
from aptos_fastai.data.demo import holds_demo_images
from aptos_fastai.data.relabels import Relabels, read_relabels
from aptos_fastai.data.retina import Prep, get_prep
from aptos_fastai.data.store import read_prepared, store_folder
from aptos_fastai.data.tables import find_folder
from aptos_fastai.metrics import (
    GRADES,
    cross_fitted_weights,
    fit_weights,
    stratified_group_parts,
    thresholds_or_midpoints,
    upper_quantile,
)
from aptos_fastai.recipe.check import require_name
from aptos_fastai.recipe.graph import Recipe
from aptos_fastai.recipe.sections import FITTED, Stage, parse_thresholds
from aptos_fastai.recipe.values import check_fold

FINISHED = 'stage.json'                      # a fold's record, written last: its presence means finished
EXPORT = 'learner.pkl'
WEIGHTS = 'weights.safetensors'
PREDS = 'preds.csv'                          # validation scores
HISTORY = 'history.csv'
FEATURES = 'features.safetensors'            # how the network's features of the training images are distributed
FOLD_FILES = EXPORT, WEIGHTS, PREDS, HISTORY, FEATURES

RESCORED = {PREDS}                           # is made again from the weights if it is missing, without a training

# Keys of a stage that do not change its weights. `init`, `train` and `validate` enter as the fingerprints of what they
# name, not by its names; `thresholds` and `labels` where they are used. A precision that `auto` chose counts as chosen
NOT_IN_FINGERPRINT = {'name', 'folds', 'seed', 'seeds', 'workers', 'compile', 'track', 'init', 'train', 'validate',
                      'thresholds', 'labels', 'tta', 'label_tta', 'precision'}
# Keys that a linear probe does not use either: it trains the head alone, on features of images without augmentation
NOT_IN_PROBES = {'layer_decay', 'lr_div', 'drop_path'}


def _facts(frame: pd.DataFrame) -> dict:
    "Return the numbers and SHA-256 of a table's rows: see `Run.table_facts`"
    columns = dict(ids=frame.id_code, grades=frame.diagnosis, targets=frame.get('target', frame.diagnosis),
                   folds=frame.fold, pixels=frame.get('pixel_sha256', frame.path))
    by_grade = [int((frame.diagnosis == grade).sum()) for grade in range(GRADES)]
    return dict(images=len(frame), by_grade=by_grade, **{name: digest(o.tolist()) for name, o in columns.items()})


def training_keys(settings: dict) -> dict:
    "Return the keys of a stage, or of its record, that its weights depend on"
    left_out = set(NOT_IN_FINGERPRINT)
    if settings['keep'] == 'kappa': left_out -= {'thresholds'}                 # they choose the epoch
    if not settings.get('balance'): left_out.add('balance')                    # older records lack the key
    if not settings['epochs']: left_out = (left_out | NOT_IN_PROBES) - {'tta'}           # a probe trains on these views
    return {k: v for k, v in settings.items() if k not in left_out}


def training_settings(stage: Stage) -> dict:
    "Return what a stage's fingerprint says of its keys"
    settings = training_keys(asdict(stage))
    if stage.init: settings['weights'] = ''                                    # not used
    if stage.weights_file: settings['weights'] = 'file'                        # by its content: `Run.changed_weights`
    return settings


@cache
def _hash_of_state(file: str, size: int, mtime: int) -> str: return file_hash(file)


def hash_once(file: str) -> str:
    "Return the SHA-256 of a file, which is read once in a process unless its size or modification time changes"
    stat = Path(file).stat()
    return _hash_of_state(str(Path(file).resolve()), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _parse_preds(content: bytes) -> pd.DataFrame:
    "Return the rows of a preds.csv, parsed once in a process: an `all` needs them dozens of times. Do not change them"
    return pd.read_csv(BytesIO(content), dtype=dict(id_code=str))


def _fingerprint_of(file: Path) -> str:
    "Return the fingerprint in a record of a stage that the recipe lacks; empty if it is damaged or of an older version"
    try: return (read_record(file) or {}).get('fingerprint', '')
    except AptosError: return ''


class RecordError(AptosError):
    "A run folder lacks what a command needs: the message names the file and what to run."


@dataclass
class Run:
    "One recipe on its tables (`frames`, by name), under `root` = <runs>/<recipe name>"
    recipe: Recipe
    data: Path
    root: Path
    frames: dict[str, pd.DataFrame] = field(repr=False)
    left_out: str = ''                       # which optional tables and stages are left out, and why
    ungradable: dict[str, int] = field(default_factory=dict)      # table -> its images that readers called ungradable
    shared: dict[tuple[str, int], Path] = field(default_factory=dict, repr=False)    # (stage, fold) -> of another run

    @cached_property
    def synthetic(self) -> bool:
        "True if images of a table are generated: the demo, or the folder that `demo` wrote given as --data"
        paths = (path for frame in self.frames.values() if 'path' in frame for path in frame.path)
        return bool(self.recipe.demo) or holds_demo_images(paths)

    @property
    def store(self) -> Path:
        "Folder of prepared images, shared by all runs beside this one"
        return self.root.parent / 'prepared'

    @property
    def prep(self) -> Prep:
        "How images are prepared, at the largest size"
        return get_prep(self.recipe)

    def prep_of(self, stage: Stage) -> Prep:
        "How the images that a stage reads are prepared"
        return replace(self.prep, size=self.recipe.images.size or stage.size)

    def prepared_record(self, table: str) -> pd.DataFrame:
        "Return prepared.csv of a table at the largest size. Raises `RecordError` if it is not there"
        folder = store_folder(self.frames[table], self.store, self.prep)
        record = read_prepared(folder)
        if record is None: raise RecordError(f'{folder}: has no prepared images of {table}. Run `prepare` again.')
        return record

    @property
    def relabels(self) -> dict[str, Relabels]:
        "The decisions of readers that replace grades, of each table that has any"
        tables = [t for t in self.recipe.used_tables if t.relabels]
        return {t.name: read_relabels(t, find_folder(t, self.data)) for t in tables}

    def fold_dir(self, stage: str, fold: int) -> Path:
        """Return the folder of a fold of a stage.

        Of a renamed stage it is the one that it was trained in until that is moved; of a fold that another run has
        finished (`pipeline.share`) that of the other run until it is copied.
        """
        if (stage, fold) in self.shared: return self.shared[stage, fold]
        return self.root / self.renamed.get(stage, stage) / f'fold{fold}'

    @cached_property
    def renamed(self) -> dict[str, str]:
        """Stage -> the name under which it was trained: a stage without a folder, of the fingerprint that a finished
        fold has in the folder of a stage that the recipe no longer has.
        """
        new = [name for name in self.recipe.stages if not (self.root / name).exists()]
        old = [f for f in sorted(self.root.glob(f'*/fold*/{FINISHED}')) if f.parts[-3] not in self.recipe.stages]
        if not new or not old: return {}
        trained = {(_fingerprint_of(f), f.parts[-2]): f.parts[-3] for f in old}
        found: dict[str, str] = {}
        for name in new:
            folds = range(self.recipe.stages[name].folds)
            folders = [trained.get((self.fingerprint(name, k), f'fold{k}')) for k in folds]
            folder = next((f for f in folders if f and f not in found.values()), None)
            if folder: found[name] = folder
        return found

    def label_dir(self, node: str, table: str) -> Path:
        "Return the folder of the pseudo-labels of `table` by a stage or ensemble"
        return self.root / 'labels' / node / table

    def scores_file(self, stage: str, fold: int, table: str, tta: str) -> Path:
        "Return the file of a fold's scores of a table, each kind of test-time augmentation in a file of its own"
        return self.fold_dir(stage, fold) / f'scores_{table}_{tta}.csv'

    def training_part(self, stage: Stage, table: str, fold: int) -> pd.Series:
        """Return which images of a table of `train` train a fold of a stage, as a mask.

        Images of the fold do not, unless the table is none that validates the stage: of such a table only those are
        left out that share a group (patient, duplicate) with an image of the fold in another graded table, which may
        validate this stage or one that builds on it.
        """
        frame, kept = self.frames[table], ~self.held_out(stage, table)
        if table not in stage.graded_tables or table in stage.validated_tables: return kept & (frame.fold != fold)
        return kept & ~self._shares_group(table, fold, without=[table])

    def left_out_for_others(self, stage: Stage, table: str, fold: int) -> pd.Series:
        """Return which images of a table `training_part` leaves out only because of tables that the stage does not
        train on or that do not validate it, as a mask: what else is left out follows from the tables of `train`.
        """
        if table in stage.graded_tables and table not in stage.validated_tables:
            return self._shares_group(table, fold, without=stage.graded_tables)
        return pd.Series(False, self.frames[table].index)

    def _shares_group(self, table: str, fold: int, without: Collection[str]) -> pd.Series:
        "Return which images of a table share a group with an image of the fold in a graded table not in `without`"
        groups = [o.group[o.fold == fold] for name, o in self.frames.items()
                  if name not in without and self.recipe.tables[name].graded]
        return self.frames[table].group.isin(pd.concat(groups) if groups else [])

    def validation_part(self, stage: Stage, table: str, fold: int) -> pd.Series:
        "Return which images of a graded table of `train` validate a fold of a stage, as a mask"
        frame = self.frames[table]
        if table not in stage.validated_tables: return pd.Series(False, frame.index)
        return (frame.fold == fold) & ~self.held_out(stage, table)

    def validation_images(self, stage: str, fold: int) -> pd.DataFrame:
        "Return the rows of the images that validate a fold of a stage, one table after the other"
        s = self.recipe.stages[stage]
        parts = [self.frames[table][self.validation_part(s, table, fold)] for table in s.validated_tables]
        return pd.concat(parts, ignore_index=True)

    def held_out(self, stage: Stage, table: str) -> pd.Series:
        """Return which images of a table a stage may not see in any fold, as a mask.

        One fold of it serves all folds of stages that build on it: these images share a group (patient, duplicate) with
        one that validates such a stage.
        """
        groups = [self.frames[name].group for name in self.recipe.held_out_tables(stage.name) if name in self.frames]
        return self.frames[table].group.isin(pd.concat(groups) if groups else [])

    def folds_of(self, node: str) -> range:
        "Return the folds of a stage, or those that all members of an ensemble have"
        return range(self.recipe.folds_of(node))

    def parent_fold(self, node: str, fold: int) -> int:
        "Return the fold of a parent that a fold of a stage builds on: the same one, or the only one of the parent"
        return min(fold, self.recipe.folds_of(node) - 1)

    # What is finished

    def record(self, stage: str, fold: int) -> dict | None:
        "Return the record of a fold, or None if it is not finished"
        return read_record(self.fold_dir(stage, fold) / FINISHED)

    def finished_record(self, stage: str, fold: int) -> dict:
        "Return the record of a fold. Raises `RecordError` if it is not finished"
        record = self.record(stage, fold)
        if not record: raise RecordError(f'{self.fold_dir(stage, fold)}: not finished. Run `train {stage}` first.')
        return record

    def verified_file(self, stage: str, fold: int, file: str) -> Path:
        "Return the path of a file of a finished fold. Raises `AptosError` if its SHA-256 is not the recorded one"
        record, path = self.finished_record(stage, fold), self.fold_dir(stage, fold) / file
        if is_trusted(path): return path
        what_to_do = f'Delete {path.parent} and run again'
        if file == EXPORT: what_to_do += f', or add --trust {path} if you wrote it'
        return verify_file(path, record['files'][file]['sha256'], f'{what_to_do}.')

    @cached_property
    def table_facts(self) -> dict[str, dict]:
        """What determines the images and grades of each table, apart from its name and its ids' files.

        `images` and `by_grade` are numbers, the others SHA-256: of the ids, grades, targets (grades to train towards,
        which differ for duplicates), folds and pixels, in the order of the rows.
        """
        return {name: _facts(frame) for name, frame in self.frames.items()}

    @cached_property
    def table_hashes(self) -> dict[str, str]:
        "SHA-256 of each table's ids, grades, folds and pixels"
        return {name: digest(facts) for name, facts in self.table_facts.items()}

    def inputs(self, stage: str, fold: int) -> dict:
        """Return all that determines a fold's weights: its settings and tables, and the fingerprints of its parents.

        Names of stages and tables are no part of it, so a renamed one is the same. Neither is the precision: see
        `finished`.
        """
        r, s = self.recipe, self.recipe.stages[stage]
        return dict(
            settings=training_settings(s), augment=asdict(r.augment) if s.epochs else {}, prep=asdict(self.prep_of(s)),
            seed=s.seed, fold=fold,
            init=self.fingerprint(s.init, self.parent_fold(s.init, fold)) if s.init else '',
            train=[self._source(s, teacher, table, fold) for teacher, table in s.sources])

    def _source(self, stage: Stage, teacher: str, table: str, fold: int) -> dict:
        "Return what determines the images and labels of one entry of `train`"
        facts = dict(self.table_facts[table], validates=table in stage.validated_tables)
        held_out = self.held_out(stage, table)
        if stage.balance: facts['balance'] = digest(self.frames[table][stage.balance].tolist())
        if held_out.any(): facts['held_out'] = digest(self.frames[table].id_code[held_out].tolist())
        left_out = self.left_out_for_others(stage, table, fold)
        if left_out.any(): facts['left_out'] = digest(self.frames[table].id_code[left_out].tolist())
        if not teacher: return dict(facts, teacher='')
        thresholds = self.label_thresholds(teacher) if stage.labels == 'hard' else ''
        fitted = stage.labels == 'hard' or self.recipe.is_fitted(teacher)
        return dict(facts, teacher=self.fingerprint(teacher, self.parent_fold(teacher, fold)), labels=stage.labels,
                    thresholds=thresholds, **self.label_views(teacher, fitted))

    def label_views(self, node: str, fitted: bool) -> dict[str, list[str]]:
        """Return the views of the networks that label: `views` of the images, `fit_views` those of validation images.

        The latter count if they differ, and thresholds or weights that are `fitted` to them enter the labels.
        """
        stages = [self.recipe.stages[m] for m in self.recipe.members(node)]
        views, validated = [s.label_views for s in stages], [s.tta for s in stages]
        return dict(views=views, fit_views=validated) if fitted and views != validated else dict(views=views)

    def fingerprint(self, node: str, fold: int) -> str:
        "Return the SHA-256 of all that determines a fold's weights: its own inputs and those of its parents"
        r = self.recipe
        if node in r.stages: return digest(self.inputs(node, fold))
        if r.is_fitted(node):                # the scores of the other folds determine the weights
            return digest([FITTED, fold, [[self.fingerprint(m, k) for k in self.folds_of(node)]
                                          for m in r.members(node)]])
        return digest([[self.fingerprint(m, fold), weight] for m, weight in r.members(node).items()])

    def label_thresholds(self, node: str) -> str:
        "Return the setting of thresholds for hard pseudo-labels: the stage's, or for an ensemble that of [submit]"
        stage = self.recipe.stages.get(node)
        return stage.thresholds if stage else self.recipe.submit.thresholds

    def weight_hashes(self, node: str) -> dict[str, str]:
        "Return STAGE/foldK -> SHA-256 of its weights, for each network of a stage or ensemble"
        return self._hashes_of(node, WEIGHTS)

    def score_hashes(self, node: str) -> dict[str, str]:
        "Return STAGE/foldK -> SHA-256 of its validation scores, for each network of a stage or ensemble"
        return self._hashes_of(node, PREDS)

    def _hashes_of(self, node: str, file: str) -> dict[str, str]:
        return {f'{m}/fold{k}': self.finished_record(m, k)['files'][file]['sha256']
                for m in self.recipe.members(node) for k in self.folds_of(node)}

    def parent_weight_hashes(self, stage: str, fold: int) -> dict[str, str]:
        "Return the SHA-256 of the weights of each network that determines a fold's weights, by `parent_networks`"
        return {name: self.finished_record(m, k)['files'][WEIGHTS]['sha256']
                for name, (m, k) in self.parent_networks(stage, fold).items()}

    def parent_networks(self, stage: str, fold: int) -> dict[str, tuple[str, int]]:
        """Return the networks that determine the weights of a fold of a stage: name in its record -> (stage, fold).

        They are those of `parent_folds`, by the name of the stage, and of teachers with fitted weights the networks of
        the other folds, whose scores determine these weights, as STAGE/foldK.
        """
        r, own = self.recipe, self.parent_folds(stage, fold)
        found = {m: (m, k) for m, k in own.items()}
        for teacher in filter(r.is_fitted, r.stages[stage].parents):
            found |= {f'{m}/fold{k}': (m, k) for m in r.members(teacher) for k in self.folds_of(teacher) if k != own[m]}
        return found

    def parent_folds(self, stage: str, fold: int) -> dict[str, int]:
        "Return the parents of a fold of a stage, ensembles replaced by their members: stage -> its fold"
        return {m: self.parent_fold(parent, fold) for parent in self.recipe.stages[stage].parents
                for m in self.recipe.members(parent)}

    def finished(self, stage: str, fold: int) -> bool:
        """Return whether the weights of a fold are up to date; `outdated` says whether the rest of its folder is.

        Its fingerprint is the current one, it was trained in the precision that the recipe asks for (any, if `auto`),
        its files have the recorded sizes, and its parents still have the weights that it was trained from.
        """
        record = self.record(stage, fold)
        if not record or self.has_changed(stage, fold): return False
        if self.damaged_files(stage, fold) - RESCORED: return False
        return sorted(record['parents'].values()) == sorted(self._weights_of_parents(stage, fold))

    def has_changed(self, stage: str, fold: int) -> bool:
        "Return whether a fold is finished, but with other settings, images, precision or initial weights than now"
        record = self.record(stage, fold)
        if not record: return False
        if record.get('fingerprint') != self.fingerprint(stage, fold): return True
        return bool(self.changed_precision(stage, record) or self.changed_weights(stage, record))

    def changed_precision(self, stage: str, record: dict) -> str:
        "Return the precision that a stage asks for if the recorded one is another; `auto` is f32 for a linear probe"
        s = self.recipe.stages[stage]
        asked = 'f32' if s.precision == 'auto' and not s.epochs else s.precision
        return asked if asked not in ('auto', record['precision']) else ''

    def changed_weights(self, stage: str, record: dict) -> str:
        """Return the file of initial weights if it is another one than the recorded one.

        It is compared by content, so that it may be moved. A finished fold does not need its file: if the recorded one
        is no longer there, that is no reason to train again.
        """
        file = self.recipe.stages[stage].weights_file
        if not file: return ''
        if file not in self.file_hashes: return file if file != record['settings']['weights'] else ''
        return file if self.file_hashes[file] != (record.get('loaded') or {}).get('sha256') else ''

    @cached_property
    def file_hashes(self) -> dict[str, str]:
        "SHA-256 of each file of initial weights that is there"
        files = {s.weights_file for s in self.recipe.stages.values()}
        return {file: hash_once(file) for file in files if file and Path(file).is_file()}

    def damaged_files(self, stage: str, fold: int) -> set[str]:
        "Return the files of a finished fold that are missing or have another size than its record says"
        files, folder = self.finished_record(stage, fold)['files'], self.fold_dir(stage, fold)

        def is_damaged(file: str) -> bool:
            path = folder / file
            return file not in files or not path.is_file() or path.stat().st_size != files[file]['bytes']
        return {file for file in {*FOLD_FILES, *files} if is_damaged(file)}

    def _weights_of_parents(self, stage: str, fold: int) -> list[str]:
        "Return the SHA-256 of the weights of each parent that is finished"
        records = [self.record(m, k) for m, k in self.parent_networks(stage, fold).values()]
        return [r['files'][WEIGHTS]['sha256'] for r in records if r]

    def outdated(self, stage: str, fold: int) -> str:
        """Return what of a fold with finished weights is to be made again without a training; empty: nothing.

        'scores' are those of its validation images, with other views or missing; 'record' are names and keys that
        change neither weights nor scores.
        """
        record, s = self.finished_record(stage, fold), self.recipe.stages[stage]
        if record['settings']['tta'] != s.tta or RESCORED & self.damaged_files(stage, fold): return 'scores'
        if 'trained_on' not in record: return 'record'                         # of an older version
        recorded = [record['stage'], sorted(record['parents']), record['settings'], record['gate']]
        gate = dict(asdict(self.recipe.gate), rules=record['gate']['rules'])
        now = [stage, sorted(self.parent_networks(stage, fold)), self.settings_to_record(stage, record), gate]
        return '' if digest(recorded) == digest(now) else 'record'

    def settings_to_record(self, stage: str, record: dict) -> dict:
        "Return the keys of a finished stage for its record; `weights`, if `init` is used instead, are as recorded"
        s = self.recipe.stages[stage]
        return dict(asdict(s), weights=record['settings']['weights'] if s.init else s.weights)

    def to_refresh(self, todo: dict[str, list[int]], nodes: Iterable[str] | None = None) -> dict[str, list[int]]:
        "Return the folds of each stage that need no training (`todo` does) but are `outdated`; of `nodes`, or of all"
        found = {name: [k for k in range(s.folds) if k not in todo.get(name, []) and self.outdated(name, k)]
                 for name, s in self.recipe.stages.items() if nodes is None or name in nodes}
        return {name: folds for name, folds in found.items() if folds}

    def todo(self, nodes: Iterable[str] | None = None) -> dict[str, list[int]]:
        """Return the folds to train of each unfinished stage, parents first; of the stages in `nodes`, or of all.

        A fold runs again if one of its parents does.
        """
        todo: dict[str, list[int]] = {}
        for name in self.recipe.order:
            if name not in self.recipe.stages or (nodes is not None and name not in nodes): continue
            folds = [k for k in range(self.recipe.stages[name].folds)
                     if any(n in todo.get(m, []) for m, n in self.parent_networks(name, k).values())
                     or not self.finished(name, k)]
            if folds: todo[name] = folds
        return todo

    def ancestors(self, node: str) -> set[str]:
        "Return `node` and every stage and ensemble that it depends on"
        return {node}.union(*(self.ancestors(parent) for parent in self.recipe.nodes[node].parents))

    # Out-of-fold scores and thresholds

    def oof(self, node: str, fold: int | None = None) -> pd.DataFrame:
        """Return the out-of-fold scores of a stage or ensemble: columns id_code, source, diagnosis, fold, score.

        Fitted weights of an ensemble are cross-fitted: those of each part (`parts`) are fitted on the other parts. With
        `fold`, the scores of that fold's validation images only. Raises `RecordError`, and `ConfigError` for a name or
        fold that the recipe lacks.
        """
        require_name(self.recipe, node, self.recipe.nodes)
        if fold is not None: check_fold(fold, len(self.folds_of(node)), node)
        if not self.recipe.is_fitted(node):
            members = self._member_scores(node, self.folds_of(node) if fold is None else [fold])
            return self._mean(members, self.recipe.members(node))
        members = self._member_scores(node, self.folds_of(node))
        rows, scores = next(iter(members.values())), np.stack([o.score for o in members.values()], 1)
        weights = cross_fitted_weights(scores, rows.diagnosis, self.parts(rows))
        oof = self._mean(members, dict(zip(members, weights.T, strict=True)))
        return oof if fold is None else oof[oof.fold == fold].reset_index(drop=True)

    def member_weights(self, node: str, without: int | None = None) -> dict[str, float]:
        """Return the members of a stage or ensemble that have a weight above 0, with weights that add up to 1.

        Fitted weights are fitted on the out-of-fold scores of all folds. With `without`, those of that fold are left
        out, unless there are no others. Raises `RecordError`.
        """
        weights = self.recipe.members(node)
        if self.recipe.is_fitted(node):
            folds = self.folds_of(node)
            members = self._member_scores(node, [k for k in folds if k != without] or folds)
            scores, grades = [o.score for o in members.values()], next(iter(members.values())).diagnosis
            weights = dict(zip(members, fit_weights(np.stack(scores, 1), grades).tolist(), strict=True))
        return {m: w for m, w in weights.items() if w}

    def _member_scores(self, node: str, folds: Iterable[int]) -> dict[str, pd.DataFrame]:
        "Return `_validation_scores` of each member of a stage or ensemble, in the order of the first one's images"
        keys = ['source', 'id_code', 'fold']
        found = {m: self._validation_scores(m, folds) for m in self.recipe.members(node)}
        images = next(iter(found.values()))[keys]
        for m, df in found.items():
            found[m] = images.merge(df, on=keys)[df.columns]
            if len(found[m]) == len(df) == len(images): continue
            raise RecordError(f'[ensemble.{node}]: {m} was validated on other images than the other members. '
                              'Train all members on the same tables.')
        return found

    def _mean(self, members: dict[str, pd.DataFrame], weights: Mapping[str, float | np.ndarray]) -> pd.DataFrame:
        "Return the rows of `_member_scores` with the weighted mean of the scores"
        rows = next(iter(members.values())).drop(columns='feature_distance')
        return rows.assign(score=sum(w * members[m].score for m, w in weights.items()))

    def out_of_fold_distances(self, node: str) -> np.ndarray:
        "Return the feature distance of each row of `oof`: the mean over members, each in its own unit"
        members = self._member_scores(node, self.folds_of(node))
        return np.sum([weight / self.distance_unit(m) * members[m].feature_distance
                       for m, weight in self.member_weights(node).items()], 0)

    def distance_unit(self, stage: str) -> float:
        """Return the feature distance that is exceeded by at most the fraction `reject` of a stage's validation images.

        Divide by it before you compare or average the distances of different networks.
        """
        distances = self._validation_scores(stage, self.folds_of(stage)).feature_distance
        return upper_quantile(distances, self.recipe.gate.reject)

    def _validation_scores(self, stage: str, folds: Iterable[int]) -> pd.DataFrame:
        "Return the rows of preds.csv of some folds of a stage"
        files = [self.verified_file(stage, k, PREDS) for k in folds]
        df = pd.concat([_parse_preds(f.read_bytes()) for f in files], ignore_index=True)
        bad = (~np.isfinite(df.score)).sum()
        if bad:
            raise RecordError(f'{self.root / stage}: {bad} of {len(df)} validation scores are not finite numbers. '
                              'Delete this folder and train with a lower lr.')
        return df

    def thresholds(self, node: str, how: str, without: int | None = None) -> np.ndarray:
        """Return the four thresholds of a setting: fixed numbers, or fitted to out-of-fold scores.

        With `without`, the images of that fold are left out, unless there are no others. Raises `RecordError`.
        """
        return self.fitted_thresholds(node, how, without)[0]

    def fitted_thresholds(self, node: str, how: str, without: int | None = None) -> tuple[np.ndarray, str]:
        """Return `thresholds` and an empty text; the midpoints and the reason if no thresholds can be fitted.

        Raises `RecordError`.
        """
        fixed = parse_thresholds(how)
        if fixed: return np.array(fixed), ''
        others = [k for k in self.folds_of(node) if k != without]
        if without is None or not others: oof = self.oof(node)
        else: oof = self._mean(self._member_scores(node, others), self.member_weights(node, without))
        try: return thresholds_or_midpoints(how, oof.score, oof.diagnosis)
        except AptosError as e: raise RecordError(f'{self.root / node}: {e}. Train with a lower lr.') from None

    def parts(self, oof: pd.DataFrame) -> np.ndarray:
        """Return a part for each out-of-fold image; the thresholds of each part are fitted on the other parts.

        The parts are the folds; with fewer than three folds, five parts that keep patients together.
        """
        if oof.fold.nunique() > 2: return oof.fold.to_numpy()
        return stratified_group_parts(oof.diagnosis, self.groups(oof))

    def groups(self, oof: pd.DataFrame) -> np.ndarray:
        "Return the group (patient, block of ids, or the image alone; with its duplicates) of each out-of-fold image"
        groups = pd.concat(self.frames.values()).set_index(['source', 'id_code']).group
        return groups.loc[list(zip(oof.source, oof.id_code, strict=True))].to_numpy()

    def grouped_by(self, oof: pd.DataFrame) -> str:
        "Return what `groups` are: patients, blocks of N ids, images; joined by ' and ' where tables differ"
        sources = set(oof.source)
        kinds = [table.grouped_by for name, table in self.recipe.tables.items() if name in sources]
        return ' and '.join(dict.fromkeys(kinds))
