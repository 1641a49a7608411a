"What travels with the weights of a model."
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load

from aptos_fastai.common.io import AptosError, digest, file_hash, read_record
from aptos_fastai.data.retina import Prep
from aptos_fastai.metrics import GRADES, MIDPOINTS, PredictionSets, fit_thresholds
from aptos_fastai.recipe import Stage, parse_thresholds
from aptos_fastai.run_folder import FINISHED, PREDS, WEIGHTS
from aptos_fastai.training.model import body_stats, create_model


@dataclass(frozen=True)
class MemberSpec:
    "One network of a model: a fold of a stage"
    file: str                                # its weights (safetensors), inside the model's folder
    sha256: str
    arch: str
    head: str
    size: int                                # side of the square it sees, pixels
    tta: str
    mean: tuple[float, ...]                  # of the images, 0-1
    std: tuple[float, ...]
    weight: float                            # of its score in the mean; they add up to 1


@dataclass(frozen=True)
class ModelSpec:
    "What turns an image into a grade, but for the weights themselves"
    name: str
    prep: Prep
    members: tuple[MemberSpec, ...]
    thresholds: tuple[float, ...]
    radius: tuple[float | None, ...]          # of `PredictionSets`; None: no end
    coverage: float
    synthetic: bool

    @property
    def key(self) -> str: return digest(asdict(self))[:12]


def _member(root: Path, folder: Path, weight: float) -> tuple[MemberSpec, dict]:
    "A finished fold as a member, and its record"
    rec = read_record(folder / FINISHED)
    if not rec: raise AptosError(f'{folder}: holds no finished fold; run `all` or `train`')
    s = rec['settings']
    mean, std = body_stats(s['arch'])
    return MemberSpec(str((folder / WEIGHTS).relative_to(root)), rec['files'][WEIGHTS]['sha256'], s['arch'], s['head'], s['size'], s['tta'],
                  tuple(map(float, mean)), tuple(map(float, std)), weight), rec


def _model(root: Path, name: str, stages: dict[str, float], thresholds, radius, coverage: float) -> ModelSpec:
    "The mean over `stages` (folder -> weight) and their folds"
    found = []
    for s, w in stages.items():
        folds = sorted((root / s).glob('fold*'), key=lambda p: int(p.name[4:]))
        found += [_member(root, f, w / len(folds)) for f in folds]
    if not found: raise AptosError(f'{root}: holds no finished fold; run `all` or `train`')
    preps = {digest(r['prep']): r['prep'] for _, r in found}
    if len(preps) > 1: raise AptosError(f'{root}: its stages were trained on images prepared in {len(preps)} ways; run `all` again')
    return ModelSpec(name, Prep(**found[0][1]['prep']), tuple(m for m, _ in found), tuple(map(float, thresholds)),
                 tuple(None if not np.isfinite(r) else float(r) for r in radius), coverage, found[0][1]['synthetic'])


def read_model(path: str | Path) -> tuple[ModelSpec, Path]:
    """The model of a bundle (`export`), a run folder <runs>/<recipe> (its final answer) or a stage's folder (the mean of its folds), and the folder
    its weights are relative to. Raises `AptosError` where `path` is none of them."""
    root = Path(path)
    bundle, summary = (read_record(root / f) for f in ('bundle.json', 'summary.json'))
    if bundle:
        o = bundle['model']
        return ModelSpec(**{**o, 'prep': Prep(**o['prep']), 'members': tuple(MemberSpec(**m) for m in o['members'])}), root
    if summary:
        s = summary['submission']
        if 'weights' not in s: raise AptosError(f'{root / "summary.json"}: was written by an older version; run `all` again')
        radius = [np.inf if r is None else r for r in s['radius']]
        model = _model(root, f'{summary["recipe"]}/{s["node"]}', s['members'], s['thresholds'], radius, s['coverage'])
        if {str(Path(m.file).parent): m.sha256 for m in model.members} != s['weights']:
            raise AptosError(f'{root}: was trained anew since its answers were made; run `all` again, its thresholds belong to the old weights')
        return model, root
    if (root / 'fold0' / FINISHED).is_file():
        how, coverage = read_record(root / 'fold0' / FINISHED)['settings']['thresholds'], .9
        o = pd.concat([_preds(f) for f in sorted(root.glob(f'fold*/{PREDS}'))])
        thresholds = parse_thresholds(how) or fit_thresholds(how, o.score, o.diagnosis)
        radius = PredictionSets(coverage).fit(o.score, o.diagnosis).radius_
        return _model(root.parent, f'{root.parent.name}/{root.name}', {root.name: 1.}, thresholds, radius, coverage), root.parent
    raise AptosError(f'{root}: is no model; name a bundle (bundle.json), a finished run (<runs>/<recipe>) or a stage\'s folder in it')


def _preds(file: Path) -> pd.DataFrame:
    "Validation scores of a finished fold, their hash as recorded"
    rec = read_record(file.parent / FINISHED)
    if not rec or file_hash(file) != rec['files'][PREDS]['sha256']: raise AptosError(f'{file}: is not what was written (its hash differs); train again')
    return pd.read_csv(file)


def read_net(member: MemberSpec, root: Path) -> torch.nn.Module:
    "The network of a member, its weights checked by their hash. Raises `AptosError`"
    file = root / member.file
    if not file.resolve().is_relative_to(root.resolve()): raise AptosError(f'{member.file}: lies outside {root}; this bundle is not to be trusted')
    if not file.is_file(): raise AptosError(f'{file}: is gone; export or train again')
    if file_hash(file) != member.sha256: raise AptosError(f'{file}: is not what was written (its hash differs); export or train again')
    net = create_model(Stage(member.file, ('',), arch=member.arch, head=member.head, size=member.size))
    net.load_state_dict(load(file.read_bytes()))
    return net.eval().to(memory_format=torch.channels_last)


def fold_model(root: Path, stages: dict[str, float], fold: int) -> ModelSpec:
    "The networks of one fold of `stages` (folder -> weight) with a single view and no thresholds of their own, as a validated image met them"
    found = [_member(root, root / s / f'fold{fold}', w) for s, w in stages.items()]
    rec = found[0][1]
    return ModelSpec(f'fold{fold}', Prep(**rec['prep']), tuple(replace(m, tta='none') for m, _ in found), MIDPOINTS, (None,) * GRADES, .9, rec['synthetic'])
