"fastai callbacks for training: seeds, history, moving average, loss scaling, gradient accumulation, progress."
import logging
import math
import random
import re
import time
from typing import Any, NoReturn

import torch
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation
from fastai.learner import AvgLoss, AvgSmoothLoss
from fastai.torch_core import find_bs, to_detach
from fastai.vision.all import Callback, DataLoader, Learner, Tensor, get_model, nn, set_seed, tensor
from timm.utils import ModelEmaV3

from aptos_fastai.common.console import ProgressBar, console, format_duration, say
from aptos_fastai.common.distributed import world_size
from aptos_fastai.common.io import AptosError
from aptos_fastai.training.loaders import set_epoch

CHECK_EVERY = 10                             # batches between two checks of the loss (and updates of the bar)


class TrainingDiverged(AptosError):
    "The loss or kappa of a training is NaN or infinite"


class Reproducible(Callback):
    "Seed every epoch from `seed` and its number, so that a resumed training sees the same order and augmentation"
    order = 20                                # after DistributedTraining, before any random draw
    def __init__(self, seed: int, history: 'History'): self.seed, self.hist = seed, history

    def before_epoch(self) -> None:
        epoch = len(self.hist.rows)
        self.opt.zero_grad()                  # drop gradients accumulated after the last step of the previous epoch
        set_seed(self.seed + epoch)
        self.train_dl.rng = random.Random(self.seed + epoch)
        set_epoch(self.train_dl, epoch)

    def after_fit(self) -> None: set_epoch(self.train_dl, None)

    @property
    def train_dl(self) -> DataLoader:
        "The training DataLoader, without the wrapper of distributed training"
        dl = self.dls.train
        return getattr(dl, 'dl', dl) if world_size() > 1 else dl


def cpu_state_dict(model: nn.Module) -> dict[str, Tensor]:
    "Return a copy of the model's weights on the CPU"
    return {k: v.detach().cpu().clone() for k, v in get_model(model).state_dict().items()}


class DeviceAvgLoss(AvgLoss):
    "fastai's mean loss, with its sum on the device: the CPU does not wait for the GPU in every batch"
    def accumulate(self, learn: Learner) -> None:
        "Add the loss of a batch"
        n = find_bs(learn.yb)
        self.total += learn.to_detach(learn.loss.mean(), cpu=False) * n
        self.count += n


class DeviceSmoothLoss(AvgSmoothLoss):
    "fastai's smoothed loss, kept on the device"
    val: Tensor

    def accumulate(self, learn: Learner) -> None:
        "Add the loss of a batch"
        loss = to_detach(learn.loss.mean(), cpu=False)
        self.count += 1
        self.val = torch.lerp(loss, self.val.to(loss.device), self.beta)


