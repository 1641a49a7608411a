"`tune`: a sweep over keys of a stage, what it keeps, and that its best values are measured on other folds."
import shutil
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
from conftest import expect_error, modified_times, write_table

pytest.importorskip('optuna')

from aptos_fastai.cli import main
from aptos_fastai.common.io import read_record, write_bytes
from aptos_fastai.pipeline import tune
from aptos_fastai.recipe.read import changed, read_recipe
from aptos_fastai.training.callbacks import TrainingDiverged

RECIPE = """
[recipe]
splits = 3
[table.train]
csv = train.csv
images = train_images
grade = diagnosis
[stage]
arch = test_resnet
weights = none
size = 32
folds = 2
epochs = 1
bs = 8
precision = f32
train = train
[stage.first]
[stage.teacher]
init = first
lr = 3e-2
[ensemble.both]
members = first teacher
[submit]
final = teacher
thresholds = optimal
[tune.teacher]
lr = 1e-3 1e-2 log
wd = 0.01 | 0.1
"""


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "A folder with a graded table"
    folder = tmp_path_factory.mktemp('data')
    write_table(folder, 40)
    return folder


def options(folder, data, *sets):
    "The command line options of the recipe, which is written into `folder`"
    if not (folder / 'small.ini').exists(): (folder / 'small.ini').write_text(RECIPE)
    pairs = [o for text in sets for o in ('--set', text)]
    return ['--recipe', str(folder / 'small.ini'), '--data', str(data), '--runs', str(folder / 'r'), *pairs]


def sweep(folder, data, trials, *sets, stage='teacher'):
    "Run `tune`; return tune.csv"
    main(['tune', stage, *options(folder, data, *sets), '--trials', str(trials)])
    return read_trials(folder, stage)


def read_trials(folder, stage='teacher'):
    return pd.read_csv(folder / f'r/small/tune/{stage}/tune.csv', keep_default_na=False, na_values=dict(kappa=['']))


@contextmanager
def scores_instead_of_trainings():
    """In this block the nearer a trial's lr is to 3e-3, the less noise its scores have; nothing is trained.

    Yields the list of (folder, fold) that were asked for on the folds of choosing.
    """
    asked = []

    def fold_scores(trial, fold, bars):
        if trial.root.name != tune.OTHER_FOLDS: asked.append((trial.folder, fold))
        stage = trial.recipe.stages[trial.tuned]
        if stage.lr > .1:
            write_bytes(trial.fold_dir(trial.tuned, fold) / 'best.safetensors', b'of the best epoch')
            raise TrainingDiverged('epoch 1: the loss is nan. Lower the stage\'s lr.')
        frame = trial.frames['train'][trial.validation_part(stage, 'train', fold)]
        noise = np.random.default_rng(0).normal(0, .2 + abs(np.log(stage.lr / 3e-3)), len(frame))
        return frame[['id_code', 'source', 'diagnosis', 'fold']].assign(score=frame.diagnosis + noise)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(tune, 'fold_scores', fold_scores)
        m.setattr(tune, 'train_nodes', lambda run, nodes, bars: 0)
        yield asked


@pytest.fixture
def scored(monkeypatch):
    "Scores in the place of trainings; the importance of keys, by forests and a plot, is left out"
    monkeypatch.setattr(tune, 'importance', lambda study: {})
    with scores_instead_of_trainings() as asked: yield asked


# A sweep that trains

@pytest.fixture(scope='module')
def swept(tmp_path_factory, data):
    "The folder of a sweep of two trials; the recipe's own lr is outside the range"
    folder = tmp_path_factory.mktemp('swept')
    sweep(folder, data, 2)
    return folder


def folds_of(file): return pd.read_csv(file).set_index('id_code').fold


def test_the_parents_are_trained_once_and_the_stage_itself_is_not(swept):
    run = swept / 'r/small'
    assert (run / 'first/fold1/weights.safetensors').exists() and not (run / 'teacher').exists()
    assert (run / 'tune/other_folds/first/fold1/weights.safetensors').exists()


