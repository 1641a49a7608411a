"What machines do to a run: full disks, second runs, dead processes, moved folders; and what strangers' files may not do."
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, STAGES, TOY, fails, sets, stamps, toy_args
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from aptos_fastai.cli import main
from aptos_fastai.common.io import AptosError, read_record, remove_stale_temp_files, run_lock, write_bytes, write_record
from aptos_fastai.pipeline import stage
from aptos_fastai.training import callbacks, checkpoint
from aptos_fastai.training import loaders as data


def small(tables, recipe, runs, *more): return ['--recipe', str(recipe), '--data', str(tables), '--runs', str(runs), *more]


# one run at a time

def test_a_second_run_is_refused_and_names_the_first(toy, capsys):
    held = f'from aptos_fastai.files import run_lock; import sys, time\nwith run_lock({str(toy)!r}): print("held", flush=True); time.sleep(60)'
    with subprocess.Popen([sys.executable, '-c', held], stdout=subprocess.PIPE, cwd=ROOT, text=True) as p:
        try:
            assert p.stdout.readline() == 'held\n'
            before = stamps(toy)
            fails(capsys, ['all', *toy_args(toy)], f'process {p.pid} on {socket.gethostname()} has been at work here since', '--runs')
            assert stamps(toy) == before
        finally: p.kill()
    assert (toy / 'running.json').is_file()                    # it died without a word
    main(['all', *toy_args(toy)])                              # and is taken over
    assert 'nothing was run' in capsys.readouterr().out and not (toy / 'running.json').exists()


def test_a_lock_lasts_as_long_as_its_block(tmp_path):
    with run_lock(tmp_path): pass
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path): 1 / 0       # noqa: B018
    with run_lock(tmp_path), pytest.raises(AptosError, match=f'process {os.getpid()} on'), run_lock(tmp_path): pass


# disks

@pytest.fixture
def disk(tmp_path):
    "A function that mounts a disk of so many kilobytes"
    mounted = []

    def mount(kilobytes, *options):
        at = tmp_path / f'disk{len(mounted)}'
        at.mkdir()
        if subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={kilobytes}k', 'tmpfs', str(at)], capture_output=True).returncode:
            pytest.skip('no right to mount a small disk here')
        mounted.append(at)
        return at
    yield mount
    for o in mounted: subprocess.run(['umount', '-l', str(o)])


@pytest.mark.parametrize('kilobytes', [16, 200, 1000, 3000])
def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_space(disk, tables, small_recipe, capsys, kilobytes):
    at = disk(kilobytes)
    fails(capsys, ['all', *small(tables, small_recipe, at / 'runs')], 'cannot be', 'No space left on device')
    whole = {p: p.read_bytes() for p in at.rglob('*') if p.name == 'stage.json'}
    assert not [p for p in at.rglob('*.tmp') if p.is_file()]
    subprocess.run(['mount', '-o', 'remount,size=60m', str(at)], check=True)
    main(['all', *small(tables, small_recipe, at / 'runs')])
    assert len(pd.read_csv(at / 'runs/small/submission.csv')) == 10 and all(p.read_bytes() == b for p, b in whole.items())


def test_a_read_only_disk_is_one_line(disk, toy, capsys):
    at = disk(60000)
    shutil.copytree(toy.parent, at / 'runs')
    subprocess.run(['mount', '-o', 'remount,ro', str(at)], check=True)
    fails(capsys, ['all', *toy_args(at / 'runs' / toy.name, '--set', 'stage.wd=.3')], 'Read-only file system', '--runs')


