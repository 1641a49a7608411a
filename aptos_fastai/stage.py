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
from aptos_fastai.config import Stage
from aptos_fastai.console import Bars, ago, console, say
from aptos_fastai.data import get_dls, start_epoch
from aptos_fastai.files import AptosError, file_hash, write_bytes, write_csv, write_json
from aptos_fastai.model import body_stats, get_learner
from aptos_fastai.predict import predict_scores, read_exported
from aptos_fastai.pseudo import read_labels
from aptos_fastai.record import EXPORT, FINISHED, HISTORY, PREDS, WEIGHTS, Run, training_frame


class Reproducible(Callback):
    "Order and augmentation of an epoch depend on the seed and its number alone"
    order = -100                              # before anything draws
    def __init__(self, seed: int): self.seed, self.n = seed, 0
    def before_epoch(self):
        set_seed(self.seed + self.n)
        self.dls.train.rng = random.Random(self.seed + self.n)
        start_epoch(self.dls.train, self.n)
        self.n += 1


class History(Callback):
    "A row an epoch: losses, kappa, rate, time; and the weights of the best by `keep` (kappa, loss or last)"
    order = 60                                # after fastai's Recorder
    def __init__(self, keep: str): self.keep, self.rows, self.best, self.weights = keep, [], -math.inf, None
    def before_epoch(self): self.t0 = time.time()
    def after_epoch(self):
        train, valid, kappa = map(float, self.recorder.values[-1])
        n = len(self.rows)
        if not math.isfinite(train) or not math.isfinite(valid):
            lr = self.opt.hypers[-1]['lr']
            raise AptosError(f'epoch {n + 1}: the loss is {train:g} in training, {valid:g} in validation; lower the stage\'s lr ({lr:g} now)')
        worth = dict(kappa=kappa, loss=-valid, last=n)[self.keep]
        if worth > self.best:
            self.best, self.weights = worth, {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
        self.rows.append(dict(epoch=n, train_loss=train, valid_loss=valid, kappa=kappa, lr=self.opt.hypers[-1]['lr'],
                              seconds=round(time.time() - self.t0, 2), kept=False))
        if worth == self.best:
            for r in self.rows: r['kept'] = r['epoch'] == n


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


class ShowProgress(Callback):
    "Batches as a bar with loss, kappa so far, pictures a second and time left of the stage; epochs as lines"
    order = 70
    def __init__(self, title: str, epochs: int, bar, history: History):
        self.title, self.epochs, self.bar, self.hist, self.t0, self.n, self.done = title, epochs, bar, history, time.time(), 0, 0
    def before_train(self): self.seen, self.te = 0, time.time()
    def after_batch(self):
        if not self.training: return
        self.seen, self.done = self.seen + len(self.x), self.done + 1
        self.rate = self.seen / (time.time() - self.te)
        kappa = f'kappa {self.hist.rows[-1]["kappa"]:.3f}  ' if self.hist.rows else ''
        self.bar.to(self.done, f'epoch {self.n + 1}/{self.epochs}  loss {float(self.smooth_loss):.3f}  {kappa}{self.rate:.0f} pictures/s')
    def after_epoch(self):
        self.n += 1
        r, done = self.hist.rows[-1], self.n / self.epochs
        left = (time.time() - self.t0) * (1 - done) / done
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


def fit_stage(learn: Learner, stage: Stage, cbs):
    "The head alone first where `freeze_epochs` says so, then everything; each on the course that `schedule` names"
    fit = dict(one_cycle=learn.fit_one_cycle, constant=learn.fit)[stage.schedule]
    with learn.no_bar(), learn.no_logging():
        if stage.freeze_epochs:
            learn.freeze()
            fit(stage.freeze_epochs, stage.lr, cbs=cbs)
        learn.unfreeze()
        fit(stage.epochs, slice(stage.lr / stage.lr_div, stage.lr) if stage.lr_div > 1 else stage.lr, cbs=cbs)


def train_fold(run: Run, name: str, fold: int, bars: Bars) -> dict:
    "Trains one fold of a stage into its run folder and returns its record; `stage.json` is written last"
    stage, out, t0 = run.recipe.stages[name], run.fold_dir(name, fold), time.time()
    (out / FINISHED).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    learn = stage_learner(run, name, fold)
    hist = History(stage.keep)
    title = name if stage.folds == 1 else f'{name} fold {fold}'
    epochs = stage.freeze_epochs + stage.epochs
    try:
        with bars(title, epochs * len(learn.dls.train), 'batches') as bar:
            average = [Averaged(stage.ema)] if stage.ema else []
            fit_stage(learn, stage, [Reproducible(run.recipe.seed), *average, hist, ShowProgress(title, epochs, bar, hist)])
    except AptosError as e:                  # fastai puts the callback's name before a callback's words
        raise AptosError(f'[stage.{name}] fold {fold}, {str(e).rpartition(chr(9))[2]}') from None
    learn.model.load_state_dict(hist.weights)
    valid = learn.dls.valid.items.copy()
    with bars(f'{title}  validating', len(valid), 'pictures') as bar:
        scores = predict_scores(learn, valid, stage.tta, bar)
    write_fold(learn, out, valid.assign(score=scores, fold=fold), hist)
    best = next(r for r in hist.rows if r['kept'])
    record = dict(stage=name, fold=fold, fingerprint=run.fingerprint(name, fold), synthetic=bool(run.recipe.demo), settings=asdict(stage),
                  augment=asdict(run.recipe.augment), prep=asdict(run.prep), seed=run.recipe.seed,
                  pictures=dict(train=len(learn.dls.train_ds), valid=len(valid)), kept_epoch=best['epoch'], kept_kappa=best['kappa'],
                  parents={m: run.record(m, fold)['files'][WEIGHTS]['sha256'] for p in stage.parents for m in run.recipe.members(p)},
                  seconds=round(time.time() - t0, 1),
                  files={f: dict(sha256=file_hash(out / f), bytes=(out / f).stat().st_size) for f in (EXPORT, WEIGHTS, PREDS, HISTORY)},
                  versions=versions())
    write_json(out / FINISHED, record)
    return record


def write_fold(learn: Learner, out: Path, preds: pd.DataFrame, hist: History):
    "The files of a finished fold but for its record"
    learn.dls.path = learn.path = out
    learn.export(EXPORT)
    write_bytes(out / WEIGHTS, save({k: v.detach().cpu().contiguous() for k, v in learn.model.state_dict().items()}))
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
