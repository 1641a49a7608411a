"What --deidentify leaves out of reports and evaluations, and what each file says that it holds of patients."
import re
import stat
from contextlib import nullcontext
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import open_toy_run, toy_args
from expensive import quick_reports

from aptos_fastai.cli import main
from aptos_fastai.common.io import read_record
from aptos_fastai.data.demo import CAMERAS, generate_fundus
from aptos_fastai.inference import deidentify
from aptos_fastai.inference.deidentify import pseudonyms, without_ids, without_names, without_people, without_values
from aptos_fastai.inference.evaluate import COLUMNS, Evaluation
from aptos_fastai.inference.grader import Grader
from aptos_fastai.inference.subgroups import TOO_MANY
from aptos_fastai.pipeline import clusters
from aptos_fastai.pipeline.compare import matched
from aptos_fastai.reports import shortcuts
from aptos_fastai.reports.run_report import report_privacy_text


def read(file): return pd.read_csv(file, dtype=str, keep_default_na=False)


def test_pseudonyms_are_in_the_order_of_the_first_image():
    keys = pd.Series(['z', '', 'a', 'z', 'b'])
    assert pseudonyms(keys, 'P').tolist() == ['P001', '', 'P002', 'P001', 'P003']


def test_rows_keep_their_order_and_lose_their_names():
    df = pd.DataFrame(dict(file=['b.png', 'a.png'], score=['1', '2'], image_sha256=['ff', 'ee'],
                           error=['', 'no such image: did you mean anna.png']))
    assert without_names(df, 'file').to_dict('list') == dict(
        file=['1', '2'], score=['1', '2'], image_sha256=['', ''], error=['', deidentify.ERROR])


def test_ranges_of_ids_are_numbered_and_nothing_else_changes():
    assert deidentify.ID_RANGE == clusters.ID_RANGE
    kinds = [dict(kind='camera', clusters=[dict(name='big', kappa=.1)]),
             dict(kind=clusters.ID_RANGE, drop=.2, clusters=[dict(name='t: anna to bert', kappa=.5)])]
    summary = dict(clusters=kinds, largest_errors=[dict(id_code='anna', score=1.)], recipe='r')
    assert without_ids(summary) == dict(recipe='r', largest_errors=[dict(id_code='', score=1.)], clusters=[
        kinds[0], dict(kind=clusters.ID_RANGE, drop=.2, clusters=[dict(name='range 1', kappa=.5)])])


def test_a_deidentified_report_has_no_image_and_no_id(toy_copy, monkeypatch):
    monkeypatch.setattr(shortcuts, 'forest_kappa', lambda *_: (.1, (0., .2)))          # fits 20 forests
    run = open_toy_run(toy_copy)
    ids = [name for frame in run.frames.values() for name in frame.id_code]
    before = (toy_copy / 'report.html').read_text(encoding='utf-8')
    files = {name: (toy_copy / name).read_bytes() for name in ('oof.csv', 'summary.json', 'submission.csv')}
    main(['report', *toy_args(toy_copy), '--deidentify'])
    after = (toy_copy / 'report.html').read_text(encoding='utf-8')
    assert sum(name in before for name in ids) > 10 and 'data:image/jpeg' in before
    assert [name for name in ids if name in after] == [] and 'data:image/jpeg' not in after
    assert 'Largest errors' not in after and 'range 1' in after and 'quadratic weighted kappa' in after
    figures = [re.findall(r'<svg.*?</svg>', text, re.DOTALL) for text in (before, after)]
    assert len(figures[0]) == len(figures[1]) > 8                     # every plot is still there
    assert files == {name: (toy_copy / name).read_bytes() for name in files}
    (toy_copy / 'report.html').write_text(before, encoding='utf-8')
    with quick_reports():
        main(['all', *toy_args(toy_copy), '--deidentify'])            # up to date: writes only the report again
    again = (toy_copy / 'report.html').read_text(encoding='utf-8')
    assert 'data:image/jpeg' not in again and [name for name in ids if name in again] == []
    assert files == {name: (toy_copy / name).read_bytes() for name in files}


def test_a_report_says_what_it_holds(tmp_path):
    run = SimpleNamespace(root=tmp_path, recipe=SimpleNamespace(demo=None))
    assert report_privacy_text(run, 24, False) == (
        f'{tmp_path}/report.html: embeds 24 images, their heat maps and ids; treat as patient data '
        '(--deidentify leaves them out)')
    assert report_privacy_text(run, 0, True) == f'{tmp_path}/report.html: de-identified, without ids and images'
    run.recipe.demo = object()
    assert 'generated images' in report_privacy_text(run, 24, False)


