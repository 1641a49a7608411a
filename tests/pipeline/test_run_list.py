"`runs`: a table of finished runs, and what the others lack."
import json

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, expect_error, write_finished_run

from aptos_fastai.cli import main
from aptos_fastai.common.io import file_hash, read_record, write_record
from aptos_fastai.pipeline.run_list import UNKNOWN_KEYS, changed_keys, changed_of, changed_text
from aptos_fastai.pipeline.run_recipe import ini_text
from aptos_fastai.recipe.read import read_recipe

Y = np.arange(60) % 5


def write_run(root, sets=(), recipe=ROOT / 'recipes/one_table.ini', **summary):
    "Write a finished run as `write_finished_run` does, with its recipe"
    root.mkdir(parents=True)
    (root / 'recipe.ini').write_text(ini_text(read_recipe(recipe, sets=sets).sections))
    write_record(root / 'run.json', dict(data='../../data', recipe=str(recipe), folder='.', sets=list(sets),
                                         synthetic=False))
    return write_finished_run(root, recipe_sha256=file_hash(root / 'recipe.ini'), **summary)


def grades_with(wrong): return np.where(np.arange(60) < wrong, (Y + 1) % 5, Y)


def listed(folder, capsys):
    "The lines that `runs` prints, without what ends them"
    main(['runs', str(folder)])
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def rows_of(lines):
    "The names of the table's first column"
    first = next(i for i, line in enumerate(lines) if line.startswith('──')) + 1
    last = next(i for i, line in enumerate(lines) if line.startswith('Keys changed'))
    return [line.split()[0] for line in lines[first:last]]


def test_finished_runs_are_listed_the_best_first(tmp_path, capsys):
    write_run(tmp_path / 'b', grades=grades_with(20))
    write_run(tmp_path / 'a', grades=grades_with(30))
    write_run(tmp_path / 'c', ['stage.lr=0.02'], grades=grades_with(4), date='2021-01-31')
    lines = listed(tmp_path, capsys)
    assert rows_of(lines) == ['c', 'b', 'a']
    kappa = read_record(tmp_path / 'c/summary.json')['stages'][0]['kappa']
    row = next(line for line in lines if line.startswith('c '))
    for text in (f'{kappa:.3f} ({kappa - .1:.2f}–{kappa + .1:.2f})', 'teacher', ' 60 ', '1 min 30 s', '2021-01-31'):
        assert text in row, text
    assert '  c: stage.lr=0.02' in lines and '  b: none' in lines
    assert any('The best of several runs' in line for line in lines)
    assert not any('group' in line for line in lines)
    table = lines[:next(i for i, line in enumerate(lines) if line.startswith('Keys changed'))]
    assert max(map(len, table)) <= 80


def test_a_run_of_the_demo_shows_what_its_summary_says(toy, capsys):
    lines = listed(toy.parent, capsys)
    result = next(o for o in read_record(toy / 'summary.json')['stages'] if o['stage'] == 'retrain_512')
    row = next(line for line in lines if line.startswith('settings-demo'))
    assert f'{result["kappa"]:.3f} (' in row and '*' in row and f' {result["validated"]} ' in row
    assert any('stage.tta=hflip' in line and 'more' in line for line in lines)
    assert any('SYNTHETIC DEMO' in line for line in lines)
    assert not any(line.startswith(('prepared', 'demo-')) for line in lines)


def test_runs_on_other_images_are_another_group(tmp_path, capsys):
    write_run(tmp_path / 'a', grades=grades_with(30))
    write_run(tmp_path / 'b', grades=grades_with(20))
    oof = pd.read_csv(tmp_path / 'a/oof.csv', dtype=dict(id_code=str))
    write_run(tmp_path / 'c', oof=oof.sample(frac=1, random_state=0))          # the same images in another order
    write_run(tmp_path / 'd', oof=oof.assign(id_code='x' + oof.id_code, teacher_grade=grades_with(25)))
    lines = listed(tmp_path, capsys)
    groups = {line.split()[0]: line.partition(', group ')[2][:1] for line in lines if ', group ' in line}
    assert list(groups.items()) == [('b', '1'), ('a', '1'), ('c', '1'), ('d', '2')]       # d is better than a
    assert any('comparable within a group only' in line for line in lines)


def test_other_grades_of_the_same_images_are_another_group(tmp_path, capsys):
    oof = pd.read_csv(write_run(tmp_path / 'a') / 'oof.csv', dtype=dict(id_code=str))
    write_run(tmp_path / 'b', oof=oof.assign(diagnosis=oof.diagnosis.where(oof.index > 0, 4)))
    assert any('comparable within a group only' in line for line in listed(tmp_path, capsys))


# What is not finished

def damage(root, what):
    "Damage a finished run in one way"
    if what == 'no oof.csv': (root / 'oof.csv').unlink()
    if what == 'other oof.csv': (root / 'oof.csv').write_text('a\n1\n')
    if what == 'edited summary': (root / 'summary.json').write_text('{"stages": []}')
    if what == 'no JSON': (root / 'summary.json').write_bytes(b'\xff{')
    if what == 'old summary': write_record(root / 'summary.json', dict(stages=[]))
    if what == 'other recipe': (root / 'recipe.ini').write_text('[stage]\n')
    if what == 'no recipe': (root / 'recipe.ini').unlink()
    if what == 'edited run.json': (root / 'run.json').write_text(json.dumps(dict(data='x')))


