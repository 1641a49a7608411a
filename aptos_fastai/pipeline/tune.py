"`tune`: try values of a stage's keys with Optuna, judged out of fold; measure the best ones again on other folds."
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import torch
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from aptos_fastai.common.console import Bars, format_duration, plural, say, table
from aptos_fastai.common.disclaimer import DISCLAIMER
from aptos_fastai.common.io import AptosError, digest, write_csv, write_record
from aptos_fastai.data.folds import add_folds, write_folds
from aptos_fastai.data.store import prepare_table, stored_column
from aptos_fastai.metrics import kappa_interval, paired_interval, quadratic_kappa
from aptos_fastai.pipeline.graph import check_run, start_run, train_nodes, write_missing_labels
from aptos_fastai.pipeline.lineage import check_lineage, report_weights
from aptos_fastai.pipeline.stage import train_fold
from aptos_fastai.pipeline.summary import (
    SYNTHETIC,
    difference_text,
    interval_text,
    out_of_fold_grades,
    threshold_setting,
)
from aptos_fastai.recipe.graph import Recipe
from aptos_fastai.recipe.read import changed, key_text
from aptos_fastai.recipe.sections import ConfigError, Range
from aptos_fastai.recipe.values import parse_key
from aptos_fastai.run_folder import EXPORT, FEATURES, WEIGHTS, Run
from aptos_fastai.training.callbacks import TrainingDiverged

TUNE = 'tune'                                # folder in the run folder
OTHER_FOLDS = 'other_folds'                  # in it: parents and candidates on the folds of another seed
NOT_KEPT = {EXPORT, WEIGHTS, FEATURES}       # of a trial: its scores and its record stay
DONE = TrialState.COMPLETE, TrialState.PRUNED
SHOWN = 20                                   # trials in the table on the terminal
NAMES = dict(own='the recipe\'s own values', best='the best values')
ONE_TRIAL = dict(seeds='1', keep='last')     # of the stage in every trial, the recipe's own values included
KEEPS_LAST = ('Trials keep the last epoch. An epoch chosen on the validation images (keep = {keep}) would make kappa '
              'optimistic, the more the more epochs there are.')
OPTIMISTIC = ('The kappa on the folds of choosing is that of the best of several trials: optimistic. Other folds of '
              'the same images take out the luck of folds and seeds, not that of the images: evaluate on others.')

Values = dict[str, str]                      # key of the stage -> text of its value


class CannotTrain(AptosError):
    "Why the stage cannot be trained with some values: a short message, without what to do"


@dataclass
class TrialRun(Run):
    """A run whose stage `tuned` is trained in <run>/tune/STAGE/<folder>/, where it keeps no weights.

    `prepared` is the folder of prepared images.
    """
    tuned: str = ''
    folder: str = ''
    prepared: Path = Path()

    @property
    def store(self) -> Path:
        "Folder of prepared images: that of the run"
        return self.prepared

    def fold_dir(self, stage: str, fold: int) -> Path:
        "Return the folder of a fold of a stage"
        if stage != self.tuned: return super().fold_dir(stage, fold)
        return self.root / TUNE / stage / self.folder / f'fold{fold}'

    def damaged_files(self, stage: str, fold: int) -> set[str]:
        "Return the files of a finished fold that are missing or have another size, apart from weights of trials"
        found = super().damaged_files(stage, fold)
        return found - NOT_KEPT if stage == self.tuned else found

    def is_scored(self, fold: int) -> bool:
        "Return whether the scores of a fold are there and up to date"
        return self.finished(self.tuned, fold) and self.outdated(self.tuned, fold) != 'scores'


@dataclass
class Tuned:
    "What a sweep has found"
    run: Run
    stage: str
    study: optuna.Study
    own: Values                              # the recipe's own values
    comparison: dict[str, dict]              # 'chosen' and, unless the recipe's own values won, 'other'
    importance: dict[str, float]             # share of the differences of kappa that each key explains, largest first

    @property
    def folder(self) -> Path:
        "Where tune.csv, tune.json and importance.png are"
        return self.run.root / TUNE / self.stage


