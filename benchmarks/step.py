"""Images a second of a training step on this machine, as PyTorch comes and as this app trains: python benchmarks/step.py [ARCH SIZE]

Each variant runs in a process of its own, in turn; the table gives ratios against the first. Memory kept: `model.keep_freed_memory`.
"""
import os
import platform
import subprocess
import sys
import time

VARIANTS = {'as PyTorch comes': (False, False), 'channels last': (True, False), 'memory kept': (False, True), 'both: this app': (True, True)}


def rate(arch: str, size: int, last: bool, keep: bool, bs: int = 16, steps: int = 6) -> float:
    import timm
    import torch

    from aptos_fastai.training.model import keep_freed_memory
    if keep: keep_freed_memory()
    model = timm.create_model(arch, num_classes=1)
    if last: model = model.to(memory_format=torch.channels_last)
    opt, x = torch.optim.AdamW(model.parameters()), torch.randn(bs, 3, size, size)

    def step():
        model(x).pow(2).mean().backward()
        opt.step(); opt.zero_grad()
    for _ in range(2): step()
    t0 = time.perf_counter()
    for _ in range(steps): step()
    return bs * steps / (time.perf_counter() - t0)


def main(arch: str = 'tf_efficientnet_lite0', size: str = '224'):
    from aptos_fastai.common.console import table
    rates = {}
    for name in VARIANTS:
        out = subprocess.run([sys.executable, '-W', 'ignore', __file__, '--one', name, arch, size], capture_output=True, text=True, check=True)
        rates[name] = float(out.stdout.split()[-1])
    first = next(iter(rates.values()))
    machine = f'{os.cpu_count()} cores, {platform.processor() or platform.machine()}'
    table(f'{arch} {size} px, batch 16, a training step; {machine}', ['variant', 'images/s', 'ratio'],
          [[n, f'{r:.1f}', f'{r / first:.2f}'] for n, r in rates.items()], right=('images/s', 'ratio'))


if __name__ == '__main__':
    if sys.argv[1:2] == ['--one']: print(rate(sys.argv[3], int(sys.argv[4]), *VARIANTS[sys.argv[2]]))
    else: main(*sys.argv[1:])
