"Read files of weights from anywhere, and fit their tensors to a timm network: names, layouts, sizes."
import contextlib
import io
import json
import re
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from inspect import signature
from math import prod
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.layers import (
    resample_abs_pos_embed,
    resample_abs_pos_embed_nhwc,
    resample_patch_embed,
    resize_rel_pos_bias_table,
)
from torch import Tensor, nn

from aptos_fastai.common.io import AptosError

Tensors = dict[str, Tensor]

# Parts of a checkpoint, first the one that is taken if several fit: averages of weights before the weights themselves
PARTS = 'state_dict_ema', 'model_ema', 'ema_model', 'ema', 'teacher', '', 'model', 'state_dict', 'student'
# First parts of the names of what a file may hold beside the body: classifiers, decoders, heads of a pretraining
LEFT_OVER = re.compile(r'(\w+_)?(heads?|head_dist|classifier|fc|last_linear|fc_norm|mask_token|attn_pool|pre_logits'
                       r'|pred|predictor|projectors?|queue|queue_ptr|local_cls_norm)|decoder\w*|aux\w*')
NO_WEIGHT = 'num_batches_tracked'            # batch norm counts without it
# Ends of names of what networks make themselves, and of what profilers add
NO_WEIGHTS = NO_WEIGHT, 'relative_position_index', 'relative_coords_table', 'attn_mask', 'total_ops', 'total_params'
OCT = re.compile(r'(?<![a-z])(nature)?oct(?![a-z])')
FUNDUS = re.compile(r'cfp|fundus|colou?r')
OCTOBER = re.compile(r'\d{1,4}[-_ ./]?oct(?![a-z])|(?<![a-z])oct[-_ ./]\d{1,2}(?!\d)')          # 2024-Oct-05, oct_12
# Arguments that say what a network was trained on, and those that only say where its training wrote
OF_IMAGES = re.compile(r'data|image|modality|fine_?tune|pretrain|train_')
OF_OUTPUT = re.compile(r'(^|_)(out|log|save|tag|time|date)')


class WeightsError(AptosError):
    "Weights unavailable or incompatible with the network: the message says what to set"


class Ignored:
    """Stand-in for an object beside the weights: arguments, numbers, paths. It keeps what was saved and runs nothing.

    So a file with such objects loads with `weights_only`: none of their classes' code is called.
    """
    state: Any = None

    def __new__(cls, *_args: Any) -> 'Ignored': return object.__new__(cls)

    def __init__(self, *_args: Any): pass

    def __setstate__(self, state: Any) -> None: self.state = state


IGNORED = ('argparse.Namespace', 'types.SimpleNamespace', 'numpy.dtype', 'numpy.core.multiarray.scalar',
           'numpy._core.multiarray.scalar', 'pathlib.PosixPath', 'pathlib.WindowsPath', 'pathlib._local.PosixPath',
           'pathlib._local.WindowsPath')


@dataclass
class Loaded:
    "What was loaded from a file into a body"
    file: str                                # its name
    tensors: int                             # of the body
    sha256: str = ''                         # of the file
    part: str = ''                           # of the checkpoint, and the prefix of its names
    renamed: dict[str, str] = field(default_factory=dict)          # in the file -> in the network, by its first part
    resampled: dict[str, list[list[int]]] = field(default_factory=dict)      # name -> shape in the file, in the network
    left_over: dict[str, int] = field(default_factory=dict)        # first part of a name -> number of tensors

    def record(self) -> dict:
        "Return what a fold's record says"
        return asdict(self)

    @property
    def text(self) -> str:
        "All of it in one line"
        words = [f'{self.tensors} tensors' + (f' from {self.part}' if self.part else '')]
        words += [f'{old} renamed {new}' for old, new in self.renamed.items()]
        resampled = [f'{name} resampled from {_size(a)} to {_size(b)}' for name, (a, b) in self.resampled.items()]
        words += resampled[:2]
        if len(resampled) > 2: words[-1] += f' and {len(resampled) - 2} more'
        if self.left_over:
            names = ', '.join(f'{name} ({n})' for name, n in self.left_over.items())
            words.append(f'{sum(self.left_over.values())} left over: {names}')
        return f'weights = {self.file}: {"; ".join(words)}'


