"What a network puts out, its loss, and the score it stands for."
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aptos_fastai.metrics import GRADES


def _grade(outputs: Tensor) -> Tensor:
    "Return the scores (N,) of a single unit (N, 1) that estimates the grade"
    return outputs[:, 0]


def corn_score(outputs: Tensor) -> Tensor:
    "Return the expected grades (N,) of CORN's logits (N, 4): the sum of the probabilities of a grade above 0, 1, 2, 3"
    above = outputs.float().sigmoid()
    score = torch.zeros_like(above[:, 0])
    for k in reversed(range(GRADES - 1)): score = above[:, k] * (1 + score)      # ONNX lacks cumprod
    return score


def class_score(outputs: Tensor) -> Tensor:
    "Return the expected grades (N,) of the logits (N, 5) of the grades"
    grades = torch.arange(GRADES, device=outputs.device, dtype=torch.float32)
    return (outputs.float().softmax(1) * grades).sum(1)


def _smooth_l1(outputs: Tensor, grades: Tensor) -> Tensor: return F.smooth_l1_loss(outputs[:, 0], grades)


def _mse(outputs: Tensor, grades: Tensor) -> Tensor: return F.mse_loss(outputs[:, 0], grades)


def corn_loss(outputs: Tensor, grades: Tensor) -> Tensor:
    """Return CORN's loss (Shi et al. 2021, arXiv:2111.08851) of logits (N, 4) for grades (N,).

    Logit k is of the probability that the grade is above k, among the images whose grade is above k - 1. A fractional
    grade (a soft label) counts as a mixture of the two grades beside it.
    """
    above = grades.clamp(0, GRADES - 1)[:, None] - torch.arange(GRADES - 1, device=grades.device)
    positive, counted = above.clamp(0, 1), (above + 1).clamp(0, 1)
    loss = counted * F.softplus(outputs) - positive * outputs
    return loss.sum() / counted.sum()


def class_loss(outputs: Tensor, grades: Tensor) -> Tensor:
    "Return the cross-entropy of logits (N, 5) for grades (N,); a fractional grade is a mixture of the two beside it"
    distance = (grades.clamp(0, GRADES - 1)[:, None] - torch.arange(GRADES, device=grades.device)).abs()
    return F.cross_entropy(outputs, (1 - distance).clamp(min=0))


@dataclass(frozen=True)
class Output:
    "How many units a network has for a loss, the loss of outputs (N, units) and grades (N,), and outputs -> scores"
    units: int
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor], Tensor]


# to add one: a line here, its name in recipe.Stage.loss
outputs = dict(
    smooth_l1=Output(1, _smooth_l1, _grade),
    mse=Output(1, _mse, _grade),
    corn=Output(GRADES - 1, corn_loss, corn_score),
    cross_entropy=Output(GRADES, class_loss, class_score))


class GradeLoss(nn.Module):
    """A loss of `outputs` by name, as fastai's Learner calls it.

    `activation` turns outputs (N, units) into scores (N, 1), so that `learn.get_preds` returns scores. fastai sets
    `reduction` to none for the losses (N,) of single images: `get_preds(with_loss=True)`, `Interpretation`.
    """
    def __init__(self, name: str):
        super().__init__()
        self.name, self.reduction = name, 'mean'

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        "Return the loss of outputs (N, units) for grades (N,) or (N, 1)"
        grades = target.as_subclass(Tensor).float().flatten()
        pred, loss = pred.as_subclass(Tensor).float(), outputs[self.name].loss
        if self.reduction != 'none': return loss(pred, grades)
        return torch.stack([loss(pred[i:i + 1], grades[i:i + 1]) for i in range(len(grades))])

    def activation(self, pred: Tensor) -> Tensor:
        "Return the scores (N, 1) of outputs (N, units)"
        return outputs[self.name].score(pred.as_subclass(Tensor))[:, None]

    def decodes(self, scores: Tensor) -> Tensor:
        "Return scores as they are: thresholds make grades of them"
        return scores
