"In which precision a stage trains, the largest batch, compilation and trackers."
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, TOY, expect_error
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from torch import nn

from aptos_fastai.cli import main
from aptos_fastai.data.retina import Prep
from aptos_fastai.recipe.sections import Augment, Stage
from aptos_fastai.training import callbacks, precision
from aptos_fastai.training.callbacks import History
from aptos_fastai.training.loaders import get_dls
from aptos_fastai.training.model import get_learner

KEYS = dict(name='t', train=('a',), arch='test_resnet', weights='none', size=64, bs=4, epochs=2)
ONE_FOLD = ['--set', 'stage.folds=1']


@pytest.fixture
def new_learner(tables):
    "A function that returns a fresh Learner on a small graded table"
    files = sorted((tables / 'train_images').iterdir())
    i = np.arange(len(files))
    frame = pd.DataFrame(dict(stored=[str(f) for f in files], diagnosis=i % 5 * 1., valid=i % 4 == 0))
    stage, stats = Stage(**KEYS), ((.5,) * 3, (.25,) * 3)
    return lambda: get_learner(stage, get_dls(frame, stage, Prep(size=64), Augment(), stats))


def fit(learn, *cbs):
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=list(cbs))


def options(tables, recipe, runs): return ['--recipe', str(recipe), '--data', str(tables), '--runs', str(runs)]


def train_in(tables, recipe, runs, how) -> dict:
    "The record of a stage trained with `precision = how`"
    main(['train', 'teacher', *options(tables, recipe, runs), *ONE_FOLD, '--set', f'stage.precision={how}'])
    return json.loads((runs / 'small/teacher/fold0/stage.json').read_text())


def without_gpu(monkeypatch, bf16: bool):
    "A machine without a GPU, whose CPU has bf16 or not"
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(precision, 'cpu_has_bf16', lambda: bf16)


def test_the_body_computes_in_bf16_and_the_rest_in_float32(new_learner):
    learn, seen = new_learner(), {}
    conv = next(m for m in learn.model[0].modules() if isinstance(m, nn.Conv2d))
    def note_conv(module, inputs, output): seen['conv'] = output.dtype
    def note_head(module, inputs, output): seen['head'] = inputs[0].dtype, output.dtype
    hooks = conv.register_forward_hook(note_conv), learn.model[1].register_forward_hook(note_head)
    fit(learn, precision.Autocast('bf16'))
    for h in hooks: h.remove()
    assert seen == dict(conv=torch.bfloat16, head=(torch.float32, torch.float32))
    assert all(p.dtype == torch.float32 for p in learn.model.parameters())
    body = learn.model[0]
    assert not body._forward_hooks and not body._forward_pre_hooks      # an exported body computes in float32
    assert not torch.is_autocast_enabled('cpu')


class KeepGradients(Callback):
    "The gradients of every step, flattened"
    order = 100
    def __init__(self): self.steps = []
    def before_step(self): self.steps.append(torch.cat([p.grad.flatten().clone() for p in self.model.parameters()]))


def test_gradients_in_bf16_are_nearly_those_of_float32(new_learner):
    "The first step's, and nearer than those of another batch"
    steps = []
    for cbs in ([], [precision.Autocast('bf16')]):
        set_seed(1)
        learn, keep = new_learner(), KeepGradients()
        fit(learn, *cbs, keep)
        steps.append(keep.steps)
    (first, second, *_), (first_bf16, *_) = steps
    def correlation(x, y): return float(torch.corrcoef(torch.stack([x, y]))[0, 1])
    assert correlation(first, second) < .9 < .98 < correlation(first, first_bf16) < 1


def test_the_faster_precision_is_taken_and_recorded(tmp_path, monkeypatch):
    without_gpu(monkeypatch, bf16=True)
    batches = []
    for f32, bf16, want in [(1., .5, 'bf16'), (1., .95, 'f32'), (1., 2., 'f32')]:
        def measured(stage, precisions, n, seconds=dict(f32=f32, bf16=bf16)):     # noqa: B006    bound now
            batches.append(n)
            return precision.StepSeconds(seconds, {}, 1)
        monkeypatch.setattr(precision, 'step_seconds', measured)
        folder = tmp_path / f'{bf16}'
        folder.mkdir()
        assert precision.precision_of(Stage(**KEYS), folder) == want
        assert precision.precision_of(Stage(**KEYS), folder) == want     # read from the record
        record = json.loads((folder / 'precision.json').read_text())
        assert [o['images_per_second'] for o in record.values() if isinstance(o, dict)] == [
            dict(f32=1., bf16=round(1 / bf16, 1))]
    assert batches == [4, 4, 4]


