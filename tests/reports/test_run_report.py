"report.html, the report of a finished run."
import json
import re
import shutil
import subprocess

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import expect_error, toy_args
from expensive import quick_reports

from aptos_fastai.cli import main
from aptos_fastai.inference.grader import load_grader
from aptos_fastai.pipeline.summary import (
    EPOCH_CHOSEN,
    OUT_OF_FOLD,
    PATIENTS_UNKNOWN,
    SETS_CAUTION,
    SETS_CONDITION,
    interval_text,
)
from aptos_fastai.reports import plots
from aptos_fastai.reports.conclusion import cards, conclusion
from aptos_fastai.reports.shortcuts import forest_kappa

HEADINGS = ['Confusion matrix and per-grade recall', 'Scores and grades', 'Prediction sets', 'Kappa by cluster',
            'Referral', 'Probabilities', 'Decision curve', 'Results by stage', 'Thresholds', 'Learning curves',
            'Shortcut check', 'Ungradable images', 'Tables', 'Largest errors', 'Most uncertain predictions',
            'Settings and versions']


@pytest.fixture(scope='module')
def html(toy): return (toy / 'report.html').read_text(encoding='utf-8')


def test_report_has_every_section(html):
    headings = re.findall(r'<h2 id=(\w+)>(.*?)</h2>', html)
    assert [text for _, text in headings] == HEADINGS
    assert len({anchor for anchor, _ in headings}) == len(HEADINGS)
    for text in ('SYNTHETIC', 'Out-of-fold quadratic weighted kappa', 'ROC curve: AUC', 'Per-grade recall',
                 'Learning curves', 'Grade distribution', 'empirical coverage\n(target 90 %)', 'mean set size',
                 'with conflicting grades', 'sqr_mom', 'Reliability, sight-threatening (grade ≥ 3)', 'Brier score',
                 'Net benefit (Vickers and Elkin 2006)', 'How to read it', 'chosen for sensitivity 0.90',
                 'counted by'):
        assert text in html, text


def test_report_begins_with_what_it_is(html):
    top = html[html.index('<h1>'):html.index('<nav>')]
    for text in ('settings-demo', 'grades diabetic retinopathy', 'Trained on: ', 'aptos_train (60 images)',
                 'aptos_test (20 images)', OUT_OF_FOLD, PATIENTS_UNKNOWN,
                 'Research use only. Not a medical device.'):
        assert text in top, text


def test_report_begins_with_its_conclusion_figures_and_model(toy, html):
    summary = json.loads((toy / 'summary.json').read_text())
    top = html[html.index('<h1>'):html.index('<nav>')]
    sentences = re.findall(r'<p>(.*?)</p>', top[top.index('class=conclusion'):top.index('class=cards')])
    assert sentences == conclusion(summary)
    assert re.findall(r'<div class=card><b>(.*?)</b>', top) == [value for value, _ in cards(summary)]
    for text in (load_grader(toy).model.key, summary['date'], 'settings-demo (settings.ini)', 'aptos_fastai'):
        assert text in top, text


def test_summary_holds_what_the_card_needs(toy):
    summary = json.loads((toy / 'summary.json').read_text())
    oof = pd.read_csv(toy / 'oof.csv')
    valid = oof[oof.retrain_512.notna()]
    final = next(s for s in summary['stages'] if s['stage'] == 'retrain_512')
    for o in final['recall']:
        of_grade = valid[valid.diagnosis == o['grade']]
        assert o['images'] == len(of_grade)
        if len(of_grade): assert o['value'] == pytest.approx((of_grade.retrain_512_grade == o['grade']).mean())
    expected = pd.crosstab(valid.diagnosis, valid.retrain_512_grade).reindex(index=range(5), columns=range(5))
    assert final['confusion'] == expected.fillna(0).astype(int).values.tolist()
    tables = {o['table']: o for o in summary['tables']}
    assert tables['aptos_train']['uses'] == ['training', 'validation'] and sum(tables['aptos_train']['grades']) == 60
    assert tables['aptos_test']['uses'] == ['pseudo-labels', 'test'] and tables['aptos_test']['grades'] is None
    errors = (valid.retrain_512 - valid.diagnosis).abs()[valid.retrain_512_grade != valid.diagnosis]
    assert summary['largest_errors'][0]['id_code'] == valid.id_code[errors.idxmax()]
    assert len(summary['largest_errors']) == min(12, len(errors))
    sets = summary['prediction_sets']
    assert sets['coverage']['images'] == len(valid) == sum(o['images'] for o in sets['by_grade'])
    assert 1 <= sets['mean_size']['value'] <= 5


def test_report_is_self_contained(html):
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html)
    assert 'url(http' not in html
    assert '<script' not in html
    assert html.count('<svg') >= 9
    assert html.count('data:image/jpeg') >= 12


def test_report_has_no_missing_numbers_or_colours(html):
    assert plots.INK not in html
    assert 'nan' not in re.sub(r'base64,[^"]*', '', html)