class History(Callback):
    """Record losses, kappa, learning rate and seconds of every epoch, and keep the weights of the best one.

    `keep` chooses the best epoch: highest kappa (ties: lower validation loss), lowest validation loss, or the last.
    `rows` holds a dict per epoch, `kept` is True in the best one; `weights` are the best epoch's.
    Raises `TrainingDiverged` when a loss is NaN or infinite. During a fit the Recorder's losses stay on the device and
    are read every `CHECK_EVERY` batches.
    """
    order = 60                                # after fastai's Recorder
    def __init__(self, keep: str):
        self.keep = keep
        self.rows: list[dict] = []
        self.best: tuple = (-math.inf,)
        self.weights: dict | None = None
        self.smooth: tuple[int, float] | None = None      # count and value of the smoothed loss, from a checkpoint

    def before_fit(self) -> None:
        self.set_losses(DeviceAvgLoss(), DeviceSmoothLoss(self.recorder.smooth_loss.beta))

    def after_fit(self) -> None:
        "Give the Recorder fastai's own metrics and its losses on the CPU, for its plots and the exported Learner"
        smooth, losses = self.recorder.smooth_loss, self.recorder.losses
        on_cpu = AvgSmoothLoss(smooth.beta)
        on_cpu.count, on_cpu.val = smooth.count, smooth.val.cpu()
        self.set_losses(AvgLoss(), on_cpu)
        if losses: self.recorder.losses = list(torch.stack(losses).cpu())

    def set_losses(self, loss: AvgLoss, smooth_loss: AvgSmoothLoss) -> None:
        "Replace the Recorder's losses; a plain assignment warns that the Learner has attributes of these names"
        self.recorder.__dict__.update(loss=loss, smooth_loss=smooth_loss)

    def before_epoch(self) -> None:
        self.epoch_start = time.monotonic()
        if self.smooth and self.epoch > 0:    # resumed inside this fit; a new fit starts with a new average
            count, value = self.smooth
            self.recorder.smooth_loss.count, self.recorder.smooth_loss.val = count, tensor(value)

    def after_batch(self) -> None:
        if self.training and self.iter % CHECK_EVERY == 0 and not math.isfinite(self.smooth_loss):
            self.stop(f'the loss is {float(self.smooth_loss):g}')

    def after_epoch(self) -> None:
        if not self.recorder.values[-1]: return          # an epoch that `start_epoch` skips
        train, valid, kappa, *more = map(float, self.recorder.values[-1])
        if not all(map(math.isfinite, (train, valid, kappa))):
            self.stop(f'the training loss is {train:g}, the validation loss {valid:g}, kappa {kappa:g}')
        epoch = len(self.rows)
        criterion = self.criterion(epoch, valid, kappa)
        improved = criterion > self.best
        more_names = self.recorder.metric_names[4:]      # after epoch, losses and kappa; the last one is the time
        self.rows.append(dict(
            epoch=epoch, train_loss=train, valid_loss=valid, kappa=kappa, **dict(zip(more_names, more, strict=False)),
            lr=float(self.opt.hypers[-1]['lr']), seconds=round(time.monotonic() - self.epoch_start, 2), kept=False))
        if improved:
            self.best, self.weights = criterion, cpu_state_dict(self.model)
            for r in self.rows: r['kept'] = r['epoch'] == epoch
        self.smooth = None

    def criterion(self, epoch: int, valid_loss: float, kappa: float) -> tuple:
        "Return what `keep` compares: larger is better"
        if self.keep == 'kappa': return kappa, -valid_loss
        if self.keep == 'loss': return (-valid_loss,)
        return (epoch,)

    @property
    def kept_row(self) -> dict:
        "The row of the epoch whose weights are kept"
        return next(r for r in self.rows if r['kept'])

    def stop(self, reason: str) -> NoReturn:
        "Raise `TrainingDiverged` with the epoch, the reason and the present learning rate"
        lr = self.opt.hypers[-1]['lr']
        raise TrainingDiverged(f'epoch {len(self.rows) + 1}: {reason}. Lower the stage\'s lr ({lr:.2g} in this step).')

    def state_dict(self) -> dict:
        "Return what a checkpoint must hold; not the best weights where they are the last ones, which it holds already"
        smooth = self.recorder.smooth_loss
        weights = None if self.rows[-1]['kept'] else self.weights
        return dict(rows=self.rows, best=self.best, smooth=(smooth.count, float(smooth.val)), weights=weights)

    def load_state_dict(self, state: dict, model: nn.Module) -> None:
        "Restore `state_dict`; `model` holds the last epoch's weights"
        self.rows, self.best, self.smooth = state['rows'], state['best'], state['smooth']
        self.weights = state['weights'] or cpu_state_dict(model)


class EMACallback(Callback):
    """Validate and keep an exponential moving average of the weights (timm's `ModelEmaV3`).

    The decay warms up to `decay`. Training itself goes on with the raw weights.
    """
    def __init__(self, decay: float):
        self.decay, self.steps = decay, 0
        self.average: Any = None              # `ModelEmaV3`, from the first fit on
        self.raw: dict | None = None          # the weights before they were replaced by the average

    def before_fit(self) -> None:
        self.average = self.average or ModelEmaV3(self.model, decay=self.decay, use_warmup=True)

    def before_epoch(self) -> None:
        if self.raw: get_model(self.model).load_state_dict(self.raw)

    def after_step(self) -> None:
        self.steps += 1
        self.average.update(get_model(self.model), step=self.steps)

    def before_validate(self) -> None:
        self.raw = {k: v.clone() for k, v in get_model(self.model).state_dict().items()}
        get_model(self.model).load_state_dict(self.average.module.state_dict())

    def state_dict(self) -> dict:
        "Return raw weights and steps; the average is in the checkpoint's model"
        return dict(raw=self.raw, steps=self.steps)

    def load_state_dict(self, state: dict, model: nn.Module) -> None:
        self.raw, self.steps = state['raw'], state['steps']


class FrozenBody(Callback):
    """Keep the body as it is while it is frozen: no statistics of batch normalisation, no dropout, no drop path.

    fastai's own freezing lets batch normalisation train.
    """
    def before_train(self) -> None:
        body = get_model(self.model)[0]
        if not any(p.requires_grad for p in body.parameters()): body.eval()


class LossScaling(MixedPrecision):
    "Scale the loss for fp16 as fastai's `MixedPrecision` does; `precision.Autocast` does the casting"
    def before_batch(self) -> None: pass
    def after_loss(self) -> None: pass


class AccumulateGradients(GradientAccumulation):
    """Take one optimizer step per `n_acc` images: batches of a size that does not fit the GPU.

    fastai's `GradientAccumulation` carries a count across epochs, but `Reproducible` drops the gradients of an
    incomplete group: each epoch counts from zero, and a resumed training takes the same steps.
    """
    def before_epoch(self) -> None: self.count = 0


