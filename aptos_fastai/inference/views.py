"Test-time augmentation views."
import torch

VIEWS = dict(none=1, hflip=2, d4=8)


def views(x: torch.Tensor, tta: str):
    "The views of a batch (N, C, H, W) that a prediction is the mean of: itself; with its mirror; the 8 of the square's symmetry (D4)"
    yield x
    if tta == 'none': return
    yield x.flip(-1)
    if tta == 'hflip': return
    for k in (1, 2, 3):
        r = x.rot90(k, (-2, -1))
        yield r
        yield r.flip(-1)


def unview(x: torch.Tensor, i: int) -> torch.Tensor:
    "Maps (..., H, W) of the `i`-th view turned back to how the image stands"
    return (x.flip(-1) if i % 2 else x).rot90(-(i // 2), (-2, -1))
