"Which file belongs to which name: never another image's."
import os
import shutil
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import dicom, expect_error

from aptos_fastai.cli import main
from aptos_fastai.common.io import AptosError, file_lock
from aptos_fastai.inference.find_images import find_images

PNG = cv2.imencode('.png', np.zeros((8, 8, 3), np.uint8))[1].tobytes()


def write(root: Path, *names: str, data: bytes = PNG):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def listed(root: Path, *values: str, column: str = 'id_code', **kw) -> list[str]:
    "The files, or errors, of a CSV with these values in `root`"
    table = root / 'list.csv'
    pd.DataFrame({column: values}).to_csv(table, index=False)
    return [str(e.path.relative_to(root)) if e.path else e.error for e in find_images([str(table)], **kw)]


def test_files_folders_and_globs_give_each_file_once(tmp_path):
    write(tmp_path, 'a.png', 'y/b.JPG')
    a, b = tmp_path / 'a.png', tmp_path / 'y/b.JPG'
    assert [e.path for e in find_images([str(tmp_path)])] == [a, b]
    assert [e.path for e in find_images([str(a), str(b), str(a)])] == [a, b]
    assert [e.path for e in find_images([str(tmp_path / '*.png')])] == [a]
    with pytest.raises(AptosError, match='no such file or folder'): find_images([str(tmp_path / 'nowhere.png')])
    with pytest.raises(AptosError, match='no images found'): find_images([str(tmp_path / '*.webp')])


@pytest.mark.parametrize('column', ['Datei', 'Fichier', 'Bild', 'filename', 'Aufnahme'])
def test_the_column_that_names_images_is_found(tmp_path, capsys, column):
    "As `fit` finds it: by its values; a row without an image stays an entry with an error"
    write(tmp_path, 'a.png', 'b.png', 'c.png')
    rows = dict(Nr=[1, 2, 3, 4], Ort=['x'] * 4)
    pd.DataFrame(rows | {column: ['a.png', 'b', 'c.png', 'lost.png']}).to_csv(tmp_path / 'list.csv', index=False)
    entries = find_images([str(tmp_path / 'list.csv')])
    assert [entry.path and entry.path.name for entry in entries] == ['a.png', 'b.png', 'c.png', None]
    assert [entry.id for entry in entries] == ['a.png', 'b', 'c.png', 'lost.png']
    assert f'column {column} names the images (75 % of its values)' in ' '.join(capsys.readouterr().out.split())


def test_two_columns_that_name_images_are_an_error(tmp_path):
    write(tmp_path, 'a.png', 'b.png')
    pd.DataFrame(dict(first=['a', 'b'], second=['b', 'a'])).to_csv(tmp_path / 'list.csv', index=False)
    with pytest.raises(AptosError, match='the images can be in 2 columns: first, second. Rename the right one to file'):
        find_images([str(tmp_path / 'list.csv')])


def test_a_bare_name_in_two_folders_is_an_error_that_names_both(tmp_path):
    write(tmp_path, 'a/left.png', 'b/left.png', 'a/right.png')
    left, right = listed(tmp_path, 'left', 'right')
    assert left.startswith('2 images have this name: a/left.png, b/left.png')
    assert right == 'a/right.png'


def test_a_name_with_a_folder_matches_that_folder_only(tmp_path):
    write(tmp_path, 'a/left.png', 'b/left.png', 'd/left.v2.png')
    found = listed(tmp_path, 'c/left.png', 'b/left.png', 'a\\left.png', 'b/left', 'd/left.v2', 'a/left.jpg')
    missing = f'no such image in {tmp_path}'
    assert found == [missing, 'b/left.png', 'a/left.png', 'b/left.png', 'd/left.v2.png',
                     f'{missing}; like it is a/left.png']


