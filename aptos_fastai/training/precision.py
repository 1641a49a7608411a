"How fast a network computes on this machine, and in which precision: measured, recorded, applied."
import platform
import time
from pathlib import Path

import torch
from fastai.callback.core import Callback

from aptos_fastai.common.console import say
from aptos_fastai.common.io import AptosError, read_record, write_record
from aptos_fastai.recipe import Stage
from aptos_fastai.training.model import create_model, keep_freed_memory

DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16)
WORTH = 1.1                                  # times: what bf16 must be faster on the CPU to be taken
FILE = 'precision.json'


class Autocast(Callback):
    "The body computes in `precision`; pooling, the one unit and the loss stay in float32. fastai's own `to_bf16` does nothing on the CPU"
    def __init__(self, precision: str): self.dtype = DTYPES[precision]
    def before_fit(self):
        self.casts, body = [], self.model[0]

        def enter(*_):
            self.casts.append(torch.autocast(next(body.parameters()).device.type, self.dtype))
            self.casts[-1].__enter__()

        def leave(_, __, maps):
            self.casts.pop().__exit__(None, None, None)
            return None if maps is None else maps.float()
        self.hooks = body.register_forward_pre_hook(enter), body.register_forward_hook(leave, always_call=True)
    def after_fit(self):
        for h in self.hooks: h.remove()


def machine() -> str:
    "What the figures depend on"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu()
    return f'{name}, {torch.get_num_threads()} threads, torch {torch.__version__}'


def _cpu() -> str:
    try: return next(o.partition(':')[2].strip() for o in Path('/proc/cpuinfo').read_text().splitlines() if o.startswith('model name'))
    except (OSError, StopIteration): return platform.processor() or platform.machine()


def step_seconds(stage: Stage, precisions=('f32',), n: int = 4, rounds: int = 2) -> tuple[dict[str, float], float, int]:
    """Seconds an image of a training step with Adam (random images, `n` a batch) by precision, the best of `rounds` in turns; of a forward pass in
    float32; and the number of parameters"""
    keep_freed_memory()
    state = torch.random.get_rng_state()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    model = create_model(stage).to(device, memory_format=torch.channels_last)
    x, opt = torch.randn(n, 3, stage.size, stage.size, device=device), torch.optim.AdamW(model.parameters())

    def timed(precision: str, train: bool) -> float:
        t = time.perf_counter()
        with torch.set_grad_enabled(train):
            model.train(train)
            with torch.autocast(device, DTYPES.get(precision, torch.bfloat16), enabled=precision in DTYPES): maps = model[0](x)
            y = model[1](maps.float()).mean()
            if train: y.backward(); opt.step(); opt.zero_grad()
            y.item()
        return (time.perf_counter() - t) / n
    steps = {p: [] for p in precisions}
    for i in range(rounds + 1):
        for p in precisions: steps[p].append(timed(p, True) if i else (timed(p, True), 1e9)[1])      # the first builds its buffers
    forward = timed('f32', False)
    torch.random.set_rng_state(state)
    return {p: min(o) for p, o in steps.items()}, forward, sum(o.numel() for o in model.parameters())


def cpu_has_bf16() -> bool:
    "Whether oneDNN has bf16 for this processor; without it a step of SE-ResNet50 takes 15 times as long as in float32 (measured on AVX2)"
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def has_bf16() -> bool:
    "Whether the device that networks run on computes in bf16 itself"
    return torch.cuda.is_bf16_supported(including_emulation=False) if torch.cuda.is_available() else cpu_has_bf16()


def precisions(stage: Stage) -> tuple[str, ...]:
    "Those that come into question on this machine. Raises `AptosError`"
    gpu = torch.cuda.is_available()
    if stage.precision == 'fp16' and not gpu: raise AptosError('precision = fp16: needs a GPU; set auto, bf16 or f32')
    if stage.precision != 'auto': return (stage.precision,)
    if gpu: return ('bf16' if has_bf16() else 'fp16',)
    return ('f32', 'bf16') if has_bf16() else ('f32',)


def precision_of(stage: Stage, folder: Path) -> str:
    """f32, bf16 or fp16: what `stage.precision` says; for auto, on a GPU bf16 where it knows it, else fp16; on a CPU that knows bf16 what a few
    steps measured faster, on another f32.

    The measurement stands in `folder`/precision.json and is not made again, so that a resumed training goes on as it began.
    """
    which = precisions(stage)
    if which == ('bf16',) and not has_bf16(): say('  precision = bf16: this machine has none, training in it is many times slower; set auto or f32', 'yellow')
    if len(which) == 1: return which[0]
    old, key = read_record(folder / FILE) or {}, f'{stage.arch} {stage.size} px on {machine()}'
    if key not in old:
        found, _, _ = step_seconds(stage, which, n=min(8, stage.bs))
        old[key] = dict(images_per_second={p: round(1 / s, 1) for p, s in found.items()}, taken='bf16' if WORTH * found['bf16'] < found['f32'] else 'f32')
        write_record(folder / FILE, old)
        say(f'  {stage.arch} {stage.size} px trains ' + ', '.join(f'{r:.0f} images/s in {p}' for p, r in old[key]['images_per_second'].items())
            + f' (a few steps, measured now): {old[key]["taken"]} -> {folder / FILE}')
    return old[key]['taken']


def fitting_batches(stage: Stage, most: int = 4096) -> list[tuple[int, float, float]]:
    "(batch, images a second, GB) of training steps at 2, 4, 8, … images, as long as they fit the GPU. Raises `AptosError` without one"
    if not torch.cuda.is_available(): raise AptosError('batch: looks for the largest batch that fits a GPU; there is none here')
    which, out = precisions(stage), []
    while (n := 2 ** (len(out) + 1)) <= most:
        torch.cuda.reset_peak_memory_stats()
        try: seconds = step_seconds(stage, which, n=n, rounds=1)[0][which[0]]
        except torch.OutOfMemoryError: break
        out.append((n, 1 / seconds, torch.cuda.max_memory_allocated() / 1e9))
    torch.cuda.empty_cache()
    return out
