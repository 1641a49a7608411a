"Exported learners + images -> scores, means over views, folds and members."
import numpy as np
import pandas as pd
import torch
from fastai.learner import Learner

from aptos_fastai.common.console import Bars
from aptos_fastai.common.distributed import all_gather, run_on_all_ranks, shard, world_size
from aptos_fastai.common.io import digest, file_hash, read_record, write_csv, write_record
from aptos_fastai.inference.views import VIEWS, views
from aptos_fastai.run_folder import EXPORT, WEIGHTS, Run
from aptos_fastai.training.weights import load_exported

CHUNK = 8192                                 # images: a test DataLoader keeps 5 kB of each


@torch.no_grad()
def predict_views(learn: Learner, frame: pd.DataFrame, tta: str = 'none', bar=None) -> np.ndarray:
    "Scores (n, views) float32 of the images in column `stored` of `frame`, in its order, by all processes: never augmented"
    part = frame.iloc[shard(len(frame))]
    model, n = learn.model.eval(), 0
    scores = np.empty((len(part), VIEWS[tta]), np.float32)     # at once: small pieces between large buffers keep those from being used again
    for i in range(0, len(part), CHUNK):
        for b in learn.dls.test_dl(part.iloc[i:i + CHUNK], bs=32):
            new = torch.stack([model(v).float().flatten() for v in views(b[0], tta)], 1).cpu().numpy()
            scores[n:n + len(new)] = new
            n += len(new)
            if bar: bar.to(min(n * world_size(), len(frame)))
    return scores if world_size() == 1 else np.stack(all_gather(scores))


def predict_scores(learn: Learner, frame: pd.DataFrame, tta: str = 'none', bar=None) -> np.ndarray:
    "Scores (n,): the mean over the `views`"
    return predict_views(learn, frame, tta, bar).mean(1)


def pool(parts: list[tuple[float, pd.DataFrame]]) -> pd.DataFrame:
    "Weighted mean of scores, with `score_sd`, their standard deviation over everything that was averaged (views, members, folds)"
    w = np.array([w for w, _ in parts])[:, None] / sum(w for w, _ in parts)
    s, d = (np.stack([o[c] for _, o in parts]) for c in ('score', 'score_sd'))
    mean = (w * s).sum(0)
    return parts[0][1].assign(score=mean, score_sd=np.sqrt((w * (d ** 2 + (s - mean) ** 2)).sum(0)))


def read_exported(run: Run, stage: str, fold: int) -> Learner:
    "The exported learner of a finished fold: a pickle, so only if its hash is the one this run recorded"
    return load_exported(run.verified(stage, fold, EXPORT))


def stage_scores(run: Run, stage: str, table: str, fold: int, bars: Bars) -> pd.DataFrame:
    "id_code, score, spread (over views) of a table by one fold: from its folder where they stand for these weights and images, else predicted and written"
    s, folder = run.recipe.stages[stage], run.fold_dir(stage, fold)
    csv, note = folder / f'scores_{table}.csv', folder / f'scores_{table}.json'
    key = digest([file_hash(run.verified(stage, fold, WEIGHTS)), run.digests[table], s.tta, 'score_sd'])
    old = read_record(note)
    if not (old and old['key'] == key and csv.is_file() and file_hash(csv) == old['sha256']):
        scores, frame = run_on_all_ranks(score_table, bars, run, stage, table, fold), run.frames[table]
        write_csv(csv, pd.DataFrame(dict(id_code=frame.id_code, score=scores.mean(1), score_sd=scores.std(1))))
        write_record(note, dict(key=key, sha256=file_hash(csv), tta=s.tta, synthetic=bool(run.recipe.demo)))
    return pd.read_csv(csv, dtype=dict(id_code=str))


def score_table(bars: Bars, run: Run, stage: str, table: str, fold: int) -> np.ndarray:
    "Scores (n, views) of a table by a finished fold, in every process"
    learn, frame = read_exported(run, stage, fold), run.frames[table]
    if torch.cuda.is_available(): learn.dls.cuda()
    with bars(f'{stage} fold {fold}  scoring {table}', len(frame), 'images') as bar:
        return predict_views(learn, frame, run.recipe.stages[stage].tta, bar)


def fold_scores(run: Run, node: str, table: str, fold: int, bars: Bars) -> pd.DataFrame:
    "The same by one fold of a stage or ensemble"
    return pool([(w, stage_scores(run, m, table, fold, bars)) for m, w in run.recipe.members(node).items()])


def node_scores(run: Run, node: str, table: str, bars: Bars) -> pd.DataFrame:
    "The same by a stage or ensemble: the mean over folds"
    return pool([(1., fold_scores(run, node, table, k, bars)) for k in run.folds_of(node)])
