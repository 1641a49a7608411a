"Out-of-fold kappa by camera, visual cluster and range of ids."
import json
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest

from aptos_fastai.cli import main
from aptos_fastai.data.retina import Prep
from aptos_fastai.metrics import MIDPOINTS, apply_thresholds, quadratic_kappa, thresholds_or_midpoints
from aptos_fastai.pipeline.clusters import (
    CAMERA,
    ID_RANGE,
    OTHERS,
    VISUAL,
    camera_labels,
    cluster_result,
    cluster_warnings,
    drop_by_chance,
    id_range_labels,
    visual_labels,
)


@pytest.fixture
def valid():
    "Validation images of two cameras: the second one's scores are noisy and too low; and ten of a third"
    rng = np.random.default_rng(0)
    n = 410
    y = rng.integers(0, 5, n)
    second = np.arange(n) % 2 == 1
    score = np.where(second, .5 * y + rng.normal(0, .6, n), y + rng.normal(0, .3, n))
    df = pd.DataFrame(dict(
        source='t', id_code=[f'i{i}' for i in range(n)], diagnosis=y, score=score, group=np.arange(n) // 2,
        width=np.where(second, 4288, 2048), height=np.where(second, 2848, 1536), r=np.where(second, 1700, 750),
        stretch=1.))
    df.loc[400:, ['width', 'height']] = 640
    return df.assign(grade=apply_thresholds(score, MIDPOINTS))


def test_the_drop_between_an_easy_and_a_hard_camera(valid):
    found = cluster_result(CAMERA, valid, camera_labels(valid), 'optimal')
    names = [o['name'] for o in found['clusters']]
    assert set(names[:2]) == {'2048 x 1536, radius 0.4', '4288 x 2848, radius 0.4'} and names[2] == OTHERS
    easy, hard = sorted(found['clusters'][:2], key=lambda o: -o['kappa'])
    assert easy['name'].startswith('2048') and easy['images'] == hard['images'] == 200
    assert found['drop'] == pytest.approx(easy['kappa'] - hard['kappa'])
    assert found['drop'] > .2 > .1 > found['drop_by_chance'] > 0
    low, high = hard['kappa_interval']
    assert low < hard['kappa'] < high < easy['kappa']
    assert hard['mean_error'] > easy['mean_error']


def test_thresholds_are_fitted_without_the_cluster(valid):
    labels = camera_labels(valid)
    hard = next(o for o in cluster_result(CAMERA, valid, labels, 'optimal')['clusters'] if o['name'].startswith('4288'))
    inside = labels == hard['name']
    thresholds, _ = thresholds_or_midpoints('optimal', valid.score[~inside], valid.diagnosis[~inside])
    grades = apply_thresholds(valid.score[inside], thresholds)
    assert hard['kappa_others'] == quadratic_kappa(grades, valid.diagnosis[inside])
    fixed = cluster_result(CAMERA, valid, labels, '.5 1.5 2.5 3.5')
    assert all(o['kappa_others'] is None for o in fixed['clusters'])


def test_no_drop_without_two_clusters_of_thirty_images_and_two_grades(valid):
    one = cluster_result(CAMERA, valid, np.array(['a'] * len(valid), object), 'optimal')
    assert one['drop'] is None and one['drop_by_chance'] is None
    small = cluster_result(CAMERA, valid[:40], np.array(['a'] * 20 + ['b'] * 20, object), 'optimal')
    assert [o['name'] for o in small['clusters']] == [OTHERS] and small['drop'] is None
    zeros = valid[valid.diagnosis == 0].head(30)
    mixed = pd.concat([valid[:60], zeros], ignore_index=True)
    found = cluster_result(CAMERA, mixed, np.array(['a'] * 60 + ['b'] * len(zeros), object), 'optimal')
    assert found['clusters'][1]['kappa'] is None and found['drop'] is None


def test_equal_clusters_drop_as_much_as_chance(valid):
    even = valid[valid.width == 2048].reset_index(drop=True)
    labels = np.where(np.arange(len(even)) % 2 == 0, 'a', 'b').astype(object)
    assert cluster_result(CAMERA, even, labels, 'optimal')['drop'] < .08
    assert drop_by_chance(even, [100, 100]) < .08
    assert drop_by_chance(even, [100, 100]) == drop_by_chance(even, [100, 100])


