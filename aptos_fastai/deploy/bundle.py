"Export a finished run as a bundle for use elsewhere: safetensors, JSON, ONNX and a model card."
import shutil
import warnings
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import torch
from torch import nn

import aptos_fastai
from aptos_fastai.common.console import Bars, say
from aptos_fastai.common.io import AptosError, file_hash, read_record, verify_file, write_bytes, write_csv, write_record
from aptos_fastai.common.privacy import LEAVE_OUT, patient_data
from aptos_fastai.deploy.parity import ParityImages, compare_backends, parity_images, show_parity
from aptos_fastai.inference.backends import PACKAGES, changed_text
from aptos_fastai.inference.deidentify import record_without_people, without_ids, without_values
from aptos_fastai.inference.grader import Grader
from aptos_fastai.inference.measures import EVALUATION, EVALUATIONS, is_of_model
from aptos_fastai.inference.model_spec import BUNDLE, MemberSpec, ModelSpec, copy_members, read_model
from aptos_fastai.inference.training_images import BUNDLE_IMAGES, training_images
from aptos_fastai.inference.validation_scores import BUNDLE_SCORES, validation_scores
from aptos_fastai.metrics import GRADE_NAMES
from aptos_fastai.reports.model_card import card_text
from aptos_fastai.reports.parts import measure_text
from aptos_fastai.run_folder import FINISHED
from aptos_fastai.training.networks import features_and_scores

BUNDLE_FORMAT = 2
# What the model card needs of summary.json: of an entry of `stages`, of the whole run, of the submission
OF_STAGE = 'kappa', 'kappa_interval', 'resampled', 'threshold_method', 'validated', 'recall', 'auc', 'confusion'
OF_RUN = {'recipe', 'date', 'owner', 'contact', 'left_out', 'tables'}
OF_SUBMISSION = {'decision', 'prediction_sets', 'clusters', 'gate', 'largest_errors'}
TABLES = BUNDLE_IMAGES, BUNDLE_SCORES        # CSVs of a bundle


