"""Settings of a training step on the CPU, compared step by step: python benchmarks/tries.py [ARCH SIZE ROUNDS]

Each step is forward, backward and AdamW on a batch of random images. The variants take turns, one step each, for
`ROUNDS` rounds, in one process. The ratio is that of images per CPU second to `REFERENCE`, the median of the rounds
with its quartiles: a step's CPU time hardly depends on what else runs, if `OMP_NUM_THREADS=1`. A last table compares
forward passes without gradients.
"""
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Variant:
    "One way to compute a training step"
    precision: str = 'bf16'
    batch: int = 16
    channels_last: bool = True
    compile: bool = False                    # torch.compile (inductor) of the body
    flush_denormal: bool = False
    fused: bool = False                      # the optimizer's fused kernel


REFERENCE = 'bf16'
VARIANTS = {
    REFERENCE: Variant(), 'f32': Variant('f32'), 'not channels last': Variant(channels_last=False),
    'batch 8': Variant(batch=8), 'batch 32': Variant(batch=32), 'denormals flushed': Variant(flush_denormal=True),
    'fused AdamW': Variant(fused=True), 'torch.compile': Variant(compile=True)}


def network(arch: str, size: int, channels_last: bool):
    import torch

    from aptos_fastai.recipe.sections import Stage
    from aptos_fastai.training.model import stage_model
    model = stage_model(Stage('benchmark', ('t',), arch=arch, size=size, weights='none'))
    return model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def random_images(batch: int, size: int, channels_last: bool):
    import torch
    images = torch.randn(batch, 3, size, size)
    return images.to(memory_format=torch.channels_last) if channels_last else images


def training_step(arch: str, size: int, v: Variant) -> Callable[[], None]:
    import torch

    from aptos_fastai.training.precision import DTYPES
    model, images = network(arch, size, v.channels_last), random_images(v.batch, size, v.channels_last)
    opt = torch.optim.AdamW(model.parameters(), fused=v.fused)
    if v.compile: model[0].compile()

    def step():
        torch.set_flush_denormal(v.flush_denormal)
        with torch.autocast('cpu', DTYPES.get(v.precision, torch.bfloat16), enabled=v.precision in DTYPES):
            maps = model[0](images)
        model[1](maps.float()).pow(2).mean().backward()
        opt.step()
        opt.zero_grad()
    return step


def forward_passes(arch: str, size: int) -> dict[str, Callable[[], None]]:
    "Ways to score a batch of 16; `views at half size` has a quarter of the pixels"
    import torch
    images = random_images(16, size, True)
    eager, small = network(arch, size, True).eval(), random_images(16, size // 2, True)
    compiled = network(arch, size, True).eval()
    compiled[0].compile()

    def forward(net, x):
        @torch.no_grad()
        def run():
            with torch.autocast('cpu', torch.bfloat16): net(x)
        return run
    return {REFERENCE: forward(eager, images), 'views at half size': forward(eager, small),
            'torch.compile': forward(compiled, images)}


def cpu_seconds(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def compare(title: str, steps: dict[str, Callable[[], None]], images: dict[str, int], rounds: int) -> None:
    "Time steps in turn, after two of each, and print the ratios"
    from aptos_fastai.common.console import table
    first = {name: cpu_seconds(step) for name, step in steps.items()}
    for step in steps.values(): step()
    seconds = np.array([[cpu_seconds(step) / images[name] for name, step in steps.items()] for _ in range(rounds)])
    rows = []
    for i, name in enumerate(steps):
        low, middle, high = np.quantile(seconds[:, 0] / seconds[:, i], (.25, .5, .75))
        rows.append([name, f'{1 / np.median(seconds[:, i]):.1f}', f'{middle:.2f}', f'{low:.2f}-{high:.2f}',
                     f'{first[name]:.0f}'])
    table(title, ['variant', 'images per CPU second', 'ratio', 'quartiles', 'first step, CPU s'], rows,
          right=('images per CPU second', 'ratio', 'first step, CPU s'))


def main(arch: str = 'tf_efficientnet_lite0', size: str = '224', rounds: str = '10'):
    from aptos_fastai.training.model import keep_freed_memory
    from aptos_fastai.training.precision import machine
    keep_freed_memory()
    where = f'{arch} at {size} px; {machine()}'
    steps = {name: training_step(arch, int(size), v) for name, v in VARIANTS.items()}
    compare(f'training step, {where}', steps, {name: v.batch for name, v in VARIANTS.items()}, int(rounds))
    steps = forward_passes(arch, int(size))
    compare(f'forward pass, batch 16, {where}', steps, dict.fromkeys(steps, 16), int(rounds))


if __name__ == '__main__':
    import aptos_fastai  # noqa: F401    before PyTorch: it sets how long OpenMP's threads spin
    main(*sys.argv[1:])
