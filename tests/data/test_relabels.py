"Decisions about labels: how relabels.csv is read, applied to a table and written."
import pandas as pd
import pytest
from conftest import write_table

from aptos_fastai.data.relabels import (
    COLUMNS,
    append_decisions,
    apply_relabels,
    decision_of,
    last_decisions,
    read_decisions,
    read_relabels,
)
from aptos_fastai.data.spreadsheet import TableError
from aptos_fastai.data.tables import table_contents
from aptos_fastai.pipeline.graph import load_run
from aptos_fastai.recipe.read import parse_table, read_recipe
from aptos_fastai.recipe.sections import ConfigError

HEADER = ','.join(COLUMNS) + '\n'


def table(**keys): return parse_table('train', dict(csv='train.csv', images='train_images', grade='diagnosis') | keys)


def frame(): return pd.DataFrame(dict(id_code=list('abcde'), diagnosis=[0., 1, 2, 3, 4], path=list('abcde')))


def write(folder, *rows):
    "Write rows (table, id_code, original, grade, time) as relabels.csv"
    lines = [f'{table},{image},{original},{grade},me,{time},no,x' for table, image, original, grade, time in rows]
    (folder / 'relabels.csv').write_text(HEADER + ''.join(f'{line}\n' for line in lines))


def test_the_last_decision_counts_and_the_others_stay(tmp_path):
    write(tmp_path, ('train', 'a', 0, 3, '2026-01-01T10:00:00+00:00'),
          ('train', 'b', 1, 'ungradable', '2026-01-01T10:00:00+00:00'),
          ('train', 'c', 2, 4, '2026-01-02T10:00:00+00:00'), ('train', 'c', 2, 1, '2026-01-01T10:00:00+00:00'),
          ('train', 'd', 3, '', '2026-01-01T10:00:00+00:00'), ('train', 'e', 4, 4, '2026-01-01T10:00:00+00:00'),
          ('train', 'a', 0, 2, '2026-01-01T10:00:00+00:00'),            # the same second: the later row
          ('other', 'a', 0, 2, '2026-01-01T10:00:00+00:00'))
    new, ungradable, note = apply_relabels(frame(), table(relabels='relabels.csv'), tmp_path)
    assert dict(zip(new.id_code, new.diagnosis, strict=True)) == dict(a=2, c=4, d=3, e=4)
    assert new.diagnosis.dtype == 'float32' and ungradable.id_code.tolist() == ['b']
    assert '2 images regraded, 1 confirmed, 1 ungradable and left out, 1 skipped' in note
    assert note.endswith('; 1 row of other tables ignored')
    assert len(read_decisions(tmp_path / 'relabels.csv')) == 8
    counts = read_relabels(table(relabels='relabels.csv'), tmp_path).counts()
    assert counts == dict(regraded=2, confirmed=1, ungradable=1, skipped=1, of_other_tables=1)


def test_an_empty_decision_after_a_grade_brings_the_grade_of_the_table_back(tmp_path):
    write(tmp_path, ('train', 'a', 0, 3, '2026-01-01T10:00:00Z'), ('train', 'a', 0, '', '2026-01-01T10:00:01Z'))
    assert apply_relabels(frame(), table(relabels='relabels.csv'), tmp_path)[0].diagnosis.tolist() == [0, 1, 2, 3, 4]


BAD = {
    'an id that the table lacks': ([('train', 'zz', 0, 1, '')], '1 id not among the graded images'),
    'another grade than the table has': ([('train', 'b', 3, 2, '')], 'b was 3, is 1'),
    'a grade of 5': ([('train', 'a', 0, 5, '')], 'invalid value in column grade: a = 5'),
    'a word': ([('train', 'a', 0, 'bad', '')], 'a = bad. Write a grade from 0 to 4, ungradable, or nothing'),
    'no original': ([('train', 'a', '', 1, '')], "invalid value in column original: a = (empty). It is the table's"),
    'a time of another kind': ([('train', 'a', 0, 1, 'noon')], 'column time'),
    'no id': ([('train', '', 0, 1, '')], 'row 2 names no table or no image'),
    'all ungradable': ([('train', o, i, 'ungradable', '') for i, o in enumerate('abcde')], 'all images'),
}


