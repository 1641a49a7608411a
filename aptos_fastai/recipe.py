"The recipe: settings.ini read into frozen dataclasses and checked as a graph before anything runs."
import configparser
import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from difflib import get_close_matches
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from aptos_fastai.common.io import AptosError, write_bytes


class ConfigError(AptosError):
    "A recipe that cannot run: names file, section, key and the accepted values."


def _key(default=MISSING, help='', choices=None, low=None, high=None):
    "A setting: its default, what it means with its unit, and the values it accepts"
    return field(default=default, metadata=dict(help=help, choices=choices, low=low, high=high))


@dataclass(frozen=True)
class Images:
    "[images]: how every image of the run is prepared"
    crop: str = _key('retina', 'retina: crop to the circle found; none: the whole image', choices=('retina', 'none'))
    aspect: str = _key('pad', 'pad: keep the aspect; squash: stretch to a square (published)', choices=('pad', 'squash'))
    cut_off: str = _key('mirror', 'where the image cuts the retina off: mirror its content up to the circle, or black (the shape then tells the camera)',
                        choices=('mirror', 'black'))
    size: int = _key(0, 'side of the stored square, pixels; 0: the largest that any stage asks for', low=0, high=4096)
    quality: int = _key(95, 'JPEG quality of the store, chroma kept whole', low=50, high=100)
    skip_unreadable: str = _key('no', 'yes: go on without images that cannot be read; no: stop and list them', choices=('no', 'yes'))


@dataclass(frozen=True)
class Augment:
    "[augment]: what is drawn for every training image; never for validation or prediction"
    brightness: float = _key(.1, 'factor 1 ± this', low=0, high=1)
    contrast: float = _key(.2, 'factor 1 ± this', low=0, high=1)
    saturation: float = _key(.2, 'factor 1 ± this', low=0, high=1)
    hue: float = _key(.1, 'turn of the colour circle, ± this part of it', low=0, high=.5)
    blur: float = _key(.5, 'probability of a Gaussian blur', low=0, high=1)
    blur_sigma: tuple[float, ...] = _key((.1, 2.), 'its sigma, from-to, pixels', low=.01, high=20)
    rotate: float = _key(180., 'degrees, ± this', low=0, high=180)
    shift: float = _key(.2, 'part of the side, ± this, each way', low=0, high=.9)
    scale: tuple[float, ...] = _key((.8, 1.2), 'from-to', low=.1, high=10)
    shear: float = _key(.2, 'degrees, ± this', low=0, high=45)
    hflip: float = _key(.5, 'probability of a left-right flip', low=0, high=1)
    vflip: float = _key(0., 'probability of an up-down flip', low=0, high=1)
    on: str = _key('auto', 'image: one by one as they are loaded; batch: together on the device; auto: batch where there is a GPU',
                   choices=('auto', 'image', 'batch'))


@dataclass(frozen=True)
class Table:
    "[table.NAME]: one CSV and its folder of images"
    name: str
    csv: str = _key(help='the CSV, inside one of `folder`')
    images: str = _key(help='the folder of its images, inside the same `folder`')
    id: str = _key('id_code', 'column of the image ids (file names, with or without extension)')
    grade: str = _key('', 'column of the grades 0-4; empty: ungraded')
    folder: tuple[str, ...] = _key(('.',), 'folders under --data to look in, the first that holds the CSV')
    group: str = _key('', 'regular expression: the part of an id that images of one patient share')
    order: str = _key('', 'CSV whose ids and order the submission takes (sample_submission.csv)')

    @property
    def graded(self): return bool(self.grade)


