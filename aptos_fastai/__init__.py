"""Grade diabetic retinopathy (0-4) from fundus images with staged fastai training.

`import aptos_fastai` imports no PyTorch; each name below is imported at its first use.
"""
import os
import warnings
from importlib import import_module
from typing import Any

__version__ = '0.1.0'                        # the only place: pyproject.toml reads it, so a clone and a wheel agree

_MODULES = dict(                             # name -> module that defines it
    open_run='api',
    fit='commands',
    load_grader='inference.grader',
    read_recipe='recipe.read',
    stage_learner='pipeline.stage',
    get_dls='training.loaders',
    create_model='training.networks',
    GeM='training.networks',
    QuadraticKappa='training.model',
    quadratic_kappa='metrics',
    GradeThresholds='metrics',
    PredictionSets='metrics',
    find_retina='data.retina',
)
__all__ = list(_MODULES)

# GNU OpenMP, which PyTorch's threads wait in, spins so long by default that it wastes shared machines (see
# docs/performance.md). It reads this variable when PyTorch is loaded: import aptos_fastai first in a notebook.
SPIN_COUNT = '1000'
if 'OMP_WAIT_POLICY' not in os.environ: os.environ.setdefault('GOMP_SPINCOUNT', SPIN_COUNT)

# ONNX Runtime (since 1.32 also on Linux) writes a device id into the home folder and sends usage events when imported.
os.environ['ORT_DISABLE_TELEMETRY'] = '1'
# MLflow sends usage events when it is used, and writes an id into the home folder.
os.environ['MLFLOW_DISABLE_TELEMETRY'] = 'true'
# MLflow tries for minutes to reach a server that is down, in every epoch.
os.environ.setdefault('MLFLOW_HTTP_REQUEST_MAX_RETRIES', '2')
os.environ.setdefault('MLFLOW_HTTP_REQUEST_TIMEOUT', '20')

warnings.filterwarnings('ignore', message='.torch.jit.script. is deprecated', category=FutureWarning)     # timm uses it
warnings.filterwarnings('ignore', message='IProgress not found')     # progress bars of other packages in notebooks
warnings.filterwarnings('ignore', message="The 'mode.chained_assignment' option is deprecated")     # fastai uses it


def __getattr__(name: str) -> Any:
    "Import a name of the API at its first use"
    if name not in _MODULES: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(import_module(f'{__name__}.{_MODULES[name]}'), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]: return sorted([*globals(), *_MODULES])
