"Tables as people have them: every making of CSV, images wherever they lie, what columns mean."
import shutil
import unicodedata
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from aptos_fastai.data.grades import read_grade
from aptos_fastai.data.groups import (
    eye_note,
    eye_of_name,
    find_groups,
    patient_key,
    patient_variants,
    patients_text,
    shared_patients,
)
from aptos_fastai.data.spreadsheet import (
    TableError,
    count,
    first_few,
    has_columns,
    read_spreadsheet,
    safe_cell,
    separator_of,
    unsafe_cell,
)
from aptos_fastai.data.tables import (
    describe,
    only_folder,
    read_order,
    read_table,
    table_contents,
    with_present_tables,
)
from aptos_fastai.recipe.read import read_recipe
from aptos_fastai.recipe.sections import Table

IDS = ['NA', 'None', '000123', '1e5', 'true', 'a b', 'ü1']
GRADES = [0, 1, 2, 3, 4, 2, 1]


def image_bytes(i: int = 0) -> bytes:
    return cv2.imencode('.png', np.full((8, 8, 3), 10 * i, np.uint8))[1].tobytes()


def write_images(folder: Path, names) -> None:
    for i, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image_bytes(i))


def table(**keys) -> Table:
    return Table('t', **(dict(csv='t.csv', images='images', grade='diagnosis') | keys))


def lines(separator: str, rows=None) -> str:
    rows = rows or [['id_code', 'diagnosis'], *([i, str(g)] for i, g in zip(IDS, GRADES, strict=True))]
    return '\n'.join(separator.join(row) for row in rows) + '\n'


MAKINGS = {
    'comma': lines(',').encode(),
    'semicolon': lines(';').encode(),
    'tab': lines('\t').encode(),
    'byte order mark': lines(',').encode('utf-8-sig'),
    'UTF-16': lines(';').encode('utf-16'),
    'UTF-16 without mark': lines('\t').encode('utf-16-le'),
    'UTF-16, big endian': lines(',').encode('utf-16-be'),
    'Windows-1252': lines(';').encode('cp1252'),
    'sep line': ('sep=;\n' + lines(';')).encode(),
    'sep line in capitals, CRLF': ('SEP=|\n' + lines('|')).replace('\n', '\r\n').encode(),
    'old Macintosh': lines(',').replace('\n', '\r').encode(),
    'spaces': lines(' , ').encode(),
    'quoted': lines('","').replace('\n', '"\n"')[:-1].join(['"', '']).encode(),
    'empty rows': ('\n\n' + lines(',') + '\n,\n , \n').encode(),
    'empty columns': lines(',').replace('\n', ',,\n').encode(),
    'rows that end in a comma': lines(',').replace('\n', ',\n').replace('diagnosis,', 'diagnosis').encode(),
    'decimal commas': lines(';').replace('\n', ',0\n').replace('diagnosis,0', 'diagnosis').encode(),
}


@pytest.mark.parametrize('making', MAKINGS)
def test_a_csv_of_any_making(tmp_path, making):
    (tmp_path / 't.csv').write_bytes(MAKINGS[making])
    write_images(tmp_path / 'images', [f'{i}.png' for i in IDS])
    df = read_table(table(), tmp_path)
    assert df.id_code.tolist() == IDS and df.diagnosis.tolist() == GRADES
    assert [Path(p).stem for p in df.path] == IDS


def test_a_workbook(tmp_path):
    openpyxl = pytest.importorskip('openpyxl')
    book = openpyxl.Workbook()
    for row in [['id_code', 'diagnosis'], ['000123', 2], [17, 3.0], [42, 1], [None, None]]: book.active.append(row)
    book.active['A4'].number_format = '000000'
    book.save(tmp_path / 't.xlsx')
    shutil.copy(tmp_path / 't.xlsx', tmp_path / 't.csv')       # known by its content
    write_images(tmp_path / 'images', ['000123.png', '17.png', '000042.png', '42.png'])
    for name in ('t.xlsx', 't.csv'):
        df = read_table(table(csv=name), tmp_path)
        assert df.id_code.tolist() == ['000123', '17', '000042'] and df.diagnosis.tolist() == [2, 3, 1]


@pytest.mark.parametrize('text', ['a.jpg 3\nb.jpg 0\n', 'a.jpg,3\nb.jpg,0\n', 'a.jpg\t3\r\nb.jpg\t0\r\n'])
def test_a_label_file_without_a_header(tmp_path, text):
    (tmp_path / 'labels.txt').write_text(text)
    write_images(tmp_path / 'images', ['a.jpg', 'b.jpg'])
    df = read_table(table(csv='labels.txt', header='no', id='1', grade='2'), tmp_path)
    assert df.id_code.tolist() == ['a.jpg', 'b.jpg'] and df.diagnosis.tolist() == [3, 0]


