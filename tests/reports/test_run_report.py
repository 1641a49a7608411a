"The page at the end of a run."
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from conftest import fails, toy_args

from aptos_fastai.cli import main
from aptos_fastai.reports import plots
from aptos_fastai.reports.shortcuts import forest_kappa


def test_the_page_is_whole_and_asks_for_nothing(toy):
    html = (toy / 'report.html').read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html) and 'url(http' not in html and '<script' not in html
    for words in ('SYNTHETIC', 'Choice of thresholds', 'Confusion of grades', 'Calibration', 'ROC', 'Learning curves', 'Worst mistakes', 'Most uncertain',
                  'Shortcuts', 'sqr_mom', 'Grades: true, validated, answered', 'The stages', 'held (asked for: 90%)', 'stand there twice'):
        assert words in html, words
    assert html.count('<svg') >= 9 and html.count('data:image/jpeg') >= 12 and '#010203' not in html and 'nan' not in re.sub(r'base64,[^"]*', '', html)
    assert len(set(re.findall(r'<h2 id=(\w+)', html))) == html.count('<h2')


def test_figures_are_the_summarys(toy):
    import json
    o = json.loads((toy / 'summary.json').read_text())
    html = (toy / 'report.html').read_text()
    final = next(s for s in o['stages'] if s['stage'] == 'retrain_512')
    assert f'{final["kappa"]:.3f}'.replace('0.', '.') + ' [' in html and f'n = {final["validated"]}' in html


def test_report_is_made_anew_or_says_what_to_run(copied, tmp_path, capsys):
    (copied / 'report.html').write_text('spoilt')
    main(['report', *toy_args(copied)])
    assert 'Confusion of grades' in (copied / 'report.html').read_text()
    fails(capsys, ['report', *toy_args(copied, '--set', 'stage.finetune_256.wd=.5')], 'is not finished', 'run `all`')


def test_names_of_images_are_escaped():
    assert '<b>' not in plots.svg(plots.dots(['<b>'], [.5], [(.4, .6)], 'kappa'), '"><b>')


def test_the_audit_finds_a_planted_camera_and_nothing_in_noise():
    rng = np.random.default_rng(0)
    y = np.arange(300) % 5
    camera = np.c_[np.where(y >= 3, 2048, 1024) + rng.integers(0, 3, 300)].astype(float)
    part = np.arange(300) // 5 % 5
    assert forest_kappa(camera, y.astype(float), part)[0] > .5
    k, (lo, hi) = forest_kappa(rng.normal(size=(300, 4)), y.astype(float), part)
    assert lo < 0 < hi and abs(k) < .2
    assert abs(forest_kappa(np.ones((300, 1)), y.astype(float), part)[0]) < .15


@pytest.mark.browser
def test_the_page_opens_from_disk(toy, tmp_path):
    chromium = shutil.which('chromium') or shutil.which('google-chrome')
    if not chromium: pytest.skip('no Chromium here')
    for width in (1200, 400):
        shot = tmp_path / f'{width}.png'
        options = ['--headless', '--no-sandbox', '--disable-gpu', f'--window-size={width},3000', f'--screenshot={shot}']
        subprocess.run([chromium, *options, f'file://{toy / "report.html"}'], check=True,
                       capture_output=True, timeout=120)
        import cv2
        im = cv2.imread(str(shot))
        assert im.shape[1] == width and im.std() > 10


def test_scores_say_how_sure_they_are(toy):
    df = pd.read_csv(toy / 'scores.csv')
    assert ((df.grade_low <= df.grade) & (df.grade <= df.grade_high)).all() and (df.score_sd >= 0).all() and df.score_sd.nunique() > 5
