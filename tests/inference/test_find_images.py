"Which file belongs to which name: never another image's."
import os
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import dicom, expect_error

from aptos_fastai.cli import main
from aptos_fastai.common.io import AptosError
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
    with pytest.raises(AptosError, match='no images found'): find_images([str(tmp_path / 'nowhere.png')])


def test_a_bare_name_in_two_folders_is_an_error_that_names_both(tmp_path):
    write(tmp_path, 'a/left.png', 'b/left.png', 'a/right.png')
    left, right = listed(tmp_path, 'left', 'right')
    assert left.startswith('2 images have this name: a/left.png, b/left.png')
    assert right == 'a/right.png'


def test_a_name_with_a_folder_matches_that_folder_only(tmp_path):
    write(tmp_path, 'a/left.png', 'b/left.png', 'd/left.v2.png')
    found = listed(tmp_path, 'c/left.png', 'b/left.png', 'a\\left.png', 'b/left', 'd/left.v2', 'a/left.jpg')
    missing = f'no such image in {tmp_path}'
    assert found == [missing, 'b/left.png', 'a/left.png', 'b/left.png', 'd/left.v2.png', missing]


def test_a_name_with_a_suffix_does_not_match_another_suffix(tmp_path):
    write(tmp_path, 'left.png', 'x/right.jpg')
    assert listed(tmp_path, 'left.jpg', 'right.jpg') == [f'no such image in {tmp_path}', 'x/right.jpg']


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
    assert 'ignored 2 files that are not images (1 .csv, 1 .txt)' in capsys.readouterr().out.replace('\n', ' ')


@pytest.mark.parametrize('text, words', [
    ('id_code\nzzz\n', 'none of its 1 rows has an image: zzz: no such image'),
    ('who\na\n', 'no column file, path, image or id_code'),
])
def test_a_csv_without_images_is_an_error(tmp_path, text, words):
    (tmp_path / 't.csv').write_text(text)
    with pytest.raises(AptosError, match=words): find_images([str(tmp_path / 't.csv')])


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
