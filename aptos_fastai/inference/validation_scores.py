"The out-of-fold scores of a model's validation images, without ids: what an operating point is chosen on."
from pathlib import Path

import pandas as pd

from aptos_fastai.common.io import AptosError, read_record, verify_file
from aptos_fastai.inference.model_spec import BUNDLE, ModelSpec, preds_file, read_model
from aptos_fastai.metrics import stratified_group_parts

BUNDLE_SCORES = 'validation_scores.csv'      # of a bundle, with the columns `COLUMNS`
COLUMNS = ['score', 'diagnosis', 'part', 'group']
OOF = 'oof.csv'                              # of a run


def validation_scores(path: str | Path) -> pd.DataFrame:
    """Return a row for each validation image of the model at `path`: score, diagnosis, part and group.

    The score is out-of-fold. Parts are the folds; with fewer than three folds, five parts that keep groups together.
    A group (patient, or the image alone; with its duplicates) is a running number. Rows are sorted by score, so that
    neither rows nor groups lead to an image. `path` is a run folder, the folder of a stage, or a bundle: a run and its
    bundle give the same rows. Raises `AptosError` if a file is missing or changed.
    """
    model, root = read_model(path)
    bundle = read_record(root / BUNDLE)
    if bundle: return _of_bundle(root, bundle)
    return _anonymous(_of_stage(model, root) if root != Path(path) else _of_run(root))


def _of_bundle(root: Path, bundle: dict) -> pd.DataFrame:
    "Return the validation scores that a bundle carries"
    file, sha256 = root / BUNDLE_SCORES, bundle['files'].get(BUNDLE_SCORES)
    if not sha256: raise AptosError(f'{file}: missing, because an older version wrote this bundle. Export again.')
    df = _read(verify_file(file, sha256, 'Export again.'))[COLUMNS].astype(float)
    return df.astype(dict.fromkeys(COLUMNS[1:], int))


def _of_run(root: Path) -> pd.DataFrame:
    "Return the columns score, diagnosis, fold and group of the images that validated a run's submission"
    summary = read_record(root / 'summary.json') or {}
    node = summary['submission']['node']
    oof = _read(oof_file(root, summary))
    return oof[oof[node].notna()].rename(columns={node: 'score'})


def _of_stage(model: ModelSpec, root: Path) -> pd.DataFrame:
    "Return the same of the folds of a stage; an image that the run's oof.csv does not list is a group of its own"
    preds = pd.concat([_read(preds_file(root / Path(m.file).parent)) for m in model.members], ignore_index=True)
    preds['group'] = preds.source + ':' + preds.id_code
    summary = read_record(root / 'summary.json')
    if not summary: return preds
    oof = _read(oof_file(root, summary))
    known = oof[['source', 'id_code', 'group']].rename(columns=dict(group='known_group'))
    preds = preds.merge(known, on=['source', 'id_code'], how='left')
    return preds.assign(group=preds.known_group.fillna(preds.group))


def oof_file(root: Path, summary: dict) -> Path:
    "Return oof.csv of a finished run, its SHA-256 checked; it knows the patients. Raises `AptosError`"
    return verify_file(root / OOF, summary['outputs'][OOF], 'Run `all` again.')


def _read(file: Path) -> pd.DataFrame:
    "Read a CSV of scores as text; pandas' own numbers can differ from the written ones in the last bit"
    return pd.read_csv(file, dtype=str)


def _anonymous(df: pd.DataFrame) -> pd.DataFrame:
    "Return `COLUMNS` of the rows of score, diagnosis, fold and group"
    numbers = df[['score', 'diagnosis', 'fold']].astype(float).astype(dict(diagnosis=int, fold=int))
    part = numbers.fold if numbers.fold.nunique() > 2 else stratified_group_parts(numbers.diagnosis, df.group)
    rows = numbers.assign(part=part, group=df.group).sort_values(['score', 'diagnosis'], kind='stable')
    return rows.assign(group=pd.factorize(rows.group)[0])[COLUMNS].reset_index(drop=True)
