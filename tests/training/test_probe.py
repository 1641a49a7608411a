"A linear probe: the body never trains, its features are computed once, and the head trains on them."
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import expect_error, stage_options, write_small_recipe, write_table
from safetensors.torch import load_file, save
from sklearn.metrics import cohen_kappa_score

from aptos_fastai.cli import main
from aptos_fastai.common.console import Bars
from aptos_fastai.metrics import cross_fitted_grades
from aptos_fastai.pipeline import features as frozen
from aptos_fastai.pipeline.graph import load_run
from aptos_fastai.pipeline.scores import predict_features, predict_views, read_exported
from aptos_fastai.pipeline.stage import find_rates, fit_stage, stage_learner
from aptos_fastai.recipe.sections import Stage
from aptos_fastai.run_folder import Run
from aptos_fastai.training import checkpoint
from aptos_fastai.training.callbacks import FrozenBody, History, Reproducible
from aptos_fastai.training.probe import FeatureRows, feature_dls, head_stage

PROBE = stage_options('epochs=0', 'freeze_epochs=3', 'folds=2', 'tta=d4', 'keep=last')
NO_AUGMENT = ['augment.brightness=0', 'augment.contrast=0', 'augment.saturation=0', 'augment.hue=0',
              'augment.rotate=0', 'augment.shift=0', 'augment.scale=1 1', 'augment.hflip=0', 'augment.blur=0']


def args_in(tables, recipe, runs, *more):
    return ['--recipe', str(recipe), '--data', str(tables), '--runs', str(runs), *PROBE, *more]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A recipe whose teacher is a probe, data, and a run with the trained teacher; tests must not change it"
    folder = tmp_path_factory.mktemp('probe')
    write_table(folder / 'data', 40)
    write_table(folder / 'data', 10, graded=False, seed=1, name='test')
    main(['train', 'teacher', *args_in(folder / 'data', write_small_recipe(folder / 'small.ini'), folder / 'runs')])
    return folder


@pytest.fixture
def probed(trained, tmp_path):
    "A copy of this run that a test may change, which has found its images in their new place"
    folder = shutil.copytree(trained, tmp_path / 'probe')
    main(['prepare', *args_in(folder / 'data', folder / 'small.ini', folder / 'runs')])
    return load_run(folder / 'small.ini', folder / 'data', folder / 'runs', PROBE[1::2])


def args_of(run, *more): return args_in(run.data, run.recipe.path, run.root.parent, *more)


def test_the_body_never_trains_and_the_head_does(probed):
    start = stage_learner(probed, 'teacher').model.state_dict()
    trained = load_file(probed.fold_dir('teacher', 0) / 'weights.safetensors')
    assert set(trained) == set(start)
    changed = {name for name in start if not torch.equal(trained[name], start[name])}
    assert changed == {'1.3.weight', '1.3.bias'}


def test_what_follows_is_as_for_any_stage(probed):
    folder = probed.fold_dir('teacher', 1)
    record, preds = json.loads((folder / 'stage.json').read_text()), pd.read_csv(folder / 'preds.csv')
    history = pd.read_csv(folder / 'history.csv')
    learn = read_exported(probed, 'teacher', 1)
    frame = probed.frames['train']
    valid = frame[frame.fold == 1]
    scores, _ = predict_views(learn, valid, 'd4')
    assert preds.id_code.tolist() == valid.id_code.tolist()
    assert np.allclose(preds.score, scores.mean(1), atol=1e-5) and preds.score.std() > 0
    assert len(history) == 3 and history.lr.max() > 0 and history.kept.tolist() == [False, False, True]
    assert record['precision'] == 'f32' and record['images'] == dict(train=len(frame) - len(valid), valid=len(valid))
    assert probed.finished('teacher', 1)


