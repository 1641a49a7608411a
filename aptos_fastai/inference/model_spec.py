"What a model is, apart from its weights: networks, preprocessing, thresholds, prediction sets."
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load

from aptos_fastai.common.io import AptosError, digest, read_record, verify_file, write_bytes
from aptos_fastai.data.retina import Prep, square_of
from aptos_fastai.decisions import DecisionSpec, decision_of_record
from aptos_fastai.inference.eyes import FUSES, EyesSpec, eyes_of_record
from aptos_fastai.inference.gate import FeatureDistance, GateSpec, fit_gate, gate_of_record
from aptos_fastai.inference.referral import fit_decision
from aptos_fastai.metrics import (
    MIDPOINTS,
    Calibration,
    PredictionSets,
    stratified_group_parts,
    thresholds_or_midpoints,
    upper_quantile,
)
from aptos_fastai.recipe.sections import Refer, parse_thresholds
from aptos_fastai.run_folder import FEATURES, FINISHED, PREDS, WEIGHTS, training_keys
from aptos_fastai.training.model import body_stats
from aptos_fastai.training.networks import create_model

BUNDLE = 'bundle.json'                       # its presence means that a bundle is complete
NOT_REPORTED = ('no kappa of these networks is recorded: they were trained or scored again after the last '
                '`all`, or without one')
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
    fold: int = 0                            # the fold whose images validated it
    distance: str = ''                       # its `FeatureDistance` (safetensors), relative to the model's root folder
    distance_sha256: str = ''
    distance_unit: float = 1.                # its distances are divided by this before they are averaged
    loss: str = 'smooth_l1'                  # what the network puts out (`training.outputs`)
    prepared: int = 0                        # side of the prepared squares that it reads, pixels; 0: `ModelSpec.prep`


@dataclass(frozen=True)
class ModelSpec:
    "All that turns an image into a grade, except the weights"
    name: str
    prep: Prep                               # its size is the largest of the members' `prepared`
    members: tuple[MemberSpec, ...]
    thresholds: tuple[float, ...]
    coverage: float                          # of the `PredictionSets`
    synthetic: bool
    calibration: Calibration = ()            # distances that the prediction sets are fitted on; empty: all grades
    kappa: str = ''                          # out-of-fold, with its interval and what that interval resamples
    warnings: tuple[str, ...] = ()           # that every figure of the model needs
    gate: GateSpec = GateSpec()              # what counts as a gradable fundus image
    decision: DecisionSpec = DecisionSpec()  # which images are referred, and the probabilities of the grades
    eyes: EyesSpec | None = None             # what grades by both eyes of a patient; all else grades an image alone

    @property
    def digests(self) -> dict[str, str]:
        """Short hashes of what predictions depend on: weights, thresholds, gate, operating_point, and all as `model`.

        A model that fuses both eyes has one of `eyes`, too.
        They are equal for a run and its bundle, and different for two models of one name.
        """
        members = [{k: v for k, v in asdict(m).items() if k not in ('file', 'distance') and (k, v) != ('prepared', 0)}
                   for m in self.members]
        decision = asdict(self.decision)
        decision['points'] = [[o.lowest_grade, o.threshold] for o in self.decision.points]
        parts = dict(weights=[members, asdict(self.prep)], gate=asdict(self.gate), operating_point=decision,
                     thresholds=[self.thresholds, self.coverage, self.calibration])
        if self.eyes: parts['eyes'] = self.eyes.predicts_by
        short = {name: digest(value)[:12] for name, value in parts.items()}
        return dict(model=digest(short)[:12], **short)

    @property
    def key(self) -> str:
        "A short hash of everything that the predictions depend on"
        return self.digests['model']

    @property
    def prediction_sets(self) -> PredictionSets:
        "The fitted prediction sets"
        return PredictionSets(self.coverage, self.calibration)

    @property
    def sizes(self) -> set[int]:
        "The sides of the squares that the networks take, pixels"
        return {m.size for m in self.members}

    @property
    def prepared(self) -> dict[int, int]:
        "Side of each input square -> side of the prepared square that it is read from, pixels"
        return {m.size: m.prepared or self.prep.size for m in self.members}

    def squares(self, jpegs: dict[int, bytes]) -> dict[int, np.ndarray]:
        "Return the input square for each side from the prepared JPEGs of an image, by their sides"
        return {size: square_of(jpegs[side], replace(self.prep, size=side), size)
                for size, side in self.prepared.items()}

    def fold_scores(self, scores: Sequence[np.ndarray]) -> np.ndarray:
        "Return the scores (n, folds) by the networks of each fold from the scores (n,) of each member"
        folds = sorted({m.fold for m in self.members})
        weights = np.array([[m.weight * (m.fold == k) for k in folds] for m in self.members])
        return np.stack(scores, 1) @ (weights / weights.sum(0))


