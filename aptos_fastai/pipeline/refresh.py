"Bring finished folds up to date without a training: names, keys of their records, validation scores."
from dataclasses import asdict, replace

import pandas as pd

from aptos_fastai.common.console import Bars, say
from aptos_fastai.common.io import AptosError, file_state, write_csv, write_record
from aptos_fastai.run_folder import FINISHED, PREDS, Run

UNKNOWN = dict(sha256='', bytes=-1)          # of a file that is being replaced: it is made again after an interruption


def move_renamed(run: Run) -> Run:
    "Move the folders of stages that the recipe calls otherwise now; return the run. Raises `AptosError`"
    for name, old in run.renamed.items():
        try: (run.root / old).rename(run.root / name)
        except OSError as e:
            raise AptosError(f'{run.root / old}: cannot be renamed to {name} ({e.strerror}). Rename it.') from None
        say(f'{old} is called {name} now: its folder was renamed, nothing is trained again')
    return replace(run) if run.renamed else run


def refresh_folds(run: Run, folds: dict[str, list[int]], bars: Bars) -> None:
    "Make again what is outdated of finished folds (stage -> folds)"
    for name, numbers in folds.items():
        for k in numbers: refresh_fold(run, name, k, bars)


def refresh_fold(run: Run, name: str, fold: int, bars: Bars) -> None:
    "Make the validation scores of a finished fold again if its views changed, and its record, which is written last"
    from aptos_fastai.pipeline.stage import fold_settings
    record, folder = run.finished_record(name, fold), run.fold_dir(name, fold)
    preds = new_preds(run, name, fold, record, bars)
    if preds is not None:
        files = {**record['files'], PREDS: UNKNOWN}
        write_record(folder / FINISHED, dict(record, files=files))
        write_csv(folder / PREDS, preds)
    files = {**record['files'], PREDS: file_state(folder / PREDS)}
    gate = dict(record['gate'], **asdict(run.recipe.gate))
    settings = run.settings_to_record(name, record)
    write_record(folder / FINISHED, {'origin': {}, **record, **fold_settings(run, name, fold), 'settings': settings,
                                     'gate': gate, 'files': files})


def new_preds(run: Run, name: str, fold: int, record: dict, bars: Bars) -> pd.DataFrame | None:
    "Return the new content of preds.csv: predicted, or with the new names of tables; None if it stays as it is"
    if run.outdated(name, fold) == 'scores':
        from aptos_fastai.pipeline.scores import validation_scores
        say(f'  {name} fold {fold}: its validation images are scored again, with tta = {run.recipe.stages[name].tta}')
        return validation_scores(run, name, fold, bars)
    tables = [entry.rpartition(':')[2] for entry in record['settings']['train']]
    new_names = {old: new for old, (_, new) in zip(tables, run.recipe.stages[name].sources, strict=True) if old != new}
    if not new_names: return None
    preds = pd.read_csv(run.verified_file(name, fold, PREDS), dtype=str, keep_default_na=False)
    return preds.assign(source=preds.source.replace(new_names))
