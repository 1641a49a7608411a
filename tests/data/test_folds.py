import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from aptos_fastai.data import folds
from aptos_fastai.data.demo import write_demo
from aptos_fastai.data.folds import add_folds, make_folds, write_folds
from aptos_fastai.data.spreadsheet import TableError
from aptos_fastai.data.tables import read_tables
from aptos_fastai.recipe.read import read_recipe


def test_folds_are_stratified_grouped_and_deterministic():
    rng = np.random.default_rng(0)
    patients = np.arange(600) // 2
    df = pd.DataFrame(dict(diagnosis=rng.choice(5, 600, p=[.7, .1, .1, .05, .05]).astype(float),
                           group=patients.astype(str), source='t'))
    folds = make_folds(df, 5, 1)
    assert df.assign(fold=folds).groupby('group').fold.nunique().max() == 1
    shares = pd.crosstab(folds, df.diagnosis, normalize='index')
    assert (shares.std() < .03).all()
    assert (np.bincount(folds) > 90).all()
    assert (make_folds(df, 5, 1) == folds).all()
    assert (make_folds(df, 5, 2) != folds).any()


@pytest.fixture
def written(tables, tmp_path):
    "A recipe, its frames with folds, and the folds.csv written from them."
    recipe, file = read_recipe(ROOT / 'recipes/one_table.ini'), tmp_path / 'folds.csv'
    frames = add_folds(recipe, read_tables(recipe, tables), file)
    write_folds(recipe, frames, file)
    return recipe, frames, file


def test_folds_are_reused(tables, written):
    recipe, frames, file = written
    text = file.read_text()
    again = add_folds(recipe, read_tables(recipe, tables), file)
    assert again['train'].fold.tolist() == frames['train'].fold.tolist()
    assert (again['test'].fold == -1).all()
    write_folds(recipe, again, file)
    assert file.read_text() == text


def test_edited_folds_are_an_error(tables, written):
    recipe, _, file = written
    file.write_text(file.read_text().replace(',0,', ',3,', 1))
    with pytest.raises(TableError, match='content changed'): add_folds(recipe, read_tables(recipe, tables), file)


def test_other_grades_make_other_folds(tables, written):
    recipe, frames, file = written
    df = pd.read_csv(tables / 'train.csv', dtype=str)
    df.loc[0, 'diagnosis'] = '4'
    df.to_csv(tables / 'train.csv', index=False)
    again = add_folds(recipe, read_tables(recipe, tables), file)
    assert sorted(set(again['train'].fold)) == [0, 1, 2, 3, 4]
    assert again['train'].fold.tolist() != frames['train'].fold.tolist()


def test_both_eyes_of_a_patient_are_in_one_fold(tmp_path):
    recipe = read_recipe(ROOT / 'settings.ini', demo=True)
    data = write_demo(tmp_path / 'demo', pretrain=60, train=20, test=5)
    df = add_folds(recipe, read_tables(recipe, data), tmp_path / 'folds.csv')['eyepacs2015']
    assert df.group.nunique() == 30
    assert df.groupby('group').fold.nunique().max() == 1


# Tables made by hand

def recipe_of(tmp_path, *tables):
    "A recipe of 2 folds with these tables; the last one is ungraded"
    file = tmp_path / 'r.ini'
    sections = [f'[table.{name}]\ncsv = {name}.csv\ngrade = {"" if name == tables[-1] else "g"}\n' for name in tables]
    file.write_text('[recipe]\nsplits = 2\n' + ''.join(sections) + f'[stage.s]\ntrain = {tables[0]}\n[submit]\n'
                    f'final = s\ntable = {tables[-1]}\n')
    return read_recipe(file)


def frame(source, groups, ids=None):
    "A table whose image i has the grade i % 2"
    return pd.DataFrame(dict(source=source, id_code=ids or [f'{source}{i}' for i in range(len(groups))],
                             diagnosis=np.arange(len(groups)) % 2, group=list(groups)))


