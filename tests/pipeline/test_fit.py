"Training without a recipe, on one graded table alone, and on several of which some only train."
import json
import shutil

import pandas as pd
import pytest
from conftest import ROOT, expect_error, stage_options, without_report, write_table
from expensive import quick_exports, quick_reports
from layouts import LAYOUTS

from aptos_fastai import fit
from aptos_fastai.cli import main
from aptos_fastai.commands import understand_and_write
from aptos_fastai.common.io import AptosError
from aptos_fastai.pipeline.graph import load_run, start_run
from aptos_fastai.pipeline.stage import training_frame
from aptos_fastai.recipe.read import read_recipe
from aptos_fastai.recipe.sections import ConfigError
from aptos_fastai.recipe.smaller import without_tables
from aptos_fastai.run_folder import Run

SMALL = ['stage.arch=test_resnet', 'stage.weights=none', 'stage.size=32', 'stage.folds=2', 'stage.epochs=1',
         'stage.freeze_epochs=0', 'stage.bs=8', 'stage.tta=none', 'stage.precision=f32', 'images.size=64',
         'recipe.splits=2']
SETS = [option for key in SMALL for option in ('--set', key)]


@pytest.fixture(scope='module')
def fitted(tmp_path_factory):
    "A run that `fit` has made of an .xlsx with words as grades, and the folder of its data"
    pytest.importorskip('openpyxl')
    root = LAYOUTS['clinic_excel'](tmp_path_factory.mktemp('clinic'))
    with without_report(): return fit(root / 'labels.xlsx', root / 'photos', runs=root / 'runs', sets=SMALL), root


# fit

def test_fit_needs_no_recipe_and_its_run_grades(fitted):
    run, root = fitted
    assert run.folder == root / 'runs/labels'
    df = run.grader.predict(sorted((root / 'photos').rglob('*.JPG'))[:3])
    assert df.score.notna().all() and (df.error == '').all()
    assert run.grader('teacher').model.name == 'labels/teacher'
    oof = pd.read_csv(run.folder / 'oof.csv', dtype=str)
    assert len(oof) == 59 and set(oof.Camera) == {'Topcon', 'Canon'} and oof.group.nunique() == 30
    assert not (run.folder / 'submission.csv').exists() and (run.folder / 'report.html').is_file()


@pytest.mark.parametrize('sets, expected', [
    (['table.train.carry=Camera'], dict(carry='Camera')), (['table.train.carry='], dict(carry='')),
    ([r'table.train.group=^(.+)_', 'table.train.carry='], dict(group='^(.+)_', block=0, patient='')),
    (['table.train.where=Camera = Topcon'], dict(where='Camera = Topcon'))])
def test_keys_of_the_table_may_be_set_before_the_rest_is_found(tmp_path, capsys, sets, expected):
    root = LAYOUTS['clinic_excel'](tmp_path)
    recipe, _ = understand_and_write(root / 'labels.xlsx', root / 'photos', '', '', tmp_path / 'r', sets, None, {})
    table = read_recipe(recipe).tables['train']
    assert {key: getattr(table, key) for key in expected} == expected
    key = sets[0].partition('=')[0].rpartition('.')[2]
    assert f'train: {key}: {expected[key] or "none"} (given)' in ' '.join(capsys.readouterr().out.split())


def test_the_recipe_of_fit_can_be_run_again(fitted, capsys):
    run, root = fitted
    recipe = run.folder / 'labels.ini'
    assert '# train: grade: DR grade (by its name and values)' in recipe.read_text()
    submit = read_recipe(recipe).submit
    assert set(read_recipe(recipe).stages) == {'teacher'}
    assert (submit.final, submit.table, submit.also) == ('teacher', '', ())
    assert not [line for line in recipe.read_text().splitlines() if line.rstrip().endswith('=')]     # no empty keys
    main(['all', '--recipe', str(recipe), '--data', str(root), '--runs', str(root / 'runs')])
    assert 'Nothing to do: every stage is up to date' in capsys.readouterr().out


def test_fit_trains_on_unlabelled_images_too(no_report, tmp_path, capsys):
    root = LAYOUTS['semicolons'](tmp_path)
    main(['fit', str(root / 'Befunde.csv'), str(root / 'Bilder'), str(root / 'ohne Befund'), '--name', 'a',
          '--runs', str(tmp_path / 'r'), *SETS])
    out = capsys.readouterr().out
    assert 'train: grade: Grad der Retinopathie (by its name and values)' in out
    assert 'test: images: all below' in out and '20 images' in out
    summary = json.loads((tmp_path / 'r/a/summary.json').read_text())
    assert [o['stage'] for o in summary['stages']] == ['teacher', 'retrain', 'both']
    assert len(pd.read_csv(tmp_path / 'r/a/submission.csv')) == 20


