"Test-time augmentation (TTA): the views of an image, and the mean of their scores."
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from aptos_fastai.training.networks import features_and_scores

# Views for each value of `tta`: quarter turns, and whether the turned image is mirrored
TURNS = dict(none=[(0, False)], hflip=[(0, False), (0, True)], rot4=[(turns, False) for turns in range(4)],
             d4=[(turns, mirrored) for turns in range(4) for mirrored in (False, True)])
VIEWS = {tta: len(turns) for tta, turns in TURNS.items()}        # number of views


def views(x: torch.Tensor, tta: str) -> Iterator[torch.Tensor]:
    """Yield the views of a batch (N, C, H, W); the first one is the batch itself.

    `tta` = none: no other; hflip: also its mirror image; rot4: its 4 rotations; d4: their mirror images, too.
    """
    for turns, mirrored in TURNS[tta]:
        rotated = x.rot90(turns, (-2, -1)) if turns else x
        yield rotated.flip(-1) if mirrored else rotated


def undo_view(x: torch.Tensor, tta: str, i: int) -> torch.Tensor:
    "Turn maps (..., H, W) of the `i`-th view of `tta` back to the orientation of the image"
    turns, mirrored = TURNS[tta][i]
    if mirrored: x = x.flip(-1)
    return x.rot90(-turns, (-2, -1))


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