def test_a_trial_keeps_scores_and_record_but_no_weights(swept):
    run = swept / 'r/small'
    trials = read_trials(swept)
    assert trials.folds.tolist() == [2, 2] and trials.kappa.is_monotonic_decreasing
    for folder in trials.folder:
        for k in range(2):
            files = {f.name for f in (run / 'tune/teacher' / folder / f'fold{k}').iterdir()}
            assert files == {'stage.json', 'preds.csv', 'history.csv'}
        record = read_record(run / 'tune/teacher' / folder / 'fold0/stage.json')
        assert record['settings']['lr'] == trials.set_index('folder').lr[folder]    # all its digits
    assert trials.lr.between(1e-3, 1e-2).all()


def test_the_best_values_are_measured_on_other_folds(swept):
    run = swept / 'r/small'
    found = read_record(run / 'tune/teacher/tune.json')
    trials = read_trials(swept)
    assert found['own'] == dict(lr='3e-2', wd='0.01') and found['best']['lr'] == str(trials.lr[0])
    assert found['chosen']['best'][0] == trials.kappa[0]
    assert (found['chosen']['seed'], found['other']['seed']) == (42, 43)
    for place in ('chosen', 'other'):
        own, best, difference = (found[place][key] for key in ('own', 'best', 'difference'))
        assert difference[0] == pytest.approx(best[0] - own[0])
    chosen, other = folds_of(run / 'folds.csv'), folds_of(run / 'tune/other_folds/folds.csv')
    together = [np.equal.outer(o.to_numpy(), o.to_numpy()) for o in (chosen, other.loc[chosen.index])]
    assert (together[0] != together[1]).any()                        # other folds, not other numbers of the same ones
    for folder in (run / 'tune/other_folds/tune/teacher').iterdir():
        for k in range(2):
            ids = pd.read_csv(folder / f'fold{k}/preds.csv').id_code
            assert set(ids) == set(other.index[other == k])


def test_a_second_call_trains_nothing(swept, data, capsys):
    run = swept / 'r/small'
    before = modified_times(run / 'tune')
    sweep(swept, data, 2)
    out = capsys.readouterr().out
    kept = {'tune.csv', 'tune.json', 'importance.png', 'teacher.db'}
    assert {f: t for f, t in modified_times(run / 'tune').items() if f.name not in kept} == {
        f: t for f, t in before.items() if f.name not in kept}
    assert 'goes on after 2 trials' in out and '--set stage.teacher.lr=' in out and 'optimistic' in out
    assert (swept / 'small.ini').read_text() == RECIPE
    assert 'lr = 3e-2' in (run / 'recipe.ini').read_text()


def test_the_stage_trained_with_the_best_values_has_the_kappa_of_the_trial(swept, data, tmp_path, capsys):
    best = read_record(swept / 'r/small/tune/teacher/tune.json')
    sets = [f'stage.teacher.{key}={text}' for key, text in best['best'].items()]
    main(['train', 'teacher', *options(tmp_path, data, *sets)])
    assert f'out-of-fold kappa {best["chosen"]["best"][0]:.3f}' in capsys.readouterr().out


def test_a_stopped_sweep_loses_only_the_running_fold(tmp_path, data, monkeypatch, capsys):
    own = 'stage.teacher.lr=2e-3', 'stage.keep=last'
    train, trained = tune.train_fold, []

    def train_fold(run, name, fold, bars):
        trained.append((run.folder, fold))
        if len(trained) == 4: raise KeyboardInterrupt
        train(run, name, fold, bars)
    monkeypatch.setattr(tune, 'train_fold', train_fold)
    main(['train', 'teacher', *options(tmp_path, data, *own)])
    with pytest.raises(SystemExit) as e: sweep(tmp_path, data, 3, *own)
    assert e.value.code == 130
    assert len({folder for folder, _ in trained}) == 2               # the run's own stage has the values of the first
    trained.clear()
    trials = sweep(tmp_path, data, 3, *own)
    of_choosing = [o for o in trained if o[0] in set(trials.folder)]
    assert of_choosing[0][1] == 1 and of_choosing.count(of_choosing[0]) == 1
    assert sorted(trials.trial) == [1, 2, 3] and trials.kappa.notna().all()


