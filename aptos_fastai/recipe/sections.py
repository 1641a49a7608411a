"The sections of a recipe and their keys: types, units, defaults, accepted values."
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path
from typing import Any

from aptos_fastai.common.io import AptosError

Ini = dict[str, dict[str, str]]              # section -> key -> text


class ConfigError(AptosError):
    "A recipe cannot run: the message names file, section, key and the accepted values."


# Checks of single keys. Each takes the text and the parsed value and raises ValueError with what to enter

def parse_number(kind: type, word: str, low: float, high: float) -> float:
    "Return `word` as int or float between `low` and `high`. Raises ValueError with what to enter"
    what = 'a whole number' if kind is int else 'a number'
    problem = ValueError(f'enter {what} from {low} to {high}.')
    try: number = kind(word)
    except ValueError: raise problem from None
    if not low <= number <= high: raise problem
    return number


def parse_thresholds(text: str) -> tuple[float, ...] | None:
    "Return four fixed thresholds, or None for `optimal` and `regularised`. Raises ValueError for any other text"
    if text in ('optimal', 'regularised'): return None
    thresholds = tuple(float(o) for o in text.split())
    increasing = sorted(set(thresholds)) == list(thresholds)
    if len(thresholds) != 4 or not increasing: raise ValueError(text)
    return thresholds


def _check_thresholds(text: str, _: Any) -> None:
    try: parse_thresholds(text)
    except ValueError: raise ValueError('enter optimal, regularised or four increasing numbers.') from None


FITTED = 'fitted'                            # value of an ensemble's `weights`


def parse_weights(text: str) -> tuple[float, ...]:
    "Return the numbers in an ensemble's `weights`; none if it is `fitted` or empty. Raises ValueError"
    words = [] if text == FITTED else re.sub(r',\s', ' ', text).split()
    return tuple(parse_number(float, word, 0, 1_000_000) for word in words)


def _check_member_weights(text: str, _: Any) -> None:
    try: parse_weights(text)
    except ValueError: raise ValueError(f'enter {FITTED}, or for each member a number from 0 to 1000000.') from None


def _check_range(_: str, value: tuple[float, ...]) -> None:
    if len(value) != 2 or value[0] > value[1]: raise ValueError('enter two numbers, the smaller one first.')


def _check_levels(text: str, value: tuple[float, ...]) -> None:
    if len(value) > 2: raise ValueError('enter one number, or two: for referable and for sight-threatening.')


def _check_channels(_: str, value: tuple[float, ...]) -> None:
    if len(value) not in (0, 3): raise ValueError('enter three numbers, for red, green and blue, or nothing.')


def _check_regex(text: str, _: Any) -> None:
    try: groups = re.compile(text).groups
    except re.error as e:
        raise ValueError(rf'invalid regular expression ({e}). Example: ^(\d+)_(left|right)$') from None
    if text and not groups:
        raise ValueError('no group in parentheses. Put the part of the id that is the patient in parentheses, '
                         r'for example ^(\d+)_(left|right)$ for the id 15_left.')


def _check_where(text: str, _: Any) -> None:
    column, _, value = text.partition('=')
    if text and not (column.strip() and value.strip()):
        raise ValueError('write COLUMN = VALUE, for example Usage = Public')


def split_names(text: str) -> tuple[str, ...]:
    "Return the names in a list that is separated by |"
    return tuple(name.strip() for name in text.split('|') if name.strip())


# The sections and their keys

def _key(default: Any = MISSING, help: str = '', choices: tuple[str, ...] | None = None, low: float | None = None,
         high: float | None = None, check: Callable[[str, Any], None] | None = None, advice: str = '') -> Any:
    "Declare a key: its default (none: required), its meaning with the unit, the values it accepts, advice for others"
    return field(default=default, metadata=dict(help=help, choices=choices, low=low, high=high, check=check,
                                                advice=advice))


