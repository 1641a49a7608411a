"Write and read pseudo-labels: the scores of an ungraded table by a trained stage or ensemble, with their provenance."
import numpy as np
import pandas as pd

from aptos_fastai.common.console import Bars
from aptos_fastai.common.io import digest, file_hash, read_record, verify_file, write_csv, write_record
from aptos_fastai.metrics import apply_thresholds
from aptos_fastai.pipeline.scores import fold_scores
from aptos_fastai.run_folder import RecordError, Run

FILES = dict(soft='soft_pseudo_label.csv', hard='hard_pseudo_label.csv')


def _inputs_digest(run: Run, node: str, table: str) -> str:
    "Return the SHA-256 of what labels are made from: weights, images, thresholds and views"
    tta = [run.recipe.stages[m].label_views for m in run.recipe.members(node)]
    weights = [run.member_weights(node, without=k) for k in run.folds_of(node)]
    return digest([run.weight_hashes(node), weights, run.table_hashes[table], run.label_thresholds(node), tta])


def labels_up_to_date(run: Run, node: str, table: str) -> bool:
    "Return whether the label files were made from the present weights, images and thresholds"
    folder = run.label_dir(node, table)
    record = read_record(folder / 'provenance.json')
    if not record or record.get('inputs_digest') != _inputs_digest(run, node, table): return False
    files = {folder / name: sha256 for name, sha256 in record['files'].items()}
    return all(file.is_file() and file_hash(file) == sha256 for file, sha256 in files.items())


def write_labels(run: Run, node: str, table: str, bars: Bars) -> None:
    """Write soft_pseudo_label.csv (scores) and hard_pseudo_label.csv (grades) of an ungraded table.

    Columns: id_code; diagnosis, the mean score over folds or its grade; fold0 ..., the same of each fold;
    score_sd0 ..., the standard deviation over that fold's views and members.
    Fold k of a student learns from column foldK only: no image is validated by a model whose teacher trained on it, or
    whose teacher's weights or thresholds were fitted on it.
    """
    folder, how = run.label_dir(node, table), run.label_thresholds(node)
    members = {k: run.member_weights(node, without=k) for k in run.folds_of(node)}
    scores = {k: fold_scores(run, members[k], table, k, bars, labels=True) for k in members}
    mean = np.mean([o.score for o in scores.values()], 0)
    soft = {f'fold{k}': o.score for k, o in scores.items()}
    hard = {f'fold{k}': apply_thresholds(o.score, run.thresholds(node, how, without=k)) for k, o in scores.items()}
    score_sd = {f'score_sd{k}': o.score_sd for k, o in scores.items()}
    thresholds = run.thresholds(node, how)
    grades = apply_thresholds(mean, thresholds)
    ids = run.frames[table].id_code
    write_csv(folder / FILES['soft'], pd.DataFrame(dict(id_code=ids, diagnosis=mean, **soft, **score_sd)))
    write_csv(folder / FILES['hard'], pd.DataFrame(dict(id_code=ids, diagnosis=grades, **hard, **score_sd)))
    write_record(folder / 'provenance.json', dict(
        inputs_digest=_inputs_digest(run, node, table), labelled_by=node, table=table, synthetic=run.synthetic,
        thresholds=thresholds.tolist(), members=list(members.values()), weights=run.weight_hashes(node),
        files={name: file_hash(folder / name) for name in FILES.values()}))


def read_labels(run: Run, node: str, table: str, kind: str) -> pd.DataFrame:
    "Return the `soft` or `hard` labels of `table` by `node`. Raises `AptosError` if they are missing or changed"
    folder = run.label_dir(node, table)
    path, record = folder / FILES[kind], read_record(folder / 'provenance.json')
    if not record or not path.is_file(): raise RecordError(f'{path}: no such file. Run `label {node}` first.')
    verify_file(path, record['files'][path.name], f'Delete {folder} and run again.')
    return pd.read_csv(path, dtype=dict(id_code=str))
