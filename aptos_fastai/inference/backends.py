"Inference backends: PyTorch, ONNX Runtime, OpenVINO."
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from aptos_fastai.common.console import say
from aptos_fastai.common.io import AptosError, read_record, verify_file
from aptos_fastai.inference.model_spec import BUNDLE, MemberSpec
from aptos_fastai.inference.views import view_scores, views
from aptos_fastai.training.precision import DTYPES, has_bf16

PRECISIONS = 'f32', 'bf16', 'fp16'
PACKAGES = dict(torch='torch', onnx='onnxruntime', openvino='openvino')
MAX_DIFFERENCE = dict(f32=.01, bf16=.1, fp16=.1)      # of a score, from PyTorch f32
OPENVINO_BATCH = 8                           # images; a fixed batch is 10 % faster than a variable one

# squares (n, side, side, 3) uint8 RGB -> scores (n, views) float32, pooled features (n, C) of the first view
Runner = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
GetNet = Callable[[], torch.nn.Module]       # gives a member's PyTorch network; only the backend that needs it loads it


def to_tensor(member: MemberSpec, squares: np.ndarray, device: torch.device) -> torch.Tensor:
    "Normalise squares (n, side, side, 3) uint8 RGB for the network of `member`: (n, 3, side, side) float32"
    x = torch.from_numpy(squares).to(device).permute(0, 3, 1, 2).float().div_(255)
    mean = x.new_tensor(member.mean)[:, None, None]
    std = x.new_tensor(member.std)[:, None, None]
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def torch_runner(member: MemberSpec, root: Path, device: torch.device, precision: str, get_net: GetNet) -> Runner:
    "Run a member with PyTorch"
    net = get_net()

    @torch.no_grad()
    def run(squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.autocast(device.type, DTYPES.get(precision, torch.bfloat16), enabled=precision in DTYPES):
            scores, features = view_scores(net, to_tensor(member, squares, device), member.tta)
        if precision == 'fp16' and not np.isfinite(scores).all():
            raise AptosError(f'{root}: the network of {member.file} leaves the range of fp16. Use f32 or bf16.')
        return scores, features
    return run


def onnx_runner(member: MemberSpec, root: Path, device: torch.device, precision: str, get_net: GetNet) -> Runner:
    "Run a member of a bundle with ONNX Runtime on the CPU"
    if precision != 'f32':
        raise AptosError(f'backend onnx with precision {precision}: ONNX Runtime computes in f32 on the CPU. '
                         'Choose openvino or f32.')
    file = _onnx_file(member, root)
    try:
        import onnxruntime
    except ImportError: raise AptosError('backend onnx: install it with `pip install onnxruntime`') from None
    onnxruntime.disable_telemetry_events()     # where it was imported before this package, which turns telemetry off
    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    return _runner_of_views(member, lambda squares: session.run(['score', 'features'], {'squares': squares}))


def openvino_runner(member: MemberSpec, root: Path, device: torch.device, precision: str, get_net: GetNet) -> Runner:
    "Run a member of a bundle with OpenVINO on the CPU"
    file = _onnx_file(member, root)
    core = import_openvino().Core()
    model = core.read_model(str(file))
    model.reshape([OPENVINO_BATCH, member.size, member.size, 3])
    net = core.compile_model(model, 'CPU', dict(INFERENCE_PRECISION_HINT=precision, PERFORMANCE_HINT='LATENCY'))

    def score(squares: np.ndarray) -> list[np.ndarray]:
        n = len(squares)
        padding = np.zeros((-n % OPENVINO_BATCH, *squares.shape[1:]), squares.dtype)
        padded = np.concatenate([squares, padding])
        batches = np.split(padded, len(padded) // OPENVINO_BATCH)
        results = [net([batch]) for batch in batches]
        return [np.concatenate([o[name] for o in results])[:n] for name in ('score', 'features')]
    return _runner_of_views(member, score)


def import_openvino() -> ModuleType:
    """Return OpenVINO, imported without its telemetry, which writes a client id and looks up an analytics host.

    OpenVINO takes its own stub where the package `openvino_telemetry` cannot be imported.
    """
    sys.modules.setdefault('openvino_telemetry', None)      # type: ignore[arg-type]
    try:
        import openvino
    except ImportError: raise AptosError('backend openvino: install it with `pip install openvino`') from None
    return openvino


def _onnx_file(member: MemberSpec, root: Path) -> Path:
    "Return the ONNX file of a bundle's member, its SHA-256 checked"
    file = (root / member.file).with_suffix('.onnx')
    bundle = read_record(root / BUNDLE)
    if not bundle or not file.is_file():
        raise AptosError(f'{file}: no such file; only a bundle has ONNX. Run `export` and give the bundle.')
    return verify_file(file, bundle['files'].get(file.name, ''), 'Export again.')


def _runner_of_views(member: MemberSpec, score: Callable[[np.ndarray], list[np.ndarray]]) -> Runner:
    "Return a runner that calls `score`, squares -> scores (n,) and features (n, C), once for each view"
    def run(squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x = torch.from_numpy(squares).permute(0, 3, 1, 2)
        turned = [np.ascontiguousarray(v.permute(0, 2, 3, 1).numpy()) for v in views(x, member.tta)]
        results = [score(v) for v in turned]
        return np.stack([scores for scores, _ in results], 1), results[0][1]
    return run


# to add a backend, write a function with these parameters and name it here
BACKENDS: dict[str, Callable[[MemberSpec, Path, torch.device, str, GetNet], Runner]] = dict(
    torch=torch_runner, onnx=onnx_runner, openvino=openvino_runner)


def changed_text(parity: dict, what: str) -> str:
    "Return how many `grades` or `referrals` an entry of parity has changed: '8 of 200 grades (95 % CI 2–8 %)'"
    low, high = (100 * share for share in parity[f'{what}_interval'])
    return f'{parity[f"{what}_changed"]} of {parity["images"]} {what} (95 % CI {low:.0f}–{high:.0f} %)'


def check_backend(root: Path, backend: str, precision: str) -> None:
    "Raise `AptosError` for an unknown backend or precision, and for one whose scores `export` found to differ too much"
    if backend not in BACKENDS: raise AptosError(f'backend {backend}: choose one of {", ".join(BACKENDS)}')
    if precision not in PRECISIONS: raise AptosError(f'precision {precision}: choose one of {", ".join(PRECISIONS)}')
    if precision == 'fp16' and (backend != 'torch' or not torch.cuda.is_available()):
        raise AptosError('precision fp16: needs the backend torch and a GPU. Choose f32 or bf16.')
    parity = (read_record(root / BUNDLE) or {}).get('parity', [])
    compared = [(o['backend'], o['precision']) for o in parity]
    if parity and (backend, precision) not in [*compared, ('torch', 'f32')]:
        say(f'{backend} {precision}: `export` did not compare it with PyTorch f32 where this bundle was made. Export '
            'the run on this device to know which grades it changes.', 'yellow')
    for o in parity:
        if (o['backend'], o['precision']) == (backend, precision) and not o['within_bounds']:
            raise AptosError(f'{root}: {backend} {precision} changes {changed_text(o, "grades")} and '
                             f'{changed_text(o, "referrals")}, scores by up to {o["max_difference"]:.2f}: '
                             'more than export allows. Use f32.')
    if precision == 'bf16' and not has_bf16():
        say('bf16: not supported by this device. PyTorch is slower in bf16 than in f32; OpenVINO uses f32. '
            'A GPU without bf16 (T4, V100) is fast in fp16.', 'yellow')
