"A finished run -> a bundle that answers elsewhere: safetensors, JSON, ONNX and a model card."
import shutil
import warnings
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

import aptos_fastai
from aptos_fastai.common.console import Bars, say, table
from aptos_fastai.common.io import AptosError, file_hash, read_record, write_bytes, write_record
from aptos_fastai.data.retina import Prep, square_of
from aptos_fastai.inference.grader import Grader, load_grader
from aptos_fastai.inference.model_spec import MemberSpec, ModelSpec, read_model
from aptos_fastai.metrics import GRADE_NAMES, apply_thresholds
from aptos_fastai.pipeline.summary import interval_text
from aptos_fastai.reports.html import render
from aptos_fastai.run_folder import FINISHED
from aptos_fastai.training.precision import has_bf16

BOUNDS = dict(f32=.01, bf16=.1)              # of |score - score in PyTorch f32|; in bf16 one grade in a hundred may change, too
WAYS = ('onnx', 'f32'), ('openvino', 'f32'), ('openvino', 'bf16'), ('torch', 'bf16')
PARITY = 24                                  # images that are compared


class FromSquares(nn.Module):
    "(n, side, side, 3) uint8 -> scores (n,): what else a network needs is inside"
    def __init__(self, net: nn.Module, member: MemberSpec):
        super().__init__()
        self.net = net
        for k in ('mean', 'std'): self.register_buffer(k, 255 * torch.tensor(getattr(member, k)))
    def forward(self, x): return self.net(((x.float() - self.mean) / self.std).permute(0, 3, 1, 2)).flatten()


