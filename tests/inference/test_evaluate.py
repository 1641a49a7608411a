"Evaluation on a graded table: metrics in closed form, seen images, subgroups, files, messages."
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import expect_error, write_table
from expensive import onnx_of, quick_reports, toy_bundle

from aptos_fastai.cli import main
from aptos_fastai.common.io import read_record, write_record
from aptos_fastai.data.demo import CAMERAS, generate_fundus
from aptos_fastai.inference.evaluate import Choices, _without_folders, evaluate_table
from aptos_fastai.inference.grader import Grader, load_grader
from aptos_fastai.inference.measures import (
    calibration_results,
    confusion_results,
    detection_results,
    gate_results,
    kappa_results,
    recall_results,
    referral_results,
    set_results,
)
from aptos_fastai.inference.model_spec import read_model
from aptos_fastai.inference.subgroups import subgroup_counts, subgroup_labels, subgroup_results
from aptos_fastai.inference.training_images import BUNDLE_IMAGES, HASHES, RUN_IMAGES, training_images
from aptos_fastai.metrics import auc, kappa_interval, quadratic_kappa


def graded(diagnosis, score=None, grade=None, **columns):
    "Images as `measures` takes them: by default perfect scores, accepted by the gate, each of its own patient"
    score = diagnosis if score is None else score
    grade = np.round(score) if grade is None else grade
    df = pd.DataFrame(dict(diagnosis=diagnosis, score=np.asarray(score, float), grade=np.asarray(grade, int),
                           ungradable='', group=np.arange(len(diagnosis)), grade_low=grade, grade_high=grade))
    return df.assign(called=df.grade >= 2).assign(**columns)


# Closed forms

TRUE = [0, 0, 0, 0, 1, 1, 2, 2, 3, 4]
GIVEN = [0, 0, 0, 2, 1, 2, 2, 1, 3, 2]


def test_kappa_is_of_all_images_whatever_the_gate_rejects():
    df = graded(TRUE, grade=GIVEN, score=np.array(GIVEN) + .1)
    wrong = df.grade != df.diagnosis
    rejected = df.assign(ungradable=np.where(wrong, 'blurred', ''))
    plain, found = kappa_results(df), kappa_results(rejected)
    assert found['deployed'] == plain['deployed']
    assert plain['deployed']['value'] == pytest.approx(quadratic_kappa(GIVEN, TRUE))
    assert plain['deployed']['interval'] == pytest.approx(kappa_interval(GIVEN, TRUE))
    assert found['accepted']['value'] == 1 and found['accepted']['images'] == 6
    assert plain['best_thresholds']['value'] >= plain['deployed']['value']
    assert plain['best_thresholds']['interval'] is None and len(plain['best_thresholds']['thresholds']) == 4


def test_recall_confusion_and_calibration_by_hand():
    df = graded(TRUE, grade=GIVEN, score=np.array(TRUE) + [.5, -.5, 0, 0, 0, 0, 0, 0, 0, -1])
    assert [o['value'] for o in recall_results(df)] == [.75, .5, .5, 1, 0]
    assert [o['images'] for o in recall_results(df)] == [4, 2, 2, 1, 1]
    assert confusion_results(df)[0] == [3, 0, 1, 0, 0] and confusion_results(df)[4] == [0, 0, 1, 0, 0]
    assert calibration_results(df) == pytest.approx(dict(mean_error=-.1, mean_absolute_error=.2))


def test_detection_and_referral_by_hand():
    df = graded(TRUE, grade=GIVEN, score=GIVEN)
    found = detection_results(df, df.grade >= 2, 2)
    assert found['positives'] == 4 and found['sensitivity']['value'] == 3 / 4
    assert found['specificity']['value'] == 4 / 6 and found['specificity']['images'] == 6
    assert found['auc']['value'] == pytest.approx(auc(GIVEN, np.array(TRUE) >= 2)[0])
    severe = detection_results(df, df.grade >= 3, 3)
    assert severe['sensitivity']['value'] == 1 / 2 and severe['positives'] == 2
    df['ungradable'] = np.where(np.arange(10) == 7, 'blurred', '')     # the missed image is referred as ungradable
    found = referral_results(df, (df.grade >= 2) | (df.ungradable != ''), .4)
    assert found['sensitivity']['value'] == 1 and found['referred']['value'] == .6
    assert found['ppv']['value'] == pytest.approx(4 / 6) and found['npv']['value'] == 1   # .4 is the table's prevalence
    low, high = found['ppv']['interval']
    assert low < 4 / 6 < high
    at_one_percent = referral_results(df, df.grade >= 2, .01)['ppv']['value']
    assert at_one_percent == pytest.approx(.75 * .01 / (.75 * .01 + 2 / 6 * .99))


