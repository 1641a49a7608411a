"The Python API: lazy imports, `open_run` and the methods of a prepared run."
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TOY_KEYS

import aptos_fastai
from aptos_fastai import (
    GradeThresholds,
    PredictionSets,
    QuadraticKappa,
    create_model,
    find_retina,
    get_dls,
    load_grader,
    open_run,
    quadratic_kappa,
    read_recipe,
    stage_learner,
)
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


GRADES, IMAGE = np.arange(20) % 5, np.zeros((40, 40), np.uint8)
BAD_CALLS = {                                # name: call, words of its error
    'head': (lambda: create_model('test_resnet', head='gen'), ['head = gen: no such head, did you mean gem?', 'auto']),
    'loss': (lambda: create_model('test_resnet', loss='l1'), ['loss = l1: no such loss', 'smooth_l1, mse, corn']),
    'arch': (lambda: create_model('resnet5000'), ['arch = resnet5000: no such network in timm']),
    'metric of a loss': (lambda: QuadraticKappa(loss='l1'), ['loss = l1: no such loss']),
    'metric by a method': (lambda: QuadraticKappa('best'), ['thresholds = best: no such method', 'regularised']),
    'grade 5': (lambda: quadratic_kappa(GRADES + 1, GRADES), ['5 is no grade. Give whole numbers from 0 to 4']),
    'grade 1.5': (lambda: quadratic_kappa(GRADES, GRADES * .5), ['0.5 is no grade']),
    'fewer grades': (lambda: quadratic_kappa(GRADES, GRADES[1:]), ['20 grades and 19 true grades']),
    'not fitted': (lambda: GradeThresholds().predict(GRADES), ['not fitted. Call fit(scores, grades)']),
    'coverage': (lambda: PredictionSets(90), ['coverage 90: choose a number between 0 and 1']),
    'fewer scores': (lambda: PredictionSets().fit(GRADES[1:], GRADES), ['19 scores and 20 grades']),
    'a grey image': (lambda: find_retina(IMAGE), ['uint8 array (height, width, 3)']),
    'a path for an image': (lambda: find_retina('eye.jpg'), ['uint8 array (height, width, 3)']),
    'no recipe': (lambda: read_recipe('nowhere.ini'), ['nowhere.ini: no such recipe']),
    'no model': (lambda: load_grader('nowhere'), ['nowhere: no model here']),
}


@pytest.mark.parametrize('name', BAD_CALLS)
def test_a_wrong_argument_ends_in_an_error_that_says_what_is_right(name):
    call, words = BAD_CALLS[name]
    with pytest.raises(AptosError) as e: call()
    for text in words: assert text in str(e.value)


def test_wrong_names_of_stages_folds_and_columns(run):
    names = 'Choose from: pretrain_256, '
    for call in (lambda: stage_learner(run, 'finetune_265'), lambda: run.oof('finetune_265')):
        with pytest.raises(AptosError, match='finetune_265: no such .*did you mean finetune_256.*' + names): call()
    for fold in (5, -1):
        with pytest.raises(AptosError, match=f'fold {fold}: no such fold of finetune_256. Choose from: 0, 1, 2, 3, 4.'):
            stage_learner(run, 'finetune_256', fold)
    with pytest.raises(AptosError, match='fold 1: no such fold of finetune_256. Choose from: 0.'):
        run.oof('finetune_256', 1)
    frame, stage = run.frames['aptos_train'], run.recipe.stages['finetune_256']
    with pytest.raises(AptosError, match='the frame has no column valid. It has: id_code'):
        get_dls(frame, stage, run.prep, run.recipe.augment, ([.5] * 3, [.2] * 3))