def _fold_member(root: Path, folder: Path, weight: float) -> tuple[MemberSpec, dict]:
    "Return a finished fold as a member, and the fold's record"
    record = read_record(folder / FINISHED)
    if not record: raise AptosError(NO_FOLD.format(folder))
    s = record['settings']
    mean, std = body_stats(s['arch'], record.get('mean', ()), record.get('std', ()))      # older records lack them
    if FEATURES not in record['files']: raise AptosError(f'{folder}: written by an older version. Run `all` again.')
    member = MemberSpec(
        file=(folder / WEIGHTS).relative_to(root).as_posix(), sha256=record['files'][WEIGHTS]['sha256'],
        arch=s['arch'], head=record.get('pooling', s['head']), loss=s['loss'], size=s['size'], tta=s['tta'],
        mean=tuple(map(float, mean)), std=tuple(map(float, std)), weight=weight, fold=record['fold'],
        distance=(folder / FEATURES).relative_to(root).as_posix(), distance_sha256=record['files'][FEATURES]['sha256'])
    return member, record


def _folds_model(root: Path, name: str, folds: dict[str, float], thresholds: Iterable[float],
                 sets: PredictionSets, gate: GateSpec, decision: DecisionSpec, units: dict[str, float],
                 kappa: str = '', warnings: Iterable[str] = ()) -> ModelSpec:
    """Return the weighted mean of finished folds (folder relative to `root` -> weight).

    `units` are the units of feature distances of each stage.
    """
    members, records = [], []
    for folder, weight in folds.items():
        member, record = _fold_member(root, root / folder, weight)
        members.append(replace(member, distance_unit=units[folder.rpartition('/')[0]]))
        records.append(record)
    prep, members = _with_preparation(root, members, [Prep(**r['prep']) for r in records])
    return ModelSpec(
        name=name, prep=prep, members=tuple(members), thresholds=tuple(map(float, thresholds)),
        coverage=sets.coverage, calibration=sets.calibration_, synthetic=records[0]['synthetic'], kappa=kappa,
        warnings=tuple(warnings), gate=gate, decision=decision)


def _with_preparation(root: Path, members: list[MemberSpec], preps: list[Prep]) -> tuple[Prep, list[MemberSpec]]:
    """Return how the images of a model are prepared, and its members with the sides of their prepared squares.

    Members of one input size must read the same squares. Raises `AptosError`.
    """
    largest = max(preps, key=lambda o: o.size)
    ways = len({replace(o, size=0) for o in preps})
    sides = {(m.size, o.size) for m, o in zip(members, preps, strict=True)}
    ways = max(ways, len(sides) - len({size for size, _ in sides}) + 1)
    if ways > 1:
        raise AptosError(f'{root}: its stages were trained on images prepared in {ways} ways. Run `all` again.')
    return largest, [replace(m, prepared=0 if o.size == largest.size else o.size)
                     for m, o in zip(members, preps, strict=True)]


def read_model(path: str | Path) -> tuple[ModelSpec, Path]:
    """Return the model at `path` and the folder that its weights are relative to.

    `path` is a bundle (made by `export`), a run folder <runs>/<recipe> (the model of its submission) or the folder of a
    stage (the mean of its folds). Raises `AptosError` if it is none of them.
    """
    root = Path(path)
    bundle = read_record(root / BUNDLE)
    if bundle: return _bundle_model(bundle), root
    summary = read_record(root / 'summary.json')
    if summary: return run_model(root, summary), root
    if read_record(root / 'fold0' / FINISHED): return _stage_model(root), root.parent
    raise AptosError(f'{root}: no model here. Give a bundle ({BUNDLE}), a finished run (<runs>/<recipe>) '
                     'or the folder of a stage in it.')


def _bundle_model(bundle: dict) -> ModelSpec:
    "Return the model of a bundle's record"
    o = bundle['model']
    if 'decision' not in o: raise AptosError('bundle.json: written by an older version. Export the run again.')
    parts = dict(prep=Prep(**o['prep']), members=tuple(MemberSpec(**m) for m in o['members']),
                 gate=gate_of_record(o['gate']), decision=decision_of_record(o['decision']),
                 eyes=eyes_of_record(o.get('eyes')))
    return ModelSpec(**{**o, **parts})