def test_report_shows_the_kappa_of_the_summary(toy, html):
    summary = json.loads((toy / 'summary.json').read_text())
    final = next(s for s in summary['stages'] if s['stage'] == 'retrain_512')
    assert interval_text(final['kappa'], final['kappa_interval'], 'images') in html
    assert f'n = {final["validated"]}' in html


def test_report_says_what_its_figures_claim(html):
    text = re.sub(r'<[^>]*>', '', html)
    for words in (EPOCH_CHOSEN, SETS_CAUTION, SETS_CONDITION, 'measured out-of-fold', '95 % CI over images',
                  '95 % CI over patients', 'Lines: 95 % CI, bootstrap over patients ('):
        assert words in text, words
    for sentence in re.findall(r'[^.]*95 % CI[^.]*', text):
        assert 'over ' in sentence, sentence


def test_report_command_rewrites_the_report(toy_copy):
    (toy_copy / 'report.html').write_text('damaged')
    with quick_reports(): main(['report', *toy_args(toy_copy)])
    html = (toy_copy / 'report.html').read_text(encoding='utf-8')
    assert [text for _, text in re.findall(r'<h2 id=(\w+)>(.*?)</h2>', html)] == HEADINGS


def test_report_of_an_unfinished_run_says_what_to_do(toy, capsys):
    options = toy_args(toy, '--set', 'stage.finetune_256.wd=.5')
    expect_error(capsys, ['report', *options], 'not finished', '`all`')


def test_names_in_figures_are_escaped():
    plot = plots.interval_dots(['<b>'], [.5], [(.4, .6)], 'kappa')
    assert '<b>' not in plots.to_svg(plot, '"><b>')


def test_forest_kappa_finds_the_camera_and_nothing_in_noise():
    rng = np.random.default_rng(0)
    grades = (np.arange(300) % 5).astype(float)
    parts = np.arange(300) // 5 % 5
    image_width = np.where(grades >= 3, 2048., 1024.) + rng.integers(0, 3, 300)
    assert forest_kappa(image_width[:, None], grades, parts)[0] > .5
    kappa, (low, high) = forest_kappa(rng.normal(size=(300, 4)), grades, parts)
    assert low < 0 < high
    assert abs(kappa) < .2
    constant = np.ones((300, 1))
    assert abs(forest_kappa(constant, grades, parts)[0]) < .15


@pytest.mark.browser
@pytest.mark.parametrize('width', [1200, 400])
def test_report_opens_from_disk(toy, tmp_path, width):
    chromium = shutil.which('chromium') or shutil.which('google-chrome')
    if not chromium: pytest.skip('Chromium is not installed')
    screenshot = tmp_path / 'report.png'
    options = ['--headless', '--no-sandbox', '--disable-gpu', f'--window-size={width},3000',
               f'--screenshot={screenshot}']
    url = f'file://{toy / "report.html"}'
    subprocess.run([chromium, *options, url], check=True, capture_output=True, timeout=120)
    im = cv2.imread(str(screenshot))
    assert im.shape[1] == width
    assert im.std() > 10


@pytest.mark.browser
def test_nothing_is_cut_on_a_phone_and_on_paper(toy, browser):
    inner = """() => [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('svg')
        && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
    clipped = """() => [...document.querySelectorAll('.scroll > *')]
        .filter(e => e.scrollWidth > e.parentElement.clientWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
    page = browser.new_page(viewport=dict(width=390, height=800))
    page.goto(f'file://{toy / "report.html"}')
    assert page.evaluate('document.documentElement.scrollWidth') <= 390
    assert page.evaluate(inner) == []
    assert page.evaluate(clipped) != []                                # wide tables are there, and scroll …
    assert page.locator('.wide').is_visible()                          # … and the page says so
    page.set_viewport_size(dict(width=700, height=1000))               # the width of an A4 page without its margins
    page.emulate_media(media='print')
    assert page.evaluate(clipped) == []
    assert page.evaluate(inner) == []


def test_scores_csv_holds_prediction_sets_and_score_sd(toy):
    df = pd.read_csv(toy / 'scores.csv')
    assert (df.grade_low <= df.grade).all()
    assert (df.grade <= df.grade_high).all()
    assert (df.score_sd >= 0).all()
    assert df.score_sd.nunique() > 5


def test_arrows_of_the_graph_of_stages_pass_behind_its_boxes_and_long_names_fit():
    name = 'convnextv2_tiny.fcmae_ft_in22k_in1k_384'
    edges = [('a', 'c', False), ('b', 'c', True)]
    graph = plots.stage_graph(dict(a=0, b=1, c=2), edges, dict(a=name, b='b', c='c'), 'c')
    ax, = graph.axes
    arrows = [o for o in ax.texts if getattr(o, 'arrow_patch', None)]
    assert len(arrows) == 2 and max(o.zorder for o in arrows) < min(o.zorder for o in ax.patches)
    assert len(ax.patches) == 6 and [o.get_facecolor()[3] for o in ax.patches[::2]] == [1, 1, 1]
    sizes = {o.get_text(): o.get_fontsize() for o in ax.texts}
    assert sizes[name] < 7.8 and len(name) * sizes[name] <= plots.BOX_CHARACTERS * 7.8 + 1e-9