def test_prediction_sets_are_of_images_that_get_a_grade():
    df = graded(TRUE, grade_low=0, grade_high=2, ungradable=['dark'] + [''] * 9)
    found = set_results(df, .9)
    assert found['coverage']['value'] == pytest.approx(7 / 9) and found['coverage']['images'] == 9
    assert found['mean_size']['value'] == 3 and found['target'] == .9
    assert [o['value'] for o in found['by_grade']] == [1, 1, 1, 0, 0]


def test_the_gate_is_counted_by_reason():
    df = graded(TRUE, ungradable=['dark; blurred', 'dark'] + [''] * 8)
    found = gate_results(df, pd.Series(['', 'dark', 'blurred', 'dark']))
    assert found['rejected']['value'] == .2 and found['reasons'] == dict(dark=2, blurred=1)
    assert found['rejected_of_ungradable']['value'] == .75 and found['rejected_of_ungradable']['images'] == 4
    assert gate_results(df, pd.Series([], dtype=str))['rejected_of_ungradable']['reason']


@pytest.mark.parametrize('diagnosis, missing', [([3] * 6, 'every image has grade 2 or higher'),
                                                ([0, 1] * 3, 'no image has grade 2 or higher')])
def test_a_metric_without_a_value_says_why(diagnosis, missing):
    df = graded(diagnosis, score=np.linspace(0, 4, 6))
    found = detection_results(df, df.grade >= 2, 2)
    assert found['auc']['value'] is None and found['auc']['reason'] == missing
    absent = 'specificity' if 3 in diagnosis else 'sensitivity'
    assert found[absent]['value'] is None and found[absent]['reason'] == missing
    assert referral_results(df, df.grade >= 2, .1)['ppv']['reason'] == missing
    kappa = kappa_results(df)
    if 3 in diagnosis:
        assert kappa['deployed']['reason'] == 'all images have grade 3'
        assert 'all 6 grades are 3' in kappa['best_thresholds']['reason']
    json.dumps([found, kappa, recall_results(df), set_results(df.assign(ungradable='dark'), .9)], allow_nan=False)


# Subgroups

def test_a_planted_difference_is_marked_and_no_other():
    rng = np.random.default_rng(0)
    y = np.tile(range(5), 120)
    site, sex = np.repeat(['A', 'B', 'C'], 200), np.tile(['f', 'm'], 300)
    score = np.clip(y + rng.normal(0, np.where(site == 'B', 2, .4)), 0, 4)
    df = graded(y, score=score, site=site, sex=sex, few=np.where(np.arange(600) < 20, 'x', 'y'))
    by_site, by_sex, by_few = subgroup_results(df, ['site', 'sex', 'few'])
    marks = {o['name']: o['differs'] for o in by_site['values']}
    assert {'kappa', 'auc'} <= set(marks['B'])
    b = by_site['values'][1]
    assert b['differences']['kappa']['value'] < 0 and b['level'] == pytest.approx(1 - .05 / 12)    # 4 comparisons of 3
    assert b['kappa']['value'] == pytest.approx(quadratic_kappa(df.grade[site == 'B'], y[site == 'B']))
    assert all(not o['differs'] for o in by_sex['values'])
    assert {o['name']: (o['images'], o['level']) for o in by_few['values']} == dict(x=(20, None), y=(580, None))


@pytest.mark.parametrize('tables', [2, pytest.param(8, marks=pytest.mark.slow)])
def test_subgroups_that_differ_by_chance_are_hardly_ever_marked(tables):
    "Ten sites alike and a good model, whose AUC in a site is often 1: at most one of the tables has a mark"
    marked = 0
    for seed in range(tables):
        rng = np.random.default_rng(seed)
        y = rng.choice(5, 500, p=[.5, .1, .25, .1, .05])
        site = rng.choice([f's{i}' for i in range(10)], 500)
        df = graded(y, score=np.clip(y + rng.normal(0, .6, 500), 0, 4), site=site)
        by_site, = subgroup_results(df, ['site'])
        marked += any(o['differs'] for o in by_site['values'])
    assert marked <= 1                                  # by the bootstrap alone, each table would have one


def test_images_that_left_the_tables_stay_known(tables, small_recipe, tmp_path):
    "Also after `prepare` on other images: the model has seen the earlier ones"
    args = ['--recipe', str(small_recipe), '--data', str(tables), '--runs', str(tmp_path / 'r')]
    main(['prepare', *args])
    before = pd.read_csv(tmp_path / 'r/small/images.csv')
    csv = pd.read_csv(tables / 'train.csv')
    csv.iloc[10:].to_csv(tables / 'train.csv', index=False)
    main(['prepare', *args])
    after = pd.read_csv(tmp_path / 'r/small/images.csv')
    assert set(before.pixel_sha256) == set(after.pixel_sha256) and len(after) == 50


