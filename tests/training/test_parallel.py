"Two processes on this CPU by torchrun (gloo): what they write, and what happens when one of them fails."
import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
from conftest import ROOT, small_options
from fastai.data.core import DataLoaders, TfmdDL

from aptos_fastai.cli import main
from aptos_fastai.common import distributed
from aptos_fastai.pipeline.graph import check_run, load_run
from aptos_fastai.pipeline.scores import predict_scores, read_exported
from aptos_fastai.recipe.sections import ConfigError

pytest.importorskip('accelerate', reason='the extra `parallel`')
PROGRAM = '''
from aptos_fastai.cli import main
from aptos_fastai.reports import run_report
run_report.write_report = lambda run, *args: (run.root / 'report.html').write_text('none')
main()
'''
FAILING_PROGRAM = '''
import os, sys
from aptos_fastai.common import distributed
from aptos_fastai.training import callbacks
from aptos_fastai.cli import main
if distributed.rank() == {rank}:
    def fail(self): {statement}
    callbacks.Reproducible.before_epoch = fail
main()
'''
# keys whose callbacks fastai's distributed trainer could disturb
KEYS = ['stage.freeze_epochs=1', 'stage.ema=.9', 'stage.accumulate=2', 'stage.folds=1']
STAGES = 'teacher', 'retrain'


def options_in(small, runs, *keys):
    "Return the options of the small recipe, whose runs are in another folder"
    return [*small_options(small, *keys), '--runs', str(runs)]


def launch(options, program):
    "Run `all` of a program such as run.py in two processes; return output and exit status"
    launcher = [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--nproc-per-node', '2',
                '--master-port', '0', '--rdzv-backend', 'c10d', '--rdzv-endpoint', 'localhost:0']
    command = [str(program), 'all', *options]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    done = subprocess.run(launcher + command, capture_output=True, text=True, timeout=240, env=env, check=False)
    return done.stdout + done.stderr, done.returncode


@pytest.fixture(scope='module')
def two_process_run(small, tmp_path_factory):
    "Run folder and output of `all` in two processes"
    runs = tmp_path_factory.mktemp('two')
    (runs / 'run.py').write_text(PROGRAM)
    text, status = launch(options_in(small, runs, *KEYS), runs / 'run.py')
    assert status == 0, text
    return runs / 'small', text


def files_in(root):
    return {str(f.relative_to(root)) for f in root.rglob('*')
            if f.is_file() and f.name not in ('precision.json', 'lr_find.png')}


def test_two_processes_write_what_one_does(two_process_run, small):
    root, text = two_process_run
    of_one = small / 'runs/small'
    assert files_in(root) == {file for file in files_in(of_one) if 'fold1' not in file}
    two, one = (pd.read_csv(r / 'submission.csv') for r in (root, of_one))
    assert two.id_code.tolist() == one.id_code.tolist() and set(two.diagnosis) <= set(range(5))
    for fold in [f'{stage}/fold0' for stage in STAGES]:
        two, one = (json.loads((r / fold / 'stage.json').read_text()) for r in (root, of_one))
        assert two['processes'] == 2 and two['images'] == one['images']
        two, one = (pd.read_csv(r / fold / 'preds.csv') for r in (root, of_one))
        assert two.id_code.tolist() == one.id_code.tolist()
    assert text.count('stage 1 of 2') == 1      # only rank 0 prints


def test_every_process_trains_the_same_network(two_process_run, small):
    "Each process validated its shard with its own weights; the learner that rank 0 exported scores all images alike"
    root, _ = two_process_run
    run = load_run(small / 'small.ini', small / 'data', root.parent, KEYS)
    assert not run.todo()
    for stage in STAGES:
        preds = pd.read_csv(root / stage / 'fold0/preds.csv')
        frame = run.frames[preds.source[0]].set_index('id_code').loc[preds.id_code].reset_index()
        scores = predict_scores(read_exported(run, stage, 0), frame, run.recipe.stages[stage].tta)
        assert abs(scores - preds.score).max() < 1e-4


def test_scores_of_two_processes_equal_those_of_one(two_process_run, small):
    root, _ = two_process_run
    old = pd.read_csv(root / 'scores.csv')
    for f in [*root.glob('*/fold*/scores_*.json'), root / 'scores.csv']: f.unlink()
    main(['score', *options_in(small, root.parent, *KEYS)])
    new = pd.read_csv(root / 'scores.csv')
    assert old.id_code.equals(new.id_code) and (old.score - new.score).abs().max() < 1e-4


KILL, FAIL = 'os.kill(os.getpid(), 9)', 'raise callbacks.AptosError("disk failure")'


@pytest.mark.parametrize('rank, statement', [
    (1, KILL), *(pytest.param(*o, marks=pytest.mark.slow) for o in ((0, KILL), (0, FAIL), (1, FAIL)))])
def test_a_process_that_fails_ends_the_run(small, tmp_path, rank, statement):
    program = tmp_path / 'run.py'
    program.write_text(FAILING_PROGRAM.format(rank=rank, statement=statement))
    text, status = launch(options_in(small, tmp_path / 'runs'), program)
    assert status == 1
    errors = [line for line in text.splitlines() if line.startswith('error: ')]
    own = f'error: rank {rank} of 2: disk failure'
    of_the_other = f'error: rank {1 - rank} of 2: {distributed.PEER_LOST} ('
    if 'raise' in statement: assert own in errors
    else: assert errors or 'Signal 9 (SIGKILL) received' in text, text      # the launcher's message
    stopped = f'error: rank {1 - rank} of 2: stopped: '     # by the launcher, before it missed the other
    assert all(line.startswith((own, of_the_other, stopped)) for line in errors), errors
    assert not list((tmp_path / 'runs').rglob('stage.json'))


def test_a_batch_that_cannot_be_shared_is_refused(tables, small_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr('aptos_fastai.pipeline.graph.world_size', lambda: 2)
    run = load_run(str(small_recipe), str(tables), str(tmp_path / 'r'), ['stage.bs=7'])
    with pytest.raises(ConfigError, match=r'\[stage.teacher\] bs = 7: 2 processes cannot share it evenly. Set it to 6'):
        check_run(run, ['teacher'])


@pytest.mark.parametrize('n, bs, drop_last', [(40, 4, True), (41, 4, True), (39, 4, False), (5, 4, False)])
def test_the_shards_of_an_epoch_make_up_the_whole(monkeypatch, n, bs, drop_last):
    from aptos_fastai.training.parallel import ShardDL
    monkeypatch.setattr(ShardDL, '_broadcast', lambda self, t, rank: t)
    dl = TfmdDL(list(range(n)), bs=bs, drop_last=drop_last, device='cpu')
    DataLoaders(dl)
    shards = [ShardDL(dl, rank=r, world_size=2, device='cpu') for r in (0, 1)]
    batches = [list(shard) for shard in shards]
    steps = [len(b) for b in batches]
    assert steps[0] == steps[1] and steps == [len(shard) for shard in shards]
    seen = torch.cat([b for shard in batches for b in shard]).tolist()
    if drop_last: assert len(seen) == len(set(seen)) and len(seen) == 2 * bs * (-(-n // 2) // bs)
    else: assert set(seen) == set(range(n))


def test_with_one_process_the_functions_do_their_job_alone():
    assert distributed.world_size() == 1 and distributed.rank() == 0
    assert list(distributed.shard(3)) == [0, 1, 2] and distributed.all_gather([1, 2]) == [1, 2]
    with distributed.process_group() as leads: assert leads
    assert distributed.run_on_all_ranks(lambda bars, a: (bars, a), 'bars', 3) == ('bars', 3)
