"`--hours`: stages that would end too late are left out, the answer is whole, and a later `all` completes the run."
import json
import shutil
from types import SimpleNamespace

import pytest
from conftest import ROOT, expect_error, modified_times, small_options, without_report
from expensive import quick_reports

from aptos_fastai.cli import main
from aptos_fastai.common import clock
from aptos_fastai.common.io import write_record
from aptos_fastai.inference.grader import load_grader
from aptos_fastai.pipeline import plan, stage
from aptos_fastai.pipeline.deadline import LATE, Deadline, enough_hours, goals
from aptos_fastai.pipeline.graph import load_run, outputs_up_to_date
from aptos_fastai.recipe.read import read_recipe
from aptos_fastai.recipe.sections import ConfigError
from aptos_fastai.recipe.smaller import postpone_stages

LEFT_OUT = 'left out for lack of time'


@pytest.fixture
def fake(monkeypatch, small_copy):
    """A clock that only trainings move: each fold takes `slower` times its estimate, of 1 s for an image and epoch.

    A fold of the shared finished run is copied from there, which is quicker than training it again.
    """
    finished = (small_copy / 'runs').rename(small_copy / 'finished') / 'small'
    fake = SimpleNamespace(now=1000., slower={}, trained=[])
    speed = plan.Speed(train=1., validate=.1, score=.1, parameters=1000)
    monkeypatch.setattr(clock, 'seconds', lambda: fake.now)
    monkeypatch.setattr(plan, 'measured_speed', lambda stage, measured: speed)
    monkeypatch.setattr(plan, 'image_seconds', lambda run, stage, measured: plan.ImageSeconds(0., 0.))
    train_fold = stage.train_fold

    def timed(run, name, fold, bars):
        done = finished / name / f'fold{fold}'
        if done.is_dir(): shutil.copytree(done, run.fold_dir(name, fold))
        else: train_fold(run, name, fold, bars)
        assert run.finished(name, fold)
        fake.trained.append((name, fold))
        fake.now += fake.slower.get(name, 1.) * plan.stage_cost(run, name, [fold], {}).training
    monkeypatch.setattr(stage, 'train_fold', timed)
    return fake


@pytest.fixture
def args(small_copy, tmp_path): return [*small_options(small_copy)[:-1], str(tmp_path / 'r')]


def hours_for(args, goal):
    "The hours in which `goal` just ends in time, as planned, with 2 % for folds that copies of images change"
    run = load_run(*args[1::2])
    return Deadline(1., 0.).until(run, goal, run.todo()) * 1.02 / 3600 / LATE


def summary_of(tmp_path): return json.loads((tmp_path / 'r/small/summary.json').read_text())


# What fits

def test_what_does_not_fit_is_left_out_and_a_later_run_completes_it(args, fake, tmp_path, capsys):
    root, hours = tmp_path / 'r/small', hours_for(args, 'teacher')
    with quick_reports(): main(['all', *args, '--hours', str(hours)])
    out = ' '.join(capsys.readouterr().out.split())
    assert out.count(f'{LEFT_OUT} (--hours') == 2              # when it is decided, and with the results
    assert 'retrain (retrain: about' in out and 'The model is teacher. A later `all` trains the rest.' in out
    assert fake.trained == [('teacher', 0), ('teacher', 1)]
    summary = summary_of(tmp_path)
    assert summary['postponed'] == ['retrain'] and LEFT_OUT in summary['left_out']
    assert [o['stage'] for o in summary['stages']] == ['teacher'] and summary['submission']['node'] == 'teacher'
    assert LEFT_OUT in (root / 'report.html').read_text() and (root / 'submission.csv').is_file()
    assert load_grader(root).model.name == 'small/teacher'
    with without_report():
        for command in ('report', 'submit', 'score'): main([command, *args])   # of the answer that is there
    assert summary_of(tmp_path) == summary
    before = modified_times(root / 'teacher/fold0')
    capsys.readouterr()
    with without_report(): main(['all', *args])
    out = capsys.readouterr().out
    assert 'stage 1 of 1: retrain' in out and LEFT_OUT not in out
    assert summary_of(tmp_path)['postponed'] == [] and summary_of(tmp_path)['submission']['node'] == 'both'
    assert modified_times(root / 'teacher/fold0') == before
    main(['all', *args, '--hours', '.001'])
    assert 'Nothing to do: every stage is up to date' in capsys.readouterr().out