@pytest.mark.parametrize('name', BAD)
def test_what_cannot_be_applied_is_an_error_that_names_it(tmp_path, name):
    rows, words = BAD[name]
    write(tmp_path, *rows)
    with pytest.raises(TableError) as e: apply_relabels(frame(), table(relabels='relabels.csv'), tmp_path)
    assert words in str(e.value) and 'relabels.csv' in str(e.value)


def test_a_missing_file_or_column_is_an_error(tmp_path):
    with pytest.raises(TableError, match='relabels = no.csv: no such file'):
        read_relabels(table(relabels='no.csv'), tmp_path)
    (tmp_path / 'relabels.csv').write_text('table,id_code,grade\ntrain,a,1\n')
    with pytest.raises(TableError, match='no column original'): read_decisions(tmp_path / 'relabels.csv')


def test_an_ungraded_table_takes_no_decisions(tmp_path):
    text = '[table.train]\nimages = a\nrelabels = r.csv\n[stage.s]\ntrain = train\n[submit]\nfinal = s\n'
    (tmp_path / 'r.ini').write_text(text)
    with pytest.raises(ConfigError, match='relabels = r.csv: this table has no grades'): read_recipe(tmp_path / 'r.ini')


def test_appending_keeps_every_byte_and_quotes(tmp_path):
    file = tmp_path / 'relabels.csv'
    row = dict(zip(COLUMNS, ['train', 'a,"b"', 1, 2, 'Ann, B', '2026-01-01T10:00:00+00:00', 'no', 'x'], strict=True))
    append_decisions(file, [row])
    first = file.read_bytes()
    file.write_bytes(first.rstrip(b'\n'))                  # an editor that drops the last line end
    append_decisions(file, [row | dict(grade='')])
    assert file.read_bytes().startswith(first)
    df = read_decisions(file)
    assert list(df) == COLUMNS and df.id_code.tolist() == ['a,"b"'] * 2 and df.grade.tolist() == ['2', '']
    assert last_decisions(df).grade.tolist() == ['']


LINES = [COLUMNS, ['train', 'a', '0', '3', 'Müller, B', '2026-01-01T10:00:00+00:00', 'no', 'x'],
         ['train', 'b', '1', 'ungradable', 'Müller, B', '2026-01-01T10:00:01+00:00', 'no', 'x']]


def as_text(lines, separator=',', end='\n'):
    return ''.join(separator.join(f'"{o}"' if ',' in o else o for o in line) + end for line in lines)


OTHER_PROGRAMS = {
    'semicolons': as_text(LINES, ';', '\r\n').encode(),
    'a line sep=;': b'sep=;\r\n' + as_text(LINES, ';', '\r\n').encode(),
    'tabs in UTF-16': as_text(LINES, '\t').encode('utf-16'),
    'a byte order mark': as_text(LINES).encode('utf-8-sig'),
    'Windows-1252': as_text(LINES).encode('cp1252'),
    'old line ends': as_text(LINES, end='\r').encode(),
    'a blank line first': b'\n' + as_text(LINES).encode(),
    'another order': as_text([line[::-1] for line in LINES]).encode(),
    'a column in front': as_text([[o, *line] for o, line in zip(['no', '1', '2'], LINES, strict=True)]).encode(),
    'needed columns alone': as_text([line[:4] for line in LINES]).encode(),
}


