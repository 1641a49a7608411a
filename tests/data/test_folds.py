import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from aptos_fastai.data.demo import write_demo
from aptos_fastai.data.folds import add_folds, make_folds, write_folds
from aptos_fastai.data.spreadsheet import TableError
from aptos_fastai.data.tables import read_tables
from aptos_fastai.recipe import read_recipe


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
