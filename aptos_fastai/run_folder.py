"The run folder: its paths, which stages are finished, and the files they wrote. Imports no torch."
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from aptos_fastai.common.io import AptosError, digest, is_trusted, read_record, verify_file
from aptos_fastai.data.relabels import Relabels, read_relabels
from aptos_fastai.data.retina import Prep, get_prep
from aptos_fastai.data.tables import find_folder
from aptos_fastai.metrics import stratified_group_parts, thresholds_or_midpoints, upper_quantile
from aptos_fastai.recipe import Recipe, Stage, parse_thresholds

FINISHED = 'stage.json'                      # a fold's record, written last: its presence means finished
EXPORT = 'learner.pkl'
WEIGHTS = 'weights.safetensors'
PREDS = 'preds.csv'                          # validation scores
HISTORY = 'history.csv'
FEATURES = 'features.safetensors'            # how the network's features of the training images are distributed
FOLD_FILES = EXPORT, WEIGHTS, PREDS, HISTORY, FEATURES

# Keys of a stage that do not change its weights; `init` and `train` enter as the fingerprints of what they name
NOT_IN_FINGERPRINT = {'name', 'folds', 'workers', 'compile', 'track', 'init', 'train', 'thresholds'}


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

    @property
    def store(self) -> Path:
        "Folder of prepared images, shared by all runs beside this one"
        return self.root.parent / 'prepared'

    @property
    def prep(self) -> Prep:
        "How images are prepared"
        return get_prep(self.recipe)

    @property
    def relabels(self) -> dict[str, Relabels]:
        "The decisions of readers that replace grades, of each table that has any"
        tables = [t for t in self.recipe.used_tables if t.relabels]
        return {t.name: read_relabels(t, find_folder(t, self.data)) for t in tables}

    def fold_dir(self, stage: str, fold: int) -> Path:
        "Return the folder of a fold of a stage"
        return self.root / stage / f'fold{fold}'

    def label_dir(self, node: str, table: str) -> Path:
        "Return the folder of the pseudo-labels of `table` by a stage or ensemble"
        return self.root / 'labels' / node / table

    def training_part(self, stage: Stage, table: str, fold: int) -> pd.Series:
        """Return which images of a table of `train` train a fold of a stage, as a mask.

        Images of the fold do not, unless the table is none that validates the stage: of such a table only those are
        left out that share a group (patient, duplicate) with an image of the fold in another graded table, which may
        validate this stage or one that builds on it.
        """
        frame = self.frames[table]
        if table not in stage.graded_tables or table in stage.validated_tables: return frame.fold != fold
        others = [o for name, o in self.frames.items() if name != table and self.recipe.tables[name].graded]
        return ~frame.group.isin(pd.concat([o.group[o.fold == fold] for o in others]))

    def folds_of(self, node: str) -> range:
        "Return the folds of a stage, or those that all members of an ensemble have"
        return range(min(self.recipe.stages[m].folds for m in self.recipe.members(node)))

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
    def table_hashes(self) -> dict[str, str]:
        "SHA-256 of each table's ids, grades, folds and pixels"
        def contents(df: pd.DataFrame) -> list[list]:
            grades, pixels = df.get('target', df.diagnosis), df.get('pixel_sha256', df.path)
            return [column.tolist() for column in (df.id_code, df.diagnosis, df.fold, grades, pixels)]
        return {name: digest(contents(df)) for name, df in self.frames.items()}

    def fingerprint(self, node: str, fold: int) -> str:
        "Return the SHA-256 of all that determines a fold's weights: its settings and tables, and those of its parents"
        r = self.recipe
        if node in r.ensembles:
            members = {m: [self.fingerprint(m, fold), weight] for m, weight in r.members(node).items()}
            return digest([node, members])
        s = r.stages[node]
        settings = {k: v for k, v in asdict(s).items() if k not in NOT_IN_FINGERPRINT}
        if s.keep == 'kappa': settings['thresholds'] = s.thresholds            # they choose the epoch
        return digest(dict(
            settings=settings, augment=asdict(r.augment), prep=asdict(self.prep), seed=r.seed, fold=fold,
            init=self.fingerprint(s.init, fold) if s.init else '',
            train=[self._source_fingerprint(s, teacher, table, fold) for teacher, table in s.sources]))

    def _source_fingerprint(self, stage: Stage, teacher: str, table: str, fold: int) -> list:
        "Return what determines the images and labels of one entry of `train`"
        if not teacher: return ['', '', self.table_hashes[table]]
        thresholds = self.label_thresholds(teacher) if stage.labels == 'hard' else False
        return [self.fingerprint(teacher, fold), thresholds, self.table_hashes[table]]

    def label_thresholds(self, node: str) -> str:
        "Return the setting of thresholds for hard pseudo-labels: the stage's, or for an ensemble that of [submit]"
        stage = self.recipe.stages.get(node)
        return stage.thresholds if stage else self.recipe.submit.thresholds

    def weight_hashes(self, node: str) -> dict[str, str]:
        "Return STAGE/foldK -> SHA-256 of its weights, for each network of a stage or ensemble"
        return {f'{m}/fold{k}': self.finished_record(m, k)['files'][WEIGHTS]['sha256']
                for m in self.recipe.members(node) for k in self.folds_of(node)}

    def parent_weight_hashes(self, stage: str, fold: int) -> dict[str, str]:
        "Return the SHA-256 of the weights of each parent stage"
        return {m: self.finished_record(m, fold)['files'][WEIGHTS]['sha256'] for m in self._parent_stages(stage)}

    def _parent_stages(self, stage: str) -> list[str]:
        "Return the parents of a stage, with each ensemble replaced by its members"
        return [m for parent in self.recipe.stages[stage].parents for m in self.recipe.members(parent)]

    def finished(self, stage: str, fold: int) -> bool:
        """Return whether a fold is finished and up to date.

        Its fingerprint is the current one, its files have the recorded sizes, and its parents still have the weights
        that it was trained from.
        """
        record = self.record(stage, fold)
        if not record or record.get('fingerprint') != self.fingerprint(stage, fold): return False
        if not set(FOLD_FILES) <= set(record['files']): return False           # of an older version
        for file, recorded in record['files'].items():
            path = self.fold_dir(stage, fold) / file
            if not path.is_file() or path.stat().st_size != recorded['bytes']: return False
        for m in self._parent_stages(stage):
            parent = self.record(m, fold)
            if not parent or record['parents'].get(m) != parent['files'][WEIGHTS]['sha256']: return False
        return True

    def todo(self, nodes: Iterable[str] | None = None) -> dict[str, list[int]]:
        """Return the folds to train of each unfinished stage, parents first; of the stages in `nodes`, or of all.

        A fold runs again if one of its parents does.
        """
        todo: dict[str, list[int]] = {}
        for name in self.recipe.order:
            if name not in self.recipe.stages or (nodes is not None and name not in nodes): continue
            parents = self._parent_stages(name)
            folds = [k for k in range(self.recipe.stages[name].folds)
                     if any(k in todo.get(m, []) for m in parents) or not self.finished(name, k)]
            if folds: todo[name] = folds
        return todo

    def ancestors(self, node: str) -> set[str]:
        "Return `node` and every stage and ensemble that it depends on"
        return {node}.union(*(self.ancestors(parent) for parent in self.recipe.nodes[node].parents))

    # Out-of-fold scores and thresholds

    def oof(self, node: str, fold: int | None = None) -> pd.DataFrame:
        """Return the out-of-fold scores of a stage or ensemble: columns id_code, source, diagnosis, fold, score.

        With `fold`, the scores of that fold's validation images only. Raises `RecordError`.
        """
        folds = self.folds_of(node) if fold is None else [fold]
        mean = None
        for m, weight in self.recipe.members(node).items():
            df = self._validation_scores(m, folds)
            if mean is None:
                mean = df.assign(score=weight * df.score)
                continue
            if not (mean.id_code.equals(df.id_code) and mean.source.equals(df.source)):
                raise RecordError(f'[ensemble.{node}]: {m} was validated on other images than the other members. '
                                  'Train all members on the same tables.')
            mean['score'] += weight * df.score
        assert mean is not None
        return mean.drop(columns='feature_distance')

    def out_of_fold_distances(self, node: str) -> np.ndarray:
        "Return the feature distance of each row of `oof`: the mean over members, each in its own unit"
        parts = [weight / self.distance_unit(m) * self._validation_scores(m, self.folds_of(node)).feature_distance
                 for m, weight in self.recipe.members(node).items()]
        return np.sum(parts, 0)

    def distance_unit(self, stage: str) -> float:
        """Return the feature distance that is exceeded by at most the fraction `reject` of a stage's validation images.

        Divide by it before you compare or average the distances of different networks.
        """
        distances = self._validation_scores(stage, self.folds_of(stage)).feature_distance
        return upper_quantile(distances, self.recipe.gate.reject)

    def _validation_scores(self, stage: str, folds: Iterable[int]) -> pd.DataFrame:
        "Return the rows of preds.csv of some folds of a stage"
        files = [self.verified_file(stage, k, PREDS) for k in folds]
        df = pd.concat([pd.read_csv(f, dtype=dict(id_code=str)) for f in files], ignore_index=True)
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
        oof = self.oof(node)
        others = oof[oof.fold != without]
        if len(others): oof = others
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
