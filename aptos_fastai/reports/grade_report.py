"Sections of the run's report on grades: confusion, recall, scores, prediction sets, clusters, thresholds."
import numpy as np
import pandas as pd

from aptos_fastai.metrics import (
    GRADES,
    MIDPOINTS,
    PUBLISHED_THRESHOLDS,
    apply_thresholds,
    kappa_interval,
    quadratic_kappa,
    thresholds_or_midpoints,
)
from aptos_fastai.pipeline.clusters import MIN_IMAGES
from aptos_fastai.pipeline.summary import (
    SETS_CONDITION,
    by_value,
    interval_text,
    out_of_fold_grades,
    threshold_setting,
    validated,
)
from aptos_fastai.reports import plots
from aptos_fastai.reports.conclusion import submitted
from aptos_fastai.reports.html import Bar, Figure, Table
from aptos_fastai.reports.parts import cluster_kappa, figure, percent, set_rows
from aptos_fastai.run_folder import Run


def confusion_section(result: dict) -> list[Figure]:
    "Return the confusion matrix and the recall of each grade; `result` is an entry of `stages` in summary.json."
    recall, n, over = result['recall'], result['validated'], result['resampled']
    return [figure(f'Confusion matrix, n = {n} images', plots.confusion_matrix(np.array(result['confusion'])),
                   'Number of images and proportion of the true grade (row), out-of-fold.'),
            recall_figure(recall, n, over)]


def recall_figure(recall: list[dict], images: int, over: str) -> Figure:
    "Return the recall of each grade with its interval over `over`."
    values = [np.nan if o['value'] is None else o['value'] for o in recall]
    intervals = [o['interval'] or (np.nan, np.nan) for o in recall]
    return figure(f'Per-grade recall, n = {images} images',
                  plots.recall_bars(values, intervals, [o['images'] for o in recall]),
                  f'Proportion of each true grade that is predicted correctly. Lines: 95 % CI over {over} (Wilson).')


def score_section(summary: dict, valid: pd.DataFrame, predictions: pd.DataFrame | None,
                  thresholds: list[float]) -> list[Figure]:
    "Return the scores by true grade, the mean true grade by score and the grade distributions."
    correlation = np.corrcoef(valid.score, valid.diagnosis)[0, 1]
    error, distance = np.abs(valid.score - valid.diagnosis).mean(), np.abs(valid.grade - valid.diagnosis)
    tables = [o for o in summary['tables'] if o['table'] in set(valid.source)]
    true = np.repeat(np.arange(GRADES), np.sum([o['grades'] for o in tables], 0))
    groups = {'true, graded tables': true, 'predicted, validation': valid.grade.to_numpy()}
    caption = ''
    if predictions is not None:
        groups['predicted, test'] = predictions.grade.to_numpy()
        shift = np.abs(_grade_shares(predictions.grade) - _grade_shares(valid.grade)).sum() / 2
        caption = (f'Total variation distance between the predicted grades of validation and test: {shift:.2f} '
                   '(0: equal proportions; 1: no common grade). Possible causes: other patients, another camera, '
                   'chance.')
    return [figure(f'Scores by true grade, n = {len(valid)} images',
                   plots.score_histograms(valid.score, valid.diagnosis, thresholds),
                   f'Pearson correlation {correlation:.3f}, mean absolute error {error:.3f}; of the grades '
                   f'{percent((distance == 0).mean())} are correct and {percent((distance <= 1).mean())} within one '
                   'grade; out-of-fold.'),
            figure(f'Mean true grade by score, n = {len(valid)} images',
                   plots.calibration(valid.score, valid.diagnosis),
                   'On the diagonal, the score equals the mean true grade. Vertical lines: 95 % CI of the mean over '
                   'images.'),
            figure('Grade distribution', plots.grade_distribution(groups), caption, whole=True)]


def _grade_shares(grades: pd.Series) -> np.ndarray: return np.bincount(grades, minlength=GRADES)[:GRADES] / len(grades)