def _size(shape: Iterable[int]) -> str: return 'x'.join(map(str, shape))


# Reading

def read_checkpoint(file: str) -> Any:
    "Return the content of a safetensors or PyTorch file without running code of it. Raises `WeightsError`"
    try:
        if file.endswith('.safetensors'): return load_file(file)
        with torch.serialization.safe_globals([(Ignored, name) for name in IGNORED]):
            return torch.load(file, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(file) or None)
    except (FileNotFoundError, IsADirectoryError):
        raise WeightsError(f'weights = {file}: no such file. Set imagenet, bundled, none or a file.') from None
    except Exception as e:                   # each loader has its own errors for a damaged or foreign file
        other = _no_weights(file)
        if other: raise WeightsError(f'weights = {file}: {other}. Download it again.') from None
        reason, advice = type(e).__name__, 'Save a state dict with safetensors or torch.save.'
        unknown = re.search(r'GLOBAL (\S+)', str(e))
        if unknown: reason, advice = f'it needs code: {unknown[1]}', 'Where it was made, save its state dict alone.'
        raise WeightsError(f'weights = {file}: not a safetensors or weights-only PyTorch file ({reason}). '
                           f'{advice}') from None


def _no_weights(file: str) -> str:
    "Return what a file is that a download left in place of weights, or an empty string"
    with open(file, 'rb') as f: start = f.read(200).lstrip().lower()
    if not start: return 'is empty'
    if start.startswith((b'<!doctype', b'<html', b'<?xml', b'<head')): return 'is a web page, not the file itself'
    if start.startswith(b'version https://git-lfs'): return 'is a Git LFS pointer, not the file itself'
    is_cut_off = file.endswith('.safetensors') and _is_cut_off(file) or \
        start.startswith(b'pk') and not zipfile.is_zipfile(file)
    return 'is cut off: its end is missing' if is_cut_off else ''


def _is_cut_off(file: str) -> bool:
    "Return whether a safetensors file is shorter than its header says"
    with open(file, 'rb') as f:
        length = int.from_bytes(f.read(8), 'little')
        try: header = json.loads(f.read(min(length, 100_000_000)))
        except ValueError: return 8 + length > Path(file).stat().st_size and length < 100_000_000
    ends = [o['data_offsets'][1] for o in header.values() if isinstance(o, dict) and 'data_offsets' in o]
    return 8 + length + max(ends, default=0) > Path(file).stat().st_size


def check_modality(file: str, content: Any) -> str:
    """Return a warning if a file's name or arguments say OCT (optical coherence tomography), else an empty string.

    Raises `WeightsError` if the arguments that name the images of its training say so, and none names fundus images.
    """
    arguments = _arguments(content)
    name = Path(file).name
    if any(FUNDUS.search(text.lower()) for text in arguments.values()): return ''
    use = 'Use the weights of fundus images (CFP)'
    said = {key: value for key, value in arguments.items()
            if OCT.search(OCTOBER.sub('', value.lower())) and not OF_OUTPUT.search(key.lower())}
    for key in (key for key in said if OF_IMAGES.search(key.lower())):
        raise WeightsError(f'weights = {file}: trained on OCT scans, not on fundus images ({key} = {said[key]}). '
                           f'{use}. If that is wrong, save the state dict alone.')
    if said:
        key = next(iter(said))
        return f'weights = {file}: perhaps trained on OCT scans ({key} = {said[key]}). {use} instead.'
    if not OCT.search(OCTOBER.sub('', name.lower())) or FUNDUS.search(name.lower()): return ''
    return f'weights = {file}: by its name trained on OCT scans. {use} instead.'