@dataclass(frozen=True)
class General:
    "[recipe]: random seed and folds"
    seed: int = _key(42, 'random seed of the folds and the demo, and of trainings without a seed of their own', low=0,
                     high=2**31)
    splits: int = _key(5, 'number of cross-validation folds', low=2, high=20)
    conflicts: str = _key('keep', 'duplicate images with different grades. keep: train on both; drop: train on none; '
                          'mean: train on the mean grade', choices=('keep', 'drop', 'mean'))
    owner: str = _key('', 'who answers for the model: a person or an institution, for the report and the model card')
    contact: str = _key('', 'where to write to about the model: an e-mail address or URL')


@dataclass(frozen=True)
class Images:
    "[images]: how every image of the run is prepared"
    crop: str = _key('retina', 'retina: crop to the detected circle of the retina; none: keep the whole image',
                     choices=('retina', 'none'))
    aspect: str = _key('pad', 'pad: keep the aspect ratio; squash: stretch to a square, as the published code does',
                       choices=('pad', 'squash'))
    cut_off: str = _key('mirror', 'how to fill the circle where the image ends inside it. mirror: mirror the image; '
                        'black: leave black, which lets the network identify the camera', choices=('mirror', 'black'))
    size: int = _key(0, 'side of the prepared squares that all stages read, pixels; 0: each stage reads squares of its '
                     'own size', low=0, high=4096)
    quality: int = _key(95, 'JPEG quality of the prepared images, without chroma subsampling', low=50, high=100)
    jpeg: str = _key('full', 'how a JPEG much larger than `size` is decoded. full: every pixel, so that an image gets '
                     'the same score in every format; fast: at 1/2, 1/4 or 1/8, in a sixth of the time, with scores '
                     'that differ by up to 0.1', choices=('full', 'fast'))
    skip_unreadable: str = _key('no', 'no: stop and list unreadable and missing images; yes: continue without '
                                'them',
                                choices=('no', 'yes'))


@dataclass(frozen=True)
class Augment:
    "[augment]: random changes of training images; validation and prediction use none"
    brightness: float = _key(.1, 'brightness factor: 1 ± at most this', low=0, high=1)
    contrast: float = _key(.2, 'contrast factor: 1 ± at most this', low=0, high=1)
    saturation: float = _key(.2, 'saturation factor: 1 ± at most this', low=0, high=1)
    hue: float = _key(.1, 'hue rotation: ± at most this fraction of the colour circle', low=0, high=.5)
    blur: float = _key(.5, 'probability of a Gaussian blur', low=0, high=1)
    blur_sigma: tuple[float, ...] = _key((.1, 2.), 'standard deviation of the blur, from and to, pixels', low=.01,
                                         high=20, check=_check_range)
    rotate: float = _key(180., 'rotation: ± at most this, degrees', low=0, high=180)
    shift: float = _key(.2, 'horizontal and vertical shift: ± at most this fraction of the side', low=0, high=.9)
    scale: tuple[float, ...] = _key((.8, 1.2), 'zoom factor, from and to', low=.1, high=10, check=_check_range)
    shear: float = _key(.2, 'shear: ± at most this, degrees', low=0, high=45)
    hflip: float = _key(.5, 'probability of a horizontal flip', low=0, high=1)
    vflip: float = _key(0., 'probability of a vertical flip', low=0, high=1)
    mode: str = _key('auto', 'image: one by one on the CPU while loading; batch: whole batches on the device; '
                   'auto: batch on a GPU, image on a CPU', choices=('auto', 'image', 'batch'))


