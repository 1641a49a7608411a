"Ensembles with fitted weights: what they are fitted on, what depends on them, and which images the figures are of."
import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import TABLES, write_table
from expensive import quick_exports, quick_reports

from aptos_fastai.cli import main
from aptos_fastai.common.io import file_state, read_record, write_bytes, write_csv, write_record
from aptos_fastai.inference.grader import load_grader
from aptos_fastai.metrics import quadratic_kappa
from aptos_fastai.pipeline.graph import load_run
from aptos_fastai.pipeline.pseudo_labels import read_labels
from aptos_fastai.pipeline.reasons import training_reasons
from aptos_fastai.pipeline.summary import epoch_warnings, out_of_fold_grades
from aptos_fastai.recipe.read import read_recipe
from aptos_fastai.recipe.sections import ConfigError
from aptos_fastai.recipe.smaller import without_tables
from aptos_fastai.run_folder import FINISHED, FOLD_FILES, PREDS, WEIGHTS, Run

RECIPE = '''
[recipe]
splits = 3
''' + TABLES + '''
[stage]
arch = test_resnet
weights = none
precision = f32
size = 32
bs = 8
epochs = 1
folds = 3
keep = last
train = train
[stage.first]
[stage.second]
lr = 0.01
[stage.student]
train = train blend:test
[ensemble.blend]
members = first second
weights = fitted
[submit]
final = blend
table = test
'''
N = 300


def recipe_of(folder, *sets):
    folder.mkdir(exist_ok=True)
    (folder / 'recipe.ini').write_text(RECIPE)
    return read_recipe(folder / 'recipe.ini', sets=sets)


def table(n, name, folds=3):
    grades = np.random.default_rng(0).integers(0, 5, n)
    ids = [f'{name}{i}' for i in range(n)]
    return pd.DataFrame(dict(id_code=ids, source=name, diagnosis=grades, fold=np.arange(n) % folds, path=ids,
                             group=[f'{name}:{i}' for i in ids]))


def write_scores(run, stage, errors):
    "Write each fold of a stage as if it were finished, with the grades plus `errors` as scores, without networks"
    train = run.frames['train']
    for k in run.folds_of(stage):
        out, rows = run.fold_dir(stage, k), train[train.fold == k]
        preds = rows[['id_code', 'source', 'diagnosis', 'fold']].assign(score=rows.diagnosis + errors[rows.index])
        write_csv(out / PREDS, preds.assign(feature_distance=1.))
        for file in set(FOLD_FILES) - {PREDS}: write_bytes(out / file, f'{stage} {k}'.encode())
        parents = run.parent_weight_hashes(stage, k)
        write_record(out / FINISHED, dict(
            fingerprint=run.fingerprint(stage, k), precision='f32', parents=parents, inputs=run.inputs(stage, k),
            settings=dict(weights='none'), files={f: file_state(out / f) for f in FOLD_FILES}))


@pytest.fixture
def run(tmp_path):
    "A run of which `first` has errors of SD 0.5, `second` of SD 1, independent ones; without images or trainings"
    run = Run(recipe_of(tmp_path), tmp_path, tmp_path / 'run', dict(train=table(N, 'train'), test=table(8, 'test')))
    rng = np.random.default_rng(1)
    for stage, sd in (('first', .5), ('second', 1.)): write_scores(run, stage, rng.normal(0, sd, N))
    return run


def with_grades_of_fold(run, fold, stages=('first', 'second')):
    "Return the run with other grades of a fold's images, with the same scores as before"
    train = run.frames['train']
    changed = train.diagnosis.where(train.fold != fold, 4 - train.diagnosis)
    for stage in stages:
        out = run.fold_dir(stage, fold)
        preds = pd.read_csv(out / PREDS, dtype=dict(id_code=str))
        write_csv(out / PREDS, preds.assign(diagnosis=4 - preds.diagnosis))
        record = read_record(out / FINISHED)
        write_record(out / FINISHED, dict(record, files={**record['files'], PREDS: file_state(out / PREDS)}))
    return replace(run, frames=run.frames | dict(train=train.assign(diagnosis=changed)))