@pytest.fixture
def clinic(tmp_path):
    "A graded table with patients, names of theirs that `carry` would take along, and an unreadable image"
    rng, images = np.random.default_rng(7), tmp_path / 'eye_images'
    images.mkdir()
    df = pd.DataFrame(dict(id_code=[f'eye{i:03}' for i in range(40)], diagnosis=[i % 5 for i in range(40)]))
    for row in df.itertuples():
        im, _ = generate_fundus(rng, row.diagnosis, list(CAMERAS)[row.Index % len(CAMERAS)], True)
        cv2.imwrite(str(images / f'{row.id_code}.png'), im[..., ::-1])
    df['patient'] = [f'subject{i // 2}' for i in range(len(df))]
    df['nurse'] = ['Anna', 'Bert'] * 20
    df.to_csv(tmp_path / 'eye.csv', index=False)
    (images / 'eye007.png').write_bytes(b'no image')
    return tmp_path


def test_a_deidentified_evaluation_names_nobody_and_has_the_same_figures(toy, clinic, capsys):
    found = {}
    for name, more, drawn in (('plain', [], quick_reports()), ('hidden', ['--deidentify'], nullcontext())):
        folder = clinic / name
        command = ['evaluate', toy, clinic / 'eye.csv', clinic / 'eye_images', '-o', folder, '--by', 'nurse', *more]
        with drawn: main([str(o) for o in command])
        printed = ' '.join(capsys.readouterr().out.split())
        assert ('treat as patient data' in printed) == (not more)
        found[name] = read_record(folder / 'evaluation.json'), read(folder / 'predictions.csv')
    (plain, rows), (hidden, numbered) = found.values()
    differing = {key for key in plain if plain[key] != hidden[key]}
    assert differing == {'notes', 'unreadable', 'subgroups', 'predictions_sha256'}
    (nurses,), (numbers,) = plain['subgroups'], hidden['subgroups']
    assert [o['name'] for o in nurses['values']] == ['Anna', 'Bert']
    assert [dict(o, name=name) for o, name in zip(numbers['values'], ['Anna', 'Bert'], strict=True)] == nurses['values']
    assert [o['name'] for o in numbers['values']] == ['nurse 1', 'nurse 2']
    assert 'nurse' in rows and 'nurse' not in numbered
    same = [o for o in numbered if o not in ('id_code', 'group', 'pixel_sha256', 'image_sha256', 'error')]
    assert numbered[same].equals(rows[same])
    assert numbered.id_code.str.fullmatch(rf'{plain["table"]["place"][:6]}-\d+').all()
    assert numbered.groupby('group').size().tolist() == [2] * 20      # patients stay together, as in the table
    text = ''.join((clinic / 'hidden' / o.name).read_text() for o in (clinic / 'hidden').iterdir())
    for word in ('eye00', 'eye01', 'subject', 'Anna', 'Bert', *rows.pixel_sha256[:3]): assert word not in text, word
    assert 'De-identified' in (clinic / 'hidden/evaluation.html').read_text(encoding='utf-8')


def test_warnings_of_subgroups_do_not_name_them(tmp_path):
    def values(name): return dict(name=name, differs=['kappa'], differences=dict(kappa=dict(value=-.21)))
    subgroups = [dict(column='site', note='', values=[values('Anna'), values('Anna: Bert'), values('unknown')])]
    end = 'kappa lower (-0.210) than in the other images'
    record = dict(table=dict(place='a'), subgroups=subgroups, warnings=[
        'only 5 images', f'site = Anna: {end}', f'site = Anna: Bert: {end}', f'site = unknown: {end}'])
    rows = pd.DataFrame(dict(id_code=['x'], group=['a'], error=[''])).reindex(columns=COLUMNS)
    found = without_people(Evaluation(tmp_path, record, rows, [])).record
    assert found['warnings'] == ['only 5 images', f'site = site 1: {end}', f'site = site 2: {end}',
                                 f'site = unknown: {end}']
    assert [o['name'] for o in found['subgroups'][0]['values']] == ['site 1', 'site 2', 'unknown']


def test_a_stopped_prediction_keeps_names_from_other_users(toy, image_paths, tmp_path, monkeypatch):
    def modes(): return {f.suffix: stat.S_IMODE(f.stat().st_mode) for f in tmp_path.glob('.g.csv.*')}
    stream = Grader.stream

    def stop_after_a_batch(self, files, batch=4):
        for i, df in enumerate(stream(self, files, batch)):
            if i == 1: raise KeyboardInterrupt
            yield df
    command = ['predict', str(toy), *image_paths[:6], '-o', str(tmp_path / 'g.csv'), '--deidentify']
    with monkeypatch.context() as patch:
        patch.setattr(Grader, 'stream', stop_after_a_batch)
        with pytest.raises(SystemExit): main(command)
    part = next(tmp_path.glob('.g.csv.*.part'))
    assert image_paths[0] in part.read_text() and modes() == {'.part': 0o600, '.starts': 0o600}
    part.chmod(0o644)                                                 # as an older build left it
    with monkeypatch.context() as patch:
        patch.setattr(Grader, 'stream', stop_after_a_batch)
        patch.setattr('aptos_fastai.inference.grade_files.csv.reader', lambda f: [['damaged']])
        with pytest.raises(SystemExit): main(command)
    assert modes() == {'.part': 0o600, '.starts': 0o600}
    main(command)
    assert modes() == {} and image_paths[0] not in (tmp_path / 'g.csv').read_text()
    plain = tmp_path / 'plain.csv'
    main(['predict', str(toy), image_paths[0], '-o', str(plain)])
    (tmp_path / 'new').touch()
    assert plain.stat().st_mode == (tmp_path / 'new').stat().st_mode  # a finished CSV is an ordinary file


