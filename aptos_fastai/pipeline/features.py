"Features that the frozen body of a linear probe gives: computed once for each image and view, and kept in the store."
import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import torch
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from safetensors.torch import load_file, save

from aptos_fastai.common.console import Bars, say
from aptos_fastai.common.distributed import all_gather, rank
from aptos_fastai.common.io import AptosError, digest, file_hash, read_record, write_bytes, write_record
from aptos_fastai.data.store import column_of
from aptos_fastai.inference.gate import FeatureDistance
from aptos_fastai.inference.views import VIEWS
from aptos_fastai.pipeline.scores import predict_view_features
from aptos_fastai.recipe.sections import Stage
from aptos_fastai.run_folder import Run
from aptos_fastai.training.precision import Autocast
from aptos_fastai.training.probe import FeatureRows, feature_dls, probe_learner

FEATURES_FOLDER = 'features'                 # in the store
_named: WeakKeyDictionary[Bars, set[Path]] = WeakKeyDictionary()      # files that a command has printed already


@dataclass
class FrozenFeatures:
    "Pooled features (n, views, C) of tables, with their ids, by the name of the table, and the seconds that they took"
    tables: dict[str, tuple[pd.Index, np.ndarray]]
    seconds: float

    def of(self, images: pd.DataFrame) -> np.ndarray:
        "Return the features (n, views, C) of images (columns id_code and source: TABLE or TEACHER:TABLE)"
        tables = images.source.str.rpartition(':')[2].to_numpy()
        rows = {name: features[ids.get_indexer(images.id_code[tables == name])]
                for name, (ids, features) in self.tables.items()}
        found = np.empty((len(images), *next(iter(rows.values())).shape[1:]), np.float32)
        for name, features in rows.items(): found[tables == name] = features
        return found

    @torch.no_grad()
    def scores(self, learn: Learner, images: pd.DataFrame, distance: FeatureDistance) -> tuple[np.ndarray, np.ndarray]:
        "Return what `predict_views` does: scores (n, views) and feature distances (n,)"
        features = self.of(images)
        head = learn.model[1].eval().cpu()
        scores = [head.scores(torch.from_numpy(features[:, i])).float().numpy() for i in range(features.shape[1])]
        return np.stack(scores, 1), distance.distances(features[:, 0])


def frozen_features(run: Run, stage: Stage, learn: Learner, precision: str, bars: Bars) -> FrozenFeatures:
    "Return the features of a stage's tables by the body of `learn`, in `precision`; every process calls this"
    start = time.monotonic()
    learn.model.to(learn.dls.device)
    network = network_digest(run, stage, learn, precision)
    with body_in(precision, learn):
        tables = {table: (pd.Index(run.frames[table].id_code), table_features(run, stage, table, learn, network, bars))
                  for table in dict.fromkeys(table for _, table in stage.sources)}
    return FrozenFeatures(tables, time.monotonic() - start)


@contextmanager
def body_in(precision: str, learn: Learner) -> Iterator[None]:
    "Let the body of `learn` compute in a precision"
    autocast = Autocast(precision) if precision != 'f32' else None
    with learn.added_cbs(autocast):
        if autocast: autocast.before_fit()
        try: yield
        finally:
            if autocast: autocast.after_fit()


def network_digest(run: Run, stage: Stage, learn: Learner, precision: str) -> str:
    "Return the SHA-256 of all that determines the features of an image, besides the image: weights, sizes, views"
    sha = hashlib.sha256()
    for name, tensor in learn.model.state_dict().items():
        if name.startswith('1.3.'): continue                     # the output units, which train
        sha.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    normalize = next(t for t in learn.dls.train.after_batch.fs if isinstance(t, Normalize))
    stats = [o.flatten().tolist() for o in (normalize.mean, normalize.std)]
    return digest([sha.hexdigest(), stage.arch, learn.model[1].pooling, stage.size, stats, asdict(run.prep_of(stage)),
                   stage.tta, precision])


def table_features(run: Run, stage: Stage, table: str, learn: Learner, network: str, bars: Bars) -> np.ndarray:
    "Return the features (n, views, C) of a table's images, from the store or computed and kept there"
    frame = run.frames[table]
    squares = frame[column_of(frame.columns, run.prep_of(stage).size)]
    key = digest([network, [Path(p).name for p in squares]])
    file = run.store / FEATURES_FOLDER / f'{table}-{key[:16]}.safetensors'
    views, what = VIEWS[stage.tta], f'features of {len(frame)} images x {VIEWS[stage.tta]} views'
    named = _named.setdefault(bars, set())
    stored = read_features(file, (len(frame), views, learn.model[1].channels))
    everywhere = all(all_gather([stored is not None]))
    if everywhere and stored is not None:
        if file not in named: say(f'  {stage.name}: {what} are in {file}')
        named.add(file)
        return stored
    with bars(f'{stage.name}  {what}', len(frame), 'images') as bar:
        features = predict_view_features(learn, frame, stage.tta, bar).reshape(len(frame), views, -1)
    if rank() == 0: write_features(file, features)
    say(f'  {stage.name}: {what} -> {file}')
    named.add(file)
    return features


def write_features(file: Path, features: np.ndarray) -> None:
    "Write features (n, views, C) and, beside them, a record of their SHA-256 and shape"
    write_bytes(file, save(dict(features=torch.from_numpy(features))))
    write_record(file.with_suffix('.json'), dict(sha256=file_hash(file), shape=features.shape))


def read_features(file: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    "Return the features (n, views, C) in `file`, or None if it is missing or not as recorded, which is printed"
    if not file.is_file(): return None
    note = file.with_suffix('.json')
    try: record = read_record(note)
    except AptosError: record = None
    if record == dict(sha256=file_hash(file), shape=list(shape)): return load_file(file)['features'].numpy()
    say(f'  {file}: is not as its record {note.name} says. The features are computed again.', 'yellow')
    return None


def probe(stage: Stage, learn: Learner, features: FrozenFeatures) -> Learner:
    "Return the Learner that trains the head of `learn` on features of its images"
    train, valid = (dl.items for dl in (learn.dls.train, learn.dls.valid))
    train_rows, valid_rows = (FeatureRows(features.of(o), o.diagnosis.to_numpy()) for o in (train, valid))
    weights = train.weight.to_numpy() if stage.draws_by_weight else None
    dls = feature_dls(stage, train_rows, valid_rows, learn.dls.device, learn.dls.path, weights)
    return probe_learner(stage, dls, learn.model[1])