def test_blocks_follow_the_natural_order_of_ids(valid):
    shuffled = valid.sample(frac=1, random_state=1).reset_index(drop=True)
    labels = id_range_labels(shuffled)
    number = shuffled.id_code.str[1:].astype(int).to_numpy()
    ranges = sorted((number[labels == o].min(), number[labels == o].max()) for o in set(labels))
    assert ranges == [(82 * k, 82 * k + 81) for k in range(5)]
    assert 't: i0 to i81' in set(labels)


def test_visual_clusters_find_colours(tmp_path):
    rng = np.random.default_rng(0)
    colours = [(30, 60, 120), (20, 20, 60), (60, 120, 200), (90, 90, 90), (10, 80, 80)]
    paths, truth = [], []
    for i in range(50):
        im = np.clip(np.array(colours[i % 5]) + rng.normal(0, 2 + 5 * (i % 5), (64, 64, 3)), 0, 255).astype(np.uint8)
        paths.append(tmp_path / f'{i}.jpg')
        truth.append(i % 5)
        cv2.imwrite(str(paths[-1]), im)
    labels = visual_labels(SimpleNamespace(prep=Prep(crop='none', size=64)), pd.DataFrame(dict(stored=paths)))
    assert (pd.crosstab(labels, np.array(truth)) > 0).sum().tolist() == [1] * 5
    assert sorted(set(labels))[0].startswith('1: RGB ')


def test_summary_and_report_show_the_clusters(toy):
    clusters = json.loads((toy / 'summary.json').read_text())['clusters']
    assert [o['kind'] for o in clusters] == [CAMERA, VISUAL, ID_RANGE]
    for kind in clusters: assert sum(o['images'] for o in kind['clusters']) == 12
    html = (toy / 'report.html').read_text(encoding='utf-8')
    for text in ('Kappa by cluster', VISUAL, ID_RANGE, 'This is no test on other images'): assert text in html, text


def test_chance_deals_patients_not_images(valid):
    "Four alike images a patient: clusters of patients differ more by chance than clusters of single images"
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, 200).repeat(4)
    score = y + rng.normal(0, .8, 200).repeat(4)
    df = pd.DataFrame(dict(diagnosis=y, score=score, grade=apply_thresholds(score, MIDPOINTS),
                           group=np.arange(200).repeat(4)))
    assert drop_by_chance(df, [200] * 4) > 1.4 * drop_by_chance(df.assign(group=np.arange(800)), [200] * 4)


def test_a_drop_beyond_chance_is_a_warning(valid):
    found = [cluster_result(CAMERA, valid, camera_labels(valid), 'optimal')]
    drop, by_chance = found[0]['drop'], found[0]['drop_by_chance']
    assert cluster_warnings(found) == [f'kappa drops by {drop:.2f} between images that differ in camera (by chance up '
                                       f'to {by_chance:.2f}): other cameras or clinics may be graded worse']
    assert cluster_warnings([dict(found[0], drop=.01), dict(found[0], drop=None)]) == []


def test_columns_of_the_table_are_carried_to_results(tables, small_recipe, no_report, tmp_path):
    (tables / 'test.csv').unlink()
    shutil.rmtree(tables / 'test_images')
    df = pd.read_csv(tables / 'train.csv')
    df.assign(site=['north', 'south'] * 20, camera='').to_csv(tables / 'train.csv', index=False, sep=';')
    args = ['--recipe', str(small_recipe), '--data', str(tables), '--runs', str(tmp_path / 'runs')]
    main(['all', *args, '--set', 'table.train.carry=site | camera'])
    oof = pd.read_csv(tmp_path / 'runs/small/oof.csv', keep_default_na=False)
    site = dict(zip(df.id_code, ['north', 'south'] * 20, strict=True))
    assert list(oof)[-2:] == ['site', 'camera'] and oof.site.tolist() == oof.id_code.map(site).tolist()
    assert set(oof.site) == {'north', 'south'} and set(oof.camera) == {''}
    kinds = {o['kind']: o for o in json.loads((tmp_path / 'runs/small/summary.json').read_text())['clusters']}
    assert kinds['site']['meaning'] == 'a column of the table'
    assert kinds['camera']['clusters'][0]['images'] == len(oof)
