import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, fails, write_table

from aptos_fastai.data.folds import add_folds, make_folds, write_folds
from aptos_fastai.data.tables import TableError, read_order, read_table, read_tables
from aptos_fastai.recipe import Table, read_recipe

TRAIN = Table('train', 'train.csv', 'train_images', grade='diagnosis')


def test_frame(tables):
    df = read_table(TRAIN, tables)
    assert list(df) == ['id_code', 'diagnosis', 'path', 'group', 'source'] and len(df) == 40
    assert df.diagnosis.tolist() == [i % 5 for i in range(40)] and df.path[3].endswith('train003.png')


def test_extensions_are_found_by_stem_and_ids_may_carry_them(tables):
    (tables / 'train_images/train001.png').rename(tables / 'train_images/train001.jpeg')
    df = pd.read_csv(tables / 'train.csv', dtype=str)
    df.loc[2, 'id_code'] = 'train002.png'
    df.to_csv(tables / 'train.csv', index=False)
    assert read_table(TRAIN, tables).path[[1, 2]].str[-5:].tolist() == ['.jpeg', '2.png']


def edit(tables, **cols):
    df = pd.read_csv(tables / 'train.csv', dtype=str)
    for k, v in cols.items(): df.loc[0, k] = v
    df.to_csv(tables / 'train.csv', index=False)


def bad_csv(tables, text): (tables / 'train.csv').write_text(text)

BAD_TABLES = {
    'no csv': (lambda t: (t / 'train.csv').unlink(), ['no train.csv', '--data demo']),
    'empty csv': (lambda t: bad_csv(t, ''), ['train.csv: is empty']),
    'no rows': (lambda t: bad_csv(t, 'id_code,diagnosis\n'), ['has no rows']),
    'no column': (lambda t: bad_csv(t, 'id_code,grade\na,1\n'), ['no column diagnosis', 'id_code, grade']),
    'ragged csv': (lambda t: bad_csv(t, 'id_code,diagnosis\na,1\nb,2,3,4\n'), ['no readable CSV']),
    'grade 5': (lambda t: edit(t, diagnosis='5'), ['1 diagnosis not a whole number from 0 to 4', 'train000 = 5']),
    'grade 1.5': (lambda t: edit(t, diagnosis='1.5'), ['train000 = 1.5']),
    'grade empty': (lambda t: edit(t, diagnosis=''), ['train000 =']),
    'grade a word': (lambda t: edit(t, diagnosis='mild'), ['train000 = mild']),
    'id twice': (lambda t: edit(t, id_code='train001'), ['1 id_code', 'more than once', 'train001']),
    'id and file name': (lambda t: edit(t, id_code='train001.png'), ['1 id_code', 'more than once']),
    'id lost': (lambda t: edit(t, id_code='gone'), ['1 of 40 ids have no image', 'gone']),
    'two images': (lambda t: (t / 'train_images/train001.jpg').write_bytes(b''), ['train001', 'keep one']),
    'no images': (lambda t: (t / 'train_images').rename(t / 'elsewhere'), ['train_images: no such folder']),
    'one grade': (lambda t: write_one_grade(t), ['single grade']),
    'too few': (lambda t: write_table(t, 4), ['4 patients or images are too few for [recipe] splits = 5']),
}

def write_one_grade(t):
    df = pd.read_csv(t / 'train.csv'); df['diagnosis'] = 2; df.to_csv(t / 'train.csv', index=False)

def test_folds_are_stratified_grouped_and_deterministic():
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(id_code=[f'{i // 2}_{"lr"[i % 2]}' for i in range(600)], diagnosis=rng.choice(5, 600, p=[.7, .1, .1, .05, .05]).astype(float),
                           group=[str(i // 2) for i in range(600)], source='t'))
    f = make_folds(df, 5, 1)
    assert df.assign(fold=f).groupby('group').fold.nunique().max() == 1
    shares = pd.crosstab(f, df.diagnosis, normalize='index')
    assert (shares.std() < .03).all() and (np.bincount(f) > 90).all()
    assert (make_folds(df, 5, 1) == f).all() and not (make_folds(df, 5, 2) == f).all()


def test_folds_are_written_once_and_reused(tables, tmp_path):
    r = read_recipe(ROOT / 'recipes/one_table.ini')
    file = tmp_path / 'folds.csv'
    first = add_folds(r, read_tables(r, tables), file)
    write_folds(r, first, file)
    text = file.read_text()
    assert add_folds(r, read_tables(r, tables), file)['train'].fold.tolist() == first['train'].fold.tolist() and file.read_text() == text
    file.write_text(text.replace(',0,', ',3,', 1))            # as if someone had moved an image by hand
    with pytest.raises(TableError, match='the folds of train are not those'): add_folds(r, read_tables(r, tables), file)
    file.write_text(text)
    edit(tables, diagnosis='4')                               # other grades: other folds
    again = add_folds(r, read_tables(r, tables), file)
    assert again['train'].fold.max() == 4 and (first['test'].fold == -1).all()


def test_eyepacs_patients_stay_together(tmp_path):
    from aptos_fastai.data.demo import write_demo
    r = read_recipe(ROOT / 'settings.ini', demo=True)
    frames = add_folds(r, read_tables(r, write_demo(tmp_path / 'demo', pretrain=60, train=60, test=10)), tmp_path / 'folds.csv')
    df = frames['eyepacs2015']
    assert df.group.nunique() == 30 and df.groupby('group').fold.nunique().max() == 1


def test_published_folder_names(tmp_path):
    from aptos_fastai.data.demo import write_demo
    r, d = read_recipe(ROOT / 'settings.ini'), write_demo(tmp_path / 'demo', pretrain=60, train=60, test=10)
    (d / 'diabetic-retinopathy-detection').rename(d / 'Pretrained')
    (d / 'aptos2019-blindness-detection').rename(d / 'DeepLearner')
    assert {n: len(f) for n, f in read_tables(r, d).items()} == dict(eyepacs2015=60, aptos_train=60, aptos_test=10)


def test_order_is_that_of_the_sample_submission(tables):
    t = Table('test', 'test.csv', 'test_images', order='sample_submission.csv')
    df = read_table(t, tables)
    df[['id_code']][::-1].assign(diagnosis=0).to_csv(tables / 'sample_submission.csv', index=False)
    assert read_order(t, tables) == df.id_code.tolist()[::-1]
    df[['id_code']][1:].to_csv(tables / 'sample_submission.csv', index=False)
    with pytest.raises(TableError, match='differ in 1: test000'): read_order(t, tables)


@pytest.mark.parametrize('name', BAD_TABLES)
def test_bad_tables(tables, small_recipe, tmp_path, capsys, name):
    spoil, words = BAD_TABLES[name]
    spoil(tables)
    fails(capsys, ['all', '--recipe', small_recipe, '--data', tables, '--runs', tmp_path / 'runs'], *words)
    assert not (tmp_path / 'runs').exists()
