import contextlib
import shutil
from dataclasses import replace

import pandas as pd
import pytest
from conftest import ROOT, expect_error, write_dicom, write_table

from aptos_fastai.cli import main
from aptos_fastai.data.demo import write_demo
from aptos_fastai.data.folds import make_folds
from aptos_fastai.data.groups import natural_order
from aptos_fastai.data.spreadsheet import TableError
from aptos_fastai.data.tables import read_order, read_table, read_tables, table_contents
from aptos_fastai.recipe.read import read_recipe
from aptos_fastai.recipe.sections import Table

TRAIN = Table('train', 'train.csv', 'train_images', grade='diagnosis')


def edit_csv(data, row=0, **values):
    "Change one row of train.csv."
    df = pd.read_csv(data / 'train.csv', dtype=str)
    for column, value in values.items(): df.loc[row, column] = value
    df.to_csv(data / 'train.csv', index=False)


def write_csv(data, text):
    (data / 'train.csv').write_text(text)


def set_one_grade(data):
    df = pd.read_csv(data / 'train.csv')
    df.assign(diagnosis=2).to_csv(data / 'train.csv', index=False)


def test_a_table_is_one_row_per_image(tables):
    df = read_table(TRAIN, tables)
    assert list(df) == ['id_code', 'diagnosis', 'path', 'group', 'source']
    assert df.diagnosis.tolist() == [i % 5 for i in range(40)]
    assert df.path[3].endswith('train003.png')


def test_ids_are_file_names_with_or_without_extension(tables):
    (tables / 'train_images/train001.png').rename(tables / 'train_images/train001.jpeg')
    edit_csv(tables, 2, id_code='train002.png')
    assert read_table(TRAIN, tables).path[[1, 2]].str[-5:].tolist() == ['.jpeg', '2.png']


def grouped_table(pattern):
    return Table('train', 'train.csv', 'train_images', grade='diagnosis', group=pattern)


@pytest.mark.parametrize('pattern', ['(train0[01])', '(train0[01])(.)'])
def test_the_first_group_of_a_pattern_is_the_patient(tables, pattern):
    df = read_table(grouped_table(pattern), tables)
    assert df.group[[0, 9, 10, 20]].tolist() == ['train:train00', 'train:train00', 'train:train01', 'train:train020']
    note, = table_contents(grouped_table(pattern), tables).notes
    assert 'does not match 20 of 40 ids (train020, train021' in note


def test_an_id_is_not_the_patient_of_another_row(tables):
    df = pd.read_csv(tables / 'train.csv', dtype=str)
    df['who'] = [None, 'TRAIN000', 'train000', *(f'p{i}' for i in range(3, 40))]
    df.to_csv(tables / 'train.csv', index=False)
    group = table_contents(replace(TRAIN, patient='who'), tables).frame.group
    assert group[0] == 'train:train000' != group[1] == group[2]


def test_a_key_where_of_no_column_names_those_of_the_csv(tables):
    with pytest.raises(TableError, match=r'no column site\b.* Its columns are id_code, diagnosis[^,(]*$'):
        table_contents(replace(TRAIN, where='site = x'), tables)


def test_an_empty_patient_is_no_patient(tables):
    df = read_table(grouped_table(r'train0(0?)'), tables)
    assert df.group[:10].eq('train:0').all() and df.group[10:].tolist() == ['train:' + i for i in df.id_code[10:]]


@pytest.mark.parametrize('command', ['doctor', 'inspect'])
@pytest.mark.parametrize('pattern, words', [
    ('train0', [r'[table.train] group = train0: no group in parentheses', r'^(\d+)_(left|right)$']),
    (r'^(\d+)_left$', [r'[table.train] group = ^(\d+)_left$: matches none of the 40 ids, for example train000',
                       'block'])])
def test_a_pattern_that_finds_no_patient_is_an_error(tables, small_recipe, tmp_path, capsys, command, pattern, words):
    args = ['--recipe', small_recipe, '--data', tables, '--runs', tmp_path / 'runs']
    args += ['--set', f'table.train.group={pattern}']
    if command == 'inspect':
        expect_error(capsys, ['inspect', 'train', *args], *words)
        return
    with pytest.raises(SystemExit): main([str(o) for o in ['doctor', *args]])
    out = capsys.readouterr()
    assert 'Traceback' not in out.out + out.err
    for word in words: assert word in out.out