@dataclass(frozen=True)
class Stage:
    "[stage.NAME], with [stage] as the defaults of all: one training"
    name: str
    train: tuple[str, ...] = _key(help='tables; NODE:TABLE is TABLE pseudo-labelled by that stage or ensemble')
    init: str = _key('', 'stage whose weights it starts from; empty: `weights`')
    weights: str = _key('imagenet', 'imagenet (timm\'s hub), bundled, none, or a weights file')
    arch: str = _key('legacy_seresnet50', 'any timm network that gives feature maps')
    head: str = _key('gem', 'pooling before the one unit', choices=('gem', 'avg'))
    dropout: float = _key(0., 'before the one unit', low=0, high=.95)
    size: int = _key(256, 'side of the square the network sees, pixels', low=32, high=2048)
    folds: int = _key(1, 'how many of the recipe\'s splits are trained, each with its own validation part', low=1, high=20)
    epochs: int = _key(10, 'epochs with the whole network training', low=1, high=1000)
    freeze_epochs: int = _key(0, 'epochs before them that train the head alone', low=0, high=1000)
    bs: int = _key(16, 'images a batch', low=1, high=4096)
    accumulate: int = _key(1, 'batches whose gradients add up to one step: bs = 8 with 2 is a step of 16 images', low=1, high=256)
    schedule: str = _key('one_cycle', 'course of the learning rate', choices=('one_cycle', 'constant'))
    lr: float = _key(1e-3, 'highest learning rate, of the head', low=0, high=10)
    lr_div: float = _key(1., 'the body learns at lr / this', low=1, high=1e4)
    sqr_mom: float = _key(.99, 'Adam\'s second beta (fastai .99, PyTorch .999)', low=0, high=.99999)
    eps: float = _key(1e-5, 'Adam\'s epsilon (fastai 1e-5, PyTorch 1e-8)', low=1e-12, high=1)
    wd: float = _key(.01, 'weight decay (decoupled)', low=0, high=10)
    loss: str = _key('smooth_l1', 'on the grade as a number', choices=('smooth_l1', 'mse'))
    keep: str = _key('kappa', 'which epoch is kept: best by kappa or by loss, or the last', choices=('kappa', 'loss', 'last'))
    tta: str = _key('none', 'mean over views at prediction: none, hflip (2), d4 (8)', choices=('none', 'hflip', 'd4'))
    ema: float = _key(0., 'the kept weights are a moving average over steps with this decay; 0: none', low=0, high=.99999)
    thresholds: str = _key('optimal', 'of its grades: optimal or regularised (fitted out of fold), or four rising numbers')
    labels: str = _key('soft', 'pseudo-labels it learns from: scores or grades', choices=('soft', 'hard'))
    source_weights: tuple[float, ...] = _key((), 'one for each entry of `train`: how often its images are drawn; empty: each once an epoch', low=0, high=1000)
    workers: int = _key(-1, 'processes that load images; -1: by the cores and the device', low=-1, high=256)
    precision: str = _key('auto', 'of training; auto: on a GPU bf16, or fp16 where it lacks that; on a CPU that knows bf16 what a few steps measure faster',
                          choices=('auto', 'f32', 'bf16', 'fp16'))
    track: str = _key('no', 'losses, kappa and rates as they come, beside history.csv: tensorboard (in the run folder) or wandb (asks its host)',
                      choices=('no', 'tensorboard', 'wandb'))
    compile: str = _key('no', 'yes: torch.compile the body, which takes a minute or more and a C++ compiler', choices=('no', 'yes'))

    @property
    def sources(self) -> list[tuple[str, str]]:
        "(teacher or '', table) of each entry of `train`"
        return [(t, name) for t, _, name in (o.rpartition(':') for o in self.train)]

    @property
    def parents(self) -> list[str]: return [o for o in [self.init, *(t for t, _ in self.sources)] if o]


@dataclass(frozen=True)
class Ensemble:
    "[ensemble.NAME]: weighted mean of the scores of stages"
    name: str
    members: tuple[str, ...] = _key(help='stages')
    weights: tuple[float, ...] = _key((), 'one for each member; empty: equal', low=0, high=1e6)

    @property
    def parents(self): return list(self.members)


@dataclass(frozen=True)
class Submit:
    "[submit]: what is answered for the test images"
    table: str = _key(help='the ungraded table')
    final: str = _key(help='stage or ensemble that becomes submission.csv')
    also: tuple[str, ...] = _key((), 'further stages and ensembles, each its own file in submissions/')
    thresholds: str = _key('optimal', 'optimal or regularised (fitted out of fold), or four rising numbers')
    coverage: float = _key(.9, 'grade_low to grade_high of scores.csv hold the true grade with this probability', low=.5, high=.99)


@dataclass(frozen=True)
class Demo:
    "[demo]: how the same graph is run on the synthetic demo; [demo.stage] and [demo.stage.NAME] override stage keys"
    pretrain: int = _key(600, 'images of the 2015 table', low=20, high=100000)
    train: int = _key(480, 'of the 2019 train table', low=20, high=100000)
    test: int = _key(160, 'of the 2019 test table', low=5, high=100000)
    shrink: int = _key(1, 'every size is divided by this', low=1, high=16)
    archs: tuple[str, ...] = _key((), 'BIG:SMALL pairs: the small network that stands in for the big one')