def test_a_cpu_without_bf16_is_not_measured(tmp_path, monkeypatch, capsys):
    without_gpu(monkeypatch, bf16=False)
    monkeypatch.setattr(precision, 'step_seconds', lambda *_, **__: pytest.fail('one step in bf16 could take a minute'))
    assert precision.precision_of(Stage(**KEYS), tmp_path) == 'f32' and not list(tmp_path.iterdir())
    assert precision.precision_of(Stage(**KEYS, precision='bf16'), tmp_path) == 'bf16'
    assert 'no bf16 hardware' in capsys.readouterr().out


def test_steps_are_timed_on_this_machine():
    steps, forward, params = precision.step_seconds(Stage(**KEYS), ('bf16',), n=2, rounds=1)
    assert set(steps) == {'bf16'} and set(forward) == {'bf16', 'f32'} and params > 1e5
    assert all(0 < o < 10 for o in (*steps.values(), *forward.values()))


def test_the_best_of_the_rounds_after_a_warm_up_counts(monkeypatch):
    "By a clock that advances by what each step takes: the warm-up 100 s, then 3, 5 and 2 s, the other twice as long"
    without_gpu(monkeypatch, bf16=True)
    now, upcoming = [0.], {'a': iter([100., 3., 5., 2.]), 'b': iter([100., 6., 10., 4.])}
    monkeypatch.setattr(precision.time, 'perf_counter', lambda: now[0])
    order = []

    def step(name):
        order.append(name)
        now[0] += next(upcoming[name])
    assert precision.best_seconds(step, ['a', 'b'], 3) == dict(a=2., b=4.)
    assert order == ['a', 'b'] * 4


def test_steps_are_timed_with_the_optimizer_of_the_stage(monkeypatch):
    made = []
    real = precision.create_optimizer
    monkeypatch.setattr(precision, 'create_optimizer', lambda *args, **kw: made.append(kw) or real(*args, **kw))
    precision.step_seconds(Stage(**KEYS, optimizer='sgd', sqr_mom=.9, eps=1e-3), n=1, rounds=1)
    assert made == [dict(name='sgd', sqr_mom=.9, eps=1e-3)]


def test_timing_leaves_the_random_state():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    precision.step_seconds(Stage(**KEYS), n=1, rounds=1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_explicit_precision_is_trained_in_and_recorded(tables, small_recipe, tmp_path):
    assert train_in(tables, small_recipe, tmp_path / 'r', 'bf16')['precision'] == 'bf16'


def test_fp16_without_a_gpu_is_refused(tables, small_recipe, tmp_path, capsys):
    if torch.cuda.is_available(): pytest.skip('this machine has a GPU')
    args = ['train', 'teacher', *options(tables, small_recipe, tmp_path / 'r'), '--set', 'stage.precision=fp16']
    expect_error(capsys, args, '[stage.teacher] precision = fp16: needs a GPU. Set precision = auto, bf16 or f32')


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which('g++') or shutil.which('clang++')), reason='torch.compile needs a C++ compiler')
def test_a_compiled_stage_trains_and_exports(tables, small_recipe, tmp_path):
    scores = []
    for name in ('no', 'yes'):
        args = options(tables, small_recipe, tmp_path / name)
        main(['train', 'teacher', *args, *ONE_FOLD, '--set', f'stage.compile={name}'])
        scores.append(pd.read_csv(tmp_path / name / 'small/teacher/fold0/preds.csv').score)
    assert np.abs(scores[0] - scores[1]).max() < .05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('how', ['auto', 'bf16', 'fp16', 'f32'])
def test_a_stage_trains_on_the_gpu(tables, small_recipe, tmp_path, how):
    record = train_in(tables, small_recipe, tmp_path / 'r', how)
    assert record['precision'] in (('bf16', 'fp16') if how == 'auto' else (how,))
    assert 'cuda' in record['versions']['device']


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_a_stage_resumes_inside_a_phase_on_the_gpu(tables, small_recipe, tmp_path, monkeypatch):
    real = History.after_epoch

    def stop_after_three(self):
        real(self)
        if len(self.rows) == 3: raise KeyboardInterrupt
    args = ['train', 'teacher', *options(tables, small_recipe, tmp_path / 'r'), *ONE_FOLD, '--set', 'stage.epochs=4']
    monkeypatch.setattr(History, 'after_epoch', stop_after_three)
    with pytest.raises(SystemExit): main(args)
    monkeypatch.setattr(History, 'after_epoch', real)
    main(args)
    record = json.loads((tmp_path / 'r/small/teacher/fold0/stage.json').read_text())
    assert record['resumed_after_epochs']