@dataclass(frozen=True)
class Table:
    "[table.NAME]: one CSV file and its folder of images"
    name: str
    csv: str = _key('', 'CSV or .xlsx file, inside one of the folders in `folder`; empty: every image below `images` '
                    'is a row')
    images: str = _key('.', 'folder of the images and its sub-folders, inside the same folder as the CSV')
    id: str = _key('id_code', 'column of image ids: file names or paths, with or without suffix; or two, separated by '
                   '|, if a row holds the two images of a patient')
    grade: str = _key('', 'column of grades 0-4, or several of which one is filled, separated by |; one for each '
                      'column of `id` if that has several; empty: the table is ungraded; folder (without csv): images '
                      'lie in sub-folders named by grade')
    header: str = _key('yes', 'no: the CSV has no header; its columns are called 1, 2, 3 …', choices=('yes', 'no'))
    sheet: str = _key('', 'sheet of an .xlsx file; empty: the only one that has data')
    where: str = _key('', 'use only the rows with a value: COLUMN = VALUE', check=_check_where)
    ungradable: str = _key('', 'values of `grade` that mean ungradable, separated by |; blank: an empty cell. These '
                           'images are counted and left out')
    relabels: str = _key('', 'file of decisions about labels that `review` wrote (relabels.csv): a path from the '
                         'folder of the table, or a full path. Its grades replace those of the CSV')
    folder: str = _key('.', 'folders inside --data to search, separated by |; the first one with the CSV is used')
    optional: str = _key('no', 'yes: if neither CSV nor images are there, leave the table out, with the stages that '
                         'need it', choices=('no', 'yes'))
    patient: str = _key('', 'column of patients: images of one patient share a fold; dicom:patient: the Patient ID of '
                        'DICOM images')
    pairs: str = _key('', 'the same by a CSV, beside the first, of which each row lists the images of one patient')
    group: str = _key('', 'the same by a regular expression: its first group in parentheses is the patient part of an '
                      'image id', check=_check_regex)
    block: int = _key(0, 'group every N consecutive ids (natural sort) as if they were one patient; 0: off; needs '
                      'empty `patient`, `pairs` and `group`', low=0, high=10_000)
    eye: str = _key('', 'column, or regular expression with a group in parentheses, that says left or right (L, R, OS, '
                    'OD); dicom:eye: the laterality of DICOM images')
    carry: str = _key('', 'further columns, separated by |, that oof.csv and the report show: site, camera, sex …; '
                      'dicom:device: manufacturer and model of the camera, of DICOM images')
    order: str = _key('', 'CSV with the ids and their order in the submission (sample_submission.csv)')
    preset: str = _key('', 'a table that many train on, as it is published; its keys are the defaults of this section')

    @property
    def graded(self) -> bool:
        "Whether the table has grades"
        return bool(self.grade)

    @property
    def id_columns(self) -> tuple[str, ...]:
        "Columns of image ids; with several, a row holds the images of one patient"
        return split_names(self.id)

    @property
    def grade_columns(self) -> tuple[str, ...]:
        "Columns of grades; of a table of folders the one that its grades are put into"
        return split_names(self.grade)

    @property
    def ungradable_values(self) -> tuple[str, ...]:
        "Values of the grade that mean ungradable"
        return split_names(self.ungradable)

    @property
    def folders(self) -> tuple[str, ...]:
        "Folders inside --data to search"
        return split_names(self.folder)

    @property
    def carried(self) -> tuple[str, ...]:
        "Further columns that stay with the images: those of `carry`, and eye"
        return tuple(dict.fromkeys([*self.carry_columns, *(['eye'] if self.eye else [])]))

    @property
    def carry_columns(self) -> tuple[str, ...]:
        "Columns of the CSV that `carry` names"
        return split_names(self.carry)

    @property
    def where_column_and_value(self) -> tuple[str, str]:
        "The two sides of `where`"
        column, _, value = self.where.partition('=')
        return column.strip(), value.strip()

    @property
    def grouped_by(self) -> str:
        "What shares a fold and is resampled for an interval: patients, blocks of N ids, or images"
        if self.patient or self.pairs or self.group or len(self.id_columns) > 1: return 'patients'
        return f'blocks of {self.block} ids' if self.block else 'images'

    @property
    def names_eyes(self) -> bool:
        "Whether the table says of which patient and which eye an image is"
        return bool(self.eye) and self.grouped_by == 'patients'


DIVIDE = 'Divide values for pixels from 0 to 255 by 255.'
WEIGHT_SOURCES = 'imagenet', 'bundled', 'none'      # values of a stage's `weights` that are no file
MLFLOW_SERVER = 'MLFLOW_TRACKING_URI'               # the user's environment variable: MLflow's server or database