def test_submit_names_a_stage_that_was_left_out_and_uses_it_once_it_is_trained(args, fake, no_report, tmp_path, capsys):
    root = tmp_path / 'r/small'
    main(['all', *args, '--hours', str(hours_for(args, 'teacher'))])
    for name in ('both', 'blend'): (root / f'submissions/{name}.csv').write_text('of an earlier run')
    capsys.readouterr()
    main(['submit', *args])
    assert 'removed blend.csv, both.csv' in ' '.join(capsys.readouterr().out.split())
    assert [file.name for file in (root / 'submissions').iterdir()] == ['teacher.csv']
    before = modified_times(root)
    for command in ('submit', 'score'):
        expect_error(capsys, [command, *args, '--set', 'submit.final=retrain'], '[submit] final = retrain: retrain not',
                     'left out stages for lack of time. Run `train retrain` first')
    assert modified_times(root) == before
    main(['submit', *args, '--set', 'submit.final=teacher'])
    main(['train', 'retrain', *args])
    main(['submit', *args])
    assert {file.stem for file in (root / 'submissions').iterdir()} == {'teacher', 'retrain', 'both'}
    assert (root / 'submission.csv').read_text() == (root / 'submissions/both.csv').read_text()


def test_with_enough_hours_nothing_is_left_out(args, fake, no_report, tmp_path, capsys):
    main(['all', *args, '--hours', str(hours_for(args, 'retrain'))])
    assert LEFT_OUT not in capsys.readouterr().out
    assert summary_of(tmp_path)['submission']['node'] == 'both' and summary_of(tmp_path)['left_out'] == ''
    assert outputs_up_to_date(load_run(*args[1::2]))


def test_folds_that_take_longer_than_planned_leave_out_later_stages(args, fake, no_report, tmp_path, capsys):
    fake.slower = dict(teacher=1.5)
    main(['all', *args, '--hours', str(hours_for(args, 'retrain'))])
    assert summary_of(tmp_path)['postponed'] == ['retrain']
    assert fake.trained == [('teacher', 0), ('teacher', 1)]


def test_a_stage_that_turns_out_too_slow_is_left_unfinished(args, fake, no_report, tmp_path, capsys):
    "Its second fold would end too late: its first is kept for a later run"
    fake.slower = dict(retrain=3.)
    main(['all', *args, '--hours', str(hours_for(args, 'retrain'))])
    assert fake.trained[2:] == [('retrain', 0)] and summary_of(tmp_path)['submission']['node'] == 'teacher'
    main(['all', *args])
    assert fake.trained[3:] == [('retrain', 1)] and summary_of(tmp_path)['submission']['node'] == 'both'


def test_the_only_model_is_finished_late_rather_than_not_at_all(args, fake, no_report, tmp_path, capsys):
    fake.slower = dict(teacher=3.)
    main(['all', *args, '--hours', str(hours_for(args, 'teacher'))])
    out = ' '.join(capsys.readouterr().out.split())
    assert out.count('too late for --hours') == 1 and 'nothing less is a model: it goes on' in out
    assert summary_of(tmp_path)['submission']['node'] == 'teacher'


