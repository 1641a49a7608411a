"""Read a recipe (settings.ini) into frozen dataclasses and check it before anything runs.

From top to bottom: the sections and their keys; parsing one value; reading the file; checking the graph of stages.
"""
import configparser
import re
from collections.abc import Callable, Collection, Iterable, Sequence, Set
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from difflib import get_close_matches
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from aptos_fastai.common.io import AptosError, write_bytes

Ini = dict[str, dict[str, str]]              # section -> key -> text


class ConfigError(AptosError):
    "A recipe cannot run: the message names file, section, key and the accepted values."


# Checks of single keys. Each takes the text and the parsed value and raises ValueError with what to enter

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
    return tuple(_parse_number(float, word, 0, 1_000_000) for word in words)


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


@dataclass(frozen=True)
class Recipe:
    "A checked recipe: its tables, stages and ensembles by name, and the `order` in which they can run"
    name: str
    path: Path
    demo: Demo | None                        # None unless the recipe runs on the demo
    images: Images
    augment: Augment
    tables: dict[str, Table]
    stages: dict[str, Stage]
    ensembles: dict[str, Ensemble]
    submit: Submit
    gate: Gate = Gate()
    refer: Refer = Refer()
    seed: int = 42
    splits: int = 5
    conflicts: str = 'keep'
    owner: str = ''
    contact: str = ''
    order: tuple[str, ...] = ()              # stages and ensembles, parents first
    tune: dict[str, Ranges] = field(default_factory=dict, repr=False, compare=False)       # of [tune.STAGE]
    whole: 'Recipe | None' = field(default=None, repr=False)    # the recipe before stages were postponed
    sections: Ini = field(default_factory=dict, repr=False, compare=False)      # its texts, with those of --set
    sets: tuple[str, ...] = field(default=(), repr=False, compare=False)        # the SECTION.KEY=VALUE of --set
    other_runs: dict[str, Path] = field(default_factory=dict)        # stage -> its folder in the run that trained it
    resolve: Resolve | None = field(default=None, repr=False, compare=False)

    @property
    def nodes(self) -> dict[str, Stage | Ensemble]:
        "Stages and ensembles by name"
        return {**self.stages, **self.ensembles}

    @property
    def prepared_sizes(self) -> list[int]:
        "Sides of the prepared squares, pixels, the largest first: `[images] size`, or without it that of each stage"
        stages = (self.whole or self).stages.values()
        return [self.images.size] if self.images.size else sorted({s.size for s in stages}, reverse=True)

    @property
    def used_tables(self) -> list[Table]:
        "Tables that a stage or the submission needs, in the order of the recipe"
        stages = (self.whole or self).stages.values()
        names = {table for s in stages for _, table in s.sources} | {self.submit.table}
        return [t for name, t in self.tables.items() if name in names]

    @property
    def carried(self) -> list[str]:
        "Further columns of the tables that stay with the images"
        return list(dict.fromkeys(name for t in self.used_tables for name in t.carried))

    def without(self, tables: Iterable[str]) -> 'Recipe':
        """Return the recipe without some tables and the stages that need them.

        An ensemble averages its remaining members; one that has a single member left is replaced by it.
        """
        tables = list(tables)
        stages, ensembles, submit = self._remaining(self._stages_that_need(set(tables)))
        if not submit.final:
            raise ConfigError(f'{self.path} [submit] final = {self.submit.final}: needs {", ".join(tables)}, which '
                              '--data lacks. Add it, or name another stage.')
        submit = replace(submit, table='' if submit.table in tables else submit.table)
        kept = {n: t for n, t in self.tables.items() if n not in tables}
        return checked(replace(self, tables=kept, stages=stages, ensembles=ensembles, submit=submit))

    def without_stages(self, names: Iterable[str]) -> 'Recipe':
        """Return the recipe without some stages, which are postponed, and those that build on them.

        Ensembles change as in `without`. If nothing of `final` is left, the last one of `also` that is left takes its
        place; its `eyes` are single if no table that validates it names eyes. Tables, squares and folds stay those of
        the `whole` recipe. Raises `ConfigError` if no model is left.
        """
        lost = self._stages_that_need(set(), set(names))
        if not lost: return self
        stages, ensembles, submit = self._remaining(lost)
        if not submit.final:
            if not submit.also:
                raise ConfigError(f'{self.path} [submit] final = {self.submit.final}: without {", ".join(lost)} no '
                                  'model is left.')
            submit = replace(submit, final=submit.also[-1], also=submit.also[:-1])
        smaller = replace(self, stages=stages, ensembles=ensembles, submit=submit, whole=self.whole or self)
        return checked(smaller if smaller.names_eyes(submit.final) else smaller.with_single_eyes())

    def with_single_eyes(self) -> 'Recipe':
        "Return the recipe with [submit] eyes = single"
        return replace(self, submit=replace(self.submit, eyes='single'))

    @property
    def postponed(self) -> list[str]:
        "The stages that `without_stages` has left out"
        return [name for name in self.whole.stages if name not in self.stages] if self.whole else []

    def _remaining(self, lost: Collection[str]) -> tuple[dict[str, Stage], dict[str, Ensemble], Submit]:
        "Return the stages, ensembles and submission without the `lost` stages; `final` is '' if nothing of it is left"
        stages = {n: s for n, s in self.stages.items() if n not in lost}
        ensembles, instead = {}, dict.fromkeys(lost, '')
        for name, e in self.ensembles.items():
            left = self._shares_left(e, stages)
            if len(left) < 2: instead[name] = next(iter(left), '')
            else: ensembles[name] = e.with_shares(left)
        final, *also = (instead.get(name, name) for name in (self.submit.final, *self.submit.also))
        return stages, ensembles, replace(
            self.submit, final=final, also=tuple(dict.fromkeys(name for name in also if name not in ('', final))))

    def _shares_left(self, e: Ensemble, stages: Collection[str]) -> dict[str, float]:
        """Return the weights of an ensemble's members that are left, among `stages`; none if all of them are 0.

        That of a lost member which is one of several `seeds` goes to the others, so that their mean weighs as much.
        """
        means = [mean.members for name, mean in self.ensembles.items() if f'stage.{name}' in self.sections]
        left = {m: w for m, w in e.shares.items() if m in stages}
        for m in e.shares.keys() - left.keys():
            others = [o for members in means if m in members for o in members if o in left]
            for o in others: left[o] += e.shares[m] / len(others)
        return left if any(left.values()) else {}

    def _stages_that_need(self, tables: Set[str], stages: Set[str] = frozenset()) -> list[str]:
        "Return `stages`, those that train on one of `tables`, and those that build on such stages"
        lost: dict[str, None] = {}
        for name in self.order:
            if name not in self.stages: continue
            stage = self.stages[name]
            parents = {m for parent in stage.parents for m in self.members(parent)}
            if name in stages or parents & lost.keys() or tables & {table for _, table in stage.sources}:
                lost[name] = None
        return list(lost)

    def folds_of(self, node: str) -> int:
        "Return how many folds a stage has, or all members of an ensemble"
        return min(self.stages[m].folds for m in self.members(node))

    def held_out_tables(self, stage: str) -> list[str]:
        """Return the tables of which no image, nor a copy or another eye of its patient, may train a stage.

        They validate stages of more folds, which all start from or learn from the one fold of this stage.
        """
        if self.whole: return self.whole.held_out_tables(stage)
        found: dict[str, None] = {}
        for child in self.stages.values():
            nodes = [o for o in child.parents if stage in self.members(o)]
            if any(self.folds_of(o) < child.folds for o in nodes): found |= dict.fromkeys(child.validated_tables)
            if nodes: found |= dict.fromkeys(self.held_out_tables(child.name))
        return list(found)

    def members(self, node: str) -> dict[str, float]:
        """Return the stages whose scores `node` averages, with weights that add up to 1.

        Weights that are fitted (`is_fitted`) are equal here: `Run.member_weights` has the fitted ones.
        """
        if node in self.stages: return {node: 1.}
        shares = self.ensembles[node].shares
        return {m: w / sum(shares.values()) for m, w in shares.items()}

    def names_eyes(self, node: str) -> bool:
        "Return whether a table that validates a stage or ensemble names both patients and eyes"
        return any(self.tables[table].names_eyes for m in self.members(node)
                   for table in self.stages[m].validated_tables)

    def is_fitted(self, node: str) -> bool:
        "Return whether `node` is an ensemble whose weights are fitted to out-of-fold scores"
        return node in self.ensembles and self.ensembles[node].weights == FITTED


