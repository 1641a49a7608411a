"Losses and scores of a network's outputs, by loops over their definitions and by scikit-learn."
import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from conftest import ROOT
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from sklearn.metrics import log_loss
from torch import nn
from torch.utils.data import TensorDataset

from aptos_fastai.recipe.sections import Stage
from aptos_fastai.training.networks import heads
from aptos_fastai.training.outputs import GradeLoss, class_loss, class_score, corn_loss, corn_score, outputs


def sigmoid(x): return 1 / (1 + math.exp(-x))


def logits(n, units, scale=2.): return scale * torch.randn(n, units, generator=torch.Generator().manual_seed(units))


# CORN

def corn_by_subsets(rows, grades):
    "Task k is binary, of the images whose grade is at least k: is it above k? (Shi et al. 2021, section 3.4)"
    total = counted = 0
    for k in range(4):
        for row, grade in zip(rows, grades, strict=True):
            if grade < k: continue
            p = sigmoid(row[k])
            total -= math.log(p) if grade > k else math.log(1 - p)
            counted += 1
    return total / counted


def test_corn_loss_by_subsets():
    x, grades = logits(12, 4), torch.tensor([0., 1, 2, 3, 4, 0, 0, 4, 2, 1, 3, 0])
    assert corn_loss(x, grades).item() == pytest.approx(corn_by_subsets(x.tolist(), grades.tolist()), rel=1e-5)


def test_corn_loss_of_a_fraction_is_a_mixture_of_two_grades():
    "Sums of losses mix linearly; the mean divides by the number of tasks, which mixes, too"
    x = logits(1, 4)
    for low, part in ((0, .3), (1, .5), (3, .75)):
        tasks = [min(grade + 1, 4) for grade in (low, low + 1)]
        sums = [corn_by_subsets(x.tolist(), [grade]) * n for grade, n in zip((low, low + 1), tasks, strict=True)]
        want = ((1 - part) * sums[0] + part * sums[1]) / ((1 - part) * tasks[0] + part * tasks[1])
        assert corn_loss(x, torch.tensor([low + part])).item() == pytest.approx(want, rel=1e-5)


def test_corn_score_is_the_expected_grade():
    x = logits(20, 4)
    for row, score in zip(x.tolist(), corn_score(x).tolist(), strict=True):
        above = [1., *np.cumprod([sigmoid(v) for v in row]), 0.]            # P(grade > k - 1)
        probabilities = [above[k] - above[k + 1] for k in range(5)]
        assert sum(probabilities) == pytest.approx(1)
        assert score == pytest.approx(sum(k * p for k, p in enumerate(probabilities)), abs=1e-5)


# Classes

def test_class_loss_by_sklearn():
    x, grades = logits(15, 5), torch.arange(15) % 5
    want = log_loss(grades.numpy(), x.double().softmax(1).numpy(), labels=range(5))
    assert class_loss(x, grades.float()).item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize('grade', [.25, 1.5, 3.9])
def test_class_loss_of_a_fraction_is_a_mixture_of_two_grades(grade):
    x, low = logits(1, 5), int(grade)
    losses = [log_loss([k], x.double().softmax(1).numpy(), labels=range(5)) for k in (low, low + 1)]
    want = (low + 1 - grade) * losses[0] + (grade - low) * losses[1]
    assert class_loss(x, torch.tensor([grade])).item() == pytest.approx(want, rel=1e-5)


def test_class_score_is_the_expected_grade():
    x = logits(20, 5)
    for row, score in zip(x.tolist(), class_score(x).tolist(), strict=True):
        weights = [math.exp(v) for v in row]
        assert score == pytest.approx(sum(k * w for k, w in enumerate(weights)) / sum(weights), abs=1e-5)


# All of them

@pytest.mark.parametrize('name', ['corn', 'cross_entropy'])
@pytest.mark.parametrize('scale', [1., 50., 1e4])
def test_scores_stay_between_0_and_4_and_gradients_finite(name, scale):
    x, grades = logits(64, outputs[name].units, scale).requires_grad_(), torch.linspace(0, 4, 64)
    scores = outputs[name].score(x)
    assert 0 <= scores.min() and scores.max() <= 4
    (GradeLoss(name)(x, grades) + scores.sum()).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize('name', ['corn', 'cross_entropy'])
def test_extreme_logits_score_the_ends_of_the_scale(name):
    k, high = torch.arange(outputs[name].units), torch.full((1, outputs[name].units), 40.)
    ends = dict(corn=(-high, high), cross_entropy=(high * (k == 0), high * (k == 4)))
    assert [outputs[name].score(x).item() for x in ends[name]] == pytest.approx([0, 4], abs=1e-5)


@pytest.mark.parametrize('name', list(outputs))
def test_the_loss_is_lowest_at_outputs_that_mean_the_grade(name):
    "Descent on the loss of one grade ends at a score of this grade"
    x = torch.zeros(5, outputs[name].units, requires_grad=True)
    opt = torch.optim.Adam([x], .1)
    for _ in range(400):
        opt.zero_grad()
        GradeLoss(name)(x, torch.arange(5.)).backward()
        opt.step()
    assert outputs[name].score(x).tolist() == pytest.approx(range(5), abs=.05)


@pytest.mark.parametrize('name', list(outputs))
def test_half_precision_outputs_are_scored_like_their_float32_values(name):
    x = logits(9, outputs[name].units).to(torch.bfloat16)
    assert outputs[name].score(x).float().tolist() == pytest.approx(outputs[name].score(x.float()).tolist(), abs=1e-6)


@pytest.mark.parametrize('name', list(outputs))
def test_get_preds_gives_scores(name):
    inputs, grades = logits(10, 3), torch.arange(10.) % 5
    dl = torch.utils.data.DataLoader(TensorDataset(inputs, grades), batch_size=4)
    model = nn.Linear(3, outputs[name].units)
    learn = Learner(DataLoaders(dl, dl), model, loss_func=GradeLoss(name))
    with learn.no_bar(), learn.no_logging(): scores, targets = learn.get_preds(dl=dl)
    with torch.no_grad(): want = outputs[name].score(model(inputs))
    assert scores.flatten().tolist() == pytest.approx(want.tolist(), abs=1e-6)
    assert targets.flatten().tolist() == grades.tolist()


@pytest.mark.parametrize('name', outputs)
def test_losses_of_single_images(name):
    "fastai sets `reduction` for get_preds(with_loss=True) and Interpretation"
    loss, pred, grades = GradeLoss(name), logits(6, outputs[name].units), torch.tensor([0., 1, 2, 3, 4, 2.5])
    loss.reduction = 'none'
    losses = loss(pred, grades)
    assert losses.shape == (6,)
    assert losses[3] == outputs[name].loss(pred[3:4], grades[3:4])
    if name != 'corn': assert torch.allclose(losses.mean(), GradeLoss(name)(pred, grades))    # a mean over conditions


def test_every_head_and_loss_can_be_chosen_and_is_in_the_documents():
    "A head or loss that no recipe can name is none"
    keys = {f.name: f.metadata['choices'] for f in fields(Stage) if f.name in ('head', 'loss')}
    assert {*heads, 'auto'} == set(keys['head']) and set(outputs) == set(keys['loss'])
    page = (ROOT / 'docs/networks.md').read_text(encoding='utf-8')
    for name in heads: assert f'`{name}`' in page, name
