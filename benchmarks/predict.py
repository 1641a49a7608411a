"""Images a second from original files to grades: python benchmarks/predict.py FOLDER [ARCH SIZE TTA]

The published way (decode whole, squash, one image at a time, f32 as PyTorch comes) beside this package's backends on the same files with the same network of
random weights and the same views (default legacy_seresnet50 256 none), in turns in one run. Then what of the forward rate is left once images
are prepared.
"""
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from aptos_fastai.common.console import table
from aptos_fastai.common.io import file_hash, write_record
from aptos_fastai.data.retina import Prep, prepare, square_of
from aptos_fastai.deploy.bundle import write_onnx
from aptos_fastai.inference.grade_files import find_images
from aptos_fastai.inference.grader import Grader, load_grader
from aptos_fastai.inference.model_spec import MemberSpec, ModelSpec
from aptos_fastai.inference.views import views
from aptos_fastai.metrics import MIDPOINTS
from aptos_fastai.recipe import Stage
from aptos_fastai.training.model import create_model
from aptos_fastai.training.precision import has_bf16

WAYS = [o for o in (('torch', 'f32'), ('torch', 'bf16'), ('onnx', 'f32'), ('openvino', 'f32'), ('openvino', 'bf16')) if o[1] == 'f32' or has_bf16()]
ROUNDS = 2


def made_up_bundle(folder: Path, arch: str, size: int, tta: str) -> Path:
    torch.manual_seed(0)
    net = create_model(Stage('x', ('t',), arch=arch, size=size)).eval()
    save_file(net.state_dict(), folder / 'net.safetensors')
    member = MemberSpec('net.safetensors', file_hash(folder / 'net.safetensors'), arch, 'gem', size, tta, (.485, .456, .406), (.229, .224, .225), 1.)
    write_onnx(net, member, folder / 'net.onnx')
    model = ModelSpec('random weights', Prep(size=size), (member,), MIDPOINTS, (None,) * 5, .9, True)
    write_record(folder / 'bundle.json', dict(model=asdict(model), files={'net.onnx': file_hash(folder / 'net.onnx')}))
    return folder


def published(files: list[str], net: torch.nn.Module, member: MemberSpec) -> list[float]:
    "One by one, the views one after the other"
    mean, std = (torch.tensor(o)[:, None, None] for o in (member.mean, member.std))
    out = []
    with torch.no_grad():
        for f in files:
            a = np.array(Image.open(f).convert('RGB').resize((member.size, member.size), Image.BILINEAR))
            x = ((torch.from_numpy(a).permute(2, 0, 1).float() / 255 - mean) / std)[None]
            out.append(float(sum(net(v) for v in views(x, member.tta)) / len(list(views(x, member.tta)))))
    return out


def rate(f, n: int) -> float:
    t0 = time.perf_counter()
    f()
    return n / (time.perf_counter() - t0)


def resident(grader: Grader, jpegs: list[bytes]) -> float:
    "Share of the forward rate on squares in memory that is left where they are read from prepared JPEGs"
    m = grader.model.members[0]
    def read(o): return {m.size: np.stack([square_of(j, grader.model.prep, m.size) for j in o])}
    parts = [jpegs[i:i + 16] for i in range(0, len(jpegs), 16)]
    squares = [read(o) for o in parts]
    both = [(rate(lambda: [grader.scores(read(o)) for o in parts], 1), rate(lambda: [grader.scores(o) for o in squares], 1)) for _ in range(ROUNDS + 1)][1:]
    return float(np.median([a / b for a, b in both]))


def main(folder: str, arch: str = 'legacy_seresnet50', size: str = '256', tta: str = 'none'):
    files = find_images([folder])
    with tempfile.TemporaryDirectory() as tmp:
        bundle = made_up_bundle(Path(tmp), arch, int(size), tta)
        graders = {w: load_grader(bundle, *w) for w in WAYS}
        first = graders[WAYS[0]]
        net = create_model(Stage('x', ('t',), arch=arch, size=int(size))).eval()
        net.load_state_dict(first.nets[0][1].state_dict())
        runs = {'published, one by one': lambda: published(files, net, first.model.members[0])} | {
            f'{b} {p}': (lambda g=g: g.predict(files)) for (b, p), g in graders.items()}
        for f in runs.values(): f()
        rates = {n: [] for n in runs}
        for _ in range(ROUNDS):
            for n, f in runs.items(): rates[n].append(rate(f, len(files)))
        want = first.predict(files).score
        jpegs = [prepare(Path(f).read_bytes(), first.model.prep)[0] for f in files]
        rows, base = [], np.median(rates['published, one by one'])
        for n, r in rates.items():
            g = next((g for (b, p), g in graders.items() if f'{b} {p}' == n), None)
            rows.append([n, f'{np.median(r):.1f}', f'{np.median(r) / base:.1f}', f'{abs(g.predict(files).score - want).max():.4f}' if g else '',
                         f'{resident(g, jpegs):.0%}' if g else ''])
    table(f'{arch} {size} px, {len(files)} originals, tta {tta}; {os.cpu_count()} cores, {platform.machine()}',
          ['way', 'images/s', 'ratio', 'largest difference', 'of forward rate'], rows, right=('images/s', 'ratio', 'of forward rate'))


if __name__ == '__main__': main(*sys.argv[1:])
