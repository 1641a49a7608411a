"`configure` and `fit --hours`: settings for a number of hours, with their reasons."
import math

import numpy as np
import pytest
from conftest import ROOT, expect_error, write_table

from aptos_fastai.cli import main
from aptos_fastai.common.io import AptosError
from aptos_fastai.data.understand import understand_table
from aptos_fastai.pipeline import configure as configuring
from aptos_fastai.pipeline import plan
from aptos_fastai.pipeline.configure import PROBE, PSEUDO, WHOLE, Ladder, Step, climb, values
from aptos_fastai.pipeline.deadline import Deadline
from aptos_fastai.pipeline.fit import GRADED, UNGRADED, write_fit_recipe
from aptos_fastai.recipe.read import read_recipe
from aptos_fastai.training.precision import StepSeconds


@pytest.fixture
def machine(monkeypatch):
    "A machine without a GPU on which an image of 224 px trains in 0.9 s and is scored in 0.3 s; images are 512 px wide"
    def step_seconds(stage, precisions, n):
        forward = .3 * (stage.size / 224) ** 2
        return StepSeconds(dict.fromkeys(precisions, 3 * forward), dict.fromkeys([*precisions, 'f32'], forward), 1000)
    monkeypatch.setattr('aptos_fastai.training.precision.step_seconds', step_seconds)
    monkeypatch.setattr(plan, 'image_seconds', lambda run, stage, measured: plan.ImageSeconds(0., 0.))
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    monkeypatch.setattr(configuring, 'retina_width', lambda recipe, images: 512)


@pytest.fixture
def configured(machine, tables, tmp_path, capsys):
    "A function that runs `configure` and returns the recipe, its text and the estimate as a part of the hours"
    found = []
    def run(hours, *options):
        file = tmp_path / f'r{len(found)}.ini'
        found.append(file)
        main(['configure', '--data', str(tables), '--hours', str(hours), '-o', str(file),
              '--runs', str(tmp_path / 'runs'), *options])
        return read_recipe(file), file.read_text(), capsys.readouterr().out
    return run


def seconds_of(recipe, tables, tmp_path):
    "The estimate of `plan` for a recipe"
    from aptos_fastai.pipeline.graph import load_run
    run = load_run(recipe.path, tables, tmp_path / 'runs')
    todo, measured = run.todo(), {}
    return plan.plan_cost(run, todo, measured=measured).seconds + plan.report_seconds(run, todo, measured)


# Ladders

def test_each_step_takes_longer(machine, tables, tmp_path, monkeypatch):
    "Both ladders, by the estimate of `plan`; the first rung of the whole network is dearer than the last probe's views"
    prices = []
    def record(ladder, price, limit):
        prices.append(price)
        return climb(ladder, price, limit)
    monkeypatch.setattr(configuring, 'climb', record)
    main(['configure', '--data', str(tables), '--hours', '100', '-o', str(tmp_path / 'a.ini')])
    price = prices[0]
    for ladder in (WHOLE, PROBE):
        keys = values(ladder.start)
        costs = [price(keys)]
        for step in ladder.steps:
            if price(keys | step.keys) == math.inf: continue             # a larger network needs a GPU
            keys |= step.keys
            costs.append(price(keys))
        assert len(costs) > 10 and (np.diff(costs) > 0).all()


def test_a_step_that_does_not_fit_is_skipped_and_later_ones_of_its_keys_are_not_tried():
    tried = []
    def price(keys):
        tried.append(dict(keys))
        return sum(map(float, keys.values()))
    ladder = Ladder({'a.x': ('1', 'first'), 'a.y': ('1', 'first')},
                    (Step({'a.x': '2'}, 'twice'), Step({'a.y': '50'}, 'dear'), Step({'a.y': '60'}, 'dearer'),
                     Step({'a.x': '4'}, 'four')))
    found = climb(ladder, price, 10.)
    assert found.keys == {'a.x': ('4', 'four'), 'a.y': ('1', 'first')} and found.seconds == 5
    assert found.too_dear == (ladder.steps[1], 52.) and not any(keys['a.y'] == '60' for keys in tried)