@pytest.fixture(scope='module')
def several(tmp_path_factory, data):
    "The folder of a finished run whose stage `teacher` has two seeds"
    folder = tmp_path_factory.mktemp('several')
    main(['train', 'teacher', *options(folder, data, 'stage.teacher.seeds=2', 'stage.keep=last')])
    return folder


@pytest.fixture
def several_copy(several, tmp_path):
    "A copy of it beside it, from where the path of the data is the same; a test may change it"
    return shutil.copytree(several, tmp_path, dirs_exist_ok=True)


@pytest.mark.parametrize('seeds', ['2', '1'])
def test_one_training_of_several_seeds_is_tuned_and_the_run_stays_as_it_is(several_copy, data, monkeypatch, capsys,
                                                                           seeds):
    several, run = several_copy, several_copy / 'r/small'
    monkeypatch.setattr(tune, 'train_fold', lambda *args: pytest.fail('the own values are those of teacher_seed1'))
    before = {f: (t, f.read_bytes()) for f, t in modified_times(run).items() if run / 'tune' not in f.parents}
    sets = f'stage.teacher.seeds={seeds}', 'stage.keep=last', 'tune.teacher.lr=1e-3 1e-1 log'
    trials = sweep(several, data, 1, *sets)
    assert trials.folds.tolist() == [2] and 'there is nothing to set' in capsys.readouterr().out
    rewritten = {'run.json', 'folds.csv', 'images.csv'}              # by each command, with the same content
    for file, (written, content) in before.items():
        assert file.read_bytes() == content, file
        if file.name not in rewritten: assert file.stat().st_mtime_ns == written, file
    assert {f.name for f in run.iterdir() if f.is_dir()} == {'first', 'teacher_seed1', 'teacher_seed2', 'tune'}
    assert 'seeds = 2' in (run / 'recipe.ini').read_text()


def test_a_renamed_stage_keeps_its_folder(several_copy, data, monkeypatch):
    monkeypatch.setattr(tune, 'train_fold', lambda *args: pytest.fail('first is trained already, as second'))
    text = RECIPE.replace('[stage.first]', '[stage.second]').replace('= first', '= second')
    (several_copy / 'small.ini').write_text(text)
    sweep(several_copy, data, 1, 'stage.teacher.seeds=2', 'stage.keep=last', 'tune.teacher.lr=1e-3 1e-1 log')
    assert (several_copy / 'r/small/first').is_dir() and not (several_copy / 'r/small/second').exists()
    assert '[stage.first]' in (several_copy / 'r/small/recipe.ini').read_text()


def test_all_trials_keep_the_last_epoch(tmp_path, data, capsys):
    sets = 'stage.teacher.keep=kappa', 'stage.folds=1', 'tune.teacher.epochs=2 3'
    trials = sweep(tmp_path, data, 2, *sets)
    out = capsys.readouterr().out
    assert 'Trials keep the last epoch.' in out and '(keep = kappa)' in out
    files = list((tmp_path / 'r/small/tune').glob('**/teacher/*/fold0/history.csv'))
    assert len(files) == len(trials) + 1 + 2                         # the own values, and two sets on other folds
    for file in files:
        assert pd.read_csv(file).kept.tolist()[-1]
        assert read_record(file.parent / 'stage.json')['settings']['keep'] == 'last'
    assert '--set stage.teacher.epochs=' in out
    assert 'They were compared with keep = last; the stage has keep = kappa.' in out
    assert 'stage.teacher.keep' not in out.partition('To use the best values')[2]