def _arguments(content: Any) -> dict[str, Any]:
    "Return the texts among the arguments that a checkpoint holds beside its weights"
    if not isinstance(content, Mapping): return {}
    found: dict[str, Any] = {}
    for key in ('args', 'config', 'cfg', 'hyper_parameters'):
        value = content.get(key)
        if isinstance(value, Ignored): value = value.state
        if isinstance(value, Mapping): found |= {str(k): v for k, v in value.items() if isinstance(v, str)}
    return found


def tensor_dicts(content: Any, path: str = '', depth: int = 3) -> dict[str, Tensors]:
    "Return the dictionaries of tensors in a checkpoint by their paths, such as model, the preferred ones first"
    if not isinstance(content, Mapping) or not depth: return {}
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    found = {path: tensors} if tensors else {}
    for key, value in content.items():
        if isinstance(key, str): found |= tensor_dicts(value, f'{path}.{key}'.strip('.'), depth - 1)

    return {path: found[path] for path in sorted(found, key=partial(_preference, unknown=len(PARTS)))}


def _preference(name: str, unknown: int) -> int:
    "Return the place in `PARTS` of a part or prefix, as model.ema: of its first if that is an average, else its last"
    known = [PARTS.index(part) for part in name.split('.') if part in PARTS] if name else [PARTS.index('')]
    average = min(known, default=unknown)
    return average if average < PARTS.index('') else max(known, default=unknown)


def prefixes(names: Collection[str], wanted: Collection[str]) -> list[str]:
    """Return the beginnings, such as module., that at least half as many `names` share as names are `wanted`.

    '' is one of them. First come those after which most of the rest is wanted, then in the order of `PARTS`, then the
    shortest.
    """
    counts = Counter(''.join(f'{part}.' for part in parts[:i])
                     for parts in (name.split('.') for name in names) for i in range(1, min(len(parts), 5)))
    found = ['', *(p for p, n in counts.items() if n >= len(wanted) / 2)]

    def rank(prefix: str) -> tuple[int, int, int]:
        fit = sum(name.startswith(prefix) and name.removeprefix(prefix) in wanted for name in names)
        return -fit, _preference(prefix.rstrip('.'), PARTS.index('')), len(prefix)
    return sorted(found, key=rank)


# Fitting to a network

def fit_tensors(content: Any, net: nn.Module, file: str, arch: str) -> tuple[Tensors, Loaded]:
    """Return the tensors of `net`, a timm network without classifier, from the content of a file, and what they were.

    The part of the checkpoint and the prefix are those with which most names fit. Names and layouts of the authors
    become timm's, and embeddings of other sizes are resampled, by timm's own functions. Raises `WeightsError`.
    """
    shapes = {name: list(tensor.shape) for name, tensor in net.state_dict().items() if not name.endswith(NO_WEIGHT)}
    candidates = tensor_dicts(content)
    if not candidates: raise WeightsError(f'weights = {file}: holds no tensors. Save a state dict.')
    path, prefix, fitted = _best_fit(candidates, net, shapes)
    source = _without_prefix(candidates[path], prefix)
    _check_all_there(fitted, shapes, list(candidates[path]), file, arch)
    check_finite({name: fitted[name] for name in shapes}, file)
    left_over = _left_over(fitted, source, net, file, arch)
    left_over += [name for name in candidates[path] if not name.startswith(prefix)]
    same = {id(tensor): name for name, tensor in source.items()}
    renamed = {same[id(t)]: name for name, t in fitted.items() if name in shapes and same.get(id(t), name) != name}
    loaded = Loaded(Path(file).name, len(shapes), part=f'{path} {prefix}*'.strip() if prefix else path,
                    renamed=_by_first_change(renamed), left_over=dict(Counter(map(_first, left_over))),
                    resampled=_resampled_names(source, fitted, shapes))
    return {name: fitted[name] for name in net.state_dict() if name in fitted}, loaded


