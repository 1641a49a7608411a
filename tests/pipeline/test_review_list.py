"The list of `review`: its ranking, what it reads from a run folder, and decisions that a run trains on."
import os

import numpy as np
import pandas as pd
import pytest
from conftest import without_report, write_table

from aptos_fastai.cli import main
from aptos_fastai.common.io import AptosError, file_hash, read_record, write_csv, write_record
from aptos_fastai.data.relabels import read_decisions
from aptos_fastai.pipeline.review import DISAGREEMENT, DUPLICATE, Review, label_surprise, ranked
from aptos_fastai.pipeline.review_images import ReviewImages

RECIPE = """\
[recipe]
splits = 2

[images]
size = 32

[table.train]
csv = train.csv
images = train_images
grade = diagnosis

[stage.small]
train = train
arch = test_resnet
weights = none
size = 32
folds = 2
epochs = 1
bs = 8
precision = f32

[submit]
final = small
"""


def scored_table(n=400, seed=0):
    "Labels, their out-of-fold scores by a biased model, and folds"
    rng = np.random.default_rng(seed)
    labels = rng.choice(5, n, p=[.4, .15, .25, .1, .1])
    scores = np.array([.3, .9, 1.9, 3.1, 3.2])[labels] + rng.normal(0, .25, n)
    return pd.DataFrame(dict(source='t', id_code=[f'i{i}' for i in range(n)], diagnosis=labels, fold=np.arange(n) % 4,
                             group=[f'g{i}' for i in range(n)], score=scores))


def write_run(root, oof, node='small', conflicts=()):
    "Write the files of a finished run that a review reads"
    write_csv(root / 'oof.csv', oof.rename(columns=dict(score=node)).assign(other=np.nan))
    write_csv(root / 'folds.csv', oof[['source', 'id_code', 'fold']].assign(digest='x'))
    if len(conflicts): write_csv(root / 'duplicates.csv', conflicts)
    outputs = {'oof.csv': file_hash(root / 'oof.csv')}
    write_record(root / 'summary.json', dict(synthetic=True, stages=[dict(stage=node)], outputs=outputs,
                                             submission=dict(node=node, members={node: 1.})))


# The ranking

def test_wrong_labels_come_first_in_hand_made_scores():
    df = scored_table()
    wrong = np.random.default_rng(1).choice(len(df), 20, replace=False)
    df.loc[wrong, 'diagnosis'] = (df.diagnosis[wrong] + 2) % 5
    first = ranked(df).head(40)
    assert set(df.id_code[wrong]) <= set(first.id_code)
    assert first.surprise.is_monotonic_decreasing


def test_a_biased_score_of_its_own_grade_is_no_surprise():
    "The scores of grade 4 lie near 3.2: an image of grade 4 there is less surprising than one of grade 1 as far off"
    df = scored_table()
    probes = pd.DataFrame(dict(source='t', id_code=['four', 'one'], diagnosis=[4, 1], fold=0, group=['a', 'b'],
                               score=[3.2, 1.8]))
    order = ranked(pd.concat([df, probes], ignore_index=True)).id_code.tolist()
    assert order.index('one') < order.index('four')
    assert abs(3.2 - 4) == pytest.approx(abs(1.8 - 1))


def test_no_label_explains_itself():
    "Changing the labels of one fold changes nothing in the model that ranks this fold"
    df = scored_table()
    inside = (df.fold == 2).to_numpy()
    before = label_surprise(df.score, df.diagnosis, df.fold)
    changed = df.diagnosis.where(~inside | (df.index != df.index[inside][0]), (df.diagnosis + 3) % 5)
    after = label_surprise(df.score, changed, df.fold)
    others = inside.copy()
    others[np.flatnonzero(inside)[0]] = False
    np.testing.assert_allclose(after[others], before[others])
    assert after[np.flatnonzero(inside)[0]] > before[np.flatnonzero(inside)[0]]


@pytest.mark.parametrize('labels', [[0, 0, 0, 0, 1, 1], [2] * 6, [0, 1, 2, 3, 4, 4]])
def test_few_images_and_missing_grades_give_finite_surprises(labels):
    surprise = label_surprise(np.linspace(0, 4, 6), labels, [0, 0, 1, 1, 2, 2])
    assert np.isfinite(surprise).all() and (surprise >= 0).all()


def test_with_one_fold_trained_groups_stay_together():
    df = scored_table(100).assign(fold=0)
    df['group'] = [f'g{i // 2}' for i in range(100)]
    assert len(ranked(df)) == 100 and np.isfinite(ranked(df).surprise).all()


# The list

def test_the_list_holds_unequal_duplicates_then_a_share_of_the_ranking(tmp_path):
    oof = scored_table(100)
    top = ranked(oof).head(10)
    conflicts = pd.DataFrame(dict(
        duplicate_group=[0, 0, 1, 1, 2, 2], source=['t', 't', 't', 'other', 't', 'test'],
        id_code=[top.id_code[3], 'x1', 'x2', 'x2', 'x3', 'y'], diagnosis=[0, 1, 2, 2, 3, np.nan],
        conflict=[True, True, False, False, False, False]))
    write_run(tmp_path, oof, conflicts=conflicts)
    items = Review(tmp_path, .1).items
    assert [o.id_code for o in items[:2]] == [top.id_code[3], 'x1']
    assert [o.id_code for o in items[2:]] == [i for i in top.id_code if i != top.id_code[3]]
    assert items[0].reason == f'{DUPLICATE}; {DISAGREEMENT}' and items[1].reason == DUPLICATE
    assert items[1].score is None and items[1].original == 1 and items[2].reason == DISAGREEMENT
    assert len(Review(tmp_path, 1.).items) == 101


