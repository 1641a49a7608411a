"Test whether the order or the likeness of image ids tells the grade."
from dataclasses import dataclass

import numpy as np
import pandas as pd

from aptos_fastai.data.grades import read_grade
from aptos_fastai.data.groups import natural_order
from aptos_fastai.recipe.sections import Table

DRAWS = 1_000                                # permutations
MOST_IMAGES = 50_000                         # of a larger table, this many neighbouring images are tested
MAX_P = .01                                  # a warning needs a p-value of at most this …
CLASS_FOLDERS = .95                          # of the images lie in folders of their grade, if these are of classes
MIN_EXCESS = .03                             # … and at least this share of neighbours more than by chance
ORDERS = {
    'neighbouring ids': 'in natural order (2 before 10)',
    'ids with like endings': 'in the order of the reversed ids',
}


@dataclass(frozen=True)
class NeighbourTest:
    "How many neighbours in an order of ids have equal grades: observed, and by chance; p-value of the permutation test"
    order: str
    share: float
    chance: float
    p: float

    @property
    def is_related(self) -> bool:
        "Whether more neighbours have equal grades than chance and a margin explain"
        return self.p <= MAX_P and self.share - self.chance >= MIN_EXCESS


def compare_neighbours(order: str, grades: np.ndarray, seed: int) -> NeighbourTest:
    "Compare the share of equal neighbours in `grades` with that in `DRAWS` random orders of them"
    grades = grades[:MOST_IMAGES].astype(np.int8)
    rng = np.random.default_rng(seed)
    equal = (grades[1:] == grades[:-1]).mean()
    by_chance = np.empty(DRAWS)
    for k in range(DRAWS):
        shuffled = rng.permutation(grades)
        by_chance[k] = (shuffled[1:] == shuffled[:-1]).mean()
    p = (1 + (by_chance >= equal).sum()) / (1 + DRAWS)
    return NeighbourTest(order, float(equal), float(by_chance.mean()), float(p))


def compare_id_orders(frame: pd.DataFrame, seed: int) -> list[NeighbourTest]:
    """Return the test of both `ORDERS` for a graded table; an empty list for fewer than 20 groups.

    Takes one image of each group (patient, block): neighbours inside a group share a fold already.
    """
    frame = frame.assign(id_code=_without_class_folders(frame))
    natural = frame.iloc[natural_order(frame.id_code)].drop_duplicates('group')
    if len(natural) < 20: return []
    by_ending = natural.iloc[np.argsort(natural.id_code.str[::-1].to_numpy(), kind='stable')]
    return [compare_neighbours(order, rows.diagnosis.to_numpy(), seed)
            for order, rows in zip(ORDERS, (natural, by_ending), strict=True)]


def _without_class_folders(frame: pd.DataFrame) -> pd.Series:
    "Return the ids without their folders, if these are named by the grades"
    folder, _, name = (frame.id_code.str.rpartition('/')[i] for i in range(3))
    named = folder.str.rpartition('/')[2].map(read_grade)
    return name if (named == frame.diagnosis).mean() >= CLASS_FOLDERS else frame.id_code


def id_order_text(tests: list[NeighbourTest], table: Table) -> str:
    "Return a warning that ids are associated with the grade, with what to do, or an empty text"
    related = [f'{100 * t.share:.0f} % of {t.order} have equal grades, {100 * t.chance:.0f} % by chance (p {t.p:.3f})'
               for t in tests if t.is_related]
    if not related: return ''
    section = f'[table.{table.name}]'
    advice = (f'Set {section} group = PATTERN if the ids contain the patient, or block = 10 to keep neighbouring ids '
              'in one fold.')
    if table.block: advice = f'Set {section} block to a larger number than {table.block}.'
    if table.grouped_by == 'patients':
        advice = 'The ids may follow the clinic or the grade: expect less on other images.'
    return f'ids are associated with the grade: {"; ".join(related)}. {advice}'