# Parsing one value

def require_name(recipe: Recipe, name: str, names: Iterable[str]) -> str:
    "Return `name`, a stage or ensemble. Raises `ConfigError` if it is not one of `names`"
    known = list(names)
    kind = 'stage or ensemble' if recipe.ensembles.keys() & known else 'stage'
    return check_choice(name, known, f'{name}: no such {kind} in {recipe.path}')


def require_table(recipe: Recipe, name: str) -> str:
    "Return `name`. Raises `ConfigError` if the recipe has no such table, for a preset with how to use it"
    advice = f'; to use the preset: [table.NAME] preset = {name}' if name in preset_files() else ''
    return check_choice(name, recipe.tables, f'{name}: no such table in {recipe.path}{advice}')


def check_choice(value: str, choices: Iterable[str], problem: str) -> str:
    "Return `value`. Raises `ConfigError` if it is none of `choices`, with a `problem` and the right names"
    known = list(choices)
    if value in known: return value
    raise ConfigError(f'{problem}{did_you_mean(str(value), known)} Choose from: {", ".join(known)}.')


def check_fold(fold: int, folds: int, stage: str) -> None:
    "Raise `ConfigError` if `fold` is none of the `folds` of a stage or ensemble"
    if fold in range(folds): return
    raise ConfigError(f'fold {fold}: no such fold of {stage}. Choose from: {", ".join(map(str, range(folds)))}.')


def did_you_mean(word: str, known: Iterable[str]) -> str:
    "Return ', did you mean X?' if one of `known` is similar to `word` or contains it, whatever its case, else '.'"
    folded = {name.casefold(): name for name in known}
    text = word.casefold()
    similar = get_close_matches(text, folded, 1) or [name for name in folded if text and text in name]
    return f', did you mean {folded[similar[0]]}?' if similar else '.'