def test_parents_that_are_useless_without_a_stage_are_left_out_too(args, small_copy, fake, no_report, tmp_path):
    "`big` starts from `base`: neither is trained, because `big` would end too late; `teacher` is the model"
    recipe = small_copy / 'small.ini'
    text = recipe.read_text().replace('[ensemble.both]', '[stage.base]\ntrain = train\n[stage.big]\ninit = base\n'
                                            'train = train\nepochs = 40\n[ensemble.both]')
    recipe.write_text(text.replace('members = teacher retrain', 'members = teacher big')
                      .replace('also = teacher retrain', 'also = teacher'))
    run = load_run(*args[1::2])
    assert goals(run.recipe) == ['teacher', 'big']
    todo = run.todo()
    assert list(Deadline(1., 0.).in_order(run, todo)) == ['teacher', 'base', 'big', 'retrain']
    hours = Deadline(1., 0.).until(run, 'teacher', todo) * 4 / 3600
    main(['all', *args, '--hours', str(hours)])
    assert {name for name, _ in fake.trained} == {'teacher', 'retrain'}
    assert summary_of(tmp_path)['postponed'] == ['base', 'big']


# What is refused

def test_too_few_hours_are_refused_before_anything_is_prepared(args, fake, no_report, tmp_path, capsys):
    err = expect_error(capsys, ['all', *args, '--hours', '0.001'], '--hours 0.001: too little.',
                       'teacher would be a model', 'Set --hours', 'or write a smaller recipe with `configure`')
    assert not list((tmp_path / 'r').rglob('*.jpg')) and not (tmp_path / 'r/small').exists()
    enough = err.partition('Set --hours ')[2].partition(' ')[0]
    main(['all', *args, '--hours', enough])
    assert summary_of(tmp_path)['submission']['node'] == 'teacher'


@pytest.mark.parametrize('hours', ['x', '0', '-1', 'nan', 'inf'])
@pytest.mark.parametrize('command', [['all'], ['fit', 'grades.csv'], ['configure', '--data', '.']])
def test_wrong_hours(command, hours, capsys):
    expect_error(capsys, [*command, '--hours', hours], f'{hours}: enter a number of hours above 0, as 4 or 0.5')


def test_enough_hours():
    assert enough_hours(3600) == '1.05' and enough_hours(1) == '0.01' and enough_hours(360_000) == '105'


# Estimates

def test_finished_epochs_of_a_fold_are_not_counted(args, fake, tmp_path):
    run, deadline = load_run(*args[1::2], sets=['stage.epochs=4']), Deadline(1., 0.)
    whole = deadline.training(run, 'teacher', [0, 1])
    folder = run.fold_dir('teacher', 0)
    folder.mkdir(parents=True)
    write_record(folder / 'checkpoint.json', dict(epochs=3))
    assert deadline.training(run, 'teacher', [0, 1]) == pytest.approx(whole * 5 / 8)


def test_time_counts_from_the_start_of_the_command(fake):
    deadline = Deadline(2.)
    fake.now += 3600
    assert deadline.budget == 3600 and deadline.left == pytest.approx(2 * 3600 * LATE - 3600)


# Recipes without postponed stages

def test_without_stages_another_submitted_one_takes_the_place_of_the_final_one():
    recipe = read_recipe(ROOT / 'settings.ini', sets=['submit.final=retrain_512'])
    smaller = postpone_stages(recipe, ['retrain_512'])
    assert (smaller.submit.final, smaller.postponed) == ('ensemble', ['retrain_512'])
    assert smaller.used_tables == recipe.used_tables and smaller.prepared_sizes == recipe.prepared_sizes
    smaller = postpone_stages(smaller, ['pretrain_256', 'pretrain_512'])
    assert smaller.submit.final == 'finetune_dense' and smaller.prepared_sizes == recipe.prepared_sizes
    assert set(smaller.stages) == {'pretrain_dense', 'finetune_dense'}
    with pytest.raises(ConfigError, match='no model is left'): postpone_stages(smaller, ['pretrain_dense'])
    assert postpone_stages(recipe, []) is recipe