def _best_fit(candidates: dict[str, Tensors], net: nn.Module, shapes: dict[str, list[int]]) -> tuple[str, str, Tensors]:
    "Return the part of a checkpoint, the prefix and the tensors of them that fit most of the network's"
    best, most = ('', '', Tensors()), -1
    for path, tensors in candidates.items():
        for prefix in prefixes(tensors, shapes):
            fitted = _as_in_timm(_without_prefix(tensors, prefix), net)
            n = sum(name in fitted and list(fitted[name].shape) == shape for name, shape in shapes.items())
            if n > most: best, most = (path, prefix, fitted), n
            if n == len(shapes): return best
    return best


def _without_prefix(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _first(name: str) -> str: return name.partition('.')[0]


def _by_first_change(renamed: dict[str, str]) -> dict[str, str]:
    "Return old -> new names, with those that change alike as one: fc_norm -> norm, blocks.*.mlp.w3 -> blocks.*.mlp.fc2"
    found: dict[str, str] = {}
    for old, new in renamed.items():
        a, b = old.split('.'), new.split('.')
        same = next((i for i in range(min(len(a), len(b))) if a[-1 - i] != b[-1 - i]), 0)        # parts at the end
        while same and a[-1 - same].isdigit(): same -= 1           # layers.0.downsample, not layers.0
        a, b = a[:len(a) - same], b[:len(b) - same]
        found.setdefault(_without_numbers(a), _without_numbers(b))
    return found


def _without_numbers(parts: list[str]) -> str:
    "Return the parts of a name with * for the number of a block: blocks.*.mlp"
    return '.'.join('*' if part.isdigit() and parts[i - 1] == 'blocks' else part for i, part in enumerate(parts))


def _resampled_names(source: Tensors, fitted: Tensors, shapes: dict[str, list[int]]) -> dict[str, list[list[int]]]:
    "Return name -> shapes in the file and in the network, of the tensors that were resampled"
    old = {name: list(source[name].shape) for name in shapes if name in source}
    return {name: [shape, shapes[name]] for name, shape in old.items() if prod(shape) != prod(shapes[name])}


def _as_in_timm(tensors: Tensors, net: nn.Module) -> Tensors:
    "Return tensors with timm's names and the network's sizes as far as that is possible"
    shapes = {name: t.shape for name, t in net.state_dict().items() if not name.endswith(NO_WEIGHT)}
    if all(name in tensors and tensors[name].shape == shape for name, shape in shapes.items()): return tensors
    found = _unchunked(tensors)
    convert = timm_filter(net)
    if convert:
        options = {}
        if 'adapt_layer_scale' in signature(convert).parameters:
            options['adapt_layer_scale'] = any('gamma_' in name for name in found)
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter('ignore')                    # timm's own, of PyTorch
                found = dict(convert(dict(found), net, **options))
        except Exception: return tensors     # of another network: `_check_all_there` names what is missing
    for name in ('norm.weight', 'norm.bias'):
        if name in shapes and name not in found and f'fc_{name}' in found: found[name] = found.pop(f'fc_{name}')
    return {name: _resampled(name, t, net, shapes.get(name)) for name, t in found.items() if isinstance(t, Tensor)}


def _unchunked(tensors: Tensors) -> Tensors:
    "Return tensors with the names of blocks in chunks (blocks.1.7.norm1), as DINOv2's training saves them, as in timm"
    blocks = [name for name in tensors if name.startswith('blocks.')]
    if not blocks or not all(re.match(r'blocks\.\d+\.\d+\.', name) for name in blocks): return tensors
    return {re.sub(r'^blocks\.\d+\.', 'blocks.', name): t for name, t in tensors.items()}


def timm_filter(net: nn.Module) -> Any:
    "Return timm's function that turns the authors' weights of a network into timm's, or None"
    arch = (getattr(net, 'pretrained_cfg', None) or {}).get('architecture', '')
    module = sys.modules[(timm.model_entrypoint(arch) if arch and timm.is_model(arch) else type(net)).__module__]
    return getattr(module, 'checkpoint_filter_fn', None) or getattr(module, 'pretrained_filter_fn', None)


def _resampled(name: str, tensor: Tensor, net: Any, shape: torch.Size | None) -> Tensor:
    "Return an embedding at the network's size, where timm's conversion left it as it was; other tensors unchanged"
    if shape is None or tensor.shape == shape or tensor.ndim != len(shape): return tensor
    try:
        if name.endswith('patch_embed.proj.weight'): return resample_patch_embed(tensor, list(shape[-2:]))
        if name == 'pos_embed' and tensor.ndim == 4: return resample_abs_pos_embed_nhwc(tensor, list(shape[1:3]))
        if name == 'pos_embed' and tensor.ndim == 3:
            n = 0 if getattr(net, 'no_embed_class', False) else getattr(net, 'num_prefix_tokens', 0)
            return resample_abs_pos_embed(tensor, new_size=list(net.patch_embed.grid_size), num_prefix_tokens=n)
        if name.endswith('relative_position_bias_table'):
            window = net.get_submodule(name.rpartition('.')[0]).window_size
            return resize_rel_pos_bias_table(tensor, new_window_size=window, new_bias_shape=tuple(shape))
    except (AttributeError, AssertionError, RuntimeError, ValueError): pass          # its shape is refused below
    return tensor


def check_finite(tensors: Tensors, file: str) -> None:
    "Raise `WeightsError` if values are infinite or not a number: nothing could be trained from them"
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not t.float().isfinite().all()]
    if bad:
        noun = 'tensor' if len(bad) == 1 else 'tensors'
        raise WeightsError(f'weights = {file}: has values that are not finite numbers: {len(bad)} {noun}, first '
                           f'{bad[0]}. Its training diverged, or the file is damaged: take another one.')