def _parse_value(key: Field, text: str) -> Any:
    "Return `text` as the type of the key. Raises ValueError with what to enter"
    accepts = key.metadata
    is_tuple = get_origin(key.type) is tuple
    kind: Any = get_args(key.type)[0] if is_tuple else key.type
    words = (text if kind is str else re.sub(r',\s', ' ', text)).split() if is_tuple else [text]
    if accepts['choices'] and text not in accepts['choices']:
        raise ValueError(f'no such value. Accepted: {", ".join(accepts["choices"])}.')
    try: values = words if kind is str else [_parse_number(kind, o, accepts['low'], accepts['high']) for o in words]
    except ValueError as e: raise ValueError(f'{e} {accepts["advice"]}'.strip()) from None
    value = tuple(values) if is_tuple else values[0]
    if accepts['check']: accepts['check'](text, value)
    return value


def _parse_number(kind: type, word: str, low: float, high: float) -> float:
    "Return `word` as int or float between `low` and `high`. Raises ValueError with what to enter"
    what = 'a whole number' if kind is int else 'a number'
    problem = ValueError(f'enter {what} from {low} to {high}.')
    try: number = kind(word)
    except ValueError: raise problem from None
    if not low <= number <= high: raise problem
    return number


def _build(path: Path, section: str, cls: type, texts: dict[str, str], **given: str) -> Any:
    "Return the dataclass `cls` from the texts of one section"
    known = {f.name: f for f in fields(cls) if f.name != 'name'}
    for k in texts:
        if k in OLD_KEYS.get(cls, {}): raise ConfigError(f'{path} [{section}] {k}: {OLD_KEYS[cls][k]}')
        if k not in known:
            raise ConfigError(f'{path} [{section}] {k}: no such key{did_you_mean(k, known)} '
                              f'Accepted keys: {", ".join(known)}.')
    values: dict[str, Any] = dict(given)
    for k, f in known.items():
        required, text = f.default is MISSING, texts.get(k)
        if text is None:
            if required: raise ConfigError(f'{path} [{section}] {k}: missing. Enter: {f.metadata["help"]}.')
            continue
        try: values[k] = _parse_value(f, text.strip())
        except ValueError as e: raise ConfigError(f'{path} [{section}] {k} = {text}: {e}') from None
        if required and not values[k]:
            raise ConfigError(f'{path} [{section}] {k}: empty. Enter: {f.metadata["help"]}.')
    return cls(**values)


def _parse_ranges(path: Path, stage: str, texts: dict[str, str]) -> Ranges:
    "Return the ranges of [tune.STAGE]"
    known = {f.name: f for f in fields(Stage) if f.name not in NOT_TUNED | {'name'}}
    found: Ranges = {}
    for k, text in texts.items():
        if k not in known:
            what = 'a key that is not tuned.' if k in NOT_TUNED else f'no such key{did_you_mean(k, known)}'
            raise ConfigError(f'{path} [tune.{stage}] {k}: {what} Accepted keys: {", ".join(known)}.')
        try: found[k] = _parse_range(known[k], text.strip())
        except ValueError as e: raise ConfigError(f'{path} [tune.{stage}] {k} = {text}: {e}') from None
    return found


def _parse_range(key: Field, text: str) -> Range:
    "Return what `tune` tries for a key of a stage. Raises ValueError with what to enter"
    if '|' in text or key.type not in (int, float):
        choices = tuple(o.strip() for o in text.split('|'))
        values = [_parse_value(key, o) for o in choices]
        if len(set(values)) < max(2, len(values)): raise ValueError('enter different values, separated by |.')
        return Range(' | '.join(choices), choices=choices)
    *numbers, last = text.split() or ['']
    log = last == 'log'
    if not log: numbers.append(last)
    if len(numbers) != 2: raise ValueError('enter FROM TO, FROM TO log, or values separated by |.')
    low, high = (_parse_value(key, o) for o in numbers)
    if low >= high: raise ValueError('enter the smaller number first.')
    if log and low <= 0: raise ValueError('a logarithmic scale begins above 0.')
    return Range(' '.join(text.split()), low, high, log)


def _check_tuned(path: Path, ini: Ini) -> None:
    "Raise `ConfigError` for a section [tune.NAME] that is of no stage"
    stages, ensembles = _names(ini, 'stage'), _names(ini, 'ensemble')
    for name in _names(ini, 'tune'):
        if name in stages: continue
        what = f'no such stage{did_you_mean(name, stages)}'
        if name in ensembles: what = 'an ensemble, which is not trained. Tune a stage.'
        raise ConfigError(f'{path} [tune.{name}]: {what} Stages: {", ".join(stages)}.')


def key_text(recipe: Recipe, stage: str, key: str) -> str:
    "Return the text of a key of a stage, as [stage.NAME], its defaults or --set give it"
    texts = _stage_texts(recipe.sections, stage, bool(recipe.demo))
    default = _stage_key(key).default
    return texts.get(key, ' '.join(map(str, default)) if isinstance(default, tuple) else str(default)).strip()


def parse_key(key: str, text: str) -> Any:
    "Return the value of a key of [stage] from its text. Raises ValueError with what to enter"
    return _parse_value(_stage_key(key), text)


def _stage_key(name: str) -> Field: return next(f for f in fields(Stage) if f.name == name)


# Reading the file

