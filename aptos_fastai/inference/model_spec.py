"What a model is, apart from its weights: networks, preprocessing, thresholds, prediction sets."
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load

from aptos_fastai.common.io import AptosError, digest, read_record, verify_file, write_bytes
from aptos_fastai.data.retina import Prep
from aptos_fastai.metrics import GRADES, MIDPOINTS, PredictionSets, fit_thresholds
from aptos_fastai.recipe import parse_thresholds
from aptos_fastai.run_folder import FINISHED, PREDS, WEIGHTS
from aptos_fastai.training.model import body_stats, create_model

BUNDLE = 'bundle.json'                       # its presence means that a bundle is complete
STAGE_COVERAGE = .9                          # of the prediction sets of a model that is one stage of a run
NO_FOLD = '{}: no finished fold here. Run `all` or `train`.'
SYNTHETIC_MODEL = 'SYNTHETIC: this model was trained on generated images; its grades have no clinical meaning'


@dataclass(frozen=True)
class MemberSpec:
    "One network of a model: one fold of a stage"
    file: str                                # weights (safetensors), relative to the model's root folder
    sha256: str                              # of the weights
    arch: str
    head: str
    size: int                                # side of the input square, pixels
    tta: str
    mean: tuple[float, ...]                  # of the images, 0-1
    std: tuple[float, ...]
    weight: float                            # in the weighted mean of the scores; the weights add up to 1


@dataclass(frozen=True)
class ModelSpec:
    "All that turns an image into a grade, except the weights"
    name: str
    prep: Prep
    members: tuple[MemberSpec, ...]
    thresholds: tuple[float, ...]
    radius: tuple[float | None, ...]         # of the `PredictionSets`, one for each grade; None: infinite
    coverage: float
    synthetic: bool

    @property
    def key(self) -> str:
        "A short hash of everything in the specification"
        return digest(asdict(self))[:12]

    @property
    def prediction_sets(self) -> PredictionSets:
        "The fitted prediction sets"
        sets = PredictionSets(self.coverage)
        sets.radius_ = np.array([np.inf if r is None else r for r in self.radius])
        return sets

    @property
    def sizes(self) -> set[int]:
        "The sides of the squares that the networks take, pixels"
        return {m.size for m in self.members}


def _finite(radius: Iterable[float]) -> tuple[float | None, ...]:
    "Return radii as JSON can hold them: None for infinity"
    return tuple(float(r) if np.isfinite(r) else None for r in radius)


def _fold_member(root: Path, folder: Path, weight: float) -> tuple[MemberSpec, dict]:
    "Return a finished fold as a member, and the fold's record"
    record = read_record(folder / FINISHED)
    if not record: raise AptosError(NO_FOLD.format(folder))
    s = record['settings']
    mean, std = body_stats(s['arch'])
    member = MemberSpec(
        file=(folder / WEIGHTS).relative_to(root).as_posix(), sha256=record['files'][WEIGHTS]['sha256'],
        arch=s['arch'], head=s['head'], size=s['size'], tta=s['tta'],
        mean=tuple(map(float, mean)), std=tuple(map(float, std)), weight=weight)
    return member, record


def _stages_model(root: Path, name: str, stages: dict[str, float], thresholds: Iterable[float],
                  radius: Iterable[float | None], coverage: float) -> ModelSpec:
    "Return the model that averages `stages` (folder -> weight) and their folds"
    members, records = [], []
    for stage, weight in stages.items():
        folds = sorted((root / stage).glob('fold*'), key=lambda p: int(p.name.removeprefix('fold')))
        for folder in folds:
            member, record = _fold_member(root, folder, weight / len(folds))
            members.append(member)
            records.append(record)
    if not members: raise AptosError(NO_FOLD.format(root))
    ways = len({digest(r['prep']) for r in records})
    if ways > 1:
        raise AptosError(f'{root}: its stages were trained on images prepared in {ways} ways. Run `all` again.')
    return ModelSpec(
        name=name, prep=Prep(**records[0]['prep']), members=tuple(members), thresholds=tuple(map(float, thresholds)),
        radius=tuple(radius), coverage=coverage, synthetic=records[0]['synthetic'])


