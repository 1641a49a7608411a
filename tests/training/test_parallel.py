"More processes than one: two on this CPU by torchrun (gloo), what they write, and what happens when one of them fails."
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT, TOY
from fastai.data.core import DataLoaders, TfmdDL

from aptos_fastai.common import distributed
from aptos_fastai.pipeline.graph import open_run
from aptos_fastai.pipeline.scores import predict_scores, read_exported

pytest.importorskip('accelerate', reason='the extra `parallel`')
FAILING = '''
import os, sys
from aptos_fastai.common import distributed
from aptos_fastai.training import callbacks
from aptos_fastai.cli import main
if distributed.rank() == {rank}:
    def fails(self): {what}
    callbacks.Reproducible.before_epoch = fails
main()
'''


SETS = ['--set', 'demo.stage.freeze_epochs=1', '--set', 'stage.ema=.9', '--set', 'stage.accumulate=2']     # what goes through fastai's trainer in several ways


def launch(runs: Path, *more, program=ROOT / 'run.py'):
    "Output and exit status of `all` on the toy demo in two processes; none of it may wait for ever"
    cmd = [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-port', '0', '--rdzv-backend', 'c10d',
           '--rdzv-endpoint', 'localhost:0', str(program), 'all', '--recipe', str(ROOT / 'settings.ini'), '--runs', str(runs), *TOY, *more]
    o = subprocess.run(cmd, capture_output=True, text=True, timeout=240, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}, check=False)
    return o.stdout + o.stderr, o.returncode


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    runs = tmp_path_factory.mktemp('two')
    text, rc = launch(runs, *SETS)
    assert rc == 0, text
    return runs / 'settings-demo', text


def test_two_processes_write_what_one_does(two, toy):
    root, text = two
    def files(r): return {str(f.relative_to(r)) for f in r.rglob('*') if f.is_file() and f.name not in ('precision.json', 'lr_find.png')}
    assert files(root) == files(toy)
    a, b = (pd.read_csv(r / 'submission.csv') for r in (root, toy))
    assert a.id_code.tolist() == b.id_code.tolist() and set(a.diagnosis) <= set(range(5))
    for s in ('pretrain_256', 'retrain_512'):
        o, p = (json.loads((r / s / 'fold0/stage.json').read_text()) for r in (root, toy))
        assert o['processes'] == 2 and o['images'] == p['images']
        x, y = (pd.read_csv(r / s / 'fold0/preds.csv') for r in (root, toy))
        assert x.id_code.tolist() == y.id_code.tolist()
    assert text.count('stage 1 of 7') == 1      # one of them speaks

def test_every_process_trains_the_same_network(two):
    "The processes score a part of the validation images each, by their own weights: what one of them exported gives the same scores for all"
    root, _ = two
    run = open_run(str(ROOT / 'settings.ini'), 'demo', str(root.parent), [o for o in [*TOY, *SETS] if o != '--set'])
    assert not run.todo()
    for s in ('pretrain_256', 'retrain_512'):
        p = pd.read_csv(root / s / 'fold0/preds.csv')
        frame = run.frames[p.source[0]].set_index('id_code').loc[p.id_code].reset_index()
        assert abs(predict_scores(read_exported(run, s, 0), frame, run.recipe.stages[s].tta) - p.score).max() < 1e-4


def test_every_process_scores_its_part_and_the_whole_is_in_order(two, toy_args_of):
    "What two processes scored, one scores again"
    root, _ = two
    old = pd.read_csv(root / 'scores.csv')
    for f in [*root.glob('*/fold0/scores_*.json'), root / 'scores.csv']: f.unlink()
    toy_args_of(root, 'predict')
    new = pd.read_csv(root / 'scores.csv')
    assert old.id_code.equals(new.id_code) and (old['mean'] - new['mean']).abs().max() < 1e-4


@pytest.fixture
def toy_args_of():
    from aptos_fastai.cli import main
    return lambda root, command: main([command, '--recipe', str(ROOT / 'settings.ini'), '--runs', str(root.parent), *TOY, *SETS])


@pytest.mark.parametrize('rank', [0, 1])
@pytest.mark.parametrize('what', ['os.kill(os.getpid(), 9)', 'raise callbacks.AptosError("its disk is gone")'])
def test_a_process_that_fails_ends_the_run(tmp_path, rank, what):
    program = tmp_path / 'run.py'
    program.write_text(FAILING.format(rank=rank, what=what))
    t = time.monotonic()
    text, rc = launch(tmp_path / 'runs', program=program)
    lines = [o for o in text.splitlines() if o.startswith('error: ')]
    assert rc == 1 and time.monotonic() - t < 120
    if 'raise' in what: assert f'error: rank {rank} of 2: its disk is gone' in lines
    assert lines and all(o.startswith((f'error: rank {rank} of 2: its disk is gone', f'error: rank {1 - rank} of 2: {distributed.LOST} (')) for o in lines), lines
    assert not list((tmp_path / 'runs').rglob('stage.json'))


def test_a_batch_that_cannot_be_shared_is_refused(tables, small_recipe, tmp_path, monkeypatch):
    from aptos_fastai.pipeline.graph import check_run, open_run
    monkeypatch.setattr('aptos_fastai.pipeline.graph.size', lambda: 2)
    run = open_run(str(small_recipe), str(tables), str(tmp_path / 'r'), ['stage.bs=7'])
    with pytest.raises(Exception, match=re.escape('[stage.teacher] bs = 7: 2 processes cannot share it evenly; set it to 6')): check_run(run, ['teacher'])


def test_the_parts_of_an_epoch_make_up_the_whole(monkeypatch):
    from aptos_fastai.training.parallel import PartDL
    monkeypatch.setattr(PartDL, '_broadcast', lambda self, t, rank: t)
    for n, bs, last in [(40, 4, True), (41, 4, True), (39, 4, False), (5, 4, False)]:
        dl = TfmdDL(list(range(n)), bs=bs, drop_last=last, device='cpu')
        DataLoaders(dl)
        parts = [PartDL(dl, rank=r, world_size=2, device='cpu') for r in (0, 1)]
        seen = [[b for b in p] for p in parts]
        assert [len(o) for o in seen] == [len(p) for p in parts] == [len(parts[0])] * 2       # the same number of steps in each
        found = torch.cat([b for o in seen for b in o]).tolist()
        if last: assert len(found) == len(set(found)) and len(found) == 2 * bs * (-(-n // 2) // bs)
        else: assert set(found) == set(range(n))


def test_one_process_is_its_plain_self():
    assert (distributed.world_size(), distributed.rank(), list(distributed.shard(3)), distributed.all_gather([1, 2])) == (1, 0, [0, 1, 2], [1, 2])
    with distributed.process_group() as leads: assert leads
    assert distributed.run_on_all_ranks(lambda bars, a: (bars, a), 'bars', 3) == ('bars', 3)
