"Kills a real `python run.py all` at random moments, lets it go on, and compares what it ends with: python tests/test_kill.py 40 prints the table."
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
KEYS = ('demo.pretrain=120 demo.train=80 demo.test=20 demo.shrink=8 stage.tta=hflip demo.stage.epochs=6 demo.stage.freeze_epochs=1 stage.ema=.9 '
        f'stage.precision={"bf16" if cpu_has_bf16() else "f32"} demo.archs=legacy_seresnet50:test_resnet,densenet121:test_resnet').split()


def start(runs: Path, log):
    sets = [o for k in KEYS for o in ('--set', k.replace(',', ' '))]
    return subprocess.Popen([sys.executable, '-W', 'ignore', str(ROOT / 'run.py'), 'all', '--recipe', str(ROOT / 'settings.ini'), '--runs', str(runs), *sets],
                            stdout=log, stderr=subprocess.STDOUT, env={**os.environ, 'OMP_NUM_THREADS': '1'},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))     # a job in the background ignores it


def results(runs: Path) -> dict:
    "What must be equal: the submission, the scores, every stage's weights, validation scores and history but for its seconds"
    root = runs / 'settings-demo'
    out = {str(f.relative_to(root)): f.read_bytes() for f in [root / 'submission.csv', root / 'scores.csv', *sorted(root.glob('*/fold0/weights.safetensors')),
                                                             *sorted(root.glob('*/fold0/preds.csv'))]}
    for f in sorted(root.glob('*/fold0/history.csv')):
        out[str(f.relative_to(root))] = [r.rsplit(',', 2)[0] + r.rsplit(',', 1)[1] for r in f.read_text().splitlines()]
    return out


def atomic_write(folder: Path) -> tuple[dict, float]:
    "Results of a run that nobody disturbs, and how long it took"
    t = time.monotonic()
    with open(folder / 'whole.log', 'w') as log: assert start(folder / 'whole', log).wait(600) == 0, (folder / 'whole.log').read_text()
    return results(folder / 'whole'), time.monotonic() - t


def killed(folder: Path, i: int, after: float, how: signal.Signals) -> dict:
    "Kills a run `after` seconds, runs it again to its end: what it was doing, what it went on from, its results"
    runs, log = folder / f'killed{i}', folder / f'killed{i}.log'
    with open(log, 'w') as f:
        p = start(runs, f)
        try: p.wait(after)
        except subprocess.TimeoutExpired: p.send_signal(how); p.wait(60)
    before, done = log.read_text(), len(list(runs.glob('*/*/fold0/stage.json')))
    with open(log, 'w') as f: assert start(runs, f).wait(600) == 0, log.read_text()
    said = [r for r in before.splitlines() if not r.startswith(('SYNTHETIC', 'error', ' ')) or 'epoch' in r or 'labels' in r]
    on = re.findall(r'(\w+): goes on after epoch (\d+) of (\d+)', after_text := log.read_text())
    left = [str(f) for f in runs.rglob('*') if f.suffix == '.pt' or f.name in ('running.json', 'checkpoint.json') or (f.name.endswith('.tmp') and f.is_file())]
    return dict(last=(said or ['starting'])[-1].split('->')[0].strip()[:60], stages=done, on=on, left=left, results=results(runs), code=p.returncode,
                before=before, idle='nothing was run' in after_text)


def table(folder: Path, n: int, seed: int = 0) -> list[dict]:
    rng, (want, seconds) = random.Random(seed), atomic_write(folder)
    print(f'undisturbed: {seconds:.0f} s, {len(want)} files compared', flush=True)
    rows = []
    for i in range(n):
        after, how = rng.uniform(.2, seconds), (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT)[i % 4]
        o = killed(folder, i, after, how)
        o |= dict(after=after, how=how.name, equal=o['results'] == want)
        on = 'everything done' if o['idle'] else f'after {o["stages"]} stages' + ''.join(f', {s} after epoch {k} of {m}' for s, k, m in o['on'])
        print(f'{i + 1:>2} {how.name} at {after:5.1f} s | {o["last"]:<60} | {on} | {"equal" if o["equal"] else "NOT EQUAL"}', flush=True)
        rows.append(o)
    return rows


def check(rows: list[dict]):
    for o in rows:
        assert o['equal'] and not o['left'], (o['last'], o['left'])
        if o['how'] != 'SIGKILL' and 'stage 1' in o['before'] and 'in all' not in o['before']:
            assert o['code'] in (130, 143) and 'stopped; ' in o['before'] and 'goes on from there' in o['before'], o['before']


def test_killed_and_run_again_it_ends_with_the_same(tmp_path): check(table(tmp_path, 3, seed=1))


@pytest.mark.slow
def test_killed_at_forty_moments(tmp_path): check(table(tmp_path, 40))


@pytest.mark.slow
def test_killed_again_and_again_in_one_folder(tmp_path):
    "A machine that dies every few seconds gets there, too"
    want, seconds = atomic_write(tmp_path)
    for i in range(60):
        with open(tmp_path / 'log', 'w') as f:
            p = start(tmp_path / 'often', f)
            try: code = p.wait(.6 * seconds + .05 * i)
            except subprocess.TimeoutExpired: code = p.kill() or p.wait()
        if code == 0: break
    assert code == 0 and results(tmp_path / 'often') == want


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as tmp:
        rows = table(Path(tmp), int(sys.argv[1]) if len(sys.argv) > 1 else 40)
        check(rows)
        print(json.dumps(dict(moments=len(rows), equal=sum(o['equal'] for o in rows))))
