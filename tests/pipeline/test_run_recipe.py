"A run stores its recipe, and commands open it again by its folder."
import shutil
from dataclasses import replace

import pytest
from conftest import ROOT, expect_error, modified_times, write_table

from aptos_fastai.cli import main
from aptos_fastai.common.io import AptosError, read_record, write_bytes, write_record
from aptos_fastai.pipeline.graph import check_run, load_run, start_run
from aptos_fastai.pipeline.run_recipe import check_name, ini_text, merged_sets, options_of
from aptos_fastai.recipe.read import read_recipe

SETS = ['stage.lr=0.02', 'stage.teacher.bs=4', 'recipe.owner=A; B = 50 % # c']


@pytest.fixture
def named(small_recipe, tables, tmp_path):
    "The folder of a run with a name and values of --set, whose images are prepared"
    sets = [option for text in SETS for option in ('--set', text)]
    main(['prepare', '--recipe', str(small_recipe), '--data', str(tables), '--runs', str(tmp_path / 'runs'),
          '--name', 'low-lr.2', *sets])
    return tmp_path / 'runs/low-lr.2'


def opened(root, sets=(), data=''): return load_run(**options_of(str(root), data), sets=sets)


# The recipe of a run

@pytest.mark.parametrize('demo', [False, True])
@pytest.mark.parametrize('file', ['settings.ini', 'recipes/published.ini', 'recipes/gold.ini'])
def test_a_stored_recipe_is_the_one_that_was_used(file, demo, tmp_path):
    sets = ['stage.clip=3', 'recipe.owner=A; B = 50 % # c', 'submit.thresholds=0.6 1.5 2.5 3.5']
    used = read_recipe(ROOT / file, demo=demo, sets=sets)
    stored = tmp_path / 'recipe.ini'
    stored.write_text(ini_text(used.sections), encoding='utf-8')
    again = read_recipe(stored, demo=demo)
    assert replace(again, name=used.name, path=used.path) == used != read_recipe(ROOT / file, demo=demo)
    assert ini_text(again.sections) == stored.read_text(encoding='utf-8')


def test_a_value_of_several_lines_and_a_preset_are_stored(tmp_path):
    file = tmp_path / 'recipe.ini'
    file.write_text('[table.a]\npreset = idrid\n[table.b]\ncsv = b.csv\ngrade = g\n'
                    '[stage.s]\ntrain = a\n    b\n[submit]\nfinal = s\n')
    used = read_recipe(file)
    assert used.stages['s'].train == ('a', 'b')
    file.write_text(ini_text(used.sections))
    assert read_recipe(file) == used and 'preset = idrid' in file.read_text()


def test_a_run_has_its_name_and_what_it_was_made_with(named, small_recipe):
    record = read_record(named / 'run.json')
    assert record['sets'] == SETS and (named / record['recipe']).resolve() == small_recipe
    assert not (named.parent / 'small').exists()
    run = opened(named)
    assert run.root == named and run.recipe.name == 'low-lr.2' and run.recipe.stages['teacher'].bs == 4
    used = read_recipe(small_recipe, sets=SETS)
    assert replace(run.recipe, name='small', path=small_recipe) == used


def test_a_command_on_a_run_folder_needs_no_recipe(named, tables, capsys, monkeypatch):
    monkeypatch.chdir(named)
    main(['train', 'teacher', '--run', '.'])
    assert read_record(named / 'teacher/fold0/stage.json')['settings']['bs'] == 4
    monkeypatch.chdir(named.parent.parent)
    main(['train', 'teacher', '--run', 'runs/low-lr.2'])
    assert 'Nothing to do: teacher is up to date in runs/low-lr.2/teacher' in capsys.readouterr().out
    main(['plan', 'runs/low-lr.2', '--set', 'stage.teacher.lr=0.5'])
    assert 'to train: teacher: lr: 0.02 -> 0.5' in capsys.readouterr().out
    before = modified_times(named)
    main(['prepare', 'runs/low-lr.2'])
    assert {o.name for o, time in modified_times(named).items() if before.get(o) != time} <= {'run.json'}
    assert read_record(named / 'run.json')['sets'] == SETS


def test_a_run_of_the_demo_is_opened_again(toy, tmp_path):
    run = opened(toy)
    assert run.recipe.demo and run.root == toy and not run.todo()


def test_only_commands_that_train_change_the_recipe_of_a_run(named):
    before = (named / 'recipe.ini').read_text()
    with start_run(opened(named, ['stage.teacher.bs=2'])): pass
    assert (named / 'recipe.ini').read_text() == before and read_record(named / 'run.json')['sets'] == SETS
    run = opened(named, ['stage.teacher.bs=2'])
    with start_run(run, ['teacher']): pass
    assert opened(named).recipe.stages['teacher'].bs == 2
    record = read_record(named / 'run.json')
    assert record['sets'] == [SETS[0], 'stage.teacher.bs=2', SETS[2]] and record['recipe'].endswith('small.ini')


def test_of_a_key_that_is_set_twice_the_last_value_is_kept():
    assert merged_sets(['a.b=1', 'c.d=1'], ('a.b = 2=x', 'e.f=')) == ['a.b = 2=x', 'c.d=1', 'e.f=']


