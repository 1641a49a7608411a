"Sections on decisions, of the run's report and of an evaluation: referral, probabilities, decision curve."
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from aptos_fastai.decisions import (
    LEVELS,
    DecisionSpec,
    OperatingPoint,
    cross_fitted_probabilities,
    level_label,
    net_benefit,
    reliability,
)
from aptos_fastai.inference.measures import detected
from aptos_fastai.inference.referral import cross_fitted_referred
from aptos_fastai.metrics import REFERABLE, auc
from aptos_fastai.pipeline.summary import interval_text
from aptos_fastai.reports import plots
from aptos_fastai.reports.html import Figure, Table
from aptos_fastai.reports.parts import chosen_for, figure, measure_text, percent

IMAGES_A_BIN = 20                            # at least, of a reliability plot
BINS = 10                                    # at most
THRESHOLDS = np.linspace(.01, .6, 119)       # threshold probabilities of the decision curve
SHOWN = .05, .1, .2, .3, .5                  # those of its table
HOW_TO_READ = ('How to read it: choose the threshold probability from which a referral is worth it (10 %: finding one '
               'case is worth nine unneeded referrals) and prefer the rule with the highest net benefit there.')


def level_text(lowest_grade: int) -> str:
    "Return 'sight-threatening (grade ≥ 3)'."
    return f'{level_label(lowest_grade)} (grade ≥ {lowest_grade})'


# Referral

def referral_section(valid: pd.DataFrame, spec: DecisionSpec, programme: dict,
                     over: str) -> list[Figure | Table | str]:
    "Return the operating points, what a programme refers, and the ROC curve, all out-of-fold."
    return [points_table(valid, spec, over), programme_table(programme, spec, over), *roc(valid, spec, over)]


def points_table(valid: pd.DataFrame, spec: DecisionSpec, over: str) -> Table:
    "Return the table of the operating points with their cross-fitted figures, and of the grade for comparison."
    by_grade = detected(valid, valid.grade >= REFERABLE, REFERABLE)
    rows = [[level_text(o.lowest_grade), chosen_for(o), f'score ≥ {o.threshold:.2f}', measure_text(o.sensitivity),
             measure_text(o.specificity), o.note] for o in spec.points]
    rows.append([level_text(REFERABLE), 'for comparison', f'grade ≥ {REFERABLE}',
                 *(measure_text(by_grade[key]) for key in ('sensitivity', 'specificity')), ''])
    columns = ['detects', 'operating point', 'positive if', 'sensitivity', 'specificity', 'note']
    if not any(row[-1] for row in rows): columns, rows = columns[:-1], [row[:-1] for row in rows]
    return Table(columns, rows,
                 'Sensitivity and specificity are cross-fitted: the threshold for each part of the images is chosen on '
                 'the other parts. The threshold shown, which the model uses, is chosen on all of them. Of several '
                 'operating points for the same grades, the first decides and the others are reported beside it. '
                 f'In parentheses: 95 % CI over {over} (Wilson). Macular oedema is not graded.', whole=True)


def programme_table(programme: dict, spec: DecisionSpec, over: str) -> Table:
    "Return what is referred by all rules together, by image and by patient."
    rule = 'above the operating point' if spec.point(REFERABLE) else f'of grade {REFERABLE} and above'
    uncertain = ', uncertain' if spec.uncertain == 'refer' else ''
    keys = 'sensitivity', 'specificity', 'referred'
    rows = [[name, o['referred']['images'], *(measure_text(o[key]) for key in keys)]
            for name, o in programme.items() if o]
    unknown = '' if programme['patients'] else ' Patients with several images are not known here.'
    return Table(['counted by', 'number', 'sensitivity', 'specificity', 'share referred'], rows,
                 f'What a programme gets that refers images {rule}{uncertain} or ungradable; a patient is referred if '
                 f'any image is.{unknown} In parentheses: 95 % CI over {over} (Wilson).', whole=True)


def roc(valid: pd.DataFrame, spec: DecisionSpec, over: str) -> list[Figure | str]:
    "Return the ROC curve of referable DR with its operating points."
    from sklearn.metrics import roc_curve
    referable = (valid.diagnosis >= REFERABLE).to_numpy()
    area, *interval = auc(valid.score, referable, valid.group)
    if not np.isfinite(area):
        return [f'No ROC curve: all validation images are {"referable" if referable.all() else "non-referable"}.']
    fpr, tpr, _ = roc_curve(referable, valid.score)
    by_grade = detected(valid, valid.grade >= REFERABLE, REFERABLE)
    points = [plots.RocPoint(o.specificity, o.sensitivity, f'score ≥ {o.threshold:.2f} ({chosen_for(o)})')
              for o in spec.points if o.lowest_grade == REFERABLE]
    points.append(plots.RocPoint(by_grade['specificity'], by_grade['sensitivity'], f'grade ≥ {REFERABLE}'))
    counts = f'n = {referable.sum()} referable + {(~referable).sum()} non-referable'
    return [figure(f'ROC curve: AUC {interval_text(area, interval, over)}, {counts}', plots.roc_curve(fpr, tpr, points),
                   'Out-of-fold scores. The operating points are cross-fitted, so they can lie beside the curve; '
                   f'lines: 95 % CI over {over} (Wilson). CI of the AUC: '
                   f'{"DeLong" if over == "images" else "Obuchowski 1997"}; it has no width at an AUC of 1.'),
            threshold_figure(valid, spec.points, 'Out-of-fold scores')]