# Recipes

def test_tables_in_a_sub_folder_are_found(machine, tables, tmp_path, capsys):
    "As a zip is unpacked; the recipe's command names the folder"
    folder = tmp_path / 'zips/aptos2019'
    folder.parent.mkdir()
    tables.rename(folder)
    main(['configure', '--data', str(folder.parent), '--hours', '1', '-o', str(tmp_path / 'a.ini')])
    assert f'tables found in {folder}' in capsys.readouterr().out.replace('\n', '')
    assert f'--data {folder} --hours 1' in (tmp_path / 'a.ini').read_text()
    (folder / 'train.csv').rename(folder / 'labels.csv')
    expect_error(capsys, ['configure', '--data', folder.parent, '--hours', '1', '-o', tmp_path / 'b.ini'],
                 'no train.csv with train_images', 'Tables there: aptos2019/labels.csv, aptos2019/test.csv')


def test_more_hours_choose_more_and_are_used(configured, tables, tmp_path):
    "From a probe to several trainings with pseudo-labels; never more than 90 % of the hours, and mostly 80 %"
    recipes = {hours: configured(hours)[0] for hours in (.1, .3, 1., 2., 5.)}
    shares = [seconds_of(o, tables, tmp_path) / 3600 / hours for hours, o in recipes.items()]
    assert max(shares) <= .9 and all(share > .8 for share in shares[1:]), shares
    probe, small, teacher, *_, large = recipes.values()
    assert [o.stages['teacher'].epochs > 0 for o in recipes.values()] == [False, True, True, True, True]
    assert probe.stages['teacher'].loss == 'cross_entropy' and probe.submit.final == 'teacher'
    assert small.stages['teacher'].size <= teacher.stages['teacher'].size <= large.images.size
    assert teacher.stages['teacher'].tta == 'd4' and teacher.stages['teacher'].folds == 5
    assert large.submit.final == 'both' and any(s.sources[-1] == ('teacher', 'test') for s in large.stages.values())
    assert all(o.submit.table == 'test' for o in recipes.values())


def test_the_reason_is_above_each_key(configured):
    _, text, out = configured(1)
    lines = text.splitlines()
    for key in ('size', 'folds', 'bs', 'epochs', 'tta', 'arch', 'weights'):
        place = next(i for i, line in enumerate(lines) if line.startswith(f'{key} = ') and i > lines.index('[stage]'))
        assert lines[place - 1].startswith('# '), key
    assert '# eight views: their mean had a higher kappa than one view' in text
    assert '# No larger network: there is no GPU' in text and 'Settings for 1 hour: about' in text
    assert 'Too long, with the settings that were chosen before it:' in out
    assert 'Chosen: arch = ' in out and '--hours 1' in out


def test_all_reads_the_recipe(configured, tables, tmp_path, capsys):
    recipe, *_ = configured(1)
    main(['plan', '--recipe', str(recipe.path), '--data', str(tables), '--runs', str(tmp_path / 'runs')])
    assert 'never trained' in capsys.readouterr().out


def test_what_the_user_sets_stays(configured):
    recipe, text, out = configured(1, '--set', 'stage.size=96', '--set', 'stage.retrain.epochs=1')
    assert {s.size for s in recipe.stages.values()} == {96} and '# set by the user\nsize = 96' in text
    assert 'size = 96, folds = ' in out and recipe.images.size == 160       # what is printed and what follows from it
    recipe, _, out = configured(1, '--set', 'stage.arch=test_resnet', '--set', 'stage.size=544')     # as the user likes
    assert {(s.arch, s.size) for s in recipe.stages.values()} == {('test_resnet', 544)} and 'larger network' not in out


