"One stage, one fold -> its run folder."
import platform
import shutil
import subprocess
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import timm
from fastai.callback.schedule import *
from fastai.vision.all import *
from safetensors.torch import save

import aptos_fastai
from aptos_fastai.common.console import Bars, say
from aptos_fastai.common.distributed import is_peer_lost, rank, run_on_all_ranks, world_size
from aptos_fastai.common.io import AptosError, atomic_write, digest, file_hash, write_bytes, write_csv, write_record
from aptos_fastai.pipeline.pseudo_labels import read_labels
from aptos_fastai.pipeline.scores import predict_scores, read_exported
from aptos_fastai.recipe import Stage
from aptos_fastai.run_folder import EXPORT, FINISHED, HISTORY, PREDS, WEIGHTS, Run
from aptos_fastai.training.callbacks import (
    Accumulate,
    EMACallback,
    History,
    LossScaling,
    Reproducible,
    ShowProgress,
    TrainingDiverged,
)
from aptos_fastai.training.checkpoint import BEST, Checkpoint, clear_checkpoint, epochs_kept
from aptos_fastai.training.loaders import get_dls
from aptos_fastai.training.model import body_stats, get_learner
from aptos_fastai.training.precision import Autocast, precision_of


def write_weights(path: Path, weights: dict[str, Tensor]):
    "A state dict as safetensors"
    write_bytes(path, save({k: v.detach().cpu().contiguous() for k, v in weights.items()}))


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
                if start: learn.opt.load_state_dict(dict(opt, state=to_device(opt['state'], learn.dls.device)))
                fit(epochs, lr, cbs=cbs, start_epoch=start)
            before += epochs


def train_fold(run: Run, name: str, fold: int, bars: Bars):
    "Trains one fold of a stage into its run folder, from its last finished epoch on; `stage.json` is written last"
    (run.fold_dir(name, fold) / FINISHED).unlink(missing_ok=True)
    run_on_all_ranks(fit_and_write, bars, run, name, fold, precision_of(run.recipe.stages[name], run.root))


def fit_and_write(bars: Bars, run: Run, name: str, fold: int, precision: str):
    "`train_fold`, in every process: all train and validate, the first writes"
    stage, out = run.recipe.stages[name], run.fold_dir(name, fold)
    title = name if stage.folds == 1 else f'{name} fold {fold}'
    hist = History(stage.keep)
    with actionable_errors(stage, fold, out, title, hist): learn, checkpoint = fit_fold(run, name, fold, precision, bars, title, hist)
    t0 = time.monotonic()
    warn_rising_loss(title, hist)
    learn.model.load_state_dict(hist.weights)
    valid = learn.dls.valid.items.copy()
    with bars(f'{title}  validating', len(valid), 'images') as bar:
        scores = predict_scores(learn, valid, stage.tta, bar)
    if rank(): return
    write_fold(learn, out, valid.assign(score=scores, fold=fold), hist)
    best = next(r for r in hist.rows if r['kept'])
    write_record(out / FINISHED, dict(
        stage=name, fold=fold, fingerprint=run.fingerprint(name, fold), synthetic=bool(run.recipe.demo), settings=asdict(stage),
        augment=asdict(run.recipe.augment), prep=asdict(run.prep), seed=run.recipe.seed,
        images=dict(train=len(learn.dls.train_ds), valid=len(valid)), kept_epoch=best['epoch'], kept_kappa=best['kappa'],
        parents=run.parents_weights(name, fold), resumed_after_epochs=checkpoint.resumed, precision=precision, processes=world_size(),
        seconds=round(sum(r['seconds'] for r in hist.rows) + time.monotonic() - t0, 1),
        files={f: dict(sha256=file_hash(out / f), bytes=(out / f).stat().st_size) for f in (EXPORT, WEIGHTS, PREDS, HISTORY)},
        versions=versions()))
    clear_checkpoint(out)