@dataclass(frozen=True)
class Stage:
    "[stage.NAME]: one training; [stage] holds the defaults of all stages"
    name: str
    train: tuple[str, ...] = _key(help='tables to train on; NODE:TABLE is TABLE with pseudo-labels by that stage '
                                  'or ensemble')
    validate: tuple[str, ...] = _key((), 'graded tables of `train` that choose epoch and thresholds and give the '
                                     'metrics; the others only train. Empty: all of them')
    init: str = _key('', 'stage whose trained weights this stage starts from; empty: see `weights`')
    weights: str = _key('imagenet', 'initial weights: imagenet (downloaded by timm), bundled (installed by pip), '
                        'none (random), or a file: safetensors or PyTorch, of any origin')
    arch: str = _key('legacy_seresnet50', 'any timm network')
    mean: tuple[float, ...] = _key((), 'mean of red, green and blue (0-1) that images are normalised by: that of the '
                                   'images of `weights`. Empty: that of the stage `init`, else timm\'s for `arch`',
                                   low=0, high=1, check=_check_channels, advice=DIVIDE)
    std: tuple[float, ...] = _key((), 'the same, the standard deviation', low=.001, high=1, check=_check_channels,
                                  advice=DIVIDE)
    head: str = _key('auto', 'pooling before the output: gem (generalised mean), avg (mean), cls (class token of a '
                     'transformer); auto: gem, or avg if the feature maps are signed (after a final LayerNorm)',
                     choices=('auto', 'gem', 'avg', 'cls'))
    dropout: float = _key(0., 'dropout probability before the output', low=0, high=.95)
    drop_path: float = _key(0., 'drop path (stochastic depth) probability of the last block, rising linearly from the '
                            'first; 0: off', low=0, high=.9)
    size: int = _key(256, 'side of the square input, pixels', low=32, high=2048)
    folds: int = _key(1, 'how many of the [recipe] splits folds are trained, from fold 0. One fold can serve all folds '
                      'of stages that build on it, unless it trains on tables that validate them', low=1, high=20)
    seed: int = _key(-1, 'random seed of this training (first weights of the head, order, augmentation); -1: that of '
                     '[recipe], which also makes the folds', low=-1, high=2**31)
    seeds: int = _key(1, 'train the stage this many times on the same folds, with the seeds seed, seed + 1 …: NAME '
                      'is then the mean of the stages NAME_seed1, NAME_seed2 …', low=1, high=20)
    epochs: int = _key(10, 'epochs with all layers trainable; 0: a linear probe, which trains the head alone for '
                       '`freeze_epochs` on features of the images in the views of `tta`', low=0, high=1000)
    freeze_epochs: int = _key(0, 'epochs before those that train the head only; the body stays as it is, batch '
                              'normalisation included', low=0, high=1000)
    bs: int = _key(16, 'batch size, images', low=1, high=4096)
    accumulate: int = _key(1, 'batches per optimizer step (gradient accumulation): bs = 8 with accumulate = 2 makes '
                           'steps of 16 images', low=1, high=256)
    schedule: str = _key('one_cycle', 'learning rate schedule', choices=('one_cycle', 'constant'))
    warmup: float = _key(.25, 'fraction of the steps of one_cycle in which the learning rate rises', low=0, high=.95)
    lr: float = _key(1e-3, 'maximum learning rate, of the head', low=0, high=10)
    lr_div: float = _key(1., 'the body trains with lr divided by this', low=1, high=10_000)
    layer_decay: float = _key(1., 'each layer of the body trains with this fraction of the learning rate of the layer '
                              'above it (timm\'s layers); 1: off', low=.01, high=1)
    optimizer: str = _key('adam', 'adam (which is AdamW; adamw means the same), or another optimizer of torch.optim, '
                          'fastai or timm, in lower case: sgd, nadam, radam, lion, lamb …')
    sqr_mom: float = _key(.99, 'second beta of adam and its like (fastai 0.99, PyTorch 0.999)', low=0, high=.99999)
    eps: float = _key(1e-5, 'epsilon of adam and its like (fastai 1e-5, PyTorch 1e-8)', low=1e-12, high=1)
    wd: float = _key(.01, 'weight decay (decoupled where the optimizer can); none for biases, normalisations, position '
                     'embeddings and class tokens', low=0, high=10)
    clip: float = _key(0., 'largest norm of the gradients of a step; 0: off', low=0, high=1000)
    loss: str = _key('smooth_l1', 'what the network puts out, and its loss. smooth_l1, mse: the grade as a number; '
                     'corn: ordinal (4 logits); cross_entropy: a class for each grade. The score of these two is '
                     'the expected grade', choices=('smooth_l1', 'mse', 'corn', 'cross_entropy'))
    keep: str = _key('kappa', 'epoch to keep: highest validation kappa (by `thresholds`, fitted to that epoch), lowest '
                     'validation loss (both are chosen on the validation images), or the last',
                     choices=('kappa', 'loss', 'last'))
    tta: str = _key('none', 'test-time augmentation, mean over views: none (1), hflip (2: mirrored), rot4 (4 '
                    'rotations), d4 (8: rotations, also mirrored)', choices=('none', 'hflip', 'rot4', 'd4'))
    label_tta: str = _key('same', 'test-time augmentation of the pseudo-labels that this stage makes; same: '
                          'that of `tta`, whose change then trains again what learns from them',
                          choices=('same', 'none', 'hflip', 'rot4', 'd4'))
    ema: float = _key(0., 'decay per step of an exponential moving average of the weights; 0: off', low=0, high=.99999)
    thresholds: str = _key('regularised', 'thresholds of this stage\'s grades, cross-fitted: optimal (highest kappa) '
                           'or regularised (shrunk towards 0.5 1.5 2.5 3.5, better with few images); or four '
                           'increasing numbers', check=_check_thresholds)
    labels: str = _key('soft', 'pseudo-labels to train on: soft (scores) or hard (grades)', choices=('soft', 'hard'))
    source_weights: tuple[float, ...] = _key((), 'sampling weight of the images of each entry of `train`; '
                                             'empty: every image once per epoch', low=0, high=1000)
    balance: str = _key('', 'column that the tables `carry` (camera, site …): images of each value are drawn equally '
                        'often, so that one camera does not dominate; empty: off')
    workers: int = _key(-1, 'processes that load images; -1: chosen by cores and device; macOS and Windows: none',
                        low=-1, high=256)
    precision: str = _key('auto', 'training precision; auto: on a GPU bf16, or fp16 if bf16 is unsupported; on a CPU '
                          'with bf16 the faster of f32 and bf16, measured; of a linear probe f32',
                          choices=('auto', 'f32', 'bf16', 'fp16'))
    track: str = _key('no', 'live tracking beside history.csv: tensorboard (in the run folder), mlflow (there, too, or '
                      'where MLFLOW_TRACKING_URI says) or wandb (online)',
                      choices=('no', 'tensorboard', 'mlflow', 'wandb'))
    compile: str = _key('no', 'yes: torch.compile the body; takes a minute or more and needs a C++ compiler',
                        choices=('no', 'yes'))

    @property
    def draws_by_weight(self) -> bool:
        "Whether images are drawn by weights, with replacement, instead of each once per epoch"
        return bool(self.source_weights or self.balance)

    @property
    def sources(self) -> list[tuple[str, str]]:
        "The (teacher, table) of each entry of `train`; the teacher is '' for a graded table"
        return [(teacher, table) for teacher, _, table in (entry.rpartition(':') for entry in self.train)]

    @property
    def graded_tables(self) -> list[str]:
        "Tables that the stage trains on by their own grades"
        return [table for teacher, table in self.sources if not teacher]

    @property
    def validated_tables(self) -> list[str]:
        "Graded tables whose images validate the stage, a fold at a time"
        return [table for table in self.graded_tables if not self.validate or table in self.validate]

    @property
    def label_views(self) -> str:
        "The test-time augmentation of its pseudo-labels"
        return self.tta if self.label_tta == 'same' else self.label_tta

    @property
    def weights_file(self) -> str:
        "The file that `weights` names; empty if it names none, or if `init` gives the weights"
        return '' if self.init or self.weights in WEIGHT_SOURCES else self.weights

    @property
    def parents(self) -> list[str]:
        "Stages and ensembles that must be finished before this stage: `init` and the teachers"
        return [o for o in [self.init, *(teacher for teacher, _ in self.sources)] if o]