def test_a_group_has_one_fold_in_all_tables(tmp_path):
    recipe = recipe_of(tmp_path, 'a', 'b', 'test')
    frames = dict(test=frame('test', 'qxn'), a=frame('a', 'ppqqrrss'), b=frame('b', 'sxpyxyzzrt'))
    found = add_folds(recipe, frames, tmp_path / 'folds.csv')
    assert list(found) == ['test', 'a', 'b']
    of_a = dict(zip(found['a'].group, found['a'].fold, strict=True))
    of_b = dict(zip(found['b'].group, found['b'].fold, strict=True))
    made = dict(zip(frames['b'].group, make_folds(frames['b'], 2, recipe.seed), strict=True))
    assert of_b == made | {name: of_a[name] for name in 'spr'} != made
    assert found['test'].fold.tolist() == [of_a['q'], of_b['x'], -1]
    write_folds(recipe, found, tmp_path / 'folds.csv')
    assert pd.read_csv(tmp_path / 'folds.csv').source.tolist() == ['a'] * 8 + ['b'] * 10


@pytest.fixture(params=[['007', 'NA', '1e5', 'null', '8', '', 'true', '9.0'], [f'0{i}' for i in range(1, 8)] + ['9.0']])
def ids_as_they_are(tmp_path, request):
    "A recipe, frames whose ids look like numbers and missing values, their folds and the folds.csv of them"
    recipe = recipe_of(tmp_path, 'true', 'test')
    frames = {'true': frame('true', 'ppqqrrss', request.param)}
    found = add_folds(recipe, frames, tmp_path / 'folds.csv')
    write_folds(recipe, found, tmp_path / 'folds.csv')
    return recipe, frames, found['true'].fold.tolist(), tmp_path / 'folds.csv'


def test_ids_that_look_like_numbers_or_nothing_keep_their_folds(ids_as_they_are, monkeypatch):
    recipe, frames, expected, file = ids_as_they_are
    assert pd.read_csv(file).digest.str.fullmatch('[0-9a-f]{12}-[0-9a-f]{12}').all()
    monkeypatch.setattr(folds, 'make_folds', None)            # calling it would fail
    assert add_folds(recipe, frames, file)['true'].fold.tolist() == expected


@pytest.mark.parametrize('edit', [lambda lines: lines[:-1], lambda lines: [*lines, lines[-1]],
                                  lambda lines: [*lines[:-1], lines[-1].replace('9.0', '9.1')]])
def test_a_file_of_other_rows_is_made_again(ids_as_they_are, edit):
    recipe, frames, expected, file = ids_as_they_are
    file.write_text('\n'.join(edit(file.read_text().splitlines())) + '\n')
    assert add_folds(recipe, frames, file)['true'].fold.tolist() == expected


@pytest.mark.parametrize('text, words', [
    ('source,id_code,fold,digest\na,b,x,c\n', r'folds.csv: damaged CSV \(.*\). Delete it and run again'),
    ('source,id,fold,digest\na,b,0,c\n', 'its columns are source, id, fold, digest, not source, id_code')])
def test_a_damaged_file_of_folds(ids_as_they_are, text, words):
    recipe, frames, _, file = ids_as_they_are
    file.write_text(text)
    with pytest.raises(TableError, match=words): add_folds(recipe, frames, file)


def test_an_unchanged_file_of_folds_is_not_written_again(ids_as_they_are):
    recipe, frames, _, file = ids_as_they_are
    before = file.stat().st_mtime_ns, file.stat().st_ino
    write_folds(recipe, add_folds(recipe, frames, file), file)
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == before


@pytest.mark.parametrize('groups, grades, words', [
    ('ppp', [0, 1, 0], r"\[table.t\]: 1 patients are too few for \[recipe\] splits = 2"),
    ('pq', [0, 1], 'every grade has fewer than 2 images'),
    ('ppqqqq', [0, 1, 0, 0, 0, 0], 'fold [01] contains a single grade')])
def test_too_few_images_for_the_folds(groups, grades, words):
    df = frame('t', groups).assign(diagnosis=grades)
    with pytest.raises(TableError, match=words): make_folds(df, 2, 0, 'patients')


def test_as_many_groups_as_folds_and_two_grades_in_each_are_enough():
    assert sorted(make_folds(frame('t', 'ppqq'), 2, 0)) == [0, 0, 1, 1]
