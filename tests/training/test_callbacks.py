"What the callbacks read of the losses, and when."
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.learner import AvgLoss, AvgSmoothLoss
from fastai.torch_core import TensorImage, set_seed

from aptos_fastai.common.console import Bars
from aptos_fastai.data.retina import Prep
from aptos_fastai.recipe.sections import Augment, Stage
from aptos_fastai.training.callbacks import CHECK_EVERY, History, ShowProgress, TrainingDiverged
from aptos_fastai.training.loaders import ToDevice, get_dls, leave_copy_to_transform
from aptos_fastai.training.model import get_learner

STAGE = Stage('t', ('a',), arch='test_resnet', weights='none', size=32, bs=2)
TRAIN, VALID = 44, 9                         # 22 batches; the last validation batch has one image
LOSSES = ['epoch', 'train_loss', 'valid_loss', 'kappa']


@pytest.fixture
def new_learner(tables):
    "A function that returns a fresh Learner, the same each time"
    files = [str(o) for o in sorted((tables / 'train_images').iterdir())]
    n = TRAIN + VALID
    frame = pd.DataFrame(dict(stored=(files * n)[:n], diagnosis=np.arange(n) % 5 * 1., valid=np.arange(n) >= TRAIN))

    def create():
        set_seed(0)
        return get_learner(STAGE, get_dls(frame, STAGE, Prep(size=32), Augment(), ((.5,) * 3, (.25,) * 3)))
    return create


def fit(learn, epochs, *cbs):
    set_seed(1)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-2, cbs=list(cbs))
    return learn


class ReadsInTraining(Callback):
    "Count the values that reach the CPU while the epoch trains: `.cpu()`, `.item()`, `float()` of a tensor"
    order = 100
    def __init__(self, monkeypatch):
        self.count, self.on = 0, False
        for name in ('cpu', 'item', '__float__'): monkeypatch.setattr(torch.Tensor, name, self.counted(name))

    def counted(self, name):
        real = getattr(torch.Tensor, name)

        def count(*args, **kw):
            self.count += self.on
            return real(*args, **kw)
        return count
    def before_train(self): self.on = True
    def after_train(self): self.on = False
    def before_validate(self): self.on = True
    def after_validate(self): self.on = False


def test_history_holds_the_losses_of_fastai_bit_for_bit(new_learner):
    plain, hist = fit(new_learner(), 2), History('last')
    ours = fit(new_learner(), 2, hist)
    assert np.array_equal(plain.recorder.values, [[r[k] for k in LOSSES[1:]] for r in hist.rows])
    assert [float(o) for o in plain.recorder.losses] == [float(o) for o in ours.recorder.losses]
    assert len(ours.recorder.losses) == 2 * TRAIN // 2


def test_after_a_fit_the_recorder_is_fastais_own(new_learner):
    "So that the exported Learner needs no class of ours for it, and goes on as fastai's"
    plain, ours = fit(new_learner(), 1), fit(new_learner(), 1, History('last'))
    assert type(ours.recorder.loss) is AvgLoss and type(ours.recorder.smooth_loss) is AvgSmoothLoss
    for name in ('count', 'val', 'value', 'beta'):
        assert getattr(ours.recorder.smooth_loss, name) == getattr(plain.recorder.smooth_loss, name)


def test_losses_are_read_every_tenth_batch(new_learner, monkeypatch):
    """And at the end of training and of validation, however many batches there are; fastai's own Recorder reads each.

    Twice each time: by the check for NaN and by the progress bar, which also shows the last batch.
    """
    counts = {}
    for name in ('plain', 'ours'):
        learn, hist = new_learner(), History('last')
        with monkeypatch.context() as m, Bars() as bars, bars('t', 100, 'batches') as bar:
            reads = ReadsInTraining(m)
            fit(learn, 1, reads, *([hist, ShowProgress('t', 1, bar, hist)] if name == 'ours' else []))
        counts[name] = reads.count
    batches, valid_batches = TRAIN // 2, -(-VALID // 4)
    checks = -(-batches // CHECK_EVERY)
    assert counts['plain'] >= batches + 3 * valid_batches
    at_the_end = 8                            # losses and loaders' seeds, an `item` each; kappa's scores and grades
    assert counts['ours'] <= 2 * checks + 1 + at_the_end


def test_a_batch_copied_by_its_transform_trains_as_one_copied_by_fastai(new_learner, tmp_path):
    "`ToDevice` in the place of the DataLoader's copy; a Learner so made is exported, loaded and moved as any"
    plain, ours = new_learner(), new_learner()
    for dl in ours.dls.loaders: dl.after_batch.add(ToDevice(torch.device('cpu')))
    leave_copy_to_transform(ours.dls)
    assert ours.dls.train.device is None and ours.dls.device == torch.device('cpu')
    assert isinstance(ours.dls.train.after_batch.fs[0], ToDevice)          # before IntToFloatTensor
    assert np.array_equal(*(fit(learn, 1).recorder.values for learn in (plain, ours)))
    ours.export(tmp_path / 'learner.pkl')
    loaded = torch.load(tmp_path / 'learner.pkl', weights_only=False)
    loaded.dls.cpu()                          # as `load_learner` does
    copies = [t for t in loaded.dls.train.after_batch.fs if isinstance(t, ToDevice)]
    assert [t.device for t in copies] == [torch.device('cpu')]


def test_a_batch_reaches_its_device_without_waiting(monkeypatch):
    seen = []
    def note(x, device, non_blocking=False):
        seen.append((device, non_blocking))
        return x
    monkeypatch.setattr(TensorImage, 'to', note)
    copy = ToDevice(torch.device('cuda', 1))
    copy(TensorImage(torch.zeros(1, 3, 2, 2)))
    copy.to('cpu')
    copy(TensorImage(torch.zeros(1, 3, 2, 2)))
    assert seen == [(torch.device('cuda', 1), True), ('cpu', True)]


def test_a_training_that_diverges_stops_within_ten_batches(new_learner):
    class Poison(Callback):
        "Make the loss NaN from the fourth batch on"
        def after_loss(self):
            if self.training and self.iter >= 3: self.learn.loss_grad = self.learn.loss_grad * float('nan')
            self.learn.loss = self.learn.loss_grad.clone()
    learn, steps = new_learner(), []

    class Count(Callback):
        def after_batch(self): steps.append(1)
    with pytest.raises(TrainingDiverged, match='epoch 1: the loss is nan'):
        fit(learn, 1, History('last'), Poison(), Count())
    assert len(steps) <= CHECK_EVERY + 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_batches_reach_the_gpu_unchanged(new_learner):
    dls = new_learner().dls
    assert dls.train.device is None and dls.device.type == 'cuda' and dls.valid.pin_memory
    on_gpu = [b for b in dls.valid]
    assert all(o.is_cuda for batch in on_gpu for o in batch)
    dls.cpu()
    for (x, y), (x0, y0) in zip(on_gpu, dls.valid, strict=True):
        assert torch.allclose(x.cpu(), x0, atol=1e-6) and torch.equal(y.cpu(), y0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_losses_stay_on_the_gpu_until_they_are_read(new_learner):
    class OnGPU(Callback):
        order = 100
        def after_batch(self): assert self.recorder.smooth_loss.val.is_cuda
        def after_validate(self): assert self.recorder.loss.total.is_cuda
    plain, hist = fit(new_learner(), 1), History('last')
    learn = fit(new_learner(), 1, hist, OnGPU())
    assert not any(o.is_cuda for o in learn.recorder.losses)
    assert np.allclose(plain.recorder.values[-1][:2], [hist.rows[0][k] for k in LOSSES[1:3]], rtol=.02)
