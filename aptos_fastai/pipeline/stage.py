"Train one fold of a stage and write its folder."
import os
import platform
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from fastai.callback.schedule import minimum, steep, valley
from fastai.callback.training import GradientClip
from fastai.vision.all import Callback, Learner, default_device, set_seed
from safetensors.torch import save

import aptos_fastai
from aptos_fastai.common.console import Bars, say
from aptos_fastai.common.distributed import is_peer_lost, rank, run_on_all_ranks, world_size
from aptos_fastai.common.io import AptosError, atomic_write, digest, file_state, write_bytes, write_csv, write_record
from aptos_fastai.inference.gate import FeatureDistance, gate_rules
from aptos_fastai.pipeline.features import FrozenFeatures, frozen_features, probe
from aptos_fastai.pipeline.lineage import seen_by_weights, training_images
from aptos_fastai.pipeline.pseudo_labels import read_labels
from aptos_fastai.pipeline.scores import PREDS_COLUMNS, predict_features, predict_views, read_exported
from aptos_fastai.recipe.check import require_name
from aptos_fastai.recipe.sections import MLFLOW_SERVER, Stage
from aptos_fastai.recipe.values import check_fold
from aptos_fastai.run_folder import EXPORT, FEATURES, FINISHED, FOLD_FILES, HISTORY, PREDS, WEIGHTS, Run
from aptos_fastai.training.callbacks import (
    AccumulateGradients,
    EMACallback,
    FrozenBody,
    History,
    LossScaling,
    MLflowCallback,
    Reproducible,
    ShowProgress,
    TrainingDiverged,
    cpu_state_dict,
)
from aptos_fastai.training.checkpoint import BEST_WEIGHTS, Checkpoint, clear_checkpoint, finished_epochs
from aptos_fastai.training.loaders import get_dls, keep_processes
from aptos_fastai.training.model import body_stats, get_learner
from aptos_fastai.training.optimizer import layer_rates, load_optimizer_state
from aptos_fastai.training.precision import Autocast, precision_of
from aptos_fastai.training.probe import head_stage
from aptos_fastai.training.weight_files import Loaded

DISTANCE_IMAGES = 2000                       # training images, at most, that the feature distance is fitted to


def training_frame(run: Run, stage: Stage, fold: int, labels: dict[tuple[str, str], pd.DataFrame]) -> pd.DataFrame:
    """Return the images of one fold: `valid` is True for those that validate it, `diagnosis` is the grade or target.

    With `source_weights` or `balance`, `weight` is the sampling weight. `labels` holds the pseudo-labels by (teacher,
    table). Pseudo-labelled images only train; those that duplicate an image of the validation part, or are of the same
    patient, are left out. Raises `AptosError`.
    """
    parts = []
    for i, (teacher, table) in enumerate(stage.sources):
        images = run.frames[table]
        trains = run.training_part(stage, table, fold)
        if teacher:
            teachers_fold = run.parent_fold(teacher, fold)
            part = _pseudo_labelled_part(images[trains], teachers_fold, teacher, table, labels[teacher, table])
        else: part = _graded_part(images, trains, run.validation_part(stage, table, fold))
        if stage.draws_by_weight: part['weight'] = stage.source_weights[i] if stage.source_weights else 1.
        parts.append(part)
    frame = pd.concat(parts, ignore_index=True)
    if stage.balance: frame['weight'] = balanced_weights(frame, stage.balance)
    n = int((~frame.valid).sum())
    if stage.bs > n:
        raise AptosError(f'[stage.{stage.name}] bs = {stage.bs}: only {n} images train in fold {fold}. '
                         f'Set bs to {n} or less.')
    return frame


def balanced_weights(frame: pd.DataFrame, column: str) -> pd.Series:
    "Return the weights of images so that those of the training images of each value of `column` add up to 1"
    trains = ~frame.valid
    total = frame.weight[trains].groupby(frame[column][trains]).sum()
    return frame.weight / frame[column].map(total).fillna(1.)         # a value that only validates is not drawn


def _graded_part(images: pd.DataFrame, trains: pd.Series, valid: pd.Series) -> pd.DataFrame:
    "Return a graded table: some images validate by their grade, others train on their target"
    part = images.assign(valid=valid, diagnosis=images.diagnosis.where(valid, images.target))
    return part[trains | valid]


