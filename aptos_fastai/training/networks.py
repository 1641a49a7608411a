"Networks: any timm network as a body, pooling, and the units of a loss."
from collections.abc import Callable
from math import isqrt
from typing import Any

import timm
import torch
from fastai.vision.all import Module
from torch import Tensor, nn

from aptos_fastai.recipe.values import check_choice
from aptos_fastai.training.outputs import outputs
from aptos_fastai.training.weights import WeightsError, check_arch

# Maps are signed if they have lower values. The lowest value of GELU is -0.17, of SiLU -0.28, of Hardswish -0.38, of
# NFNet's scaled SiLU -0.5; after LayerNorm it is about -4.
SIGNED = -.55


class GeM(Module):
    """Generalised mean pooling (Radenović et al. 2018, arXiv:1711.02512): (mean of x^p)^(1/p) with p learned.

    (N, C, H, W) -> (N, C, 1, 1). p=1 is the mean, large p the maximum. `p` is held to 1-6: at p=8 a dead channel has
    NaN gradients. It is a float32 tensor, which lifts half-precision inputs to float32. Values below 0 count as 0.
    """
    def __init__(self, p: float = 3., eps: float = 1e-6):
        self.p, self.eps = nn.Parameter(torch.full((1,), float(p))), eps

    def forward(self, x: Tensor) -> Tensor:
        p = self.p.clamp(1., 6.)
        return x.clamp(min=self.eps).pow(p).mean((-2, -1), keepdim=True).pow(1 / p)


# to add one: a line here, its name in recipe.Stage.head
heads: dict[str, Callable[[], nn.Module]] = dict(gem=GeM, avg=lambda: nn.AdaptiveAvgPool2d(1), cls=nn.Identity)


class TimmBody(Module):
    """A timm network without its classifier: images (N, 3, `size`, `size`) -> feature maps (N, C, h, w).

    Maps with channels last are permuted; tokens become maps without their prefix tokens (class and register tokens);
    of several maps the last one is taken. With `class_token`: that of a transformer (N, C, 1, 1), as a map. Raises
    `WeightsError`.
    """
    def __init__(self, arch: str, size: int, drop_path: float = 0., class_token: bool = False):
        check_arch(arch)
        self.model: Any = build_timm(arch, size, drop_path)       # each family has its own methods
        self.takes_class_token = class_token
        if class_token and getattr(self.model, 'cls_token', None) is None:
            raise WeightsError(f'head = cls: {arch} has no class token. Set head = avg or auto.')

    def timm_features(self, x: Tensor) -> Any:
        "Return what timm's network gives: maps, tokens, or a list of them"
        return self.model.forward_features(x) if self.model.pools_always else self.model(x)

    def forward(self, x: Tensor) -> Tensor:
        features = self.timm_features(x)
        return class_token(features) if self.takes_class_token else as_maps(features, self.model)


def build_timm(arch: str, size: int, drop_path: float = 0.) -> nn.Module:
    """Return timm's network `arch` with random weights, without classifier and pooling, for images of `size` pixels.

    Attribute `pools_always` says that it cannot be built without pooling. Raises `WeightsError`.
    """
    wanted: dict[str, Any] = dict(global_pool='', img_size=size)
    if drop_path: wanted['drop_path_rate'] = drop_path
    try: model = _create(arch, wanted)
    except Exception as e:                   # every family has its own errors
        if 'drop_path_rate' in str(e): raise _no_drop_path(arch, drop_path) from None
        raise WeightsError(f'arch = {arch}: timm cannot build it for size = {size} ({e}). Change size or arch.') from e
    if drop_path and not any(getattr(m, 'drop_prob', 0) for m in model.modules() if type(m).__name__ == 'DropPath'):
        raise _no_drop_path(arch, drop_path)
    patch = patch_side(model)
    if size % patch:
        lower = size // patch * patch
        raise WeightsError(f'arch = {arch}: size = {size} is no multiple of its patches of {patch} pixels: a border '
                           f'would not be seen. Set size = {lower} or {lower + patch}.')
    return model


def build_without_values(arch: str, size: int) -> nn.Module:
    "Return `build_timm`'s network on PyTorch's meta device, without values: that is quick and takes no memory"
    try:
        with torch.device('meta'): return build_timm(arch, size)
    except WeightsError: return build_timm(arch, size)       # a few compute while they are built; or says what is wrong


def _no_drop_path(arch: str, drop_path: float) -> WeightsError:
    return WeightsError(f'drop_path = {drop_path:g}: {arch} has no drop path. Set drop_path = 0.')


def patch_side(model: nn.Module) -> int:
    "Return the side of the patches that a network cuts an image into, pixels; 1 if they overlap or there are none"
    embed = getattr(model, 'patch_embed', None)
    side = getattr(embed, 'patch_size', None)
    projection = getattr(embed, 'proj', None)
    overlaps = isinstance(projection, nn.Conv2d) and projection.stride != projection.kernel_size
    return 1 if overlaps or not isinstance(side, tuple) or len(side) != 2 else side[0]


def _create(arch: str, wanted: dict[str, Any]) -> nn.Module:
    "Create a network with the options among `wanted` that its family has"
    try: model: Any = timm.create_model(arch, pretrained=False, num_classes=0, **wanted)
    except TypeError as e:                   # convolutional networks take any size
        if 'img_size' not in wanted or 'img_size' not in str(e): raise
        return _create(arch, {k: v for k, v in wanted.items() if k != 'img_size'})
    except AssertionError:                   # 'Only token or avg pooling is supported'
        if 'global_pool' not in wanted: raise
        model = _create(arch, {k: v for k, v in wanted.items() if k != 'global_pool'})
        model.pools_always, model.head = True, nn.Identity()       # what pools has weights of its own in some
        return model
    model.pools_always = False
    return model


