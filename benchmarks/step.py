"""Images per second of a training step on this machine: python benchmarks/step.py [ARCH SIZE]

Compares PyTorch's defaults with the two changes this package makes: channels-last memory and `keep_freed_memory`.
Each variant runs in its own process; the ratios are to the first.
"""
import os
import platform
import subprocess
import sys
import time

# variant: (channels last, keep freed memory)
VARIANTS = {'PyTorch defaults': (False, False), 'channels last': (True, False), 'freed memory kept': (False, True),
            'both: this package': (True, True)}
BATCH, WARMUP, STEPS = 16, 2, 6


def images_per_second(arch: str, size: int, channels_last: bool, keep_memory: bool) -> float:
    import timm
    import torch

    from aptos_fastai.training.model import keep_freed_memory
    if keep_memory: keep_freed_memory()
    model = timm.create_model(arch, num_classes=1)
    if channels_last: model = model.to(memory_format=torch.channels_last)
    opt, images = torch.optim.AdamW(model.parameters()), torch.randn(BATCH, 3, size, size)

    def step():
        model(images).pow(2).mean().backward()
        opt.step()
        opt.zero_grad()
    for _ in range(WARMUP): step()
    start = time.perf_counter()
    for _ in range(STEPS): step()
    return BATCH * STEPS / (time.perf_counter() - start)


def main(arch: str = 'tf_efficientnet_lite0', size: str = '224'):
    from aptos_fastai.common.console import table
    rates = {}
    for name in VARIANTS:
        command = [sys.executable, '-W', 'ignore', __file__, '--variant', name, arch, size]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rates[name] = float(out.split()[-1])
    first = next(iter(rates.values()))
    machine = f'{os.cpu_count()} cores, {platform.processor() or platform.machine()}'
    rows = [[name, f'{rate:.1f}', f'{rate / first:.2f}'] for name, rate in rates.items()]
    table(f'training step of {arch} at {size} px, batch {BATCH}; {machine}', ['variant', 'images/s', 'ratio'], rows,
          right=('images/s', 'ratio'))


if __name__ == '__main__':
    if sys.argv[1:2] == ['--variant']:
        _, _, name, arch, size = sys.argv
        print(images_per_second(arch, int(size), *VARIANTS[name]))
    else: main(*sys.argv[1:])