@dataclass(frozen=True)
class Recipe:
    "A recipe file, checked: its tables, stages and ensembles by name, and the `order` in which they can run"
    name: str
    path: Path
    demo: Demo | None                        # set where the recipe is run on the demo
    images: Images
    augment: Augment
    tables: dict[str, Table]
    stages: dict[str, Stage]
    ensembles: dict[str, Ensemble]
    submit: Submit
    seed: int = 42
    splits: int = 5
    conflicts: str = 'keep'
    order: tuple[str, ...] = ()              # stages and ensembles, parents first

    @property
    def nodes(self) -> dict: return {**self.stages, **self.ensembles}

    @property
    def store_size(self) -> int: return self.images.size or max(s.size for s in self.stages.values())

    @property
    def used_tables(self) -> list[Table]:
        "The tables that some stage or the submission needs, in the recipe's order"
        names = {t for s in self.stages.values() for _, t in s.sources} | {self.submit.table}
        return [t for n, t in self.tables.items() if n in names]

    def members(self, node: str) -> dict[str, float]:
        "The stages whose mean `node` is, with weights that add up to 1"
        if node in self.stages: return {node: 1.}
        e = self.ensembles[node]
        ws = e.weights or (1.,) * len(e.members)
        return {m: w / sum(ws) for m, w in zip(e.members, ws, strict=True)}


@dataclass(frozen=True)
class _General:
    "[recipe]"
    seed: int = _key(42, 'of the folds, the order, the augmentation and the demo', low=0, high=2**31)
    splits: int = _key(5, 'equal parts that the graded tables are cut into; part k validates fold k', low=2, high=20)
    conflicts: str = _key('keep', 'unequal grades of one image that stands there twice: keep both, drop both, mean: train on their mean',
                          choices=('keep', 'drop', 'mean'))


KINDS = dict(recipe=_General, images=Images, augment=Augment, table=Table, stage=Stage, ensemble=Ensemble,
              submit=Submit, demo=Demo)
NAMED = ('table', 'stage', 'ensemble')
_wanted = {int: 'a whole number', float: 'a number'}


def parse_thresholds(text: str) -> tuple[float, ...] | None:
    "'optimal', 'regularised' -> None; '0.7 1.5 2.5 3.5' -> those numbers; anything else raises ValueError"
    if text in ('optimal', 'regularised'): return None
    thresholds = tuple(float(o) for o in text.split())
    if len(thresholds) != 4 or sorted(set(thresholds)) != list(thresholds): raise ValueError(text)
    return thresholds


def _value(f, text: str):
    "`text` as the type of the dataclass field `f`; raises ValueError with what would be accepted"
    m, kind = f.metadata, f.type
    many, out = str(kind).startswith('tuple'), list[Any]()
    kind = float if 'float' in str(kind) else int if kind in (int, 'int') else str
    words = text.split() if many else [text]
    try: out = [kind(o) for o in words]
    except ValueError: raise ValueError(f'{_wanted[kind]} is needed') from None
    if m['choices'] and text not in m['choices']: raise ValueError(f'accepted: {", ".join(m["choices"])}')
    if kind is not str and any(not m['low'] <= o <= m['high'] for o in out):
        raise ValueError(f'from {m["low"]:g} to {m["high"]:g} is accepted')
    if f.name in ('blur_sigma', 'scale') and (len(out) != 2 or out[0] > out[1]):
        raise ValueError('two rising numbers are needed')
    if f.name == 'thresholds':
        try: parse_thresholds(text)
        except ValueError: raise ValueError('accepted: optimal, regularised, or four rising numbers') from None
    if f.name == 'group':
        try: re.compile(text)
        except re.error as e: raise ValueError(f'not a regular expression ({e})') from None
    return tuple(out) if many else out[0]


def near(word: str, words) -> str:
    "', did you mean …?' where one of `words` is like `word`, else nothing"
    found = get_close_matches(word, list(words), 1)
    return f', did you mean {found[0]}?' if found else ''