def test_folders_that_can_name_people_stay_out_of_what_is_passed_on(tmp_path):
    folder = tmp_path / 'Maria Schmidt/clinic A/img'
    texts = [f'id: n (100 % of its values name an image in {folder})', f'{folder}/images.csv is missing', 'a/b of 3']
    assert _without_folders(texts, [Path('.'), folder]) == [
        'id: n (100 % of its values name an image in img)', 'img/images.csv is missing', 'a/b of 3']


def test_another_mix_of_grades_is_no_mean_error():
    "Scores that shrink to the middle: a site of healthy images has another raw error, not another model"
    rng = np.random.default_rng(0)
    site = np.repeat(['healthy', 'ill'], 200)
    y = np.where(site == 'healthy', rng.choice(5, 400, p=[.7, .1, .1, .05, .05]), rng.choice(5, 400))
    by_site, = subgroup_results(graded(y, score=1 + .5 * y + rng.normal(0, .4, 400), site=site), ['site'])
    assert all('mean_error' not in o['differs'] for o in by_site['values'])


def test_detection_in_a_subgroup_is_by_the_rule_of_the_whole():
    "The images called referable by an operating point, not those of grades from 2 on"
    y = np.tile(range(5), 20)
    df = graded(y, part=np.where(np.arange(100) < 50, 'a', 'b'))
    found = subgroup_results(df.assign(called=df.score >= 1), ['part'])[0]['values']
    assert [(o['sensitivity']['value'], o['specificity']['value']) for o in found] == [(1, .5), (1, .5)]


def test_small_subgroups_and_rests_are_shown_and_not_compared():
    y = np.tile(range(5), 20)
    found = subgroup_results(graded(y, part=np.where(np.arange(100) < 29, 'small', 'large')), ['part'])[0]
    assert {o['name']: o['images'] for o in found['values']} == dict(small=29, large=71)
    assert all(o['level'] is None and o['differs'] == [] for o in found['values'])


def test_a_subgroup_of_one_grade_is_no_error():
    y = np.r_[np.zeros(40, int), np.tile(range(5), 20)]
    found = subgroup_results(graded(y, part=np.where(np.arange(140) < 40, 'healthy', 'mixed')), ['part'])[0]
    healthy = found['values'][0] if found['values'][0]['name'] == 'healthy' else found['values'][1]
    assert healthy['kappa']['reason'] == 'all images have grade 0' and healthy['auc']['value'] is None
    assert set(healthy['differences']) == {'mean_error'}


def test_numbers_become_quartiles_and_empty_cells_unknown():
    label = subgroup_labels(pd.Series([str(o) for o in range(20, 100)] + ['']))
    assert list(label.cat.categories) == ['20 to 39', '40 to 59', '60 to 79', '80 to 99', 'unknown']
    assert (label.value_counts()[:4] == 20).all() and label.iloc[-1] == 'unknown'
    few = subgroup_labels(pd.Series(['2', '10', '2', '']))
    assert list(few.cat.categories) == ['2', '10', 'unknown']
    assert subgroup_results(graded([0] * 21, name=[f'n{i}' for i in range(21)]), ['name'])[0]['values'] == []


def test_how_many_images_each_subgroup_has():
    assert subgroup_counts(pd.Series(['A', 'B', 'A', ''])) == dict(A=2, B=1, unknown=1)
    assert subgroup_counts(pd.Series([str(o) for o in range(20, 60)])) == {
        '20 to 29': 10, '30 to 39': 10, '40 to 49': 10, '50 to 59': 10}
    assert subgroup_counts(pd.Series(['A', 'A'])) == dict(A=2)
    assert subgroup_counts(pd.Series(['', ''])) == dict(unknown=2)
    assert subgroup_counts(pd.Series([f'n{i}' for i in range(21)])) == {'more than 20 values': 21}
    assert subgroup_counts(pd.Series([str(o) for o in range(15)]))['7'] == 1                # codes of sites
    assert subgroup_counts(pd.Series(['A', 'A '])) == dict(A=2)
    assert subgroup_counts(pd.Series(['inf', *map(str, range(30))])) == {'more than 20 values': 31}


# From images to files

def training_image(toy, n):
    "An image that the toy run's model was trained or tuned on"
    return sorted((toy.parent / 'demo-60-60-20-seed42/aptos2019-blindness-detection/train_images').iterdir())[n]