def tune_stage(run: Run, stage: str, trials: int) -> Tuned:
    """Try values of [tune.STAGE] until the study has `trials` of them; compare the best with the recipe's own values.

    Writes tune.csv, before it compares, and tune.json; prints both. Nothing in the recipe changes. Raises `AptosError`.
    """
    ranges = check_tunable(run.recipe, stage)
    if trials < 1: raise AptosError(f'--trials {trials}: choose 1 or more.')
    base = trial_base(run, stage)
    check_ranges(base, stage, ranges)
    parents = base.ancestors(stage) - {stage}
    keep = key_text(run.recipe, stage, 'keep')
    if keep != 'last': say(KEEPS_LAST.format(keep=keep), 'yellow')
    with start_run(run, parents, trial=True) as (run, bars):
        train_nodes(run, parents, bars)
        base = trial_base(run, stage)
        drop_weights(run.root / TUNE / stage)
        with open_study(base, stage, ranges) as study:
            own = {key: key_text(run.recipe, stage, key) for key in ranges}
            sweep(base, study, ranges, own, trials, bars)
            write_csv(run.root / TUNE / stage / 'tune.csv', trials_table(study))
            comparison = compare(base, study, own, parents, bars)
            found = Tuned(run, stage, study, own, comparison, importance(study))
            write_results(found)
            show_results(found)
    return found


# Checks before anything trains

def check_tunable(recipe: Recipe, stage: str) -> dict[str, Range]:
    "Return the ranges of a stage. Raises `AptosError` if there are none, or if it is no single training"
    example = f'[tune.{stage}] with a key such as lr = 1e-4 1e-2 log, or --set "tune.{stage}.lr=1e-4 1e-2 log"'
    if f'ensemble.{stage}' in recipe.sections:
        members = ', '.join(recipe.members(stage))
        raise AptosError(f'{stage}: an ensemble, which is not trained. Tune one of its stages: {members}.')
    if f'stage.{stage}' not in recipe.sections:
        whole = next(name for name, e in recipe.ensembles.items() if stage in e.members and f'stage.{name}' in
                     recipe.sections)
        raise AptosError(f'{stage}: one of the trainings of {whole}. Tune {whole}: its trials are one training each.')
    if not recipe.tune.get(stage): raise AptosError(f'{recipe.path}: no ranges to tune. Write a section {example}.')
    return recipe.tune[stage]


def check_ranges(run: Run, stage: str, ranges: dict[str, Range]) -> None:
    "Raise `ConfigError` if the stage cannot be trained with its own values, or with an end of a range in their place"
    check_run(run, [stage])
    for key, tried in ranges.items():
        for text in tried.ends:
            try: check_run(replace(run, recipe=changed(run.recipe, sets_of(stage, {key: text}))), [stage])
            except ConfigError as e:
                raise ConfigError(f'{run.recipe.path} [tune.{stage}] {key} = {tried.text}: {text} cannot run: {e}'
                                  ) from None


# The runs of trials

def sets_of(stage: str, values: Values) -> list[str]:
    "Return values as the SECTION.KEY=VALUE of --set"
    return [f'stage.{stage}.{key}={text}' for key, text in values.items()]


def trial_base(run: Run, stage: str) -> TrialRun:
    "Return a run on the folds of choosing, in which the stage is one training and keeps its last epoch (`ONE_TRIAL`)"
    try: recipe = changed(run.recipe, sets_of(stage, ONE_TRIAL))
    except ConfigError as e: raise ConfigError(f'{stage} is tuned as one training, with seeds = 1, but {e}') from None
    return TrialRun(recipe, run.data, run.root, run.frames, run.left_out, run.ungradable, tuned=stage,
                    prepared=run.store)


def on_other_folds(base: TrialRun) -> TrialRun:
    "Return the run with the folds of the next seed, in a folder of its own, where its folds.csv is written"
    seed = (base.recipe.seed + 1) % 2**31
    recipe, root = changed(base.recipe, [f'recipe.seed={seed}']), base.root / TUNE / OTHER_FOLDS
    other = replace(base, recipe=recipe, root=root, frames=add_folds(recipe, base.frames, root / 'folds.csv'))
    write_folds(recipe, other.frames, root / 'folds.csv')
    return other


