"What happens around batches and epochs of a training: fastai callbacks."
import time

from fastai.vision.all import *
from timm.utils import ModelEmaV3

from aptos_fastai.common.console import console, format_duration, say
from aptos_fastai.common.distributed import world_size
from aptos_fastai.common.io import AptosError
from aptos_fastai.training.loaders import start_epoch

CHECK_EVERY = 10                             # batches: how often the loss is looked at within an epoch


class Reproducible(Callback):
    "Order and augmentation of an epoch depend on the seed and its number in the stage alone"
    order = 20                                # before anything draws, after the DataLoaders were parted among processes
    def __init__(self, seed: int, history: 'History'): self.seed, self.hist = seed, history
    def before_epoch(self):
        n = len(self.hist.rows)
        self.opt.zero_grad()                  # what an epoch accumulated past its last step
        set_seed(self.seed + n)
        self.train_dl.rng = random.Random(self.seed + n)
        start_epoch(self.train_dl, n)
    def after_fit(self): start_epoch(self.train_dl, None)

    @property
    def train_dl(self): return getattr(self.dls.train, 'dl', self.dls.train) if world_size() > 1 else self.dls.train


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    "Its weights as they are now, on the CPU"
    return {k: v.detach().cpu().clone() for k, v in get_model(model).state_dict().items()}


class History(Callback):
    "A row an epoch: losses, kappa, rate, time; and the weights of the best by `keep` (kappa, loss or last)"
    order = 60                                # after fastai's Recorder
    def __init__(self, keep: str): self.keep, self.rows, self.best, self.weights, self.smooth = keep, [], (-math.inf,), None, None
    def before_epoch(self):
        self.t0 = time.monotonic()
        if self.smooth and self.epoch: self.recorder.smooth_loss.count, self.recorder.smooth_loss.val = self.smooth[0], tensor(self.smooth[1])      # in one fit

    def after_batch(self):
        if self.training and self.iter % CHECK_EVERY == 0 and not math.isfinite(self.smooth_loss): self.refuse(f'the loss is {float(self.smooth_loss):g}')

    def after_epoch(self):
        if not self.recorder.values[-1]: return          # skipped on the way to where it stopped
        train, valid, kappa, *more = map(float, self.recorder.values[-1])
        if not all(map(math.isfinite, (train, valid, kappa))):
            self.refuse(f'the loss is {train:g} in training, {valid:g} in validation, kappa {kappa:g}')
        n = len(self.rows)
        worth = dict(kappa=(kappa, -valid), loss=(-valid,), last=(n,))[self.keep]
        better = worth > self.best
        if better:
            self.best, self.weights = worth, snapshot(self.model)
        others = dict(zip(self.recorder.metric_names[4:], more, strict=False))      # the last of the names is the time
        self.rows.append(dict(epoch=n, train_loss=train, valid_loss=valid, kappa=kappa, **others, lr=float(self.opt.hypers[-1]['lr']),
                              seconds=round(time.monotonic() - self.t0, 2), kept=False))
        if better:
            for r in self.rows: r['kept'] = r['epoch'] == n
        self.smooth = None

    def refuse(self, why: str): raise TrainingDiverged(f'epoch {len(self.rows) + 1}: {why}; lower the stage\'s lr ({self.opt.hypers[-1]["lr"]:g} now)')

    def state(self) -> dict:
        "The best epoch's weights only where they are not the last one's, which the checkpoint holds anyhow"
        smooth = self.recorder.smooth_loss
        return dict(rows=self.rows, best=self.best, smooth=(smooth.count, float(smooth.val)), weights=None if self.rows[-1]['kept'] else self.weights)
    def load(self, o: dict, model: nn.Module):
        self.rows, self.best, self.smooth = o['rows'], o['best'], o['smooth']
        self.weights = o['weights'] or snapshot(model)


class TrainingDiverged(AptosError):
    "A training whose loss is no longer a number"


class EMACallback(Callback):
    "Validates, and lets `History` keep, the moving average of the weights over steps (timm's `ModelEmaV3`, its decay rising to `decay`)"
    def __init__(self, decay: float): self.decay, self.ema, self.raw, self.steps = decay, None, None, 0
    def before_fit(self): self.ema = self.ema or ModelEmaV3(self.model, decay=self.decay, use_warmup=True)
    def before_epoch(self):
        if self.raw: get_model(self.model).load_state_dict(self.raw)
    def after_step(self):
        self.steps += 1
        self.ema.update(get_model(self.model), step=self.steps)
    def before_validate(self):
        self.raw = {k: v.clone() for k, v in get_model(self.model).state_dict().items()}
        get_model(self.model).load_state_dict(self.ema.module.state_dict())

    def state(self) -> dict: return dict(raw=self.raw, steps=self.steps)     # the average itself is what the checkpoint's model holds
    def load(self, o: dict, model: nn.Module): self.raw, self.steps = o['raw'], o['steps']


class LossScaling(MixedPrecision):
    "fastai's loss scaling for fp16, whose casting `precision.Autocast` does: pooling, the one unit and the loss stay in float32"
    def before_batch(self): pass
    def after_loss(self): pass


class Accumulate(Callback):
    "A batch in `parts` equal parts, whose gradients add up to the whole one's: for batches that do not fit the device"
    order, run_valid = MixedPrecision.order - 4, False
    def __init__(self, parts: int): self.parts = parts
    def before_epoch(self): self.n = 0
    def after_loss(self): self.learn.loss_grad = self.loss_grad / self.parts
    def before_step(self):
        self.n += 1
        if self.n % self.parts: raise CancelBatchException


class ShowProgress(Callback):
    "Batches as a bar with loss, kappa so far, images a second and time left of the stage; epochs as lines"
    order = 70
    def __init__(self, title: str, epochs: int, bar, history: History):
        self.title, self.epochs, self.bar, self.hist, self.t0, self.done = title, epochs, bar, history, time.monotonic(), 0
        self.first = len(history.rows)
    @property
    def n(self): return len(self.hist.rows)
    def before_train(self): self.seen, self.te, self.done = 0, time.monotonic(), self.n * len(self.dls.train)
    def after_batch(self):
        if not self.training: return
        self.seen, self.done = self.seen + len(self.x) * world_size(), self.done + 1
        if self.iter % CHECK_EVERY and self.iter + 1 < len(self.dls.train): return
        self.rate = self.seen / max(time.monotonic() - self.te, 1e-6)
        kappa = f'kappa {self.hist.rows[-1]["kappa"]:.3f}  ' if self.hist.rows else ''
        self.bar.to(self.done, f'epoch {self.n + 1}/{self.epochs}  loss {float(self.smooth_loss):.3f}  {kappa}{self.rate:.0f} images/s')
    def after_epoch(self):
        if self.n == self.first: return
        r, done = self.hist.rows[-1], self.n - self.first
        left = (time.monotonic() - self.t0) * (self.epochs - self.n) / done
        say(f'  {self.title}  epoch {self.n}/{self.epochs}  loss {r["train_loss"]:.3f}  valid {r["valid_loss"]:.3f}  kappa {r["kappa"]:.3f}  '
            f'{self.rate:.0f} images/s' + (f'  {format_duration(left)} left' if self.n < self.epochs else ''), 'dim' if console.is_terminal else None)
