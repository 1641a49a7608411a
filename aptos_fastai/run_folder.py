"The run folder: where everything is, what was asked for, and what is finished. Imports no torch."
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from aptos_fastai.common.io import AptosError, digest, file_hash, is_trusted, read_record
from aptos_fastai.data.retina import Prep, get_prep
from aptos_fastai.metrics import even_parts, fit_thresholds
from aptos_fastai.recipe import Recipe, parse_thresholds

FINISHED = 'stage.json'                      # written last: its presence means finished
EXPORT, WEIGHTS, PREDS, HISTORY = 'learner.pkl', 'weights.safetensors', 'preds.csv', 'history.csv'


class RecordError(AptosError):
    "A run folder that does not hold what is asked of it: names the file and what to run."


@dataclass
class Run:
    "One recipe on its tables, under `root` = <runs>/<recipe name>"
    recipe: Recipe
    data: Path
    root: Path
    frames: dict[str, pd.DataFrame] = field(repr=False)

    @property
    def store(self) -> Path: return self.root.parent / 'prepared'
    @property
    def prep(self) -> Prep: return get_prep(self.recipe)
    def fold_dir(self, stage: str, fold: int) -> Path: return self.root / stage / f'fold{fold}'
    def label_dir(self, node: str, table: str) -> Path: return self.root / 'labels' / node / table
    def folds_of(self, node: str) -> range: return range(min(self.recipe.stages[m].folds for m in self.recipe.members(node)))

    @cached_property
    def digests(self) -> dict[str, str]:
        "What each table is: ids, grades, folds and pixels"
        return {n: digest([f.id_code.tolist(), f.diagnosis.tolist(), f.fold.tolist(), f.get('target', f.diagnosis).tolist(), f.get('pixel_sha256', f.path).tolist()])
                for n, f in self.frames.items()}

    def fingerprint(self, node: str, fold: int) -> str:
        "Digest of all that a fold of a stage is made from: its settings, its tables, and the same of its parents"
        r, s = self.recipe, self.recipe.stages.get(node)
        if s is None: return digest([node, {m: [self.fingerprint(m, fold), w] for m, w in r.members(node).items()}])
        settings = {k: v for k, v in asdict(s).items() if k not in ('name', 'folds', 'workers', 'compile', 'track', 'init', 'train', 'thresholds')}
        return digest(dict(settings=settings, augment=asdict(r.augment), prep=asdict(self.prep), seed=r.seed, fold=fold,
                           init=s.init and self.fingerprint(s.init, fold),
                           train=[[t and self.fingerprint(t, fold), t and s.labels == 'hard' and self.label_thresholds(t), self.digests[n]]
                                  for t, n in s.sources]))

    def label_thresholds(self, node: str) -> str: return self.recipe.stages[node].thresholds if node in self.recipe.stages else self.recipe.submit.thresholds

    def record(self, stage: str, fold: int) -> dict | None: return read_record(self.fold_dir(stage, fold) / FINISHED)

    def finished(self, stage: str, fold: int) -> bool:
        "True where the folder holds the very stage that is asked for, its files whole in size, its parent's weights those it began with"
        o, s = self.record(stage, fold), self.recipe.stages[stage]
        if not o or o.get('fingerprint') != self.fingerprint(stage, fold): return False
        sizes = {f: v['bytes'] for f, v in o['files'].items()}
        folder = self.fold_dir(stage, fold)
        if any(not (folder / f).is_file() or (folder / f).stat().st_size != n for f, n in sizes.items()): return False
        parents = {m: self.record(m, fold) for p in s.parents for m in self.recipe.members(p)}
        return all(q and o['parents'].get(m) == q['files'][WEIGHTS]['sha256'] for m, q in parents.items())

    def todo(self, nodes: Iterable[str] | None = None) -> dict[str, list[int]]:
        "Stage -> folds that `all` would train, parents first; a stage whose ancestor would run runs too"
        out: dict[str, list[int]] = {}
        for n in self.recipe.order:
            if n not in self.recipe.stages or (nodes is not None and n not in nodes): continue
            s = self.recipe.stages[n]
            above = {m for p in s.parents for m in self.recipe.members(p)}
            ks = [k for k in range(s.folds) if any(k in out.get(m, []) for m in above) or not self.finished(n, k)]
            if ks: out[n] = ks
        return out

    def ancestors(self, node: str) -> set[str]:
        "`node` and everything it is built on"
        return {node}.union(*(self.ancestors(p) for p in self.recipe.nodes[node].parents))

    def verified(self, stage: str, fold: int, file: str) -> Path:
        "The path of a file of a finished fold, its hash as recorded. Raises `RecordError`"
        o, path = self.record(stage, fold), self.fold_dir(stage, fold) / file
        if not o: raise RecordError(f'{path.parent}: is not finished; run `train {stage}` first')
        if not path.is_file(): raise RecordError(f'{path}: is gone; run `train {stage}` again')
        if file_hash(path) != o['files'][file]['sha256'] and not is_trusted(path):
            raise RecordError(f'{path}: is not what this run wrote (its hash differs); delete {path.parent} and run again'
                              + f', or add --trust {path} if it is yours' * (file == EXPORT))
        return path

    def parents_weights(self, stage: str, fold: int) -> dict[str, str]:
        "Hash of the weights of each stage that a fold is built on"
        return {m: self.record(m, fold)['files'][WEIGHTS]['sha256'] for p in self.recipe.stages[stage].parents for m in self.recipe.members(p)}

    def oof(self, node: str, fold: int | None = None) -> pd.DataFrame:
        "Validation scores of a stage or ensemble, id_code, source, diagnosis, fold, score: each from the fold that did not train on it"
        ks = self.folds_of(node) if fold is None else [fold]
        total = None
        for m, w in self.recipe.members(node).items():
            p = pd.concat([pd.read_csv(self.verified(m, k, PREDS), dtype=dict(id_code=str)) for k in ks], ignore_index=True)
            if not np.isfinite(p.score).all():
                bad = (~np.isfinite(p.score)).sum()
                raise RecordError(f'{self.root / m}: {bad} of {len(p)} validation scores are not numbers; delete it and train it with a lower lr')
            if total is None: total = p.assign(score=p.score * w); continue
            if not (total.id_code.equals(p.id_code) and total.source.equals(p.source)):
                raise RecordError(f'[ensemble.{node}]: {m} was validated on other images than the other members')
            total['score'] += w * p.score
        return total

    def thresholds(self, node: str, how: str, without: int | None = None) -> np.ndarray:
        "The thresholds that `how` asks for; optimal ones are fitted on out-of-fold scores, those of fold `without` left out where others remain"
        fixed = parse_thresholds(how)
        if fixed: return np.array(fixed)
        o = self.oof(node)
        rest = o[o.fold != without]
        o = rest if len(rest) else o
        try: thresholds = fit_thresholds(how, o.score, o.diagnosis)
        except AptosError as e: raise RecordError(f'{self.root / node}: {e}; train it longer or at another lr, or set thresholds = .5 1.5 2.5 3.5') from None
        if thresholds[0] == thresholds[-1]:
            raise RecordError(f'{self.root / node}: the best thresholds are all {thresholds[0]:.3g}, only grades 0 and 4 would be given; train it longer, '
                              'or set thresholds = .5 1.5 2.5 3.5')
        return thresholds

    def parts(self, oof: pd.DataFrame) -> np.ndarray:
        "Which images are graded by thresholds fitted on all the others: the folds, or below three of them five parts of patients"
        if oof.fold.nunique() > 2: return oof.fold.to_numpy()
        groups = pd.concat(self.frames.values()).set_index(['source', 'id_code']).group
        return even_parts(oof.diagnosis, groups.loc[list(zip(oof.source, oof.id_code, strict=True))])
