"""Choose the settings of a recipe for a number of hours on this machine, with the reason of each.

`WHOLE` and `PROBE` are ladders: a first rung and steps, in the order of what they are worth (docs/results.md). Each
step makes the training longer. It is taken if the recipe with it still ends in time, by the estimate of `plan`.
"""
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from aptos_fastai.common.console import format_duration, plural, say
from aptos_fastai.common.io import AptosError
from aptos_fastai.data.decode import ImageError
from aptos_fastai.data.retina import get_prep, prepare
from aptos_fastai.data.tables import read_contents
from aptos_fastai.pipeline.deadline import enough_hours
from aptos_fastai.pipeline.graph import load_run
from aptos_fastai.pipeline.plan import measured_speed, plan_cost, report_seconds, speed_key
from aptos_fastai.pipeline.run_recipe import keep_sections, parsed, section_and_key, sets_applied
from aptos_fastai.recipe.graph import Recipe
from aptos_fastai.recipe.sections import Ini, Stage
from aptos_fastai.recipe.smaller import postpone_stages
from aptos_fastai.run_folder import Run

Value = tuple[str, str]                      # the value of a key, and why
PSEUDO = 'pseudo-labels'                     # the step to the stages that learn them: a section, not a key
OWN = 'set by the user'
NETWORK = 'stage.arch'                       # the step to a network whose weights are downloaded

FILL = .9                                    # part of the time that the estimate may take: trainings took 6-13 % more
FEW_UNGRADED = .1                            # of the graded images: with fewer ungraded ones, no pseudo-labels
STEPS_PER_EPOCH = 8                          # at least, or the batches are made smaller
SAMPLED_IMAGES = 12                          # whose retinas are measured
STORED = 1.4                                 # side of the prepared squares relative to the input, as in one_table.ini


@dataclass(frozen=True)
class Step:
    "Keys of a recipe (SECTION.KEY) that change together, and why"
    keys: dict[str, str]
    why: str


@dataclass(frozen=True)
class Ladder:
    "The cheapest setting, with a reason for each key, and the steps to dearer ones"
    start: dict[str, Value]
    steps: tuple[Step, ...]


def _sizes(*sizes: int, why: str) -> Iterator[Step]:
    for size in sizes: yield Step({'stage.size': str(size)}, why)


def _passes(*passes: int, why: str) -> Iterator[Step]:
    for n in passes: yield Step({'stage.epochs': str(n - 1)}, f'{n} passes, the first one of the head alone: {why}')


BUNDLED_ARCH = 'tf_efficientnet_lite0'       # of training/weights.py, which imports PyTorch
SMALLEST = 224                               # px: a square may be as large, whatever the images
BUNDLED = 'ImageNet weights that are installed with the package'
EIGHT_VIEWS = 'eight views: their mean had a higher kappa than one view, by 0.02'
MOST_FOLDS = 5
ALL_FOLDS = str(MOST_FOLDS)                  # or [recipe] splits, if these are fewer
LARGER = 'squares larger than the measured 224 show smaller lesions'

WHOLE = Ladder(
    start={
        'stage.arch': (BUNDLED_ARCH, 'the network of the measurements on IDRiD'),
        'stage.weights': ('bundled', BUNDLED),
        'stage.size': ('192', 'smaller squares than the measured 224, which would take too long'),
        'stage.folds': ('3', 'not all folds, which would take too long'),
        'stage.epochs': ('7', '8 passes, the first one of the head alone: one cycle needs about 8 to 12'),
        'stage.tta': ('none', 'one view: more would take too long'),
    },
    steps=(
        Step({'stage.tta': 'd4'}, EIGHT_VIEWS),
        Step({'stage.folds': ALL_FOLDS}, 'all folds: their mean is the model, and each image is graded by a network '
                                         'that has not seen it'),
        *_sizes(224, why='as measured on IDRiD'),
        *_passes(9, 10, 11, 12, why='one cycle needs about 8 to 12'),
        Step({PSEUDO: 'yes'}, 'pseudo-labels: the mean of teacher and student had a higher kappa, by 0.02 in one run, '
                              'not in a repeat'),
        Step({NETWORK: 'legacy_seresnet50', 'stage.weights': 'imagenet', 'stage.lr': '1e-3', 'stage.lr_div': '3'},
             'the network of settings.ini and of the published solution'),
        *_sizes(256, 288, 320, 352, 384, 416, 448, 480, 512, why=LARGER),
        *(Step({'stage.seeds': str(n)}, f'{n} trainings, whose mean depends less on chance than one; not measured')
          for n in (2, 3, 4, 5)),
        *_passes(*range(13, 21), why='more than 12, to use the time that is left; not measured'),
    ))