def threshold_figure(df: pd.DataFrame, points: Iterable[OperatingPoint], scores_text: str) -> Figure:
    "Return sensitivity, specificity and the share referred against the score threshold, to choose another one by."
    scores, referable = df.score.to_numpy(), (df.diagnosis >= REFERABLE).to_numpy()
    thresholds = np.linspace(min(0, scores.min()), max(4, scores.max()), 201)
    called = scores >= thresholds[:, None]
    curves = {'sensitivity': called[:, referable].mean(1), 'specificity': (~called)[:, ~referable].mean(1),
              'share referred': called.mean(1)}
    named = {f'score ≥ {o.threshold:.2f} ({chosen_for(o)})': o.threshold for o in points
             if o.lowest_grade == REFERABLE}
    return figure('Sensitivity and specificity by threshold', plots.threshold_curves(thresholds, curves, named),
                  f'{scores_text} of all images, for referable DR. A threshold that is read from these curves is '
                  'in-sample: its figures are too high. Vertical lines: the operating points.')


# Probabilities

def probability_section(valid: pd.DataFrame, parts: np.ndarray, brier: dict, over: str) -> list[Figure | Table]:
    "Return reliability plots and Brier scores of cross-fitted probabilities; `brier` is that of summary.json."
    p = cross_fitted_probabilities(valid.score, valid.diagnosis, parts)
    positive = {name: p[:, level:].sum(1) for level, name in LEVELS.items()}
    return [brier_table(brier, over, 'Each image by a calibration that was fitted on other images (cross-fitted). '),
            *reliability_figures(valid, positive, over)]


def brier_table(brier: dict, over: str, condition: str = '') -> Table:
    "Return the Brier scores of both levels beside that of the prevalence, and observed against expected."
    rows = []
    for level, name in LEVELS.items():
        o = brier[name]
        n, expected = o['images'], o['mean_predicted'] * o['images']
        rows.append([level_text(level), n, measure_text(o), f'{o["of_prevalence"]:.3f}', f'{expected:.1f}',
                     round(o['observed'] * n), f'{o["observed"] * n / expected:.2f}' if expected > 0 else 'undefined'])
    return Table(['probability of', 'images', 'Brier score', 'Brier score of\nthe prevalence', 'expected\nimages',
                  'observed\nimages', 'observed /\nexpected'], rows,
                 f'{condition}Brier score: mean squared difference between probability and outcome, lower is better; '
                 'beside it, that of the same probability for everyone. Expected: sum of the probabilities. '
                 f'In parentheses: 95 % CI over {over} (bootstrap).', whole=True)


def reliability_figures(df: pd.DataFrame, positive: dict[str, ArrayLike], over: str) -> list[Figure]:
    "Return the reliability plot of each level; `positive` are the probabilities (n,) of each."
    bins = max(2, min(BINS, len(df) // IMAGES_A_BIN))
    figures = []
    for level, name in LEVELS.items():
        word, p = level_label(level), np.asarray(positive[name], float)
        found = reliability(p, df.diagnosis >= level, df.group, bins)
        figures.append(figure(f'Reliability, {level_text(level)}, n = {len(df)} images',
                              plots.reliability(found, p, f'{word} DR'),
                              f'{bins} bins of equally many images. On the diagonal, as many images are {word} as the '
                              f'probabilities say. Vertical lines: 95 % CI over {over} (Wilson). Below: histogram.'))
    return figures


# Decision curve

def cross_fitted_rules(valid: pd.DataFrame, parts: np.ndarray, spec: DecisionSpec) -> dict[str, np.ndarray]:
    "Return which images each rule refers, (k, n) for k threshold probabilities; probabilities and points cross-fitted."
    p = cross_fitted_probabilities(valid.score, valid.diagnosis, parts)[:, REFERABLE:].sum(1)
    referred, _ = cross_fitted_referred(spec, valid, parts)
    return rules(p, referred, 'operating point' if spec.point(REFERABLE) else f'grade ≥ {REFERABLE}')


def rules(p: ArrayLike, referred: ArrayLike, name: str) -> dict[str, np.ndarray]:
    "Return which images (k, n) the rules of a decision curve refer at each of its threshold probabilities."
    p, shape = np.asarray(p, float), (len(THRESHOLDS), len(np.asarray(p)))
    return {'by probability': p >= THRESHOLDS[:, None], name: np.broadcast_to(np.asarray(referred, bool), shape),
            'refer all': np.ones(shape, bool), 'refer none': np.zeros(shape, bool)}


def decision_curve_section(referred: dict[str, np.ndarray], diagnosis: Sequence[int] | pd.Series,
                           condition: str) -> list[Figure | Table | str]:
    "Return the net benefit of each rule as a plot and as a table; `condition` says how the rules were fitted."
    positive = np.asarray(diagnosis) >= REFERABLE
    benefits = {name: net_benefit(rows, positive, THRESHOLDS) for name, rows in referred.items()}
    at = [int(np.abs(THRESHOLDS - p).argmin()) for p in SHOWN]
    rows = [[name, *(round(1000 * float(benefit[i])) for i in at)] for name, benefit in benefits.items()]
    return [HOW_TO_READ,
            figure(f'Net benefit of referring, n = {len(positive)} images', plots.decision_curve(THRESHOLDS, benefits),
                   'Net benefit (Vickers and Elkin 2006): true positives minus false positives × p / (1 − p), as a '
                   f'share of all images; p: threshold probability. {condition} The curve holds for the share of '
                   f'referable images here ({percent(positive.mean())}).'),
            Table(['net benefit per\n1,000 images', *(f'p =\n{percent(p)}' for p in SHOWN)], rows)]