def test_fit_goes_on_with_the_recipe_of_an_older_version(tmp_path, capsys):
    root = LAYOUTS['clinic_excel'](tmp_path)
    args = (root / 'labels.xlsx', root / 'photos', '', '', tmp_path / 'r', [], None, {})
    recipe, _ = understand_and_write(*args)
    text = recipe.read_text()
    assert 'label_tta = d4' in text
    recipe.write_text(text.replace('label_tta = d4\n', ''))
    (recipe.parent / 'teacher/fold0').mkdir(parents=True)
    understand_and_write(*args)
    assert f'goes on with {recipe}' in capsys.readouterr().out.replace('\n', '')
    recipe.write_text(text.replace('label_tta = d4', 'label_tta = none'))
    with pytest.raises(AptosError, match='an earlier fit wrote another recipe'): understand_and_write(*args)


def test_fit_refuses_before_it_writes(tmp_path, capsys):
    root = LAYOUTS['semicolons'](tmp_path)
    args = ['fit', root / 'Befunde.csv', root / 'Bilder', '--runs', tmp_path / 'r']
    expect_error(capsys, [*args, '--grade', 'Grad'], 'no column Grad, did you mean', 'Its columns are Bild')
    expect_error(capsys, [*args, '--set', 'stage.epoch=5'], 'epoch: no such key, did you mean epochs?')
    expect_error(capsys, ['fit', root / 'none.csv', '--runs', tmp_path / 'r'], 'none.csv: no such file or folder')
    assert not list((tmp_path / 'r').rglob('*.ini'))


def test_inspect_says_what_it_understood_of_a_csv(tmp_path, capsys):
    root = LAYOUTS['semicolons'](tmp_path)
    main(['inspect', str(root / 'Befunde.csv'), '4', '--images', str(root / 'Bilder'), '--runs', str(tmp_path / 'r')])
    out = ' '.join(capsys.readouterr().out.split())
    assert 'train: id: Bild (100 % of its values name an image' in out
    assert '60 images, patients unknown, images of grade 0-4:' in out
    assert '60 of 60 ids differ from their file in folder, suffix, case or accents' in out
    assert (tmp_path / 'r/Befunde_inspect/inspect/train.html').is_file()


def test_fit_keeps_the_recipe_of_an_earlier_run(fitted, tmp_path, capsys):
    "Another table or other settings under its name are refused; inspect has a folder of its own"
    run, root = fitted
    recipe = (run.folder / 'labels.ini').read_bytes()
    args = ['fit', root / 'labels.xlsx', root / 'photos', '--runs', root / 'runs']
    expect_error(capsys, [*args, '--set', 'stage.epochs=3'], 'an earlier fit wrote another recipe here', '--name')
    other = LAYOUTS['no_header'](tmp_path)
    expect_error(capsys, ['fit', other / 'labels.txt', other / 'img', '--runs', root / 'runs', *SETS], 'labels')
    main(['inspect', str(root / 'labels.xlsx'), '4', '--images', str(root / 'photos'), '--runs', str(root / 'runs')])
    assert (run.folder / 'labels.ini').read_bytes() == recipe


def test_a_fit_that_failed_before_it_trained_can_be_repeated_with_other_settings(no_report, tmp_path, capsys):
    root = LAYOUTS['semicolons'](tmp_path)
    args = ['fit', str(root / 'Befunde.csv'), str(root / 'Bilder'), '--name', 'a', '--runs', str(tmp_path / 'r')]
    expect_error(capsys, [*args, *SETS, '--set', 'stage.bs=256'], 'bs = 256: fold 0 has only')
    main([*args, *SETS, '--set', 'stage.folds=1'])
    assert 'replaced, because nothing was trained by it' in ' '.join(capsys.readouterr().out.split())
    assert (tmp_path / 'r/a/report.html').is_file()


def test_fit_refuses_the_graded_images_as_unlabelled_ones(tmp_path, capsys):
    root = LAYOUTS['semicolons'](tmp_path)
    expect_error(capsys, ['fit', root / 'Befunde.csv', root / 'Bilder', root / 'Bilder', '--runs', tmp_path / 'r'],
                 'is the folder of the graded images')


# One graded table