def read_recipe(path: str | Path, *, demo: bool = False, sets: Sequence[str] = (),
                resolve: Resolve | None = None) -> Recipe:
    """Return the checked recipe of the file at `path`; with `demo`, as it runs on the demo.

    `sets` are SECTION.KEY=VALUE strings (from --set) that override the file; `resolve` adds the stages of other runs
    that ensembles name by path. Raises `ConfigError`.
    """
    ini = read_ini(Path(path))
    _check_sets(ini, sets, demo)
    return parse_recipe(Path(path), ini, demo, sets, resolve)


def changed(recipe: Recipe, sets: Sequence[str]) -> Recipe:
    "Return the checked recipe with further SECTION.KEY=VALUE. Raises `ConfigError`"
    ini = {section: dict(keys) for section, keys in recipe.sections.items()}
    parsed = parse_recipe(recipe.path, ini, bool(recipe.demo), [*recipe.sets, *sets], recipe.resolve)
    left_out = [name for name in parsed.tables if name not in recipe.tables]
    return replace(parsed.without(left_out) if left_out else parsed, name=recipe.name)


def parse_recipe(path: Path, ini: Ini, demo: bool, sets: Sequence[str], resolve: Resolve | None = None) -> Recipe:
    "Return the checked recipe of the sections of a file, which it changes. Raises `ConfigError`"
    for text in sets: override(ini, text)
    sections = dict(ini)
    _check_section_names(path, ini)
    _check_tuned(path, ini)
    for name in _names(ini, 'table'): ini[f'table.{name}'] = _with_preset(path, name, ini[f'table.{name}'])
    tables = {n: _build(path, f'table.{n}', Table, ini[f'table.{n}'], name=n) for n in _names(ini, 'table')}
    ensembles = {n: _build(path, f'ensemble.{n}', Ensemble, ini[f'ensemble.{n}'], name=n)
                 for n in _names(ini, 'ensemble')}
    for e in ensembles.values(): _check_weights(path, e)
    stages = {n: _build(path, f'stage.{n}', Stage, _stage_texts(ini, n, demo), name=n) for n in _names(ini, 'stage')}
    ranges = {n: _parse_ranges(path, n, ini[f'tune.{n}']) for n in _names(ini, 'tune')}
    single = {s: _build(path, s, SECTIONS[s], ini.get(s, {})) for s in SECTIONS if s not in NAMED_SECTIONS}
    if demo: stages = {n: _demo_stage(path, s, single['demo']) for n, s in stages.items()}
    parts = Parts(tables, *_with_seeds(path, stages, ensembles, single['recipe'].seed))
    if resolve: parts = resolve(path, parts)
    recipe = Recipe(name=run_name(path, demo), path=path,
                    demo=single['demo'] if demo else None, images=single['images'], augment=single['augment'],
                    **vars(parts), resolve=resolve, submit=single['submit'], gate=single['gate'],
                    refer=single['refer'], tune=ranges, sections=sections, sets=tuple(sets),
                    **vars(single['recipe']))
    return checked(recipe)


def run_name(path: Path, demo: bool) -> str:
    "Return the name of a recipe's run folder, unless --name gives another"
    return f'{path.stem}-demo' if demo else path.stem


def checked(recipe: Recipe) -> Recipe:
    "Return the recipe with the order of its stages. Raises `ConfigError` if something cannot run"
    order = _check_graph(recipe)
    return replace(recipe, order=order, stages=_with_inherited_stats(recipe.stages, order))


def _with_inherited_stats(stages: dict[str, Stage], order: Iterable[str]) -> dict[str, Stage]:
    "Return the stages with `mean` and `std` of the stage that they start from (`init`), where their own are empty"
    found = dict(stages)
    for s in (found[name] for name in order if name in found):
        if not s.init: continue
        parent = found[s.init]
        found[s.name] = replace(s, mean=s.mean or parent.mean, std=s.std or parent.std)
    return found


def read_ini(path: Path) -> Ini:
    "Return the sections of the file as plain text"
    if not path.is_file():
        raise ConfigError(f'{path}: no such recipe. Name one with --recipe FILE, or write settings.ini with `init`.')
    parser = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=None, default_section='\0')
    parser.optionxform = str                 # type: ignore  # keys are case-sensitive
    try: parser.read_string(path.read_text(encoding='utf-8-sig'), source=str(path))
    except UnicodeDecodeError:
        raise ConfigError(f'{path}: is no recipe, but another kind of file, or a text that is not UTF-8.') from None
    except configparser.Error as e:
        raise ConfigError(f'{path}: invalid recipe ({" ".join(str(e).split())}). Correct this line.') from None
    return {section: dict(parser[section]) for section in parser.sections()}


def shipped_folder() -> Path:
    "Return the folder of the shipped settings.ini and recipes/: in an installed wheel, or in a clone"
    package = Path(__file__).parent
    return package / 'shipped' if (package / 'shipped').is_dir() else package.parent


def preset_files() -> dict[str, Path]:
    "Return the file of each preset of a table"
    return {file.stem: file for file in sorted((shipped_folder() / 'recipes/tables').glob('*.ini'))}