def with_values(base: TrialRun, values: Values, bars: Bars) -> TrialRun:
    "Return the run of a trial, its images prepared. Raises `CannotTrain` if these values cannot run together"
    try:
        trial = replace(base, recipe=changed(base.recipe, sets_of(base.tuned, values)))
        check_run(trial, [base.tuned])
    except ConfigError as e: raise CannotTrain(f'cannot run: {e}') from None
    trial = replace(trial, frames=with_squares(trial, bars))
    folds = [trial.fingerprint(base.tuned, k) for k in trial.folds_of(base.tuned)]
    return replace(trial, folder=digest([asdict(trial.recipe.stages[base.tuned]), folds])[:10])


def with_squares(run: Run, bars: Bars) -> dict[str, pd.DataFrame]:
    "Return the tables with squares of all sizes that the stages read; the folds stay"
    frames = {}
    for name, frame in run.frames.items():
        sizes = [size for size in run.recipe.prepared_sizes if stored_column(size) not in frame]
        for size in sizes:
            squares = prepare_table(frame, run.store, replace(run.prep, size=size), bars, sizes=[size])
            frame = frame.assign(**{stored_column(size): squares[stored_column(size)]})
        frames[name] = frame
    return frames


def fold_scores(trial: TrialRun, fold: int, bars: Bars) -> pd.DataFrame:
    "Return the out-of-fold scores of a fold; train it unless it is finished, as a trial or as the run's own stage"
    name = trial.tuned
    stage_run = Run(trial.recipe, trial.data, trial.root, trial.frames)
    if stage_run.finished(name, fold) and stage_run.outdated(name, fold) != 'scores': return stage_run.oof(name, fold)
    if not trial.is_scored(fold):
        check_lineage(trial, name, fold)
        for teacher, source in trial.recipe.stages[name].sources:
            if teacher: write_missing_labels(trial, teacher, source, bars)
        train_fold(trial, name, fold, bars)
        drop_weights(trial.fold_dir(name, fold))
    return trial.oof(name, fold)


def tried_fold(trial: TrialRun, fold: int, bars: Bars) -> pd.DataFrame:
    "Return `fold_scores`. Raises `CannotTrain`, and leaves nothing of the fold, if these values are the reason"
    try: return fold_scores(trial, fold, bars)
    except AptosError as e:
        if not is_of_values(e): raise
        shutil.rmtree(trial.fold_dir(trial.tuned, fold), ignore_errors=True)       # its checkpoint and best epoch
        raise CannotTrain(str(e).partition('. ')[0]) from None


def is_of_values(e: AptosError) -> bool:
    "Return whether an error is of the values of a trial: the loss is not finite, or memory does not suffice"
    return isinstance(e, TrainingDiverged) or isinstance(e.__cause__, torch.OutOfMemoryError | MemoryError)


def drop_weights(folder: Path) -> None:
    "Delete the weights of trials in a folder"
    for file in folder.rglob('*'):
        if file.name in NOT_KEPT: file.unlink()


def graded(trial: TrialRun, scores: Sequence[pd.DataFrame]) -> pd.DataFrame:
    "Return the scores of folds with group and grade, as the report grades them"
    oof = pd.concat(scores, ignore_index=True)
    grade = out_of_fold_grades(trial, oof, threshold_setting(trial, trial.tuned))
    return oof.assign(grade=grade, group=trial.groups(oof))


def all_folds(base: TrialRun, values: Values, bars: Bars) -> pd.DataFrame:
    "Return `graded` of all folds with some values; train what is not finished. Raises `CannotTrain`"
    trial = with_values(base, values, bars)
    return graded(trial, [tried_fold(trial, k, bars) for k in trial.folds_of(trial.tuned)])


# The study

def other_settings(run: Run, stage: str, ranges: dict[str, Range]) -> str:
    "Return the SHA-256 of all that the kappa of a trial depends on, apart from the tuned keys"
    inputs = [run.inputs(stage, k) for k in run.folds_of(stage)]
    for o in inputs:
        del o['settings']
        o['prep']['size'] = run.recipe.images.size           # without it that of the stage
    left_out = {*ranges, 'workers', 'track', 'compile'}
    keys = {k: v for k, v in asdict(run.recipe.stages[stage]).items() if k not in left_out}
    weights = run.file_hashes.get(run.recipe.stages[stage].weights_file)
    return digest([keys, weights, inputs, threshold_setting(run, stage)])


