import re

import numpy as np
import pandas as pd
import pytest
from conftest import fails

from aptos_fastai.cli import main
from aptos_fastai.reports.html import Bar, Table, image, render
from aptos_fastai.reports.table_report import choose, counts


def test_a_page_of_a_table(tables, small_recipe, tmp_path, capsys):
    (tables / 'train_images/train013.png').write_bytes((tables / 'train_images/train001.png').read_bytes())
    main(['inspect', 'train', '6', '--recipe', str(small_recipe), '--data', str(tables), '--runs', str(tmp_path / 'runs')])
    html = (tmp_path / 'runs/small/inspect/train.html').read_text()
    assert (tmp_path / 'runs/small/inspect/train.png').read_bytes()[:4] == b'\x89PNG'
    assert html.count('<figure>') == 6 and html.count('data:image/jpeg') == 24 and 'train013 (grade 3)' in html and 'unequal grades' in html
    assert not re.findall(r'(?:src|href)="(?!data:)', html) and 'SYNTHETIC' not in html
    main(['inspect', 'test', '100', '--recipe', str(small_recipe), '--data', str(tables), '--runs', str(tmp_path / 'runs')])
    html = (tmp_path / 'runs/small/inspect/test.html').read_text()
    assert html.count('<figure>') == 10 and '<h2>Grades' not in html

def test_look_names_what_is_wrong(tables, small_recipe, tmp_path, capsys):
    args = ['--recipe', small_recipe, '--data', tables, '--runs', tmp_path / 'runs']
    fails(capsys, ['inspect', 'nowhere', *args], 'nowhere: no such table', 'train, test')
    fails(capsys, ['inspect', 'train', 'all', *args], 'all: a number of images is needed')

def test_what_asks_for_a_look_is_shown_first():
    df = pd.DataFrame(dict(id_code=[f'{i:03}' for i in range(100)], diagnosis=0., flags=[''] * 96 + ['dark'] * 3 + [''], how=['circle'] * 99 + ['whole']))
    got = choose(df, 10, 1)
    assert len(got) == 10 and {'096', '097', '098', '099'} <= set(got.id_code)
    df['flags'] = 'dark'
    assert len(choose(df, 10, 1)) == 10 and len(choose(df, 500, 1)) == 100

def test_counts_add_up():
    rows = counts(pd.DataFrame(dict(a=list('aaabbcdefghij'))), 'a', 3)
    assert [r[0] for r in rows[:2]] == ['a', 'b'] and sum(r[1] for r in rows) == 13 and rows[-1][0] == '7 others'

@pytest.mark.parametrize('evil', ['<script>alert(1)</script>', '"><img src=x>'])
def test_names_are_escaped(evil):
    shot = dict(tiles=[image(np.zeros((8, 8, 3), np.uint8), evil)], words=evil, flags=evil)
    html = render('table_report.html', title=evil, note=evil, warning=evil, legend=evil, images=[shot],
                  sections=[(evil, [Table([evil], [[evil], [1], [Bar(.5)]], evil)])])
    assert '<script>' not in html and '<img src' not in html