@pytest.mark.parametrize('what, words', [
    ('no oof.csv', 'oof.csv: no such file. Run `all` again'),
    ('other oof.csv', 'oof.csv: content changed'),
    ('edited summary', 'summary.json: content changed'),
    ('no JSON', 'summary.json: damaged JSON'),
    ('old summary', 'summary.json: written by an older version'),
    ('other recipe', 'its results are of an earlier recipe.ini. Run `all '),
    ('no recipe', 'recipe.ini is missing'),
    ('edited run.json', 'run.json: content changed')])
def test_a_damaged_run_is_listed_with_what_is_wrong(tmp_path, capsys, what, words):
    write_run(tmp_path / 'good')
    damage(write_run(tmp_path / 'bad'), what)
    lines = listed(tmp_path, capsys)
    assert rows_of(lines) == ['good']
    line, = (line for line in lines if line.startswith('bad: '))
    assert words in line


def test_an_unfinished_run_is_listed_with_what_is_left(tmp_path, capsys):
    root = write_run(tmp_path / 'a')
    (root / 'summary.json').unlink()
    for k in range(5): write_record(root / f'teacher/fold{k}/stage.json', {})
    write_record(root / 'retrain/fold0/stage.json', {})
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b/.lock').touch()
    (tmp_path / 'prepared').mkdir()
    assert listed(tmp_path, capsys) == [
        f'a: not finished; 6 of 10 folds trained (not yet retrain). Run `all {root}`.',
        'b: not finished; its images are not prepared yet. Run the same command again.']


def test_a_run_of_an_older_version_is_listed_without_its_keys(tmp_path, capsys):
    write_finished_run(tmp_path / 'a')
    lines = listed(tmp_path, capsys)
    assert rows_of(lines) == ['a'] and f'  a: {UNKNOWN_KEYS}' in lines


def test_folders_without_runs(tmp_path, capsys):
    expect_error(capsys, ['runs', tmp_path], 'has no run')
    expect_error(capsys, ['runs', '--runs', tmp_path / 'none'], f'{tmp_path / "none"}: no such folder')
    expect_error(capsys, ['runs', 'a', '--runs', 'b'], '--runs b: a was named, too')
    expect_error(capsys, ['runs', write_run(tmp_path / 'a')], 'is a run folder')


# Changed keys

def test_changed_keys():
    base = dict(recipe=dict(seed='1'), stage=dict(lr='1', bs='4'), demo=dict(train='60'))
    now = dict(recipe=dict(seed='1'), stage=dict(lr='2  3', tta='d4'), demo=dict(train='20')) | {
        'demo.stage': dict(lr='2  3', epochs='1'), 'stage.new': dict(train='t')}
    of_stages = ['stage.lr=2 3', 'stage.tta=d4', 'stage.bs removed', 'stage.new.train=t']
    assert list(changed_keys(now, base, demo=False)) == of_stages
    assert list(changed_keys(now, base, demo=True)) == [
        *of_stages[:3], 'demo.train=20', 'demo.stage.epochs=1', of_stages[3]]


def test_keys_are_compared_with_the_shipped_recipe_or_with_the_file(tmp_path):
    mine = tmp_path / 'one_table.ini'
    text = (ROOT / 'recipes/one_table.ini').read_text()
    mine.write_text(text.replace('epochs = 11', 'epochs = 3'))
    assert 'stage.epochs=3' in changed_of(write_run(tmp_path / 'a', recipe=mine))
    other = mine.rename(tmp_path / 'other.ini')
    root = write_run(tmp_path / 'b', ['stage.wd=0.3'], recipe=other)
    assert changed_of(root) == ['stage.wd=0.3']                        # against other.ini as it is
    other.unlink()
    assert changed_of(root) == ['stage.wd=0.3']                        # by its --set values
    many = write_run(tmp_path / 'c', [f'augment.{key}=0.31' for key in ('hue', 'blur', 'shift', 'shear', 'hflip')])
    assert changed_text(changed_of(many)).endswith('augment.shear=0.31 and 1 more')


def test_the_recipe_of_fit_is_compared_with_the_shipped_one(tmp_path):
    root = write_run(tmp_path / 'a', ['stage.epochs=3', 'table.train.id=name'])
    record = read_record(root / 'run.json')
    (root / 'a.ini').write_text((root / 'recipe.ini').read_text())
    write_record(root / 'run.json', dict(record, recipe='a.ini', sets=[]))
    assert changed_of(root) == ['stage.epochs=3']


def test_keys_that_distinguish_runs_come_first():
    "Five keys are shared by all runs, the sixth differs"
    shared = [f'stage.{key}=1' for key in ('a', 'b', 'c', 'd', 'e')]
    assert changed_text([*shared, 'stage.lr=0.1'], set(shared)).startswith('stage.lr=0.1, stage.a=1, ')
    assert changed_text([*shared, 'stage.lr=0.1']).startswith('stage.a=1, ') and changed_text([]) == 'none'