def _pseudo_labelled_part(images: pd.DataFrame, fold: int, teacher: str, table: str,
                          labels: pd.DataFrame) -> pd.DataFrame:
    "Return images of an ungraded table with labels by the teacher's network of `fold`"
    labels = labels.set_index('id_code')
    images = images[images.id_code.isin(labels.index)]
    diagnosis = images.id_code.map(labels[f'fold{fold}']).astype(np.float32)
    return images.assign(diagnosis=diagnosis, valid=False, source=f'{teacher}:{table}')


def stage_learner(run: Run, name: str, fold: int = 0) -> Learner:
    """Return the Learner of a stage as its training starts: with its data and its parent's weights.

    Raises `AptosError` if the parent is not trained, or the recipe has no such stage or fold.
    """
    stage = run.recipe.stages[require_name(run.recipe, name, run.recipe.stages)]
    check_fold(fold, run.recipe.splits, name)
    set_seed(stage.seed)
    labels = {(teacher, table): read_labels(run, teacher, table, stage.labels)
              for teacher, table in stage.sources if teacher}
    frame = training_frame(run, stage, fold, labels)
    stats = body_stats(stage.arch, stage.mean, stage.std)
    dls = get_dls(frame, stage, run.prep_of(stage), run.recipe.augment, stats, seed=stage.seed,
                  path=run.fold_dir(name, fold))
    parent_fold = run.parent_fold(stage.init, fold) if stage.init else 0
    weights = read_exported(run, stage.init, parent_fold).model.state_dict() if stage.init else None
    learn = get_learner(stage, dls, weights)
    say_loaded(stage, fold, learn)
    return learn


def say_loaded(stage: Stage, fold: int, learn: Learner) -> None:
    "Print what was loaded from the file that `weights` names, and what its images are normalised by"
    loaded = learn.model[0].loaded
    if not loaded or rank() > 0: return
    mean, std = (' '.join(f'{o:g}' for o in stat) for stat in body_stats(stage.arch, stage.mean, stage.std))
    whose = '' if stage.mean and stage.std else f', those of timm for {stage.arch}; keys: mean, std'
    say(f'  {stage.name} fold {fold}: {Loaded(**loaded).text}. Images are normalised by mean {mean}, std {std}{whose}')


def train_fold(run: Run, name: str, fold: int, bars: Bars) -> None:
    "Train one fold of a stage, or resume its training, and write its folder; `stage.json` is written last"
    (run.fold_dir(name, fold) / FINISHED).unlink(missing_ok=True)
    stage = run.recipe.stages[name]
    precision = precision_of(stage, run.root) if stage.epochs else features_precision(stage)
    run_on_all_ranks(fit_and_write, bars, run, name, fold, precision)


def fit_and_write(bars: Bars, run: Run, name: str, fold: int, precision: str) -> None:
    "Train and validate one fold in every process; rank 0 writes the files"
    stage, out = run.recipe.stages[name], run.fold_dir(name, fold)
    title = name if stage.folds == 1 else f'{name} fold {fold}'
    hist = History(stage.keep)
    with actionable_errors(stage, fold, out, title, hist):
        learn, checkpoint, frozen = fit_fold(run, name, fold, precision, bars, title, hist)
    fit_end = time.monotonic()
    warn_rising_loss(title, hist)
    learn.model.load_state_dict(hist.weights)
    distance = fit_distance(learn, stage.seed, bars, title, frozen)
    valid = learn.dls.valid.items.copy()
    if frozen: scores, distances = frozen.scores(learn, valid, distance)
    else:
        with bars(f'{title}  validating', len(valid), 'images') as bar:
            scores, distances = predict_views(learn, valid, stage.tta, bar, distance)
    if rank() > 0: return
    write_fold(learn, out, valid.assign(score=scores.mean(1), fold=fold, feature_distance=distances), hist)
    distance.write(out / FEATURES)
    seconds = sum(r['seconds'] for r in hist.rows) + time.monotonic() - fit_end + (frozen.seconds if frozen else 0)
    images = dict(train=len(learn.dls.train_ds), valid=len(valid))
    write_record(out / FINISHED, dict(
        fold_settings(run, name, fold), **initial_weights(run, stage, fold, learn), pooling=learn.model[1].pooling,
        images=images,
        kept_epoch=hist.kept_row['epoch'], kept_kappa=hist.kept_row['kappa'],
        gate=dict(asdict(run.recipe.gate), rules=stage_rules(run, stage)), resumed_after_epochs=checkpoint.resumed,
        precision=precision, processes=world_size(), seconds=round(seconds, 1),
        files={f: file_state(out / f) for f in FOLD_FILES},
        versions=versions()))
    clear_checkpoint(out)


