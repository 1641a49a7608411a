"""Kill a real `python run.py all` at random moments, run it again and compare its results with an undisturbed run.

`PYTHONPATH=. python tests/pipeline/test_kill.py 40` prints a table of 40 kills.
"""
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from aptos_fastai.training.precision import cpu_has_bf16

ROOT = Path(__file__).parents[2]
KEYS = ['demo.pretrain=60', 'demo.train=60', 'demo.test=20', 'demo.shrink=8',
        'demo.archs=legacy_seresnet50:test_resnet densenet121:test_resnet',
        'demo.stage.epochs=3', 'demo.stage.freeze_epochs=1',
        'stage.tta=hflip', 'stage.ema=.9', f'stage.precision={"bf16" if cpu_has_bf16() else "f32"}']
SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT


def start(runs: Path, log) -> subprocess.Popen:
    "Start `all` on a small demo; its output goes to `log`"
    options = [o for key in KEYS for o in ('--set', key)]
    return subprocess.Popen(
        [sys.executable, '-W', 'ignore', str(ROOT / 'run.py'), 'all', '--recipe', str(ROOT / 'settings.ini'),
         '--runs', str(runs), *options],
        stdout=log, stderr=subprocess.STDOUT, env={**os.environ, 'OMP_NUM_THREADS': '1'},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))     # a background job would ignore Ctrl-C


def history_without_seconds(file: Path) -> list[str]:
    rows = [line.split(',') for line in file.read_text().splitlines()]
    column = rows[0].index('seconds')
    return [','.join(row[:column] + row[column + 1:]) for row in rows]


def results(runs: Path) -> dict:
    "What must be equal: submission, scores, each stage's weights, validation scores and history without its seconds"
    root = runs / 'settings-demo'
    files = [root / 'submission.csv', root / 'scores.csv', *sorted(root.glob('*/fold0/weights.safetensors')),
             *sorted(root.glob('*/fold0/preds.csv'))]
    out = {str(f.relative_to(root)): f.read_bytes() for f in files}
    for f in sorted(root.glob('*/fold0/history.csv')): out[str(f.relative_to(root))] = history_without_seconds(f)
    return out


def undisturbed(folder: Path) -> tuple[dict, float]:
    "Results and seconds of a run that is not killed"
    begin, log = time.monotonic(), folder / 'undisturbed.log'
    with open(log, 'w') as f: status = start(folder / 'undisturbed', f).wait(600)
    assert status == 0, log.read_text()
    return results(folder / 'undisturbed'), time.monotonic() - begin


def last_activity(log: str) -> str:
    "The last line of a log that says what the run was doing"
    lines = [line for line in log.splitlines()
             if not line.startswith(('SYNTHETIC', 'error', ' ')) or 'epoch' in line or 'labels' in line]
    return (lines or ['starting'])[-1].split('->')[0].strip()[:60]


def kill_and_rerun(folder: Path, i: int, after: float, how: signal.Signals) -> dict:
    "Kill a run `after` seconds and run it again to its end; return what it was doing, where it resumed, its results"
    runs, log = folder / f'killed{i}', folder / f'killed{i}.log'
    with open(log, 'w') as f:
        p = start(runs, f)
        try: p.wait(after)
        except subprocess.TimeoutExpired:
            p.send_signal(how)
            p.wait(60)
    killed_log, stages = log.read_text(), len(list(runs.glob('*/*/fold0/stage.json')))
    with open(log, 'w') as f: status = start(runs, f).wait(600)
    assert status == 0, log.read_text()
    rerun_log = log.read_text()
    left = [str(f) for f in runs.rglob('*') if f.suffix == '.pt' or f.name in ('running.json', 'checkpoint.json')
            or (f.name.endswith('.tmp') and f.is_file())]
    return dict(last=last_activity(killed_log), stages=stages, code=p.returncode, left=left, results=results(runs),
                resumed=re.findall(r'(\w+): resumes after epoch (\d+) of (\d+)', rerun_log),
                killed_log=killed_log, idle='Nothing to do' in rerun_log)


def kill_at_random_moments(folder: Path, n: int, seed: int = 0) -> list[dict]:
    "Kill `n` runs, each at another moment; print a line for each"
    rng = random.Random(seed)
    want, seconds = undisturbed(folder)
    print(f'undisturbed: {seconds:.0f} s, {len(want)} files compared', flush=True)
    rows = []
    for i in range(n):
        after, how = rng.uniform(.2, seconds), SIGNALS[i % 4]
        row = kill_and_rerun(folder, i, after, how)
        row |= dict(after=after, how=how.name, equal=row['results'] == want)
        resumed = [f'after {row["stages"]} stages', *(f'{s} after epoch {k} of {m}' for s, k, m in row['resumed'])]
        if row['idle']: resumed = ['everything was finished']
        equal = 'equal' if row['equal'] else 'NOT EQUAL'
        print(f'{i + 1:>2} {how.name} at {after:5.1f} s | {row["last"]:<60} | {", ".join(resumed)} | {equal}',
              flush=True)
        rows.append(row)
    return rows


def check(rows: list[dict]):
    for row in rows:
        log = row['killed_log']
        assert row['equal'] and not row['left'], (row['last'], row['left'])
        if row['how'] != 'SIGKILL' and 'stage 1' in log and 'in all' not in log:
            assert row['code'] in (130, 143) and 'error: stopped' in log and 'to resume' in log, log


def test_killed_and_run_again_it_ends_with_the_same(tmp_path):
    check(kill_at_random_moments(tmp_path, 3, seed=1))


@pytest.mark.slow
def test_killed_at_forty_moments(tmp_path): check(kill_at_random_moments(tmp_path, 40))


@pytest.mark.slow
def test_killed_again_and_again_in_one_folder(tmp_path):
    "A machine that fails every few seconds finishes, too"
    want, seconds = undisturbed(tmp_path)
    for i in range(60):
        with open(tmp_path / 'log', 'w') as f:
            p = start(tmp_path / 'often', f)
            try: code = p.wait(.6 * seconds + .05 * i)
            except subprocess.TimeoutExpired:
                p.kill()
                code = p.wait()
        if code == 0: break
    assert code == 0 and results(tmp_path / 'often') == want


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as tmp:
        rows = kill_at_random_moments(Path(tmp), int(sys.argv[1]) if len(sys.argv) > 1 else 40)
        check(rows)
        print(json.dumps(dict(moments=len(rows), equal=sum(row['equal'] for row in rows))))