def prediction_sets(summary: dict, over: str, predictions: pd.DataFrame | None) -> list[Table | str]:
    "Return the empirical coverage and the size of the prediction sets; each part by sets fitted on the others."
    sets = summary['prediction_sets']
    columns = ['true grade', 'images', f'empirical coverage\n(target {percent(sets["target"])})', 'mean set size']
    return [Table(columns, set_rows(sets),
                  'Conformal prediction sets, measured out-of-fold: the sets of each fold (of five random parts, if '
                  'fewer than three folds are trained) are fitted on the others and use the scores of one fold. The '
                  'predictions use the scores of all folds (CV+). '
                  f'In parentheses: 95 % CI over {over} (Wilson). '
                  f'The target applies to images {SETS_CONDITION}. '
                  'grade_low to grade_high in scores.csv are the sets of the predictions.'),
            *_set_sizes(predictions),
            *(f'Caution: {text}.' for text in summary['submission']['cautions'])]


def _set_sizes(predictions: pd.DataFrame | None) -> list[Table]:
    "Return how many predictions have a set of each size."
    if predictions is None: return []
    sizes = (predictions.grade_high - predictions.grade_low + 1).value_counts().sort_index()
    return [Table(['set size (grades)', 'predictions', 'proportion'],
                  [[int(k), int(n), Bar(n / len(predictions))] for k, n in sizes.items()])]


def cluster_section(summary: dict) -> list[Table | str]:
    "Return the out-of-fold kappa of the submitted model by camera, visual cluster and range of ids."
    over = submitted(summary)['resampled']
    columns = ['cluster', 'images', f'kappa\n(95 % CI over {over})', 'thresholds of\nthe other clusters',
               'mean\nabsolute error']
    tables = []
    for kind in summary['clusters']:
        rows = [[o['name'], o['images'], cluster_kappa(o),
                 '' if o['kappa_others'] is None else f'{o["kappa_others"]:.3f}',
                 f'{o["mean_error"]:.2f}'] for o in kind['clusters']]
        drop = 'Fewer than two clusters can be compared.'
        if kind['drop'] is not None:
            drop = (f'Drop from the highest to the lowest kappa without others: {kind["drop"]:.2f}; 95 % of random '
                    f'clusters: up to {kind["drop_by_chance"]:.2f}.')
        caption = f'{kind["kind"].capitalize()}: {kind["meaning"]}. {drop}'
        tables.append(Table([kind['kind'], *columns[1:]], rows, caption))
    return [f'Out-of-fold kappa of images that resemble each other. Clusters of fewer than {MIN_IMAGES} images are '
            'merged into others, which is not compared. A drop well above chance warns that other cameras or clinics '
            'can be graded worse. This is no test on other images: the networks have trained on images of every '
            'cluster. For "thresholds of the other clusters", only the thresholds are fitted without the cluster. '
            'Kappa also depends on the mix of grades in a cluster.', *tables]


def threshold_comparison(run: Run, oof: pd.DataFrame) -> Table:
    "Compare the kappa of each stage between the ways to set its thresholds."
    def kappa(grades: np.ndarray, valid: pd.DataFrame) -> str:
        interval = kappa_interval(grades, valid.diagnosis, valid.group)
        text = interval_text(quadratic_kappa(grades, valid.diagnosis), interval)
        return text.replace(' (', '\n(')     # two lines: the table fits the page
    rows, over = [], {}
    for name in run.recipe.order:
        valid = validated(oof, name)
        grades = [
            apply_thresholds(valid.score, MIDPOINTS),
            apply_thresholds(valid.score, PUBLISHED_THRESHOLDS),
            out_of_fold_grades(run, valid, 'optimal'),
            out_of_fold_grades(run, valid, 'regularised'),
        ]
        best, _ = thresholds_or_midpoints('optimal', valid.score, valid.diagnosis)
        in_sample = quadratic_kappa(apply_thresholds(valid.score, best), valid.diagnosis)
        kappas = [kappa(g, valid) for g in grades]
        over[name] = run.grouped_by(valid)
        rows.append([name, *kappas, f'{in_sample:.3f}', threshold_setting(run, name)])
    columns = ['stage', 'midpoints\n0.5 1.5 2.5 3.5', 'published\n0.75 1.5 2.5 3.5', 'optimal,\ncross-fitted',
               'regularised,\ncross-fitted', 'optimal,\nin-sample', 'used in this run']
    return Table(columns, rows,
                 'Kappa of each stage for each way to set the thresholds. Cross-fitted: the thresholds for a fold '
                 '(for one of five random parts, if fewer than three folds are trained) are fitted on the others. '
                 'In-sample: fitted on the images they grade, not out-of-fold, too high. '
                 f'In parentheses: 95 % CI over {by_value(over)}.')