@contextmanager
def open_study(run: Run, stage: str, ranges: dict[str, Range]) -> Iterator[optuna.Study]:
    "Yield the study of these ranges and settings: the one that is there, or another one beside it"
    file = run.root / TUNE / f'{stage}.db'
    attrs = dict(ranges={key: o.text for key, o in ranges.items()}, settings=other_settings(run, stage, ranges))
    file.parent.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage = optuna.storages.RDBStorage(f'sqlite:///{file}')
        earlier = optuna.get_all_study_names(storage)
        name = f'{stage} {digest(attrs)[:10]}'
        pruner = optuna.pruners.MedianPruner()
        study = optuna.create_study(storage=storage, study_name=name, direction='maximize', pruner=pruner,
                                    load_if_exists=True)
    except (SQLAlchemyError, RuntimeError) as e:
        reason = str(e).splitlines()[0]
        raise AptosError(f'{file}: cannot be read as a study ({reason}). Delete it; finished folds are not trained '
                         'again.') from None
    try:
        for key, value in attrs.items(): study.set_user_attr(key, value)
        if earlier and name not in earlier:
            say_changed(optuna.load_study(study_name=earlier[-1], storage=storage), attrs, file)
        yield study
    finally: storage.engine.dispose()


def say_changed(before: optuna.Study, attrs: dict, file: Path) -> None:
    "Print why the trials of an earlier study do not count"
    old, new = before.user_attrs['ranges'], attrs['ranges']
    changes = [f'{key}: {old.get(key, "none")} -> {new.get(key, "none")}' for key in {**old, **new}
               if old.get(key) != new.get(key)]
    why = [f'the ranges changed ({"; ".join(changes)})'] if changes else []
    if old.keys() == new.keys() and before.user_attrs['settings'] != attrs['settings']:
        why.append('other keys, tables, images or parents changed')
    say(f'{" and ".join(why)}: a new study. What the earlier one tried ('
        f'{plural(len(finished_trials(before)), "trial")}) stays in {file} and does not count.', 'yellow')


def finished_trials(study: optuna.Study) -> list[FrozenTrial]:
    "Return the trials that count: complete, or pruned"
    return study.get_trials(deepcopy=False, states=DONE)


def sweep(base: TrialRun, study: optuna.Study, ranges: dict[str, Range], own: Values, trials: int,
          bars: Bars) -> None:
    "Try values until the study has `trials`; the recipe's own come first, and those of an interrupted trial again"
    before = len(finished_trials(study))
    if before: say(f'{base.tuned}: goes on after {plural(before, "trial")}')
    first = own_parameters(ranges, own)
    if first and not study.trials: study.enqueue_trial(first)
    for interrupted in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        study.enqueue_trial(interrupted.params)
        study.tell(interrupted.number, state=TrialState.FAIL)
    with bars('trials', trials) as bar:
        while (n := len(finished_trials(study))) < trials:
            bar.to(n)
            study.sampler = optuna.samplers.TPESampler(seed=base.recipe.seed + n)    # the same if it was interrupted
            trial = study.ask()
            values = {key: suggest(trial, key, o, own[key]) for key, o in ranges.items()}
            trial.set_user_attr('values', values)
            trial.set_user_attr('trial', n + 1)          # without those that were interrupted
            say(f'trial {n + 1} of {trials}: {values_text(values)}', 'bold')
            kappa, stopped = run_trial(base, trial, values, bars)
            trial.set_user_attr('stopped', stopped)
            if stopped: study.tell(trial, state=TrialState.PRUNED)
            else: study.tell(trial, kappa)
            say(f'trial {n + 1}: {stopped or f"kappa {kappa:.3f}, best {study.best_value:.3f}"}')


def own_parameters(ranges: dict[str, Range], own: Values) -> dict[str, Any]:
    "Return the recipe's own values as parameters of a trial; empty if one is outside its range"
    found: dict[str, Any] = {}
    for key, tried in ranges.items():
        value = parse_key(key, own[key])
        if tried.choices: inside = [text for text in tried.choices if parse_key(key, text) == value]
        else: inside = [value] if tried.low <= value <= tried.high else []
        if not inside: return {}
        found[key] = inside[0]
    return found