class ShowProgress(Callback):
    "Show a bar of batches with loss, last kappa and images/s, and print a line per epoch"
    order = 70
    def __init__(self, title: str, epochs: int, bar: ProgressBar, history: History):
        self.title, self.epochs, self.bar, self.hist = title, epochs, bar, history
        self.fit_start, self.batches = time.monotonic(), 0
        self.resumed_at = len(history.rows)

    @property
    def finished(self) -> int: return len(self.hist.rows)

    def before_train(self) -> None:
        self.images, self.train_start = 0, time.monotonic()
        self.batches = self.finished * len(self.dls.train)

    def after_batch(self) -> None:
        if not self.training: return
        self.images += len(self.x) * world_size()
        self.batches += 1
        is_last = self.iter + 1 >= len(self.dls.train)
        if self.iter % CHECK_EVERY and not is_last: return
        self.images_per_second = self.images / max(time.monotonic() - self.train_start, 1e-6)
        kappa = f'kappa {self.hist.rows[-1]["kappa"]:.3f}  ' if self.hist.rows else ''
        self.bar.to(self.batches, f'epoch {self.finished + 1}/{self.epochs}  loss {float(self.smooth_loss):.3f}  '
                                  f'{kappa}{self.images_per_second:.0f} images/s')

    def after_epoch(self) -> None:
        if self.finished == self.resumed_at: return      # an epoch that `start_epoch` skips
        row = self.hist.rows[-1]
        line = (f'  {self.title}  epoch {self.finished}/{self.epochs}  loss {row["train_loss"]:.3f}  '
                f'valid {row["valid_loss"]:.3f}  kappa {row["kappa"]:.3f}  {self.images_per_second:.0f} images/s')
        if self.finished < self.epochs:
            seconds_per_epoch = (time.monotonic() - self.fit_start) / (self.finished - self.resumed_at)
            line += f'  {format_duration(seconds_per_epoch * (self.epochs - self.finished))} left'
        say(line, 'dim' if console.is_terminal else None)


def mlflow_client(uri: str) -> Any:
    "Return MLflow's client of a server or database"
    import mlflow
    logging.getLogger('mlflow').setLevel(logging.WARNING)              # not of tables that it creates
    return mlflow.MlflowClient(tracking_uri=uri)


def mlflow_reason(e: Exception) -> str:
    "Return the first line of an error of MLflow, without a user's name and password in an address"
    first = (str(e).strip() or type(e).__name__).splitlines()[0]
    return re.sub(r'//[^/@\s]*@', '//', first)


class MLflowCallback(Callback):
    """Log the parameters of a training, and losses, kappa and learning rate of every epoch, by MLflow's client.

    fastai has a callback for TensorBoard and Weights & Biases, none for MLflow. `uri` is a server or database, `key` a
    hash of the training: if that was interrupted, it goes on in the same run of MLflow. `epochs` are those of all fits.
    The first failure to log is a warning; training goes on, and the next epoch logs what is missing.
    """
    order = 65                                # after History
    experiment = 'aptos_fastai'

    def __init__(self, uri: str, title: str, params: dict, tags: dict, key: str, epochs: int, history: History):
        self.uri, self.title, self.params, self.epochs, self.hist = uri, title, params, epochs, history
        self.tags, self.logged, self.run_id = dict(tags, training=key), 0, ''
        self.resumed: bool | None = None      # whether the training was interrupted before, from the first fit
        self.warned = False

    def before_fit(self) -> None:
        if self.resumed is None: self.resumed = bool(self.hist.rows)
        self.log()

    def after_epoch(self) -> None: self.log()

    def log(self) -> None:
        "Log what is not logged yet"
        try:
            if not self.run_id: self.open_run()
            self.log_rows()
            if len(self.hist.rows) == self.epochs: self.client.set_terminated(self.run_id)
        except Exception as e:                # of a server, a network or a database: the training does not need them
            if self.warned: return
            self.warned = True
            say(f'{self.title}: MLflow logs nothing now ({mlflow_reason(e)}). The training goes on; each epoch tries '
                'again.', 'yellow')

    def open_run(self) -> None:
        "Begin a run of MLflow, or go on in that of an interrupted training"
        from mlflow.entities import Param
        self.client = mlflow_client(self.uri)
        found = self.client.get_experiment_by_name(self.experiment)
        experiment = found.experiment_id if found else self.client.create_experiment(self.experiment)
        earlier = self.client.search_runs([experiment], f"tags.training = '{self.tags['training']}'", max_results=1)
        if self.resumed and earlier:
            run_id = earlier[0].info.run_id
            self.logged = len(self.client.get_metric_history(run_id, 'kappa'))
        else:
            run_id = self.client.create_run(experiment, tags=self.tags, run_name=self.title).info.run_id
            params = [Param(name, str(value)) for name, value in self.params.items()]
            self.client.log_batch(run_id, params=params)
        self.run_id = run_id

    def log_rows(self) -> None:
        "Log the epochs that are not logged yet"
        from mlflow.entities import Metric
        for row in self.hist.rows[self.logged:]:
            now = int(time.time() * 1000)
            values = {name: value for name, value in row.items() if name not in ('epoch', 'kept')}
            self.client.log_batch(self.run_id, [Metric(name, value, now, row['epoch'])
                                                for name, value in values.items()])
            self.logged += 1