def _build(path: Path, section: str, cls, keys: dict[str, str], **given):
    "The dataclass `cls` from the strings of one section"
    known = {f.name: f for f in fields(cls) if f.name != 'name'}
    for k in keys:
        if k not in known: raise ConfigError(f'{path} [{section}] {k}: no such key{near(k, known)}; accepted: {", ".join(known)}')
    vals = {}
    for k, f in known.items():
        if k not in keys:
            if f.default is MISSING: raise ConfigError(f'{path} [{section}] {k}: is missing ({f.metadata["help"]})')
            continue
        try: vals[k] = _value(f, keys[k].strip())
        except ValueError as e: raise ConfigError(f'{path} [{section}] {k} = {keys[k]}: {e}') from None
        if f.default is MISSING and not vals[k]: raise ConfigError(f'{path} [{section}] {k}: is empty')
    return cls(**given, **vals)


def _read_ini(path: Path, sets: Sequence[str]) -> dict[str, dict[str, str]]:
    "Sections of the file as plain strings, with `SECTION.KEY=VALUE` of `sets` on top, over the demo's own stage keys too"
    if not path.is_file(): raise ConfigError(f'{path}: no such recipe; give one with --recipe FILE, or write settings.ini with `init`')
    cp = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=None, default_section='\0')
    cp.optionxform = str      # type: ignore
    try: cp.read_string(path.read_text(encoding='utf-8'), source=str(path))
    except (configparser.Error, UnicodeDecodeError) as e: raise ConfigError(f'{path}: {" ".join(str(e).split())}') from None
    ini = {s: dict(cp[s]) for s in cp.sections()}
    for o in sets:
        name, eq, value = o.partition('=')
        section, dot, k = name.strip().rpartition('.')
        if not eq or not dot: raise ConfigError(f'--set {o}: SECTION.KEY=VALUE is needed (stage.finetune_256.epochs=5)')
        for at in [section, f'demo.{section}'] if section.partition('.')[0] == 'stage' else [section]: ini.setdefault(at, {})[k] = value.strip()
    return ini


def write_recipes(folder: Path) -> list[Path]:
    "`init`: settings.ini and recipes/ as they were shipped, into `folder`. Raises `ConfigError` rather than write over anything"
    package = Path(__file__).parent
    source = package / 'recipes' if (package / 'recipes').is_dir() else package.parent      # of a wheel, of a clone
    found = [f.relative_to(source) for f in [source / 'settings.ini', *sorted((source / 'recipes').glob('*.ini'))]]
    there = [folder / f for f in found if (folder / f).exists()]
    if there: raise ConfigError(f'{there[0]}: is there already; give another folder')
    for f in found: write_bytes(folder / f, (source / f).read_bytes())
    return [folder / f for f in found]


def _check_sections(path: Path, ini: dict):
    for s in ini:
        head, _, name = s.removeprefix('demo.').partition('.')
        ok = head in KINDS and bool(name) <= (head in NAMED) and (bool(name) or head not in ('table', 'ensemble'))
        if not ok or (s.startswith('demo.') and head != 'stage') or (name and not re.fullmatch(r'[A-Za-z]\w*', name)):
            raise ConfigError(f'{path} [{s}]: no such section; accepted: [recipe] [images] [augment] [table.NAME] [stage] '
                              '[stage.NAME] [ensemble.NAME] [submit] [demo] [demo.stage] [demo.stage.NAME]')


