"Test-time augmentation (TTA): the views of an image, and the mean of their scores."
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from aptos_fastai.training.networks import features_and_scores

VIEWS = dict(none=1, hflip=2, d4=8)          # number of views for each value of `tta`


def views(x: torch.Tensor, tta: str) -> Iterator[torch.Tensor]:
    """Yield the views of a batch (N, C, H, W).

    `tta` = none: the batch itself; hflip: also its mirror image; d4: all 8 rotations and mirror images of the square.
    """
    yield x
    if tta == 'none': return
    yield x.flip(-1)
    if tta == 'hflip': return
    for quarter_turns in (1, 2, 3):
        rotated = x.rot90(quarter_turns, (-2, -1))
        yield rotated
        yield rotated.flip(-1)


def undo_view(x: torch.Tensor, i: int) -> torch.Tensor:
    "Turn maps (..., H, W) of the `i`-th view back to the orientation of the image"
    if i % 2: x = x.flip(-1)
    return x.rot90(-(i // 2), (-2, -1))


def view_scores(net: torch.nn.Module, x: torch.Tensor, tta: str) -> tuple[np.ndarray, np.ndarray]:
    "Return the scores (N, views) float32 of a batch (N, C, H, W), and the pooled features (N, C) of its first view"
    first, *others = views(x, tta)
    features, score = features_and_scores(net, first)
    scores = [score, *(features_and_scores(net, v)[1] for v in others)]
    return torch.stack([s.float() for s in scores], 1).cpu().numpy(), features.float().cpu().numpy()


def mean_and_sd(parts: Sequence[tuple[float, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the weighted mean (n,) of scores and their standard deviation (n,) over all views, members and folds.

    `parts` holds (weight, mean, standard deviation) of each member or fold. Weights need not add up to 1.
    """
    weights = np.array([w for w, _, _ in parts])[:, None] / sum(w for w, _, _ in parts)
    means = np.stack([m for _, m, _ in parts])
    sds = np.stack([sd for _, _, sd in parts])
    mean = (weights * means).sum(0)
    variance = (weights * (sds ** 2 + (means - mean) ** 2)).sum(0)
    return mean, np.sqrt(variance)