def test_one_graded_table_is_enough(tables, small_recipe, tmp_path, capsys):
    "The shipped recipe without test.csv and test_images: no pseudo-labels, no submission, but model and report"
    (tables / 'test.csv').unlink()
    shutil.rmtree(tables / 'test_images')
    args = ['--recipe', str(small_recipe), '--data', str(tables), '--runs', str(tmp_path / 'r')]
    main(['doctor', *args])
    assert 'WARN tables: test: test.csv and test_images not found' in capsys.readouterr().out
    with quick_reports(): main(['all', *args])
    out = ' '.join(capsys.readouterr().out.split())
    assert 'the recipe runs without this table, without' in out and 'The model is teacher.' in out
    root = tmp_path / 'r/small'
    summary = json.loads((root / 'summary.json').read_text())
    assert [o['stage'] for o in summary['stages']] == ['teacher'] and 'not found' in summary['left_out']
    assert {p.name for p in root.iterdir()} >= {'oof.csv', 'report.html', 'teacher'}
    assert not (root / 'scores.csv').exists()
    assert 'runs without this table' in (root / 'report.html').read_text()
    main(['all', *args])
    assert 'Nothing to do' in capsys.readouterr().out
    with without_report(): main(['report', *args])
    image = tables / 'train_images/train000.png'
    main(['predict', str(root), str(image), '-o', str(tmp_path / 'g.csv')])
    with quick_exports(): main(['export', str(root)])
    expect_error(capsys, ['submit', *args], 'test.csv and test_images not found')
    expect_error(capsys, ['train', 'retrain', *args], 'retrain: no such stage', 'Choose from: teacher')
    write_table(tables, 10, graded=False, seed=1, name='test')            # it arrives later: the teacher stays
    capsys.readouterr()
    with without_report(): main(['all', *args])
    out = capsys.readouterr().out
    assert 'stage 1 of 1: retrain' in out and (root / 'submission.csv').is_file()


def test_half_a_test_table_is_an_error(tables, small_recipe, tmp_path, capsys):
    (tables / 'test.csv').unlink()
    args = ['plan', '--recipe', small_recipe, '--data', tables, '--runs', tmp_path / 'r']
    expect_error(capsys, args, '[table.test]: test.csv not found')


def test_a_test_table_of_another_case_is_an_error(tables, small_recipe, tmp_path, capsys):
    (tables / 'test.csv').rename(tables / 'Test.csv')
    (tables / 'test_images').rename(tables / 'Test_images')
    args = ['plan', '--recipe', small_recipe, '--data', tables, '--runs', tmp_path / 'r']
    expect_error(capsys, args, '[table.test]: test.csv not found')


def test_a_recipe_without_tables_that_are_missing():
    recipe = read_recipe(ROOT / 'recipes/one_table.ini')
    smaller = without_tables(recipe, ['test'])
    assert (list(smaller.stages), list(smaller.ensembles), smaller.order) == (['teacher'], [], ('teacher',))
    assert (smaller.submit.final, smaller.submit.also, smaller.submit.table) == ('teacher', (), '')
    with pytest.raises(ConfigError, match='final = retrain: needs test, which --data lacks'):
        without_tables(read_recipe(ROOT / 'recipes/one_table.ini', sets=['submit.final=retrain']), ['test'])
    settings = without_tables(read_recipe(ROOT / 'settings.ini', sets=['submit.final=ensemble']), ['aptos_test'])
    assert 'retrain_512' not in settings.stages and list(settings.ensembles) == ['ensemble', 'blend']


# Several graded tables

TWO = """
[recipe]
splits = 2
[images]
size = 64
[table.a]
csv = a.csv
images = a_images
grade = diagnosis
[table.b]
csv = b.csv
images = b_images
grade = diagnosis
[stage]
arch = test_resnet
weights = none
size = 32
folds = 2
epochs = 1
bs = 8
precision = f32
[stage.both]
train = a b
[stage.first]
train = a b
validate = a
[submit]
final = first
"""


@pytest.fixture
def two_tables(tmp_path):
    "A recipe on two graded tables, b with a copy of an image of a; returns its options"
    for i, name in enumerate('ab'): write_table(tmp_path / 'd', 30, seed=i, name=name)
    shutil.copy(tmp_path / 'd/a_images/a003.png', tmp_path / 'd/b_images/b008.png')
    (tmp_path / 'two.ini').write_text(TWO)
    return ['--recipe', str(tmp_path / 'two.ini'), '--data', str(tmp_path / 'd'), '--runs', str(tmp_path / 'r')]