@dataclass(frozen=True)
class Ensemble:
    "[ensemble.NAME]: weighted mean of the scores of stages"
    name: str
    members: tuple[str, ...] = _key(help='stages; ../RUN/STAGE, a path from the run folder, is a finished one of '
                                    'another run of the same images, folds, [images] and [augment]')
    weights: str = _key('', 'weight of each member, a number from 0 to 1000000; empty: equal weights; fitted: those '
                        'whose mean has the least squared error on the out-of-fold scores', check=_check_member_weights)

    @property
    def parents(self) -> list[str]:
        "The stages it averages"
        return list(self.members)

    @property
    def shares(self) -> dict[str, float]:
        "The weight of each member in the recipe; equal ones where it has none"
        weights = parse_weights(self.weights) or (1.,) * len(self.members)
        return dict(zip(self.members, weights, strict=True))

    def with_shares(self, shares: dict[str, float]) -> 'Ensemble':
        "Return the ensemble with other members and their weights; those of `fitted` stay so"
        weights = FITTED if self.weights == FITTED else ' '.join(map(repr, shares.values()))
        return replace(self, members=tuple(shares), weights=weights)


@dataclass(frozen=True)
class Submit:
    "[submit]: what is predicted for the test images"
    final: str = _key(help='stage or ensemble that is the model and, for `table`, makes submission.csv')
    table: str = _key('', 'ungraded table to predict; empty: none, the result is the model, its report and oof.csv')
    also: tuple[str, ...] = _key((), 'further stages and ensembles, each with its own file in submissions/')
    thresholds: str = _key('regularised', 'thresholds of the submission: optimal or regularised (see [stage]), or four '
                           'increasing numbers', check=_check_thresholds)
    coverage: float = _key(.9, 'target probability that the prediction set (grade_low to grade_high in scores.csv) '
                           'contains the true grade of an image of the same source', low=.5, high=.99)
    eyes: str = _key('single', 'single: each image is graded alone; fused: where there is an image of the patient\'s '
                     'other eye, `final` grades by the scores of both eyes, fitted out-of-fold. The grade is then no '
                     'independent reading of the eye', choices=('single', 'fused'))