@pytest.fixture(scope='module')
def clinic(toy, tmp_path_factory):
    """grades.csv and grades_images/: 40 new images of 20 patients, a copy and a near copy of a training image, an
    image that no program can read, and a black one that its grader called ungradable
    """
    folder, rng, cameras = tmp_path_factory.mktemp('clinic'), np.random.default_rng(7), list(CAMERAS)
    images = folder / 'grades_images'
    images.mkdir()
    df = pd.DataFrame(dict(id_code=[f'grades{i:03}' for i in range(40)], diagnosis=[str(i % 5) for i in range(40)],
                           patient=[f'p{i // 2}' for i in range(40)], site=['A', 'B'] * 20))
    for i, name in enumerate(df.id_code):
        im, _ = generate_fundus(rng, i % 5, cameras[i % len(cameras)], True)
        cv2.imwrite(str(images / f'{name}.png'), im[..., ::-1])
    more = [('copy', '1', 'q1', 'A'), ('smaller', '1', 'q2', 'A'), ('bad', '2', 'q3', 'B'), ('black', 'x', 'q4', 'B')]
    pd.concat([df, pd.DataFrame(more, columns=df.columns)]).to_csv(folder / 'grades.csv', index=False)
    shutil.copy(training_image(toy, 0), images / 'copy.png')
    cv2.imwrite(str(images / 'smaller.jpg'), cv2.imread(str(training_image(toy, 1))), [cv2.IMWRITE_JPEG_QUALITY, 75])
    (images / 'bad.png').write_bytes(b'\x89PNG\r\n\x1a\n nothing')
    cv2.imwrite(str(images / 'black.png'), np.zeros((90, 120, 3), np.uint8))
    return folder


def evaluate(model, clinic, *options):
    with quick_reports():
        main(['evaluate', str(model), str(clinic / 'grades.csv'), str(clinic / 'grades_images'), *map(str, options)])


def read_strict(file):
    "Read JSON that must not hold NaN"
    def refuse(name): raise AssertionError(f'{name} in {file}')
    return json.loads(file.read_text(), parse_constant=refuse)


@pytest.fixture(scope='module')
def evaluation(toy, clinic, tmp_path_factory):
    "The folder of an evaluation of the toy run on `clinic`"
    out = tmp_path_factory.mktemp('evaluation') / 'out'
    main(['evaluate', str(toy), str(clinic / 'grades.csv'), str(clinic / 'grades_images'), '-o', str(out),
          '--prevalence', '.1'])
    return out


def test_the_record_counts_every_image(evaluation, toy):
    record = read_strict(evaluation / 'evaluation.json')
    assert read_record(evaluation / 'evaluation.json')
    assert record['counts'] == dict(images=44, evaluated=40, groups=20, unreadable=1, ungradable_by_graders=1,
                                    identical=1, near_copies=1, copies=0, missing=0)
    assert record['seen_unknown'] == ''
    model, _ = read_model(toy)
    assert record['model']['key'] == model.key and record['model']['thresholds'] == list(model.thresholds)
    assert record['table'] | dict(place='') == dict(name='grades', csv='grades.csv', grade='diagnosis',
                                                   grouped_by='patients', place='')
    assert str(evaluation.parent) not in json.dumps(record) and record['synthetic']
    assert record['prevalence'] == dict(value=.1, of_table=False)
    assert record['gate']['rejected_of_ungradable'] == dict(value=1., images=1, reason='', interval=pytest.approx(
        record['gate']['rejected_of_ungradable']['interval']))
    assert [o['column'] for o in record['subgroups']] == ['site']
    assert record['unreadable'][0].startswith('bad: cannot be decoded')


def test_predictions_are_those_of_predict(evaluation, toy, clinic):
    df = pd.read_csv(evaluation / 'predictions.csv', index_col='id_code', keep_default_na=False)
    assert df.seen[df.seen != ''].to_dict() == dict(copy='identical', smaller='near copy')
    assert (df.score[df.seen != ''] == '').all()            # they are left out before they are graded
    assert df.error['bad'] and not df.score['bad'] and df.diagnosis['black'] == '' and df.ungradable['black']
    files = [clinic / 'grades_images' / f'{name}.png' for name in df.index[:40]]
    expected = load_grader(toy).predict(files)
    assert np.allclose(df.score[:40].astype(float), expected.score)
    accepted = (expected.ungradable == '').to_numpy()
    assert accepted.sum() > 20
    for column in ('grade', 'grade_low', 'grade_high'):
        assert df[column][:40][accepted].astype(int).tolist() == expected[column][accepted].tolist()
    assert df.grade[:40].astype(int).between(0, 4).all() and df.site.iloc[:2].tolist() == ['A', 'B']
    record = read_strict(evaluation / 'evaluation.json')
    assert record['referable']['auc']['value'] == pytest.approx(
        auc(expected.score, df.diagnosis[:40].astype(int) >= 2)[0])
    assert df.group.iloc[0] == df.group.iloc[1] != df.group.iloc[2]