PROBE = Ladder(
    start={
        'stage.arch': (BUNDLED_ARCH, 'the network of the measurements on IDRiD'),
        'stage.weights': ('bundled', BUNDLED),
        'stage.size': ('224', 'as measured on IDRiD'),
        'stage.folds': (ALL_FOLDS, 'all folds: they share the features, so that more folds cost little'),
        'stage.epochs': ('0', 'a linear probe: the head alone trains, because the whole network would take too long'),
        'stage.freeze_epochs': ('30', 'as measured for probes'),
        'stage.lr': ('1e-2', 'as measured for probes'),
        'stage.lr_div': ('1', 'the body does not train'),
        'stage.loss': ('cross_entropy', 'with a frozen body its kappa was higher by 0.03 than that of smooth_l1'),
        'stage.tta': ('none', 'one view: more would take too long'),
    },
    steps=(
        Step({'stage.tta': 'hflip'}, 'two views: four would take too long'),
        Step({'stage.tta': 'rot4'}, 'four views: eight would take too long'),
        Step({'stage.tta': 'd4'}, EIGHT_VIEWS),
        *_sizes(240, 256, 272, 288, 304, 320, 336, 352, 368, 384, why=LARGER),
    ))


WHOLE_NETWORK = Step({'stage.epochs': WHOLE.start['stage.epochs'][0]}, '')


# Climb a ladder

@dataclass
class Climb:
    "The chosen keys with their reasons, the estimated seconds, and the first step that does not fit, with its seconds"
    keys: dict[str, Value]
    seconds: float
    too_dear: tuple[Step, float] | None = None


def with_own(ladder: Ladder, own: dict[str, str]) -> Ladder:
    "Return a ladder with the user's `own` values of keys, and without the steps that would change them"
    start = {key: (own[key], OWN) if key in own else value for key, value in ladder.start.items()}
    return Ladder(start, tuple(step for step in ladder.steps if not step.keys.keys() & own.keys()))


Price = Callable[[dict[str, str]], float]    # of keys and their values: seconds, inf for what is impossible


def climb(ladder: Ladder, price: Price, limit: float) -> Climb:
    """Take each step of a ladder with which the price stays within the limit; the first rung is taken at any price.

    Once a step is too dear, later ones that change the same keys are not tried.
    """
    found = Climb(dict(ladder.start), price(values(ladder.start)))
    refused: list[set[str]] = []
    for step in ladder.steps:
        if found.seconds > limit or set(step.keys) in refused: continue
        seconds = price(values(found.keys) | step.keys)
        if seconds <= limit:
            found = replace(found, keys=found.keys | {k: (v, step.why) for k, v in step.keys.items()}, seconds=seconds)
            continue
        refused.append(set(step.keys))
        if math.isfinite(seconds) and not found.too_dear: found = replace(found, too_dear=(step, seconds))
    return found


def values(keys: dict[str, Value]) -> dict[str, str]:
    "Return the values without their reasons"
    return {key: value for key, (value, _) in keys.items()}


# What the tables and the machine allow

