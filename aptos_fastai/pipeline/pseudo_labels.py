"Scores of an ungraded table -> label files with their provenance."
import numpy as np
import pandas as pd

from aptos_fastai.common.console import Bars
from aptos_fastai.common.io import digest, file_hash, read_record, write_csv, write_record
from aptos_fastai.metrics import apply_thresholds
from aptos_fastai.pipeline.scores import fold_scores
from aptos_fastai.run_folder import WEIGHTS, RecordError, Run

FILES = dict(soft='soft_pseudo_label.csv', hard='hard_pseudo_label.csv')


def _key(run: Run, node: str, table: str) -> str:
    "Digest of what labels are made from: the weights of every fold, the images, the thresholds"
    r = run.recipe
    made = {f'{m}/{k}': run.record(m, k)['files'][WEIGHTS]['sha256'] for m in r.members(node) for k in run.folds_of(node)}
    return digest(['score_sd', made, r.members(node), run.digests[table], run.label_thresholds(node), [r.stages[m].tta for m in r.members(node)]])


def labels_finished(run: Run, node: str, table: str) -> bool:
    "True where the label files stand and are of these weights, images and thresholds"
    note = read_record(run.label_dir(node, table) / 'provenance.json')
    return bool(note) and note['key'] == _key(run, node, table) and all(
        (run.label_dir(node, table) / f).is_file() and file_hash(run.label_dir(node, table) / f) == h for f, h in note['files'].items())


def write_labels(run: Run, node: str, table: str, bars: Bars):
    """`soft_pseudo_label.csv` (scores) and `hard_pseudo_label.csv` (grades by the node's thresholds) of an ungraded table.

    Columns id_code, diagnosis (mean over folds; its grade), fold0 …, score_sd0 … (standard deviation over that fold's views and members):
    a student's fold k learns from `fold<k>` only, so that no image is validated by a model whose teacher trained on it.
    """
    out, ids = run.label_dir(node, table), run.frames[table].id_code
    found = {k: fold_scores(run, node, table, k, bars) for k in run.folds_of(node)}
    by_fold, spread = {f'fold{k}': o.score for k, o in found.items()}, {f'score_sd{k}': o.score_sd for k, o in found.items()}
    how = run.label_thresholds(node)
    mean = np.mean(list(by_fold.values()), 0)
    hard = {f: apply_thresholds(s, run.thresholds(node, how, without=int(f[4:]))) for f, s in by_fold.items()}
    frames = dict(soft=pd.DataFrame(dict(id_code=ids, diagnosis=mean, **by_fold, **spread)),
                  hard=pd.DataFrame(dict(id_code=ids, diagnosis=apply_thresholds(mean, run.thresholds(node, how)), **hard, **spread)))
    for kind, df in frames.items(): write_csv(out / FILES[kind], df)
    write_record(out / 'provenance.json', dict(
        key=_key(run, node, table), labelled_by=node, table=table, synthetic=bool(run.recipe.demo), thresholds=run.thresholds(node, how).tolist(),
        weights={f'{m}/fold{k}': run.record(m, k)['files'][WEIGHTS]['sha256'] for m in run.recipe.members(node) for k in run.folds_of(node)},
        files={f: file_hash(out / f) for f in FILES.values()}))


def read_labels(run: Run, node: str, table: str, kind: str) -> pd.DataFrame:
    "The soft or hard labels of `table` by `node`. Raises `RecordError` where they are missing or not what was written"
    path, note = run.label_dir(node, table) / FILES[kind], read_record(run.label_dir(node, table) / 'provenance.json')
    if not note or not path.is_file(): raise RecordError(f'{path}: is not there; run `label {node}` first')
    if file_hash(path) != note['files'][path.name]:
        raise RecordError(f'{path}: is not what this run wrote (its hash differs); delete {path.parent} and run again')
    return pd.read_csv(path, dtype=dict(id_code=str))