def write_onnx(net: nn.Module, member: MemberSpec, file: Path):
    "The network of a member as ONNX: input `squares` (n, side, side, 3) uint8 RGB, output `score` (n,)"
    try:
        import onnxscript  # noqa: F401 (the exporter's own dependency)
    except ImportError: raise AptosError('ONNX needs the extra export: pip install onnx onnxscript onnxruntime') from None
    squares = torch.zeros(2, member.size, member.size, 3, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')      # the exporter's talk of its own parts
        torch.onnx.export(FromSquares(net.float().cpu(), member).eval(), (squares,), file, input_names=['squares'], output_names=['score'],
                          dynamic_shapes=({0: torch.export.Dim('n', min=1, max=4096)},), dynamo=True, external_data=False, verbose=False)


def parity_squares(root: Path, prep: Prep) -> tuple[list[bytes], str]:
    "Prepared JPEGs to compare on: the run's own images where they are, else painted ones"
    files = sorted(islice((root.parent / 'prepared' / prep.name).glob('*/*.jpg'), 10_000))
    if files: return [f.read_bytes() for f in files[::max(1, len(files) // PARITY)][:PARITY]], 'images of the run'
    from aptos_fastai.data.demo import CAMERAS, paint_fundus
    from aptos_fastai.data.retina import prepare
    rng = np.random.default_rng(0)
    import cv2
    ims = [paint_fundus(rng, i % 5, list(CAMERAS)[i % len(CAMERAS)], True)[0] for i in range(PARITY)]
    return [prepare(cv2.imencode('.png', o[..., ::-1])[1].tobytes(), prep)[0] for o in ims], 'painted images'


def compare(folder: Path, jpegs: list[bytes]) -> list[dict]:
    """Every way to run the bundle in `folder` that this machine has, against PyTorch in f32 on the same images: largest and mean difference of a
    score, grades that change, and whether that is within the bounds"""
    first = load_grader(folder)
    squares = {n: np.stack([square_of(j, first.model.prep, n) for j in jpegs]) for n in {m.size for m in first.model.members}}
    want, out = first.scores(squares)[0], []
    for backend, precision in WAYS:
        if find_spec(dict(onnx='onnxruntime').get(backend, backend)) is None or (precision == 'bf16' and not has_bf16()): continue
        got = load_grader(folder, backend, precision).scores(squares)[0]
        d, changed = np.abs(got - want), int((apply_thresholds(got, first.model.thresholds) != apply_thresholds(want, first.model.thresholds)).sum())
        fine = d.max() <= BOUNDS[precision] and changed <= max(1, .01 * len(jpegs)) * (precision != 'f32')
        out.append(dict(backend=backend, precision=precision, images=len(jpegs), max_difference=float(d.max()), mean_difference=float(d.mean()),
                        grades_changed=changed, bound=BOUNDS[precision], fine=bool(fine)))
    return out


def lineage(root: Path, member: MemberSpec) -> dict:
    "Where a member came from: its record without the settings that the bundle states already"
    rec = read_record((root / member.file).parent / FINISHED)
    return {k: rec[k] for k in ('stage', 'fold', 'fingerprint', 'settings', 'augment', 'seed', 'images', 'kept_epoch', 'parents', 'versions')}


def figures(root: Path) -> dict:
    "What is known of a run's answer: kappa and its interval, from its summary"
    o = read_record(root / 'summary.json')
    if not o: return {}
    s = next(r for r in o['stages'] if r['stage'] == o['submission']['node'])
    return dict(kappa=s['kappa'], kappa_interval=s['kappa_interval'], validated=s['validated'], node=s['stage'])


def export_run(path: str):
    """`export RUN`: the bundle of a run's final answer, or of a stage, in the folder `bundle` in it.

    Raises `AptosError` where an ONNX network answers otherwise than the PyTorch one by more than `BOUNDS`; nothing is left then.
    """
    model, root = read_model(path)
    if (Path(path) / 'bundle.json').is_file(): raise AptosError(f'{path}: is a bundle already; name a run or a stage')
    out, tmp = Path(path) / 'bundle', Path(path) / '.bundle.tmp'
    shutil.rmtree(tmp, ignore_errors=True)
    grader = Grader(model, root)
    members = []
    try:
        with Bars() as bars, bars(f'exporting {model.name}', len(model.members), 'networks') as bar:
            for m, net in grader.nets:
                file = m.file.replace('/', '-').replace('\\', '-')
                write_bytes(tmp / file, (root / m.file).read_bytes())
                members.append(replace(m, file=file))
                write_onnx(net, m, (tmp / file).with_suffix('.onnx'))
                bar.to(len(members))
        jpegs, what = parity_squares(root, model.prep)
        lines, bundled = [lineage(root, m) for m in model.members], replace(model, members=tuple(members))
        write_bundle(tmp, bundled, lines, figures(root), [], what)
        parity = compare(tmp, jpegs)
        bad = [o for o in parity if not o['fine'] and o['precision'] == 'f32']
        for o in bad: raise AptosError(f'{path}: {o["backend"]} differs from PyTorch by {o["max_difference"]:.3f} in a score ({o["bound"]} is the most)')
        write_bundle(tmp, bundled, lines, figures(root), parity, what)
        shutil.rmtree(out, ignore_errors=True)
        tmp.rename(out)
    finally: shutil.rmtree(tmp, ignore_errors=True)
    size = sum(f.stat().st_size for f in out.iterdir()) / 1e6
    table(f'scores against PyTorch f32 on {len(jpegs)} {what}', ['backend', 'largest difference', 'mean', 'grades that change', 'within bounds'],
          [[f'{o["backend"]} {o["precision"]}', f'{o["max_difference"]:.1e}', f'{o["mean_difference"]:.1e}', o['grades_changed'], 'yes' if o['fine'] else 'no']
           for o in parity])
    if not has_bf16(): say('bf16 was not compared: this machine has none', 'yellow')
    say(f'{len(members)} network{"s" * (len(members) > 1)}, {size:.0f} MB -> {out}: bundle.json, weights, ONNX, MODEL_CARD.md')


def write_bundle(folder: Path, model: ModelSpec, lines: list[dict], metrics: dict, parity: list[dict], images: str):
    "bundle.json and MODEL_CARD.md; bundle.json last, its presence means that the bundle is whole"
    files = {f.name: file_hash(f) for f in sorted(folder.iterdir()) if f.suffix in ('.safetensors', '.onnx')}
    kappa = interval_text(metrics['kappa'], metrics['kappa_interval']) if metrics else ''
    rows = pd.DataFrame([dict(stage=o['stage'], fold=o['fold'], arch=m.arch, size=m.size, train=o['images']['train'], valid=o['images']['valid'],
                              tables=', '.join(o['settings']['train'])) for o, m in zip(lines, model.members, strict=True)]).to_dict('records')
    card = render('MODEL_CARD.md', model=model, rows=rows, kappa=kappa, metrics=metrics, parity=parity, images=images, names=GRADE_NAMES,
                  version=aptos_fastai.__version__)
    write_bytes(folder / 'MODEL_CARD.md', card.encode())
    write_record(folder / 'bundle.json', dict(
        format=1, classes=list(GRADE_NAMES), licence='code: Apache-2.0; weights: as the tables they were trained on allow',
        model=asdict(model), metrics=metrics, parity=parity, parity_on=images, lineage=lines, files=files, aptos_fastai=aptos_fastai.__version__))
