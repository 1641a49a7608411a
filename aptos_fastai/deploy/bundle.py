"Export a finished run as a bundle for use elsewhere: safetensors, JSON, ONNX and a model card."
import shutil
import warnings
from dataclasses import asdict
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import nn

import aptos_fastai
from aptos_fastai.common.console import Bars, say, table
from aptos_fastai.common.disclaimer import DISCLAIMER
from aptos_fastai.common.io import AptosError, file_hash, read_record, write_bytes, write_csv, write_record
from aptos_fastai.data.retina import Prep, prepare, square_of
from aptos_fastai.inference.grader import Grader, Squares, load_grader
from aptos_fastai.inference.measures import EVALUATION, EVALUATIONS, is_of_model
from aptos_fastai.inference.model_spec import BUNDLE, MemberSpec, ModelSpec, copy_members, read_model
from aptos_fastai.inference.training_images import BUNDLE_IMAGES, training_images
from aptos_fastai.inference.views import mean_and_sd
from aptos_fastai.metrics import GRADE_NAMES, apply_thresholds
from aptos_fastai.pipeline.summary import OUT_OF_FOLD, SETS_CONDITION
from aptos_fastai.recipe import parse_thresholds
from aptos_fastai.reports.evaluation_report import measure_text
from aptos_fastai.reports.html import render
from aptos_fastai.run_folder import FINISHED
from aptos_fastai.training.model import features_and_scores
from aptos_fastai.training.precision import has_bf16

BUNDLE_FORMAT = 2
MAX_DIFFERENCE = dict(f32=.01, bf16=.1)      # of a score, from PyTorch f32
MAX_CHANGED = dict(f32=0., bf16=.01)         # share of the grades that may change (in bf16 one grade always may)
COMPARED = ('onnx', 'f32'), ('openvino', 'f32'), ('openvino', 'bf16'), ('torch', 'bf16')
PACKAGES = dict(torch='torch', onnx='onnxruntime', openvino='openvino')
PARITY_IMAGES = 24


class NetOfSquares(nn.Module):
    "A network with its normalisation: squares (n, side, side, 3) uint8 RGB -> scores (n,), pooled features (n, C)"
    def __init__(self, net: nn.Module, member: MemberSpec):
        super().__init__()
        self.net = net
        self.register_buffer('mean', 255 * torch.tensor(member.mean))
        self.register_buffer('std', 255 * torch.tensor(member.std))

    def forward(self, squares):
        "Return the scores and the pooled features"
        x = (squares.float() - self.mean) / self.std
        features, scores = features_and_scores(self.net, x.permute(0, 3, 1, 2))
        return scores, features


def write_onnx(net: nn.Module, member: MemberSpec, file: Path) -> None:
    "Write a member's network as ONNX: input `squares` (n, side, side, 3) uint8 RGB, outputs `score`, `features`"
    if find_spec('onnxscript') is None:      # the exporter of PyTorch needs it
        raise AptosError('ONNX needs the extra export. Run `pip install onnx onnxscript onnxruntime`.')
    squares = torch.zeros(2, member.size, member.size, 3, dtype=torch.uint8)
    batch = torch.export.Dim('n', min=1, max=4096)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')      # of the exporter about its own parts
        torch.onnx.export(
            NetOfSquares(net.float().cpu(), member).eval(), (squares,), file, input_names=['squares'],
            output_names=['score', 'features'], dynamic_shapes=({0: batch},), dynamo=True, external_data=False,
            verbose=False)


class ParityImages(NamedTuple):
    "Prepared images on which backends are compared"
    jpegs: list[bytes]
    origin: str