def run_model(root: Path, summary: dict) -> ModelSpec:
    """Return the model that made a run's submission.

    Raises `AptosError` if its stages were trained again since, or their validation images scored again: its thresholds
    and sets belong to the old weights and scores.
    """
    s = summary['submission']
    if 'scores' not in s:
        raise AptosError(f'{root / "summary.json"}: written by an older version. Run `all` again.')
    name = f'{summary["recipe"]}/{s["node"]}'
    folds = Counter(folder.rpartition('/')[0] for folder in s['weights'])         # of each stage
    weights = {folder: s['members'][folder.rpartition('/')[0]] / folds[folder.rpartition('/')[0]]
               for folder in s['weights']}
    sets = PredictionSets(s['coverage'], s['calibration'])
    gate = gate_of_record(s['gate'])
    decision, eyes = decision_of_record(s['decision']), eyes_of_record(s.get('eyes'))
    warnings = [*s['warnings'], FUSES] if eyes else s['warnings']
    model = _folds_model(root, name, weights, s['thresholds'], sets, gate, decision, s['distance_units'],
                         s['kappa_text'], warnings)
    model = replace(model, eyes=eyes)
    for member, sha256 in zip(model.members, s['weights'].values(), strict=True):
        if member.sha256 == sha256: continue
        raise AptosError(f'{root}: {PurePosixPath(member.file).parent} was trained again after the submission was '
                         'made; its thresholds belong to the old weights. Run `all` again.')
    for member in model.members:
        folder = PurePosixPath(member.file).parent
        if _scores_hash(root / folder) == s['scores'].get(str(folder)): continue
        raise AptosError(f'{root}: the validation images of {folder} were scored again with tta = {member.tta} after '
                         'the submission was made; its thresholds belong to the old scores. Run `all` again, which '
                         'trains nothing for it.')
    return model


def _scores_hash(folder: Path) -> str:
    "Return the recorded SHA-256 of the validation scores of a finished fold"
    return (read_record(folder / FINISHED) or {})['files'][PREDS]['sha256']


def _stage_model(folder: Path) -> ModelSpec:
    """Return the mean of a stage's folds as the run's summary.json reports it; prediction sets and gate are fitted.

    A stage that was trained or scored after the last `all`, or without one, has the thresholds of its own setting and
    no kappa.
    Raises `AptosError` if its folds were not trained alike.
    """
    root, name = folder.parent, folder.name
    records = _finished_folds(folder)
    summary = read_record(root / 'summary.json') or {}
    result = next((o for o in summary.get('stages', []) if o['stage'] == name), None)
    reported = _hashes_in(result or {})
    current = {f'{name}/{fold}': tuple(r['files'][file]['sha256'] for file in (WEIGHTS, PREDS))
               for fold, r in records.items()}
    is_reported = reported and all(current.get(fold) == hashes for fold, hashes in reported.items())
    if is_reported: records = {fold: r for fold, r in records.items() if f'{name}/{fold}' in reported}
    _check_trained_alike(folder, records)
    oof = pd.concat([pd.read_csv(preds_file(folder / fold), dtype=dict(id_code=str)) for fold in records])
    if result and is_reported:
        thresholds, kappa, warnings = result['thresholds'], result['kappa_text'], result['warnings']
        coverage, gate_keys = summary['submission']['coverage'], summary['submission']['gate']
        decision = decision_of_record(result['decision'])
    else:
        first = next(iter(records.values()))
        thresholds, kappa, warnings = _own_thresholds(first['settings']['thresholds'], oof), '', [NOT_REPORTED]
        coverage, gate_keys = STAGE_COVERAGE, first['gate']
        decision, notes = _own_decision(name, oof)
        warnings += notes
    sets = PredictionSets(coverage).fit(oof.score, oof.diagnosis, oof.fold)
    unit = upper_quantile(oof.feature_distance, gate_keys['reject'])
    gate = fit_gate([r['gate']['rules'] for r in records.values()], oof.feature_distance / unit, oof.score,
                    gate_keys['reject'], gate_keys['ungradable'])
    weights = dict.fromkeys((f'{name}/{fold}' for fold in records), 1 / len(records))
    return _folds_model(root, f'{root.name}/{name}', weights, thresholds, sets, gate, decision, {name: unit}, kappa,
                        warnings)


def _hashes_in(result: dict) -> dict[str, tuple[str, str | None]]:
    "Return STAGE/foldK -> SHA-256 of weights and validation scores, of an entry of `stages` in summary.json"
    weights, scores = result.get('weights', {}), result.get('scores', {})
    return {fold: (sha256, scores.get(fold)) for fold, sha256 in weights.items()}