def test_a_name_with_a_suffix_does_not_match_another_suffix(tmp_path):
    write(tmp_path, 'left.png', 'x/right.jpg')
    assert listed(tmp_path, 'left.jpg', 'right.jpg', 'right') == [
        f'no such image in {tmp_path}; like it is left.png',
        f'no such image in {tmp_path}; x/right.jpg has this name: give it with its folder', 'x/right.jpg']


def test_a_suffix_may_differ_in_case(tmp_path):
    write(tmp_path, 'IMG_1.JPG', 'a/Eye.png', 'both.png', 'both.PNG')
    assert listed(tmp_path, 'IMG_1.jpg', 'a/Eye.PNG', 'both.png', 'both.PNG') == [
        'IMG_1.JPG', 'a/Eye.png', 'both.png', 'both.PNG']
    assert listed(tmp_path, 'both.Png')[0].startswith('2 images have this name: both.PNG, both.png')
    assert listed(tmp_path, 'img_1.jpg') == [f'no such image in {tmp_path}; like it is IMG_1.JPG']
    (tmp_path / 't.csv').write_text('photo,eye\nIMG_1.jpg,L\na/Eye.PNG,R\n')
    assert [str(o.path) for o in find_images([str(tmp_path / 't.csv')])] == [
        str(tmp_path / name) for name in ('IMG_1.JPG', 'a/Eye.png')]


def test_accents_may_be_coded_in_two_ways(tmp_path):
    names = [unicodedata.normalize(form, 'Müller') for form in ('NFC', 'NFD')]
    write(tmp_path, f'{names[1]}.png')
    assert listed(tmp_path, names[0], f'{names[0]}.png', names[1]) == [f'{names[1]}.png'] * 3


def test_every_row_gives_a_row_in_order(tmp_path):
    write(tmp_path, 'a.png', 'b.png')
    assert listed(tmp_path, 'b', 'a', 'nothing', 'b') == ['b.png', 'a.png', f'no such image in {tmp_path}', 'b.png']


def test_absolute_paths_and_root(tmp_path):
    write(tmp_path, 'store/a.png', 'lists/x.txt', 'b.png')
    absolute = str(tmp_path / 'b.png')
    table = tmp_path / 'lists/list.csv'
    pd.DataFrame(dict(file=[absolute, 'a.png'])).to_csv(table, index=False)
    found = find_images([str(table)], root=tmp_path / 'store')
    assert [e.path for e in found] == [Path(absolute), tmp_path / 'store/a.png']
    assert find_images([str(table)])[1].error == f'no such image in {tmp_path / "lists"}'
    with pytest.raises(AptosError, match='--root .*no such folder'): find_images([str(table)], root=tmp_path / 'no')


def test_names_and_links_do_not_lead_out_of_the_folder(tmp_path):
    write(tmp_path, 'secret.png', 'in/a.png')
    os.symlink(tmp_path / 'secret.png', tmp_path / 'in/link.png')
    found = listed(tmp_path / 'in', '../secret.png', 'link', 'link.png', 'a')
    assert 'lies outside' in found[0] and 'outside' in found[1] and 'outside' in found[2] and found[3] == 'a.png'
    with pytest.raises(AptosError, match='links to a file outside'): find_images([str(tmp_path / 'in')])


def test_a_folder_is_searched_by_content(tmp_path, capsys):
    write(tmp_path, 'IM000001', data=dicom(np.zeros((8, 8, 3), np.uint8), 'RGB', 8))
    write(tmp_path, 'a.jpeg', 'noext')
    write(tmp_path, 'notes.txt', 'b.png', 'list.csv', data=b'text')
    write(tmp_path, '__MACOSX/a.png', '._a.png', '.DS_Store', 'Thumbs.db')
    assert [e.path.name for e in find_images([str(tmp_path)])] == ['IM000001', 'a.jpeg', 'b.png', 'noext']
    assert 'ignored 2 files of other kinds (1 .csv, 1 .txt)' in capsys.readouterr().out.replace('\n', ' ')