def test_features_are_those_of_the_network_and_its_views(probed):
    learn, stage = stage_learner(probed, 'teacher'), probed.recipe.stages['teacher']
    with Bars() as bars: found = frozen.frozen_features(probed, stage, learn, 'f32', bars)
    images = learn.dls.valid.items.iloc[[3, 0, 2]]
    features = found.of(images)
    assert features.shape == (3, 8, learn.model[1][3].in_features)
    assert np.allclose(features[:, 0], predict_features(learn, images), atol=1e-5)
    batch = learn.dls.test_dl(images).one_batch()[0]
    turned = learn.model[1].features(learn.model[0].eval()(batch.rot90(1, (-2, -1)).flip(-1)))
    assert np.allclose(features[:, 3], turned.detach().numpy(), atol=1e-5)
    assert features[:, 0].std(0).max() > 0 and not np.allclose(features[:, 0], features[:, 3], atol=1e-4)


def test_the_head_trains_as_on_images_without_augmentation(tables, small_recipe, tmp_path):
    "With the mean as pooling, which does not train, both ways see the same batches"
    keys = ['stage.epochs=0', 'stage.freeze_epochs=3', 'stage.tta=none', 'stage.head=avg', 'stage.lr=.01', *NO_AUGMENT]
    options = [o for key in keys for o in ('--set', key)]
    args = ['--recipe', str(small_recipe), '--data', str(tables), '--runs', str(tmp_path), *options]
    main(['prepare', *args])
    run = load_run(small_recipe, tables, tmp_path, keys)
    stage = run.recipe.stages['teacher']
    weights = []
    for probes in (False, True):
        learn = stage_learner(run, 'teacher')
        before = learn.model[1][3].weight.detach().clone()
        hist, trained, s = History('last'), learn, stage
        if probes:
            with Bars() as bars: known = frozen.frozen_features(run, stage, learn, 'f32', bars)
            trained = frozen.probe(stage, learn, known)
            s = head_stage(stage)
        fit_stage(trained, s, [Reproducible(42, hist), hist, FrozenBody()])
        weights.append((learn.model[1][3].weight, hist))
    (a, hist_a), (b, hist_b) = weights
    assert (a - before).abs().max() > .01 and torch.allclose(a, b, atol=1e-4)
    assert [r['train_loss'] for r in hist_b.rows] == pytest.approx([r['train_loss'] for r in hist_a.rows], rel=1e-3)


def test_another_learning_rate_takes_the_features_from_the_store(tables, small_recipe, tmp_path, capsys, monkeypatch):
    def features_files(): return {f.name for f in (tmp_path / 'runs/prepared/features').glob('*.safetensors')}
    main(['train', 'teacher', *args_in(tables, small_recipe, tmp_path / 'runs')])
    out = capsys.readouterr().out
    assert out.count('features of 40 images') == out.count('features of 40 images x 8 views -> ') == 1   # for all folds
    first = features_files()
    monkeypatch.setattr(frozen, 'predict_view_features', None)
    main(['train', 'teacher', *args_in(tables, small_recipe, tmp_path / 'runs', '--set', 'stage.lr=.05'), '--replace'])
    out = capsys.readouterr().out
    assert out.count('features of 40 images') == out.count('features of 40 images x 8 views are in ') == 1
    assert features_files() == first
    monkeypatch.undo()
    main(['train', 'teacher', *args_in(tables, small_recipe, tmp_path / 'runs', '--set', 'recipe.seed=7'),
          '--replace'])                      # weights
    assert len(features_files()) == 2


def file_of(run):
    "The file of the features of the table `train`"
    return next((run.store / 'features').glob('train-*.safetensors'))


def cut(file): file.write_bytes(file.read_bytes()[:-100])
def forget(file): file.with_suffix('.json').unlink()
def damage_record(file): file.with_suffix('.json').write_text('{')


def change(file):
    features = load_file(file)['features']
    file.write_bytes(save(dict(features=features + 1)))


def exchange(file):
    "A file and its record of other images"
    frozen.write_features(file, load_file(file)['features'].numpy()[:-1])