@dataclass(frozen=True)
class Gate:
    "[gate]: the quality check before grading; images that fail it get no grade"
    reject: float = _key(.01, 'fraction of validation images that the check against unfamiliar images may reject; 0: '
                         'no check', low=0, high=.5)
    ungradable: str = _key('refer', 'refer: ungradable images count as referable; exclude: they do not count',
                           choices=('refer', 'exclude'))


@dataclass(frozen=True)
class Refer:
    "[refer]: which images are referred, apart from their grades; an operating point on the score, chosen out-of-fold"
    sensitivity: tuple[float, ...] = _key((), 'sensitivity for referable (grade 2 and above) and, as a second number, '
                                          'for sight-threatening retinopathy (grade 3 and above); one number: for '
                                          'both. Empty: 0.9, if the next two keys are empty, too', low=.5, high=.999,
                                          check=_check_levels)
    specificity: tuple[float, ...] = _key((), 'the same by specificity. Beside `sensitivity`: a second operating point '
                                          'of high specificity', low=.5, high=.999, check=_check_levels)
    threshold: tuple[float, ...] = _key((), 'the same by a fixed score from which on images are positive', low=-1,
                                        high=5, check=_check_levels)
    uncertain: str = _key('decide', 'an image below the operating point whose prediction set reaches grade 2. refer: '
                          'it is referred as uncertain; decide: it is not referred', choices=('decide', 'refer'))
    prevalence: float = _key(0., 'share of referable images where the model will be used, for its probabilities; 0: '
                             'that of the validation images', low=0, high=.99)

    def targets(self, levels: Iterable[int]) -> list[tuple[str, int, float]]:
        "Return (target, level, value) of each operating point; the first of a level decides"
        given = [(name, getattr(self, name)) for name in ('threshold', 'sensitivity', 'specificity')
                 if getattr(self, name)]
        return [(name, level, value) for name, values in given or [('sensitivity', (.9,))]
                for level, value in zip(levels, values * (3 - len(values)), strict=False)]


