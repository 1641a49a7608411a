"Metrics of a model by the values of a column: site, camera, sex, age. Marks the values where they differ."
from collections.abc import Iterable

import numpy as np
import pandas as pd

from aptos_fastai.inference.measures import auc_of, detected, kappa_of, measure
from aptos_fastai.metrics import DIFFERENCES, REFERABLE, subgroup_differences

MIN_IMAGES = 30                              # of a subgroup, and of the other images, that are compared
MIN_OF_CLASS = 10                            # referable and other images on both sides, for a comparison of AUC
MAX_VALUES = 20                              # of a column; with more it gives no subgroups
TOO_MANY = f'more than {MAX_VALUES} values'
MAX_NUMBERS = 10                             # different numbers in a column; more become quartiles
ALPHA = .05                                  # of all comparisons together (Bonferroni)
UNKNOWN = 'unknown'


def subgroup_results(df: pd.DataFrame, columns: Iterable[str]) -> list[dict]:
    """Return a dict for each of `columns`: `column`, `note`, and `values` with metrics and differences.

    `df` (score, grade, called, diagnosis, group and `columns`) are the evaluated images; those `called` are referable
    by the model. A value `differs` in a metric if the interval of its difference from the other images excludes 0, at
    1 - `ALPHA` / the number of comparisons.
    """
    labels = {column: subgroup_labels(df[column]) for column in columns}
    inside = {(column, name): (label == name).to_numpy() for column, label in labels.items() for name in _names(label)}
    compared = [key for key, rows in inside.items() if min(rows.sum(), (~rows).sum()) >= MIN_IMAGES]
    tests = len(DIFFERENCES) * sum(_comparisons(label, column, compared) for column, label in labels.items())
    level = 1 - ALPHA / max(tests, 1)
    results = []
    for column, label in labels.items():
        note = '' if len(label) else f'one value, or more than {MAX_VALUES}: no subgroups'
        values = [dict(name=name, **subgroup_metrics(df[inside[column, name]]),
                       **_differences(df, inside[column, name], level if (column, name) in compared else None))
                  for name in _names(label)]
        results.append(dict(column=column, note=note, values=values))
    return results


def _comparisons(label: pd.Series, column: str, compared: list[tuple[str, str]]) -> int:
    "Return how many subgroups of a column are compared; two that are each other's rest are one comparison"
    n = sum(name == column for name, _ in compared)
    return 1 if n == 2 == len(_names(label)) else n


def subgroup_labels(values: pd.Series) -> pd.Series:
    """Return the subgroup of each image, an ordered category; empty if a column has one value or too many.

    More than `MAX_NUMBERS` different numbers become quartiles; an empty cell is `UNKNOWN`.
    """
    text = _stripped(values)
    number = pd.to_numeric(text.where(text != ''), errors='coerce').replace([np.inf, -np.inf], np.nan)
    if number.notna().equals(text != '') and number.nunique() > MAX_NUMBERS: text = _quartiles(number)
    counts = text.replace('', UNKNOWN).value_counts()
    if not 1 < len(counts) <= MAX_VALUES: return pd.Series([], dtype='category')
    order = sorted(counts.index, key=lambda o: (o == UNKNOWN, _first_number(o), -counts[o], o))
    return text.replace('', UNKNOWN).astype(pd.CategoricalDtype(order, ordered=True))


def subgroup_counts(values: pd.Series) -> dict[str, int]:
    "Return how many images have each value of a column, or range of numbers; of too many values how many have any"
    labels = values_or_subgroups(values)
    if not len(labels): return {TOO_MANY: len(values)}
    return {str(name): int(n) for name, n in labels.value_counts().items()}


def values_or_subgroups(values: pd.Series) -> pd.Series:
    "Return the value of each image if a column has few, else its `subgroup_labels`"
    text = _stripped(values).replace('', UNKNOWN)
    return text if text.nunique() <= MAX_VALUES else subgroup_labels(values)


def _stripped(values: pd.Series) -> pd.Series: return values.fillna('').astype(str).str.strip()


def _quartiles(number: pd.Series) -> pd.Series:
    "Return the quartile of each number as text, 'LOWEST to HIGHEST'; '' where there is none"
    quarter = pd.qcut(number, 4, duplicates='drop')
    ends = number.groupby(quarter, observed=True)
    return (ends.transform('min').map('{:g}'.format) + ' to ' + ends.transform('max').map('{:g}'.format)).where(
        number.notna(), '')


def _first_number(text: str) -> float:
    try: return float(text.split(' to ')[0])
    except ValueError: return np.inf


def _names(label: pd.Series) -> list[str]: return list(label.cat.categories)


def subgroup_metrics(df: pd.DataFrame) -> dict:
    "Return a subgroup's kappa, AUC, sensitivity and specificity of the images `called` referable, and mean error"
    found = detected(df, df.called, REFERABLE)
    return dict(images=len(df), kappa=kappa_of(df, df.grade), auc=auc_of(df, REFERABLE), **found,
                mean_error=measure((df.score - df.diagnosis).mean(), None, len(df)))


def _differences(df: pd.DataFrame, inside: np.ndarray, level: float | None) -> dict:
    "Return the differences of a subgroup from the other images at a level, and which exclude 0; None: not compared"
    if level is None: return dict(differences={}, differs=[], level=None)
    found = subgroup_differences(df.score, df.grade, df.diagnosis, inside, df.group, level=level)
    sides = [df.diagnosis[rows] for rows in (inside, ~inside)]
    if min(o.nunique() for o in sides) < 2: del found['kappa']
    if min(min((o >= REFERABLE).sum(), (o < REFERABLE).sum()) for o in sides) < MIN_OF_CLASS: del found['auc']
    kept = {name: found[name] for name in DIFFERENCES if name in found and np.isfinite(found[name]).all()}
    differs = [name for name, (_, low, high) in kept.items() if not low <= 0 <= high]
    differences = {name: dict(value=value, interval=[low, high]) for name, (value, low, high) in kept.items()}
    return dict(differences=differences, differs=differs, level=level)