# What the weights are

@pytest.mark.parametrize('keep, warnings', [('last', 0), ('kappa', 2)])
def test_members_that_keep_other_epochs_are_warned_of(run, keep, warnings):
    run.recipe.stages['second'] = replace(run.recipe.stages['second'], keep=keep)
    found = epoch_warnings(run, 'blend')
    assert len(found) == warnings and all('kappa' in text for text in found)


def test_fitted_weights_prefer_the_better_member(run):
    "Of two unbiased members with independent errors the best weights are inverse to the variances: 0.8 and 0.2"
    weights = run.member_weights('blend')
    assert weights == pytest.approx(dict(first=.8, second=.2), abs=.06) and sum(weights.values()) == pytest.approx(1)
    oof, first = run.oof('blend'), run.oof('first')
    error, error_of_first = (((o.score - o.diagnosis) ** 2).mean() for o in (oof, first))
    equal = replace(run, recipe=recipe_of(run.data, 'ensemble.blend.weights=')).oof('blend')
    assert error < error_of_first < ((equal.score - equal.diagnosis) ** 2).mean()


def test_a_member_of_weight_0_is_left_out_of_the_model(run):
    write_scores(run, 'second', run.oof('first').set_index('id_code').score[run.frames['train'].id_code].to_numpy()
                 - run.frames['train'].diagnosis.to_numpy() + np.random.default_rng(2).normal(0, 2, N))
    assert run.member_weights('blend') == {'first': 1.}
    assert run.oof('blend').score.to_numpy() == pytest.approx(run.oof('first').score.to_numpy())


def test_figures_of_a_fold_do_not_depend_on_its_grades(run):
    oof, before = run.oof('blend'), {k: run.member_weights('blend', without=k) for k in range(3)}
    thresholds = {k: run.thresholds('blend', 'optimal', without=k) for k in range(3)}
    changed = with_grades_of_fold(run, 1)
    assert changed.member_weights('blend', without=1) == before[1]
    assert changed.member_weights('blend', without=0) != pytest.approx(before[0], abs=.01)
    assert changed.thresholds('blend', 'optimal', without=1).tolist() == thresholds[1].tolist()
    now = changed.oof('blend')
    of_fold = oof.fold == 1
    assert now.score[of_fold].equals(oof.score[of_fold]) and not now.score[~of_fold].equals(oof.score[~of_fold])
    assert now[of_fold].score.to_list() == changed.oof('blend', 1).score.to_list()


def test_random_members_are_no_better_than_chance(run):
    "Weights fitted to the images that they are judged on find something in noise; those behind `oof` do not"
    names = [f'noise{i}' for i in range(20)]
    sets = [f'stage.{name}.train=train' for name in names]
    recipe = recipe_of(run.data, *sets, f'ensemble.blend.members={" ".join(names)}')
    run = replace(run, recipe=recipe, frames=dict(run.frames, train=run.frames['train'][:90]))
    grades, rng = run.frames['train'].diagnosis.to_numpy(), np.random.default_rng(3)
    for name in names: write_scores(run, name, rng.normal(2, 1, 90) - grades)
    oof, weights = run.oof('blend'), run.member_weights('blend')
    in_sample = sum(w * run.oof(m).score for m, w in weights.items())
    kappas = [quadratic_kappa(out_of_fold_grades(run, oof.assign(score=score), 'optimal'), oof.diagnosis)
              for score in (in_sample, oof.score)]
    assert kappas[0] > .15 and kappas[1] < .05
    assert np.corrcoef(in_sample, oof.diagnosis)[0, 1] > .2 and np.corrcoef(oof.score, oof.diagnosis)[0, 1] < .05