def suggest(trial: Trial, key: str, tried: Range, own: str) -> str:
    "Return a value as a text of the recipe; a fraction has three digits unless it is the recipe's own"
    if tried.choices: return trial.suggest_categorical(key, tried.choices)
    if isinstance(tried.low, int): return str(trial.suggest_int(key, tried.low, int(tried.high), log=tried.log))
    value = trial.suggest_float(key, tried.low, tried.high, log=tried.log)
    if value == float(own): return own
    return str(min(max(float(f'{value:.3g}'), tried.low), tried.high))


def values_text(values: Values) -> str:
    "Return values for people: 'lr = 0.001, epochs = 8'"
    return ', '.join(f'{key} = {text}' for key, text in values.items())


def run_trial(base: TrialRun, trial: Trial, values: Values, bars: Bars) -> tuple[float, str]:
    "Train a trial, a fold at a time; return its out-of-fold kappa, and why it was stopped: an empty text if it was not"
    try: run = with_values(base, values, bars)
    except CannotTrain as e: return 0., str(e)
    trial.set_user_attr('folder', run.folder)
    report_weights(run, run.recipe.stages[run.tuned])
    scores, kappa, folds = list[pd.DataFrame](), 0., run.folds_of(run.tuned)
    for k in folds:
        try: scores.append(tried_fold(run, k, bars))
        except CannotTrain as e: return kappa, str(e)
        valid = graded(run, scores)
        kappa = quadratic_kappa(valid.grade, valid.diagnosis)
        trial.set_user_attr('folds', k + 1)
        trial.report(kappa, k)
        if k + 1 < len(folds) and trial.should_prune():
            return kappa, f'pruned after {k + 1} of {plural(len(folds), "fold")} at kappa {kappa:.3f}'
    return kappa, ''


# The best values against the recipe's own

def best_values(study: optuna.Study) -> Values:
    "Return the values of the best trial. Raises `AptosError` if none has finished"
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    if not complete:
        reasons = dict.fromkeys(t.user_attrs['stopped'] for t in finished_trials(study))
        raise AptosError(f'no trial was trained to its end: {"; ".join(reasons)}. Change the ranges.')
    return max(complete, key=lambda t: t.value or 0.).user_attrs['values']         # of equal ones the first


def compare(base: TrialRun, study: optuna.Study, own: Values, parents: set[str], bars: Bars) -> dict[str, dict]:
    "Measure the recipe's own values and the best ones on the folds of choosing and, unless they are equal, on others"
    values = best_values(study)
    same = all(parse_key(key, text) == parse_key(key, own[key]) for key, text in values.items())
    found = dict(chosen=difference(base, own, values, bars))
    if same: return found
    other = on_other_folds(base)
    say(f'the best values and the recipe\'s own on other folds ([recipe] seed = {other.recipe.seed}) -> {other.root}',
        'bold')
    train_nodes(other, parents, bars)
    return dict(found, other=difference(other, own, values, bars))


def difference(base: TrialRun, own: Values, values: Values, bars: Bars) -> dict:
    """Return kappa of two sets of values on the same folds, and their paired difference, with intervals.

    Of values that cannot be trained on these folds `not_trained` says why; they have neither kappa nor difference.
    """
    not_trained, scores = dict[str, str](), dict[str, pd.DataFrame]()
    found = dict(seed=base.recipe.seed, images=0, resampled='', own=None, best=None, difference=None,
                 not_trained=not_trained)
    for name, tried in (('own', own), ('best', values)):
        try: df = scores[name] = all_folds(base, tried, bars)
        except CannotTrain as e:
            not_trained[name] = str(e)
            continue
        kappa = [quadratic_kappa(df.grade, df.diagnosis), *kappa_interval(df.grade, df.diagnosis, df.group)]
        found |= {name: kappa, 'images': len(df), 'resampled': base.grouped_by(df)}
    if len(scores) == 2:
        both = scores['own'].merge(scores['best'], on=['source', 'id_code'], suffixes=('', '_b'))
        found['difference'] = list(paired_interval(both.grade, both.grade_b, both.diagnosis, both.group))
    return found