def test_a_stage_that_keeps_the_last_epoch_needs_no_such_words(tmp_path, data, scored, capsys):
    sweep(tmp_path, data, 3, 'stage.keep=last')
    out = capsys.readouterr().out
    assert '--set stage.teacher.lr=' in out and 'keep = ' not in out and 'Trials keep' not in out


# What the sweep decides, with scores in the place of trainings

def test_a_resumed_sweep_tries_what_an_uninterrupted_one_does(tmp_path, data, scored, monkeypatch):
    whole = sweep(tmp_path, data, 12)
    (tmp_path / 'b').mkdir()
    sweep(tmp_path / 'b', data, 5)
    fold_scores, calls = tune.fold_scores, []

    def stop(trial, fold, bars):
        calls.append(fold)
        if len(calls) == 4: raise KeyboardInterrupt
        return fold_scores(trial, fold, bars)
    with monkeypatch.context() as m:
        m.setattr(tune, 'fold_scores', stop)
        with pytest.raises(SystemExit): sweep(tmp_path / 'b', data, 12)
    resumed = sweep(tmp_path / 'b', data, 12)
    columns = ['trial', 'kappa', 'lr', 'wd', 'folder']
    pd.testing.assert_frame_equal(whole[columns], resumed[columns])


@pytest.fixture(scope='module')
def long_sweep(tmp_path_factory, data):
    "Folder, trials and folds asked for of a sweep of 25 trials"
    folder = tmp_path_factory.mktemp('long')
    with scores_instead_of_trainings() as asked: return folder, sweep(folder, data, 25), asked


def test_the_sampler_finds_the_better_values(long_sweep):
    folder, trials, _ = long_sweep
    best = trials.dropna(subset='kappa').iloc[0]
    assert abs(np.log(best.lr / 3e-3)) < .3
    assert (folder / 'r/small/tune/teacher/importance.png').read_bytes().startswith(b'\x89PNG')
    importance = read_record(folder / 'r/small/tune/teacher/tune.json')['importance']
    assert list(importance) == ['lr', 'wd']                          # wd changes nothing here


def test_a_bad_trial_is_pruned_between_folds(long_sweep):
    _, trials, asked = long_sweep
    pruned = trials[trials.stopped != '']
    assert len(pruned) and pruned.kappa.isna().all() and (pruned.folds == 1).all()
    assert pruned.stopped.str.startswith('pruned after 1 of 2 folds').all()
    assert pruned.trial.min() > 5                                    # the median pruner waits for five
    for folder in pruned.folder: assert (folder, 1) not in asked
    best = trials.dropna(subset='kappa')
    assert best.kappa.iloc[0] == best.kappa.max()


def test_changed_ranges_are_another_study(tmp_path, data, scored, capsys):
    sweep(tmp_path, data, 3)
    capsys.readouterr()
    trials = sweep(tmp_path, data, 2, 'tune.teacher.lr=1e-3 5e-2 log')
    out = capsys.readouterr().out
    assert ('the ranges changed (lr: 1e-3 1e-2 log -> 1e-3 5e-2 log): a new study. What the earlier one tried '
            '(3 trials) stays in') in out
    assert len(trials) == 2
    assert len(sweep(tmp_path, data, 4)) == 4                        # the first one goes on
    assert 'goes on after 3 trials' in capsys.readouterr().out


@pytest.fixture(scope='module')
def two_trials(tmp_path_factory, data):
    "The folder of a sweep of two trials; tests must not change it"
    folder = tmp_path_factory.mktemp('two')
    with scores_instead_of_trainings(): sweep(folder, data, 2)
    return folder


@pytest.mark.parametrize('change', ['stage.teacher.epochs=2', 'stage.first.lr=2e-3', 'submit.thresholds=regularised'])
def test_trials_of_other_settings_do_not_count(two_trials, tmp_path, data, scored, capsys, change):
    shutil.copytree(two_trials, tmp_path, dirs_exist_ok=True)
    sweep(tmp_path, data, 1, change)
    assert 'other keys, tables, images or parents changed: a new study' in capsys.readouterr().out