def test_tables_that_only_train(two_tables, tmp_path, capsys):
    with without_report(): main(['all', *two_tables])
    out = ' '.join(capsys.readouterr().out.split())
    assert 'b: 1 of' not in out
    oof = pd.read_csv(tmp_path / 'r/two/oof.csv')
    assert set(oof.source[oof['first'].notna()]) == {'a'} and set(oof.source[oof.both.notna()]) == {'a', 'b'}
    run: Run = load_run(*two_tables[1::2])
    for fold in range(2):
        frame = training_frame(run, run.recipe.stages['first'], fold, {})
        assert not set(frame.group[frame.valid]) & set(frame.group[~frame.valid])
        copy_validates = 'a003' in set(frame.id_code[frame.valid])
        assert (frame.source == 'b').sum() == 30 - copy_validates
    summary = json.loads((tmp_path / 'r/two/summary.json').read_text())
    assert 'table' not in [o['kind'] for o in summary['clusters']]
    with quick_reports(): main(['all', *two_tables, '--set', 'submit.final=both'])
    summary = json.loads((tmp_path / 'r/two/summary.json').read_text())
    kinds = {o['kind']: o for o in summary['clusters']}
    assert [o['name'] for o in kinds['table']['clusters']] == ['a', 'b']
    assert 'each graded table that validates' in (tmp_path / 'r/two/report.html').read_text().replace('Each', 'each')


def test_no_parent_trains_on_a_copy_of_an_image_that_validates_its_child(tmp_path):
    "b, which only trains `pre`, holds copies of images of a, which validates `fine`"
    for i, name in enumerate('abc'): write_table(tmp_path / 'd', 30, seed=i, name=name)
    for i in range(9): shutil.copy(tmp_path / f'd/a_images/a00{i}.png', tmp_path / f'd/b_images/b01{i}.png')
    stages = '''[table.c]
csv = c.csv
images = c_images
grade = diagnosis
[stage.pre]
train = c b
validate = c
[stage.fine]
train = a
init = pre
[submit]
final = fine
'''
    text = TWO[:TWO.index('[stage.both]')] + stages
    (tmp_path / 'r.ini').write_text(text)
    with start_run(load_run(tmp_path / 'r.ini', tmp_path / 'd', tmp_path / 'r')) as (run, _):
        for fold in range(2):
            pre, fine = (training_frame(run, run.recipe.stages[name], fold, {}) for name in ('pre', 'fine'))
            assert not set(pre.group[~pre.valid]) & set(fine.group[fine.valid])
            assert 20 < (pre.source == 'b').sum() < 30


@pytest.mark.parametrize('sets, words', [
    (['stage.both.init=first'], 'its parent first trains on every fold of b. Set validate of first to a b.'),
    (['stage.first.validate=c'], 'validate = c: no graded table of `train`. Accepted: a, b.'),
    (['ensemble.e.members=both first'], 'first is validated on a, both on a b.'),
])
def test_validation_that_would_leak(two_tables, sets, words):
    with pytest.raises(ConfigError) as e: read_recipe(two_tables[1], sets=sets)
    assert words in str(e.value)


# Copies

def test_copies_of_graded_images_are_named_before_training(tables, small_recipe, tmp_path, capsys):
    for i in range(3): shutil.copy(tables / f'train_images/train00{i}.png', tables / f'test_images/test00{i}.png')
    args = ['--recipe', str(small_recipe), '--data', str(tables), '--runs', str(tmp_path / 'r')]
    main(['prepare', *args])
    out = ' '.join(capsys.readouterr().out.split())
    assert 'test: 3 of 10 images are copies of graded images: test000 = train train000' in out


def test_a_student_without_images_of_its_own_is_refused_before_training(tables, small_recipe, tmp_path, capsys):
    ids = [f'test00{i}' for i in range(2)]
    (tables / 'test.csv').write_text('\n'.join(['id_code', *ids]) + '\n')
    shutil.copy(tables / 'train_images/train000.png', tables / 'test_images/test000.png')
    shutil.copy(tables / 'train_images/train000.png', tables / 'test_images/test001.png')
    args = ['all', '--recipe', small_recipe, '--data', tables, '--runs', tmp_path / 'r', *stage_options('folds=5')]
    expect_error(capsys, args, '[stage.retrain] train = teacher:test: all 2 images are copies of validation images',
                 'test000 = train000', 'Remove it from `train`.')
    assert not (tmp_path / 'r/small/teacher').exists()