@dataclass(frozen=True)
class Demo:
    "[demo]: the same graph on synthetic images; [demo.stage] and [demo.stage.NAME] override keys of stages"
    pretrain: int = _key(600, 'number of images of the 2015 table', low=20, high=100000)
    train: int = _key(480, 'number of images of the 2019 train table', low=20, high=100000)
    test: int = _key(160, 'number of images of the 2019 test table', low=5, high=100000)
    shrink: int = _key(1, 'divisor of the size of every stage', low=1, high=16)
    archs: tuple[str, ...] = _key((), 'BIG:SMALL pairs: network SMALL replaces network BIG')


SECTIONS: dict[str, type] = dict(recipe=General, images=Images, augment=Augment, table=Table, stage=Stage,
                                 ensemble=Ensemble, submit=Submit, gate=Gate, refer=Refer, demo=Demo)
OLD_KEYS: dict[type, dict[str, str]] = {     # renamed or removed key -> what to write; see docs/architecture.md
    Images: dict(skip_bad='renamed in 0.1.0. Write skip_unreadable.',
                 colour='removed in 0.1.0: colour normalisation lowered the kappa. Delete this line.'),
    Augment: dict(on='renamed in 0.1.0. Write mode; its value picture is now image.'),
    Stage: dict(cuts='renamed in 0.1.0. Write thresholds; its value shrunken is now regularised.',
                small_size='removed in 0.1.0. Train two stages, the second with init and a larger size.',
                small_epochs='removed in 0.1.0. Train two stages, the second with init and a larger size.',
                max_spread='removed in 0.1.0: no measurement supported it. Delete this line.'),
    Submit: dict(cuts='renamed in 0.1.0. Write thresholds; its value shrunken is now regularised.'),
}
NAMED_SECTIONS = ('table', 'stage', 'ensemble')
SECTION_NAME = re.compile(r'(recipe|images|augment|submit|gate|refer|stage|demo|demo\.stage)'
                          r'|(table|stage|ensemble|tune|demo\.stage)\.[A-Za-z]\w*')
ACCEPTED_SECTIONS = ('[recipe] [images] [augment] [table.NAME] [stage] [stage.NAME] [ensemble.NAME] [tune.STAGE] '
                     '[submit] [gate] [refer] [demo] [demo.stage] [demo.stage.NAME]')
# Keys of a stage that `tune` does not try: what is trained and validated, by which rule it is judged, and how it runs
NOT_TUNED = {'train', 'validate', 'init', 'folds', 'seed', 'seeds', 'keep', 'thresholds', 'workers', 'track', 'compile'}
TUNE_HELP = ('what `tune STAGE` tries: a key of [stage] = FROM TO for a number, FROM TO log on a logarithmic scale, '
             'or A | B | C, values to choose from')


@dataclass(frozen=True)
class Range:
    "[tune.STAGE] KEY: what `tune` tries for a key of [stage], numbers from `low` to `high`, or `choices`"
    text: str
    low: float = 0                           # int for a key of whole numbers
    high: float = 0
    log: bool = False
    choices: tuple[str, ...] = ()

    @property
    def ends(self) -> tuple[str, ...]:
        "The choices, or the lowest and the highest value, as texts of a recipe"
        return self.choices or (str(self.low), str(self.high))


Ranges = dict[str, Range]                    # key of a stage -> what is tried
COLUMNS_OF_SCORES = frozenset((              # of scores.csv and oof.csv, beside one for each stage and ensemble
    'id_code', 'source', 'diagnosis', 'fold', 'group', 'score', 'grade', 'grade_low', 'grade_high', 'score_sd',
    'ungradable', 'decision', 'referable', 'sight_threatening', 'referable_high_specificity', 'p_referable',
    'p_sight_threatening', 'p_0', 'p_1', 'p_2', 'p_3', 'p_4'))
COLUMNS_OF_FUSION = frozenset(('fused', 'fused_score', 'fused_grade'))          # the same, with [submit] eyes = fused


@dataclass
class Parts:
    "Tables, stages and ensembles of a recipe, by name, before the graph is checked; `other_runs`: stage -> its folder"
    tables: dict[str, Table]
    stages: dict[str, Stage]
    ensembles: dict[str, Ensemble]
    other_runs: dict[str, Path] = field(default_factory=dict)


Resolve = Callable[[Path, Parts], Parts]     # finds members of ensembles that are named by path