def test_the_report_shows_the_figures(evaluation):
    html = (evaluation / 'evaluation.html').read_text()
    for words in ('settings-demo/retrain_512 on grades', 'SYNTHETIC', '1 identical, 1 near copies (left out)',
                  'out-of-fold on its own tables', 'refer if', 'in-sample', 'site', 'bad: cannot be decoded',
                  'Not a medical device', 'grade: diagnosis (by its name and values)', 'PPV',
                  'sensitivity of\nthe model', 'Reliability, referable (grade ≥ 2), n = 40 images', 'Brier score',
                  'Net benefit of referring', read_strict(evaluation / 'evaluation.json')['model']['key']):
        assert words in html, words
    assert 'nan' not in html.lower().replace('alternan', '')


def test_files_that_are_passed_on_name_no_folders(evaluation, clinic):
    for name in ('evaluation.html', 'evaluation.json'):
        text = (evaluation / name).read_text()
        assert str(clinic) not in text and str(clinic.parent) not in text, name
    assert 'of its values name an image in grades_images' in (evaluation / 'evaluation.html').read_text()


def test_seen_images_count_only_if_asked_for_and_loudly(toy, clinic, tmp_path, capsys, monkeypatch):
    evaluate(toy, clinic, '-o', tmp_path / 'out', '--include-seen')
    out = ' '.join(capsys.readouterr().out.split())
    assert '2 of 42 images were used to train or tune the model (1 identical, 1 near copies)' in out
    assert 'optimistic' in out and 'PPV and NPV at a prevalence of' in out and "this table's own" in out
    record = read_strict(tmp_path / 'out/evaluation.json')
    assert record['counts']['evaluated'] == 42 and record['include_seen']
    predictions = pd.read_csv(tmp_path / 'out/predictions.csv')
    assert predictions.score.notna().sum() == 43 and (predictions.seen.notna() & predictions.score.notna()).sum() == 2
    assert 'these figures are optimistic' in (tmp_path / 'out/evaluation.html').read_text()
    shutil.copytree(clinic, tmp_path / 'seen')
    csv = pd.read_csv(tmp_path / 'seen/grades.csv').iloc[40:42]
    csv.to_csv(tmp_path / 'seen/grades.csv', index=False)
    args = ['evaluate', toy, tmp_path / 'seen/grades.csv', tmp_path / 'seen/grades_images', '-o', tmp_path / 'none']
    monkeypatch.setattr(Grader, 'scores_and_distances', lambda grader, squares: pytest.fail('a network ran'))
    expect_error(capsys, args, 'all 2 images were used to train or tune the model', '--include-seen')
    expect_error(capsys, [*args[:-1], tmp_path / 'seen/grades.csv/x'], 'cannot write to this folder (this is a file)')
    assert not (tmp_path / 'none').exists()


def test_a_table_of_few_images_of_one_grade(toy, clinic, tmp_path, capsys):
    csv = pd.read_csv(clinic / 'grades.csv', dtype=str)
    csv[csv.diagnosis == '3'].drop(columns='patient').to_csv(clinic / 'threes.csv', index=False)
    main(['evaluate', str(toy), str(clinic / 'threes.csv'), str(clinic / 'grades_images'), '-o', str(tmp_path / 'o')])
    out = ' '.join(capsys.readouterr().out.split())
    for words in ('undefined: all images have grade 3', 'only 8 images: too few', 'patients unknown',
                  'every image has'):
        assert words in out, words
    assert read_strict(tmp_path / 'o/evaluation.json')['prevalence'] == dict(value=1., of_table=True)
    assert 'undefined' in (tmp_path / 'o/evaluation.html').read_text()


def test_an_older_run_cannot_tell_which_images_it_has_seen(toy_copy, clinic, capsys):
    (toy_copy / RUN_IMAGES).unlink()
    evaluate(toy_copy, clinic)
    assert 'it cannot be known which images the model was trained on' in ' '.join(capsys.readouterr().out.split())
    record = read_strict(toy_copy / 'evaluations/grades/evaluation.json')
    assert record['counts']['evaluated'] == 42 and 'Run `all` again' in record['seen_unknown']
    assert any('cannot be known' in text for text in record['warnings'])
    assert 'it cannot be known' in (toy_copy / 'evaluations/grades/evaluation.html').read_text()