class NetOfSquares(nn.Module):
    "A network with its normalisation: squares (n, side, side, 3) uint8 RGB -> scores (n,), pooled features (n, C)"
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, net: nn.Module, member: MemberSpec):
        super().__init__()
        self.net = net
        self.register_buffer('mean', 255 * torch.tensor(member.mean))
        self.register_buffer('std', 255 * torch.tensor(member.std))

    def forward(self, squares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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
        program = torch.onnx.export(
            NetOfSquares(net.float().cpu(), member).eval(), (squares,), input_names=['squares'],
            output_names=['score', 'features'], dynamic_shapes=({0: batch},), dynamo=True, verbose=False)
    assert program is not None
    for part in (program.model, program.model.graph, *program.model.graph): part.metadata_props.clear()
    for node in program.model.graph: node.doc_string = None    # paths of the source that traced it
    program.save(file, external_data=False)


def lineage(root: Path, member: MemberSpec) -> dict:
    "Return where a member came from: what its stage's record holds and the bundle does not"
    record = read_record((root / member.file).parent / FINISHED)
    if not record: raise AptosError(f'{(root / member.file).parent}: no finished fold here. Run `all` or `train`.')
    keys = ('stage', 'fold', 'fingerprint', 'settings', 'augment', 'seed', 'images', 'kept_epoch', 'parents',
            'gate', 'versions')
    return {key: record[key] for key in keys} | dict(loaded=record.get('loaded'))


def run_metrics(root: Path, model: ModelSpec, deidentify: bool = False) -> dict:
    """Return what a run measured of the stage or ensemble that a model is; {} if the run does not report it.

    What is measured of the submission only (`OF_SUBMISSION`) is missing for another stage. A bundle is passed on: it
    names no ids but those of the largest errors; with `deidentify` not even these, and no values of carried columns.
    """
    summary = read_record(root / 'summary.json')
    if not summary or not model.kappa: return {}
    if not summary.keys() >= OF_RUN | OF_SUBMISSION:
        raise AptosError(f'{root / "summary.json"}: written by an older version. Run `all` again.')
    name = model.name.rpartition('/')[2]
    stage = next(s for s in summary['stages'] if s['stage'] == name)
    largest_errors = summary['largest_errors']
    if deidentify: summary = without_values(summary)
    else: summary = dict(without_ids(summary), largest_errors=largest_errors)
    keys = OF_RUN | OF_SUBMISSION if name == summary['submission']['node'] else OF_RUN
    return {key: stage[key] for key in OF_STAGE} | {key: summary[key] for key in sorted(keys)} | dict(
        node=name, fitted=stage.get('fitted', False), points=[o['threshold'] for o in stage['decision']['points']])


def export_run(path: str, parity: int | None = None, deidentify: bool = False) -> None:
    """`export RUN`: write the bundle of a run's submission, or of a stage, to the folder `bundle` in it.

    Compares backends on `parity` images (default `PARITY_IMAGES`). Raises `AptosError` if one in f32 differs from
    PyTorch by more than `within_bounds` accepts; then no bundle is written.
    """
    if parity is not None and parity < 1: raise AptosError(f'--parity {parity}: choose a number from 1.')
    model, root = read_model(path)
    if (Path(path) / BUNDLE).is_file(): raise AptosError(f'{path}: a bundle already. Give a run or a stage.')
    out, temp = Path(path) / 'bundle', Path(path) / '.bundle.tmp'
    shutil.rmtree(temp, ignore_errors=True)
    try:
        images = parity_images(root, model, parity or 0)
        copy_evaluations(Path(path), out, temp, deidentify)
        compared = build_bundle(model, root, temp, images, validation_scores(path), deidentify=deidentify)
        shutil.rmtree(out, ignore_errors=True)
        temp.rename(out)
    finally: shutil.rmtree(temp, ignore_errors=True)
    show_parity(compared, images)
    megabytes = sum(f.stat().st_size for f in out.iterdir()) / 1e6
    say(f'networks: {len(model.members)}, {megabytes:.0f} MB -> {out}: {BUNDLE}, weights, ONNX, MODEL_CARD.md')
    holds = f'MODEL_CARD.md and {BUNDLE} name the largest errors by their ids, and values of carried columns'
    clean = 'de-identified: no ids of images and no values of carried columns'
    say(f'{out}: {clean}' if deidentify else patient_data(out, holds, LEAVE_OUT), 'dim')


def build_bundle(model: ModelSpec, root: Path, folder: Path, images: ParityImages, scores: pd.DataFrame,
                 changed_from: dict | None = None, deidentify: bool = False) -> list[dict]:
    """Write a bundle to `folder` and return its parity. Raises `AptosError` if an f32 backend is not within bounds.

    `changed_from` are the digests of the model whose operating point was changed, if it was.
    """
    grader = Grader(model, root)
    bundled = copy_members(model, root, folder)
    with Bars() as bars, bars(f'exporting {model.name}', len(model.members), 'networks') as bar:
        for i, (original, copied) in enumerate(zip(model.members, bundled.members, strict=True), 1):
            write_onnx(grader.net(original), copied, (folder / copied.file).with_suffix('.onnx'))
            bar.to(i)
    origins, metrics = [lineage(root, m) for m in model.members], run_metrics(root, model, deidentify)
    known, unknown = training_images(model, root)
    if known is not None: write_csv(folder / BUNDLE_IMAGES, known.sort_values([*known]))     # not in a table's order
    write_csv(folder / BUNDLE_SCORES, scores)
    parts = dict(lineage=origins, metrics=metrics, training_images=unknown, changed_from=changed_from)
    return compare_and_write(folder, bundled, images, parts)


def rewrite_bundle(model: ModelSpec, root: Path, folder: Path, images: ParityImages, changed_from: dict) -> list[dict]:
    "Write a bundle of `model` to `folder` with the files of the bundle `root`, and return its parity"
    record = read_record(root / BUNDLE)
    assert record is not None
    for name, sha256 in record['files'].items():
        write_bytes(folder / name, verify_file(root / name, sha256, 'Export again.').read_bytes())
    parts = {key: record[key] for key in ('lineage', 'metrics', 'training_images')}
    return compare_and_write(folder, model, images, parts | dict(changed_from=changed_from))


def compare_and_write(folder: Path, model: ModelSpec, images: ParityImages, parts: dict) -> list[dict]:
    "Compare the backends on a bundle's files, write bundle.json and card, and return the parity. Raises `AptosError`"
    write_bundle(folder, model, parts, [], images.origin)
    parity = compare_backends(folder, images.jpegs)
    for o in parity:
        if o['precision'] == 'f32' and not o['within_bounds']:
            raise AptosError(f'{model.name}: {o["backend"]} differs from PyTorch by {o["max_difference"]:.3f} in a '
                             f'score (maximum {o["bound"]}) and in {changed_text(o, "grades")}. Nothing was exported; '
                             f'try another version of {PACKAGES[o["backend"]]}.')
    write_bundle(folder, model, parts, parity, images.origin)
    return parity


def write_bundle(folder: Path, model: ModelSpec, parts: dict, parity: list[dict], parity_on: str) -> None:
    """Write MODEL_CARD.md, then bundle.json, whose presence means that the bundle is complete.

    `parts` are lineage, metrics, training_images (what is not known of the images that the model was trained on) and
    changed_from.
    """
    suffixes = '.safetensors', '.onnx'
    files = {f.name: file_hash(f) for f in sorted(folder.iterdir()) if f.suffix in suffixes or f.name in TABLES}
    record = dict(
        format=BUNDLE_FORMAT, classes=list(GRADE_NAMES),
        licence='code: Apache-2.0; weights: as the tables they were trained on and their initial weights allow',
        model=asdict(model), parity=parity, parity_on=parity_on, files=files, **parts,
        aptos_fastai=aptos_fastai.__version__)
    write_card(folder, model, record)
    write_record(folder / BUNDLE, record)


def write_card(folder: Path, model: ModelSpec, bundle: dict) -> None:
    "Write the MODEL_CARD.md of a bundle from its record and its evaluations"
    parity = [parity_row(o) for o in bundle['parity']]
    card = card_text(model, bundle, parity, evaluation_rows(folder, model))
    write_bytes(folder / 'MODEL_CARD.md', card.encode())


def parity_row(parity: dict) -> dict:
    "Return an entry of a bundle's parity with what the card says of changed grades and referrals"
    return dict(parity, grades=changed_text(parity, 'grades'), referrals=changed_text(parity, 'referrals'))


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


def copy_evaluations(run: Path, old_bundle: Path, folder: Path, deidentify: bool = False) -> None:
    """Copy a run's evaluation.json files into a bundle, and all that was written to its older bundle's evaluations.

    With `deidentify` the records alone are copied, without what names people.
    """
    if not deidentify and (old_bundle / EVALUATIONS).is_dir():
        shutil.copytree(old_bundle / EVALUATIONS, folder / EVALUATIONS)
    for file in (f for source in (old_bundle, run) for f in (source / EVALUATIONS).glob(f'*/{EVALUATION}')):
        copied = folder / EVALUATIONS / file.parent.name / EVALUATION
        if copied.exists(): continue
        if not deidentify: write_bytes(copied, file.read_bytes())
        elif record := read_record(file): write_record(copied, record_without_people(record))