@pytest.mark.parametrize('spoil', [cut, change, forget, damage_record, exchange])
def test_features_that_are_not_as_recorded_are_computed_again(probed, capsys, spoil):
    learn, stage = stage_learner(probed, 'teacher'), probed.recipe.stages['teacher']
    images, file = learn.dls.valid.items, file_of(probed)
    with Bars() as bars:
        before, content = frozen.frozen_features(probed, stage, learn, 'f32', bars).of(images), file.read_bytes()
        spoil(file)
        capsys.readouterr()
        after = frozen.frozen_features(probed, stage, learn, 'f32', bars).of(images)
    assert f'{file}: is not as its record {file.stem}.json says. The features are computed again.' in (
        capsys.readouterr().out)
    assert np.array_equal(before, after) and file.read_bytes() == content
    with Bars() as bars: frozen.frozen_features(probed, stage, learn, 'f32', bars)
    assert f'8 views are in {file}' in capsys.readouterr().out


STATS = ['stage.mean=.5 .5 .5', 'stage.std=.3 .3 .3']
VIT = ['stage.arch=test_vit', 'stage.head=avg']


@pytest.mark.parametrize('first, second', [
    (STATS, [*STATS, 'stage.mean=.4 .4 .4']), (STATS, [*STATS, 'stage.std=.2 .2 .2']), (VIT, [*VIT, 'stage.head=cls'])])
def test_other_normalisation_or_pooling_gives_other_features(tables, small_recipe, tmp_path, first, second):
    "The weights are the same: class token and mean of the patches have none"
    main(['prepare', '--recipe', str(small_recipe), '--data', str(tables), '--runs', str(tmp_path)])
    found, weights = [], []
    for keys in (first, second):
        run = load_run(small_recipe, tables, tmp_path, [*PROBE[1::2], 'stage.tta=none', *keys])
        stage, learn = run.recipe.stages['teacher'], stage_learner(run, 'teacher')
        with Bars() as bars: features = frozen.frozen_features(run, stage, learn, 'f32', bars)
        found.append(features.of(learn.dls.valid.items))
        weights.append(learn.model.state_dict())
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert len(list((tmp_path / 'prepared/features').glob('*.safetensors'))) == 2
    assert not np.allclose(*found, atol=1e-3)


def test_train_prints_the_out_of_fold_kappa(probed, capsys, monkeypatch):
    "Of grades by cross-fitted thresholds; here where nothing is trained"
    args = args_of(probed)
    real = Run.oof

    def scored(run, node, fold=None):
        oof = real(run, node, fold)
        return oof.assign(score=oof.diagnosis + np.random.default_rng(0).normal(0, .8, len(oof)))
    monkeypatch.setattr(Run, 'oof', scored)
    for setting, words in (('optimal', 'fitted on other images'), ('0.5 1.5 2.5 3.5', '0.5 1.5 2.5 3.5')):
        main(['train', 'teacher', *args, '--set', f'submit.thresholds={setting}'])
        oof = probed.oof('teacher')
        grades = np.digitize(oof.score, [.5, 1.5, 2.5, 3.5])
        if setting == 'optimal': grades = cross_fitted_grades(oof.score, oof.diagnosis, probed.parts(oof), setting)
        kappa = cohen_kappa_score(grades, oof.diagnosis, weights='quadratic')
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.startswith(f'teacher: out-of-fold kappa {kappa:.3f} (95 % CI over images 0.') and kappa > .5
        assert line.endswith(f', {len(oof)} images, thresholds {words}')


def test_lr_find_of_a_probe_trains_the_head_on_its_features(probed, tmp_path, monkeypatch):
    seen, real = [], frozen.probe_learner

    def remember(*args):
        seen.append(real(*args))
        return seen[-1]
    monkeypatch.setattr(frozen, 'probe_learner', remember)
    monkeypatch.setattr(frozen, 'predict_view_features', None)             # they are in the store
    with Bars() as bars: rates = find_rates(probed, 'teacher', tmp_path / 'rates.png', bars)
    learn, = seen
    assert learn.recorder.losses and all(0 < lr < 100 for lr in rates.values()) and (tmp_path / 'rates.png').is_file()
    assert isinstance(learn.dls.train_ds, FeatureRows)