@pytest.mark.parametrize('text, words', [
    ('who\na\n', 'no column file, path, image or id_code'),
    ('id_code,id_code\na,b\n', 'two columns are called id_code'),
])
def test_a_csv_without_images_is_an_error(tmp_path, text, words):
    (tmp_path / 't.csv').write_text(text)
    with pytest.raises(AptosError, match=words): find_images([str(tmp_path / 't.csv')])


def test_the_sheet_of_a_workbook(tmp_path):
    openpyxl = pytest.importorskip('openpyxl')
    book = openpyxl.Workbook()
    for name, cells in (('Patients', ['who', 'x']), ('Images', ['file', 'a.png', 'b.png'])):
        sheet = book.create_sheet(name)
        for cell in cells: sheet.append([cell])
    book.save(tmp_path / 'list.xlsx')
    with pytest.raises(AptosError, match='2 sheets have data: Patients .1 row., Images .* Name one: --sheet'):
        find_images([str(tmp_path / 'list.xlsx')])
    assert [o.name for o in find_images([str(tmp_path / 'list.xlsx')], sheet='Images')] == ['a.png', 'b.png']
    (tmp_path / 'list.csv').write_text('file\na.png\n')
    with pytest.raises(AptosError, match='sheet = Images, but only a workbook has sheets'):
        find_images([str(tmp_path / 'list.csv')], sheet='Images')


def test_two_csvs_with_other_id_columns_are_refused(tmp_path):
    write(tmp_path, 'a.png')
    for column in ('image', 'id_code'): pd.DataFrame({column: ['a']}).to_csv(tmp_path / f'{column}.csv', index=False)
    with pytest.raises(AptosError, match='Give one CSV at a time'):
        find_images([str(tmp_path / 'image.csv'), str(tmp_path / 'id_code.csv')])


def test_predict_keeps_rows_ids_and_existing_files(toy, image_paths, tmp_path, capsys):
    for i, name in enumerate(['a/left.png', 'b/left.png', '=cmd.png']):
        write(tmp_path, name, data=Path(image_paths[i]).read_bytes())
    table, out = tmp_path / 'list.csv', tmp_path / 'grades.csv'
    names = ['b/left.png', 'left', 'c/left.png', '=cmd']
    pd.DataFrame(dict(patient=list('wxyz'), image=names)).to_csv(table, index=False)
    expect_error(capsys, ['predict', toy, table, '-o', out], '2 of 4 images could not be', '2 images have this name')
    df = pd.read_csv(out, dtype=str, keep_default_na=False)
    assert df.image.tolist() == ['b/left.png', 'left', 'c/left.png', "'=cmd"] and list(df)[:2] == ['image', 'file']
    assert (df.score != '').tolist() == [True, False, False, True] and (df.grade[1:3] == '').all()
    main(['predict', str(toy), str(tmp_path / 'b/left.png'), '-o', str(tmp_path / 'one.csv')])
    assert pd.read_csv(tmp_path / 'one.csv').score[0] == pytest.approx(float(df.score[0]), abs=2e-4)
    before = out.read_bytes()
    expect_error(capsys, ['predict', toy, tmp_path / 'a', '-o', out], 'already exists', '--overwrite')
    assert out.read_bytes() == before
    main(['predict', str(toy), str(tmp_path / 'a'), '-o', str(out), '--overwrite'])
    assert len(pd.read_csv(out)) == 1


def test_explain_says_which_file_is_which(toy, image_paths, tmp_path, capsys):
    for name, path in zip(['a/left.png', 'b/left.png'], image_paths, strict=False):
        write(tmp_path, name, data=Path(path).read_bytes())
    write(tmp_path, 'b/bad.png', data=PNG[:-20])
    expect_error(capsys, ['explain', toy, tmp_path / 'a', tmp_path / 'b', '-o', tmp_path / 'out'], '1 of 3 images')
    df = pd.read_csv(tmp_path / 'out/index.csv', keep_default_na=False).set_index('file')
    assert df.output[str(tmp_path / 'a/left.png')] == 'left.png'
    assert df.output[str(tmp_path / 'b/left.png')] == 'left-2.png'
    assert df.error[str(tmp_path / 'b/bad.png')] and not df.output[str(tmp_path / 'b/bad.png')]