def test_all_on_a_changed_text_of_the_same_recipe_records_it(toy_copy, capsys):
    file, summary = toy_copy / 'recipe.ini', read_record(toy_copy / 'summary.json')
    write_bytes(file, file.read_bytes().replace(b'precision = f32', b'precision =  f32') + b'# a comment\n')
    main(['all', str(toy_copy), '--set', 'recipe.owner='])             # its default, which the recipe does not name
    assert 'Nothing to do' in capsys.readouterr().out
    now = read_record(toy_copy / 'summary.json')
    assert now.pop('recipe_sha256') != summary.pop('recipe_sha256') and now == summary
    main(['runs', str(toy_copy.parent)])
    assert 'settings-demo' in capsys.readouterr().out


# Errors

@pytest.mark.parametrize('name', ['a/b', '..', '.hidden', '-x', 'a b', 'prepared', 'demo-600-480-160-seed42', 'a\n'])
def test_names_that_a_run_cannot_have(name):
    with pytest.raises(AptosError, match='--name'): check_name(name)


@pytest.mark.parametrize('name', ['a', 'lr-0.01', 'Größe_2', '2', 'demo-small'])
def test_names_that_a_run_can_have(name): check_name(name)


def test_a_wrong_name_is_refused_by_each_command_that_takes_one(tables, tmp_path, capsys):
    expect_error(capsys, ['plan', '--name', 'a/b'], '--name a/b')
    args = ['fit', tables / 'train.csv', tables / 'train_images', '--name', '../x', '--runs', tmp_path / 'runs']
    expect_error(capsys, args, '--name ../x')
    assert not (tmp_path / 'x').exists()


@pytest.mark.parametrize('more, words', [
    (['--recipe', 'settings.ini'], ['--recipe', 'has its own']), (['--runs', 'runs'], ['--runs', 'has its own']),
    (['--name', 'x'], ['--name', 'has its own']), (['--run', 'other'], ['--run other', 'was named, too'])])
def test_what_says_nothing_beside_a_run_folder(named, capsys, more, words):
    expect_error(capsys, ['plan', named, *more], *words)


def test_folders_that_are_no_run(named, tmp_path, capsys):
    expect_error(capsys, ['report', tmp_path], f'{tmp_path}: not a run folder (no run.json)')
    (named / 'recipe.ini').unlink()
    expect_error(capsys, ['train', 'teacher', '--run', named], 'has no recipe.ini', 'older version', '--recipe')


def test_a_run_of_an_older_version_gets_its_recipe_from_the_next_command(named, small_recipe, tables):
    (named / 'recipe.ini').unlink()
    record = read_record(named / 'run.json')
    write_record(named / 'run.json', {k: v for k, v in record.items() if k not in ('sets', 'folder')})
    main(['prepare', '--recipe', str(small_recipe), '--data', str(tables), '--runs', str(named.parent),
          '--name', named.name])
    assert opened(named).recipe.stages == read_recipe(small_recipe).stages


def test_moved_data_is_named_once(named, tables, tmp_path, capsys):
    shutil.move(tables, tmp_path / 'moved')
    expect_error(capsys, ['plan', named], 'run.json: its data folder', str(tables), '--data FOLDER')
    main(['prepare', str(named), '--data', str(tmp_path / 'moved')])
    assert opened(named).data == tmp_path / 'moved'


def test_other_data_is_refused_while_the_first_is_there(named, tables, tmp_path, capsys):
    shutil.copytree(tables, tmp_path / 'other')
    expect_error(capsys, ['plan', named, '--data', tmp_path / 'other'], 'belongs to the data folder', '--name')


def test_the_demo_does_not_overwrite_a_run_of_the_same_name(named, capsys):
    sizes = [option for key in ('pretrain', 'train', 'test') for option in ('--set', f'demo.{key}=20')]
    args = ['--recipe', ROOT / 'settings.ini', '--runs', named.parent, '--name', named.name]
    expect_error(capsys, ['plan', *args, *sizes], 'belongs to the data folder', 'not to the demo')


def test_weights_are_meant_from_the_folder_where_the_run_was_started(tables, small_recipe, tmp_path, monkeypatch):
    start = tmp_path / 'start'
    write_bytes(start / 'w.safetensors', b'weights')
    monkeypatch.chdir(start)
    sets = ['stage.teacher.weights=w.safetensors']
    with start_run(load_run(small_recipe, tables, tmp_path / 'runs', sets, name='x')): pass
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AptosError) as e: check_run(opened(tmp_path / 'runs/x'), ['teacher'])
    line = str(e.value)
    assert '[stage.teacher] weights = w.safetensors: not found from this folder' in line
    assert f'--set stage.teacher.weights={start / "w.safetensors"}' in line
    (start / 'w.safetensors').unlink()
    with pytest.raises(AptosError, match='no such file'): check_run(opened(tmp_path / 'runs/x'), ['teacher'])


def test_fit_stores_the_recipe_that_it_wrote(tmp_path):
    from aptos_fastai.commands import understand_and_write
    write_table(tmp_path / 'd', 60)
    recipe, data = understand_and_write(tmp_path / 'd/train.csv', tmp_path / 'd/train_images', '', 'a', tmp_path / 'r',
                                        ['stage.epochs=3'], None, {})
    with start_run(load_run(recipe, data, tmp_path / 'r')): pass
    run = opened(tmp_path / 'r/a')
    assert run.recipe.stages['teacher'].epochs == 3 and read_record(run.root / 'run.json')['recipe'] == 'a.ini'