@pytest.mark.parametrize('weights, lost, final, members', [
    ('1 0 0', 'a', 'teacher', {}), ('0 1 0', 'b', 'teacher', {}), ('0 1 0', 'a', 'e', dict(b=1., c=0.)),
    ('0 1 1', 'b', 'e', dict(a=0., c=1.)), ('0 1', 'b', 'teacher', {}), ('1 0', 'b', 'a', {}),
])
def test_an_ensemble_is_lost_if_the_weights_that_are_left_are_0(weights, lost, final, members):
    names = 'abc'[:len(weights.split())]
    sets = [*(f'stage.{name}.train=train' for name in names), f'ensemble.e.members={" ".join(names)}',
            f'ensemble.e.weights={weights}', 'submit.final=e', 'submit.also=teacher']
    smaller = postpone_stages(read_recipe(ROOT / 'recipes/one_table.ini', sets=sets), [lost])
    assert smaller.submit.final == final and ('e' in smaller.ensembles) == bool(members)
    if members: assert smaller.members('e') == members


def test_seeds_are_left_out_one_by_one(tmp_path):
    recipe = read_recipe(ROOT / 'recipes/one_table.ini', sets=['stage.teacher.seeds=2'])
    assert goals(recipe) == ['teacher_seed1', 'teacher_seed2', 'retrain']
    smaller = postpone_stages(recipe, ['teacher_seed2'])
    assert set(smaller.stages) == {'teacher_seed1'} and smaller.submit.final == 'teacher_seed1'


def test_a_smaller_model_whose_tables_name_no_eyes_is_not_fused():
    eyes = [f'table.{name}.{key}' for name in ('other', 'test') for key in ('group=^(p.*)_', 'eye=_([lr])$')]
    sets = [*eyes, 'table.other.csv=o.csv', 'table.other.grade=diagnosis', 'stage.big.train=other',
            'submit.final=big', 'submit.also=teacher', 'submit.eyes=fused']
    recipe = read_recipe(ROOT / 'recipes/one_table.ini', sets=sets)
    smaller = postpone_stages(recipe, ['big'])
    assert (recipe.submit.eyes, smaller.submit.final, smaller.submit.eyes) == ('fused', 'teacher', 'single')
    assert postpone_stages(recipe, ['retrain']).submit.eyes == 'fused'


@pytest.mark.parametrize('lost, members', [
    ('x_seed2', dict(x_seed1=1 / 2, y_seed1=1 / 6, y_seed2=1 / 6, y_seed3=1 / 6)),
    ('y_seed1', dict(x_seed1=1 / 4, x_seed2=1 / 4, y_seed2=1 / 4, y_seed3=1 / 4)),
    ('y_seed3 y_seed1', dict(x_seed1=1 / 4, x_seed2=1 / 4, y_seed2=1 / 2)),
    ('x_seed1 x_seed2', dict(y_seed1=1 / 3, y_seed2=1 / 3, y_seed3=1 / 3)),
])
def test_the_weight_of_a_lost_seed_goes_to_the_other_seeds_of_its_stage(lost, members):
    sets = ['stage.x.train=train', 'stage.x.seeds=2', 'stage.y.train=train', 'stage.y.seeds=3',
            'ensemble.e.members=x y', 'submit.final=e']
    recipe = read_recipe(ROOT / 'recipes/one_table.ini', sets=sets)
    at_once, one_by_one = postpone_stages(recipe, lost.split()), recipe
    for name in lost.split(): one_by_one = postpone_stages(one_by_one, [name])
    for smaller in (at_once, one_by_one): assert smaller.members('e') == pytest.approx(members)


def test_images_that_a_stage_may_not_see_stay_the_same_without_its_child():
    sets = ['stage.teacher.folds=1', 'stage.pre.train=other', 'stage.pre.folds=1', 'stage.teacher.folds=5',
            'stage.teacher.init=pre', 'table.other.csv=o.csv', 'table.other.grade=diagnosis', 'submit.also=pre retrain']
    recipe = read_recipe(ROOT / 'recipes/one_table.ini', sets=sets)
    assert recipe.held_out_tables('pre') == ['train']
    assert postpone_stages(recipe, ['teacher']).held_out_tables('pre') == ['train']
