"""Compare ways to turn a score into probabilities, cross-fitted, on the validation images of a finished run.

    python benchmarks/probabilities.py runs/settings-demo [NODE]

Reference: the share of each grade as everyone's probability. Prints the Brier score of P(referable) and of
P(sight-threatening) and the log loss of the grade, each as a ratio to the reference (lower is better), with the paired
bootstrap interval over patients of the difference of the Brier scores to the ordinal logistic regression; then what
`[refer] uncertain = refer` costs.
"""
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from aptos_fastai.common.console import say, table
from aptos_fastai.common.io import read_record
from aptos_fastai.decisions import Probabilities, cross_fitted_probabilities
from aptos_fastai.inference.measures import detection
from aptos_fastai.inference.referral import cross_fitted_referred, cross_fitted_sets, fit_decision
from aptos_fastai.metrics import GRADES, bootstrap, stratified_group_parts
from aptos_fastai.recipe.sections import Refer
from aptos_fastai.reports.parts import measure_text


class Isotonic:
    "Isotonic regression of each of the four questions `grade >= k`; they never cross"
    @classmethod
    def fit(cls, scores, grades):
        self = cls()
        self.fits = [IsotonicRegression(out_of_bounds='clip').fit(scores, grades >= k) for k in range(1, GRADES)]
        return self

    def predict(self, scores):
        at_least = np.stack([np.ones(len(scores)), *(fit.predict(scores) for fit in self.fits), np.zeros(len(scores))])
        return -np.diff(at_least, axis=0).T


class Separate:
    "A logistic regression of each question `grade >= k`, each with its own slope; they can cross"
    @classmethod
    def fit(cls, scores, grades):
        self = cls()
        x = np.asarray(scores)[:, None]
        self.fits = [LogisticRegression(C=1e3).fit(x, grades >= k) if 0 < (grades >= k).mean() < 1 else None
                     for k in range(1, GRADES)]
        return self

    def predict(self, scores):
        x, n = np.asarray(scores)[:, None], len(scores)
        at_least = [np.zeros(n) if fit is None else fit.predict_proba(x)[:, 1] for fit in self.fits]
        return -np.diff(np.stack([np.ones(n), *at_least, np.zeros(n)]), axis=0).T


class Shares:
    "The share of each grade, whatever the score"
    @classmethod
    def fit(cls, scores, grades):
        self = cls()
        self.shares = np.bincount(grades, minlength=GRADES) / len(grades)
        return self

    def predict(self, scores): return np.tile(self.shares, (len(scores), 1))


WAYS = {'share of each grade': Shares.fit, 'ordinal logistic': Probabilities.fit,
        'logistic, own slopes': Separate.fit, 'isotonic': Isotonic.fit}


def read_oof(run: Path, node: str) -> tuple[pd.DataFrame, np.ndarray]:
    oof = pd.read_csv(run / 'oof.csv', dtype=dict(id_code=str))
    df = oof[oof[node].notna()].reset_index(drop=True)
    df = df.assign(score=df[node], grade=df[f'{node}_grade'].astype(int), diagnosis=df.diagnosis.astype(int))
    return df, df.fold.to_numpy() if df.fold.nunique() > 2 else stratified_group_parts(df.diagnosis, df.group)


def compare(df: pd.DataFrame, parts: np.ndarray) -> None:
    y = df.diagnosis.to_numpy()
    p = {name: cross_fitted_probabilities(df.score, y, parts, fit) for name, fit in WAYS.items()}
    def squares(of, level): return (of[:, level:].sum(1) - (y >= level)) ** 2
    def log_loss(of): return -np.log(np.maximum(of[np.arange(len(y)), y], 1e-3)).mean()
    reference, own = p['share of each grade'], p['ordinal logistic']
    rows = []
    for name, of in p.items():
        row = [name]
        for level in (2, 3):
            worse = squares(of, level) - squares(own, level)
            low, high = np.quantile(bootstrap(lambda w, d=worse: (w @ d) / w.sum(1), len(y), df.group), [.025, .975])
            row.append(f'{squares(of, level).mean() / squares(reference, level).mean():.3f}   '
                       f'{worse.mean():+.4f} ({low:+.4f} to {high:+.4f})')
        rows.append([*row, f'{log_loss(of) / log_loss(reference):.3f}'])
    table(f'probabilities of {len(df)} images, cross-fitted', ['way', 'Brier, referable', 'Brier, sight-threatening',
                                                             'log loss of the grade'], rows)


def uncertain(df: pd.DataFrame, parts: np.ndarray) -> None:
    spec, warnings = fit_decision(Refer(uncertain='refer'), df, parts, 'this run', .9)
    by_score, known = cross_fitted_referred(spec, df, parts)
    reaches = cross_fitted_sets(df, parts, .9).grade_high >= 2
    rows = []
    for name, called in (('decide', by_score), ('refer', by_score | reaches)):
        found = detection(called[known], df.diagnosis[known] >= 2, df.group[known])
        rows.append([name, *(measure_text(found[key]) for key in ('sensitivity', 'specificity')),
                     f'{100 * called.mean():.0f} %'])
    table('[refer] uncertain, operating point of sensitivity 0.9, sets of 90 %',
          ['uncertain', 'sensitivity', 'specificity', 'referred'], rows)
    for text in warnings: say(text, 'yellow')


def main() -> None:
    run = Path(sys.argv[1])
    node = sys.argv[2] if len(sys.argv) > 2 else (read_record(run / 'summary.json') or {})['submission']['node']
    df, parts = read_oof(run, node)
    say(f'{run.name}/{node}')
    compare(df, parts)
    uncertain(df, parts)


if __name__ == '__main__': main()