def test_batches_double_until_memory_is_full(toy, monkeypatch, capsys):
    def steps(stage, precisions, n, rounds):
        if n > 8: raise torch.OutOfMemoryError('no more')
        return precision.StepSeconds({precisions[0]: 1 / n}, {}, 1)
    gpu = dict(is_available=lambda: True, is_bf16_supported=lambda **_: True, reset_peak_memory_stats=lambda: None,
               empty_cache=lambda: None, max_memory_allocated=lambda: 5e9)
    for name, function in gpu.items(): monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(precision, 'step_seconds', steps)
    main(['find_batch_size', 'pretrain_256', '--recipe', str(ROOT / 'settings.ini'), '--runs', str(toy.parent), *TOY])
    out = capsys.readouterr().out
    assert 'largest bs that fits: 8; bs = 16 does not fit: bs = 8 and accumulate = 2 take the same steps' in out


def test_the_largest_batch_needs_a_gpu(toy, capsys):
    if torch.cuda.is_available(): pytest.skip('this machine has a GPU')
    args = ['find_batch_size', 'pretrain_256', '--recipe', ROOT / 'settings.ini', '--runs', toy.parent, *TOY]
    expect_error(capsys, args, 'no GPU found')


@pytest.mark.parametrize('key, words', [('track=wandb', 'Run pip install wandb, or set track = no'),
                                        ('track=mlflow', 'Run pip install mlflow, or set track = no'),
                                        ('compile=yes', 'needs a C++ compiler')])
def test_missing_software_is_an_error_before_anything_trains(tables, small_recipe, tmp_path, capsys, monkeypatch, key,
                                                             words):
    monkeypatch.setattr('aptos_fastai.pipeline.graph.find_spec', lambda name: None)
    monkeypatch.setattr('aptos_fastai.pipeline.graph.shutil.which', lambda name: None)
    args = ['all', *options(tables, small_recipe, tmp_path / 'r'), '--set', f'stage.{key}']
    expect_error(capsys, args, '[stage.teacher]', words)
    assert not (tmp_path / 'r').exists()


def test_a_tracker_gets_the_losses_and_does_not_change_the_stage(tables, small_recipe, tmp_path):
    pytest.importorskip('tensorboard')
    args = ['train', 'teacher', *options(tables, small_recipe, tmp_path / 'r'), *ONE_FOLD]
    main([*args, '--set', 'stage.track=tensorboard'])
    files = list((tmp_path / 'r/small/tensorboard/teacher/fold0').iterdir())
    assert len(files) == 1 and files[0].stat().st_size > 200
    weights = tmp_path / 'r/small/teacher/fold0/weights.safetensors'
    written = weights.stat().st_mtime_ns
    main(args)                                # without the tracker the stage is still up to date
    assert weights.stat().st_mtime_ns == written


def mlflow_runs(uri):
    "Return the client and the runs in a database of MLflow"
    mlflow = pytest.importorskip('mlflow')
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name('aptos_fastai')
    return client, client.search_runs([experiment.experiment_id]) if experiment else []


MLFLOW_WARNS = pytest.mark.filterwarnings('ignore:The ..noload.. loader strategy:DeprecationWarning')   # of SQLAlchemy


@MLFLOW_WARNS
def test_mlflow_gets_parameters_and_every_epoch_in_the_run_folder(tables, small_recipe, tmp_path, monkeypatch):
    monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)
    args = ['train', 'teacher', *options(tables, small_recipe, tmp_path / 'r'), *ONE_FOLD, '--set', 'stage.epochs=2',
            '--set', 'stage.freeze_epochs=1']
    main([*args, '--set', 'stage.track=mlflow'])
    client, (run,) = mlflow_runs(f'sqlite:///{tmp_path}/r/small/mlflow/mlflow.db')
    assert run.info.status == 'FINISHED' and run.info.run_name == 'small teacher fold0'
    assert {k: run.data.tags[k] for k in ('run', 'stage', 'fold', 'synthetic')} == dict(
        run='small', stage='teacher', fold='0', synthetic='False')
    assert run.data.params['lr'] == '0.003' and run.data.params['arch'] == 'test_resnet'
    history = pd.read_csv(tmp_path / 'r/small/teacher/fold0/history.csv')
    for name in ('train_loss', 'valid_loss', 'kappa', 'lr'):
        logged = client.get_metric_history(run.info.run_id, name)
        assert [(o.step, o.value) for o in logged] == list(zip(history.epoch, history[name], strict=True))
    written = (tmp_path / 'r/small/teacher/fold0/weights.safetensors').stat().st_mtime_ns
    main(args)                                # without the tracker the stage is still up to date
    assert (tmp_path / 'r/small/teacher/fold0/weights.safetensors').stat().st_mtime_ns == written