def _finished_folds(folder: Path) -> dict[str, dict]:
    "Return fold0, fold1, … of a stage with their records; a fold that is not finished is left out"
    folds = sorted(folder.glob(f'fold*/{FINISHED}'), key=lambda f: int(f.parent.name.removeprefix('fold')))
    records = {f.parent.name: read_record(f) for f in folds}
    if any(r and 'gate' not in r for r in records.values()):
        raise AptosError(f'{folder}: written by an older version. Run `all` again.')
    return {fold: r for fold, r in records.items() if r}


def _check_trained_alike(folder: Path, records: dict[str, dict]) -> None:
    "Raise `AptosError` if folds are of another stage or were trained with other settings"
    def training(r: dict) -> str:
        return digest([r['stage'], training_keys(r['settings']), r['augment'], r['prep'], r['seed']])
    first = next(iter(records))
    for fold, r in records.items():
        if r['stage'] == folder.name and training(r) == training(records[first]): continue
        raise AptosError(f'{folder / fold}: was trained as {r["stage"]} with other settings than {first}, and '
                         f'{folder.parent / "summary.json"} does not report this stage. Delete {folder / fold} or run '
                         '`all` again.')


def _own_thresholds(how: str, oof: pd.DataFrame) -> Iterable[float]:
    return parse_thresholds(how) or thresholds_or_midpoints(how, oof.score, oof.diagnosis)[0]


def _own_decision(stage: str, oof: pd.DataFrame) -> tuple[DecisionSpec, list[str]]:
    "Return what a stage without a summary decides, by the defaults of [refer]; its patients are not known here"
    oof = oof.reset_index(drop=True).assign(group=oof.source.to_numpy() + ':' + oof.id_code.to_numpy())
    parts = oof.fold.to_numpy() if oof.fold.nunique() > 2 else stratified_group_parts(oof.diagnosis, oof.group)
    chosen_on = f'out-of-fold scores of {stage}, {len(oof)} images'
    return fit_decision(Refer(), oof, parts, chosen_on, STAGE_COVERAGE)


def preds_file(folder: Path) -> Path:
    "Return the file of validation scores of a finished fold, its SHA-256 checked. Raises `AptosError`"
    record = read_record(folder / FINISHED)
    if not record: raise AptosError(NO_FOLD.format(folder))
    return verify_file(folder / PREDS, record['files'][PREDS]['sha256'], 'Train again.')


def read_net(member: MemberSpec, root: Path) -> torch.nn.Module:
    "Return the network of a member in eval mode. Raises `AptosError` if its weights are missing or changed"
    net = create_model(member.arch, member.head, member.size, loss=member.loss)
    net.load_state_dict(load(_verified_bytes(root, member.file, member.sha256)))
    return net.eval().to(memory_format=torch.channels_last)


def read_distance(member: MemberSpec, root: Path) -> FeatureDistance:
    "Return the `FeatureDistance` of a member. Raises `AptosError` if its file is missing or changed"
    return FeatureDistance.from_bytes(_verified_bytes(root, member.distance, member.distance_sha256))


def _verified_bytes(root: Path, name: str, sha256: str) -> bytes:
    "Return the content of a model's file. Raises `AptosError` if it is outside `root`, missing or changed"
    file = root / name
    if not file.resolve().is_relative_to(root.resolve()):
        raise AptosError(f'{name}: lies outside {root}. Do not trust this bundle.')
    return verify_file(file, sha256, 'Export or train again.').read_bytes()


def fold_model(root: Path, stages: dict[str, float], fold: int) -> ModelSpec:
    """Return one fold of `stages` (folder -> weight) as a model without TTA and with the midpoints as thresholds.

    It shows a validation image only to networks that were not trained on it.
    """
    found = [_fold_member(root, root / stage / f'fold{fold}', weight) for stage, weight in stages.items()]
    records = [record for _, record in found]
    members = [replace(m, tta='none') for m, _ in found]
    prep, members = _with_preparation(root, members, [Prep(**r['prep']) for r in records])
    return ModelSpec(f'fold{fold}', prep, tuple(members), MIDPOINTS, STAGE_COVERAGE, records[0]['synthetic'])


def copy_members(model: ModelSpec, root: Path, folder: Path) -> ModelSpec:
    "Copy the weights of a model from `root` into `folder`, and return the model with the new file names"
    members = []
    for m in model.members:
        names = []
        for file, sha256 in ((m.file, m.sha256), (m.distance, m.distance_sha256)):
            names.append(file.replace('/', '-').replace('\\', '-'))
            write_bytes(folder / names[-1], verify_file(root / file, sha256, 'Train again.').read_bytes())
        members.append(replace(m, file=names[0], distance=names[1]))
    return replace(model, members=tuple(members))
