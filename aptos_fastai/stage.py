"One stage, one fold -> its run folder."
import platform
import subprocess
import time
import warnings
from dataclasses import asdict

import timm
from fastai.callback.schedule import *
from fastai.vision.all import *
from safetensors.torch import save
from timm.utils import ModelEmaV3

import aptos_fastai
from aptos_fastai.checkpoint import BEST, Checkpoint, clear_checkpoint, epochs_kept
from aptos_fastai.config import Stage
from aptos_fastai.console import Bars, ago, console, say
from aptos_fastai.data import get_dls, start_epoch
from aptos_fastai.files import AptosError, digest, file_hash, whole, write_bytes, write_csv, write_record
from aptos_fastai.model import body_stats, get_learner
from aptos_fastai.predict import predict_scores, read_exported
from aptos_fastai.pseudo import read_labels
from aptos_fastai.record import EXPORT, FINISHED, HISTORY, PREDS, WEIGHTS, Run, training_frame

CHECK_EVERY = 10                             # batches: how often the loss is looked at within an epoch


class Reproducible(Callback):
    "Order and augmentation of an epoch depend on the seed and its number in the stage alone"
    order = -100                              # before anything draws
    def __init__(self, seed: int, history: 'History'): self.seed, self.hist = seed, history
    def before_epoch(self):
        n = len(self.hist.rows)
        self.opt.zero_grad()                  # what an epoch accumulated past its last step
        set_seed(self.seed + n)
        self.dls.train.rng = random.Random(self.seed + n)
        start_epoch(self.dls.train, n)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    "Its weights as they are now, on the CPU"
    return {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}


def write_weights(path: Path, weights: dict[str, Tensor]): write_bytes(path, save({k: v.detach().cpu().contiguous() for k, v in weights.items()}))


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
        train, valid, kappa = map(float, self.recorder.values[-1])
        if not all(map(math.isfinite, (train, valid, kappa))):
            self.refuse(f'the loss is {train:g} in training, {valid:g} in validation, kappa {kappa:g}')
        n = len(self.rows)
        worth = dict(kappa=(kappa, -valid), loss=(-valid,), last=(n,))[self.keep]
        better = worth > self.best
        if better:
            self.best, self.weights = worth, snapshot(self.model)
        self.rows.append(dict(epoch=n, train_loss=train, valid_loss=valid, kappa=kappa, lr=float(self.opt.hypers[-1]['lr']),
                              seconds=round(time.monotonic() - self.t0, 2), kept=False))
        if better:
            for r in self.rows: r['kept'] = r['epoch'] == n
        self.smooth = None

    def refuse(self, why: str): raise Diverged(f'epoch {len(self.rows) + 1}: {why}; lower the stage\'s lr ({self.opt.hypers[-1]["lr"]:g} now)')

    def state(self) -> dict:
        "The best epoch's weights only where they are not the last one's, which the checkpoint holds anyhow"
        smooth = self.recorder.smooth_loss
        return dict(rows=self.rows, best=self.best, smooth=(smooth.count, float(smooth.val)), weights=None if self.rows[-1]['kept'] else self.weights)
    def load(self, o: dict, model: nn.Module):
        self.rows, self.best, self.smooth = o['rows'], o['best'], o['smooth']
        self.weights = o['weights'] or snapshot(model)


class Diverged(AptosError):
    "A training whose loss is no longer a number"


class Averaged(Callback):
    "Validates, and lets `History` keep, the moving average of the weights over steps (timm's `ModelEmaV3`, its decay rising to `decay`)"
    def __init__(self, decay: float): self.decay, self.ema, self.raw, self.steps = decay, None, None, 0
    def before_fit(self): self.ema = self.ema or ModelEmaV3(self.model, decay=self.decay, use_warmup=True)
    def before_epoch(self):
        if self.raw: self.model.load_state_dict(self.raw)
    def after_step(self):
        self.steps += 1
        self.ema.update(self.model, step=self.steps)
    def before_validate(self):
        self.raw = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema.module.state_dict())

    def state(self) -> dict: return dict(raw=self.raw, steps=self.steps)     # the average itself is what the checkpoint's model holds
    def load(self, o: dict, model: nn.Module): self.raw, self.steps = o['raw'], o['steps']


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
    "Batches as a bar with loss, kappa so far, pictures a second and time left of the stage; epochs as lines"
    order = 70
    def __init__(self, title: str, epochs: int, bar, history: History):
        self.title, self.epochs, self.bar, self.hist, self.t0, self.done = title, epochs, bar, history, time.monotonic(), 0
        self.first = len(history.rows)
    @property
    def n(self): return len(self.hist.rows)
    def before_train(self): self.seen, self.te, self.done = 0, time.monotonic(), self.n * len(self.dls.train)
    def after_batch(self):
        if not self.training: return
        self.seen, self.done = self.seen + len(self.x), self.done + 1
        if self.iter % CHECK_EVERY and self.iter + 1 < len(self.dls.train): return       # reading the loss waits for the device
        self.rate = self.seen / max(time.monotonic() - self.te, 1e-6)
        kappa = f'kappa {self.hist.rows[-1]["kappa"]:.3f}  ' if self.hist.rows else ''
        self.bar.to(self.done, f'epoch {self.n + 1}/{self.epochs}  loss {float(self.smooth_loss):.3f}  {kappa}{self.rate:.0f} pictures/s')
    def after_epoch(self):
        if self.n == self.first: return
        r, done = self.hist.rows[-1], self.n - self.first
        left = (time.monotonic() - self.t0) * (self.epochs - self.n) / done
        say(f'  {self.title}  epoch {self.n}/{self.epochs}  loss {r["train_loss"]:.3f}  valid {r["valid_loss"]:.3f}  kappa {r["kappa"]:.3f}  '
            f'{self.rate:.0f} pictures/s' + (f'  {ago(left)} left' if self.n < self.epochs else ''), 'dim' if console.is_terminal else None)