def _shrunk(path: Path, stage: Stage, demo: Demo) -> Stage:
    "`stage` at the demo's size"
    try: archs = dict(o.split(':') for o in demo.archs)
    except ValueError: raise ConfigError(f'{path} [demo] archs = {" ".join(demo.archs)}: BIG:SMALL pairs are needed') from None
    return replace(stage, arch=archs.get(stage.arch, stage.arch), size=max(32, stage.size // demo.shrink))


def read_recipe(path: str | Path, *, demo: bool = False, sets: Sequence[str] = ()) -> Recipe:
    "The checked recipe of the file at `path`; with `demo`, as the demo runs it. Raises `ConfigError`"
    path = Path(path)
    ini = _read_ini(path, sets)
    _check_sections(path, ini)
    names = {kind: [s.partition('.')[2] for s in ini if s.startswith(f'{kind}.')] for kind in NAMED}
    for o in [s for s in ini if s.startswith('demo.stage.') and s.removeprefix('demo.stage.') not in names['stage']]:
        raise ConfigError(f'{path} [{o}]: there is no such stage; stages: {", ".join(names["stage"])}')
    over = {n: {**ini.get('demo.stage', {}), **ini.get(f'demo.stage.{n}', {})} if demo else {} for n in names['stage']}
    named = {kind: {n: _build(path, f'{kind}.{n}', KINDS[kind], ini[f'{kind}.{n}'], name=n) for n in names[kind]}
             for kind in ('table', 'ensemble')}
    stages = {n: _build(path, f'stage.{n}', Stage, {**ini.get('stage', {}), **ini[f'stage.{n}'], **over[n]}, name=n)
              for n in names['stage']}
    one = {k: _build(path, k, KINDS[k], ini.get(k, {})) for k in ('images', 'augment', 'submit', 'demo', 'recipe')}
    if demo: stages = {n: _shrunk(path, s, one['demo']) for n, s in stages.items()}
    recipe = Recipe(path.stem + ('-demo' if demo else ''), path, one['demo'] if demo else None, one['images'], one['augment'],
                    named['table'], stages, named['ensemble'], one['submit'], **vars(one['recipe']))
    return replace(recipe, order=_check_graph(recipe))


def _check_graph(r: Recipe) -> tuple[str, ...]:
    "Names of stages and ensembles, parents first; raises `ConfigError` for whatever could not run"
    def err(section, key, value, why): raise ConfigError(f'{r.path} [{section}] {key} = {value}: {why}')
    if not r.stages: raise ConfigError(f'{r.path}: has no [stage.NAME]')
    both = set(r.stages) & set(r.ensembles)
    if both: raise ConfigError(f'{r.path} [ensemble.{min(both)}]: a stage has this name already')
    for s in r.stages.values(): _check_stage(r, s, err)
    for e in r.ensembles.values():
        for m in e.members:
            if m not in r.stages: err(f'ensemble.{e.name}', 'members', m, f'no such stage; stages: {", ".join(r.stages)}')
        if e.weights and (len(e.weights) != len(e.members) or not sum(e.weights)):
            err(f'ensemble.{e.name}', 'weights', ' '.join(map(str, e.weights)), f'{len(e.members)} numbers are needed, not all 0')
    for k, n in [('final', r.submit.final), *(('also', o) for o in r.submit.also)]:
        if n not in r.nodes: err('submit', k, n, f'no such stage or ensemble; there are {", ".join(r.nodes)}')
    if r.submit.table not in r.tables: err('submit', 'table', r.submit.table, f'no such table; tables: {", ".join(r.tables)}')
    if r.tables[r.submit.table].graded: err('submit', 'table', r.submit.table, 'this table is graded; name one without `grade`')
    try: return tuple(TopologicalSorter({n: o.parents for n, o in r.nodes.items()}).static_order())
    except CycleError as e: raise ConfigError(f'{r.path}: the stages go round in a loop: {" -> ".join(e.args[1])}') from None


def _check_stage(r: Recipe, s: Stage, err):
    sec = f'stage.{s.name}'
    if s.init:
        if s.init not in r.stages: err(sec, 'init', s.init, f'no such stage; stages: {", ".join(r.stages)}')
        p = r.stages[s.init]
        if (p.arch, p.head) != (s.arch, s.head):
            err(sec, 'init', s.init, f'that stage is {p.arch} + {p.head}, this one {s.arch} + {s.head}; they must be equal')
    if s.folds > r.splits: err(sec, 'folds', s.folds, f'[recipe] splits = {r.splits} is the most')
    for teacher, table in s.sources:
        if table not in r.tables: err(sec, 'train', table, f'no such table; tables: {", ".join(r.tables)}')
        if teacher and teacher not in r.nodes:
            err(sec, 'train', f'{teacher}:{table}', f'no such stage or ensemble; there are {", ".join(r.nodes)}')
        if teacher and r.tables[table].graded: err(sec, 'train', f'{teacher}:{table}', 'this table has grades of its own')
        if not teacher and not r.tables[table].graded:
            err(sec, 'train', table, f'this table has no grades; STAGE:{table} is that stage\'s labels for it')
    if s.source_weights and (len(s.source_weights) != len(s.train) or not all(s.source_weights)):
        err(sec, 'source_weights', ' '.join(map(str, s.source_weights)), f'{len(s.train)} numbers above 0 are needed, one for each of {" ".join(s.train)}')
    if all(t for t, _ in s.sources): err(sec, 'train', ' '.join(s.train), 'a graded table is needed beside the pseudo-labelled')
    for parent in s.parents:
        for m in r.members(parent):
            if m in r.stages and r.stages[m].folds < s.folds:
                err(sec, 'folds', s.folds, f'{m}, which it builds on, has only {r.stages[m].folds}')