@dataclass
class Facts:
    "What of the tables and of the machine limits the settings"
    graded: int
    ungraded: int
    splits: Value
    bs: Value
    retina: int                              # median diameter, pixels of the images
    no_network: str                          # why no weights are downloaded for a larger network; empty: they can be
    own: Collection[str] = ()                # keys that the user has set, SECTION.KEY

    @property
    def no_pseudo_labels(self) -> str:
        "Why pseudo-labels are not worth it; empty if they are"
        if not self.ungraded: return 'there is no ungraded table'
        few = self.ungraded < FEW_UNGRADED * self.graded
        return f'{self.ungraded} ungraded images beside {self.graded} graded ones are too few' if few else ''

    def impossible(self, keys: dict[str, str]) -> bool:
        "Return whether a setting is out of question, whatever it costs"
        if keys.get(PSEUDO) and self.no_pseudo_labels: return True
        if self.no_network and keys['stage.arch'] != BUNDLED_ARCH and 'stage.arch' not in self.own: return True
        return int(keys['stage.size']) > max(self.retina, SMALLEST) and 'stage.size' not in self.own

    def complete(self, keys: dict[str, Value]) -> dict[str, Value]:
        "Return chosen keys with those that follow from them and from the tables"
        size, splits = int(keys['stage.size'][0]), int(self.splits[0])
        folds, why = keys['stage.folds']
        stored = max(size, min(math.ceil(STORED * size / 32) * 32, self.retina))
        return keys | {
            'recipe.splits': self.splits, 'stage.bs': self.bs, 'stage.folds': (str(min(splits, int(folds))), why),
            'images.size': (str(stored), f'a margin for zoom and rotation around {size} px; the retinas of the images '
                                         f'are about {self.retina} px wide')}


def find_facts(recipe: Recipe, data: Path) -> Facts:
    "Return what the tables of a recipe and this machine allow"
    frames = {name: contents.frame for name, contents in read_contents(recipe, data).items()}
    graded = pd.concat([f for name, f in frames.items() if recipe.tables[name].graded])
    rarest = int(graded.groupby('diagnosis').group.nunique().min())
    splits = max(2, min(MOST_FOLDS, rarest))
    why = 'five parts, as measured' if splits == MOST_FOLDS else f'the rarest grade has {rarest} patients or images'
    bs = 16
    while bs > 4 and len(graded) * (splits - 1) / splits < STEPS_PER_EPOCH * bs: bs //= 2
    return Facts(len(graded), sum(len(f) for f in frames.values()) - len(graded), (str(splits), why),
                 (str(bs), 'as measured' if bs == 16 else f'{len(graded)} images: an epoch needs about '
                                                          f'{STEPS_PER_EPOCH} steps'),
                 retina_width(recipe, graded), no_larger_network(recipe))


def retina_width(recipe: Recipe, images: pd.DataFrame) -> int:
    "Return the median diameter of the retinas of some images, pixels. Raises `AptosError` if none can be read"
    prep, widths, errors = get_prep(recipe), [], []
    for path in images.path.iloc[np.linspace(0, len(images) - 1, SAMPLED_IMAGES).astype(int)]:
        try: widths.append(2 * prepare(Path(path).read_bytes(), prep)[1]['r'])
        except (ImageError, OSError) as e: errors.append(f'{path}: {e}')
    if not widths: raise AptosError(f'{errors[0]}. No sampled image can be read: run `doctor`.')
    return int(np.median(widths))


def no_larger_network(recipe: Recipe) -> str:
    "Return why the weights of a larger network cannot be used here; an empty text if they can"
    import torch

    from aptos_fastai.training.weights import examine_weights
    if not torch.cuda.is_available(): return 'there is no GPU'
    step = next(step for step in WHOLE.steps if NETWORK in step.keys)
    stage = next(iter(recipe.stages.values()))
    try: examine_weights(replace(stage, arch=step.keys[NETWORK], weights='imagenet', init=''))
    except AptosError as e: return str(e).partition('. ')[0]
    return ''