def preset_table(name: str, **keys: str) -> Table:
    "Return a preset as a table of its own name; `keys` override its keys. Raises `ConfigError`"
    return parse_table(name, _with_preset(Path('--preset'), name, dict(preset=name, **keys)))


def parse_table(name: str, texts: dict[str, str]) -> Table:
    "Return a table from the texts of its keys. Raises `ConfigError`"
    return _build(Path('options'), f'table.{name}', Table, texts, name=name)


def parse_refer(texts: dict[str, str]) -> Refer:
    "Return [refer] from the texts of its keys. Raises `ConfigError`"
    if not texts: raise ConfigError('name --sensitivity, --specificity or --threshold, for example --sensitivity 0.95.')
    refer = _build(Path('options'), 'refer', Refer, texts)
    _check_refer(Path('options'), refer)
    return refer


def _with_preset(path: Path, table: str, texts: dict[str, str]) -> dict[str, str]:
    "Return the texts of a table's keys with those of its preset as defaults"
    name, files = texts.get('preset', '').strip(), preset_files()
    if not name: return texts
    if name not in files:
        raise ConfigError(f'{path} [table.{table}] preset = {name}: no such preset{did_you_mean(name, files)} '
                          f'Accepted: {", ".join(files)}.')
    return read_ini(files[name])['table'] | texts


def override(ini: Ini, text: str) -> None:
    "Put SECTION.KEY=VALUE into `ini`; a stage's key also overrides the demo's value of it"
    name, equals, value = text.partition('=')
    section, dot, key = name.strip().rpartition('.')
    if not equals or not dot:
        raise ConfigError(f'--set {text}: enter SECTION.KEY=VALUE, for example stage.finetune_256.epochs=5.')
    sections = [section]
    if section.partition('.')[0] == 'stage': sections.append(f'demo.{section}')
    for s in sections: ini.setdefault(s, {})[key] = value.strip()


def _check_section_names(path: Path, ini: Ini) -> None:
    "Raise `ConfigError` for a section that does not exist"
    for section in ini:
        if not SECTION_NAME.fullmatch(section):
            raise ConfigError(f'{path} [{section}]: no such section. Accepted: {ACCEPTED_SECTIONS}.')
    stages = _names(ini, 'stage')
    for name in _names(ini, 'demo.stage'):
        if name not in stages:
            raise ConfigError(f'{path} [demo.stage.{name}]: no such stage. Stages: {", ".join(stages)}.')


def _check_sets(ini: Ini, sets: Sequence[str], demo: bool) -> None:
    "Raise `ConfigError` for a --set of a key of [stage] that changes nothing, as every stage has its own value"
    stages, kind = _names(ini, 'stage'), 'demo.stage' if demo else 'stage'
    for text in sets:
        section, _, key = text.partition('=')[0].strip().rpartition('.')
        if section != 'stage' or not stages: continue
        if all(key in ini.get(f'{kind}.{name}', {}) for name in stages):
            raise ConfigError(f'--set {text}: changes nothing, as every stage has its own {key}. Name the stage: '
                              f'--set {section}.{stages[0]}.{key}=VALUE.')


def _names(ini: Ini, kind: str) -> list[str]:
    "Return each NAME of the sections [kind.NAME]"
    return [section.removeprefix(f'{kind}.') for section in ini if section.startswith(f'{kind}.')]


def _stage_texts(ini: Ini, name: str, demo: bool) -> dict[str, str]:
    "Return the texts of a stage's keys; later sections override earlier ones"
    sections = ['stage', f'stage.{name}']
    if demo: sections += ['demo.stage', f'demo.stage.{name}']
    texts: dict[str, str] = {}
    for section in sections: texts |= ini.get(section, {})
    return texts