@pytest.mark.parametrize('change', ['stage.teacher.lr=5e-3', 'stage.teacher.workers=0', 'tune.first.lr=1e-3 1e-2'])
def test_keys_that_change_no_trial_are_no_other_study(two_trials, tmp_path, data, scored, capsys, change):
    shutil.copytree(two_trials, tmp_path, dirs_exist_ok=True)
    sweep(tmp_path, data, 2, change)
    assert 'goes on after 2 trials' in capsys.readouterr().out


def test_changed_grades_are_another_study(tmp_path, data, scored, capsys):
    other = tmp_path / 'data'
    write_table(other, 40)
    sweep(tmp_path, other, 2)
    df = pd.read_csv(other / 'train.csv')
    df.loc[0, 'diagnosis'] = 3
    df.to_csv(other / 'train.csv', index=False)
    sweep(tmp_path, other, 1)
    assert 'tables, images or parents changed: a new study' in capsys.readouterr().out


def test_a_diverged_trial_is_noted_and_the_sweep_goes_on(tmp_path, data, scored):
    trials = sweep(tmp_path, data, 8, 'tune.teacher.lr=1e-3 10 log')
    stopped = trials[trials.lr > .1]
    assert len(stopped) and set(stopped.stopped) == {'epoch 1: the loss is nan'} and stopped.kappa.isna().all()
    assert trials.kappa[0] == trials.kappa.max() and not list(tmp_path.rglob('best.safetensors'))


def test_own_values_that_cannot_be_trained_do_not_end_the_comparison(tmp_path, data, scored, capsys):
    sweep(tmp_path, data, 3, 'stage.teacher.lr=.5')
    out = capsys.readouterr().out
    found = read_record(tmp_path / 'r/small/tune/teacher/tune.json')
    for place in ('chosen', 'other'):
        assert found[place]['not_trained'] == dict(own='epoch 1: the loss is nan')
        assert found[place]['own'] is found[place]['difference'] is None
        assert found[place]['best'] and found[place]['images']
    assert 'the recipe\'s own values on other folds: epoch 1: the loss is nan.' in ' '.join(out.split())
    assert '--set stage.teacher.lr=' in out and not list(tmp_path.rglob('best.safetensors'))


def test_best_values_that_diverge_on_other_folds_are_reported(tmp_path, data, scored, monkeypatch, capsys):
    fold_scores = tune.fold_scores

    def diverge(trial, fold, bars):
        if trial.root.name != tune.OTHER_FOLDS or trial.recipe.stages['teacher'].lr == 3e-2:
            return fold_scores(trial, fold, bars)
        raise TrainingDiverged('epoch 2: the loss is inf. Lower the stage\'s lr.')
    monkeypatch.setattr(tune, 'fold_scores', diverge)
    sweep(tmp_path, data, 2)
    found = read_record(tmp_path / 'r/small/tune/teacher/tune.json')
    assert found['chosen']['difference'] and not found['chosen']['not_trained']
    assert found['other']['not_trained'] == dict(best='epoch 2: the loss is inf') and found['other']['own']
    assert 'the best values on other folds: epoch 2: the loss is inf.' in ' '.join(capsys.readouterr().out.split())


def test_the_trials_are_written_before_the_comparison(tmp_path, data, scored, monkeypatch, capsys):
    def fail(run, nodes, bars):
        if run.root.name == tune.OTHER_FOLDS: raise TrainingDiverged('first: the loss is nan. Lower its lr.')
    monkeypatch.setattr(tune, 'train_nodes', fail)
    expect_error(capsys, ['tune', 'teacher', *options(tmp_path, data), '--trials', 2], 'first: the loss is nan')
    assert len(read_trials(tmp_path)) == 2