# The recipe

@dataclass
class Configured:
    "A recipe's sections with chosen keys, the reason of each (SECTION.KEY), and lines that say how they were chosen"
    ini: Ini
    reasons: dict[str, str]
    lines: list[str]


def configure(ini: Ini, sets: Sequence[str], data: Path, file: Path, root: Path, limit: float,
              hours: float) -> Configured:
    """Choose the keys of the recipe `ini`, which is to be `file`, for `limit` seconds of `hours`.

    `sets` (SECTION.KEY=VALUE) are not changed; `root` is the run folder that `all` will use. Raises `AptosError` if the
    cheapest setting takes longer.
    """
    inis = {True: ini, False: without_students(ini, file)}
    own = {'.'.join(section_and_key(text)): text.partition('=')[2].strip() for text in sets}
    with parsed(sets_applied(ini, sets), file) as recipe: facts = replace(find_facts(recipe, data), own=own.keys())

    def with_keys(keys: dict[str, Value]) -> Ini:
        chosen = {section: dict(texts) for section, texts in inis[PSEUDO in keys].items()}
        for key, (value, _) in facts.complete(keys).items():
            section, _, name = key.rpartition('.')
            if section: chosen.setdefault(section, {})[name] = value
        unused = unused_sets(sets, ini, chosen)
        return sets_applied(chosen, [text for text in sets if text not in unused])

    whole, probe = (with_own(ladder, own) for ladder in (WHOLE, PROBE))
    with parsed(with_keys(probe.start), file) as recipe:
        run = load_run(recipe.path, data, root.parent, name=root.name)
    prices = Prices(run, with_keys, facts, file)
    say(f'timing networks on this machine, to choose settings for {format_duration(limit)}')
    found = climb_measured(whole, prices, FILL * limit)
    if found.seconds > FILL * limit:
        found = replace(climb_measured(probe, prices, FILL * limit), too_dear=(WHOLE_NETWORK, found.seconds))
    if found.seconds > FILL * limit:
        raise AptosError(f'--hours {hours:g}: too little for {facts.graded} graded images on this machine. The '
                         f'smallest recipe, a linear probe, takes about {format_duration(found.seconds)} with its '
                         f'report. Set --hours {enough_hours(found.seconds / FILL)} or more.')
    chosen = facts.complete(found.keys)
    reasons = {key: OWN if key in own else why for key, (_, why) in chosen.items()}
    sections = with_keys(found.keys)
    lines = lines_of(found, facts, hours)
    why = f'there are no pseudo-labels: {facts.no_pseudo_labels or "they would take too long"}'
    if unused := unused_sets(sets, ini, sections): lines.append(f'Not used: --set {" ".join(unused)}, because {why}')
    return Configured(sections, reasons, lines)