@pytest.mark.parametrize('text, found', [
    ('image,diagnosis\nleft,1,\nright,2,\n', ['left.png', 'right.png']),
    ('image;diagnosis\nleft;1\nright;2\n', ['left.png', 'right.png']),
    ('image\nleft\n\nright\n\n', ['left.png', 'right.png']),
    ('\nimage,x\nleft,\n,\nright,\n,\n', ['left.png', 'the row names no image', 'right.png']),
    ('image\n' + 'x' * 300 + '\nleft\n', ['no such image in', 'left.png']),
])
def test_rows_of_csvs_as_people_have_them(tmp_path, text, found):
    write(tmp_path, 'left.png', 'right.png', '1.png', '2.png')
    (tmp_path / 'list.csv').write_text(text)
    entries = find_images([str(tmp_path / 'list.csv')])
    assert [e.path.name if e.path else e.error[:len(o)] for e, o in zip(entries, found, strict=True)] == found


def test_a_csv_keeps_its_own_id_beside_the_file(toy, image_paths, tmp_path):
    write(tmp_path, 'a/x.png', data=Path(image_paths[0]).read_bytes())
    for columns in (dict(path='a/x.png', id_code='17'), dict(file='a/x.png')):
        pd.DataFrame(columns, index=[0]).to_csv(tmp_path / 'list.csv', index=False)
        main(['predict', str(toy), str(tmp_path / 'list.csv'), '-o', str(tmp_path / 'out.csv'), '--overwrite'])
        row = pd.read_csv(tmp_path / 'out.csv', dtype=str).iloc[0]
        if 'id_code' in columns: assert row.id_code == '17' and row.file == str(tmp_path / 'a/x.png')
        else: assert row.file == 'a/x.png'


def test_an_image_that_was_replaced_is_graded_again(toy, image_paths, tmp_path, monkeypatch):
    "A prediction resumes only with the very images that it began with"
    files = [tmp_path / 'left.png', tmp_path / 'right.png']
    for file, path in zip(files, image_paths, strict=False): shutil.copy(path, file)
    args, out = ['predict', str(toy), *map(str, files)], tmp_path / 'out.csv'
    main([*args, '-o', str(tmp_path / 'first.csv')])
    with monkeypatch.context() as patch:
        patch.setattr('aptos_fastai.inference.grade_files._report', lambda *a: None)
        stop = (_ for _ in ()).throw
        patch.setattr('aptos_fastai.inference.grade_files.audit_file', lambda file: stop(KeyboardInterrupt))
        with pytest.raises(SystemExit): main([*args, '-o', str(out)])
    assert list(tmp_path.glob('.out.csv.*.part')) and not out.exists()
    shutil.copy(image_paths[1], files[0])
    main([*args, '-o', str(out)])
    first, new = (pd.read_csv(f).score for f in (tmp_path / 'first.csv', out))
    assert new[0] == new[1] == first[1] != first[0]
    assert not list(tmp_path.glob('.out.csv.*'))               # neither parts nor locks stay


def test_two_predictions_do_not_write_one_file(toy, image_paths, tmp_path, capsys, monkeypatch):
    out = tmp_path / 'out.csv'
    with file_lock(out, ''):
        expect_error(capsys, ['predict', toy, image_paths[0], '-o', out], 'another process is writing', '-o')
    monkeypatch.setattr('aptos_fastai.inference.grade_files._grade_into',
                        lambda part, *a: (part.write_text('mine'), out.write_text('of another')))
    expect_error(capsys, ['predict', toy, image_paths[0], '-o', out], 'already exists')
    assert out.read_text() == 'of another'