def test_ids_outside_the_pattern_are_counted(tables, small_recipe, tmp_path, capsys):
    args = ['--recipe', small_recipe, '--data', tables, '--runs', tmp_path / 'runs']
    args += ['--set', 'table.train.group=^(train0[01])']
    warning = '[table.train] group = ^(train0[01]): does not match 20 of 40 ids (train020, train021, train022,'
    for command in (['doctor'], ['inspect', 'train']):
        main([str(o) for o in [*command, *args]])
        out = ' '.join(capsys.readouterr().out.split())
        assert warning in out and 'each is a patient of its own' in out


@pytest.mark.parametrize('keys, words', [
    ([], 'patients unknown'),
    (['group=(train..)'], '4 patients'),
    (['block=8'], 'patients unknown, 5 blocks of 8 ids')])
def test_doctor_says_how_many_patients_are_known(tables, small_recipe, tmp_path, capsys, keys, words):
    args = ['--recipe', small_recipe, '--data', tables, '--runs', tmp_path / 'runs']
    for key in keys: args += ['--set', f'table.train.{key}']
    with contextlib.suppress(SystemExit): main([str(o) for o in ['doctor', *args]])
    assert f'ok   table train: 40 images, {words}, images of grade 0-4' in capsys.readouterr().out


def test_folder_names_of_other_downloads(tmp_path):
    data = write_demo(tmp_path / 'demo', pretrain=40, train=30, test=10)
    (data / 'diabetic-retinopathy-detection').rename(data / 'Pretrained')
    (data / 'aptos2019-blindness-detection').rename(data / 'DeepLearner')
    frames = read_tables(read_recipe(ROOT / 'settings.ini'), data)
    assert {name: len(df) for name, df in frames.items()} == dict(eyepacs2015=40, aptos_train=30, aptos_test=10)


def test_the_submission_has_the_order_of_the_sample_submission(tables):
    table = Table('test', 'test.csv', 'test_images', order='sample_submission.csv')
    df = read_table(table, tables)
    sample = df[['id_code']].assign(diagnosis=0)
    sample[::-1].to_csv(tables / 'sample_submission.csv', index=False)
    assert read_order(table, tables) == df.id_code.tolist()[::-1]
    sample[1:].to_csv(tables / 'sample_submission.csv', index=False)
    with pytest.raises(TableError, match='1 id in only one of this file and test.csv: test000'):
        read_order(table, tables)


def test_blocks_of_neighbouring_ids_are_groups(tables):
    ids = [f'{name}{i}' for name in 'ab' for i in range(1, 21)]
    for old, new in zip(sorted((tables / 'train_images').iterdir()), ids, strict=True):
        old.rename(old.with_stem(new))
    edit_ids = pd.read_csv(tables / 'train.csv').assign(id_code=ids).sample(frac=1, random_state=0)
    edit_ids.to_csv(tables / 'train.csv', index=False)
    recipe = read_recipe(ROOT / 'recipes/one_table.ini', sets=['table.train.block=8'])
    frame = read_table(recipe.tables['train'], tables).set_index('id_code')
    assert recipe.tables['train'].grouped_by == 'blocks of 8 ids'
    for first in range(0, 40, 8): assert frame.group[ids[first:first + 8]].nunique() == 1
    assert frame.group.nunique() == 5
    fold = make_folds(frame.reset_index(), 5, 0)
    assert pd.Series(fold).groupby(frame.group.to_numpy()).nunique().max() == 1


@pytest.mark.parametrize('ids', [['a2', 'a10', 'a10b', 'b1'], ['7', '12', 'x'], ['img²1', 'img²3']])
def test_natural_order(ids):
    shuffled = pd.Series(ids[::-1])
    assert shuffled.iloc[natural_order(shuffled)].tolist() == ids


