"Score tables with exported learners; average scores over views, folds and members."
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from fastai.learner import Learner
from torch import nn

from aptos_fastai.common.console import Bars
from aptos_fastai.common.distributed import all_gather, run_on_all_ranks, shard, world_size
from aptos_fastai.common.io import digest, file_hash, read_record, write_csv, write_record
from aptos_fastai.inference.gate import FeatureDistance
from aptos_fastai.inference.views import VIEWS, mean_and_sd, view_scores, views
from aptos_fastai.run_folder import EXPORT, FEATURES, WEIGHTS, Run
from aptos_fastai.training.networks import features_and_scores
from aptos_fastai.training.weights import load_exported

PREDS_COLUMNS = ['id_code', 'source', 'diagnosis', 'fold', 'score', 'feature_distance']        # of preds.csv
CHUNK = 8192                                 # images per test DataLoader, which keeps 5 kB of each in memory


def predict_views(learn: Learner, frame: pd.DataFrame, tta: str = 'none', bar=None,
                  distance: FeatureDistance | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores (n, views) float32 and the feature distances (n,) of the images in `frame`, in its order.

    Columns `stored_SIZE` or `stored` name the images; they are not augmented. All processes share the work. `bar` shows
    the progress. Without `distance` the distances are 0.
    """
    n_views = VIEWS[tta]

    def scores_and_distance(model: nn.Module, x: torch.Tensor) -> np.ndarray:
        scores, features = view_scores(model, x, tta)
        return np.c_[scores, distance.distances(features) if distance else np.zeros(len(scores))]
    rows = _predict(learn, frame, bar, n_views + 1, scores_and_distance)
    return rows[:, :n_views], rows[:, n_views].astype(float)


def predict_features(learn: Learner, frame: pd.DataFrame, bar=None) -> np.ndarray:
    "Return the pooled features (n, C) float32 of the images in `frame`, as `predict_views` does"
    return predict_view_features(learn, frame, 'none', bar)


def predict_view_features(learn: Learner, frame: pd.DataFrame, tta: str, bar=None) -> np.ndarray:
    "Return the pooled features (n, views x C) float32 of the images in `frame`, as `predict_views` does"
    def features(model: nn.Module, x: torch.Tensor) -> np.ndarray:
        return np.concatenate([features_and_scores(model, v)[0].float().cpu().numpy() for v in views(x, tta)], 1)
    return _predict(learn, frame, bar, VIEWS[tta] * learn.model[1].channels, features)


@torch.no_grad()
def _predict(learn: Learner, frame: pd.DataFrame, bar, columns: int,
             rows_of: Callable[[nn.Module, torch.Tensor], np.ndarray]) -> np.ndarray:
    "Return what `rows_of` makes of the model and each batch of images: (n, `columns`) float32"
    part = frame.iloc[shard(len(frame))]
    model = learn.model.eval()
    # one array from the start: small arrays between large buffers would keep the buffers from being reused
    rows = np.empty((len(part), columns), np.float32)
    n = 0
    for i in range(0, len(part), CHUNK):
        for batch in learn.dls.test_dl(part.iloc[i:i + CHUNK], bs=32):
            new = rows_of(model, batch[0])
            rows[n:n + len(new)] = new
            n += len(new)
            if bar: bar.to(min(n * world_size(), len(frame)))
    if world_size() == 1: return rows
    return np.stack(all_gather(rows))        # type: ignore[arg-type]    # an array is sent faster than a list of rows


def predict_scores(learn: Learner, frame: pd.DataFrame, tta: str = 'none', bar=None) -> np.ndarray:
    "Return the scores (n,) of the images in `frame`: the mean over the views"
    return predict_views(learn, frame, tta, bar)[0].mean(1)


def pool(parts: list[tuple[float, pd.DataFrame]]) -> pd.DataFrame:
    "Average tables of scores with their weights; `score_sd` covers views, folds and members"
    score, score_sd = mean_and_sd([(w, o.score.to_numpy(), o.score_sd.to_numpy()) for w, o in parts])
    return pd.DataFrame(dict(id_code=parts[0][1].id_code, score=score, score_sd=score_sd))


def read_exported(run: Run, stage: str, fold: int) -> Learner:
    "Load the exported learner of a finished fold: a pickle, so only with the SHA-256 that this run recorded"
    return load_exported(run.verified_file(stage, fold, EXPORT))


def stage_scores(run: Run, stage: str, table: str, fold: int, bars: Bars, labels: bool = False) -> pd.DataFrame:
    """Return id_code, score, score_sd (over views) and feature_distance of a table by one fold of a stage.

    The views are those of `tta`, or for pseudo-`labels` those of `label_tta`. The scores are read from the fold's
    folder if they were made with the same weights, images and views, else predicted and saved.
    """
    s = run.recipe.stages[stage]
    tta = s.label_views if labels else s.tta
    csv = run.scores_file(stage, fold, table, tta)
    note = csv.with_suffix('.json')
    network = [file_hash(run.verified_file(stage, fold, file)) for file in (WEIGHTS, FEATURES)]
    key = digest([*network, run.table_hashes[table], tta])
    old = read_record(note)
    up_to_date = old and old['key'] == key and csv.is_file() and file_hash(csv) == old['sha256']
    if not up_to_date:
        scores, distances = run_on_all_ranks(score_images, bars, run, stage, fold, run.frames[table], table, tta)
        ids = run.frames[table].id_code
        write_csv(csv, pd.DataFrame(dict(id_code=ids, score=scores.mean(1), score_sd=scores.std(1),
                                         feature_distance=distances)))
        write_record(note, dict(key=key, sha256=file_hash(csv), tta=tta, synthetic=run.synthetic))
    return pd.read_csv(csv, dtype=dict(id_code=str))


def score_images(bars: Bars, run: Run, stage: str, fold: int, frame: pd.DataFrame, what: str,
                 tta: str) -> tuple[np.ndarray, np.ndarray]:
    "Return the scores (n, views) and feature distances (n,) of images by a finished fold; every process calls this"
    distance = FeatureDistance.from_bytes(run.verified_file(stage, fold, FEATURES).read_bytes())
    learn = read_exported(run, stage, fold)
    if torch.cuda.is_available(): learn.dls.cuda()
    with bars(f'{stage} fold {fold}  scoring {what}', len(frame), 'images') as bar:
        return predict_views(learn, frame, tta, bar, distance)


def validation_scores(run: Run, name: str, fold: int, bars: Bars) -> pd.DataFrame:
    "Return preds.csv of a finished fold, as its training wrote it, by its exported network and the stage's views"
    valid, tta = run.validation_images(name, fold), run.recipe.stages[name].tta
    scores, distances = run_on_all_ranks(score_images, bars, run, name, fold, valid, 'validation images', tta)
    return valid.assign(score=scores.mean(1), fold=fold, feature_distance=distances)[PREDS_COLUMNS]


def fold_scores(run: Run, members: dict[str, float], table: str, fold: int, bars: Bars,
                labels: bool = False) -> pd.DataFrame:
    """Return the scores of a table by one fold of a stage or ensemble, of which `members` are `Run.member_weights`.

    See `stage_scores` for `labels`.
    """
    return pool([(w, stage_scores(run, m, table, fold, bars, labels)) for m, w in members.items()])


def node_scores(run: Run, node: str, table: str, bars: Bars) -> pd.DataFrame:
    "Return the scores of a table by a stage or ensemble: the mean over folds"
    members = run.member_weights(node)
    return pool([(1., fold_scores(run, members, table, k, bars)) for k in run.folds_of(node)])