def test_explain_gives_each_file_an_output_of_its_own(toy, image_paths, tmp_path):
    names = ['a.png', 'a.jpg', 'a-2.png', 'A-3.png', 'a.jpeg', '=1+1.png']
    for name in names: write(tmp_path, f'in/{name}', data=Path(image_paths[0]).read_bytes())
    main(['explain', str(toy), str(tmp_path / 'in'), '-o', str(tmp_path / 'out')])
    df = pd.read_csv(tmp_path / 'out/index.csv')
    assert df.output.str.casefold().nunique() == len(names) and "'=1+1.png" in df.output.tolist()
    assert {f.name for f in (tmp_path / 'out').glob('*.png')} == set(df.output.str.removeprefix("'"))


def test_explain_adds_to_the_index_of_its_folder(toy, image_paths, tmp_path, capsys):
    for i, name in enumerate(['a/left.png', 'b/left.png']):
        write(tmp_path, name, data=Path(image_paths[i]).read_bytes())
        main(['explain', str(toy), str(tmp_path / name), '-o', str(tmp_path / 'out')])
    first = (tmp_path / 'out/left.png').read_bytes()
    main(['explain', str(toy), str(tmp_path / 'b/left.png'), '-o', str(tmp_path / 'out')])
    df = pd.read_csv(tmp_path / 'out/index.csv').set_index('file').output
    assert df.to_dict() == {str(tmp_path / 'a/left.png'): 'left.png', str(tmp_path / 'b/left.png'): 'left-2.png'}
    assert (tmp_path / 'out/left.png').read_bytes() == first
    write(tmp_path, 'other/index.csv', data=b'a,b\n1,2\n')
    expect_error(capsys, ['explain', toy, tmp_path / 'a/left.png', '-o', tmp_path / 'other'], 'not a file that explain')


def test_inputs_and_other_files_are_not_replaced(toy, image_paths, tmp_path, capsys):
    (tmp_path / 'list.csv').write_text('file\n' + image_paths[0])
    write(tmp_path, 'notes.csv', 'eye.png', data=Path(image_paths[0]).read_bytes())
    for out in ('list.csv', 'notes.csv', 'eye.png'):
        before = (tmp_path / out).read_bytes()
        expect_error(capsys, ['predict', toy, tmp_path / 'list.csv', '-o', tmp_path / out, '--overwrite'], 'not')
        assert (tmp_path / out).read_bytes() == before
    grades = tmp_path / 'grades.csv'
    main(['predict', str(toy), image_paths[0], '-o', str(grades)])
    (tmp_path / 'here').symlink_to(grades)
    expect_error(capsys, ['predict', toy, grades, '-o', tmp_path / 'here', '--overwrite'], 'is one of the inputs')
    expect_error(capsys, ['predict', toy, image_paths[0], '-o', tmp_path / 'g.xlsx'], 'ends in .csv')


def test_a_csv_without_any_image_gives_its_rows(toy, tmp_path, capsys):
    (tmp_path / 'list.csv').write_text('id_code\nx\ny\n')
    args = ['predict', toy, tmp_path / 'list.csv', '-o', tmp_path / 'g.csv']
    expect_error(capsys, args, '2 of 2 images', 'x: no such')
    assert pd.read_csv(tmp_path / 'g.csv').id_code.tolist() == ['x', 'y']


def test_linked_folders_are_named(tmp_path, capsys):
    write(tmp_path, 'in/a.png', 'elsewhere/b.png')
    os.symlink(tmp_path / 'elsewhere', tmp_path / 'in/more')
    assert [e.path.name for e in find_images([str(tmp_path / 'in')])] == ['a.png']
    assert 'in/more: a link to a folder, which is not searched' in capsys.readouterr().out.replace('\n', '')