@pytest.mark.parametrize('content, words', [
    (b'', 'the file is empty'),
    (b'\n ,\n', 'the file is empty'),
    (b'id_code,diagnosis\n', 'no rows'),
    (b'Id_code,diagnosis\na,1\n', 'no column id_code, did you mean Id_code? Its columns are Id_code, diagnosis'),
    (b'id_code,diagnosis\na,1\nb,2,3\n', 'column 3 has cells but no name'),
    (b'id_code,diagnosis,diagnosis\na,1,2\n', 'two columns are called diagnosis'),
    (b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR', 'it is no text'),
])
def test_csvs_that_are_refused(tmp_path, content, words):
    (tmp_path / 't.csv').write_bytes(content)
    write_images(tmp_path / 'images', ['a.png', 'b.png'])
    with pytest.raises(TableError) as e: read_table(table(), tmp_path)
    assert str(tmp_path / 't.csv') in str(e.value) and words in str(e.value)


# Images wherever they lie

@pytest.mark.parametrize('file, name, loose', [
    ('x.png', 'x', False),
    ('x.png', 'x.png', False),
    ('site A/x.jpg', 'x', False),
    ('site A/x.jpg', 'site A/x.jpg', False),
    ('site A/x.jpg', r'site A\x', False),
    ('images/x.png', 'x.png', False),
    ('x.JPG', 'x.png', True),
    ('X.JPG', 'x', True),
    ('a/B/x.jpeg', 'b/X.jpg', True),
    ('a/b/x.jpeg', 'b/x', True),
    (unicodedata.normalize('NFD', 'ü.png'), unicodedata.normalize('NFC', 'ü'), False),
    ('x.png', 'images/x.png', True),
    ('IMG.001.png', 'IMG.001', False),
])
def test_images_wherever_they_lie(tmp_path, file, name, loose):
    (tmp_path / 't.csv').write_text(f'id_code,diagnosis\n{name},1\nother,2\n', encoding='utf-8')
    write_images(tmp_path / 'images', [file, 'other.png'])
    contents = table_contents(table(), tmp_path)
    assert Path(contents.frame.path[0]) == tmp_path / 'images' / file
    notes = [note for note in contents.notes if 'no image has grade' not in note]
    assert notes == (['1 of 2 ids differ from their file in folder, suffix, case or accents'] if loose else [])


@pytest.mark.parametrize('files, name, words', [
    (['a/x.png', 'b/x.png'], 'x', '2 images have this name: a/x.png, b/x.png'),
    (['x.png', 'x.jpg'], 'x', '2 images have this name'),
    (['X.png', 'x.PNG'], 'x.jpg', '2 images have this name'),
    (['a/x.png'], 'c/x.png', '1 of 2 ids have no image'),
    (['xx.png'], 'x', '1 of 2 ids have no image'),
    (['IMG.001.png'], 'IMG.002', '1 of 2 ids have no image'),
])
def test_ambiguous_and_missing_images(tmp_path, files, name, words):
    (tmp_path / 't.csv').write_text(f'id_code,diagnosis\n{name},1\nother,2\n')
    write_images(tmp_path / 'images', [*files, 'other.png'])
    with pytest.raises(TableError) as e: read_table(table(), tmp_path)
    assert words in str(e.value) and name in str(e.value)


def test_an_image_in_the_folder_itself_comes_before_its_mask(tmp_path):
    (tmp_path / 't.csv').write_text('id_code,diagnosis\nx,1\nx2,0\n')
    write_images(tmp_path / 'images', ['x.png', 'masks/x.png', 'x2.png', 'x2.txt'])
    (tmp_path / 'images/x2.txt').write_text('notes')
    df = read_table(table(), tmp_path)
    assert [Path(p).relative_to(tmp_path / 'images').as_posix() for p in df.path] == ['x.png', 'x2.png']


def test_two_rows_of_one_file_are_refused_and_unnamed_images_counted(tmp_path):
    (tmp_path / 't.csv').write_text('id_code,diagnosis\nx,1\nX.jpg,2\n')
    write_images(tmp_path / 'images', ['x.png'])
    with pytest.raises(TableError, match='1 id in column id_code of an image that another row names: X.jpg'):
        read_table(table(), tmp_path)
    (tmp_path / 't.csv').write_text('id_code,diagnosis\nx,1\n')
    write_images(tmp_path / 'images', ['y.png', 'sub/z.png'])
    (tmp_path / 'images/notes.txt').write_text('no image')
    notes = table_contents(table(), tmp_path).notes
    assert notes[0] == f'2 images in {tmp_path / "images"} without a row (folders sub, .)'
    assert notes[1] == 'no image has grade 0, 2, 3, 4: these images can neither teach nor test it'


def test_grades_of_an_ungraded_table_are_named(tmp_path):
    write_images(tmp_path / 'images', [f'x{i}.png' for i in range(4)])
    (tmp_path / 't.csv').write_text('id_code,Level,dme,predicted_grade\nx0,0,0,1\nx1,1,2,1\nx2,4,1,2\nx3,0,1,0\n')
    ungraded = table(grade='')
    note, = table_contents(ungraded, tmp_path).notes
    assert note.startswith('its grades (column Level) are not used') and f'evaluate MODEL {tmp_path / "t.csv"}' in note
    assert table_contents(table(grade='', carry='Level'), tmp_path).notes == []
    (tmp_path / 't.csv').write_text('id_code,diagnosis\n' + ''.join(f'x{i},0\n' for i in range(4)))
    assert table_contents(ungraded, tmp_path).notes == []          # a sample submission


@pytest.mark.parametrize('names', [['0', '1', '2', '3', '4'], ['No_DR', 'Mild', 'Moderate', 'Severe', 'Proliferate_DR'],
                                   ['0 - No DR', '1_mild', '2-Moderate', 'grade3', 'PDR']])
def test_folders_named_by_grade_are_a_table(tmp_path, names):
    write_images(tmp_path / 'images', [f'{name}/{i}.png' for name in names for i in range(3)])
    write_images(tmp_path / 'images', ['masks/0.png'])
    contents = table_contents(table(csv='', grade='folder'), tmp_path)
    df = contents.frame
    assert len(df) == 15 and sorted(df.diagnosis) == sorted(3 * list(range(5)))
    assert all(df.diagnosis[df.id_code.str.startswith(name + '/')].eq(g).all() for g, name in enumerate(names))
    assert contents.notes == [f'1 image in {tmp_path / "images"} without a row (folders masks)']
    assert read_order(table(csv='', grade='folder'), tmp_path) == df.id_code.tolist()


def test_a_folder_alone_is_an_ungraded_table(tmp_path, capsys):
    write_images(tmp_path / 'images', ['x.png', 'a/y.png'])
    df = read_table(table(csv='', grade=''), tmp_path)
    assert df.id_code.tolist() == ['a/y', 'x'] and df.diagnosis.isna().all()
    (tmp_path / 'empty').mkdir()
    with pytest.raises(TableError, match='has no images. Set `images` to the folder of images'):
        read_table(table(csv='', grade='', images='empty'), tmp_path)
    write_images(tmp_path / 'graded', ['0/x.png', '1/y.png'])
    read_table(table(csv='', grade='', images='graded'), tmp_path)
    assert 'To use these grades: grade = folder' in capsys.readouterr().out


# What columns mean

@pytest.mark.parametrize('text, grade', [
    ('2', 2), ('2.0', 2), ('02', 2), ('2,0', 2), ('II', 2), ('Moderate', 2), ('moderate NPDR', 2), ('grade 2', 2),
    ('R2', 2), ('2 - moderate', 2), ('Grade2', 2), ('level II', 2), ('DR 2', 2),
    ('No DR', 0), ('no_dr', 0), ('0', 0), ('PDR', 4), ('IV', 4), ('4 Proliferative', 4),
    ('5', np.nan), ('-1', np.nan), ('1.5', np.nan), ('', np.nan), ('nan', np.nan), ('3 - moderate', np.nan),
    ('V', np.nan), ('No apparent retinopathy', 0), ('Mild non-proliferative diabetic retinopathy', 1), ('Mild DR', 1),
    ('Severe Nonproliferative Retinopathy', 3), ('Proliferative diabetic retinopathy', 4), ('0 (none)', 0),
    ('Mild (1)', 1), ('Grade 3: Severe NPDR', 3), ('NPDR, mild', 1), ('2. moderate', 2), ('NPDR', np.nan),
    ('DR', np.nan),
    ('no npdr', np.nan), ('mild PDR', np.nan), ('very severe NPDR', np.nan), ('1. No DR', np.nan), ('1-2', np.nan)])
def test_read_grade(text, grade): assert np.array_equal(read_grade(text), grade, equal_nan=True)


def write_rows(folder: Path, header: str, *rows: str) -> None:
    (folder / 't.csv').write_text('\n'.join([header, *rows]))
    write_images(folder / 'images', [f'{row.split(",")[0]}.png' for row in rows])


def test_a_column_of_patients(tmp_path):
    write_rows(tmp_path, 'id_code,diagnosis,who', 'a,0,7', 'b,1,7.0', 'c,2,P8', 'd,1,NA', 'e,1,p8')
    contents = table_contents(table(patient='who'), tmp_path)
    assert contents.frame.group.tolist() == ['t:7', 't:7', 't:p8', 't:d', 't:p8']
    assert 'patient = who: is empty in 1 of 5 rows (d)' in contents.notes[0]
    assert table(patient='who').grouped_by == 'patients'
    write_rows(tmp_path, 'id_code,diagnosis,who', 'a,0,', 'b,1,')
    for column, words in (('who', 'the column is empty in all 2 rows'), ('whom', 'no column whom, did you mean who')):
        with pytest.raises(TableError, match=words): read_table(table(patient=column), tmp_path)


@pytest.mark.parametrize('eye', ['side', '_([LR])$'])
def test_which_eye(tmp_path, eye):
    write_rows(tmp_path, 'id_code,diagnosis,side', '1_L,0,OS', '1_R,1,right')
    assert read_table(table(eye=eye), tmp_path).eye.tolist() == ['left', 'right']
    write_rows(tmp_path, 'id_code,diagnosis,side', '1_L,0,up', '1_R,1,right')
    with pytest.raises(TableError, match='eye = side: found up'): read_table(table(eye='side'), tmp_path)


def test_a_column_called_eye_can_be_carried(tmp_path):
    write_rows(tmp_path, 'id_code,diagnosis,eye', '1_L,0,OS', '1_R,1,right')
    assert read_table(table(carry='eye'), tmp_path).eye.tolist() == ['OS', 'right']
    assert read_table(table(carry='eye', eye='eye'), tmp_path).eye.tolist() == ['left', 'right']


def test_where_chooses_rows(tmp_path):
    write_rows(tmp_path, 'id_code,diagnosis,Usage', 'a,0,Public', 'b,1,Private', 'c,2,Public')
    assert read_table(table(where='Usage = Public'), tmp_path).id_code.tolist() == ['a', 'c']
    with pytest.raises(TableError, match='no row has Usage = public. Its values are Private, Public'):
        read_table(table(where='Usage=public'), tmp_path)


def test_one_of_several_grade_columns_is_filled(tmp_path):
    write_rows(tmp_path, 'id_code,left grade,right grade', 'a,0,', 'b,,3', 'c,2,')
    assert read_table(table(grade='left grade | right grade'), tmp_path).diagnosis.tolist() == [0, 3, 2]
    write_rows(tmp_path, 'id_code,left grade,right grade', 'a,0,', 'b,1,3')
    with pytest.raises(TableError, match='1 row with a grade in more than one of .*, right grade: b. Set'):
        read_table(table(grade='left grade | right grade'), tmp_path)


def test_values_that_mean_ungradable(tmp_path):
    write_rows(tmp_path, 'id_code,diagnosis', 'a,0', 'b,5.0', 'c,', 'd,2', 'e,U')
    contents = table_contents(table(ungradable='5 | blank | u'), tmp_path)
    assert not any('without a row' in note for note in contents.notes)
    assert contents.frame.id_code.tolist() == ['a', 'd']
    assert contents.notes[0].startswith('3 of 5 images left out: ungradable by their graders')
    with pytest.raises(TableError, match=r'2 invalid values in column diagnosis: b = 5.0, c = \(empty\)'):
        read_table(table(ungradable='u'), tmp_path)


def test_an_ungradable_id_of_several_images_is_named_with_the_other_faults(tmp_path):
    write_rows(tmp_path, 'id_code,diagnosis', 'a,0', 'b,5', 'c,1', 'c,2')
    shutil.copy(tmp_path / 'images/b.png', tmp_path / 'images/b.tif')
    with pytest.raises(TableError, match='1 of 4 ids cannot be matched with one image: b: .*duplicate value'):
        table_contents(table(ungradable='5'), tmp_path)


def test_further_columns_are_carried(tmp_path):
    write_rows(tmp_path, 'id_code,diagnosis,site,Patient sex', 'a,0,X,f', 'b,1,Y,m')
    df = read_table(table(carry='site | Patient sex'), tmp_path)
    assert df.site.tolist() == ['X', 'Y'] and df['Patient sex'].tolist() == ['f', 'm']


@pytest.mark.parametrize('grade, words', [(0, 'all 12 grades are 0. It looks like a sample submission'),
                                          (2, 'all 12 grades are 2. Set csv and grade')])
def test_one_grade_alone_is_refused(tmp_path, grade, words):
    write_rows(tmp_path, 'id_code,diagnosis', *(f'a{i},{grade}' for i in range(12)))
    with pytest.raises(TableError, match=words): read_table(table(), tmp_path)


def test_idrid_as_published(tmp_path):
    "Headers with blanks at their ends, empty columns, numbers that begin at 001 in both parts"
    folder = tmp_path / 'B. Disease Grading'
    for part, name in (('a. Training Set', 'a. IDRiD_Disease Grading_Training Labels.csv'),
                       ('b. Testing Set', 'b. IDRiD_Disease Grading_Testing Labels.csv')):
        write_images(folder / '1. Original Images' / part, [f'IDRiD_{i:03}.jpg' for i in (1, 2)])
        (folder / '2. Groundtruths').mkdir(exist_ok=True)
        (folder / '2. Groundtruths' / name).write_text(
            'Image name,Retinopathy grade,Risk of macular edema ,,,\nIDRiD_001,3,2,,,\nIDRiD_002,0,0,,,\n')
    keys = dict(id='Image name', grade='Retinopathy grade')
    for part, csv in (('a. Training Set', 'a. IDRiD_Disease Grading_Training Labels.csv'),
                      ('b. Testing Set', 'b. IDRiD_Disease Grading_Testing Labels.csv')):
        t = table(csv=f'2. Groundtruths/{csv}', images=f'1. Original Images/{part}', **keys)
        df = read_table(t, folder)
        assert df.diagnosis.tolist() == [3, 0] and all(part in p for p in df.path)


def test_read_spreadsheet_keeps_a_quoted_separator(tmp_path):
    (tmp_path / 't.csv').write_text('id_code,note\na,"x, y"\nb,"say ""hi"""\n')
    assert read_spreadsheet(tmp_path / 't.csv').note.tolist() == ['x, y', 'say "hi"']


def test_an_order_with_a_row_twice_is_refused(tmp_path):
    write_rows(tmp_path, 'id_code,diagnosis', 'a,0', 'b,1')
    (tmp_path / 'order.csv').write_text('id_code\na\nb\na\n')
    with pytest.raises(TableError, match='1 duplicate value in column id_code: a'):
        read_order(table(order='order.csv'), tmp_path)


def test_order_is_a_csv_of_any_making(tmp_path):
    write_rows(tmp_path, 'id_code,diagnosis', 'a,0', 'b,1')
    (tmp_path / 'order.csv').write_bytes('id_code;diagnosis\nb;0\na;0\n'.encode('utf-16'))
    assert read_order(table(order='order.csv'), tmp_path) == ['b', 'a']


# Spreadsheets by hand

def sheet(folder: Path, text: str | bytes, **keys) -> list[list[str]]:
    "Return the header and the rows that `read_spreadsheet` finds in a text"
    (folder / 's.csv').write_bytes(text.encode() if isinstance(text, str) else text)
    df = read_spreadsheet(folder / 's.csv', **keys)
    return [list(df), *df.to_numpy().tolist()]


@pytest.mark.parametrize('text, rows', [
    ('a, b\nx, "y, z"\n', [['a', 'b'], ['x', 'y, z']]),              # a quote after a blank
    ('a;b\n1;"two\n  lines, a"\n2;"and, two\nb"\n', [['a', 'b'], ['1', 'two lines, a'], ['2', 'and, two b']]),
    ('a,b\nx  y,2\n', [['a', 'b'], ['x  y', '2']]),
    ('a,a,b,a\n1,2,3,4\n', [['a', 'a (2)', 'b', 'a (3)'], ['1', '2', '3', '4']]),
    ('a,b,c\n1\n1,2\n', [['a', 'b', 'c'], ['1', '', ''], ['1', '2', '']]),
])
def test_cells_of_a_csv(tmp_path, text, rows): assert sheet(tmp_path, text) == rows


@pytest.mark.parametrize('encoding', ['utf-16-le', 'utf-16-be'])
def test_utf16_without_a_mark_whose_letters_end_in_a_zero_byte(tmp_path, encoding):
    assert sheet(tmp_path, 'id,b\n\u0100\u0200,2\n'.encode(encoding)) == [['id', 'b'], ['\u0100\u0200', '2']]


def test_empty_rows_between_filled_ones_are_kept_if_asked_for(tmp_path):
    text = 'a,b\n1,2\n,\n\n3,4\n,\n'
    assert sheet(tmp_path, text) == [['a', 'b'], ['1', '2'], ['3', '4']]
    assert sheet(tmp_path, text, keep_blank=True) == [['a', 'b'], ['1', '2'], ['', ''], ['3', '4']]
    assert sheet(tmp_path, 'a\n1\n \n2\n', keep_blank=True) == [['a'], ['1'], ['2']]
    assert sheet(tmp_path, text, header=False) == [['1', '2'], ['a', 'b'], ['1', '2'], ['3', '4']]


@pytest.mark.parametrize('text, separator', [
    ('a,b;c\n1,2;3\n', ','), ('a;b\n1,5;2\n', ';'), ('a\tb,c\n1\t2\n', '\t'), ('a b\nc d\n', ' '), ('a\nb\n', ','),
    ('a b\nc\n', ','), ('', ',')])
def test_the_separator_splits_most_rows(text, separator): assert separator_of(text) == separator


def test_a_workbook_is_read_as_it_is_shown(tmp_path):
    openpyxl = pytest.importorskip('openpyxl')
    book = openpyxl.Workbook()
    rows = ['id', 'grade', 'note'], [7, 2.5, None], [17, 3.0, '=1+1'], ['x', True, 'a\nb']
    for row in rows: book.active.append(row)
    for cell, number_format in dict(A2='000', B3='0', A4='000').items(): book.active[cell].number_format = number_format
    book.save(tmp_path / 'b.xlsx')
    with zipfile.ZipFile(tmp_path / 'b.xlsx') as old, zipfile.ZipFile(tmp_path / 's.xlsm', 'w') as new:
        for name in old.namelist():                          # the value of the formula, as Excel stores it
            new.writestr(name, old.read(name).replace(b'<v></v>', b'<v>2</v>').replace(b'<v />', b'<v>2</v>'))
    df = read_spreadsheet(tmp_path / 's.xlsm')
    assert df.to_numpy().tolist() == [['007', '2.5', ''], ['17', '3', '2'], ['x', 'True', 'a b']]
    (tmp_path / '~$s.xlsm').write_bytes(b'')
    with pytest.raises(TableError, match='is the lock file of an open spreadsheet'):
        read_spreadsheet(tmp_path / '~$s.xlsm')
    for name, content in (('t.csv', b'PK\x03\x04 damaged'), ('t.XLSX', b'damaged')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TableError, match=f'{name}: not a readable workbook'): read_spreadsheet(tmp_path / name)


def write_workbook(file, **sheets):
    "Write an .xlsx with sheets of rows; return its openpyxl workbook, to be changed and saved again"
    book = pytest.importorskip('openpyxl').Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows: sheet.append(row)
    book.save(file)
    return book


def test_one_sheet_of_a_workbook_is_read(tmp_path):
    rows = [['id', 'grade'], *([f'a{i}', i % 5] for i in range(3))]
    file = tmp_path / 't.xlsx'
    write_workbook(file, Info=[['Clinic']], A=rows, Empty=[], B=rows[:2])
    with pytest.raises(TableError) as e: read_spreadsheet(file, sheet='')
    assert '2 sheets have data: A (3 rows), B (1 row). Name one: --sheet "A" (key `sheet`' in str(e.value)
    with pytest.raises(TableError, match='One is needed: save the sheet as a CSV'): read_spreadsheet(file)
    assert read_spreadsheet(file, sheet='B').id.tolist() == ['a0']
    with pytest.raises(TableError, match='no sheet C. Its sheets are Info, A, Empty, B'):
        read_spreadsheet(file, sheet='C')
    write_workbook(file, Info=[['Clinic']], A=rows, Empty=[])
    assert len(read_spreadsheet(file)) == 3
    (tmp_path / 't.csv').write_text('id\na\n')
    with pytest.raises(TableError, match='sheet = A, but only a workbook has sheets'):
        read_spreadsheet(tmp_path / 't.csv', sheet='A')


def test_merged_cells_are_filled_down(tmp_path):
    "A patient over the rows of both eyes; a row that is otherwise empty stays empty; a merged title is no value"
    rows = ['patient', 'eye', 'id', 'n'], ['P1', 'L', 'a', 1], [None, 'R', 'b', 2], ['P2', 'L', 'c', 3], [None], ['P3']
    book = write_workbook(tmp_path / 't.xlsx', A=rows)
    for cells in ('A2:A3', 'A4:A5', 'C6:D6'): book['A'].merge_cells(cells)
    book.save(tmp_path / 't.xlsx')
    notes = []
    df = read_spreadsheet(tmp_path / 't.xlsx', notes=notes)
    assert df.patient.tolist() == ['P1', 'P1', 'P2', 'P3'] and df.id.tolist() == ['a', 'b', 'c', '']
    assert notes == ['1 merged cell over several rows: each of the rows has the value']
    again = []
    read_spreadsheet(tmp_path / 't.xlsx', notes=again)
    assert again == notes


@pytest.mark.parametrize('numbers', ['012', '123', '917'])
def test_a_nameless_index_is_not_used(tmp_path, numbers):
    "As `DataFrame.to_csv` writes it, also of chosen rows"
    notes = []
    rows = [f'{n},{name},{grade}' for n, name, grade in zip(numbers, 'abc', (0, 1, 2), strict=True)]
    (tmp_path / 't.csv').write_text('\n'.join([',id_code,diagnosis', *rows]))
    df = read_spreadsheet(tmp_path / 't.csv', notes=notes)
    assert list(df) == ['id_code', 'diagnosis'] and df.id_code.tolist() == list('abc')
    assert notes == ['the first column has no name and numbers the rows: it is not used']


@pytest.mark.parametrize('numbers', ['112', ['01', '2', '3'], 'ab1', ['1.5', '2', '3'], ['', '1', '2']])
def test_another_nameless_column_is_an_error(tmp_path, numbers):
    (tmp_path / 't.csv').write_text('\n'.join([',id_code', *(f'{n},a{i}' for i, n in enumerate(numbers))]))
    with pytest.raises(TableError, match='column 1 has cells but no name'): read_spreadsheet(tmp_path / 't.csv')


def test_a_title_above_the_header(tmp_path):
    rows = [['Patients 2024'], [None], ['as of May'], ['id', 'grade', 'eye'], ['a', 1, 'L'], ['b', 2, 'R']]
    write_workbook(tmp_path / 't.xlsx', A=rows)
    (tmp_path / 't.csv').write_text('\n'.join(';'.join(str(o or '') for o in row) for row in rows))
    for name in ('t.xlsx', 't.csv'):
        with pytest.raises(TableError) as e: read_spreadsheet(tmp_path / name)
        assert str(e.value) == (f'{tmp_path / name}: the header seems to be row 4, below "Patients 2024". Delete the '
                                'rows above it.')


def test_hidden_rows_are_counted(tmp_path):
    book = write_workbook(tmp_path / 't.xlsx', A=[['id', 'grade'], ['a', 1], ['b', 2], ['c', 3]])
    for n in (2, 4, 9): book['A'].row_dimensions[n].hidden = True        # the ninth is empty
    book.save(tmp_path / 't.xlsx')
    notes = []
    assert read_spreadsheet(tmp_path / 't.xlsx', notes=notes).id.tolist() == ['a', 'b', 'c']
    assert notes == ['2 rows hidden in the workbook (by a filter?) are used: delete what is not meant']


def test_merged_patients_of_a_table(tmp_path, capsys):
    write_images(tmp_path, [f'images/{o}.png' for o in 'abcd'])
    rows = [['id_code', 'diagnosis', 'who'], ['a', 0, 'P1'], ['b', 1, None], ['c', 2, 'P2'], ['d', 3, None]]
    book = write_workbook(tmp_path / 't.xlsx', A=rows)
    for cells in ('C2:C3', 'C4:C5'): book['A'].merge_cells(cells)
    book.save(tmp_path / 't.xlsx')
    contents = table_contents(table(csv='t.xlsx', patient='who'), tmp_path)
    assert contents.frame.group.tolist() == ['t:p1', 't:p1', 't:p2', 't:p2']
    assert contents.notes[0] == '2 merged cells over several rows: each of the rows has the value'
    assert not capsys.readouterr().out
    read_spreadsheet(tmp_path / 't.xlsx')
    assert 't.xlsx: 2 merged cells over several rows' in ' '.join(capsys.readouterr().out.split())


@pytest.mark.parametrize('text, safe', [('=1', "'=1"), ('+1', "'+1"), ('-1', "'-1"), ('@a', "'@a"), ('\ta', "'\ta"),
                                        ('\ra', "'\ra"), ('a=1', 'a=1'), ("'a", "'a"), ('', ''), (2, 2)])
def test_a_cell_that_a_spreadsheet_would_run_gets_an_apostrophe(text, safe):
    assert safe_cell(text) == safe
    if isinstance(text, str): assert unsafe_cell(safe) == text


def test_the_header_says_whether_this_program_wrote_a_csv(tmp_path):
    (tmp_path / 'a.csv').write_bytes('id,grade,\xfc\r\n1,2,3\r\n'.encode('latin-1'))
    assert has_columns(tmp_path / 'a.csv', ['grade', 'id']) and not has_columns(tmp_path / 'a.csv', ['id', '1'])
    (tmp_path / 'b.csv').write_text('id,grade\n')
    assert has_columns(tmp_path / 'b.csv', ['id', 'grade'])


def test_counts_and_the_first_five():
    assert [count(range(n), 'id') for n in (0, 1, 2)] == ['0 ids', '1 id', '2 ids']
    assert (first_few(range(5)), first_few(range(6))) == ('0, 1, 2, 3, 4', '0, 1, 2, 3, 4, …')


# Grades, groups and images by hand

@pytest.mark.parametrize('grades, refused', [('R0 R1 R3A', 'R0, R1, R3A'), ('r0 R2 r_3', 'R0, R2, R3'),
                                             ('R0 R1 R4', ''), ('R0 R1 2', ''), ('R0 R1', 'R0, R1'),
                                             ('R0M0 R3A_/_M1 R2M1P0', 'R0M0, R2M1P0, R3AM1')])
def test_the_english_scale_is_refused(tmp_path, grades, refused):
    cells = grades.split()
    write_rows(tmp_path, 'id_code,diagnosis', *(f'a{i},{cell.replace("_", " ")}' for i, cell in enumerate(cells)))
    if not refused:
        assert len(read_table(table(), tmp_path)) == 3
        return
    with pytest.raises(TableError, match=f'the grades {refused} look like those of the English screening programme'):
        read_table(table(), tmp_path)


@pytest.mark.parametrize('n', [9, 10])
def test_a_single_grade_in_ten_rows_is_refused(tmp_path, n):
    write_rows(tmp_path, 'id_code,diagnosis', *(f'a{i},1' for i in range(n)))
    if n < 10: assert len(read_table(table(), tmp_path)) == n
    else:
        with pytest.raises(TableError, match='all 10 grades are 1'): read_table(table(), tmp_path)


def groups_of(folder: Path, ids: str, **keys) -> tuple[list[str], list[str]]:
    series = pd.Series(ids.split(), name='id_code')
    groups, notes = find_groups(folder / 't.csv', pd.DataFrame(dict(id_code=series)), series, table(**keys))
    return groups.tolist(), notes


def test_groups_by_hand(tmp_path):
    assert groups_of(tmp_path, 'b a') == (['t:b', 't:a'], [])
    assert groups_of(tmp_path, 'a10 a2 a1 b', block=2) == (['t:block 1', 't:block 0', 't:block 0', 't:block 1'], [])
    assert groups_of(tmp_path, '1_l 1_R na_l', group='^(.+)_[lR]') == (['t:1', 't:1', 't:na'], [])
    groups, (note,) = groups_of(tmp_path, '1_l 001_r 10_l', group='^(.+)_')
    assert groups == ['t:1', 't:1', 't:10'] and '1 patient is written in several ways (1 = 001); each is one' in note


@pytest.mark.parametrize('texts, key', [
    (['7', '007', '7.0', '07,0', ' 7'], '7'), (['P1', 'p1', 'P01', 'p 1', 'P 001'], 'p1'), (['P-01', 'p-1'], 'p-1'),
    (['0', '000'], '0'), (['1 11'], '1 11'), (['11 1'], '11 1'), (['70'], '70'), (['7.5'], '7.5'), (['a0f'], 'a0f'),
    (['2019-03-07'], '2019-3-7'), (['P10'], 'p10'), (['100'], '100')])
def test_patients_written_in_several_ways(texts, key):
    assert {patient_key(text) for text in texts} == {key}
    assert bool(patient_variants(texts)) == (len(texts) > 1)


def test_a_patient_written_in_several_ways_is_one_group(tmp_path):
    write_rows(tmp_path, 'id_code,diagnosis,who', 'a,0,1', 'b,1,0001', 'c,2,P8', 'd,1,p 8', 'e,1,0002', 'f,2,10')
    contents = table_contents(table(patient='who'), tmp_path)
    assert contents.frame.group.tolist() == ['t:1', 't:1', 't:p8', 't:p8', 't:0002', 't:10']
    assert '2 patients are written in several ways (1 = 0001, P8 = p 8)' in contents.notes[0]


def test_patients_of_two_tables_with_one_number_are_named(tmp_path):
    "They stay different people: the running numbers of two data sets would join people who have nothing in common"
    for name, patients in dict(a='17 P1 3', b='0017 p1 4', c='5 6 ?').items():
        images = [f'{name}{i}' for i in range(3)]
        write_images(tmp_path / name, [f'{image}.png' for image in images])
        rows = [f'{image},{i},{who}' for i, (image, who) in enumerate(zip(images, patients.split(), strict=True))]
        (tmp_path / f'{name}.csv').write_text('\n'.join(['id_code,diagnosis,who', *rows]) + '\n')
    tables = [Table(o, csv=f'{o}.csv', images=o, grade='diagnosis', patient='who') for o in 'abc']
    frames = {o.name: read_table(o, tmp_path) for o in tables}
    (name, note), = shared_patients(tables, frames)
    assert name == 'b' and '2 patients with the name or number of one of [table.a] (17 = 0017, p1): they count' in note
    assert not set(frames['a'].group) & set(frames['b'].group)


def test_pairs_by_hand(tmp_path):
    "No header; rows that share an image are one patient; names with folders, suffixes and another case"
    (tmp_path / 'pairs.csv').write_text('A.jpg,b\nsub\\c,sub/d.png\ne,\nb,f\n')
    groups, (note,) = groups_of(tmp_path, 'a b c.png d x/e f g', pairs='pairs.csv')
    assert groups == ['t:row 4', 't:row 4', 't:row 2', 't:row 2', 't:row 3', 't:row 4', 't:g']
    assert note == ('[table.t] pairs = pairs.csv: does not list 1 of 7 ids (g); it is a patient of its own. '
                    'Correct that if it is wrong.')
    with pytest.raises(TableError, match='the file lists none of the 2 ids, for example y. Name another file'):
        groups_of(tmp_path, 'y z', pairs='pairs.csv')


def test_a_row_of_both_eyes_is_a_patient_unless_a_column_names_one(tmp_path):
    (tmp_path / 't.csv').write_text('l,r,gl,gr,who\na,b,0,1,P\nc,,2,,\nd,e,3,4,\n')
    write_images(tmp_path / 'images', [f'{name}.png' for name in 'abcde'])
    keys = dict(id='l | r', grade='gl | gr')
    df = read_table(table(**keys), tmp_path)
    assert dict(zip(df.id_code, df.group, strict=True)) == dict(
        a='t:row 2', b='t:row 2', c='t:row 3', d='t:row 4', e='t:row 4')
    assert df.id_code.tolist() == list('acdbe') and df.diagnosis.tolist() == [0, 2, 3, 1, 4]
    contents = table_contents(table(**keys, patient='who'), tmp_path)
    assert contents.frame.group.tolist() == ['t:p', 't:row 3', 't:row 4', 't:p', 't:row 4']
    assert 'who: is empty in 3 of 5 rows (c, d, e); each is a patient of its own' in contents.notes[0]
    assert read_table(table(id='l | r', grade=''), tmp_path).id_code.tolist() == list('acdbe')


@pytest.mark.parametrize('groups, keys, text', [
    ('ppp', dict(patient='who'), '1 patient'), ('ppq', dict(patient='who'), '2 patients'),
    ('ppq', dict(block=2), 'patients unknown, 2 blocks of 2 ids'), ('pqr', {}, 'patients unknown')])
def test_how_many_patients(groups, keys, text):
    assert patients_text(pd.DataFrame(dict(group=list(groups))), table(**keys)) == text


def test_a_table_in_words(tmp_path):
    write_rows(tmp_path, 'id_code,diagnosis,side', 'a,0,L', 'b,2,', 'c,2,R', 'd,5,R', 'e,4,L')
    contents = table_contents(table(eye='side', ungradable='5'), tmp_path)
    assert describe(table(eye='side', ungradable='5'), contents) == (
        '4 images, patients unknown, eyes left 2 unknown 1 right 1, images of grade 0-4: 1 0 2 0 1, 1 ungradable')
    assert contents.ungradable.to_dict('records') == [dict(id_code='d', path=str(tmp_path / 'images/d.png'))]
    plain = table_contents(table(grade=''), tmp_path)
    assert describe(table(grade=''), plain) == '5 images, patients unknown'
    assert list(plain.ungradable) == ['id_code', 'path']


@pytest.mark.parametrize('name, eye', [
    ('12_R', 'right'), ('12_OD_1.png', 'right'), ('left/12.jpg', 'left'), ('12-links', 'left'), ('L12', 'left'),
    ('12_left_od', ''), ('rolf_12', ''), ('la_12', ''), ('12.png', '')])
def test_the_eye_that_a_name_says(name, eye): assert eye_of_name(name) == eye


def test_eyes_that_contradict_the_ids(tmp_path):
    ids = [f'{i // 2}_{"LR"[i % 2]}' for i in range(8)]
    write_images(tmp_path, [f'images/{o}.png' for o in ids])
    def write(eyes):
        rows = [f'{o},{i % 5},{i // 2},{eye}' for i, (o, eye) in enumerate(zip(ids, eyes, strict=True))]
        (tmp_path / 't.csv').write_text('\n'.join(['id_code,diagnosis,who,side', *rows]))
        return [o for o in table_contents(table(eye='side', patient='who'), tmp_path).notes if 'contradicts' in o]
    assert write('LRLRLRLR') == write(['L', 'R', '', 'R', *'LRLR']) == []
    assert write('LRRLLRLL') == [
        'the eye contradicts the name of 3 images of 8 (1_L is right, 1_R is left, 3_R is left); 1 patient with one '
        'eye twice where the names say both. Correct the eyes or the names']
    assert eye_note(['R1', 'R2'], ['left', 'right']) == ''               # R may be anything here


def test_images_beside_the_folder_are_found_and_others_are_not(tmp_path):
    (tmp_path / 't.csv').write_text('id_code,diagnosis\n../beside/x,1\ny,0\n')
    write_images(tmp_path, ['images/y.png', 'images/z.png', 'beside/x', '../outside.png'])
    contents = table_contents(table(), tmp_path)
    assert contents.frame.path.tolist() == [f'{tmp_path}/images/../beside/x', f'{tmp_path}/images/y.png']
    assert contents.notes[0] == f'1 image in {tmp_path / "images"} without a row'
    assert table_contents(table(grade=''), tmp_path).notes == contents.notes[:1]
    (tmp_path / 't.csv').write_text('id_code,diagnosis\n../../outside.png,1\ny,0\n')
    with pytest.raises(TableError, match=r'outside.png: lies outside .*; copy the file into this folder'):
        read_table(table(), tmp_path)


def test_a_folder_of_images_by_hand(tmp_path, capsys):
    write_images(tmp_path / 'flat', ['x.png', 'x.jpg', 'y.png'])
    assert read_table(table(csv='', grade='', images='flat'), tmp_path).id_code.tolist() == ['x.jpg', 'x.png', 'y.png']
    write_images(tmp_path / 'mixed', ['0/x.png', 'other/1/y.png'])
    read_table(table(csv='', grade='', images='mixed'), tmp_path)
    assert 'grade = folder' not in capsys.readouterr().out
    write_images(tmp_path / 'deep', ['0/a/x.png', 'No DR/y.png'])
    read_table(table(csv='', grade='', images='deep'), tmp_path)
    assert 'To use these grades: grade = folder' in capsys.readouterr().out


def test_folders_that_are_searched_are_named(tmp_path):
    for keys, words in ((dict(folder='a | b'), 'that contains a or b, or'), ({}, 'that contains t.csv, or'),
                        (dict(csv='', folder='. | b'), 'that contains b, or')):
        with pytest.raises(TableError, match=f'Set --data to the folder {words}'): read_table(table(**keys), tmp_path)
    write_rows(tmp_path, 'id_code,diagnosis', 'a,0', 'b,1')
    assert len(read_table(table(folder='gone | .'), tmp_path)) == 2


def test_the_only_folder_that_has_a_table_is_found(tmp_path):
    "In the folder, or up to two levels below; several and none are named"
    zipped, own = tmp_path / 'kaggle/aptos2019', table(csv='t.csv', images='images')
    write_images(zipped / 'images', ['a.png'])
    for part in ('b', 'kaggle'):                                         # no images beside it: another table
        (tmp_path / part).mkdir(exist_ok=True)
        (tmp_path / part / 't.csv').write_text('id_code,diagnosis\na,1\n')
    shutil.copy(tmp_path / 'b/t.csv', zipped)
    assert only_folder(own, tmp_path) == zipped and only_folder(own, zipped) == zipped
    with pytest.raises(TableError, match=rf't.csv not found in {tmp_path}. Use --data {zipped}\.$'):
        read_table(own, tmp_path)
    write_images(tmp_path / 'b/images', ['a.png'])
    with pytest.raises(TableError, match=f'are in 2 folders: {tmp_path / "b"}, {zipped}. Choose one: --data'):
        only_folder(own, tmp_path)
    with pytest.raises(TableError, match='Tables there: b/t.csv, kaggle/t.csv, kaggle/aptos2019/t.csv. For one of'):
        only_folder(table(csv='labels.csv'), tmp_path)


@pytest.mark.parametrize('there, found', [
    (['test.csv'], True), (['pictures'], True), (['TEST.CSV'], True), (['train_images'], False), ([], False),
    (['sub/test.csv'], False)])
def test_an_optional_table_is_there_if_its_csv_or_its_images_are(tmp_path, there, found):
    file = tmp_path / 'r.ini'
    file.write_text('[table.train]\ncsv = train.csv\ngrade = g\n[table.test]\ncsv = test.csv\nimages = pictures\n'
                    'optional = yes\n[stage.s]\ntrain = train\n[submit]\nfinal = s\ntable = test\n')
    for name in there:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).mkdir()
    recipe, note = with_present_tables(read_recipe(file), tmp_path)
    assert ('test' in recipe.tables) == found
    left_out = 'the recipe runs without this table. The model is s.'
    assert note == ('' if found else f'test: test.csv and pictures not found in {tmp_path}; {left_out}')
    if not there:
        folder = read_recipe(file, sets=['table.test.csv='])
        assert with_present_tables(folder, tmp_path)[1].startswith(f'test: pictures not found in {tmp_path}')
    nested = read_recipe(file, sets=['table.test.csv=sub/test.csv', 'table.test.images=.'])
    assert ('test' in with_present_tables(nested, tmp_path)[0].tables) == ('sub/test.csv' in there)