def test_a_write_is_whole_or_absent(tmp_path, monkeypatch):
    write_bytes(tmp_path / 'a', b'old')
    monkeypatch.setattr(os, 'fsync', lambda fd: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(AptosError, match=r'a: cannot be written \(No space left on device\)'): write_bytes(tmp_path / 'a', b'new')
    assert (tmp_path / 'a').read_bytes() == b'old' and os.listdir(tmp_path) == ['a']


def test_what_killed_writers_left_is_swept(tmp_path):
    for n, age in (('.a.1.tmp', 7200), ('.b.2.tmp', 0)): (tmp_path / n).write_bytes(b'x'); os.utime(tmp_path / n, (time.time() - age,) * 2)
    remove_stale_temp_files(tmp_path)
    assert os.listdir(tmp_path) == ['.b.2.tmp']


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                    lambda o: st.lists(o) | st.dictionaries(st.text().filter(lambda k: k != 'seal'), o)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
def test_a_record_comes_back_or_is_refused(tmp_path, o):
    write_record(tmp_path / 'r.json', dict(o=o))
    assert read_record(tmp_path / 'r.json') == dict(o=o)
    text = (tmp_path / 'r.json').read_text()
    (tmp_path / 'r.json').write_text(text.replace('"o":', '"p":', 1))
    with pytest.raises(AptosError, match='is not what a run wrote'): read_record(tmp_path / 'r.json')


def test_a_folder_may_move(tables, small_recipe, tmp_path, capsys):
    main(['all', *small(tables, small_recipe, tmp_path / 'data/runs')])
    shutil.copytree(tmp_path / 'data', tmp_path / 'elsewhere/data')
    shutil.rmtree(tmp_path / 'data')
    capsys.readouterr()
    main(['all', *small(tmp_path / 'elsewhere/data', small_recipe, tmp_path / 'elsewhere/data/runs')])
    assert 'nothing was run' in capsys.readouterr().out
    root = tmp_path / 'elsewhere/data/runs/small'
    assert not [f for f in root.rglob('*.json') if str(tmp_path) in f.read_text()]           # no record holds a path of the first place


# trainings

@pytest.mark.parametrize('stop', [1, 2, 3, 4])
def test_a_stopped_stage_goes_on_and_is_equal_to_the_bit(tables, small_recipe, tmp_path, monkeypatch, capsys, stop):
    "With a frozen start, a moving average, accumulated steps and dropout"
    keys = sets('freeze_epochs=2', 'epochs=2', 'ema=.9', 'accumulate=2', 'folds=1', 'dropout=.3', 'keep=loss')
    whole, parts = (['train', 'teacher', *small(tables, small_recipe, tmp_path / n, *keys)] for n in 'ab')
    main(whole)
    real = checkpoint.Checkpoint.after_epoch

    def after(self):
        real(self)
        if len(self.parts[0].rows) == stop: raise KeyboardInterrupt
    monkeypatch.setattr(checkpoint.Checkpoint, 'after_epoch', after)
    with pytest.raises(SystemExit) as e: main(parts)
    assert e.value.code == 130 and f'stopped; teacher has finished {stop} of 4 epochs' in capsys.readouterr().err
    monkeypatch.undo()
    main(parts)
    assert f'goes on after epoch {stop} of 4' in capsys.readouterr().out
    a, b = (tmp_path / n / 'small/teacher/fold0' for n in 'ab')
    wa, wb = load_file(a / 'weights.safetensors'), load_file(b / 'weights.safetensors')
    assert all(torch.equal(wa[k], wb[k]) for k in wa) and (a / 'preds.csv').read_text() == (b / 'preds.csv').read_text()
    ha, hb = (pd.read_csv(o / 'history.csv').drop(columns='seconds') for o in (a, b))
    assert ha.equals(hb) and ha.kept.sum() == 1 and read_record(b / 'stage.json')['resumed_after_epochs'] == [stop]
    assert not list(b.glob('checkpoint*'))


def test_a_checkpoint_of_other_settings_or_damaged_is_not_gone_on_from(tables, small_recipe, tmp_path, monkeypatch, capsys):
    args = ['train', 'teacher', *small(tables, small_recipe, tmp_path / 'r', '--set', 'stage.folds=1', '--set', 'stage.epochs=2')]
    real = checkpoint.Checkpoint.after_epoch
    monkeypatch.setattr(checkpoint.Checkpoint, 'after_epoch', lambda self: (real(self), (_ for _ in ()).throw(KeyboardInterrupt)))
    with pytest.raises(SystemExit): main(args)
    monkeypatch.undo()
    shutil.copytree(tmp_path / 'r', tmp_path / 's')
    main([*args, '--set', 'stage.wd=.3'])
    assert 'goes on after' not in capsys.readouterr().out
    f = tmp_path / 's/small/teacher/fold0/checkpoint-1.pt'
    f.write_bytes(f.read_bytes()[:-1] + b'x')
    main([o if o != str(tmp_path / 'r') else str(tmp_path / 's') for o in args])
    out = capsys.readouterr().out
    assert 'checkpoint-1.pt: is not what this run wrote' in out and 'begins anew' in out and 'goes on after' not in out


def test_a_loss_that_is_no_number_stops_and_keeps_the_best_epoch(tables, small_recipe, tmp_path, monkeypatch, capsys):
    real = callbacks.History.after_epoch

    def after(self):
        if len(self.rows) == 2: self.recorder.values[-1][0] = np.nan
        real(self)
    monkeypatch.setattr(callbacks.History, 'after_epoch', after)
    err = fails(capsys, ['train', 'teacher', *small(tables, small_recipe, tmp_path / 'r', *sets('epochs=4', 'folds=1'))],
                '[stage.teacher] fold 0, epoch 3: the loss is nan', "lower the stage's lr", 'best.safetensors')
    w = load_file(err.split(' are in ')[1].strip())
    assert all(torch.isfinite(v.float()).all() for v in w.values()) and not list((tmp_path / 'r').rglob('stage.json'))


@pytest.mark.parametrize('fault, words', [
    (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'), ['out of memory with bs = 8 at 32 px: set bs = 4 and accumulate = 2']),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), ['out of memory with bs = 8', 'accumulate = 2']), (MemoryError(), ['set bs = 4'])])
def test_too_little_memory_names_a_batch_that_fits(tables, small_recipe, tmp_path, monkeypatch, capsys, fault, words):
    def full(*a): raise fault
    monkeypatch.setattr(stage, 'fit_stage', full)
    fails(capsys, ['train', 'teacher', *small(tables, small_recipe, tmp_path / 'r')], '[stage.teacher] fold 0', *words)


def test_a_step_needs_its_batches(tables, small_recipe, tmp_path, capsys):
    "31 images train: more than three batches of 8 would never make a step"
    args = ['train', 'teacher', *small(tables, small_recipe, tmp_path / 'r')]
    fails(capsys, [*args, '--set', 'stage.accumulate=4'], 'accumulate = 4: only', 'with bs = 8 set it to 3 or less')
    assert not (tmp_path / 'r').exists()


def test_half_a_batch_accumulated_is_nearly_the_same_step(tables, small_recipe, tmp_path):
    "Equal but for batch normalisation's statistics"
    kappas = []
    for name, *keys in (('a', 'bs=8'), ('b', 'bs=4', 'accumulate=2')):
        main(['train', 'teacher', *small(tables, small_recipe, tmp_path / name, *sets('folds=1', 'epochs=3', *keys))])
        kappas.append(pd.read_csv(tmp_path / name / 'small/teacher/fold0/history.csv').train_loss.iloc[-1])
    assert abs(kappas[0] - kappas[1]) < .35 and kappas[0] != kappas[1]


def test_a_loader_that_dies_is_told(tables, small_recipe, tmp_path, monkeypatch, capsys):
    me = os.getpid()
    monkeypatch.setattr(data, 'read_square', lambda *a: dies_elsewhere(me))
    fails(capsys, ['train', 'teacher', *small(tables, small_recipe, tmp_path / 'r', *sets('workers=1', 'folds=1'))],
          'a process that loads images died', 'workers = 0')


def dies_elsewhere(me):
    if os.getpid() != me: os._exit(9)
    return np.zeros((32, 32, 3), np.uint8)


def test_same_seed_same_run_with_any_number_of_loaders(toy, tmp_path):
    main(['all', '--recipe', str(ROOT / 'settings.ini'), '--runs', str(tmp_path), *TOY, '--set', 'stage.workers=2'])
    other = tmp_path / toy.name
    for f in ('submission.csv', 'scores.csv', 'oof.csv', *(f'{s}/fold0/preds.csv' for s in STAGES), *(f'{s}/fold0/weights.safetensors' for s in STAGES)):
        assert (toy / f).read_bytes() == (other / f).read_bytes(), f


# strangers

class Evil:
    "A pickle that leaves a trace when it is read"
    def __init__(self, trace): self.trace = trace
    def __reduce__(self): return (open, (str(self.trace), 'w'))


def test_a_strangers_pickle_is_not_read_unless_trusted(toy, tables, small_recipe, tmp_path, capsys):
    for name in ('w.pkl', 'w.pth', 'w.safetensors'):
        (tmp_path / name).write_bytes(pickle.dumps(Evil(tmp_path / 'trace')))
        fails(capsys, ['train', 'teacher', *small(tables, small_recipe, tmp_path / 'r', *sets(f'teacher.weights={tmp_path / name}'))], name)
    own = tmp_path / 'own.pkl'
    shutil.copy(toy / 'finetune_256/fold0/learner.pkl', own)
    args = ['train', 'teacher', *small(tables, small_recipe, tmp_path / 'r', *sets(f'teacher.weights={own}', 'folds=1'))]
    fails(capsys, args, 'own.pkl: is a pickle', f'--trust {own}')
    main([*args, '--trust', str(own)])
    assert 'is not' not in capsys.readouterr().err and not (tmp_path / 'trace').exists()
    fails(capsys, [*args, '--set', 'stage.wd=.3'], 'is a pickle')                          # trust is for one command


def test_a_learner_that_was_exchanged_is_not_read(copied, tmp_path, capsys):
    (copied / 'pretrain_256/fold0/learner.pkl').write_bytes(pickle.dumps(Evil(tmp_path / 'trace')))
    (copied / 'pretrain_256/fold0/checkpoint-1.pt').write_bytes(pickle.dumps(Evil(tmp_path / 'trace')))
    write_record(copied / 'finetune_256/fold0/checkpoint.json', dict(key='x', file='../../pretrain_256/fold0/checkpoint-1.pt', hash='y', epochs=1, resumed=[]))
    main(['all', *toy_args(copied, '--set', 'stage.finetune_256.wd=.2')])                   # of another size: the stage runs anew
    assert 'stage 1 of 3: pretrain_256' in capsys.readouterr().out and not (tmp_path / 'trace').exists()


def test_no_command_evaluates_text_or_starts_a_shell():
    source = ''.join(p.read_text() for p in (ROOT / 'aptos_fastai').glob('*.py'))
    for word in ('shell=True', ' eval(', ' exec(', 'os.system', 'pickle.load', 'weights_only=False'): assert word not in source, word


def test_a_run_asks_no_other_host(toy):
    code = ('import socket, sys\nreal = socket.socket.connect\n'
            'def no(self, a):\n    if self.family != socket.AF_UNIX: raise SystemExit(f"asked {a}")\n    return real(self, a)\n'
            'socket.socket.connect = no\nsocket.getaddrinfo = lambda *a, **k: (_ for _ in ()).throw(SystemExit(f"asked {a}"))\n'
            'from aptos_fastai.cli import main\nmain(sys.argv[1:])')
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, 'train', 'pretrain_dense', *toy_args(toy, '--set', 'stage.pretrain_dense.wd=.7'),
                          '--runs', str(toy.parent.parent / 'alone')], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert out.returncode == 0, out.stderr


def test_the_hub_is_not_asked_where_it_must_not_be(tables, small_recipe, tmp_path, capsys, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(socket, 'create_connection', lambda *a, **k: pytest.fail('a host was asked'))
    fails(capsys, ['train', 'teacher', *small(tables, small_recipe, tmp_path / 'r', *sets('weights=imagenet', 'arch=resnet18'))], 'HF_HUB_OFFLINE is set')


# doctor

def test_doctor(toy, tables, small_recipe, tmp_path, capsys):
    main(['doctor', *toy_args(toy)])
    out = capsys.readouterr().out
    assert 'Nothing found that would stop' in out and 'every stage is finished' in out and 'BAD' not in out
    main(['doctor', *small(tables, small_recipe, tmp_path / 'r')])
    assert 'table train: 40 images' in capsys.readouterr().out and not (tmp_path / 'r').exists()
    (tables / 'train.csv').unlink()
    fails(capsys, ['doctor', *small(tables, small_recipe, tmp_path / 'r', *sets('weights=nowhere.pth'))], '2 things would stop `all`')
    fails(capsys, ['doctor', '--recipe', ROOT / 'settings.ini', '--data', tmp_path, '--runs', tmp_path / 'r'], 'things would stop')
    fails(capsys, ['doctor', '--recipe', tmp_path / 'no.ini'], '1 thing would stop')


def test_doctor_says_how_to_get_kaggles_tables(tmp_path, capsys):
    with pytest.raises(SystemExit): main(['doctor', '--recipe', str(ROOT / 'settings.ini'), '--data', str(tmp_path), '--runs', str(tmp_path / 'r')])
    out = capsys.readouterr().out
    for c in ('aptos2019-blindness-detection', 'diabetic-retinopathy-detection'): assert f'kaggle competitions download -c {c} -p {tmp_path}' in out