@pytest.mark.parametrize('folds', [1, 2])
def test_few_folds_are_cross_fitted_in_five_parts_as_thresholds_are(run, folds):
    few = replace(run, recipe=recipe_of(run.data, f'stage.folds={folds}', 'stage.student.train=train'))
    oof = few.oof('blend')
    assert len(oof) == N / 3 * folds and oof.score.notna().all()
    means = [.5 * few.oof(m).score for m in ('first', 'second')]
    weights = (oof.score - 2 * means[1]) / (2 * means[0] - 2 * means[1])
    assert weights.round(6).nunique() == 5


def test_images_of_members_are_matched_by_id(run):
    expected = run.oof('blend').score.to_list()
    out = run.fold_dir('second', 0)
    write_csv(out / PREDS, pd.read_csv(out / PREDS, dtype=dict(id_code=str))[::-1])
    record = read_record(out / FINISHED)
    write_record(out / FINISHED, dict(record, files={**record['files'], PREDS: file_state(out / PREDS)}))
    assert run.oof('blend').score.to_list() == pytest.approx(expected)


# What depends on them

def test_students_know_what_determines_the_weights(run):
    fingerprints = [run.fingerprint('student', k) for k in range(3)]
    for sets in (['stage.second.lr=0.02'], ['stage.second.tta=hflip'], ['ensemble.blend.weights=1 1'],
                 ['ensemble.blend.weights=']):
        other = replace(run, recipe=recipe_of(run.data, *sets))
        assert all(other.fingerprint('student', k) != fingerprints[k] for k in range(3)), sets
    grades = with_grades_of_fold(run, 1)
    assert all(grades.fingerprint('student', k) != fingerprints[k] for k in range(3))


def test_a_member_trained_again_trains_every_fold_of_the_student(run):
    "The weights of the mean that labels for fold 0 are fitted to the scores of the folds 1 and 2"
    write_scores(run, 'student', np.zeros(N))
    assert run.todo() == {}
    folder = run.fold_dir('second', 1)
    record = read_record(folder / FINISHED)
    write_bytes(folder / WEIGHTS, b'second 2')                                 # of the same size
    write_record(folder / FINISHED, dict(record, files={**record['files'], WEIGHTS: file_state(folder / WEIGHTS)}))
    assert run.todo() == {'student': [0, 1, 2]}
    shutil.rmtree(folder)
    assert run.todo() == {'second': [1], 'student': [0, 1, 2]}
    fixed = replace(run, recipe=recipe_of(run.data, 'ensemble.blend.weights='))
    assert fixed.parent_networks('student', 0) == {'first': ('first', 0), 'second': ('second', 0)}


# The recipe

@pytest.mark.parametrize('sets, message', [
    (['stage.folds=1'], r'\[stage.student\] train = blend:test: the weights of blend are fitted on its only fold, '
     'whose images validate student. Set folds of its members to 2 or more, or give .ensemble.blend. weights as numb'),
    (['ensemble.blend.weights=fited'], 'weights = fited: enter fitted, or for each member a number from 0 to 1000000'),
    (['ensemble.blend.weights=1 -1'], 'weights = 1 -1: enter fitted, or for each member a number'),
    (['ensemble.blend.weights=1 2 3'], 'weights = 1 2 3: enter one number for each of the 2 members'),
    (['ensemble.blend.members=first second first'], 'members = first second first: first is named twice'),
])
def test_what_a_recipe_may_not_say(tmp_path, sets, message):
    with pytest.raises(ConfigError, match=message): recipe_of(tmp_path, *sets)


def test_seeds_and_lost_members(tmp_path):
    recipe = recipe_of(tmp_path, 'stage.second.seeds=2')
    assert recipe.is_fitted('blend') and list(recipe.members('blend')) == ['first', 'second_seed1', 'second_seed2']
    assert not recipe.is_fitted('second') and not recipe.is_fitted('first')
    sets = ['table.more.images=more', 'table.more.grade=folder', 'stage.third.train=train more',
            'stage.third.validate=train', 'ensemble.blend.members=first third second']
    smaller = without_tables(recipe_of(tmp_path, *sets), ['more'])
    assert smaller.is_fitted('blend') and list(smaller.members('blend')) == ['first', 'second']