@dataclass
class Prices:
    """Seconds of `all` with some keys, by the estimate of `plan`; inf if they are out of question.

    A network is timed at one size; the time at others is taken to grow with the pixels until `measure` times it.
    """
    run: Run
    with_keys: Callable[[dict[str, Value]], Ini]
    facts: Facts
    file: Path
    measured: dict = field(default_factory=dict)

    def __call__(self, keys: dict[str, str]) -> float:
        "Return the seconds with some keys"
        from torch.cuda import OutOfMemoryError
        if self.facts.impossible(keys): return math.inf
        tried = self.tried(keys)
        guessed: dict = {}
        for stage in tried.recipe.stages.values(): guessed |= self.guessed(stage)
        known = self.measured | guessed
        todo = {name: list(range(stage.folds)) for name, stage in tried.recipe.stages.items()}
        try: seconds = plan_cost(tried, todo, measured=known).seconds + report_seconds(tried, todo, known)
        except OutOfMemoryError: return math.inf
        self.measured |= {key: times for key, times in known.items() if key not in guessed}
        return seconds

    def measure(self, keys: dict[str, str]) -> bool:
        "Time the networks of some keys at their size; return whether that was new"
        before = len(self.measured)
        for stage in self.tried(keys).recipe.stages.values(): measured_speed(stage, self.measured)
        return len(self.measured) > before

    def tried(self, keys: dict[str, str]) -> Run:
        "Return the run with some keys"
        sections = self.with_keys({key: (value, '') for key, value in keys.items()})
        with parsed(sections, self.file) as recipe: return replace(self.run, recipe=recipe)

    def guessed(self, stage: Stage) -> dict:
        "Return the times of a network at a size that is not timed, by those at the nearest size that is"
        sizes = {size: key for key in self.measured if (size := same_network(key, stage))}
        if not sizes or stage.size in sizes: return {}
        size = min(sizes, key=lambda o: abs(o - stage.size))
        train, forward, parameters = self.measured[sizes[size]]
        factor = (stage.size / size) ** 2
        grown = [{precision: factor * seconds for precision, seconds in o.items()} for o in (train, forward)]
        return {speed_key(stage): (*grown, parameters)}


def same_network(key: tuple, stage: Stage) -> int:
    "Return the size in a key of measured speeds if it is of the network of a stage, else 0"
    return key[1] if key == speed_key(replace(stage, size=key[1])) else 0


def climb_measured(ladder: Ladder, prices: Prices, limit: float) -> Climb:
    "Climb a ladder until the networks of the chosen rung are timed at their size"
    found = climb(ladder, prices, limit)
    while math.isfinite(found.seconds) and prices.measure(values(found.keys)): found = climb(ladder, prices, limit)
    return found


def without_students(ini: Ini, file: Path) -> Ini:
    "Return the sections without the stages that learn pseudo-labels"
    with parsed(ini, file) as recipe:
        students = [name for name, s in recipe.stages.items() if any(teacher for teacher, _ in s.sources)]
        return keep_sections(ini, postpone_stages(recipe, students))


def unused_sets(sets: Iterable[str], ini: Ini, chosen: Ini) -> list[str]:
    "Return those of SECTION.KEY=VALUE whose section, of a stage or ensemble of `ini`, is not among the chosen ones"
    return [text for text in sets if section_and_key(text)[0] in ini.keys() - chosen.keys()]


def lines_of(found: Climb, facts: Facts, hours: float) -> list[str]:
    "Return the lines that say how settings were chosen, and what was left out"
    from aptos_fastai.training.precision import machine
    lines = [f'Settings for {plural(hours, "hour")}: about {format_duration(found.seconds)} by the estimate of `plan` '
             f'({machine()}); {facts.graded} graded images, {facts.ungraded} ungraded ones']
    keys = facts.complete(found.keys)
    lines.append('Chosen: ' + ', '.join(f'{key.rpartition(".")[2]} = {value}' for key, (value, _) in keys.items()
                                        if key.startswith('stage.')))
    if found.too_dear:
        step, seconds = found.too_dear
        name = ', '.join(f'{key.rpartition(".")[2]} = {value}' for key, value in step.keys.items())
        lines.append(f'Too long, with the settings that were chosen before it: {name}, about '
                     f'{format_duration(seconds)}')
    if PSEUDO in found.keys: lines.append(found.keys[PSEUDO][1])
    if facts.no_pseudo_labels: lines.append(f'No pseudo-labels: {facts.no_pseudo_labels}')
    if facts.no_network and 'stage.arch' not in facts.own: lines.append(f'No larger network: {facts.no_network}')
    return lines


def configured_hours(file: Path) -> str:
    "Return the hours for which the recipe in `file` was configured, as `lines_of` writes them; empty: for none"
    found = re.search(r'^# Settings for (\S+) hours?:', file.read_text(encoding='utf-8'), re.MULTILINE)
    return found[1] if found else ''
