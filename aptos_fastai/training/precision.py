"Choose and apply the numeric precision of training, and time training steps on this machine."
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from fastai.callback.core import Callback
from torch import Tensor, nn

from aptos_fastai.common.console import plural, say
from aptos_fastai.common.io import AptosError, read_record, write_record
from aptos_fastai.recipe.sections import Stage
from aptos_fastai.training.model import keep_freed_memory, stage_model
from aptos_fastai.training.optimizer import create_optimizer, model_layers

DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16)
MIN_SPEEDUP = 1.1                            # bf16 is chosen on a CPU if it is this many times faster than f32
PRECISION_RECORD = 'precision.json'


class Autocast(Callback):
    """Compute the body in `precision` (bf16 or fp16); pooling, output and loss stay in float32.

    fastai's own `to_bf16` has no effect on the CPU.
    """
    def __init__(self, precision: str): self.dtype = DTYPES[precision]

    def before_fit(self) -> None:
        body = self.model[0]
        contexts: list[torch.autocast] = []

        def enter_autocast(module: nn.Module, inputs: tuple) -> None:
            device = next(module.parameters()).device.type
            contexts.append(torch.autocast(device, self.dtype))
            contexts[-1].__enter__()

        def leave_autocast(module: nn.Module, inputs: tuple, maps: Tensor | None) -> Tensor | None:
            contexts.pop().__exit__(None, None, None)
            return None if maps is None else maps.float()      # None: the body has raised

        self.hooks = [body.register_forward_pre_hook(enter_autocast),
                      body.register_forward_hook(leave_autocast, always_call=True)]

    def after_fit(self) -> None:
        for hook in self.hooks: hook.remove()


def machine() -> str:
    "Return what timings depend on: GPU or CPU, threads, PyTorch's version"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return f'{name}, {plural(torch.get_num_threads(), "thread")}, torch {torch.__version__}'


def cpu_name() -> str:
    "Return the name of the processor"
    try: lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    except OSError: lines = []               # not Linux
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


class StepSeconds(NamedTuple):
    "Seconds per image by precision, of a training step and of a forward pass alone; and the number of parameters"
    train: dict[str, float]
    forward: dict[str, float]
    parameters: int


def step_seconds(stage: Stage, precisions: Sequence[str] = ('f32',), n: int = 4, rounds: int = 2) -> StepSeconds:
    """Time training steps of `stage`, with its optimizer, and forward passes on batches of `n` random images.

    Each time is the best of `rounds` after a warm-up; forward passes are timed in `precisions` and in f32, in which a
    trained network scores. Leaves the CPU's random state as it was.
    """
    keep_freed_memory()
    rng_state = torch.random.get_rng_state()
    cuda = torch.cuda.is_available()
    if cuda: torch.set_float32_matmul_precision('high')      # as `get_learner` does
    device = 'cuda' if cuda else 'cpu'
    model = stage_model(stage).to(device).to(memory_format=torch.channels_last)
    images = torch.randn(n, 3, stage.size, stage.size, device=device)
    opt = create_optimizer(model_layers(model, stage.layer_decay), stage.lr, name=stage.optimizer,
                           sqr_mom=stage.sqr_mom, eps=stage.eps)

    def mean_score(precision: str) -> torch.Tensor:
        with torch.autocast(device, DTYPES.get(precision, torch.bfloat16), enabled=precision in DTYPES):
            maps = model[0](images)
        return model[1](maps.float()).mean()

    def train_step(precision: str) -> None:
        mean_score(precision).backward()
        opt.step()
        opt.zero_grad()

    @torch.no_grad()
    def forward(precision: str) -> None: mean_score(precision)

    def per_image(step: Callable[[str], None], names: Iterable[str]) -> dict[str, float]:
        return {p: s / n for p, s in best_seconds(step, list(names), rounds).items()}

    model.train()
    train = per_image(train_step, precisions)
    model.eval()
    found = StepSeconds(train, per_image(forward, dict.fromkeys([*precisions, 'f32'])),
                        sum(p.numel() for p in model.parameters()))
    torch.random.set_rng_state(rng_state)
    return found