def test_an_mlflow_server_that_is_down_is_an_error_before_anything_is_prepared(tables, small_recipe, tmp_path, capsys,
                                                                              monkeypatch):
    pytest.importorskip('mlflow')
    monkeypatch.setenv('MLFLOW_TRACKING_URI', 'http://me:secret@127.0.0.1:9')
    monkeypatch.setenv('MLFLOW_HTTP_REQUEST_MAX_RETRIES', '0')
    args = ['train', 'teacher', *options(tables, small_recipe, tmp_path / 'r'), '--set', 'stage.track=mlflow']
    message = expect_error(capsys, args, 'track = mlflow', 'MLFLOW_TRACKING_URI', 'refused', 'set track = no')
    assert 'secret' not in str(message) and not (tmp_path / 'r').exists()


@MLFLOW_WARNS
def test_training_goes_on_without_mlflow_and_logs_later_what_is_missing(tables, small_recipe, tmp_path, monkeypatch,
                                                                       capsys):
    mlflow = pytest.importorskip('mlflow')
    uri, log_batch, calls = f'sqlite:///{tmp_path}/mine.db', mlflow.MlflowClient.log_batch, []
    monkeypatch.setenv('MLFLOW_TRACKING_URI', uri)

    def fail_twice(self, run_id, metrics=(), **more):
        if metrics: calls.append(metrics[0].step)
        if 0 < len(calls) < 3: raise mlflow.MlflowException('the server has gone away')
        return log_batch(self, run_id, metrics, **more)
    monkeypatch.setattr(mlflow.MlflowClient, 'log_batch', fail_twice)
    main(['train', 'teacher', *options(tables, small_recipe, tmp_path / 'r'), *ONE_FOLD, '--set', 'stage.epochs=3',
          '--set', 'stage.track=mlflow'])
    out = ' '.join(capsys.readouterr().out.split())
    assert out.count('MLflow logs nothing now (the server has gone away)') == 1
    assert (tmp_path / 'r/small/teacher/fold0/weights.safetensors').exists()
    client, (run,) = mlflow_runs(uri)
    assert calls == [0, 0, 0, 1, 2] and run.info.status == 'FINISHED'
    assert [o.step for o in client.get_metric_history(run.info.run_id, 'kappa')] == [0, 1, 2]


@MLFLOW_WARNS
def test_mlflow_goes_on_in_the_run_of_an_interrupted_training(tables, small_recipe, tmp_path, monkeypatch, capsys):
    uri = f'sqlite:///{tmp_path}/mine.db'
    monkeypatch.setenv('MLFLOW_TRACKING_URI', uri)       # of the user
    args = ['train', 'teacher', *options(tables, small_recipe, tmp_path / 'r'), *ONE_FOLD, '--set', 'stage.epochs=3',
            '--set', 'stage.track=mlflow']
    before_epoch = callbacks.Reproducible.before_epoch

    def stop_in_third_epoch(self):
        if len(self.hist.rows) == 2: raise KeyboardInterrupt
        before_epoch(self)
    with monkeypatch.context() as m:
        m.setattr(callbacks.Reproducible, 'before_epoch', stop_in_third_epoch)
        with pytest.raises(SystemExit): main(args)
    client, (stopped,) = mlflow_runs(uri)
    assert stopped.info.status == 'RUNNING'
    main(args)
    client, (run,) = mlflow_runs(uri)
    assert run.info.run_id == stopped.info.run_id and run.info.status == 'FINISHED'
    assert [o.step for o in client.get_metric_history(run.info.run_id, 'kappa')] == [0, 1, 2]
    assert not (tmp_path / 'r/small/mlflow').exists()