@pytest.mark.parametrize('stage, tables', [('', {'eyepacs2015', 'aptos_train', 'aptos_test'}),
                                           ('pretrain_256', {'eyepacs2015'}),
                                           ('finetune_256', {'eyepacs2015', 'aptos_train'})])
def test_training_images_are_of_a_models_tables_and_of_its_parents(toy, stage, tables):
    images = pd.read_csv(toy / RUN_IMAGES)
    assert set(images.source) == {'eyepacs2015', 'aptos_train', 'aptos_test'} and len(images) == 140
    known, note = training_images(*read_model(toy / stage))
    assert set(known.pixel_sha256) == set(images.pixel_sha256[images.source.isin(tables)]) and note == ''
    assert list(known) == HASHES


def test_what_is_not_known_of_training_images_is_said(toy_copy):
    images = pd.read_csv(toy_copy / RUN_IMAGES)
    images[images.source != 'aptos_test'].to_csv(toy_copy / RUN_IMAGES, index=False)
    assert 'lists fewer images than retrain_512/fold0' in training_images(*read_model(toy_copy))[1]
    file = toy_copy / 'pretrain_256/fold0/stage.json'
    record = read_record(file)
    record['settings']['weights'] = 'mine.safetensors'
    write_record(file, record)
    note = training_images(*read_model(toy_copy / 'pretrain_256'))[1]
    assert note.startswith('pretrain_256/fold0 starts from the weights mine.safetensors')


# Where it may write

def test_an_evaluation_is_replaced_only_by_its_own_kind(toy_copy, clinic, tmp_path, capsys):
    evaluate(toy_copy / 'finetune_256', clinic)
    folder = toy_copy / 'finetune_256/evaluations/grades'
    assert sorted(f.name for f in folder.iterdir()) == ['evaluation.html', 'evaluation.json', 'predictions.csv']
    first = (folder / 'evaluation.json').stat().st_mtime_ns
    evaluate(toy_copy / 'finetune_256', clinic)
    assert (folder / 'evaluation.json').stat().st_mtime_ns > first
    args = ['evaluate', toy_copy, clinic / 'grades.csv', clinic / 'grades_images', '-o', folder]
    expect_error(capsys, args, 'holds an evaluation of another model (settings-demo/finetune_256)', 'with -o')
    shutil.copytree(clinic, tmp_path / 'other')
    args = ['evaluate', toy_copy / 'finetune_256', tmp_path / 'other/grades.csv', tmp_path / 'other/grades_images']
    expect_error(capsys, args, 'holds an evaluation on another table (grades, grades.csv)')
    csv = clinic / 'grades.csv'
    text = csv.read_text()
    try:
        pd.read_csv(csv, dtype=str, keep_default_na=False).assign(
            other=[str(i % 5) for i in range(44)]).to_csv(csv, index=False)
        args = ['evaluate', toy_copy / 'finetune_256', csv, clinic / 'grades_images', '--grade', 'other']
        expect_error(capsys, args, 'holds an evaluation by the grades of column diagnosis')
    finally: csv.write_text(text)
    (folder / 'notes.txt').write_text('mine')
    args = ['evaluate', toy_copy / 'finetune_256', clinic / 'grades.csv', clinic / 'grades_images']
    expect_error(capsys, args, 'holds files that evaluate did not write (notes.txt)')


@pytest.mark.parametrize('options, words', [
    (['--prevalence', '10'], '--prevalence 10: enter a number between 0 and 1'),
    (['--by', 'colour'], 'no column colour. Its columns are id_code, diagnosis, '),
    (['--by', 'eye'], '--by eye: it is not known which eye'),
    (['--by', 'score'], '--by score: predictions.csv has another column of this name')])
def test_options_that_cannot_be(toy, clinic, tmp_path, capsys, options, words):
    args = ['evaluate', toy, clinic / 'grades.csv', clinic / 'grades_images', '-o', tmp_path / 'out', *options]
    expect_error(capsys, args, words)
    assert not (tmp_path / 'out').exists()


def test_tables_that_cannot_be_evaluated(toy, tables, small_recipe, tmp_path, capsys):
    expect_error(capsys, ['evaluate', toy, 'test', '--recipe', small_recipe, '--data', tables], 'test: has no grades')
    expect_error(capsys, ['evaluate', toy, 'nothing', '--recipe', small_recipe], 'nothing: no such file')
    write_table(tmp_path, 4, name='broken')
    for file in (tmp_path / 'broken_images').iterdir(): file.write_bytes(b'\x89PNG\r\n\x1a\n nothing')
    args = ['evaluate', toy, tmp_path / 'broken.csv', tmp_path / 'broken_images', '-o', tmp_path / 'out']
    expect_error(capsys, args, 'all 4 images cannot be read: broken000: cannot be decoded')