# Results

def importance(study: optuna.Study) -> dict[str, float]:
    "Return the share of the differences of kappa that each key explains, largest first; empty if too few differ"
    kappas = [t.value for t in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])]
    return optuna.importance.get_param_importances(study) if len(set(kappas)) > 1 else {}


def trials_table(study: optuna.Study) -> pd.DataFrame:
    "Return tune.csv, a row for each trial, the best first and those that were stopped last"
    rows = [dict(trial=t.user_attrs['trial'], kappa=t.value if t.state == TrialState.COMPLETE else None,
                 **t.user_attrs['values'], folds=t.user_attrs.get('folds', 0),
                 seconds=round(t.duration.total_seconds(), 1) if t.duration else 0.,
                 folder=t.user_attrs.get('folder', ''), stopped=t.user_attrs['stopped'])
            for t in finished_trials(study)]
    return pd.DataFrame(rows).sort_values('kappa', ascending=False, kind='stable')


def write_results(found: Tuned) -> None:
    "Write tune.json"
    write_record(found.folder / 'tune.json', dict(
        stage=found.stage, synthetic=found.run.synthetic, ranges=found.study.user_attrs['ranges'],
        trials=len(finished_trials(found.study)), own=found.own, best=best_values(found.study),
        importance=found.importance, **found.comparison))


def show_results(found: Tuned) -> None:
    "Print the trials, the comparison, and how to use the best values"
    trials, demo = trials_table(found.study), ' (SYNTHETIC demo)' if found.run.synthetic else ''
    rows = [[o['trial'], f'{o["kappa"]:.3f}' if pd.notna(o['kappa']) else '', *(o[key] for key in found.own),
             o['folds'], format_duration(o['seconds']), o['stopped']] for o in trials.head(SHOWN).to_dict('records')]
    table(f'{plural(len(trials), "trial")} of {found.stage}{demo}, out-of-fold kappa',
          ['trial', 'kappa', *found.own, 'folds', 'time', 'stopped'], rows, right=('trial', 'kappa', 'folds'),
          wrap=('time', 'stopped'))
    say(f'all trials -> {found.folder / "tune.csv"}')
    best = best_values(found.study)
    if 'other' not in found.comparison:
        say('The recipe\'s own values are the best of these trials: there is nothing to set. Their kappa is that of '
            'the best of several: optimistic.', 'yellow')
    else: show_comparison(found, best)
    say(DISCLAIMER, 'dim')
    if found.run.synthetic: say(SYNTHETIC, 'yellow')


def kappa_text(measured: dict, key: str) -> str:
    "Return kappa of own or best values with its interval, or why they cannot be trained"
    if not measured[key]: return f'cannot be trained: {measured["not_trained"][key]}'
    return interval_text(measured[key][0], measured[key][1:])


def show_comparison(found: Tuned, best: Values) -> None:
    "Print both sets of values on the folds of choosing and on other folds, and the --set of the best ones"
    places = [found.comparison['chosen'], found.comparison['other']]
    rows = [[name, *(kappa_text(o, key) for o in places)]
            for key, name in NAMES.items()]
    rows.append(['difference', *(difference_text(*o['difference']) if o['difference'] else '-' for o in places)])
    columns = ['values', 'folds of choosing, kappa (95 % CI)', 'other folds, kappa (95 % CI)']
    table('the best trial against the recipe', columns, rows, wrap=columns)
    other = places[1]
    for key, reason in other['not_trained'].items():
        say(f'{NAMES[key]} on other folds: {reason}. There is no difference to measure.', 'yellow')
    if other['difference']:
        say(f'{other["images"]} images on other folds; paired bootstrap over {other["resampled"]}.', 'dim')
        low, high = other['difference'][1:]
        if low <= 0 <= high: say('On other folds the difference may be chance: its interval contains 0.', 'yellow')
    say(OPTIMISTIC, 'yellow')
    options = ' '.join(f'--set {shlex.quote(o)}' for o in sets_of(found.stage, best))
    say(f'To use the best values ({values_text(best)}): {options}')
    keep = key_text(found.run.recipe, found.stage, 'keep')
    if keep != 'last': say(f'They were compared with keep = last; the stage has keep = {keep}.', 'yellow')