def test_a_sweep_of_which_no_trial_finishes_is_an_error(tmp_path, data, scored, capsys):
    args = ['tune', 'teacher', *options(tmp_path, data, 'tune.teacher.lr=1 10'), '--trials', 2]
    expect_error(capsys, args, 'no trial was trained to its end', 'the loss is nan', 'Change the ranges')


def test_values_that_cannot_run_together_are_noted(tmp_path, data, scored):
    sets = 'stage.teacher.lr_div=1', 'tune.teacher.lr_div=1 | 4', 'tune.teacher.layer_decay=0.7 | 1'
    trials = sweep(tmp_path, data, 12, *sets)
    together = (trials.lr_div > 1) & (trials.layer_decay < 1)
    assert together.any() and trials.stopped[together].str.startswith('cannot run').all()
    assert not trials.stopped[~together].str.startswith('cannot run').any()


def test_where_the_recipes_own_values_win_nothing_is_to_be_set(tmp_path, data, scored, capsys):
    trials = sweep(tmp_path, data, 3, 'stage.teacher.lr=3.00000e-3')
    out = capsys.readouterr().out
    assert trials.trial[0] == 1 and 'there is nothing to set' in out and '--set stage' not in out
    assert 'other' not in read_record(tmp_path / 'r/small/tune/teacher/tune.json')


def test_images_of_a_tuned_size_are_prepared(tmp_path, data, scored):
    trials = sweep(tmp_path, data, 4, 'tune.first.size=32 | 48', 'tune.first.lr=1e-3 1e-2', stage='first')
    assert set(trials['size']) == {32, 48}
    assert len(list((tmp_path / 'r/prepared').glob('*48*/*/*.jpg'))) == 40


# Errors, before anything trains

@pytest.mark.parametrize('sets, words', [
    (['tune.teacher.lr=1e-4 20'], ['[tune.teacher] lr = 1e-4 20', 'enter a number from 0 to 10']),
    (['tune.teacher.lr=1e-2 1e-4'], ['[tune.teacher] lr', 'enter the smaller number first']),
    (['tune.teacher.lr=1e-2 1e-2'], ['enter the smaller number first']),
    (['tune.teacher.lr=0 1e-2 log'], ['a logarithmic scale begins above 0']),
    (['tune.teacher.lr=1e-2'], ['enter FROM TO, FROM TO log, or values separated by |']),
    (['tune.teacher.lr='], ['enter FROM TO']),
    (['tune.teacher.lr=1 2 3'], ['enter FROM TO']),
    (['tune.teacher.epochs=1.5 3'], ['enter a whole number from 0 to 1000']),
    (['tune.teacher.tta=none | d5'], ['no such value', 'none, hflip, rot4, d4']),
    (['tune.teacher.tta=none'], ['enter different values, separated by |']),
    (['tune.teacher.tta=none | none'], ['enter different values, separated by |']),
    (['tune.teacher.lrr=1e-4 1e-2'], ['[tune.teacher] lrr: no such key, did you mean lr?']),
    (['tune.teacher.folds=2 3'], ['[tune.teacher] folds: a key that is not tuned', 'Accepted keys']),
    (['tune.teacher.train=a | b'], ['[tune.teacher] train: a key that is not tuned']),
    (['tune.teacher.keep=kappa | last'], ['[tune.teacher] keep: a key that is not tuned']),
    (['tune.teacher.seed=1 3'], ['[tune.teacher] seed: a key that is not tuned']),
    (['tune.teachr.lr=1e-4 1e-2'], ['[tune.teachr]: no such stage, did you mean teacher?']),
    (['tune.both.lr=1e-4 1e-2'], ['[tune.both]: an ensemble, which is not trained']),
    (['tune.teacher.bs=8 | 64'], ['[tune.teacher] bs = 8 | 64: 64 cannot run', 'Set it to']),
    (['tune.teacher.head=gem | avg'], ['[tune.teacher] head', 'Use the same arch, head and loss']),
    (['tune.teacher.optimizer=adam | adan9'], ['[tune.teacher] optimizer', 'adan9']),
    (['stage.teacher.seeds=2', 'tune.teacher.bs=8 | 64'], ['[tune.teacher] bs = 8 | 64: 64 cannot run']),
])
def test_a_wrong_range_is_one_line_and_leaves_nothing(tmp_path, data, capsys, sets, words):
    expect_error(capsys, ['tune', 'teacher', *options(tmp_path, data, *sets)], *words)
    assert not (tmp_path / 'r').exists()