def stage_learner(run: Run, name: str, fold: int = 0) -> Learner:
    "The Learner of a stage by its name, as its training starts: its data, its parent's weights. Raises `AptosError` where the parent is not trained"
    stage = run.recipe.stages[name]
    seed = run.recipe.seed
    set_seed(seed)
    labels = {(t, n): read_labels(run, t, n, stage.labels) for t, n in stage.sources if t}
    frame = training_frame(run, stage, fold, labels)
    dls = get_dls(frame, stage, run.prep, run.recipe.augment, body_stats(stage.arch), seed=seed, path=run.fold_dir(name, fold))
    weights = read_exported(run, stage.init, fold).model.state_dict() if stage.init else None
    return get_learner(stage, dls, weights=weights)


def fit_stage(learn: Learner, stage: Stage, cbs: list, done: int = 0, opt: dict | None = None):
    """The head alone first where `freeze_epochs` says so, then everything; each on the course that `schedule` names.

    `done` epochs are over already, and left the optimizer with the state `opt`.
    """
    fit = dict(one_cycle=learn.fit_one_cycle, constant=learn.fit)[stage.schedule]
    phases = [(learn.freeze, stage.freeze_epochs, stage.lr),
              (learn.unfreeze, stage.epochs, slice(stage.lr / stage.lr_div, stage.lr) if stage.lr_div > 1 else stage.lr)]
    before = 0
    with learn.no_bar(), learn.no_logging():
        for freeze, epochs, lr in phases:
            start = max(0, done - before)
            if start < epochs:
                freeze()
                if start: learn.opt.load_state_dict(opt)
                fit(epochs, lr, cbs=cbs, start_epoch=start)
            before += epochs


def train_fold(run: Run, name: str, fold: int, bars: Bars) -> dict:
    "Trains one fold of a stage into its run folder, from its last finished epoch on, and returns its record; `stage.json` is written last"
    stage, out = run.recipe.stages[name], run.fold_dir(name, fold)
    title = name if stage.folds == 1 else f'{name} fold {fold}'
    (out / FINISHED).unlink(missing_ok=True)
    hist = History(stage.keep)
    try: learn, checkpoint = fit_fold(run, name, fold, bars, title, hist)
    except Diverged as e:
        best = f'; its best epoch\'s weights are in {keep_best(out, hist)}' if hist.weights else ''
        raise AptosError(f'[stage.{name}] fold {fold}, {_words(e)}{best}') from None
    except AptosError as e: raise AptosError(_words(e)) from None
    except KeyboardInterrupt:
        n = epochs_kept(out)
        raise KeyboardInterrupt(f'{title} has finished {n} of {stage.freeze_epochs + stage.epochs} epochs') from None
    except (RuntimeError, MemoryError) as e: raise AptosError(f'[stage.{name}] fold {fold}, {_fault(e, stage)}') from e
    t0 = time.monotonic()
    say_risen(title, hist)
    learn.model.load_state_dict(hist.weights)
    valid = learn.dls.valid.items.copy()
    with bars(f'{title}  validating', len(valid), 'pictures') as bar:
        scores = predict_scores(learn, valid, stage.tta, bar)
    write_fold(learn, out, valid.assign(score=scores, fold=fold), hist)
    best = next(r for r in hist.rows if r['kept'])
    record = dict(stage=name, fold=fold, fingerprint=run.fingerprint(name, fold), synthetic=bool(run.recipe.demo), settings=asdict(stage),
                  augment=asdict(run.recipe.augment), prep=asdict(run.prep), seed=run.recipe.seed,
                  pictures=dict(train=len(learn.dls.train_ds), valid=len(valid)), kept_epoch=best['epoch'], kept_kappa=best['kappa'],
                  parents=run.parents_weights(name, fold), resumed_after_epochs=checkpoint.resumed,
                  seconds=round(sum(r['seconds'] for r in hist.rows) + time.monotonic() - t0, 1),
                  files={f: dict(sha256=file_hash(out / f), bytes=(out / f).stat().st_size) for f in (EXPORT, WEIGHTS, PREDS, HISTORY)},
                  versions=versions())
    write_record(out / FINISHED, record)
    clear_checkpoint(out)
    return record