def read_model(path: str | Path) -> tuple[ModelSpec, Path]:
    """Return the model at `path` and the folder that its weights are relative to.

    `path` is a bundle (made by `export`), a run folder <runs>/<recipe> (the model of its submission) or the folder of a
    stage (the mean of its folds). Raises `AptosError` if it is none of them.
    """
    root = Path(path)
    bundle = read_record(root / BUNDLE)
    if bundle: return _bundle_model(bundle), root
    summary = read_record(root / 'summary.json')
    if summary: return _run_model(root, summary), root
    first_fold = read_record(root / 'fold0' / FINISHED)
    if first_fold: return _stage_model(root, first_fold['settings']['thresholds']), root.parent
    raise AptosError(f'{root}: no model here. Give a bundle ({BUNDLE}), a finished run (<runs>/<recipe>) '
                     'or the folder of a stage in it.')


def _bundle_model(bundle: dict) -> ModelSpec:
    "Return the model of a bundle's record"
    o = bundle['model']
    return ModelSpec(**{**o, 'prep': Prep(**o['prep']), 'members': tuple(MemberSpec(**m) for m in o['members'])})


def _run_model(root: Path, summary: dict) -> ModelSpec:
    "Return the model that made a run's submission. Raises `AptosError` if its stages were trained again since"
    s = summary['submission']
    if 'weights' not in s: raise AptosError(f'{root / "summary.json"}: written by an older version. Run `all` again.')
    name = f'{summary["recipe"]}/{s["node"]}'
    model = _stages_model(root, name, s['members'], s['thresholds'], s['radius'], s['coverage'])
    now = {PurePosixPath(m.file).parent.as_posix(): m.sha256 for m in model.members}
    if now != s['weights']:
        raise AptosError(f'{root}: stages were trained again after the submission was made; its thresholds belong to '
                         'the old weights. Run `all` again.')
    return model


def _stage_model(folder: Path, how: str) -> ModelSpec:
    "Return the mean of a stage's folds, its thresholds (method `how`) and prediction sets fitted on out-of-fold scores"
    oof = pd.concat([_read_preds(f) for f in sorted(folder.glob(f'fold*/{PREDS}'))])
    thresholds = parse_thresholds(how) or fit_thresholds(how, oof.score, oof.diagnosis)
    sets = PredictionSets(STAGE_COVERAGE).fit(oof.score, oof.diagnosis)
    name = f'{folder.parent.name}/{folder.name}'
    return _stages_model(folder.parent, name, {folder.name: 1.}, thresholds, _finite(sets.radius_), STAGE_COVERAGE)


def _read_preds(file: Path) -> pd.DataFrame:
    "Return the validation scores of a finished fold, their SHA-256 checked"
    record = read_record(file.parent / FINISHED)
    if not record: raise AptosError(NO_FOLD.format(file.parent))
    return pd.read_csv(verify_file(file, record['files'][PREDS]['sha256'], 'Train again.'))


def read_net(member: MemberSpec, root: Path) -> torch.nn.Module:
    "Return the network of a member in eval mode. Raises `AptosError` if its weights are missing or changed"
    file = root / member.file
    if not file.resolve().is_relative_to(root.resolve()):
        raise AptosError(f'{member.file}: lies outside {root}. Do not trust this bundle.')
    verify_file(file, member.sha256, 'Export or train again.')
    net = create_model(member.arch, member.head, member.size)
    net.load_state_dict(load(file.read_bytes()))
    return net.eval().to(memory_format=torch.channels_last)


def fold_model(root: Path, stages: dict[str, float], fold: int) -> ModelSpec:
    """Return one fold of `stages` (folder -> weight) as a model without TTA and with the midpoints as thresholds.

    It shows a validation image only to networks that were not trained on it.
    """
    found = [_fold_member(root, root / stage / f'fold{fold}', weight) for stage, weight in stages.items()]
    members = tuple(replace(m, tta='none') for m, _ in found)
    record = found[0][1]
    prep, synthetic = Prep(**record['prep']), record['synthetic']
    return ModelSpec(f'fold{fold}', prep, members, MIDPOINTS, (None,) * GRADES, STAGE_COVERAGE, synthetic)


def copy_members(model: ModelSpec, root: Path, folder: Path) -> ModelSpec:
    "Copy the weights of a model from `root` into `folder`, and return the model with the new file names"
    members = []
    for m in model.members:
        name = m.file.replace('/', '-').replace('\\', '-')
        source = verify_file(root / m.file, m.sha256, 'Train again.')
        write_bytes(folder / name, source.read_bytes())
        members.append(replace(m, file=name))
    return replace(model, members=tuple(members))
