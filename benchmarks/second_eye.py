r"""Measure whether the score of a patient's other eye improves the grade of an eye, on a finished run.

    python benchmarks/second_eye.py runs/settings-demo pretrain_256 '^(\d+)_(?:left|right)$'

The corrected score is a linear regression of the grade on the eye's own score, its partner's, and their difference,
fitted on the other parts (patients are never split). Reference: the same regression on the own score alone, with
thresholds fitted in the same way. Prints kappa and AUC of both and the paired bootstrap interval of the difference over
patients. Images without exactly one partner are left out of both.
"""
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from probabilities import read_oof
from sklearn.linear_model import LinearRegression

from aptos_fastai.common.console import say, table
from aptos_fastai.metrics import auc, cross_fitted_grades, paired_auc, paired_interval, quadratic_kappa


def with_partner(df: pd.DataFrame, pattern: str) -> pd.DataFrame:
    patient = df.source + ':' + df.id_code.str.extract(pattern)[0]
    df = df.assign(patient=patient)[patient.notna()]
    df = df[df.groupby('patient').score.transform('size') == 2].reset_index(drop=True)
    return df.assign(partner=df.groupby('patient').score.transform('sum') - df.score)


def corrected(df: pd.DataFrame, parts: np.ndarray, columns: list[str]) -> np.ndarray:
    score = np.empty(len(df))
    x = df.assign(gap=(df.score - df.partner).abs())[columns].to_numpy()
    for k in np.unique(parts):
        inside = parts == k
        score[inside] = LinearRegression().fit(x[~inside], df.diagnosis[~inside]).predict(x[inside])
    return score


def main() -> None:
    run, node, pattern = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    df, parts = read_oof(run, node)
    df = with_partner(df.assign(part=parts), pattern)
    parts = df.part.to_numpy()
    same = (df.groupby('patient').diagnosis.nunique() == 1).mean()
    say(f'{run.name}/{node}: {len(df)} images of {df.patient.nunique()} patients; both eyes have the same grade in '
        f'{100 * same:.0f} % of them; correlation of the two scores {np.corrcoef(df.score, df.partner)[0, 1]:.2f}')
    scores = {'own score': corrected(df, parts, ['score']),
              'with the partner': corrected(df, parts, ['score', 'partner', 'gap'])}
    grades = {name: cross_fitted_grades(s, df.diagnosis, parts, 'regularised') for name, s in scores.items()}
    rows = [[name, f'{quadratic_kappa(grades[name], df.diagnosis):.3f}', f'{auc(s, df.diagnosis >= 2)[0]:.3f}',
             f'{np.abs(s - df.diagnosis).mean():.3f}'] for name, s in scores.items()]
    table('second eye', ['score', 'kappa', 'AUC referable', 'mean absolute error'], rows)
    a, b = grades.values()
    for what, (value, low, high) in (('kappa', paired_interval(a, b, df.diagnosis, df.patient)),
                                     ('AUC', paired_auc(*scores.values(), df.diagnosis >= 2, df.patient))):
        say(f'difference of {what}: {value:+.3f} (95 % CI over patients {low:+.3f} to {high:+.3f})')


if __name__ == '__main__': main()