def fit_fold(run: Run, name: str, fold: int, precision: str, bars: Bars, title: str, hist: History) -> tuple[Learner, Checkpoint]:
    "The Learner after its epochs, with what kept them"
    stage, out = run.recipe.stages[name], run.fold_dir(name, fold)
    learn = stage_learner(run, name, fold)
    if stage.compile == 'yes': learn.model[0].model.compile()
    average = [EMACallback(stage.ema)] if stage.ema else []
    checkpoint = Checkpoint(out, digest([run.fingerprint(name, fold), run.parents_weights(name, fold)]), [hist, *average])
    opt, epochs = checkpoint.load(learn), stage.freeze_epochs + stage.epochs
    if checkpoint.begun: say(f'  {title}: goes on after epoch {checkpoint.begun} of {epochs}, which is finished')
    with bars(title, epochs * (len(learn.dls.train) // world_size()), 'batches') as bar:
        writes = [] if rank() else [checkpoint, ShowProgress(title, epochs, bar, hist), *tracked(run, name, fold)]
        fit_stage(learn, stage, [Reproducible(run.recipe.seed, hist), *average, *optional_callbacks(stage, precision, hist), hist, *writes], checkpoint.begun, opt)
    return learn, checkpoint


def optional_callbacks(stage: Stage, precision: str, hist: History) -> list[Callback]:
    "The callbacks that keys of the stage and the machine ask for"
    out = []
    if precision != 'f32': out.append(Autocast(precision))
    if precision == 'fp16': out.append(LossScaling())
    if stage.accumulate > 1: out.append(Accumulate(stage.accumulate))
    if world_size() > 1:
        from aptos_fastai.training.parallel import DistributedTraining
        out.append(DistributedTraining())
    return out


def tracked(run: Run, name: str, fold: int) -> list[Callback]:
    "fastai's own callback of the tracker that the stage names"
    how = run.recipe.stages[name].track
    if how == 'tensorboard':
        from fastai.callback.tensorboard import TensorBoardCallback
        return [TensorBoardCallback(run.root / how / name / f'fold{fold}', trace_model=False, log_preds=False)]
    if how == 'wandb':
        import wandb
        from fastai.callback.wandb import WandbCallback
        wandb.init(project='aptos_fastai', name=f'{run.recipe.name} {name} fold{fold}', dir=run.root, reinit='finish_previous')
        return [WandbCallback(log_preds=False)]
    return []


@contextmanager
def actionable_errors(stage: Stage, fold: int, out: Path, title: str, hist: History):
    "What stops a training, in words that say what to do"
    try: yield
    except TrainingDiverged as e:
        best = f'; its best epoch\'s weights are in {keep_best(out, hist)}' if hist.weights and not rank() else ''
        raise AptosError(f'[stage.{stage.name}] fold {fold}, {_words(e)}{best}') from None
    except AptosError as e: raise AptosError(_words(e)) from None
    except KeyboardInterrupt:
        n = epochs_kept(out)
        raise KeyboardInterrupt(f'{title} has finished {n} of {stage.freeze_epochs + stage.epochs} epochs') from None
    except (RuntimeError, MemoryError) as e:
        if is_peer_lost(e): raise
        raise AptosError(f'[stage.{stage.name}] fold {fold}, {_fault(e, stage)}') from e


def _words(e: Exception) -> str: return str(e).rpartition('\t')[2]           # fastai puts the callback's name before a callback's words


def _fault(e: Exception, stage: Stage) -> str:
    "What a reader can do about an exception of PyTorch's; raises it again where that is nothing"
    text = str(e)
    if isinstance(e, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        half = f'set bs = {stage.bs // 2} and accumulate = {2 * stage.accumulate}: the same steps in half the memory' if stage.bs > 1 else 'set size lower'
        return f'out of memory with bs = {stage.bs} at {stage.size} px: {half}; finished epochs of unchanged settings are kept'
    if 'DataLoader worker' in text:
        return 'a process that loads images died (killed, or out of memory): run again, it goes on from the last finished epoch; or set workers = 0'
    raise e


def warn_rising_loss(title: str, hist: History):
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
    with atomic_write(out / EXPORT) as tmp: learn.export(tmp.name)
    write_weights(out / WEIGHTS, learn.model.state_dict())
    write_csv(out / PREDS, preds[['id_code', 'source', 'diagnosis', 'fold', 'score']])
    write_csv(out / HISTORY, pd.DataFrame(hist.rows))


def versions() -> dict:
    "What the record says it was made with"
    import fastai
    clone, git = Path(__file__).parents[2], ''
    if (clone / '.git').exists() and shutil.which('git'):
        git = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True, cwd=clone, check=False).stdout.strip()
    return dict(aptos_fastai=aptos_fastai.__version__, git=git, fastai=fastai.__version__, torch=torch.__version__, timm=timm.__version__,
                python=platform.python_version(), device=str(default_device()))


def find_rates(run: Run, name: str, plot: Path) -> dict[str, float]:
    "Suggested learning rates of a stage (fastai's LR finder, Smith 2015), and the curve saved at `plot`"
    import matplotlib
    matplotlib.use('Agg')
    learn = stage_learner(run, name)
    with warnings.catch_warnings(), learn.no_bar():
        found = learn.lr_find(suggest_funcs=(valley, minimum, steep))
    plt.title(f'{name}: loss over learning rate, {len(learn.dls.train_ds)} images' + (' (synthetic demo)' if run.recipe.demo else ''))
    plt.tight_layout()
    plot.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(plot, dpi=110); plt.close()
    return {k: float(v) for k, v in found._asdict().items()}


def training_frame(run: Run, stage: Stage, fold: int, labels: dict[tuple[str, str], pd.DataFrame]) -> pd.DataFrame:
    """The rows of one fold: graded ones with `valid` where they are its part, pseudo-labelled ones never.
    An ungraded image that is also a graded one of the part (or of its patient) is left out."""
    parts = []
    for teacher, name in stage.sources:
        f = run.frames[name]
        if teacher:
            lab = labels[teacher, name].set_index('id_code')
            f = f[(f.fold != fold) & f.id_code.isin(lab.index)]
            if not len(f): raise AptosError(f'[stage.{stage.name}] train = {teacher}:{name}: every image of {name} is a copy of a validation image of fold {fold}; remove the copies')
            parts.append(f.assign(diagnosis=f.id_code.map(lab[f'fold{fold}']).astype(np.float32), valid=False, source=f'{teacher}:{name}'))
        else: parts.append(f.assign(valid=f.fold == fold, diagnosis=f.diagnosis.where(f.fold == fold, f.target)))
        if stage.source_weights: parts[-1]['weight'] = stage.source_weights[len(parts) - 1]
    out = pd.concat(parts, ignore_index=True)
    n = int((~out.valid).sum())
    if stage.bs > n: raise AptosError(f'[stage.{stage.name}] bs = {stage.bs}: only {n} images train in fold {fold}; set it to {n} or less')
    return out