def parity_images(root: Path, prep: Prep) -> ParityImages:
    "Return images of the run's store, or synthetic ones if the store is not there"
    store = root.parent / 'prepared' / prep.name
    files = sorted(islice(store.glob('*/*.jpg'), 10_000))
    if files:
        step = max(1, len(files) // PARITY_IMAGES)
        return ParityImages([f.read_bytes() for f in files[::step][:PARITY_IMAGES]], 'images of the run')
    from aptos_fastai.data.demo import CAMERAS, generate_fundus
    rng, cameras = np.random.default_rng(0), list(CAMERAS)
    jpegs = []
    for i in range(PARITY_IMAGES):
        im, _ = generate_fundus(rng, i % 5, cameras[i % len(cameras)], True)
        png = cv2.imencode('.png', im[..., ::-1])[1].tobytes()
        jpegs.append(prepare(png, prep)[0])
    return ParityImages(jpegs, 'synthetic images')


def compare_backends(folder: Path, jpegs: list[bytes]) -> list[dict]:
    """Compare every backend and precision that this machine has with PyTorch f32, on the same prepared images.

    Returns a dict for each: maximum and mean difference of a score, number of changed grades, and whether they are
    within the bounds.
    """
    reference = load_grader(folder)
    model = reference.model
    squares: Squares = {side: np.stack([square_of(j, model.prep, side) for j in jpegs]) for side in model.sizes}
    expected, expected_grades = _scores_and_grades(reference, squares)
    parity = []
    for backend, precision in COMPARED:
        if find_spec(PACKAGES[backend]) is None: continue
        if precision == 'bf16' and not has_bf16(): continue
        scores, grades = _scores_and_grades(load_grader(folder, backend, precision), squares)
        difference = np.abs(scores - expected)
        changed = int((grades != expected_grades).sum())
        parity.append(dict(
            backend=backend, precision=precision, images=len(jpegs), max_difference=float(difference.max()),
            mean_difference=float(difference.mean()), grades_changed=changed, bound=MAX_DIFFERENCE[precision],
            within_bounds=within_bounds(precision, float(difference.max()), changed, len(jpegs))))
    return parity


def _scores_and_grades(grader: Grader, squares: Squares) -> tuple[np.ndarray, np.ndarray]:
    "Return the scores (n,) and the grades; -1 where the features are too far from the training images"
    parts, distances = grader.scores_and_distances(squares)
    scores, _ = mean_and_sd(parts)
    limit = grader.model.gate.limit
    too_far = np.zeros(len(scores), bool) if limit is None else distances > limit
    return scores, np.where(too_far, -1, apply_thresholds(scores, grader.model.thresholds))


def within_bounds(precision: str, max_difference: float, changed: int, images: int) -> bool:
    "Return whether scores and grades differ as little as they must in this precision"
    allowed = max(1, MAX_CHANGED[precision] * images) if MAX_CHANGED[precision] else 0
    return max_difference <= MAX_DIFFERENCE[precision] and changed <= allowed


def lineage(root: Path, member: MemberSpec) -> dict:
    "Return where a member came from: what its stage's record holds and the bundle does not"
    record = read_record((root / member.file).parent / FINISHED)
    if not record: raise AptosError(f'{(root / member.file).parent}: no finished fold here. Run `all` or `train`.')
    keys = ('stage', 'fold', 'fingerprint', 'settings', 'augment', 'seed', 'images', 'kept_epoch', 'parents',
            'gate', 'versions')
    return {key: record[key] for key in keys}


def run_metrics(root: Path, model: ModelSpec) -> dict:
    "Return kappa and its interval of the stage or ensemble that a model is; {} if the run does not report them"
    summary = read_record(root / 'summary.json')
    if not summary or not model.kappa: return {}
    stage = next(s for s in summary['stages'] if s['stage'] == model.name.rpartition('/')[2])
    metrics = {key: stage[key] for key in ('kappa', 'kappa_interval', 'resampled', 'threshold_method', 'validated')}
    return metrics | dict(node=stage['stage'])


def export_run(path: str) -> None:
    """`export RUN`: write the bundle of a run's submission, or of a stage, to the folder `bundle` in it.

    Raises `AptosError` if ONNX scores differ from PyTorch's by more than `MAX_DIFFERENCE`; then no bundle is written.
    """
    model, root = read_model(path)
    if (Path(path) / BUNDLE).is_file(): raise AptosError(f'{path}: a bundle already. Give a run or a stage.')
    out, temp = Path(path) / 'bundle', Path(path) / '.bundle.tmp'
    shutil.rmtree(temp, ignore_errors=True)
    try:
        images = parity_images(root, model.prep)
        copy_evaluations(Path(path), out, temp)
        parity = _build(model, root, temp, images)
        shutil.rmtree(out, ignore_errors=True)
        temp.rename(out)
    finally: shutil.rmtree(temp, ignore_errors=True)
    _show_parity(parity, images)
    megabytes = sum(f.stat().st_size for f in out.iterdir()) / 1e6
    say(f'networks: {len(model.members)}, {megabytes:.0f} MB -> {out}: {BUNDLE}, weights, ONNX, MODEL_CARD.md')


def _build(model: ModelSpec, root: Path, folder: Path, images: ParityImages) -> list[dict]:
    "Write a bundle to `folder` and return its parity. Raises `AptosError` if an f32 backend is not within bounds"
    grader = Grader(model, root)
    bundled = copy_members(model, root, folder)
    with Bars() as bars, bars(f'exporting {model.name}', len(model.members), 'networks') as bar:
        for i, (original, copied) in enumerate(zip(model.members, bundled.members, strict=True), 1):
            write_onnx(grader.net(original), copied, (folder / copied.file).with_suffix('.onnx'))
            bar.to(i)
    origins, metrics = [lineage(root, m) for m in model.members], run_metrics(root, model)
    known, unknown = training_images(model, root)
    if known is not None: write_csv(folder / BUNDLE_IMAGES, known)
    write_bundle(folder, bundled, origins, metrics, [], images.origin, unknown)
    parity = compare_backends(folder, images.jpegs)
    for o in parity:
        if o['precision'] == 'f32' and not o['within_bounds']:
            raise AptosError(f'{root}: {o["backend"]} differs from PyTorch by {o["max_difference"]:.3f} in a score '
                             f'(maximum {o["bound"]}) and in {o["grades_changed"]} grades. Nothing was exported; '
                             f'try another version of {PACKAGES[o["backend"]]}.')
    write_bundle(folder, bundled, origins, metrics, parity, images.origin, unknown)
    return parity


def _show_parity(parity: list[dict], images: ParityImages) -> None:
    "Show how much each backend differs"
    rows = []
    for o in parity:
        verdict = 'yes' if o['within_bounds'] else 'no'
        rows.append([f'{o["backend"]} {o["precision"]}', f'{o["max_difference"]:.1e}', f'{o["mean_difference"]:.1e}',
                     o['grades_changed'], verdict])
    table(f'scores compared with PyTorch f32 on {len(images.jpegs)} {images.origin}',
          ['backend', 'max. difference', 'mean difference', 'grades changed', 'within bounds'], rows)
    if not has_bf16(): say('bf16 was not compared: this device does not support it', 'yellow')


def write_bundle(folder: Path, model: ModelSpec, origins: list[dict], metrics: dict, parity: list[dict],
                 parity_on: str, training_images: str = '') -> None:
    """Write MODEL_CARD.md, then bundle.json, whose presence means that the bundle is complete.

    `training_images` says what is not known of the images that the model was trained on.
    """
    suffixes = '.safetensors', '.onnx'
    files = {f.name: file_hash(f) for f in sorted(folder.iterdir()) if f.suffix in suffixes or f.name == BUNDLE_IMAGES}
    record = dict(
        format=BUNDLE_FORMAT, classes=list(GRADE_NAMES),
        licence='code: Apache-2.0; weights: as the tables they were trained on allow',
        model=asdict(model), metrics=metrics, parity=parity, parity_on=parity_on, lineage=origins, files=files,
        training_images=training_images, aptos_fastai=aptos_fastai.__version__)
    write_card(folder, model, record)
    write_record(folder / BUNDLE, record)


def write_card(folder: Path, model: ModelSpec, bundle: dict) -> None:
    "Write the MODEL_CARD.md of a bundle from its record and its evaluations"
    metrics = bundle['metrics']
    networks = [dict(stage=o['stage'], fold=o['fold'], arch=m.arch, size=m.size, train=o['images']['train'],
                     valid=o['images']['valid'], tables=', '.join(o['settings']['train']))
                for o, m in zip(bundle['lineage'], model.members, strict=True)]
    fixed = bool(metrics) and parse_thresholds(metrics['threshold_method'])
    card = render('MODEL_CARD.md', model=model, networks=networks, metrics=metrics, fixed_thresholds=fixed,
                  out_of_fold=OUT_OF_FOLD, sets_condition=SETS_CONDITION, parity=bundle['parity'],
                  parity_on=bundle['parity_on'], evaluations=evaluation_rows(folder, model), grade_names=GRADE_NAMES,
                  disclaimer=DISCLAIMER, version=bundle['aptos_fastai'])
    write_bytes(folder / 'MODEL_CARD.md', card.encode())


# Evaluations on other tables

def update_card(folder: Path) -> None:
    "Write the model card of a bundle again, with its evaluations; do nothing in another folder"
    bundle = read_record(folder / BUNDLE)
    if bundle and 'lineage' in bundle: write_card(folder, read_model(folder)[0], bundle)


def evaluation_rows(folder: Path, model: ModelSpec) -> list[dict]:
    "Return the rows of the model card's table of evaluations: those of this very model in `folder`"
    records = [read_record(file) for file in sorted((folder / EVALUATIONS).glob(f'*/{EVALUATION}'))]
    return [_evaluation_row(o) for o in records if o and is_of_model(o, model)]


def _evaluation_row(record: dict) -> dict:
    "Return a row of the model card from an evaluation.json"
    found = dict(kappa=record['kappa']['deployed'], gate=record['gate']['rejected'],
                 **{key: record['referable'][key] for key in ('auc', 'sensitivity', 'specificity')})
    optimistic = bool(record['include_seen'] or record['seen_unknown'])
    table = record['table']
    return dict(table=table['name'].replace('|', ' '), over=table['grouped_by'], date=record['date'],
                images=record['counts']['evaluated'], optimistic=optimistic,
                **{name: measure_text(value) for name, value in found.items()})


def copy_evaluations(run: Path, old_bundle: Path, folder: Path) -> None:
    "Copy a run's evaluation.json files into a bundle, and all that was written to its older bundle's evaluations"
    if (old_bundle / EVALUATIONS).is_dir(): shutil.copytree(old_bundle / EVALUATIONS, folder / EVALUATIONS)
    for file in (run / EVALUATIONS).glob(f'*/{EVALUATION}'):
        copied = folder / EVALUATIONS / file.parent.name / EVALUATION
        if not copied.exists(): write_bytes(copied, file.read_bytes())