def fit_fold(run: Run, name: str, fold: int, bars: Bars, title: str, hist: History) -> tuple[Learner, Checkpoint]:
    "The Learner after its epochs, with what kept them"
    stage, out = run.recipe.stages[name], run.fold_dir(name, fold)
    learn = stage_learner(run, name, fold)
    average = [Averaged(stage.ema)] if stage.ema else []
    more = [Accumulate(stage.accumulate)] if stage.accumulate > 1 else []
    checkpoint = Checkpoint(out, digest([run.fingerprint(name, fold), run.parents_weights(name, fold)]), [hist, *average])
    opt, epochs = checkpoint.load(learn), stage.freeze_epochs + stage.epochs
    if checkpoint.begun: say(f'  {title}: goes on after epoch {checkpoint.begun} of {epochs}, which is finished')
    with bars(title, epochs * len(learn.dls.train), 'batches') as bar:
        cbs = [Reproducible(run.recipe.seed, hist), *average, *more, hist, checkpoint, ShowProgress(title, epochs, bar, hist)]
        fit_stage(learn, stage, cbs, checkpoint.begun, opt)
    return learn, checkpoint


def _words(e: Exception) -> str: return str(e).rpartition('\t')[2]           # fastai puts the callback's name before a callback's words


def _fault(e: Exception, stage: Stage) -> str:
    "What a reader can do about an exception of PyTorch's; raises it again where that is nothing"
    text = str(e)
    if isinstance(e, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        half = f'set bs = {stage.bs // 2} and accumulate = {2 * stage.accumulate}: the same steps in half the memory' if stage.bs > 1 else 'set size lower'
        return f'out of memory with bs = {stage.bs} at {stage.size} px: {half}; finished epochs of unchanged settings are kept'
    if 'DataLoader worker' in text:
        return 'a process that loads pictures died (killed, or out of memory): run again, it goes on from the last finished epoch; or set workers = 0'
    raise e


def say_risen(title: str, hist: History):
    "A training that went astray after its best epoch is said; the best one is kept"
    best, last = min(r['valid_loss'] for r in hist.rows), hist.rows[-1]['valid_loss']
    if last > 3 * best:
        kept = next(r['epoch'] for r in hist.rows if r['kept']) + 1
        say(f'  {title}: the validation loss rose from {best:.3f} to {last:.3f}: its lr may be too high; epoch {kept} is kept', 'yellow')


def keep_best(out: Path, hist: History) -> Path:
    "The best epoch's weights of a training that could not end"
    write_weights(out / BEST, hist.weights)
    return out / BEST


def write_fold(learn: Learner, out: Path, preds: pd.DataFrame, hist: History):
    "The files of a finished fold but for its record"
    learn.dls.path = learn.path = out
    with whole(out / EXPORT) as tmp: learn.export(tmp.name)
    write_weights(out / WEIGHTS, learn.model.state_dict())
    write_csv(out / PREDS, preds[['id_code', 'source', 'diagnosis', 'fold', 'score']])
    write_csv(out / HISTORY, pd.DataFrame(hist.rows))


def versions() -> dict:
    "What the record says it was made with"
    import fastai
    git = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    return dict(aptos_fastai=aptos_fastai.__version__, git=git, fastai=fastai.__version__, torch=torch.__version__, timm=timm.__version__,
                python=platform.python_version(), device=str(default_device()))


def find_rates(run: Run, name: str, plot: Path) -> dict[str, float]:
    "Suggested learning rates of a stage (fastai's LR finder, Smith 2015), and the curve saved at `plot`"
    import matplotlib
    matplotlib.use('Agg')
    learn = stage_learner(run, name)
    with warnings.catch_warnings(), learn.no_bar():
        found = learn.lr_find(suggest_funcs=(valley, minimum, steep))
    plt.title(f'{name}: loss over learning rate, {len(learn.dls.train_ds)} pictures' + (' (synthetic demo)' if run.recipe.demo else ''))
    plt.tight_layout()
    plot.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(plot, dpi=110); plt.close()
    return {k: float(v) for k, v in found._asdict().items()}
