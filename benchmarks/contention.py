"""Measure how threads should wait on a shared machine: python benchmarks/contention.py [--seconds N]

Images/s of a training step (EfficientNet-Lite0 at 224 px, batch 8, forward and backward) for each setting of GNU
OpenMP, quiet and beside busy processes. Each measurement is a process of its own, because OpenMP reads its settings
once; the settings take turns, so that a machine that gets slower slows them all.
"""
import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from aptos_fastai.common.console import say, table

SETTINGS = {
    'default': {},
    'OMP_WAIT_POLICY=passive': dict(OMP_WAIT_POLICY='passive'),
    'GOMP_SPINCOUNT=0': dict(GOMP_SPINCOUNT='0'),
    'GOMP_SPINCOUNT=1000': dict(GOMP_SPINCOUNT='1000'),
    'GOMP_SPINCOUNT=10000': dict(GOMP_SPINCOUNT='10000'),
}
BUSY = 0, 1, 4                               # busy processes beside the measured one
BATCH = 8
STEP = f"""
import time, timm, torch
net = timm.create_model('tf_efficientnet_lite0', num_classes=1).train()
x = torch.rand({BATCH}, 3, 224, 224)
def step(): net(x).square().mean().backward()
step()
start, steps = time.perf_counter(), 0
while steps < 2 or time.perf_counter() - start < SECONDS:
    step()
    steps += 1
print({BATCH} * steps / (time.perf_counter() - start))
"""                                          # imports no aptos_fastai, which would choose a setting
BUSY_LOOP = 'import time\nend = time.monotonic() + SECONDS\nwhile time.monotonic() < end: pass'


@contextmanager
def busy_processes(n: int, seconds: float) -> Iterator[None]:
    "Keep `n` processes busy while the block runs, for at most `seconds`"
    command = [sys.executable, '-c', BUSY_LOOP.replace('SECONDS', str(seconds))]
    processes = [subprocess.Popen(command) for _ in range(n)]
    try: yield
    finally:
        for p in processes: p.kill()
        for p in processes: p.wait()


def measure(setting: dict[str, str], busy: int, seconds: float) -> float:
    "Return images/s of the training step under an OpenMP setting beside `busy` processes"
    env = {k: v for k, v in os.environ.items() if not k.startswith(('OMP_', 'GOMP_', 'KMP_'))} | setting
    limit = 20 * seconds + 60
    with busy_processes(busy, limit):
        command = [sys.executable, '-c', STEP.replace('SECONDS', str(seconds))]
        return float(subprocess.run(command, env=env, check=True, capture_output=True, timeout=limit).stdout)


def processor() -> str:
    "Return the name of the processor"
    try: lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    except OSError: return platform.processor()
    return next((line.partition(': ')[2] for line in lines if line.startswith('model name')), platform.machine())


def main(seconds: float, rounds: int) -> None:
    load = os.getloadavg()[0] if hasattr(os, 'getloadavg') else 0.
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for busy in BUSY:
            for name, setting in SETTINGS.items():
                found.setdefault((name, busy), []).append(measure(setting, busy, seconds))
    rates = {key: float(np.median(values)) for key, values in found.items()}
    rows = []
    for name in SETTINGS:
        cells = [f'{rates[name, busy]:.1f} ({rates[name, busy] / rates["default", busy]:.2f} ×)' for busy in BUSY]
        rows.append([name, *cells])
    table(f'images/s (ratio to the default); {processor()}, {os.cpu_count()} cores',
          ['setting', *('quiet' if busy == 0 else f'{busy} busy' for busy in BUSY)], rows,
          right=('quiet', *(f'{busy} busy' for busy in BUSY)))
    say(f'tf_efficientnet_lite0, 224 px, batch {BATCH}, forward and backward, median of {rounds} rounds of '
        f'{seconds:.0f} s; load average at the start {load:.1f}; {time.strftime("%Y-%m-%d")}')


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--seconds', type=float, default=6, help='of each measurement')
    p.add_argument('--rounds', type=int, default=2, help='measurements of each cell, of which the median counts')
    args = p.parse_args()
    main(args.seconds, args.rounds)