@pytest.mark.parametrize('name', OTHER_PROGRAMS)
def test_a_file_that_another_program_saved_gets_further_rows_and_keeps_its_own(tmp_path, name):
    file = tmp_path / 'relabels.csv'
    file.write_bytes(OTHER_PROGRAMS[name])
    before = read_decisions(file)
    values = ['train', 'a', 0, 4, 'Zoë, C', '2026-01-02T10:00:00+00:00', 'yes', 'y']
    for grade in (4, 2): append_decisions(file, [dict(zip(COLUMNS, values, strict=True)) | dict(grade=grade)])
    after = read_decisions(file)
    pd.testing.assert_frame_equal(after[:2], before)
    assert after.values[2:].tolist() == [[*values[:2], '0', grade, *values[4:]] for grade in '42']
    strict = pd.read_csv(file, dtype=str, encoding='utf-8', keep_default_na=False)
    assert list(strict)[:8] == COLUMNS and strict.id_code.tolist() == ['a', 'b', 'a', 'a']
    if name == 'a column in front': assert strict['no'].tolist()[:2] == ['1', '2']


def test_columns_after_the_known_ones_stay_byte_by_byte(tmp_path):
    file = tmp_path / 'relabels.csv'
    file.write_text(HEADER.replace('note\n', 'note,comment\n') + 'train,a,0,3,me,,no,x,blurred\n')
    first = file.read_bytes()
    append_decisions(file, [dict(zip(COLUMNS, ['train', 'b', 1, 2, 'me', '', 'no', 'x'], strict=True))])
    assert file.read_bytes() == first + b'train,b,1,2,me,,no,x\n'
    assert read_decisions(file).grade.tolist() == ['3', '2']


@pytest.mark.parametrize('content', [
    b'table;id_code;grade\ntrain;a;3\n', b'table;id_code;original;grade\ntrain;a;0;9\n'])
def test_a_file_that_cannot_be_read_is_not_appended_to(tmp_path, content):
    file = tmp_path / 'relabels.csv'
    file.write_bytes(content)
    with pytest.raises(TableError, match=r'relabels.csv'): append_decisions(file, [dict(table='train')])
    assert file.read_bytes() == content


@pytest.mark.parametrize('grade, note, decision', [
    ('3', 'disagreement', '3'), ('', 'disagreement', ''), ('', 'disagreement; heat map seen', ''), ('', '', ''),
    ('', 'disagreement; undone', None), ('3', 'duplicate; heat map seen; undone', '3'),
    ('', 'disagreement; undone; skipped', '')])
def test_a_row_holds_a_decision_unless_undo_left_the_image_to_do(grade, note, decision):
    assert decision_of(grade, note) == decision


def test_a_table_is_read_with_its_decisions_and_its_csv_stays(tmp_path):
    write_table(tmp_path, 10)
    before = (tmp_path / 'train.csv').read_bytes()
    write(tmp_path, ('train', 'train000', 0, 4, ''), ('train', 'train001', 1, 'ungradable', ''))
    for name in ('relabels.csv', str(tmp_path / 'relabels.csv')):
        contents = table_contents(table(relabels=name), tmp_path)
        grades = contents.frame.set_index('id_code').diagnosis
        assert len(grades) == 9 and grades['train000'] == 4 and grades['train002'] == 2
        assert contents.ungradable.id_code.tolist() == ['train001']
        assert contents.ungradable.path[0].endswith('train001.png')
        assert any('1 image regraded' in note for note in contents.notes)
    assert (tmp_path / 'train.csv').read_bytes() == before


def test_decisions_change_the_fingerprint_of_every_stage_that_trains_on_them(tables, small_recipe, tmp_path):
    def fingerprints(sets=()):
        run = load_run(small_recipe, tables, tmp_path / 'runs', sets)
        return [run.fingerprint(name, 0) for name in ('teacher', 'retrain')], run.frames['train']
    before, old = fingerprints()
    write(tables, ('train', 'train000', 0, 0, ''), ('train', 'train001', 1, '', ''))
    assert fingerprints(['table.train.relabels=relabels.csv'])[0] == before          # nothing differs
    write(tables, ('train', 'train000', 0, 4, ''))
    after, new = fingerprints(['table.train.relabels=relabels.csv'])
    assert not set(after) & set(before)
    assert (old.diagnosis != new.diagnosis).sum() == 1 and new.diagnosis[0] == 4