def initial_weights(run: Run, stage: Stage, fold: int, learn: Learner) -> dict:
    """Return what a fold's record says of the weights that its training started from.

    `loaded` is what was loaded from a file by `weights`, of the stage `init` if there is one, else null; `origin` is
    what is known of the images that the file was trained on. `mean` and `std` are those that images are normalised by.
    """
    mean, std = body_stats(stage.arch, stage.mean, stage.std)
    if stage.init: loaded = run.finished_record(stage.init, run.parent_fold(stage.init, fold)).get('loaded')
    else: loaded = learn.model[0].loaded
    return dict(loaded=loaded, origin=seen_by_weights(run, stage), mean=list(mean), std=list(std))


def fit_distance(learn: Learner, seed: int, bars: Bars, title: str, frozen: FrozenFeatures | None) -> FeatureDistance:
    """Fit the feature distance to graded training images of a fold, without augmentation; every process calls this.

    `frozen` are the features of a linear probe.
    """
    images = learn.dls.train.items
    images = images[~images.source.str.contains(':')]        # not the pseudo-labelled ones: no one has looked at them
    if len(images) > DISTANCE_IMAGES:
        chosen = np.random.default_rng(seed).choice(len(images), DISTANCE_IMAGES, replace=False)
        images = images.iloc[np.sort(chosen)]
    if frozen: return FeatureDistance.fit(frozen.of(images)[:, 0])
    with bars(f'{title}  features of training images', len(images), 'images') as bar:
        return FeatureDistance.fit(predict_features(learn, images, bar))


def stage_rules(run: Run, stage: Stage) -> dict:
    "Return the gate's rules that the graded tables of a stage need"
    return gate_rules(pd.concat([run.frames[table] for teacher, table in stage.sources if not teacher]))


def fold_settings(run: Run, name: str, fold: int) -> dict:
    "Return what a fold's record says of its origin: recipe, seed, parents"
    recipe, inputs = run.recipe, run.inputs(name, fold)
    return dict(stage=name, fold=fold, fingerprint=run.fingerprint(name, fold), synthetic=run.synthetic,
                settings=asdict(recipe.stages[name]), augment=inputs['augment'], prep=inputs['prep'],
                seed=recipe.stages[name].seed, parents=run.parent_weight_hashes(name, fold),
                inputs=dict(init=inputs['init'], train=inputs['train']), trained_on=training_images(run, name, fold))