# A run

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A folder with recipe.ini, data and the finished run of `RECIPE` in runs/blend"
    folder = tmp_path_factory.mktemp('blend')
    write_table(folder / 'data', 30)
    write_table(folder / 'data', 8, graded=False, seed=1, name='test')
    recipe_of(folder, 'stage.folds=2')
    with quick_reports(): main(['all', *options(folder)])
    return folder


def options(folder, *sets, name='blend'):
    args = [f'--recipe={folder / "recipe.ini"}', f'--data={folder / "data"}', f'--runs={folder / "runs"}',
            f'--name={name}']
    return [*args, *(o for text in ('stage.folds=2', *sets) for o in ('--set', text))]


def open_run(folder, *sets):
    return load_run(folder / 'recipe.ini', folder / 'data', folder / 'runs', ['stage.folds=2', *sets], name='blend')


def test_the_model_uses_the_weights_of_all_folds(finished):
    root, run = finished / 'runs/blend', open_run(finished)
    summary = json.loads((root / 'summary.json').read_text())
    weights = run.member_weights('blend')
    blend = next(o for o in summary['stages'] if o['stage'] == 'blend')
    assert summary['submission']['members'] == weights and blend['fitted']
    assert blend['members'] == {'first': weights.get('first', 0.), 'second': weights.get('second', 0.)}
    stored, scores = pd.read_csv(root / 'oof.csv'), pd.read_csv(root / 'scores.csv')
    nested = run.oof('blend').set_index('id_code').score[stored.id_code]
    assert stored.blend.to_numpy() == pytest.approx(nested.to_numpy())
    files = run.frames['test'].set_index('id_code').path[scores.id_code].tolist()
    assert load_grader(root).predict(files).score.to_numpy() == pytest.approx(scores.blend.to_numpy(), abs=1e-3)
    parts = {m: np.mean([pd.read_csv(root / f'{m}/fold{k}/scores_test_none.csv').score for k in range(2)], 0)
             for m in weights}
    assert scores.blend.to_numpy() == pytest.approx(sum(w * parts[m] for m, w in weights.items()), abs=1e-6)


def test_labels_of_a_fold_are_by_weights_without_it(finished):
    root, run = finished / 'runs/blend', open_run(finished)
    labels = read_labels(run, 'blend', 'test', 'soft')
    provenance = read_record(root / 'labels/blend/test/provenance.json')
    for k in range(2):
        weights = run.member_weights('blend', without=k)
        assert provenance['members'][k] == weights
        expected = sum(w * pd.read_csv(root / f'{m}/fold{k}/scores_test_none.csv').score for m, w in weights.items())
        assert labels[f'fold{k}'].to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-6)
    assert set(read_record(root / 'student/fold0/stage.json')['parents']) == {
        'first', 'second', 'first/fold1', 'second/fold1'}


def test_nothing_trains_again_until_the_weights_are_others(finished):
    assert open_run(finished).todo() == {}
    run = open_run(finished, 'ensemble.blend.weights=1 1')
    assert run.todo() == {'student': [0, 1]}
    assert training_reasons(run, run.todo()) == ['student: members or weights of [ensemble.blend] changed']


def test_report_and_card_say_the_weights(finished):
    root = finished / 'runs/blend'
    weights = open_run(finished).member_weights('blend')
    assert f'mean of first ({weights.get("first", 0):.2f}), second' in (root / 'report.html').read_text()
    with quick_exports(): main(['export', str(root)])
    card = ' '.join((root / 'bundle/MODEL_CARD.md').read_text().split())
    assert 'The weights are fitted to the out-of-fold scores' in card
    assert all(f'| {w / 2:.3f} |' in card for w in weights.values())
