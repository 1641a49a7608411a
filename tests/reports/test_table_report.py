"inspect/<table>.html, the report of a table, and the HTML that it is made of."
import base64
import re

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import expect_error

from aptos_fastai.cli import main
from aptos_fastai.reports.html import Bar, Section, Table, embed_image, render
from aptos_fastai.reports.table_report import CIRCLE_COLOURS, TILE, choose_images, contact_sheet, count_rows
from aptos_fastai.reports.table_report import _original_with_circle as original_with_circle
from aptos_fastai.reports.table_report import _strip as strip


@pytest.fixture
def options(tables, small_recipe, tmp_path):
    "Options of a run of the small recipe"
    return ['--recipe', str(small_recipe), '--data', str(tables), '--runs', str(tmp_path / 'runs')]


def test_inspect_writes_a_page_and_a_contact_sheet(tables, options, tmp_path):
    original = tables / 'train_images/train001.png'
    (tables / 'train_images/train013.png').write_bytes(original.read_bytes())
    main(['inspect', 'train', '6', *options])
    folder = tmp_path / 'runs/small/inspect'
    html = (folder / 'train.html').read_text(encoding='utf-8')
    assert (folder / 'train.png').read_bytes().startswith(b'\x89PNG')
    assert html.count('<figure>') == 6
    assert html.count('data:image/jpeg') == 6 * 4
    assert 'train013 (grade 3)' in html
    assert 'conflicting grades' in html
    assert 'SYNTHETIC' not in html
    assert not re.findall(r'(?:src|href)="(?!data:)', html)


def test_inspect_leaves_out_rows_without_an_image_where_the_recipe_does(tables, options, tmp_path, capsys):
    (tables / 'train_images/train007.png').unlink()
    main(['inspect', 'train', '6', *options, '--set', 'images.skip_unreadable=yes'])
    assert '39 images' in capsys.readouterr().out and (tmp_path / 'runs/small/inspect/train.html').is_file()


def test_inspect_shows_whether_ids_tell_the_grade(tables, options, tmp_path, capsys):
    file = tables / 'train.csv'
    pd.read_csv(file).assign(diagnosis=np.repeat(range(5), 8)).to_csv(file, index=False)
    main(['inspect', 'train', '3', *options])
    html = (tmp_path / 'runs/small/inspect/train.html').read_text(encoding='utf-8')
    section = html.partition('Order of ids</h2>')[2].partition('<h2')[0]
    for words in ('90 %', '18 %', 'patients unknown', 'Warning: ids are associated with the grade', 'block = 10'):
        assert words in section
    printed = ' '.join(capsys.readouterr().out.split())
    assert 'train: ids are associated with the grade: 90 % of neighbouring ids' in printed


def test_inspect_warns_of_resized_images(tables, options, tmp_path, capsys):
    for file in (tables / 'test_images').iterdir():
        cv2.imwrite(str(file), cv2.resize(cv2.imread(str(file)), (96, 96), interpolation=cv2.INTER_AREA))
    for name, words in (('test', '10 of 10 images look resized'), ('train', '')):
        main(['inspect', name, '3', *options])
        html = (tmp_path / f'runs/small/inspect/{name}.html').read_text(encoding='utf-8')
        section = html.partition('Image sizes</h2>')[2].partition('<h2')[0]
        printed = ' '.join(capsys.readouterr().out.split())
        if words: assert f'Warning: {words}' in section and f'{name}: {words}' in printed
        else: assert 'look resized' not in section and 'train: 10 of' not in printed
        assert printed.count('look resized') == 1                         # of test


