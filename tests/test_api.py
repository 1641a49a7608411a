"The Python API: lazy imports, `open_run` and the methods of a prepared run."
import subprocess
import sys

import pytest
from conftest import ROOT, TOY_KEYS

import aptos_fastai
from aptos_fastai import open_run
from aptos_fastai.common.io import AptosError, run_lock
from aptos_fastai.run_folder import RecordError


def test_importing_the_package_imports_no_heavy_library():
    "OpenMP, too, reads its settings when PyTorch is loaded, so the package must not load it before it has set them"
    code = ('import sys, aptos_fastai\nheavy = {"torch", "fastai", "pandas", "cv2", "numpy"}\n'
            'assert not heavy & set(sys.modules)\n'
            'from aptos_fastai import quadratic_kappa, read_recipe, GradeThresholds, PredictionSets\n'
            'assert not {"torch", "fastai"} & set(sys.modules)')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize('name', aptos_fastai.__all__)
def test_every_name_of_the_api_exists(name):
    value = getattr(aptos_fastai, name)
    assert value.__doc__ and name in dir(aptos_fastai)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match='no attribute .nope.'): aptos_fastai.nope  # noqa: B018


@pytest.fixture(scope='module')
def run(toy):
    return open_run(ROOT / 'settings.ini', 'demo', toy.parent, TOY_KEYS)


def test_open_run_prepares_images_and_releases_the_lock(run, toy):
    assert run.folder == toy and set(run.frames) == {'eyepacs2015', 'aptos_train', 'aptos_test'}
    for frame in run.frames.values(): assert {'stored', 'pixel_sha256', 'fold'} <= set(frame)
    with run_lock(run.folder): pass


def test_open_run_writes_what_a_new_run_needs(tables, small_recipe, tmp_path):
    run = open_run(small_recipe, tables, tmp_path / 'runs')
    assert (run.folder / 'folds.csv').is_file() and not run.recipe.demo
    with pytest.raises(RecordError, match='no summary.json. Run `all` first'): run.summary()


def test_methods_of_a_finished_run(run, image_paths):
    assert run.train('finetune_256') == run.folder / 'finetune_256'     # finished: trains nothing
    learn = run.learner('finetune_256')
    assert len(learn.dls.valid_ds) == len(run.oof('finetune_256'))
    assert run.summary()['submission']['node'] == 'retrain_512'
    for grader in (run.grader(), run.grader('finetune_256')):
        assert grader.predict(image_paths[:2]).grade.between(0, 4).all()


@pytest.mark.parametrize('method', ['train', 'learner', 'grader'])
def test_unknown_stage(run, method):
    with pytest.raises(AptosError, match='nope: no such stage'): getattr(run, method)('nope')