@pytest.mark.parametrize('stage, words', [
    ('both', ['both: an ensemble, which is not trained', 'first, teacher']),
    ('first', ['no ranges to tune', '[tune.first]']),
    ('techer', ['no such stage', 'did you mean teacher?'])])
def test_what_cannot_be_tuned(tmp_path, data, capsys, stage, words):
    expect_error(capsys, ['tune', stage, *options(tmp_path, data)], *words)
    assert not (tmp_path / 'r').exists()


def test_a_single_training_of_several_seeds_has_no_ranges(tmp_path, data, capsys):
    args = ['tune', 'teacher_seed2', *options(tmp_path, data, 'stage.teacher.seeds=2')]
    expect_error(capsys, args, 'teacher_seed2: one of the trainings of teacher', 'Tune teacher')
    assert not (tmp_path / 'r').exists()


def test_a_recipe_that_names_one_training_of_several_seeds(tmp_path, data, capsys):
    sets = 'stage.teacher.seeds=2', 'submit.final=teacher_seed1'
    expect_error(capsys, ['tune', 'teacher', *options(tmp_path, data, *sets)], 'teacher is tuned as one training',
                 '[submit] final = teacher_seed1')
    assert not (tmp_path / 'r').exists()


def test_at_least_one_trial(tmp_path, data, capsys):
    expect_error(capsys, ['tune', 'teacher', *options(tmp_path, data), '--trials', 0], '--trials 0: choose 1 or more')


def test_without_optuna(tmp_path, data, capsys, monkeypatch):
    monkeypatch.setattr('aptos_fastai.commands.find_spec', lambda name: None)
    expect_error(capsys, ['tune', 'teacher', *options(tmp_path, data)], 'Run pip install optuna')


def test_a_damaged_study(tmp_path, data, scored, capsys):
    (tmp_path / 'r/small/tune').mkdir(parents=True)
    (tmp_path / 'r/small/tune/teacher.db').write_bytes(b'no database, but long enough to be taken for one' * 40)
    expect_error(capsys, ['tune', 'teacher', *options(tmp_path, data)], 'teacher.db: cannot be read as a study',
                 'Delete it')


# The recipe

def test_ranges_of_a_recipe(tmp_path):
    (tmp_path / 'small.ini').write_text(RECIPE)
    recipe = read_recipe(tmp_path / 'small.ini', sets=['tune.teacher.epochs=1 4', 'tune.first.size=32|64'])
    lr, wd, epochs = (recipe.tune['teacher'][key] for key in ('lr', 'wd', 'epochs'))
    assert (lr.low, lr.high, lr.log, lr.choices) == (1e-3, 1e-2, True, ())
    assert wd.choices == ('0.01', '0.1') and recipe.tune['first']['size'].ends == ('32', '64')
    assert (epochs.low, epochs.high, epochs.log) == (1, 4, False) and isinstance(epochs.low, int)


def test_a_changed_recipe_does_not_read_the_file_again(tmp_path):
    file = tmp_path / 'small.ini'
    file.write_text(RECIPE)
    recipe = read_recipe(file, sets=['stage.bs=4'])
    file.write_text('')
    other = changed(recipe, ['stage.teacher.lr=5e-3'])
    assert (other.stages['teacher'].lr, other.stages['teacher'].bs, recipe.stages['teacher'].lr) == (5e-3, 4, 3e-2)
    assert other.sets == ('stage.bs=4', 'stage.teacher.lr=5e-3')
