"Full disks, second runs, killed processes, moved folders, and files from others."
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    ROOT,
    expect_error,
    modified_times,
    small_options,
    stage_options,
    toy_args,
    write_small_recipe,
    write_table,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from aptos_fastai.cli import main
from aptos_fastai.common.io import AptosError, read_record, remove_stale_temp_files, run_lock, write_bytes, write_record
from aptos_fastai.pipeline import stage
from aptos_fastai.pipeline.doctor import WARNING, check_devices, smaller_recipe
from aptos_fastai.training import callbacks, checkpoint, loaders

RECIPE = str(ROOT / 'settings.ini')
UP_TO_DATE = 'Nothing to do: every stage is up to date'


def small_args(tables, recipe, runs, *more):
    return ['--recipe', str(recipe), '--data', str(tables), '--runs', str(runs), *more]


def raise_error(error):
    "Raise from inside a lambda"
    raise error


# One run at a time

def test_a_second_run_is_refused_and_names_the_first(toy, capsys):
    program = (f'from aptos_fastai.common.io import run_lock\nimport time\n'
               f'with run_lock({str(toy)!r}): print("locked", flush=True); time.sleep(60)')
    with subprocess.Popen([sys.executable, '-c', program], stdout=subprocess.PIPE, cwd=ROOT, text=True) as p:
        try:
            assert p.stdout.readline() == 'locked\n'
            before = modified_times(toy)
            owner = f'in use by process {p.pid} on {socket.gethostname()} since'
            expect_error(capsys, ['all', *toy_args(toy)], owner, '--runs')
            assert modified_times(toy) == before
        finally: p.kill()
    assert (toy / 'running.json').is_file()                    # the killed process could not remove it
    main(['all', *toy_args(toy)])                              # the next run takes the lock
    assert UP_TO_DATE in capsys.readouterr().out and not (toy / 'running.json').exists()


def test_a_lock_lasts_as_long_as_its_block(tmp_path):
    with run_lock(tmp_path): pass
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path): 1 / 0       # noqa: B018
    with run_lock(tmp_path), pytest.raises(AptosError, match=f'process {os.getpid()} on'), run_lock(tmp_path): pass


# Disks and files

@pytest.fixture
def mount_disk(tmp_path):
    "A function that mounts a disk of so many kilobytes"
    mounted = []

    def mount(kilobytes):
        folder = tmp_path / f'disk{len(mounted)}'
        folder.mkdir()
        command = ['mount', '-t', 'tmpfs', '-o', f'size={kilobytes}k', 'tmpfs', str(folder)]
        if subprocess.run(command, capture_output=True).returncode: pytest.skip('no right to mount a disk here')
        mounted.append(folder)
        return folder
    yield mount
    for folder in mounted: subprocess.run(['umount', '-l', str(folder)])


@pytest.mark.parametrize('kilobytes', [pytest.param(16, marks=pytest.mark.slow), 200,
                                       pytest.param(1000, marks=pytest.mark.slow), 3000])
def test_a_full_disk_is_one_line_and_the_run_resumes_once_there_is_space(mount_disk, tables, small_recipe, no_report,
                                                                         capsys, kilobytes):
    disk = mount_disk(kilobytes)
    args = ['all', *small_args(tables, small_recipe, disk / 'runs')]
    expect_error(capsys, args, 'cannot', 'No space left on device')
    finished = {p: p.read_bytes() for p in disk.rglob('*') if p.name == 'stage.json'}
    assert not [p for p in disk.rglob('*.tmp') if p.is_file()]
    subprocess.run(['mount', '-o', 'remount,size=60m', str(disk)], check=True)
    main(args)
    assert len(pd.read_csv(disk / 'runs/small/submission.csv')) == 10
    assert all(p.read_bytes() == b for p, b in finished.items())


def test_a_read_only_disk_is_one_line(mount_disk, toy, capsys):
    disk = mount_disk(60000)
    shutil.copytree(toy.parent, disk / 'runs')
    subprocess.run(['mount', '-o', 'remount,ro', str(disk)], check=True)
    args = ['all', *toy_args(disk / 'runs' / toy.name, '--set', 'stage.wd=.3'), '--replace']
    expect_error(capsys, args, 'Read-only file system', '--runs')


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_bytes(tmp_path / 'a', b'old')
    monkeypatch.setattr(os, 'fsync', lambda fd: raise_error(OSError(28, 'No space left on device')))
    with pytest.raises(AptosError, match=r'a: cannot write this file \(No space left on device\)'):
        write_bytes(tmp_path / 'a', b'new')
    assert (tmp_path / 'a').read_bytes() == b'old' and os.listdir(tmp_path) == ['a']