def _demo_stage(path: Path, stage: Stage, demo: Demo) -> Stage:
    "Return `stage` with the demo's size and network"
    try: archs = dict(pair.split(':') for pair in demo.archs)
    except ValueError:
        raise ConfigError(f'{path} [demo] archs = {" ".join(demo.archs)}: enter BIG:SMALL pairs.') from None
    return replace(stage, arch=archs.get(stage.arch, stage.arch), size=max(32, stage.size // demo.shrink))


# Stages of several seeds

def _with_seeds(path: Path, stages: dict[str, Stage], ensembles: dict[str, Ensemble],
                seed: int) -> tuple[dict[str, Stage], dict[str, Ensemble]]:
    """Return the stages, one of `seeds` = n replaced by n stages, and the ensembles, with the mean of these n.

    A stage starts from the stage `init` of its own number; if that has fewer seeds, from the first one.
    """
    copies = {n: [f'{n}_seed{i}' for i in range(1, s.seeds + 1)] if s.seeds > 1 else [n] for n, s in stages.items()}
    for n, names in copies.items():
        taken = {*stages, *ensembles} & set(names) - {n}
        if taken: raise ConfigError(f'{path} [stage.{n}] seeds = {stages[n].seeds}: makes a stage {min(taken)}, which '
                                    'the recipe has already. Rename that one.')
    found = {}
    for n, s in stages.items():
        first = seed if s.seed < 0 else s.seed
        for i, name in enumerate(copies[n]):
            parents = copies.get(s.init, [s.init])
            init = parents[i] if i < len(parents) else parents[0]
            found[name] = replace(s, name=name, init=init, seed=first + i, seeds=1)
    means = {n: Ensemble(n, tuple(names)) for n, names in copies.items() if len(names) > 1}
    return found, means | {n: _with_members(e, copies) for n, e in ensembles.items()}


def _check_weights(path: Path, e: Ensemble) -> None:
    "Check that an ensemble names each member once, and has no weights or one for each"
    twice = [m for m in e.members if e.members.count(m) > 1]
    if twice:
        raise ConfigError(f'{path} [ensemble.{e.name}] members = {" ".join(e.members)}: {twice[0]} is named twice. '
                          'Name each stage once; weights can make it count more.')
    weights = parse_weights(e.weights)
    if not weights or (len(weights) == len(e.members) and any(weights)): return
    raise ConfigError(f'{path} [ensemble.{e.name}] weights = {e.weights}: enter one number for '
                      f'each of the {len(e.members)} members, not all 0.')


def _with_members(e: Ensemble, copies: dict[str, list[str]]) -> Ensemble:
    "Return an ensemble with each member of several seeds replaced by its stages, which share its weight if it is fixed"
    if all(len(copies.get(m, [])) < 2 for m in e.members): return e
    return e.with_shares({name: w / len(copies[m]) for m, w in e.shares.items() for name in copies.get(m, [m])})


# Checking the graph

def _fail(r: Recipe, section: str, key: str, value: Any, why: str) -> NoReturn:
    if isinstance(value, tuple): value = ' '.join(map(str, value))
    raise ConfigError(f'{r.path} [{section}] {key} = {value}: {why}')


def _check_graph(r: Recipe) -> tuple[str, ...]:
    "Return the names of stages and ensembles, parents first. Raises `ConfigError` if something cannot run"
    if not r.stages: raise ConfigError(f'{r.path}: no section [stage.NAME]. Add at least one stage.')
    shared = set(r.stages) & set(r.ensembles)
    if shared: raise ConfigError(f'{r.path} [ensemble.{min(shared)}]: a stage has the same name. Rename one of them.')
    _check_column_names(r)
    for t in r.tables.values(): _check_table(r, t)
    for s in r.stages.values():
        _check_training(r, s)
        _check_init(r, s)
        _check_sources(r, s)
    for e in r.ensembles.values(): _check_members(r, e)
    order = _topological_order(r)
    for s in r.stages.values(): _check_folds(r, s)
    for s in r.stages.values(): _check_held_out(r, s)
    for s in r.stages.values(): _check_hard_labels(r, s)
    for s in r.stages.values(): _check_fitted_labels(r, s)
    for s in r.stages.values(): _check_validated(r, s)
    for e in r.ensembles.values(): _check_ensemble(r, e)
    _check_submit(r)
    return order


def _topological_order(r: Recipe) -> tuple[str, ...]:
    "Return the names of stages and ensembles, parents first. Raises `ConfigError` for a cycle"
    try: return tuple(TopologicalSorter({name: node.parents for name, node in r.nodes.items()}).static_order())
    except CycleError as e:
        raise ConfigError(f'{r.path}: the stages form a cycle: {" -> ".join(e.args[1])}. '
                          'Change `init` or `train` of one of them.') from None


def _check_column_names(r: Recipe) -> None:
    "Check that no stage or ensemble is named like another column of the files in which it is a column"
    taken = {*COLUMNS_OF_SCORES, *(f'{name}_grade' for name in r.nodes)}
    if r.submit.eyes == 'fused': taken |= COLUMNS_OF_FUSION
    for name in r.nodes:
        kind = 'stage' if name in r.stages else 'ensemble'
        if name in taken:
            raise ConfigError(f'{r.path} [{kind}.{name}]: {name} is a column of scores.csv or oof.csv. '
                              'Choose another name.')
    for t in r.tables.values():
        for name in t.carried:
            if name in taken or name in r.nodes:
                _fail(r, f'table.{t.name}', 'carry', name, 'oof.csv has a column or a stage of this name. Rename it.')


def _check_table(r: Recipe, t: Table) -> None:
    "Check that a table's images are grouped in one way only, and that its grades are where they can be"
    if t.grade and t.grade != 'folder' and not t.csv:
        _fail(r, f'table.{t.name}', 'grade', t.grade, 'this table has no csv. Write grade = folder if the sub-folders '
              'of `images` are named by grade, or set csv.')
    if t.relabels and not t.grade:
        _fail(r, f'table.{t.name}', 'relabels', t.relabels, 'this table has no grades. Set grade, or remove relabels.')
    if len(t.id_columns) > 1 and t.grade and len(t.grade_columns) != len(t.id_columns):
        _fail(r, f'table.{t.name}', 'grade', t.grade, f'enter a column for each of the columns of id: {t.id}.')
    if len(t.id_columns) > 1 and t.eye:
        _fail(r, f'table.{t.name}', 'eye', t.eye, 'a row of this table holds both eyes. Remove it.')
    ways = [key for key in ('patient', 'pairs', 'group', 'block') if getattr(t, key)]
    if len(ways) > 1:
        advice = f'this table has the key {ways[0]}, too. Remove {ways[0]} or {ways[1]}.'
        _fail(r, f'table.{t.name}', ways[1], getattr(t, ways[1]), advice)


def _check_training(r: Recipe, s: Stage) -> None:
    "Check that the keys of a stage that say how it trains do not contradict each other"
    section = f'stage.{s.name}'
    if s.layer_decay < 1 and s.lr_div > 1:
        _fail(r, section, 'layer_decay', s.layer_decay, f'the body\'s rate is lowered by lr_div = {s.lr_div:g}, too. '
              'Set lr_div = 1, or layer_decay = 1.')
    if s.schedule == 'constant' and s.warmup != Stage.warmup:
        _fail(r, section, 'warmup', s.warmup, 'schedule = constant has no warm-up. Set schedule = one_cycle, or remove '
              'it.')
    if not s.epochs and not s.freeze_epochs:
        _fail(r, section, 'epochs', s.epochs, 'nothing is trained. Set epochs, or freeze_epochs for a linear probe.')


def _network(s: Stage) -> str:
    "Return what must be equal for a stage to start from another one's weights"
    units = 'one unit' if s.loss in ('smooth_l1', 'mse') else s.loss
    return f'{s.arch} + {s.head} + {units}'


def _check_init(r: Recipe, s: Stage) -> None:
    "Check that the parent stage exists and has the same network"
    if not s.init: return
    if s.init not in r.stages: _fail(r, f'stage.{s.name}', 'init', s.init, _no_stage(r))
    parent = r.stages[s.init]
    if _network(parent) != _network(s):
        _fail(r, f'stage.{s.name}', 'init', s.init, f'that stage is {_network(parent)}, this one is {_network(s)}. '
              'Use the same arch, head and loss.')


def _check_sources(r: Recipe, s: Stage) -> None:
    "Check the tables that a stage trains on, their teachers and weights"
    section = f'stage.{s.name}'
    for entry, (teacher, table) in zip(s.train, s.sources, strict=True):
        if table not in r.tables: _fail(r, section, 'train', entry, _no_table(r))
        graded = r.tables[table].graded
        if teacher and teacher not in r.nodes: _fail(r, section, 'train', entry, _no_node(r))
        if teacher and graded: _fail(r, section, 'train', entry, f'this table is graded. Write {table} alone.')
        if not teacher and not graded:
            _fail(r, section, 'train', entry, f'this table is ungraded. Write STAGE:{table} for pseudo-labels.')
    if all(teacher for teacher, _ in s.sources):
        _fail(r, section, 'train', s.train, 'all tables are pseudo-labelled. Add a graded table.')
    if s.source_weights and (len(s.source_weights) != len(s.train) or not all(s.source_weights)):
        _fail(r, section, 'source_weights', s.source_weights,
              f'enter one number above 0 for each of the {len(s.train)} entries of train.')
    lacking = [table for _, table in s.sources if s.balance and s.balance not in r.tables[table].carried]
    if lacking:
        _fail(r, section, 'balance', s.balance, f'the table {lacking[0]} does not carry this column. Add it to the key '
              f'carry of [table.{lacking[0]}].')


def _check_validated(r: Recipe, s: Stage) -> None:
    "Check which tables validate a stage: no ancestor was trained on the images of a fold that validates the stage"
    section = f'stage.{s.name}'
    for table in s.validate:
        if table not in s.graded_tables:
            _fail(r, section, 'validate', table, f'no graded table of `train`. Accepted: {", ".join(s.graded_tables)}.')
    parents = [m for parent in s.parents for m in r.members(parent) if m in r.stages]
    for m in dict.fromkeys(parents): _check_parent_validated(r, s, r.stages[m], set())


def _check_parent_validated(r: Recipe, s: Stage, ancestor: Stage, seen: set[str]) -> None:
    "Check an ancestor of a stage, and its own"
    if ancestor.name in seen: return
    seen.add(ancestor.name)
    leaked = [t for t in s.validated_tables if t in ancestor.graded_tables and t not in ancestor.validated_tables]
    if leaked:
        _fail(r, f'stage.{s.name}', 'validate', s.validate or s.validated_tables,
              f'its parent {ancestor.name} trains on every fold of {leaked[0]}. Set validate of {ancestor.name} to '
              f'{" ".join([*ancestor.validated_tables, leaked[0]])}.')
    for parent in ancestor.parents:
        for m in r.members(parent):
            if m in r.stages: _check_parent_validated(r, s, r.stages[m], seen)


def _check_folds(r: Recipe, s: Stage) -> None:
    "Check that the folds of a stage exist, and that its parents train them too, or train one that serves them all"
    section = f'stage.{s.name}'
    if s.folds > r.splits: _fail(r, section, 'folds', s.folds, f'the maximum is [recipe] splits = {r.splits}.')
    for parent in (o for o in s.parents if o in r.nodes):
        n = r.folds_of(parent)
        if 1 < n < s.folds:
            _fail(r, section, 'folds', s.folds, f'its parent {parent} trains only {n}. Use at most {n}, or set folds '
                  f'of {parent} to {s.folds}, or to 1 if it trains on other tables.')


def _check_held_out(r: Recipe, s: Stage) -> None:
    "Check that a stage whose one fold serves several of another does not train on the tables that validate that one"
    leaked = [t for t in r.held_out_tables(s.name) if t in s.graded_tables]
    if leaked:
        _fail(r, f'stage.{s.name}', 'folds', s.folds, f'it trains on {leaked[0]}, whose folds validate a stage that '
              'builds on it and trains more of them. Set folds of both to the same number.')


def _check_hard_labels(r: Recipe, s: Stage) -> None:
    "Check that no hard label comes from thresholds that were fitted on the images that validate the student"
    if s.labels != 'hard': return
    for teacher in dict.fromkeys(name for name, _ in s.sources if name):
        node = r.nodes[teacher]
        thresholds = node.thresholds if isinstance(node, Stage) else r.submit.thresholds
        folds = min((r.stages[m].folds for m in r.members(teacher) if m in r.stages), default=2)
        if folds > 1 or parse_thresholds(thresholds): continue
        section = f'stage.{teacher}' if isinstance(node, Stage) else 'submit'
        _fail(r, f'stage.{s.name}', 'labels', s.labels, f'its teacher {teacher} has one fold, so its thresholds are '
              f'fitted on the images that validate {s.name}. Set folds = 2 or more for both, or [{section}] '
              'thresholds = 0.5 1.5 2.5 3.5.')


def _check_fitted_labels(r: Recipe, s: Stage) -> None:
    "Check that no label comes from weights of an ensemble that were fitted on the images that validate the student"
    for entry, (teacher, _) in zip(s.train, s.sources, strict=True):
        if not r.is_fitted(teacher) or r.folds_of(teacher) > 1: continue
        _fail(r, f'stage.{s.name}', 'train', entry, f'the weights of {teacher} are fitted on its only fold, whose '
              f'images validate {s.name}. Set folds of its members to 2 or more, or give [ensemble.{teacher}] weights '
              'as numbers.')


def _check_members(r: Recipe, e: Ensemble) -> None:
    "Check that the members of an ensemble are stages"
    for m in e.members:
        if '/' in m: _fail(r, f'ensemble.{e.name}', 'members', m, 'only commands on a run find stages of other runs.')
        if m not in r.stages: _fail(r, f'ensemble.{e.name}', 'members', m, _no_stage(r))


def _check_ensemble(r: Recipe, e: Ensemble) -> None:
    "Check that the same tables validate all members of an ensemble"
    validated = {m: sorted(r.stages[m].validated_tables) for m in e.members}
    first = e.members[0]
    for m, tables in validated.items():
        if tables != validated[first]:
            _fail(r, f'ensemble.{e.name}', 'members', e.members,
                  f'{m} is validated on {" ".join(tables)}, {first} on {" ".join(validated[first])}. Set the key '
                  '`validate` of the stages to the same tables.')


def _check_submit(r: Recipe) -> None:
    "Check what is submitted, and for which table"
    for key, names in [('final', [r.submit.final]), ('also', r.submit.also)]:
        for name in names:
            if name not in r.nodes: _fail(r, 'submit', key, name, _no_node(r))
    _check_refer(r.path, r.refer)
    _check_eyes(r)
    table = r.submit.table
    if not table: return
    if table not in r.tables: _fail(r, 'submit', 'table', table, _no_table(r))
    if r.tables[table].graded: _fail(r, 'submit', 'table', table, 'this table is graded. Name an ungraded table.')


def _check_eyes(r: Recipe) -> None:
    "Check that eyes can be fused: a table that validates the model names patients and eyes, and so does the test table"
    if r.submit.eyes != 'fused': return
    if not r.names_eyes(r.submit.final):
        validated = dict.fromkeys(table for m in r.members(r.submit.final) for table in r.stages[m].validated_tables)
        _fail(r, 'submit', 'eyes', r.submit.eyes, f'no table that validates {r.submit.final} ({", ".join(validated)}) '
              'names both patients and eyes. Set the keys eye and patient (or pairs, group) of one, or eyes = single.')
    test = r.tables.get(r.submit.table)
    if test and not test.names_eyes:
        _fail(r, 'submit', 'eyes', r.submit.eyes, f'the table {test.name} does not name both patients and eyes. Set '
              'its keys eye and patient (or pairs, group), or eyes = single.')


def _check_refer(path: Path, refer: Refer) -> None:
    "Check that a fixed threshold stands alone"
    if not refer.threshold or not (refer.sensitivity or refer.specificity): return
    raise ConfigError(f'{path} [refer] threshold: a fixed score has no target. Remove it, or remove sensitivity and '
                      'specificity.')


def _no_stage(r: Recipe) -> str: return f'no such stage. Stages: {", ".join(r.stages)}.'
def _no_node(r: Recipe) -> str: return f'no such stage or ensemble. Accepted: {", ".join(r.nodes)}.'
def _no_table(r: Recipe) -> str: return f'no such table. Tables: {", ".join(r.tables)}.'


# The shipped recipes

def write_recipes(folder: Path) -> list[Path]:
    "Copy the shipped settings.ini and recipes/ into `folder`. Raises `ConfigError` instead of overwriting a file"
    source = shipped_folder()
    files = [source / 'settings.ini', *sorted((source / 'recipes').glob('*.ini'))]
    targets = [folder / f.relative_to(source) for f in files]
    for target in targets:
        if target.exists(): raise ConfigError(f'{target}: already exists. Choose another folder.')
    for f, target in zip(files, targets, strict=True): write_bytes(target, f.read_bytes())
    return targets
