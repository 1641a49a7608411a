"Expensive parts of the product: made once for several files of tests, or left out where other tests cover them."
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock
from markupsafe import Markup

from aptos_fastai.cli import main
from aptos_fastai.common.io import file_hash
from aptos_fastai.deploy import bundle as bundle_module
from aptos_fastai.deploy import parity
from aptos_fastai.reports import plots, shortcuts


def toy_bundle(toy: Path, tmp_path_factory) -> Path:
    """Return the bundle of a copy of the toy run, with parity in bf16; tests must not change it.

    It is exported once for all files and for all processes of pytest-xdist that have the same toy run.
    """
    for package in ('onnx', 'onnxscript', 'onnxruntime'): pytest.importorskip(package)
    shared = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ: shared = shared.parent
    runs = shared / f'exported-{file_hash(toy / "summary.json")[:16]}'
    run = runs / toy.name
    with FileLock(f'{runs}.lock'):
        if not (run / 'bundle').is_dir():
            shutil.rmtree(runs, ignore_errors=True)                    # of a process that failed
            shutil.copytree(toy.parent, runs)
            with pytest.MonkeyPatch.context() as m:
                m.setattr(parity, 'PARITY_IMAGES', 24)
                m.setattr(parity, 'has_bf16', lambda: True)            # toy networks are fast enough in emulated bf16
                main(['export', str(run)])
    return run / 'bundle'


@contextmanager
def onnx_of(bundle: Path):
    "Exports of the same networks in this block copy their ONNX files from a bundle instead of converting them again"
    def copy(net, member, file): shutil.copy(bundle / file.name, file)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(bundle_module, 'write_onnx', copy)
        yield


@contextmanager
def quick_exports():
    "Exports in this block write empty ONNX files and compare no backends, which takes most of their time"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(bundle_module, 'write_onnx', lambda net, member, file: file.touch())
        m.setattr(parity, 'COMPARED', ())
        yield


@contextmanager
def quick_reports():
    "Reports of this block have empty figures and a shortcut check without forests, which take most of the time"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(plots, 'to_svg', lambda fig, title: Markup('<svg></svg>'))
        m.setattr(shortcuts, 'forest_kappa', lambda *_: (.1, (0., .2)))
        yield
