"""Images per second from original files to grades: python benchmarks/predict.py FOLDER [ARCH SIZE TTA]

Compares the published way (decode the whole file, squash, one image at a time, f32) with this package's backends, on
the same files with the same network of random weights and the same views (default legacy_seresnet50 256 none). The ways
take turns in one process. `[images] jpeg` is full or fast: decoding at a fraction of the size changes scores, so a
difference is from PyTorch f32 with the same. The last columns are CPU time, which other programs on the machine disturb
less than images/s, the largest difference of a score, and the share of the forward rate that is left when squares are
read from prepared JPEGs.
"""
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from aptos_fastai.common.console import table
from aptos_fastai.common.io import file_hash, write_record
from aptos_fastai.data.retina import Prep, prepare, square_of
from aptos_fastai.deploy.bundle import write_onnx
from aptos_fastai.inference.find_images import find_images
from aptos_fastai.inference.grader import Grader, load_grader
from aptos_fastai.inference.model_spec import BUNDLE, MemberSpec, ModelSpec
from aptos_fastai.inference.views import views
from aptos_fastai.metrics import MIDPOINTS
from aptos_fastai.training.networks import create_model
from aptos_fastai.training.precision import has_bf16, machine

WAYS = [('torch', 'f32'), ('torch', 'bf16'), ('onnx', 'f32'), ('openvino', 'f32'), ('openvino', 'bf16')]
JPEG = 'full', 'fast'
PUBLISHED = 'published, one by one'
ROUNDS = 2
BATCH = 16                                   # prepared JPEGs read at a time


def write_random_bundle(folder: Path, arch: str, size: int, tta: str, jpeg: str) -> None:
    "Write a bundle of one network with random weights"
    folder.mkdir()
    torch.manual_seed(0)
    net = create_model(arch, 'gem', size).eval()
    weights, onnx = folder / 'net.safetensors', folder / 'net.onnx'
    save_file(net.state_dict(), weights)
    member = MemberSpec(file=weights.name, sha256=file_hash(weights), arch=arch, head='gem', size=size, tta=tta,
                        mean=(.485, .456, .406), std=(.229, .224, .225), weight=1.)
    write_onnx(net, member, onnx)
    model = ModelSpec(name='random weights', prep=Prep(size=size, jpeg=jpeg), members=(member,), thresholds=MIDPOINTS,
                      coverage=.9, synthetic=True)
    write_record(folder / BUNDLE, dict(model=asdict(model), files={onnx.name: file_hash(onnx)}))


def predict_published(files: list[str], net: torch.nn.Module, member: MemberSpec) -> list[float]:
    "Return scores as the published code does: one image and one view at a time"
    mean, std = (torch.tensor(o)[:, None, None] for o in (member.mean, member.std))
    scores = []
    with torch.no_grad():
        for file in files:
            im = np.array(Image.open(file).convert('RGB').resize((member.size, member.size), Image.BILINEAR))
            x = ((torch.from_numpy(im).permute(2, 0, 1).float() / 255 - mean) / std)[None]
            scores.append(float(np.mean([float(net(v)) for v in views(x, member.tta)])))
    return scores


def seconds(run: Callable[[], object]) -> float:
    "Return the seconds that `run` takes"
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def share_of_forward_rate(grader: Grader, jpegs: list[bytes]) -> float:
    "Return the speed with squares read from prepared JPEGs, as a share of the speed with squares in memory"
    side, prep = grader.model.members[0].size, grader.model.prep

    def read(part): return {side: np.stack([square_of(jpeg, prep, side) for jpeg in part])}

    def score_jpegs():
        for part in parts: grader.scores(read(part))

    def score_squares():
        for squares in in_memory: grader.scores(squares)
    parts = [jpegs[i:i + BATCH] for i in range(0, len(jpegs), BATCH)]
    in_memory = [read(part) for part in parts]
    shares = [seconds(score_squares) / seconds(score_jpegs) for _ in range(ROUNDS + 1)]
    return float(np.median(shares[1:]))      # the first round warms up


def time_in_turns(ways: Mapping[str, Callable[[], object]], images: int) -> dict[str, tuple[float, float]]:
    "Return images/s and CPU ms an image of each way: medians over rounds in which the ways take turns"
    for run in ways.values(): run()          # warm up
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, run in ways.items():
            start = time.process_time()
            wall[name].append(images / seconds(run))
            cpu[name].append(1000 * (time.process_time() - start) / images)
    return {name: (float(np.median(wall[name])), float(np.median(cpu[name]))) for name in ways}


def graders_in(folder: Path, arch: str, size: int, tta: str) -> dict[str, dict[str, Grader]]:
    "Return the graders of each way of decoding: jpeg -> backend and precision -> grader"
    graders: dict[str, dict[str, Grader]] = {}
    for jpeg in JPEG:
        write_random_bundle(folder / jpeg, arch, size, tta, jpeg)
        graders[jpeg] = {f'{backend} {precision}': load_grader(folder / jpeg, backend, precision)
                         for backend, precision in WAYS if precision == 'f32' or has_bf16()}
    return graders


def rows_of(jpeg: str, graders: dict[str, Grader], files: list[str], timed: dict[str, tuple[float, float]]) -> list:
    "Return the rows of one way of decoding"
    reference = graders['torch f32']
    expected = reference.predict(files).score
    jpegs = [prepare(Path(f).read_bytes(), reference.model.prep)[0] for f in files]
    rows = []
    for name, grader in graders.items():
        rate, cpu = timed[f'{name}, {jpeg}']
        difference = abs(grader.predict(files).score - expected).max()
        rows.append([name, jpeg, f'{rate:.1f}', f'{rate / timed[PUBLISHED][0]:.1f}', f'{cpu:.0f}',
                     f'{difference:.4f}', f'{share_of_forward_rate(grader, jpegs):.0%}'])
    return rows


def main(folder: str, arch: str = 'legacy_seresnet50', size: str = '256', tta: str = 'none'):
    files = [str(entry) for entry in find_images([folder])]
    with tempfile.TemporaryDirectory() as temp:
        graders = graders_in(Path(temp), arch, int(size), tta)
        reference = graders['full']['torch f32']
        member = reference.model.members[0]
        net = create_model(arch, 'gem', int(size)).eval()
        net.load_state_dict(reference.net(member).state_dict())
        ways: dict[str, Callable[[], object]] = {PUBLISHED: partial(predict_published, files, net, member)}
        for jpeg, of_jpeg in graders.items():
            for name, grader in of_jpeg.items(): ways[f'{name}, {jpeg}'] = partial(grader.predict, files)
        timed = time_in_turns(ways, len(files))
        rows = [[PUBLISHED, '', f'{timed[PUBLISHED][0]:.1f}', '1.0', f'{timed[PUBLISHED][1]:.0f}', '', '']]
        for jpeg, of_jpeg in graders.items(): rows += rows_of(jpeg, of_jpeg, files, timed)
    table(f'{arch} {size} px, {len(files)} originals, tta {tta}; {machine()}',
          ['way', 'jpeg', 'images/s', 'ratio', 'CPU ms', 'difference', 'of forward'], rows,
          right=('images/s', 'ratio', 'CPU ms', 'of forward'))


if __name__ == '__main__': main(*sys.argv[1:])