def test_the_sheet_is_recorded_as_the_images_are(toy, image_paths, tmp_path):
    openpyxl = pytest.importorskip('openpyxl')
    book = openpyxl.Workbook()
    for name in ('first', 'second'):
        for cell in ('file', image_paths[0]): (book[name] if name in book else book.create_sheet(name)).append([cell])
    book.save(tmp_path / 'list.xlsx')
    command = ['predict', str(toy), str(tmp_path / 'list.xlsx'), '--sheet', 'second', '-o']
    main([*command, str(tmp_path / 'g.csv')])
    assert read_record(tmp_path / 'g.csv.json')['options']['sheet'] == 'second'
    main([*command, str(tmp_path / 'h.csv'), '--deidentify'])
    assert not {'sheet', 'images'} & read_record(tmp_path / 'h.csv.json')['options'].keys()


def test_patterns_that_can_name_people_are_not_recorded(toy, image_paths, tmp_path):
    command, pattern = ['predict', str(toy), *image_paths[:2], '--patient'], '(anna|bert|.+)[.]'
    options = {}
    for name, more in dict(plain=[], hidden=['--deidentify']).items():
        (tmp_path / name).mkdir()
        main([*command, pattern, '-o', str(tmp_path / name / 'g.csv'), *more])
        options[name] = read_record(tmp_path / name / 'g.csv.json')['options']
    assert options['plain']['patient'] == pattern and options['plain']['eye'] == ''
    assert (options['hidden']['patient'], options['hidden']['eye']) == ('given', '')
    assert 'anna' not in (tmp_path / 'hidden/g.csv.json').read_text()


def test_deidentified_evaluations_of_one_table_can_be_compared_and_those_of_two_cannot(tmp_path):
    def deidentified(place, grade):
        rows = pd.DataFrame(dict(id_code=['x', 'y', 'z'], diagnosis=[0, 1, 2], grade=grade, group=['a', 'a', 'b'],
                                 pixel_sha256=['p', 'q', 'r'], seen='', error='')).reindex(columns=COLUMNS)
        record = dict(table=dict(place=place), subgroups=[], warnings=[])
        return without_people(Evaluation(tmp_path, record, rows, [])).predictions
    both = matched(deidentified('one-table', [0, 1, 1]), deidentified('one-table', [2, 1, 0]))
    assert both[['diagnosis', 'diagnosis_b', 'grade', 'grade_b']].to_numpy().tolist() == [
        [0, 0, 0, 2], [1, 1, 1, 1], [2, 2, 1, 0]]
    assert len(matched(deidentified('one-table', [0, 1, 1]), deidentified('another', [0, 1, 1]))) == 0


def test_a_carried_column_called_camera_is_numbered_too():
    summary = dict(clusters=[dict(kind='camera', clusters=[dict(name='Dr. Huber')])],
                   tables=[dict(table='t', carried=dict(camera={'Dr. Huber': 3}))])
    changed = without_values(summary)
    assert changed['clusters'][0]['clusters'] == [dict(name='camera 1')]
    assert changed['tables'][0]['carried'] == dict(camera={'camera 1': 3})


def test_values_of_carried_columns_are_numbered_in_a_bundle():
    "The names of tables, cameras and visual clusters say nothing of people and stay"
    def clusters(kind, *names): return dict(kind=kind, clusters=[dict(name=name) for name in names])
    summary = dict(largest_errors=[dict(id_code='a', diagnosis=1)], clusters=[
        clusters('site', 'Zwiesel', 'unknown', 'Grafenau'), clusters('camera', '384 x 256, radius 0.5'),
        clusters('id range', 'a to c')], tables=[
        dict(table='t', carried=dict(site={'Grafenau': 9, 'Zwiesel': 5, 'Lost': 1, 'unknown': 2},
                                     nurse={TOO_MANY: 3}))])
    changed = without_values(summary)
    assert changed['tables'] == [dict(table='t', carried=dict(
        site={'site 3': 9, 'site 1': 5, 'site 4': 1, 'unknown': 2}, nurse={TOO_MANY: 3}))]
    assert [[c['name'] for c in o['clusters']] for o in changed['clusters']] == [
        ['site 1', 'unknown', 'site 3'], ['384 x 256, radius 0.5'], ['range 1']]
    assert changed['largest_errors'] == [dict(id_code='', diagnosis=1)]
