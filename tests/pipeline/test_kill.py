"""Kill a real `python run.py all`, run it again and compare its results with an undisturbed run.

`PYTHONPATH=.:tests python tests/pipeline/test_kill.py 40` prints a table of 40 kills.
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
from conftest import small_options

from aptos_fastai.cli import main
from aptos_fastai.training.precision import cpu_has_bf16

ROOT = Path(__file__).parents[2]
TRAINING = ['stage.ema=.9', f'stage.precision={"bf16" if cpu_has_bf16() else "f32"}']
KEYS = ['demo.pretrain=60', 'demo.train=60', 'demo.test=20', 'demo.shrink=8',
        'demo.archs=legacy_seresnet50:test_resnet densenet121:test_resnet',
        'demo.stage.epochs=3', 'demo.stage.freeze_epochs=1', 'stage.tta=hflip', *TRAINING]
DEMO = ['--recipe', str(ROOT / 'settings.ini'), *(o for key in KEYS for o in ('--set', key))]
SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT


def start(runs: Path, log, options=DEMO) -> subprocess.Popen:
    "Start `all`, by default on a small demo; its output goes to `log`"
    return subprocess.Popen(
        [sys.executable, '-W', 'ignore', str(ROOT / 'run.py'), 'all', *options, '--runs', str(runs)],
        stdout=log, stderr=subprocess.STDOUT, env={**os.environ, 'OMP_NUM_THREADS': '1'},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))     # a background job would ignore Ctrl-C


def history_without_seconds(file: Path) -> list[str]:
    rows = [line.split(',') for line in file.read_text().splitlines()]
    column = rows[0].index('seconds')
    return [','.join(row[:column] + row[column + 1:]) for row in rows]


def results(runs: Path) -> dict:
    "What must be equal: submission, scores, each fold's weights, validation scores and history without its seconds"
    root, = (f.parent for f in runs.glob('*/submission.csv'))
    files = [root / 'submission.csv', root / 'scores.csv', *sorted(root.glob('*/fold*/weights.safetensors')),
             *sorted(root.glob('*/fold*/preds.csv'))]
    out = {str(f.relative_to(root)): f.read_bytes() for f in files}
    for f in sorted(root.glob('*/fold*/history.csv')): out[str(f.relative_to(root))] = history_without_seconds(f)
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
    return dict(last=last_activity(killed_log), stages=stages, code=p.returncode, left=left_over(runs),
                results=results(runs), resumed=resumed_in(rerun_log), killed_log=killed_log,
                idle='Nothing to do' in rerun_log)


def left_over(runs: Path) -> list[str]:
    "Files that only an unfinished run may have"
    return [str(f) for f in runs.rglob('*') if f.suffix == '.pt' or f.name in ('running.json', 'checkpoint.json')
            or (f.name.endswith('.tmp') and f.is_file())]


def resumed_in(log: str) -> list[tuple[str, str, str]]:
    "Stage and fold, finished epochs and epochs of each training that was resumed"
    return re.findall(r'(\w[\w ]*): resumes after epoch (\d+) of (\d+)', log)


def kill_at_line(runs: Path, options: list[str], line: str, how: signal.Signals) -> tuple[str, int]:
    "Start a run, send it a signal once its output has `line`; return its output and exit status"
    log = runs.with_suffix('.log')
    with open(log, 'w') as f: p = start(runs, f, options)
    try:
        while line not in log.read_text():
            assert p.poll() is None, log.read_text()
            time.sleep(.02)
        p.send_signal(how)
        p.wait(60)
    finally: p.kill()
    return log.read_text(), p.returncode


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


def test_killed_twice_and_run_again_it_ends_with_the_same(small, no_report, tmp_path, capsys):
    "By SIGKILL within the first training and, resumed, by Ctrl-C within the last one; never by a lucky moment"
    options = small_options(small, 'stage.folds=1', 'stage.epochs=3', 'stage.freeze_epochs=1', *TRAINING)
    main(['all', *options, '--runs', str(tmp_path / 'undisturbed')])
    runs = tmp_path / 'killed'
    log, code = kill_at_line(runs, options, 'epoch 2/4', signal.SIGKILL)
    assert code == -signal.SIGKILL and not list(runs.rglob('stage.json'))
    log, code = kill_at_line(runs, options, 'retrain  epoch 3/4', signal.SIGINT)
    assert [o[::2] for o in resumed_in(log)] == [('teacher', '4')]
    assert code == 130 and 'error: stopped' in log and 'to resume' in log and len(list(runs.rglob('stage.json'))) == 1
    capsys.readouterr()
    main(['all', *options, '--runs', str(runs)])
    assert [o[::2] for o in resumed_in(capsys.readouterr().out)] == [('retrain', '4')]
    want = results(tmp_path / 'undisturbed')
    assert len(want) == 2 + 2 * 3 and results(runs) == want and not left_over(runs)


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