def test_by_adds_a_column_that_the_table_does_not_carry(toy, clinic):
    csv = pd.read_csv(clinic / 'grades.csv', dtype=str).assign(visit=[str(i) for i in range(44)])
    csv.to_csv(clinic / 'visits.csv', index=False)
    found = evaluate_table(str(toy), str(clinic / 'visits.csv'), str(clinic / 'grades_images'),
                           choices=Choices(by=['visit']))
    assert [(o['column'], [v['name'] for v in o['values']]) for o in found.record['subgroups']] == [
        ('visit', ['0 to 9', '10 to 19', '20 to 29', '30 to 39'])]
    assert 'visit' in found.predictions and 'site' in found.predictions


def test_a_table_of_a_recipe_is_found_by_its_name(toy, tables, small_recipe, tmp_path):
    found = evaluate_table(str(toy), 'train', recipe=str(small_recipe), data=str(tables),
                           choices=Choices(output=str(tmp_path / 'out')))
    assert found.record['table']['name'] == 'train' and found.record['counts']['evaluated'] == 40
    assert found.reasons[0] == f'table: [table.train] of {small_recipe.name}'


def test_rows_without_an_image_are_left_out_if_asked_for(toy, clinic, tmp_path, capsys):
    "They are announced, counted and listed; de-identified they are not listed"
    csv, out = tmp_path / 'grades.csv', tmp_path / 'out'
    shutil.copy(clinic / 'grades.csv', csv)
    with open(csv, 'a') as f: f.write('gone,1,p1,A\n=lost,2,p1,A\n')
    args = ['evaluate', toy, csv, clinic / 'grades_images', '-o', out]
    expect_error(capsys, args, '2 of 46 ids have no image', 'gone, =lost', 'operating_point --skip-missing')
    with quick_reports(): main([*map(str, args), '--skip-missing'])
    assert '2 of 46 ids have no image and are left out: gone, =lost' in capsys.readouterr().out.replace('\n', ' ')
    record = read_record(out / 'evaluation.json')
    assert record['counts']['missing'] == 2 and record['counts']['evaluated'] == 40
    assert '2 rows of the table without an image left out' in record['warnings']
    assert (out / 'missing_images.csv').read_text() == "source,id_code\ngrades,gone\ngrades,'=lost\n"
    with quick_reports(): main([*map(str, args), '--skip-missing', '--deidentify'])
    assert not (out / 'missing_images.csv').exists()
    assert 'gone' not in ''.join(file.read_text() for file in out.iterdir())


def test_columns_can_be_named(toy, clinic, tmp_path, capsys):
    csv = pd.read_csv(clinic / 'grades.csv', dtype=str)
    csv.assign(level=csv.diagnosis.replace('4', '3')).to_csv(clinic / 'two.csv', index=False)
    args = ['evaluate', toy, clinic / 'two.csv', clinic / 'grades_images', '-o', tmp_path / 'out']
    expect_error(capsys, args, 'the grade can be in 2 columns', '--grade')
    with quick_reports(): main([*map(str, args), '--grade', 'level', '--patient', 'site'])
    record = read_record(tmp_path / 'out/evaluation.json')
    assert record['confusion'][4] == [0] * 5 and record['counts']['groups'] == 2


def test_copies_within_the_table_are_counted(toy, clinic, tmp_path):
    shutil.copytree(clinic, tmp_path / 'copies')
    images = tmp_path / 'copies/grades_images'
    shutil.copy(images / 'grades000.png', images / 'grades005.png')
    found = evaluate_table(str(toy), str(tmp_path / 'copies/grades.csv'), str(images))
    assert found.record['counts']['copies'] == 2 and found.record['counts']['evaluated'] == 40


# The bundle

@pytest.fixture(scope='module')
def exported(toy, clinic, tmp_path_factory):
    "A copy of the toy run with an evaluation, an evaluation of other weights, and its bundle"
    bundle = toy_bundle(toy, tmp_path_factory)
    runs = tmp_path_factory.mktemp('bundle') / 'runs'
    shutil.copytree(toy.parent, runs)
    run = runs / toy.name
    evaluate(run, clinic)
    record = read_record(run / 'evaluations/grades/evaluation.json')
    record['model']['digests'], record['table']['name'] = dict(model='another'), 'stale'
    write_record(run / 'evaluations/stale/evaluation.json', record)
    with onnx_of(bundle): main(['export', str(run), '--parity', '4'])
    return run


