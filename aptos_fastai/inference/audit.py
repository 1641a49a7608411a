"The audit trail of predictions: which model, program and machine made them, and when."
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

import aptos_fastai
from aptos_fastai.common.clock import now
from aptos_fastai.common.io import AptosError, file_hash, make_private, read_record, write_bytes, write_record
from aptos_fastai.inference.backends import PACKAGES
from aptos_fastai.training.precision import cpu_name

if TYPE_CHECKING:
    from aptos_fastai.inference.grader import Grader

AUDIT_FORMAT = 1
SUFFIX = '.json'                             # grades.csv -> grades.csv.json
OWN_KEYS = {'csv', 'csv_sha256', 'digests'}  # of an audit file; no other JSON file is replaced


def audit_record(grader: 'Grader') -> dict:
    """Return what made the predictions of a grader.

    `model` is its name, `digests` are those of `ModelSpec.digests`, `operating_points` the scores from which an image
    is referred; `device` is 'cpu' or the name of the GPU, `prevalence` that of the probabilities (None: as validated).
    """
    on_gpu = grader.backend == 'torch' and grader.device.type == 'cuda'
    points = [dict(name=o.name, chosen_for=o.target_text, threshold=o.threshold) for o in grader.model.decision.points]
    return dict(model=grader.model.name, digests=grader.model.digests, thresholds=list(grader.model.thresholds),
                operating_points=points, aptos_fastai=aptos_fastai.__version__, torch=torch.__version__,
                backend=grader.backend, backend_version=package_version(PACKAGES[grader.backend]),
                precision=grader.precision, device=torch.cuda.get_device_name() if on_gpu else 'cpu',
                processor=cpu_name(), prevalence=grader.prevalence, time=now())


def package_version(package: str) -> str:
    "Return the version of an installed package; '' if it is not known"
    try: return version(package)
    except PackageNotFoundError: return ''


# The file beside grades.csv

def audit_file(csv: Path) -> Path:
    "Return the audit file of a CSV of predictions: grades.csv.json"
    return csv.with_name(csv.name + SUFFIX)


def check_audit_free(csv: Path, overwrite: bool) -> None:
    "Raise `AptosError` if the audit file of `csv` exists; with `overwrite`, if `predict` did not write it"
    file = audit_file(csv)
    if not file.exists(): return
    if not overwrite: raise AptosError(f'{file}: already exists. Choose another file with -o, or add --overwrite.')
    try: record = read_record(file)
    except AptosError: record = None         # edited or of another program
    if record is not None and set(record) >= OWN_KEYS: return
    raise AptosError(f'{file}: is not a file that predict wrote, or it was edited, so it is not replaced. Choose '
                     'another file with -o.')


def note_start(file: Path, resumed: bool) -> None:
    "Add the present time to a hidden file of the times at which a prediction was started and `resumed`"
    earlier = file.read_text(encoding='utf-8') if resumed and file.is_file() else ''
    write_bytes(file, f'{earlier}{now()}\n'.encode())
    with open(file, 'rb') as f: make_private(f.fileno())


def write_audit(csv: Path, audit: dict, starts: Path, options: dict, patients: Path | None = None) -> None:
    """Write the audit file of the finished `csv` and `patients`: `audit`, times in `starts`, counts, columns, hashes.

    It is written after the CSV: a CSV without it was interrupted in between, or is not of this program.
    """
    rows = pd.read_csv(csv, dtype=str, keep_default_na=False)
    started, *resumed = starts.read_text(encoding='utf-8').split()
    counts = dict(images=len(rows), errors=int((rows.error != '').sum()),
                  ungradable=int((rows.ungradable != '').sum()))
    made_by = {key: value for key, value in audit.items() if key != 'time'}
    write_record(audit_file(csv), dict(
        format=AUDIT_FORMAT, **made_by, started=started, resumed=resumed, finished=now(), **counts, options=options,
        csv=csv.name, csv_sha256=file_hash(csv), columns=list(rows.columns),
        **(dict(patients_sha256=file_hash(patients)) if patients else {})))


def processed_text(audit: dict) -> str:
    "Return the model and how it was computed: 'settings/retrain_512 (torch f32)'"
    return f'{audit["model"]} ({audit["backend"]} {audit["precision"]})'


def differing_parts(recorded: dict[str, str], current: dict[str, str]) -> Sequence[str]:
    "Return the parts of a model whose digests differ: weights, thresholds, gate, operating_point, eyes"
    names = [name for name in current | recorded if name != 'model']
    return [name for name in names if recorded.get(name) != current.get(name)]