def prefix_tokens(tokens: int, model: nn.Module) -> int:
    "Return how many of the `tokens` of a network or layer come before those of the patches of a square image"
    known = getattr(model, 'num_prefix_tokens', None) or 0
    return next(k for k in (known, *range(tokens)) if isqrt(tokens - k) ** 2 == tokens - k)


def as_maps(x: Any, model: nn.Module) -> Tensor:
    """Return features of a timm network, or of a layer of it, as maps (N, C, h, w) of a square image.

    They may be maps, maps with channels last, tokens, or a list of these, of which the last one is taken.
    """
    if isinstance(x, list | tuple): x = x[-1]
    if x.ndim == 3:
        patches = x[:, prefix_tokens(x.shape[1], model):]
        side = isqrt(patches.shape[1])
        return patches.transpose(1, 2).unflatten(2, (side, side))
    if x.ndim != 4: return x                 # no maps: `create_model` refuses them
    channels_last = getattr(model, 'output_fmt', 'NCHW') == 'NHWC' or x.shape[1] == x.shape[2] != x.shape[3]
    return x.permute(0, 3, 1, 2) if channels_last else x


def class_token(x: Any) -> Tensor:
    "Return the class token of a timm network's tokens (N, L, C) as maps (N, C, 1, 1)"
    if isinstance(x, list | tuple): x = x[-1]
    return x[:, 0, :, None, None]


class GradeHead(nn.Sequential):
    "Pooling and output units: feature maps (N, C, h, w) -> outputs (N, units of `loss`)"
    def __init__(self, pooling: str, channels: int, dropout: float, loss: str):
        super().__init__(heads[pooling](), nn.Flatten(), nn.Dropout(dropout), nn.Linear(channels, outputs[loss].units))
        self.pooling, self.loss = pooling, loss

    @property
    def channels(self) -> int:
        "Number of pooled features, C"
        units: Any = self[3]
        return units.in_features

    def features(self, maps: Tensor) -> Tensor:
        "Return the pooled features (N, C)"
        return self[1](self[0](maps))

    def scores(self, features: Tensor) -> Tensor:
        "Return the scores (N,) of pooled features (N, C)"
        return outputs[self.loss].score(self[3](self[2](features)))


def create_model(arch: str, head: str = 'gem', size: int = 256, dropout: float = 0., loss: str = 'smooth_l1',
                 drop_path: float = 0.) -> nn.Sequential:
    """Create Sequential(body, head) with random weights: images (N, 3, `size`, `size`) -> outputs (N, units of `loss`).

    `arch` is a timm network. `head` is one of `heads`, or auto: gem, or avg where the maps are signed. Raises
    `WeightsError`.
    """
    check_choice(head, [*heads, 'auto'], f'head = {head}: no such head')
    check_choice(loss, outputs, f'loss = {loss}: no such loss')
    body = TimmBody(arch, size, drop_path, head == 'cls')
    try:
        if head == 'auto': head = 'avg' if has_signed_maps(body, size) else 'gem'
        with torch.no_grad(): maps = body.eval()(torch.zeros(1, 3, size, size))
        class_tokens_only = head != 'cls' and maps.shape[-1] == 1 and gives_class_tokens_only(body, size)
    except Exception as e:                   # every family has its own errors
        raise WeightsError(f'arch = {arch}: cannot run on images of size = {size} ({_first_line(e)}). Change size or '
                           'arch.') from e
    if class_tokens_only:
        raise WeightsError(f'arch = {arch}: gives its class token only, no feature maps to pool. Set head = cls.')
    if maps.ndim != 4 or maps.shape[-1] != maps.shape[-2]:
        raise WeightsError(f'arch = {arch}: gives features of shape {tuple(maps.shape)}, which are no feature maps. '
                           'Choose another arch.')
    return nn.Sequential(body.train(), GradeHead(head, maps.shape[1], dropout, loss))


@torch.no_grad()
def gives_class_tokens_only(body: TimmBody, size: int) -> bool:
    "Return whether a network drops the tokens of the patches, as PiT: a class token would pass for a map of one pixel"
    token = getattr(body.model, 'cls_token', None)
    if token is None: return False
    x = body.timm_features(torch.zeros(1, 3, size, size))
    if isinstance(x, list | tuple): x = x[-1]
    return x.ndim == 3 and x.shape[1] <= token.shape[1]


def _first_line(e: Exception) -> str: return (str(e).splitlines() or [type(e).__name__])[0]


@torch.no_grad()
def has_signed_maps(body: nn.Module, size: int) -> bool:
    """Return whether feature maps have large values below 0, as after a final LayerNorm; GeM would drop them.

    The body runs on two images of noise, with the statistics of this batch; its own statistics and the random state
    stay as they were.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = {k: v.clone() for k, v in body.named_buffers()}
        maps = body.train()(torch.randn(2, 3, size, size)).float()
        for name, buffer in body.named_buffers(): buffer.copy_(state[name])
    return float(maps.min()) < SIGNED


def features_and_scores(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    "Return the pooled features (N, C) and the scores (N,) of images (N, 3, H, W), from one pass of `create_model`'s"
    body, head = model
    features = head.features(body(x))
    return features, head.scores(features)