def test_what_the_user_sets_for_a_stage_that_there_is_no_time_for_is_named(configured):
    sets = ('--set', 'stage.wd=.02', '--set', 'stage.retrain.lr=1e-3')
    line = 'Not used: --set stage.retrain.lr=1e-3, because there are no pseudo-labels: they would take too long'
    recipe, text, out = configured(.3, *sets)
    assert 'retrain' not in recipe.stages and recipe.stages['teacher'].wd == .02
    assert f'# {line}\n' in text and line in ' '.join(out.split())
    recipe, text, out = configured(5, *sets)
    assert 'Not used' not in text + out
    assert {s.lr for name, s in recipe.stages.items() if name.startswith('retrain')} == {1e-3}


def test_without_an_ungraded_table_or_with_few_images_there_are_no_pseudo_labels(configured, tables):
    (tables / 'test.csv').write_text('id_code\ntest000\ntest001\ntest002\n')
    recipe, text, _ = configured(5)
    assert set(recipe.submit.also) == set() and '3 ungraded images beside 40 graded ones are too few' in text
    assert recipe.submit.table == 'test'
    (tables / 'test.csv').unlink()
    (tables / 'test_images').rename(tables / 'elsewhere')
    recipe, text, out = configured(5)
    assert recipe.submit.table == '' and '# No pseudo-labels: there is no ungraded table' in text
    assert 'test' not in recipe.tables and 'runs without this table' in out


def test_squares_are_no_larger_than_the_retinas_and_folds_no_more_than_the_rarest_grade(configured, tables,
                                                                                         monkeypatch):
    monkeypatch.setattr(configuring, 'retina_width', lambda recipe, images: 260)
    csv = (tables / 'train.csv').read_text().splitlines()
    (tables / 'train.csv').write_text('\n'.join([csv[0], *(o for o in csv[1:] if not o.endswith(',4')), csv[5],
                                                 csv[10], csv[15]]) + '\n')
    recipe, text, _ = configured(20)
    assert recipe.stages and {s.size for s in recipe.stages.values()} == {256} and recipe.images.size == 260
    assert recipe.splits == 3 and 'the rarest grade has 3 patients or images' in text
    assert {s.folds for s in recipe.stages.values()} == {3} and len(recipe.stages) == 10        # 5 seeds of both


def test_pseudo_labels_are_a_step_of_their_own_and_their_reason_says_that_the_gain_was_not_repeated():
    steps = [step for step in WHOLE.steps if PSEUDO in step.keys]
    assert len(steps) == 1 and 'by 0.02 in one run, not in a repeat' in steps[0].why
    assert 'by 0.02 in one run, not in a repeat' in (ROOT / 'docs/train.md').read_text()


# What is refused

def test_too_few_hours(machine, tables, tmp_path, capsys):
    args = ['configure', '--data', tables, '-o', tmp_path / 'a.ini', '--runs', tmp_path / 'runs']
    err = expect_error(capsys, [*args, '--hours', '0.001'], '--hours 0.001: too little for 40 graded images',
                       'a linear probe, takes about', 'Set --hours')
    assert not list(tmp_path.glob('*.ini')) and not list(tmp_path.glob('.*.ini'))
    main([str(o) for o in [*args, '--hours', err.partition('Set --hours ')[2].partition(' ')[0]]])
    expect_error(capsys, [*args, '--hours', '1'], 'a.ini: already exists', '-o')


def test_a_folder_without_tables(tmp_path, capsys):
    expect_error(capsys, ['configure', '--data', tmp_path, '--hours', '1', '-o', tmp_path / 'a.ini'], 'train.csv')
    expect_error(capsys, ['configure', '--hours', '1'], '--data')


# fit

@pytest.fixture
def write(machine, tables, tmp_path, capsys):
    "A function that writes the recipe of `fit` with or without hours; returns its text and what was printed"
    table, file = understand_table(tables / 'train.csv', tables / 'train_images'), tmp_path / 'r/a/a.ini'

    def write(hours=None, sets=(), ungraded=None):
        understood = {GRADED: table} | ({UNGRADED: ungraded} if ungraded else {})
        write_fit_recipe(understood, file, sets, Deadline(hours) if hours else None)
        return file.read_text(), ' '.join(capsys.readouterr().out.split())
    return write