def test_decisions_are_kept_undone_and_resumed(tmp_path):
    write_run(tmp_path, scored_table(100))
    review = Review(tmp_path, .1)
    first, second, third, fourth = review.items[:4]
    review.decide(first, str((first.original + 1) % 5), 'me', False)
    review.decide(second, str(second.original), 'me', True)
    review.decide(third, 'ungradable', 'me', False)
    review.decide(fourth, '', 'me', False)
    review.decide(third, '', 'me', False, ['undone'])
    assert review.progress() == dict(images=10, reviewed=3, changed=1, ungradable=0, skipped=1)
    again = Review(tmp_path, .1)
    assert again.items == review.items and again.progress() == review.progress()
    df = read_decisions(tmp_path / 'relabels.csv')
    assert len(df) == 5 and df.shown_label.tolist() == ['no', 'yes', 'no', 'no', 'no']
    assert df.note.tolist()[-1] == 'disagreement; undone' and set(df.reviewer) == {'me'}
    assert df.time.map(pd.Timestamp).map(lambda t: t.utcoffset().total_seconds()).eq(0).all()


@pytest.mark.parametrize('name', ['summary.json', 'folds.csv'])
def test_a_folder_that_is_no_finished_run_is_an_error(tmp_path, name):
    write_run(tmp_path, scored_table(100))
    (tmp_path / name).unlink()
    with pytest.raises(AptosError, match='Run `all` again|not a finished run'): Review(tmp_path)


def test_a_changed_oof_csv_is_an_error(tmp_path):
    write_run(tmp_path, scored_table(100))
    with open(tmp_path / 'oof.csv', 'a') as f: f.write('\n')
    with pytest.raises(AptosError, match=r'oof.csv: content changed'): Review(tmp_path)


# From a run to a run

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A data folder, a recipe and its finished run with two folds"
    folder = tmp_path_factory.mktemp('review')
    write_table(folder / 'data', 40)
    (folder / 'r.ini').write_text(RECIPE)
    train(folder)
    return folder


def train(folder, *sets):
    options = [o for key in sets for o in ('--set', key)]
    places = ['--recipe', str(folder / 'r.ini'), '--data', str(folder / 'data'), '--runs', str(folder / 'runs')]
    with without_report(): main(['all', *places, *options, *(['--replace'] if sets else [])])


def test_images_are_the_originals_and_heat_maps_cover_them(trained):
    review = Review(trained / 'runs/r', .2)
    images, item = ReviewImages(review), review.items[0]
    shown, hot = images.shown(item), images.heatmap(item)
    assert shown.is_original and shown.pixels.shape == (96, 124, 3) and hot.shape == shown.pixels.shape
    assert (hot != shown.pixels).any()
    x0, x1, y0, y1 = shown.box
    assert 70 < x1 - x0 < 110 and 70 < y1 - y0 < 110               # the disc has a radius of 44 pixels


def test_without_the_original_the_prepared_square_is_shown(trained):
    review = Review(trained / 'runs/r', .2)
    item = review.items[0]
    file = trained / f'data/train_images/{item.id_code}.png'
    content, stat = file.read_bytes(), file.stat()
    try:
        file.write_bytes(bytes(len(content)))                      # as long, but no such image
        assert not ReviewImages(review).shown(item).is_original
        file.write_bytes(content)                                  # the same image with a new time
        assert ReviewImages(review).shown(item).is_original
        file.unlink()
        shown = ReviewImages(review).shown(item)
        assert not shown.is_original and shown.pixels.shape == (32, 32, 3)
    finally:
        file.write_bytes(content)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_run_trains_on_decisions_and_the_original_stays(trained, capsys):
    root = trained / 'runs/r'
    csv = (trained / 'data/train.csv').read_bytes()
    before = pd.read_csv(root / 'oof.csv').set_index('id_code').diagnosis
    review = Review(root, 1.)
    first, second, third = review.items[:3]
    new = (first.original + 2) % 5
    review.decide(first, str(new), 'me', False)
    review.decide(second, 'ungradable', 'me', False)
    review.decide(third, '', 'me', False)
    capsys.readouterr()
    train(trained, f'table.train.relabels={root / "relabels.csv"}')
    assert '1 image regraded, 0 confirmed, 1 ungradable and left out, 1 skipped' in capsys.readouterr().out
    after = pd.read_csv(root / 'oof.csv').set_index('id_code').diagnosis
    assert after[first.id_code] == new and second.id_code not in after.index and len(after) == 39
    unchanged = [i for i in after.index if i != first.id_code]
    assert (after[unchanged] == before[unchanged]).all()
    assert (trained / 'data/train.csv').read_bytes() == csv
    recorded = read_record(root / 'run.json')['relabels']['train']
    assert recorded['regraded'] == recorded['ungradable'] == 1 and recorded['file'] == 'relabels.csv'
    assert any('review of labels' in text for text in read_record(root / 'summary.json')['stages'][0]['warnings'])
    check_second_round(root, first, new)


def check_second_round(root, first, new):
    "A second review begins with the decisions of the first one, and records grades of the table's own CSV"
    review = Review(root, 1.)
    item = next(o for o in review.items if o.id_code == first.id_code)
    assert item.label == new and item.original == first.original and item.decision == str(new)
    review.decide(item, str(item.original), 'you', False)
    assert read_decisions(root / 'relabels.csv').original.tolist()[-1] == str(first.original)
    (root / 'relabels.csv').unlink()
    with pytest.raises(AptosError, match='trained on these decisions, and the file is missing'): Review(root, 1.)