def test_the_ellipse_is_drawn_on_a_resized_original(tmp_path):
    im = cv2.ellipse(np.zeros((600, 600, 3), np.uint8), (300, 300), (190, 280), 0, 0, 360, (90, 90, 90), -1)
    cv2.imwrite(str(tmp_path / 'a.png'), im)
    row = pd.Series(dict(path=str(tmp_path / 'a.png'), x=300., y=300., r=280., how='circle', stretch=190 / 280))
    drawn = original_with_circle(row).astype(int)
    y, x = np.nonzero(np.abs(drawn - CIRCLE_COLOURS['circle']).sum(2) < 60)
    expected = np.array([110, 490, 20, 580]) * TILE / 600
    assert np.allclose([x.min(), x.max(), y.min(), y.max()], expected, atol=1.5)


def test_inspect_of_an_ungraded_table_shows_no_grades(options, tmp_path):
    main(['inspect', 'test', '100', *options])
    html = (tmp_path / 'runs/small/inspect/test.html').read_text(encoding='utf-8')
    assert html.count('<figure>') == 10
    assert 'Image sizes</h2>' in html
    assert 'Grades</h2>' not in html
    assert 'Order of ids</h2>' not in html


def test_inspect_names_what_is_wrong(options, capsys):
    expect_error(capsys, ['inspect', 'nowhere', *options], 'nowhere: no such table', 'train, test')
    expect_error(capsys, ['inspect', 'train', 'all', *options], 'COUNT', 'all', 'whole number')
    expect_error(capsys, ['inspect', 'train', '0', *options], '0: choose at least 1 image')


def test_suspect_images_are_chosen_first():
    ids = [f'{i:03}' for i in range(100)]
    flags = [''] * 96 + ['dark'] * 3 + ['']
    how = ['circle'] * 99 + ['whole']
    df = pd.DataFrame(dict(id_code=ids, diagnosis=0., flags=flags, how=how))
    chosen = choose_images(df, 10, 1)
    assert len(chosen) == 10
    assert {'096', '097', '098', '099'} <= set(chosen.id_code)
    df['flags'] = 'dark'
    assert len(choose_images(df, 10, 1)) == 10
    assert len(choose_images(df, 500, 1)) == 100


def test_counts_add_up():
    rows = count_rows(pd.DataFrame(dict(letter=list('aaabbcdefghij'))), 'letter', 3)
    assert [row[0] for row in rows[:2]] == ['a', 'b']
    assert sum(row[1] for row in rows) == 13
    assert rows[-1][0] == '7 others'


def test_contact_sheet_fills_its_last_row_with_black():
    strips = [np.full((4, 6, 3), 9, np.uint8)] * 3
    sheet = contact_sheet(strips)
    assert sheet.shape == (8, 12, 3)
    assert (sheet[4:, 6:] == 0).all()
    assert (sheet[4:, :6] == 9).all()
    assert len(strips) == 3


def test_a_long_caption_is_not_cut():
    tiles = [np.zeros((TILE, width, 3), np.uint8) for width in (300, TILE, TILE, TILE)]
    short, long = strip(tiles, 'a1'), strip(tiles, 'an_id_of_a_clinic_with_everything_in_it ' * 4 + 'dark END')
    assert short.shape == long.shape and not long[:, -4:].any() and long[TILE:, -60:].any()


def test_embedded_image_decodes_to_the_same_colours():
    im = np.zeros((16, 24, 3), np.uint8)
    im[:] = (200, 100, 30)
    embedded = embed_image(im, 'an orange image')
    jpeg = base64.b64decode(embedded.uri.removeprefix('data:image/jpeg;base64,'))
    decoded = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)[..., ::-1].astype(int)
    assert (embedded.width, embedded.height) == (24, 16)
    assert np.abs(decoded - im).max() < 6


@pytest.mark.parametrize('evil', ['<script>alert(1)</script>', '"><img src=x>'])
def test_names_are_escaped(evil):
    entry = dict(tiles=[embed_image(np.zeros((8, 8, 3), np.uint8), evil)], caption=evil, flags=evil)
    section = Section(evil, [Table([evil], [[evil], [1], [Bar(.5)]], evil), evil])
    html = render('table_report.html', title=evil, note=evil, warning=evil, legend=evil, images=[entry],
                  sections=[section])
    assert '<script>' not in html
    assert '<img src' not in html