@pytest.mark.parametrize('keep', ['last', 'kappa'])
def test_a_probe_that_diverges_writes_a_whole_network(tables, small_recipe, tmp_path, monkeypatch, capsys, keep):
    def nan_in_third_epoch(self):
        if len(self.rows) == 2: self.stop('the loss is nan')
    monkeypatch.setattr(History, 'after_batch', nan_in_third_epoch)
    args = args_in(tables, small_recipe, tmp_path, '--set', f'stage.keep={keep}')
    file = tmp_path / 'small/teacher/fold0/best.safetensors'
    expect_error(capsys, ['train', 'teacher', *args], 'epoch 3: the loss is nan', str(file))
    run = load_run(small_recipe, tables, tmp_path, [*PROBE[1::2], f'stage.keep={keep}'])
    start, best = stage_learner(run, 'teacher').model.state_dict(), load_file(file)
    assert set(best) == set(start)
    assert {k for k in start if not torch.equal(start[k], best[k])} == {'1.3.weight', '1.3.bias'}


def test_features_in_bf16_are_near_those_in_float32(probed):
    learn, stage = stage_learner(probed, 'teacher'), probed.recipe.stages['teacher']
    images = learn.dls.valid.items
    with Bars() as bars:
        exact, rounded = (frozen.frozen_features(probed, stage, learn, how, bars).of(images) for how in ('f32', 'bf16'))
    assert 0 < np.abs(exact - rounded).max() < .05 * np.abs(exact).max()
    again = predict_features(learn, images)                  # the network itself is in float32 as before
    assert np.allclose(again, exact[:, 0], atol=1e-5)


def test_views_are_part_of_a_probes_training(trained):
    def todo(*keys):
        run = load_run(trained / 'small.ini', trained / 'data', trained / 'runs', [*PROBE[1::2], *keys])
        return run.todo(['teacher'])
    assert not todo() and todo('stage.tta=hflip') == {'teacher': [0, 1]}


def test_an_interrupted_probe_resumes_bit_for_bit(tables, small_recipe, tmp_path, monkeypatch, capsys):
    whole, stopped = (args_in(tables, small_recipe, tmp_path / n, '--set', 'stage.folds=1', '--set', 'stage.ema=.9')
                      for n in 'ab')
    main(['train', 'teacher', *whole])
    real = checkpoint.Checkpoint.after_epoch

    def stop_after(self):
        real(self)
        if self.saved_epochs == 2: raise KeyboardInterrupt
    monkeypatch.setattr(checkpoint.Checkpoint, 'after_epoch', stop_after)
    with pytest.raises(SystemExit): main(['train', 'teacher', *stopped])
    monkeypatch.undo()
    main(['train', 'teacher', *stopped])
    assert 'resumes after epoch 2 of 3' in capsys.readouterr().out
    a, b = (load_file(tmp_path / n / 'small/teacher/fold0/weights.safetensors') for n in 'ab')
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_probe_of_pseudo_labels_and_a_parent_keeps_the_parents_body(tables, small_recipe, tmp_path):
    text = small_recipe.read_text().replace('[stage.retrain]', '[stage.retrain]\ninit = teacher\nepochs = 0\n'
                                            'freeze_epochs = 2\nsource_weights = 1 .5')
    small_recipe.write_text(text)
    main(['train', 'retrain', '--recipe', str(small_recipe), '--data', str(tables), '--runs', str(tmp_path)])
    teacher, probe = (load_file(tmp_path / f'small/{name}/fold1/weights.safetensors')
                      for name in ('teacher', 'retrain'))
    assert {k for k in teacher if not torch.equal(teacher[k], probe[k])} == {'1.3.weight', '1.3.bias'}


def test_each_epoch_draws_a_view_of_each_image_again():
    features = np.arange(6 * 8 * 3, dtype=np.float32).reshape(6, 8, 3)
    train, valid = FeatureRows(features, np.arange(6)), FeatureRows(features, np.arange(6))
    dls = feature_dls(Stage('s', ('t',), bs=2), train, valid, torch.device('cpu'), '.')
    assert torch.equal(torch.cat([x for x, _ in dls.valid]), torch.from_numpy(features[:, 0]))
    seen = [set() for _ in range(6)]
    for _ in range(200):
        for x, y in dls.train:
            for row, grade in zip(x, y, strict=True): seen[int(grade)].add(tuple(row.tolist()))
    assert seen == [{tuple(view) for view in image} for image in features.tolist()]