def _check_all_there(fitted: Tensors, shapes: dict[str, list[int]], names: list[str], file: str, arch: str) -> None:
    "Raise `WeightsError` if tensors of the network are missing or have another shape"
    what = f'weights = {file}'
    advice = 'Set arch to the network of these weights.'
    missing = [name for name in shapes if name not in fitted]
    if missing:
        begins = f' The file begins with {", ".join(names[:3])}.' if len(missing) > len(shapes) / 2 else ''
        there = {_first(name) for name in shapes if name in fitted}
        if not begins and all(_first(name) in there for name in missing):
            advice = 'The file is incomplete, or of a smaller network: download it again, or set arch to its network.'
        raise WeightsError(f'{what}: {len(missing)} of {len(shapes)} tensors of {arch} are missing, first {missing[0]}.'
                           f'{begins} {advice}')
    other = [name for name, shape in shapes.items() if list(fitted[name].shape) != shape]
    if other:
        old, new = _size(fitted[other[0]].shape), _size(shapes[other[0]])
        raise WeightsError(f'{what}: {len(other)} tensors have other shapes than in {arch}, first {other[0]}: {old}, '
                           f'not {new}. Set arch and size to those of these weights.')


def _left_over(fitted: Tensors, source: Tensors, net: nn.Module, file: str, arch: str) -> list[str]:
    """Return the names of tensors that the body does not need: a classifier, a decoder, a mask token.

    Raises `WeightsError` for any others: they are of another network, or of a part that the body should have.
    """
    names = net.state_dict().keys()
    more = [name for name in fitted if name not in names and not name.endswith(NO_WEIGHTS)]
    unknown = [name for name in more if not LEFT_OVER.fullmatch(_first(name))]
    if unknown:
        raise WeightsError(f'weights = {file}: {len(unknown)} tensors are not in {arch}, first {unknown[0]}. '
                           'Set arch to the network of these weights.')
    kept = {id(t) for t in fitted.values()}
    own = {_first(name) for name in names}
    dropped = [name for name, t in source.items() if name not in fitted and id(t) not in kept]
    return more + [name for name in dropped if _first(name) not in own]