def test_export_takes_in_training_images_and_evaluations(exported):
    bundle = exported / 'bundle'
    record = read_record(bundle / 'bundle.json')
    assert BUNDLE_IMAGES in record['files'] and record['training_images'] == ''
    assert len(pd.read_csv(bundle / BUNDLE_IMAGES)) == 140
    card = (bundle / 'MODEL_CARD.md').read_text()
    row = next(line for line in card.splitlines() if line.startswith('| grades | 40 |'))
    found = read_record(exported / 'evaluations/grades/evaluation.json')
    assert f'{found["referable"]["auc"]["value"]:.3f}' in row and 'patients' in row
    assert 'stale' not in card and '* Optimistic' not in card


def test_evaluations_of_a_de_identified_bundle_name_nobody(exported, toy, clinic, tmp_path_factory, tmp_path, capsys):
    runs = tmp_path / 'runs'
    shutil.copytree(exported.parent, runs)
    run = runs / exported.name
    evaluate(run / 'bundle', clinic, '--by', 'site', '-o', run / 'bundle/evaluations/later')
    named = {'"name": "A"', 'bad: '}
    assert all(word in (run / 'bundle/evaluations/later/evaluation.json').read_text() for word in named)
    capsys.readouterr()
    with onnx_of(toy_bundle(toy, tmp_path_factory)): main(['export', str(run), '--parity', '4', '--deidentify'])
    assert 'de-identified: no ids' in ' '.join(capsys.readouterr().out.split())
    files = [f for f in (run / 'bundle/evaluations').rglob('*') if f.is_file()]
    assert sorted(f.parent.name for f in files) == ['grades', 'later', 'stale']
    assert {f.name for f in files} == {'evaluation.json'}
    for f in files: assert not [word for word in named if word in f.read_text()], f
    assert '| grades | 40 |' in (run / 'bundle/MODEL_CARD.md').read_text()


def test_a_bundle_knows_its_training_images_and_its_card_takes_an_evaluation_in(exported, clinic, tmp_path, capsys):
    shutil.copytree(exported / 'bundle', tmp_path / 'bundle')
    bundle = tmp_path / 'bundle'
    before = (bundle / 'bundle.json').read_bytes()
    evaluate(bundle, clinic, '--include-seen', '-o', bundle / 'evaluations/seen')
    record = read_record(bundle / 'evaluations/seen/evaluation.json')
    assert (record['counts']['identical'], record['counts']['near_copies']) == (1, 1)
    card = (bundle / 'MODEL_CARD.md').read_text()
    assert '* | 42 |' in card and 'Optimistic' in card and '| grades | 40 |' in card
    assert (bundle / 'bundle.json').read_bytes() == before
    assert len(load_grader(bundle).predict([clinic / 'grades_images/grades000.png'])) == 1
    file = bundle / BUNDLE_IMAGES
    file.write_text(file.read_text().replace('a', 'b'))
    args = ['evaluate', bundle, clinic / 'grades.csv', clinic / 'grades_images', '-o', tmp_path / 'out']
    expect_error(capsys, args, f'{file}: content changed')


def test_a_bundle_of_an_older_version_does_not_know_its_training_images(exported, clinic, tmp_path):
    shutil.copytree(exported / 'bundle', tmp_path / 'bundle')
    record = read_record(tmp_path / 'bundle/bundle.json')
    del record['files'][BUNDLE_IMAGES], record['training_images']
    write_record(tmp_path / 'bundle/bundle.json', record)
    found = evaluate_table(str(tmp_path / 'bundle'), str(clinic / 'grades.csv'), str(clinic / 'grades_images'))
    assert found.record['seen_unknown'] and 'Export the run again' in found.record['warnings'][0]


def test_probabilities_are_of_the_score_also_where_the_gate_rejects(toy_copy, tmp_path):
    graded = write_table(tmp_path, n=20, seed=5, name='other')
    file = toy_copy / 'summary.json'                         # a gate that rejects every image
    summary = read_record(file)
    summary['submission']['gate']['limit'] = 1e-9
    write_record(file, summary)
    evaluation = evaluate_table(str(toy_copy), str(tmp_path / 'other.csv'))
    df, spec = evaluation.predictions, read_model(toy_copy)[0].decision
    assert (df.ungradable != '').all() and len(df) == len(graded)
    expected = spec.probabilities.predict(df.score.astype(float))[:, 2:].sum(1)
    assert df.p_referable.astype(float).to_numpy() == pytest.approx(expected)
    assert set(df.decision) == {'not gradable'} and evaluation.record['referral']['programme']['referred']['value'] == 1
