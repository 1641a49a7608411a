"Runs, stages and evaluations, side by side."
import numpy as np
import pandas as pd
import pytest
from conftest import expect_error, write_finished_run

from aptos_fastai.cli import main
from aptos_fastai.common.io import file_hash, read_record, write_csv, write_record
from aptos_fastai.metrics import MIDPOINTS, apply_thresholds, paired_auc, paired_interval, quadratic_kappa
from aptos_fastai.pipeline.compare import matched
from aptos_fastai.pipeline.summary import difference_text, warning_lines


def rows_of_evaluation(n=80, noise=.5, seed=0, **columns):
    "Rows of predictions.csv: two images of each patient, one seen image, one unreadable, one without a grade"
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 5
    score = y + rng.normal(0, noise, n)
    df = pd.DataFrame(dict(
        id_code=[f'0{i}' for i in range(n)], diagnosis=pd.Series(y, dtype='Int64'), score=score,
        grade=pd.Series(apply_thresholds(score, MIDPOINTS), dtype='Int64'), grade_low=0, grade_high=4, ungradable='',
        group=[f'p{i // 2}' for i in range(n)], pixel_sha256=[f'{i:024x}' for i in range(n)], seen='', error=''))
    df.loc[0, 'seen'] = 'near copy' if seed else ''
    df.loc[1, ['score', 'grade', 'error']] = [np.nan, pd.NA, 'cannot be decoded']
    df.loc[2, 'diagnosis'] = pd.NA
    return df.assign(**columns)


def write_evaluation(folder, df, name='a/final', grouped_by='patients'):
    "Write what `compare` reads of an evaluation"
    write_csv(folder / 'predictions.csv', df)
    write_record(folder / 'evaluation.json', dict(
        model=dict(name=name), table=dict(name='clinic', grouped_by=grouped_by), synthetic=False,
        warnings=[f'warning of {name}'], predictions_sha256=file_hash(folder / 'predictions.csv')))
    return folder


def used(df): return df.iloc[3:].astype(dict(diagnosis=int, grade=int))


@pytest.mark.parametrize('precisions, words', [(('f32', 'bf16'), 'a: f32; b: bf16'), (('f32', 'f32'), ''),
                                               ((None, 'f32'), 'a: unknown (older version); b: f32')])
def test_precisions_that_differ_are_named(tmp_path, capsys, precisions, words):
    for name, precision in zip('ab', precisions, strict=True):
        write_finished_run(tmp_path / name)
        summary = read_record(tmp_path / name / 'summary.json')
        if precision: summary['stages'][0]['precision'] = [precision]
        write_record(tmp_path / name / 'summary.json', summary)
    for command in (['runs', tmp_path], ['compare', *(tmp_path / o for o in 'ab')],
                    ['compare', f'{tmp_path / "a"}:teacher', f'{tmp_path / "b"}:teacher']):
        main(list(map(str, command)))
        out = ' '.join(capsys.readouterr().out.split()).replace(f'{tmp_path}/', '')
        assert ('Trained in different precisions' in out) == bool(words)
        assert words.replace('a: ', 'a:teacher: ').replace('b: ', 'b:teacher: ') in out or words in out


def test_two_evaluations_are_compared_in_pairs(tmp_path, capsys):
    a, b = rows_of_evaluation(), rows_of_evaluation(noise=1, seed=1)
    first = write_evaluation(tmp_path / 'a', a)
    second = write_evaluation(tmp_path / 'b', b.sample(frac=1, random_state=0), 'b/final')
    main(['compare', str(first), str(second / 'evaluation.json')])
    out = capsys.readouterr().out
    a, b = used(a), used(b)                             # of the first three, one is seen, unreadable or ungraded
    kappa = next(line for line in out.splitlines() if line.startswith('kappa'))
    assert difference_text(*paired_interval(a.grade, b.grade, a.diagnosis, a.group)) in kappa and ' 77 ' in kappa
    assert difference_text(*paired_auc(a.score, b.score, a.diagnosis >= 2, a.group)) in out
    for words in ('a/final on clinic', 'warning of b/final', 'bootstrap over patients', 'Not a medical device'):
        assert words in ' '.join(out.split()), words