def best_seconds(step: Callable[[str], None], names: Sequence[str], rounds: int) -> dict[str, float]:
    """Return the seconds of `step(name)` for each name: the best of `rounds`, in which the names take turns.

    On a GPU a round is five steps in a row, which the CPU launches ahead, as in training.
    """
    gpu = torch.cuda.is_available()
    repeats = 5 if gpu else 1

    def seconds(name: str) -> float:
        start = time.perf_counter()
        for _ in range(repeats): step(name)
        if gpu: torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    for name in names: seconds(name)         # warm-up: buffers are allocated, on a GPU kernels are chosen
    times = [{name: seconds(name) for name in names} for _ in range(rounds)]
    return {name: min(t[name] for t in times) for name in names}


def cpu_has_bf16() -> bool:
    """Return True if this CPU supports bf16 in hardware, by oneDNN.

    Without it a training step of SE-ResNet50 takes 15 times as long as in float32 (measured on AVX2).
    """
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def has_bf16() -> bool:
    "Return True if the GPU, or without one the CPU, supports bf16 in hardware"
    if torch.cuda.is_available(): return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_has_bf16()


def candidate_precisions(stage: Stage) -> tuple[str, ...]:
    "Return the precisions that `stage.precision` allows on this machine. Raises `AptosError` for fp16 without a GPU"
    gpu = torch.cuda.is_available()
    if stage.precision == 'fp16' and not gpu:
        raise AptosError('precision = fp16: needs a GPU. Set precision = auto, bf16 or f32.')
    if stage.precision != 'auto': return (stage.precision,)
    if gpu: return ('bf16',) if has_bf16() else ('fp16',)
    return ('f32', 'bf16') if has_bf16() else ('f32',)


def precision_of(stage: Stage, folder: Path) -> str:
    """Return the precision to train in: f32, bf16 or fp16.

    For `precision = auto` that is, on a GPU, bf16 if it supports it, else fp16; on a CPU with bf16 the faster of f32
    and bf16 in a few timed steps, on another CPU f32. The timing is recorded in `folder`/precision.json and done once
    per network, size and machine, so that a resumed training keeps its precision.
    """
    candidates = candidate_precisions(stage)
    if candidates == ('bf16',) and not has_bf16():
        say('  precision = bf16: this machine has no bf16 hardware, training will be many times slower. '
            'Set precision = auto or f32.', 'yellow')
    if len(candidates) == 1: return candidates[0]
    record = read_record(folder / PRECISION_RECORD) or {}
    key = f'{stage.arch} {stage.size} px on {machine()}'
    if key not in record:
        seconds = step_seconds(stage, candidates, n=min(8, stage.bs)).train
        rates = {p: round(1 / s, 1) for p, s in seconds.items()}
        taken = 'bf16' if MIN_SPEEDUP * seconds['bf16'] < seconds['f32'] else 'f32'
        record[key] = dict(images_per_second=rates, taken=taken)
        write_record(folder / PRECISION_RECORD, record)
        timings = ', '.join(f'{rate:.0f} images/s in {p}' for p, rate in rates.items())
        say(f'  {stage.arch} at {stage.size} px: {timings}. It trains in {taken} ({folder / PRECISION_RECORD}).')
    return record[key]['taken']


def fitting_batches(stage: Stage, most: int = 4096) -> list[tuple[int, float, float]]:
    """Time training steps with batches of 2, 4, 8, … images up to `most` or until the GPU's memory is full.

    Returns (batch size, images/s, peak memory in GB) of each that fits. Raises `AptosError` without a GPU.
    """
    if not torch.cuda.is_available():
        raise AptosError('no GPU found. Run this on the GPU that trains: it measures the largest batch that fits.')
    precision = candidate_precisions(stage)[0]
    found: list[tuple[int, float, float]] = []
    n = 2
    while n <= most:
        torch.cuda.reset_peak_memory_stats()
        try: seconds = step_seconds(stage, (precision,), n=n, rounds=1).train
        except torch.OutOfMemoryError: break
        found.append((n, 1 / seconds[precision], torch.cuda.max_memory_allocated() / 1e9))
        n *= 2
    torch.cuda.empty_cache()
    return found
