"Presets: each reads made-up files of the layout in which its table is published."
import shutil

import pandas as pd
import pytest
from conftest import ROOT
from layouts import LAYOUTS, grade_of, write_lines

from aptos_fastai.data.spreadsheet import TableError
from aptos_fastai.data.tables import read_order, table_contents
from aptos_fastai.recipe.files import preset_files
from aptos_fastai.recipe.read import preset_table, read_recipe
from aptos_fastai.recipe.sections import ConfigError

FOUND = {                                    # preset -> its layout, images, groups, ungradable images
    'aptos2019': ('aptos2019', 60, 60, 0),
    'aptos2019_test': ('aptos2019', 12, 12, 0),
    'eyepacs2015': ('eyepacs2015', 60, 30, 0),
    'eyepacs2015_test': ('eyepacs2015', 60, 30, 0),
    'idrid': ('idrid', 60, 6, 0),
    'idrid_test': ('idrid', 20, 20, 0),
    'messidor2': ('messidor2', 59, 30, 1),
    'ddr': ('ddr', 59, 59, 1),
    'ddr_valid': ('ddr', 19, 19, 1),
    'ddr_test': ('ddr', 19, 19, 1),
    'deepdrid': ('deepdrid', 79, 20, 1),
    'deepdrid_valid': ('deepdrid', 39, 10, 1),
}


@pytest.fixture(scope='session')
def layout(tmp_path_factory):
    "Return a function that writes a layout once and returns its folder"
    written = {}

    def write(name):
        if name not in written: written[name] = LAYOUTS[name](tmp_path_factory.mktemp(name))
        return written[name]
    return write


def test_every_preset_is_tested(): assert set(preset_files()) == set(FOUND)


@pytest.mark.parametrize('preset', FOUND)
def test_a_preset_reads_its_layout(layout, preset):
    name, images, groups, ungradable = FOUND[preset]
    contents = table_contents(preset_table(preset), layout(name))
    df = contents.frame
    assert (len(df), df.group.nunique(), len(contents.ungradable)) == (images, groups, ungradable)
    assert df.path.nunique() == len(df)
    assert df.diagnosis.isna().all() if preset == 'aptos2019_test' else df.diagnosis.isin(range(5)).all()


@pytest.mark.parametrize('preset', FOUND)
def test_a_preset_names_source_licence_and_traps(preset):
    text = preset_files()[preset].read_text()
    assert 'Source' in text and ('Licence' in text or 'licence' in text)
    assert 'Traps' in text or preset.endswith('_test')


def test_both_parts_of_idrid_begin_at_001(layout):
    train, test = (table_contents(preset_table(name), layout('idrid')).frame for name in ('idrid', 'idrid_test'))
    assert train.id_code[0] == test.id_code[0] == 'IDRiD_001' and train.path[0] != test.path[0]
    assert train.diagnosis.tolist() == [grade_of(i) for i in range(1, 61)]
    assert test.diagnosis.tolist() == [grade_of(i) for i in range(301, 321)]


def test_eyes_of_eyepacs_and_deepdrid(layout):
    for preset in ('eyepacs2015', 'deepdrid'):
        df = table_contents(preset_table(preset), layout(preset)).frame
        letters = df.id_code.str.extract('_([lr])')[0]
        assert df.eye.str[0].tolist() == letters.tolist()
        assert df.groupby('group').eye.nunique().eq(2).all()


def test_a_part_of_the_eyepacs_solution(layout):
    df = table_contents(preset_table('eyepacs2015_test', where='Usage = Private'), layout('eyepacs2015')).frame
    assert len(df) == 45 and set(df.Usage) == {'Private'}


def test_pairs_of_messidor2(layout, tmp_path):
    df = table_contents(preset_table('messidor2'), layout('messidor2')).frame
    assert df.groupby('group').size().value_counts().to_dict() == {2: 29, 1: 1}      # the ungradable image is left out
    with pytest.raises(TableError, match='other.csv: no such file. It lists the images of each patient'):
        table_contents(preset_table('messidor2', pairs='other.csv'), layout('messidor2'))
    contents = table_contents(preset_table('messidor2', pairs=''), layout('messidor2'))
    assert contents.frame.group.nunique() == 59


def test_pairs_that_share_an_image_are_one_patient(layout, tmp_path):
    (tmp_path / 'm').mkdir()
    shutil.copytree(layout('messidor2'), tmp_path / 'm', dirs_exist_ok=True)
    names = [line.partition(',')[0] for line in (tmp_path / 'm/messidor_data.csv').read_text().splitlines()[1:]]
    write_lines(tmp_path / 'm/messidor-2.csv', ['left;right', f'{names[0]};{names[1]}', f'{names[1]};{names[2]}'])
    df = table_contents(preset_table('messidor2'), tmp_path / 'm').frame.set_index('id_code')
    assert df.group[names[0]] == df.group[names[1]] == df.group[names[2]] != df.group[names[3]]


def test_the_order_of_aptos(layout):
    assert len(read_order(preset_table('aptos2019_test'), layout('aptos2019'))) == 12


def test_a_recipe_overrides_keys_of_a_preset(tmp_path):
    recipe = tmp_path / 'r.ini'
    recipe.write_text('[table.a]\npreset = messidor2\nimages = photos\n[stage.s]\ntrain = a\n[submit]\nfinal = s\n')
    table = read_recipe(recipe).tables['a']
    assert (table.name, table.images, table.grade) == ('a', 'photos', 'adjudicated_dr_grade')
    with pytest.raises(ConfigError, match='preset = messidor: no such preset, did you mean messidor2'):
        read_recipe(recipe, sets=['table.a.preset=messidor'])


def test_idrid_as_published(idrid, tmp_path):
    "The real images and grades in the official layout: headers that end in blanks, both parts beginning at 001"
    folder = tmp_path / 'B. Disease Grading'
    for letter, part, source in (('a', 'Training', 'train'), ('b', 'Testing', 'test')):
        images = folder / f'1. Original Images/{letter}. {part} Set'
        images.mkdir(parents=True)
        ids = pd.read_csv(idrid / f'{source}.csv', dtype=str)
        ids['diagnosis'] = ids.get('diagnosis', '0')         # grades of the test part are not known here: made up
        if source == 'test': ids.loc[::2, 'diagnosis'] = '2'
        rows = ['Image name,Retinopathy grade,Risk of macular edema ,,,,,,,,,']
        for i, row in enumerate(ids.itertuples(), 1):
            file = next((idrid / f'{source}_images').glob(f'{row.id_code}.*'))
            shutil.copy(file, images / f'IDRiD_{i:03}{file.suffix}')
            rows.append(f'IDRiD_{i:03},{row.diagnosis},0,,,,,,,,,')
        write_lines(folder / f'2. Groundtruths/{letter}. IDRiD_Disease Grading_{part} Labels.csv', rows)
    train, test = (table_contents(preset_table(name), tmp_path).frame for name in ('idrid', 'idrid_test'))
    assert (len(train), train.group.nunique(), len(test)) == (413, 42, 103)
    assert train.diagnosis.value_counts().sort_index().tolist() == [134, 20, 136, 74, 49]
    assert train.id_code[0] == test.id_code[0] and train.path[0] != test.path[0]


def test_every_preset_is_on_the_page_of_tables():
    page = (ROOT / 'docs/tables.md').read_text(encoding='utf-8')
    for name in preset_files(): assert f"`{name}`" in page, name