def test_a_warning_of_several_results_is_printed_once():
    found = warning_lines([('a', ['few', 'both']), ('b', ['both', 'both'])], 'both runs')
    assert found == ['a: few', 'both runs: both']
    assert warning_lines([('a', ['few']), ('b', ['few'])], '') == ['a, b: few']


def test_images_match_by_pixels_and_then_by_id():
    a = used(rows_of_evaluation(12))
    b = used(rows_of_evaluation(12)).assign(id_code=[f'other{i}' for i in range(9)])
    assert matched(a, b).id_code.tolist() == a.id_code.tolist()        # the same pixels under other ids
    b = used(rows_of_evaluation(12)).assign(pixel_sha256=[f'{i}' for i in range(9)])
    both = matched(a, b)                                               # prepared at another size: other hashes
    assert both.id_code.tolist() == both.id_code_b.tolist() == a.id_code.tolist()
    copies = [o.assign(pixel_sha256=o.pixel_sha256.iloc[0]) for o in (a, used(rows_of_evaluation(12)))]
    both = matched(*copies)                                            # pixels that occur several times say nothing
    assert len(both) == 9 and both.id_code.tolist() == both.id_code_b.tolist()


def test_equal_models_do_not_differ(tmp_path, capsys):
    folder = write_evaluation(tmp_path / 'a', rows_of_evaluation())
    main(['compare', str(folder), str(folder)])
    assert capsys.readouterr().out.count('+0.000 (+0.000 to +0.000)') == 2


def test_what_cannot_be_compared(toy, tmp_path, capsys):
    first = write_evaluation(tmp_path / 'a', rows_of_evaluation())
    few = write_evaluation(tmp_path / 'few', rows_of_evaluation(40))
    expect_error(capsys, ['compare', first, few], '38 images in common that neither model has seen; at least 50')
    other = write_evaluation(tmp_path / 'other', rows_of_evaluation(diagnosis=4))
    expect_error(capsys, ['compare', first, other], 'other grades than in', 'on one table')
    expect_error(capsys, ['compare', toy, first], f'{first}: is an evaluation, and {toy} is none')
    expect_error(capsys, ['compare', first, tmp_path / 'none'], 'Give two runs, or two evaluations')
    rows_of_evaluation(noise=0).to_csv(few / 'predictions.csv', index=False)
    expect_error(capsys, ['compare', few, first], 'predictions.csv: content changed', 'Run evaluate again')


@pytest.mark.parametrize('first, second, over', [('images', 'patients', 'patients'), ('patients', 'images', 'patients'),
                                                 ('images', 'blocks of 10 ids', 'blocks of 10 ids')])
def test_patients_are_resampled_if_either_evaluation_knows_them(tmp_path, capsys, first, second, over):
    folders = [write_evaluation(tmp_path / str(i), rows_of_evaluation(seed=i), grouped_by=kind)
               for i, kind in enumerate((first, second))]
    main(['compare', *map(str, folders)])
    assert f'Paired bootstrap over {over}:' in capsys.readouterr().out
    assert read_record(folders[0] / 'evaluation.json')


# Several runs and stages

def off_by_one(n): return np.where(np.arange(60) < n, (np.arange(60) + 1) % 5, np.arange(60) % 5)


def rows_starting(out, text): return [' '.join(o.split()) for o in out.splitlines() if o.startswith(text)]


def test_several_runs_and_single_stages_are_compared_with_the_first(tmp_path, monkeypatch, capsys):
    for name, n in (('a', 10), ('b', 20), ('c', 4)): write_finished_run(tmp_path / name, off_by_one(n))
    monkeypatch.chdir(tmp_path)
    main(['compare', 'a', 'b', 'c:teacher'])
    out = capsys.readouterr().out
    assert 'kappa on the 60 images that all validated' in out and 'Paired bootstrap over patients:' in out
    y, groups = np.arange(60) % 5, pd.Series([f'p{i // 2}' for i in range(60)])
    assert f'{quadratic_kappa(off_by_one(10), y):.3f} reference' in rows_starting(out, 'a ')[0]
    for name, n in (('b ', 20), ('c:teacher ', 4)):
        difference = difference_text(*paired_interval(off_by_one(10), off_by_one(n), y, groups))
        row, = rows_starting(out, name)
        assert f'{quadratic_kappa(off_by_one(n), y):.3f} {difference}' in row and '100%' in row
    assert 'not corrected for several comparisons' in out