BAD_TABLES = {                               # name: how to spoil the table, words of the message
    'no csv': (lambda data: (data / 'train.csv').unlink(), ['[table.train]: train.csv not found in', '--data demo']),
    'empty csv': (lambda data: write_csv(data, ''), ['train.csv: the file is empty']),
    'no rows': (lambda data: write_csv(data, 'id_code,diagnosis\n'), ['train.csv: no rows']),
    'no column': (lambda data: write_csv(data, 'id_code,grade\na,1\n'),
                  ['no column diagnosis', 'Its columns are id_code, grade']),
    'ragged csv': (lambda data: write_csv(data, 'id_code,diagnosis\na,1\nb,2,3,4\n'),
                   ['column 3 has cells but no name in the header']),
    'grade 5': (lambda data: edit_csv(data, diagnosis='5'), ['1 invalid value in column diagnosis: train000 = 5']),
    'grade 1.5': (lambda data: edit_csv(data, diagnosis='1.5'), ['train000 = 1.5', 'whole numbers from 0 to 4']),
    'empty grade': (lambda data: edit_csv(data, diagnosis=''), ['train000 =']),
    'grade a word': (lambda data: edit_csv(data, diagnosis='bad'), ['train000 = bad']),
    'duplicate id': (lambda data: edit_csv(data, id_code='train001'),
                     ['1 duplicate value in column id_code: train001', 'Keep one row per image']),
    'id and file name': (lambda data: edit_csv(data, id_code='train001.png'),
                         ['1 id in column id_code of an image that another row names: train001']),
    'id without image': (lambda data: edit_csv(data, id_code='gone'), ['1 of 40 ids have no image in', 'gone']),
    'two images of an id': (lambda data: shutil.copy(data / 'train_images/train001.png',
                                                     data / 'train_images/train001.jpg'),
                            ['train001: 2 images have this name: train001.jpg, train001.png']),
    'no image folder': (lambda data: (data / 'train_images').rename(data / 'elsewhere'),
                        ['train_images: image folder not found']),
    'one grade': (set_one_grade, ['all 40 grades are 2', 'Set csv and grade']),
    'too few images': (lambda data: write_table(data, 4),
                       ['4 images are too few for [recipe] splits = 5']),
}


@pytest.mark.parametrize('name', BAD_TABLES)
def test_bad_tables(tables, small_recipe, tmp_path, capsys, name):
    spoil, words = BAD_TABLES[name]
    spoil(tables)
    runs = tmp_path / 'runs'
    expect_error(capsys, ['all', '--recipe', small_recipe, '--data', tables, '--runs', runs], *words)
    assert not runs.exists()


# DICOM

def dicom_table(folder):
    "A table of four DICOM images of two patients, and the recipe's section that reads their tags"
    (folder / 'images').mkdir()
    for i, (patient, side) in enumerate([('7', 'L'), ('7', 'R'), ('8', 'L'), ('8', 'R')]):
        write_dicom(folder / f'images/i{i}', PatientID=patient, ImageLaterality=side, Manufacturer='Topcon',
                    ManufacturerModelName='NW400')
    (folder / 'a.csv').write_text('id_code,diagnosis\ni0,0\ni1,1\ni2,2\ni3,3\n')
    return Table('t', csv='a.csv', images='images', grade='diagnosis', patient='dicom:patient', eye='dicom:eye',
                 carry='dicom:device')


def test_patients_eyes_and_cameras_come_from_dicom_tags(tmp_path):
    frame = read_table(dicom_table(tmp_path), tmp_path)
    assert frame.group.tolist() == ['t:7', 't:7', 't:8', 't:8'] and frame.eye.tolist() == ['left', 'right'] * 2
    assert frame['dicom:device'].tolist() == ['Topcon NW400'] * 4
    assert 'DOE' not in frame.to_csv() and '1950' not in frame.drop(columns='path').to_csv()


def test_dicom_tags_of_other_images_are_an_error(tmp_path):
    table = dicom_table(tmp_path)
    for file in (tmp_path / 'images').iterdir(): file.write_bytes(b'\xff\xd8\xff')
    with pytest.raises(TableError, match='patient = dicom:patient: the column is empty in all 4 rows'):
        read_table(table, tmp_path)
