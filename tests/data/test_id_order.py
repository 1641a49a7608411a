"Whether ids are associated with the grade."
import numpy as np
import pandas as pd
import pytest

from aptos_fastai.data.id_order import compare_id_orders, compare_neighbours, id_order_text
from aptos_fastai.data.tables import read_table
from aptos_fastai.recipe.sections import Table

TABLE = Table('train', 'train.csv', 'train_images', grade='diagnosis')


def frame_of(ids, grades, groups=None):
    return pd.DataFrame(dict(id_code=ids, diagnosis=np.array(grades, float), group=ids if groups is None else groups))


def random_grades(n, seed=0):
    return np.random.default_rng(seed).choice(5, n, p=[.5, .1, .25, .05, .1])


def warning(frame, table=TABLE):
    return id_order_text(compare_id_orders(frame, 0), table)


def test_random_grades_give_no_warning():
    "A p-value of at most .01 is as rare as it says"
    tests = [t for seed in range(40) for t in compare_id_orders(frame_of([f'{i}' for i in range(200)],
                                                                         random_grades(200, seed)), 0)]
    assert sum(t.p <= .05 for t in tests) <= 10
    assert sum(t.is_related for t in tests) <= 3


def test_chance_is_the_sum_of_squared_shares():
    grades = np.repeat([0, 1, 2], [500, 300, 200])
    test = compare_neighbours('neighbouring ids', grades, 0)
    assert test.share == 997 / 999 and test.p == 1 / 1001
    assert test.chance == pytest.approx(.5**2 + .3**2 + .2**2, abs=.01)


def test_ids_in_the_order_of_grades_give_a_warning_in_any_row_order():
    df = frame_of([f'x{i}' for i in range(100)], np.repeat(range(5), 20)).sample(frac=1, random_state=0)
    text = warning(df)
    assert text.startswith('ids are associated with the grade: 96 % of neighbouring ids have equal grades, 19 % by '
                           'chance (p 0.001)')
    assert '[table.train] group = PATTERN' in text and 'block = 10' in text


def test_like_endings_give_a_warning():
    grades = random_grades(300) > 0
    df = frame_of([f'{i}_{"clinic" if g else "screening"}' for i, g in enumerate(grades)], grades)
    text = warning(df)
    assert 'ids with like endings have equal grades' in text and 'neighbouring' not in text.partition('.')[0]


def test_images_of_a_known_patient_are_no_neighbours():
    patients = np.repeat(np.arange(150), 2)
    grades = np.repeat(random_grades(150), 2)
    ids = [f'{p}_{side}' for p, side in zip(patients, ['left', 'right'] * 150, strict=True)]
    assert 'neighbouring ids' in warning(frame_of(ids, grades))
    assert warning(frame_of(ids, grades, patients)) == ''


@pytest.mark.parametrize('keys, words', [
    (dict(block=5), 'block to a larger number than 5'), (dict(group='(.)'), 'expect less on other images')])
def test_the_advice_knows_the_recipe(keys, words):
    table = Table('train', 'train.csv', 'train_images', grade='diagnosis', **keys)
    df = frame_of([f'x{i}' for i in range(100)], np.repeat(range(5), 20))
    assert words in warning(df, table) and 'PATTERN' not in warning(df, table)


def test_few_images_are_not_tested():
    assert compare_id_orders(frame_of(list('abcdef'), [0, 0, 0, 1, 1, 1]), 0) == []


def test_neighbouring_ids_of_idrid_have_equal_grades(idrid):
    test = compare_id_orders(read_table(TABLE, idrid), 0)[0]
    assert (round(test.share, 2), round(test.chance, 2), test.is_related) == (.47, .26, True)
