"Inference backends: PyTorch, ONNX Runtime, OpenVINO."
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aptos_fastai.common.io import AptosError, file_hash, read_record
from aptos_fastai.inference.model_spec import MemberSpec
from aptos_fastai.inference.views import views

FIXED = 8                                    # images at once in OpenVINO


def torch_runner(grader: Any, member: MemberSpec, precision: str) -> Callable[[np.ndarray], np.ndarray]:
    "Squares (n, side, side, 3) uint8 -> scores (views, n) by PyTorch"
    net = next(n for m, n in grader.nets if m is member)

    @torch.no_grad()
    def run(squares):
        with torch.autocast(grader.device.type, torch.bfloat16, enabled=precision == 'bf16'):
            return torch.stack([net(v).float().flatten() for v in views(grader.tensor(member, squares), member.tta)]).double().cpu().numpy()
    return run


def _by_onnx(grader: Any, member: MemberSpec, package: str, get_run: Callable) -> Callable[[np.ndarray], np.ndarray]:
    "The same by a runtime that reads the bundle's ONNX; `get_run` gives (squares) -> scores of a file"
    file = (grader.root / member.file).with_suffix('.onnx')
    if not file.is_file(): raise AptosError(f'{file}: is not there; only a bundle has ONNX: run `export` and name its folder')
    if file_hash(file) != read_record(grader.root / 'bundle.json')['files'].get(file.name):
        raise AptosError(f'{file}: is not what was written (its hash differs); export again')
    try: one = get_run(file)
    except ImportError: raise AptosError(f'{package} is needed for this backend: pip install {package}') from None

    def run(squares):
        x = torch.from_numpy(squares).permute(0, 3, 1, 2)
        return np.stack([one(np.ascontiguousarray(v.permute(0, 2, 3, 1).numpy())) for v in views(x, member.tta)]).astype(float)
    return run


def onnx_runner(grader: Any, member: MemberSpec, precision: str):
    "Squares (n, side, side, 3) uint8 -> scores (views, n) by ONNX Runtime"
    if precision != 'f32': raise AptosError(f'backend onnx with precision {precision}: ONNX Runtime computes in f32 on the CPU; choose openvino or f32')

    def get(file):
        import onnxruntime
        session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
        return lambda x: session.run(None, {'squares': x})[0]
    return _by_onnx(grader, member, 'onnxruntime', get)


def openvino_runner(grader: Any, member: MemberSpec, precision: str):
    "Squares (n, side, side, 3) uint8 -> scores (views, n) by OpenVINO"
    def get(file):
        import openvino
        core = openvino.Core()
        net = core.read_model(str(file))
        net.reshape([FIXED, member.size, member.size, 3])                    # a tenth faster than any number of images
        net = core.compile_model(net, 'CPU', dict(INFERENCE_PRECISION_HINT=precision, PERFORMANCE_HINT='LATENCY'))

        def one(x):
            more = np.concatenate([x, np.zeros((-len(x) % FIXED, *x.shape[1:]), x.dtype)])
            return np.concatenate([net([p])[0] for p in np.split(more, len(more) // FIXED)])[:len(x)]
        return one
    return _by_onnx(grader, member, 'openvino', get)


def check_parity(root: Path, backend: str, precision: str):
    "Refuses what `export` found to differ too much"
    for o in (read_record(root / 'bundle.json') or {}).get('parity', []):
        if (o['backend'], o['precision']) == (backend, precision) and not o['fine']:
            changed = f'{o["grades_changed"]} of {o["images"]} grades'
            raise AptosError(f'{root}: {backend} {precision} changes scores by up to {o["max_difference"]:.2f} and {changed}; use f32')


BACKENDS = dict(torch=torch_runner, onnx=onnx_runner, openvino=openvino_runner)      # to add one: a function here