def fit_fold(run: Run, name: str, fold: int, precision: str, bars: Bars, title: str,
             hist: History) -> tuple[Learner, Checkpoint, FrozenFeatures | None]:
    """Train one fold from its checkpoint or its start to its last epoch.

    Return the Learner, the Checkpoint and, of a linear probe, the features of its images.
    """
    stage, out = run.recipe.stages[name], run.fold_dir(name, fold)
    whole = learn = stage_learner(run, name, fold)
    frozen = None if stage.epochs else frozen_features(run, stage, whole, precision, bars)
    if frozen: learn, stage, precision = probe(stage, whole, frozen), head_stage(stage), 'f32'
    elif stage.compile == 'yes': learn.model[0].model.compile()
    ema = EMACallback(stage.ema) if stage.ema else None
    key = digest([run.fingerprint(name, fold), sorted(run.parent_weight_hashes(name, fold).values()),
                  run.file_hashes.get(stage.weights_file), precision])
    checkpoint = Checkpoint(out, key, hist, ema)
    opt = checkpoint.load(learn)
    done, epochs = checkpoint.saved_epochs, stage.freeze_epochs + stage.epochs
    if done: say(f'  {title}: resumes after epoch {done} of {epochs}')
    cbs: list[Callback] = [Reproducible(stage.seed, hist)]
    if ema: cbs.append(ema)
    cbs += [*optional_callbacks(stage, precision), hist]
    with bars(title, epochs * (len(learn.dls.train) // world_size()), 'batches') as bar:
        if rank() == 0:
            cbs += [checkpoint, ShowProgress(title, epochs, bar, hist), *tracker_callbacks(run, name, fold, key, hist)]
        try: fit_stage(learn, stage, cbs, done, opt)
        finally:                             # also where it diverges: weights of a network, not of its head alone
            if frozen and hist.weights: hist.weights = cpu_state_dict(whole.model) | hist.weights
    return whole, checkpoint, frozen


def fit_stage(learn: Learner, stage: Stage, cbs: list[Callback], done: int = 0, opt: dict | None = None) -> None:
    """Train the head alone for `freeze_epochs`, then the whole network for `epochs`, each with the stage's `schedule`.

    The first `done` epochs of both are skipped; `opt` is the optimizer's state after them.
    """
    fit = dict(one_cycle=partial(learn.fit_one_cycle, pct_start=stage.warmup), constant=learn.fit)[stage.schedule]
    rates = layer_rates(stage, learn.splitter(learn.model))
    phases = [(learn.freeze, stage.freeze_epochs, stage.lr), (learn.unfreeze, stage.epochs, rates)]
    learn.model.to(learn.dls.device)         # before the optimizer's state, which goes where its parameters are
    with learn.no_bar(), learn.no_logging(), keep_processes(learn.dls):
        for freeze, epochs, lr in phases:
            skipped = min(done, epochs)
            done -= skipped
            if skipped == epochs: continue
            freeze()
            if skipped and opt: load_optimizer_state(learn.opt, opt, learn.dls.device)
            fit(epochs, lr, cbs=cbs, start_epoch=skipped)


def optional_callbacks(stage: Stage, precision: str) -> list[Callback]:
    "Return the callbacks that the precision, the stage's keys and the number of processes require"
    cbs: list[Callback] = [FrozenBody()]
    if stage.clip: cbs.append(GradientClip(stage.clip))
    if precision != 'f32': cbs.append(Autocast(precision))
    if precision == 'fp16': cbs.append(LossScaling())
    if stage.accumulate > 1: cbs.append(AccumulateGradients(stage.bs // world_size() * stage.accumulate))
    if world_size() > 1:
        from aptos_fastai.training.parallel import DistributedTraining
        cbs.append(DistributedTraining())
    return cbs


def tracker_callbacks(run: Run, name: str, fold: int, key: str, hist: History) -> list[Callback]:
    "Return the callback for the experiment tracker that the stage's `track` names; `key` is a hash of the training"
    stage, folder = run.recipe.stages[name], run.fold_dir(name, fold).relative_to(run.root)
    tracker, title = stage.track, f'{run.recipe.name} {" ".join(folder.parts)}'
    if tracker == 'tensorboard':
        from fastai.callback.tensorboard import TensorBoardCallback

        class TensorBoard(TensorBoardCallback):
            "fastai's callback, for optimizers of PyTorch too: some of their options are None, which it cannot write"
            def after_batch(self):
                "Write the loss and the numbers among the optimizer's options"
                self.writer.add_scalar('train_loss', self.smooth_loss, self.train_iter)
                for i, options in enumerate(self.opt.hypers):
                    for name, value in options.items():
                        if value is not None: self.writer.add_scalar(f'{name}_{i}', value, self.train_iter)
        return [TensorBoard(run.root / tracker / folder, trace_model=False, log_preds=False)]
    if tracker == 'wandb':
        import wandb
        from fastai.callback.wandb import WandbCallback
        wandb.init(project='aptos_fastai', name=title, dir=run.root, reinit='finish_previous')
        return [WandbCallback(log_preds=False)]
    if tracker == 'mlflow':
        uri = os.environ.get(MLFLOW_SERVER)
        if not uri:
            (run.root / tracker).mkdir(parents=True, exist_ok=True)
            uri = f'sqlite:///{(run.root / tracker).resolve().as_posix()}/mlflow.db'
        tags = dict(run=run.recipe.name, stage=name, fold=str(fold), synthetic=str(run.synthetic))
        return [MLflowCallback(uri, title, asdict(stage), tags, key, stage.freeze_epochs + stage.epochs, hist)]
    return []


@contextmanager
def actionable_errors(stage: Stage, fold: int, out: Path, title: str, hist: History) -> Iterator[None]:
    "Turn training failures into actionable errors"
    try: yield
    except TrainingDiverged as e:
        message = f'[stage.{stage.name}] fold {fold}, {_own_message(e)}'
        if hist.weights and rank() == 0:
            write_weights(out / BEST_WEIGHTS, hist.weights)
            message += f' The best epoch\'s weights are in {out / BEST_WEIGHTS}'
        raise TrainingDiverged(message) from None
    except AptosError as e: raise AptosError(_own_message(e)) from None
    except KeyboardInterrupt:
        total = stage.freeze_epochs + stage.epochs
        raise KeyboardInterrupt(f'{title} has finished {finished_epochs(out)} of {total} epochs') from None
    except (RuntimeError, MemoryError) as e:
        advice = '' if is_peer_lost(e) else _advice(e, stage)
        if not advice: raise
        raise AptosError(f'[stage.{stage.name}] fold {fold}, {advice}') from e


def _own_message(e: Exception) -> str:
    "Return the message of an error raised in a callback, without the callback's name that fastai puts before it"
    return str(e).rpartition('\t')[2]


def _advice(e: Exception, stage: Stage) -> str:
    "Return what the user can do about an error of PyTorch; an empty string if that is unknown"
    text = str(e)
    if isinstance(e, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        smaller = 'Set a lower size.'
        if stage.bs > 1:
            smaller = (f'Set bs = {stage.bs // 2} and accumulate = {2 * stage.accumulate} in [stage.{stage.name}]: '
                       'the same steps in half the memory.')
        return f'out of memory with bs = {stage.bs} at {stage.size} px. {smaller} Finished stages are kept.'
    if 'DataLoader worker' in text:
        return ('a process that loads images died (it was killed or ran out of memory). '
                'Run again to resume after the last finished epoch, or set workers = 0.')
    return ''


def warn_rising_loss(title: str, hist: History) -> None:
    "Warn if the last epoch's validation loss is three times the lowest"
    lowest, last = min(r['valid_loss'] for r in hist.rows), hist.rows[-1]['valid_loss']
    if last > 3 * lowest:
        say(f'  {title}: the validation loss rose from {lowest:.3f} to {last:.3f}; lr may be too high. '
            f'Epoch {hist.kept_row["epoch"] + 1} is kept.', 'yellow')


def write_weights(path: Path, weights: dict[str, torch.Tensor]) -> None:
    "Write a state dict as safetensors"
    write_bytes(path, save({k: v.detach().cpu().contiguous() for k, v in weights.items()}))


def write_fold(learn: Learner, out: Path, preds: pd.DataFrame, hist: History) -> None:
    "Write the files of a finished fold, except its record"
    learn.dls.path = learn.path = out
    with atomic_write(out / EXPORT) as tmp: learn.export(tmp.name)
    write_weights(out / WEIGHTS, learn.model.state_dict())
    write_csv(out / PREDS, preds[PREDS_COLUMNS])
    write_csv(out / HISTORY, pd.DataFrame(hist.rows))


def versions() -> dict[str, str]:
    "Return the versions, git commit and device that a record names"
    import fastai
    clone, git = Path(__file__).parents[2], ''
    if (clone / '.git').exists() and shutil.which('git'):
        cmd = ['git', 'rev-parse', '--short', 'HEAD']
        git = subprocess.run(cmd, capture_output=True, text=True, cwd=clone, check=False).stdout.strip()
    return dict(aptos_fastai=aptos_fastai.__version__, git=git, fastai=fastai.__version__, torch=torch.__version__,
                timm=timm.__version__, python=platform.python_version(), device=str(default_device()))


def features_precision(stage: Stage) -> str:
    "Return the precision in which a linear probe computes features: by default that of predictions"
    return 'f32' if stage.precision == 'auto' else stage.precision


def probe_of_fold(bars: Bars, run: Run, name: str, fold: int) -> Learner:
    "Return the Learner that trains the head of a linear probe on features; every process calls this"
    stage, whole = run.recipe.stages[name], stage_learner(run, name, fold)
    return probe(stage, whole, frozen_features(run, stage, whole, features_precision(stage), bars))


def find_rates(run: Run, name: str, plot: Path, bars: Bars) -> dict[str, float]:
    """Suggest learning rates for a stage by fastai's LR finder (Smith 2015), and save the curve as `plot`.

    Those of a linear probe are for its head, on the features that it trains on.
    """
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    stage = run.recipe.stages[name]
    learn = stage_learner(run, name) if stage.epochs else run_on_all_ranks(probe_of_fold, bars, run, name, 0)
    with warnings.catch_warnings(), learn.no_bar():
        found = learn.lr_find(suggest_funcs=(valley, minimum, steep))
    demo = ' (synthetic demo)' if run.synthetic else ''
    plt.title(f'{name}: loss over learning rate, {len(learn.dls.train_ds)} images{demo}')
    plt.tight_layout()
    plot.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(plot, dpi=110)
    plt.close()
    return {k: float(v) for k, v in found._asdict().items()}