def test_fit_keeps_the_recipe_that_it_configured(write, monkeypatch, tmp_path):
    "The times of another day would choose other settings: an interrupted fit goes on with those of its first day"
    text, out = write(1., ['stage.wd=.02'])
    assert 'goes on with' not in out
    assert 'Settings for 1 hour: ' in text and '# train: id: id_code' in text and 'wd = .02' in text
    monkeypatch.setattr(configuring, 'climb', lambda *args: pytest.fail('chosen again'))
    again, out = write(1., ['stage.wd=.02'])
    assert again == text and f'goes on with {tmp_path / "r/a/a.ini"}' in out


def test_fit_goes_on_with_a_recipe_that_has_empty_keys(write, tmp_path):
    "Earlier builds wrote `also = ` and `table = ` for a graded table alone"
    text, _ = write()
    assert '[submit]' in text and 'also' not in text
    (tmp_path / 'r/a/a.ini').write_text(text.replace('[submit]', '[submit]\nalso = \ntable = '))
    again, out = write()
    assert again == text and 'goes on with' in out and not list((tmp_path / 'r/a').glob('*.old'))


def test_fit_goes_on_with_a_recipe_that_has_no_use_for_some_sets(write, tables):
    sets, ungraded = ['stage.wd=.02', 'stage.retrain.lr=1e-3'], understand_table(tables / 'test_images', graded=False,
                                                                                 name=UNGRADED)
    text, out = write(.3, sets, ungraded)
    assert 'Not used: --set stage.retrain.lr=1e-3, because there are no pseudo-labels' in out
    again, out = write(.3, sets, ungraded)
    assert again == text and 'goes on with' in out
    assert 'not used: --set stage.retrain.lr=1e-3, because the recipe lacks it' in out


@pytest.mark.parametrize('first, second, words', [
    ((1.,), (8.,), 'fit --hours 1, not fit --hours 8'),
    ((), (8.,), 'fit without --hours, not fit --hours 8'),
    ((1.,), (), 'fit --hours 1, not fit without --hours'),
    ((1., ['stage.wd=.02']), (1., ['stage.wd=.03']), 'fit --hours 1 with other tables or keys'),
])
def test_a_recipe_for_other_hours_is_kept_if_it_trains_and_replaced_if_nothing_was_trained(write, first, second, words,
                                                                                            tmp_path):
    text, _ = write(*first)
    fold = tmp_path / 'r/a/teacher/fold0'
    fold.mkdir(parents=True)
    with pytest.raises(AptosError, match='an earlier fit wrote another recipe here') as e: write(*second)
    assert words in str(e.value) and '--name' in str(e.value)
    assert (tmp_path / 'r/a/a.ini').read_text() == text and not list((tmp_path / 'r/a').glob('*.old'))
    fold.rmdir()
    new, out = write(*second)
    assert new != text and 'replaced, because nothing was trained by it' in out
    assert (tmp_path / 'r/a/a.ini.old').read_text() == text


def test_fit_with_hours_trains_what_it_has_chosen(no_report, tmp_path, capsys):
    write_table(tmp_path / 'd', 40)
    sets = ['stage.arch=test_resnet', 'stage.weights=none', 'stage.size=32', 'stage.folds=2', 'stage.freeze_epochs=0',
            'stage.epochs=1', 'stage.bs=8', 'stage.precision=f32', 'images.size=64', 'stage.seeds=1']
    main(['fit', str(tmp_path / 'd/train.csv'), str(tmp_path / 'd/train_images'), '--hours', '2',
          '--runs', str(tmp_path / 'r'), *(o for key in sets for o in ('--set', key))])
    recipe = read_recipe(tmp_path / 'r/train/train.ini')
    assert recipe.stages['teacher'].size == 32 and recipe.stages['teacher'].tta == 'd4'
    assert (tmp_path / 'r/train/report.html').is_file() and 'left out' not in capsys.readouterr().out