def test_one_stage_of_a_run_against_another(tmp_path, capsys):
    a = write_finished_run(tmp_path / 'a', off_by_one(10))
    main(['compare', f'{a}:teacher', f'{a}:teacher'])
    out = capsys.readouterr().out
    assert out.count('+0.000 (+0.000 to +0.000)') == 1 and 'not corrected' not in out
    expect_error(capsys, ['compare', a, f'{a}:techer'], 'has no results of techer', 'Choose from: teacher')


def test_runs_are_compared_on_their_common_images(tmp_path, capsys):
    a, b, c = (write_finished_run(tmp_path / name, off_by_one(n)) for name, n in (('a', 10), ('b', 20), ('c', 4)))
    oof = pd.read_csv(b / 'oof.csv', dtype=dict(id_code=str))
    write_finished_run(b, oof=oof.iloc[8:].sample(frac=1, random_state=0))     # other images, in another order
    main(['compare', str(a), str(b), str(c)])
    out = capsys.readouterr().out
    assert 'kappa on the 52 images that all validated' in out
    assert '52 of 60, 52 of 52, 52 of 60' in out
    y = np.arange(8, 60) % 5
    for n in (10, 20, 4): assert f' {quadratic_kappa(off_by_one(n)[8:], y):.3f} ' in out
    write_finished_run(b, oof=oof.iloc[11:])
    expect_error(capsys, ['compare', a, b, c], '49 images in common that all validated; at least 50', f'{b} 49')
    expect_error(capsys, ['compare', a, b], 'only 49 validation images in common; at least 50')
    expect_error(capsys, ['compare', a, f'{b}:teacher'], '49 images in common')


def test_several_runs_with_other_grades_are_refused(tmp_path, capsys):
    a, b, c = (write_finished_run(tmp_path / name) for name in 'abc')
    oof = pd.read_csv(c / 'oof.csv', dtype=dict(id_code=str))
    write_finished_run(c, oof=oof.assign(diagnosis=oof.diagnosis.where(oof.index > 2, 4)))
    expect_error(capsys, ['compare', a, b, c], f'{c}: other grades than in {a} for 3 images')


def test_a_stage_with_few_common_images_is_left_out_of_two_runs(tmp_path, capsys):
    a, b = (write_finished_run(tmp_path / name) for name in 'ab')
    for root in (a, b):
        summary, oof = read_record(root / 'summary.json'), pd.read_csv(root / 'oof.csv', dtype=dict(id_code=str))
        oof = oof.assign(probe=oof.teacher.where(oof.index < 12), probe_grade=oof.teacher_grade)
        write_csv(root / 'oof.csv', oof)
        write_record(root / 'summary.json', dict(summary, stages=[*summary['stages'], dict(summary['stages'][0],
                                                                                           stage='probe')]))
    main(['compare', str(a), str(b)])
    out = capsys.readouterr().out
    assert not rows_starting(out, 'probe') and 'fewer than 50 images in common: probe (12)' in out
    assert 'not corrected' not in out        # the submission is the stage


def test_how_many_and_what_can_be_compared(tmp_path, capsys):
    run, evaluation = write_finished_run(tmp_path / 'a'), write_evaluation(tmp_path / 'e', rows_of_evaluation())
    expect_error(capsys, ['compare', run], 'nothing to compare it with')
    expect_error(capsys, ['compare', evaluation, evaluation, evaluation], 'evaluations are compared in pairs')
    expect_error(capsys, ['compare', run, run, evaluation], f'{evaluation}: is an evaluation, and {run} is none')