def test_old_temporary_files_are_removed(tmp_path):
    for name, seconds_old in (('.a.1.tmp', 7200), ('.b.2.tmp', 0)):
        (tmp_path / name).write_bytes(b'x')
        os.utime(tmp_path / name, (time.time() - seconds_old,) * 2)
    remove_stale_temp_files(tmp_path)
    assert os.listdir(tmp_path) == ['.b.2.tmp']


VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
KEYS = st.text().filter(lambda k: k != 'record_sha256')


@given(st.recursive(VALUES, lambda o: st.lists(o) | st.dictionaries(KEYS, o)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_a_record_is_read_back_or_refused(tmp_path, o):
    file = tmp_path / 'r.json'
    write_record(file, dict(o=o))
    assert read_record(file) == dict(o=o)
    file.write_text(file.read_text().replace('"o":', '"p":', 1))
    with pytest.raises(AptosError, match='content changed'): read_record(file)


def test_a_folder_may_move(small_copy, tmp_path, capsys):
    moved = small_copy.rename(tmp_path / 'elsewhere')
    main(['all', *small_options(moved)])
    assert UP_TO_DATE in capsys.readouterr().out
    records = list((moved / 'runs').rglob('*.json'))
    assert {'run.json', 'stage.json', 'summary.json', 'provenance.json'} <= {f.name for f in records}
    assert not [f for f in records if str(tmp_path.parents[1]) in f.read_text()]         # records hold no absolute path


# Training

INTERRUPTED = stage_options('freeze_epochs=2', 'epochs=2', 'ema=.9', 'accumulate=2', 'folds=1', 'dropout=.3',
                            'keep=loss')


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    "A folder with recipe, data and a stage that was trained without an interruption; tests must not change it"
    folder = tmp_path_factory.mktemp('uninterrupted')
    write_table(folder / 'data', 40)
    write_table(folder / 'data', 10, graded=False, seed=1, name='test')
    write_small_recipe(folder / 'small.ini')
    main(['train', 'teacher', *small_options(folder), *INTERRUPTED])
    return folder


@pytest.mark.parametrize('stop', [1, 2, 3, 4])
def test_a_resumed_stage_is_bit_for_bit_the_uninterrupted_one(uninterrupted, tmp_path, monkeypatch, capsys, stop):
    "With a frozen start, a moving average, an incomplete group of accumulated batches, and dropout"
    args = ['train', 'teacher', *small_options(uninterrupted), '--runs', str(tmp_path), *INTERRUPTED]
    real = checkpoint.Checkpoint.after_epoch

    def stop_after(self):
        real(self)
        if self.saved_epochs == stop: raise KeyboardInterrupt
    monkeypatch.setattr(checkpoint.Checkpoint, 'after_epoch', stop_after)
    with pytest.raises(SystemExit) as e: main(args)
    assert e.value.code == 130
    assert f'stopped: teacher has finished {stop} of 4 epochs' in capsys.readouterr().err
    monkeypatch.undo()
    main(args)
    assert f'resumes after epoch {stop} of 4' in capsys.readouterr().out
    a, b = (runs / 'small/teacher/fold0' for runs in (uninterrupted / 'runs', tmp_path))
    weights_a, weights_b = load_file(a / 'weights.safetensors'), load_file(b / 'weights.safetensors')
    assert all(torch.equal(weights_a[k], weights_b[k]) for k in weights_a)
    assert (a / 'preds.csv').read_text() == (b / 'preds.csv').read_text()
    history_a, history_b = (pd.read_csv(o / 'history.csv').drop(columns='seconds') for o in (a, b))
    assert history_a.equals(history_b) and history_a.kept.sum() == 1
    assert read_record(b / 'stage.json')['resumed_after_epochs'] == [stop]
    assert not list(b.glob('checkpoint*'))


def test_a_checkpoint_of_other_settings_or_damaged_is_ignored(tables, small_recipe, tmp_path, monkeypatch, capsys):
    keys = stage_options('folds=1', 'epochs=2')
    args, copy_args = (['train', 'teacher', *small_args(tables, small_recipe, tmp_path / n, *keys)] for n in 'ab')
    real = checkpoint.Checkpoint.after_epoch
    monkeypatch.setattr(checkpoint.Checkpoint, 'after_epoch', lambda self: (real(self), raise_error(KeyboardInterrupt)))
    with pytest.raises(SystemExit): main(args)
    monkeypatch.undo()
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    main([*args, '--set', 'stage.wd=.3'])
    assert 'resumes after' not in capsys.readouterr().out
    file = tmp_path / 'b/small/teacher/fold0/checkpoint-1.pt'
    file.write_bytes(file.read_bytes()[:-1] + b'x')
    main(copy_args)
    out = capsys.readouterr().out
    assert 'checkpoint-1.pt: content changed' in out and 'the stage restarts' in out and 'resumes after' not in out


def test_a_nan_loss_stops_the_training_and_keeps_the_best_epoch(tables, small_recipe, tmp_path, monkeypatch, capsys):
    real = callbacks.History.after_epoch

    def nan_in_third_epoch(self):
        if len(self.rows) == 2: self.recorder.values[-1][0] = np.nan
        real(self)
    monkeypatch.setattr(callbacks.History, 'after_epoch', nan_in_third_epoch)
    options = stage_options('epochs=4', 'folds=1')
    args = ['train', 'teacher', *small_args(tables, small_recipe, tmp_path / 'r', *options)]
    err = expect_error(capsys, args, '[stage.teacher] fold 0, epoch 3: the training loss is nan',
                       "Lower the stage's lr (", 'best.safetensors')
    weights = load_file(err.split(' are in ')[1].strip())
    assert all(torch.isfinite(v.float()).all() for v in weights.values())
    assert not list((tmp_path / 'r').rglob('stage.json'))


@pytest.mark.parametrize('error', [
    torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), MemoryError()])
def test_out_of_memory_names_a_batch_that_fits(tables, small_recipe, tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(stage, 'fit_stage', lambda *_: raise_error(error))
    expect_error(capsys, ['train', 'teacher', *small_args(tables, small_recipe, tmp_path / 'r')],
                 '[stage.teacher] fold 0, out of memory with bs = 8 at 32 px. Set bs = 4 and accumulate = 2')


def test_a_step_needs_its_batches(tables, small_recipe, tmp_path, capsys):
    "31 images train: four batches of 8 would never be complete"
    args = ['train', 'teacher', *small_args(tables, small_recipe, tmp_path / 'r'), '--set', 'stage.accumulate=4']
    expect_error(capsys, args, 'accumulate = 4: fold', 'With bs = 8 set it to 3 or less')
    assert not (tmp_path / 'r').exists()


def test_half_batches_accumulated_make_nearly_the_same_step(tables, small_recipe, tmp_path):
    "Equal but for batch normalisation's statistics"
    losses = []
    for name, *keys in (('a', 'bs=8'), ('b', 'bs=4', 'accumulate=2')):
        options = stage_options('folds=1', 'epochs=3', *keys)
        main(['train', 'teacher', *small_args(tables, small_recipe, tmp_path / name, *options)])
        losses.append(pd.read_csv(tmp_path / name / 'small/teacher/fold0/history.csv').train_loss.iloc[-1])
    assert abs(losses[0] - losses[1]) < .35 and losses[0] != losses[1]


def test_a_killed_loader_process_is_one_line(tables, small_recipe, tmp_path, monkeypatch, capsys):
    main_process = os.getpid()

    def die_in_a_worker(*_):
        if os.getpid() != main_process: os._exit(9)
        return np.zeros((32, 32, 3), np.uint8)
    monkeypatch.setattr(loaders, 'read_square', die_in_a_worker)
    options = stage_options('workers=1', 'folds=1')
    expect_error(capsys, ['train', 'teacher', *small_args(tables, small_recipe, tmp_path / 'r', *options)],
                 'a process that loads images died', 'workers = 0')


def test_same_seed_same_run_with_any_number_of_loaders(small, no_report, tmp_path):
    main(['all', *small_options(small, 'stage.workers=2'), '--runs', str(tmp_path)])
    one, other = small / 'runs/small', tmp_path / 'small'
    files = [f'{s}/fold{k}/{f}' for s in ('teacher', 'retrain') for k in (0, 1)
             for f in ('preds.csv', 'weights.safetensors')]
    for f in ('submission.csv', 'scores.csv', 'oof.csv', *files):
        assert (one / f).read_bytes() == (other / f).read_bytes(), f


# Files from others

class MaliciousPickle:
    "Creates the file `trace` when it is unpickled"
    def __init__(self, trace): self.trace = trace
    def __reduce__(self): return (open, (str(self.trace), 'w'))


def test_a_pickle_is_not_loaded_unless_trusted(toy, tables, small_recipe, tmp_path, capsys):
    trace = tmp_path / 'trace'
    for name in ('w.pkl', 'w.pth', 'w.safetensors'):
        (tmp_path / name).write_bytes(pickle.dumps(MaliciousPickle(trace)))
        options = stage_options(f'teacher.weights={tmp_path / name}')
        expect_error(capsys, ['train', 'teacher', *small_args(tables, small_recipe, tmp_path / 'r', *options)], name)
    own = tmp_path / 'own.pkl'
    shutil.copy(toy / 'finetune_256/fold0/learner.pkl', own)
    options = stage_options(f'teacher.weights={own}', 'folds=1')
    args = ['train', 'teacher', *small_args(tables, small_recipe, tmp_path / 'r', *options)]
    expect_error(capsys, args, 'own.pkl: this file is a pickle', f'--trust {own}')
    main([*args, '--trust', str(own)])
    assert not capsys.readouterr().err and not trace.exists()
    expect_error(capsys, [*args, '--set', 'stage.wd=.3', '--replace'], 'is a pickle')      # trust is for one command


def test_an_exchanged_learner_or_checkpoint_is_not_loaded(toy_copy, no_report, tmp_path, capsys):
    trace = tmp_path / 'trace'
    for name in ('learner.pkl', 'checkpoint-1.pt'):
        (toy_copy / 'pretrain_256/fold0' / name).write_bytes(pickle.dumps(MaliciousPickle(trace)))
    write_record(toy_copy / 'finetune_256/fold0/checkpoint.json',
                 dict(key='x', file='../../pretrain_256/fold0/checkpoint-1.pt', hash='y', epochs=1, resumed=[]))
    main(['all', *toy_args(toy_copy, '--set', 'stage.finetune_256.wd=.2', '--replace')])
    assert 'stage 1 of 3: pretrain_256' in capsys.readouterr().out      # the learner's size differs: trained again
    assert not trace.exists()


def test_no_command_evaluates_text_or_starts_a_shell():
    source = ''.join(p.read_text() for p in (ROOT / 'aptos_fastai').rglob('*.py'))
    assert 'def create_model' in source
    for word in ('shell=True', ' eval(', ' exec(', 'os.system', 'pickle.load', 'weights_only=False'):
        assert word not in source, word


def test_training_connects_to_no_host(small_copy, monkeypatch):
    "Nor do the imports: see test_offline.py"
    tried, real_connect = [], socket.socket.connect

    def look_up(*args, **_):
        tried.append(args)
        raise OSError('no network in this test')

    def connect(self, address): return (real_connect if self.family == socket.AF_UNIX else look_up)(self, address)
    monkeypatch.setattr(socket.socket, 'connect', connect)
    monkeypatch.setattr(socket, 'getaddrinfo', look_up)
    main(['train', 'teacher', *small_options(small_copy, 'stage.wd=.7', 'stage.folds=1'), '--replace'])
    assert not tried and read_record(small_copy / 'runs/small/teacher/fold0/stage.json')['settings']['wd'] == .7


def test_the_hub_is_not_asked_when_offline(tables, small_recipe, tmp_path, capsys, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(socket, 'create_connection', lambda *a, **k: pytest.fail('connected to a host'))
    options = stage_options('weights=imagenet', 'arch=resnet18')
    args = ['train', 'teacher', *small_args(tables, small_recipe, tmp_path / 'r', *options)]
    expect_error(capsys, args, 'HF_HUB_OFFLINE is set')


# doctor

def test_doctor(toy, tables, small_recipe, tmp_path, capsys):
    main(['doctor', *toy_args(toy)])
    out = capsys.readouterr().out
    assert 'No problem' in out and 'every stage is finished' in out and 'FAIL' not in out
    args = small_args(tables, small_recipe, tmp_path / 'r')
    main(['doctor', *args])
    assert 'table train: 40 images' in capsys.readouterr().out and not (tmp_path / 'r').exists()
    (tables / 'train.csv').unlink()
    expect_error(capsys, ['doctor', *args, *stage_options('weights=nowhere.pth')], '2 problems would stop `all`')
    expect_error(capsys, ['doctor', '--recipe', RECIPE, '--data', tmp_path, '--runs', tmp_path / 'r'],
                 'problems would stop')
    expect_error(capsys, ['doctor', '--recipe', tmp_path / 'no.ini'], '1 problem would stop')


@pytest.mark.parametrize('load, is_busy', [(2.1, True), (2., False), (.3, False)])
def test_doctor_says_when_the_machine_is_busy(monkeypatch, load, is_busy):
    monkeypatch.setattr(os, 'getloadavg', lambda: (load, 0., 0.))
    monkeypatch.setattr(os, 'cpu_count', lambda: 2)
    findings = {what: (found, ok) for what, found, ok in check_devices()}
    assert ('machine' in findings) == is_busy
    if is_busy: assert findings['machine'] == (f'busy: load average {load} on 2 cores. Training is slower than on a '
                                               'quiet machine, and measured times are too long.', WARNING)


def test_doctor_warns_of_ids_that_tell_the_grade(tables, small_recipe, tmp_path, capsys):
    file = tables / 'train.csv'
    pd.read_csv(file).assign(diagnosis=np.repeat(range(5), 8)).to_csv(file, index=False)
    main(['doctor', *small_args(tables, small_recipe, tmp_path / 'runs')])
    out = capsys.readouterr().out
    assert ('WARN table train: ids are associated with the grade: 90 % of neighbouring ids have equal grades, 18 % by '
            'chance') in out
    assert 'No problem' in out


def test_doctor_reads_images(tables, small_recipe, tmp_path, capsys):
    "A sample of each table, or all of them; an unreadable image is a problem unless it may be skipped"
    args = ['doctor', *small_args(tables, small_recipe, tmp_path / 'runs')]
    main(args)
    assert 'ok   images of train: 40 of 40 images read' in capsys.readouterr().out
    (tables / 'train_images/train007.png').write_bytes(b'no image')
    with pytest.raises(SystemExit): main(args)
    out = ' '.join(capsys.readouterr().out.split())
    assert 'FAIL images of train: 40 of 40 images read, 1 unreadable: train007 cannot be decoded' in out
    main([*args, '--set', 'images.skip_unreadable=yes'])
    assert 'WARN images of train: 40 of 40 images read, 1 unreadable' in capsys.readouterr().out


def test_doctor_reads_all_images_if_asked(tables, small_recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('aptos_fastai.pipeline.doctor.SAMPLED_IMAGES', 5)
    for file in sorted((tables / 'train_images').iterdir())[:30]:
        im = cv2.imread(str(file))
        cv2.imwrite(str(file), cv2.resize(im, (96, 96)))
    args = ['doctor', *small_args(tables, small_recipe, tmp_path / 'runs')]
    main(args)
    assert 'images of train: 5 of 40 images read; read all of them: doctor --images' in capsys.readouterr().out
    main([*args, '--images'])
    out = ' '.join(capsys.readouterr().out.split())
    assert 'ok images of train: 40 of 40 images read' in out
    assert 'WARN images of train: 30 of 40 images look resized' in out


def test_doctor_names_the_recipe_for_aptos_alone(tmp_path):
    data = tmp_path / 'aptos2019-blindness-detection'
    data.mkdir()
    for name in ('train.csv', 'test.csv'): (data / name).write_text('id_code\n')
    assert f'doctor --recipe recipes/cpu.ini --data {tmp_path}' in smaller_recipe(RECIPE, [], str(tmp_path))
    for recipe, folder in ((ROOT / 'recipes/cpu.ini', tmp_path), (ROOT / 'recipes/one_table.ini', tmp_path),
                           (RECIPE, tmp_path / 'none')):
        assert not smaller_recipe(str(recipe), [], str(folder)), (recipe, folder)


def test_doctor_prints_how_to_download_kaggles_tables(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(['doctor', '--recipe', RECIPE, '--data', str(tmp_path), '--runs', str(tmp_path / 'r')])
    out = capsys.readouterr().out
    for competition in ('aptos2019-blindness-detection', 'diabetic-retinopathy-detection'):
        assert f'kaggle competitions download -c {competition} -p {tmp_path}' in out
