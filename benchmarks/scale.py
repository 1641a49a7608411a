"""Measure time and memory by the number of images, networks excluded: python benchmarks/scale.py [ROWS …]

Each job runs in a process of its own on 10,000, 100,000 and 1,000,000 generated rows: read tables and make folds, find
duplicates, score a table (by a trivial network, on one image in memory), write the report. Memory is measured above
that of 100 rows.
"""
import base64
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).parents[1]


def read_and_fold_tables(n: int, folder: Path) -> float:
    "Time read_tables, add_folds and write_folds, then add_folds from the file; the images are empty files."
    from aptos_fastai.data.folds import add_folds, write_folds
    from aptos_fastai.data.tables import read_tables
    from aptos_fastai.recipe.read import read_recipe
    recipe, rng = read_recipe(ROOT / 'recipes/one_table.ini'), np.random.default_rng(0)
    for name, m in (('train', n), ('test', 100)):
        images = folder / f'{name}_images'
        images.mkdir()
        ids = [f'{name}{i:07}' for i in range(m)]
        for i in ids: (images / f'{i}.jpg').touch()
        pd.DataFrame(dict(id_code=ids, diagnosis=rng.integers(0, 5, m))).to_csv(folder / f'{name}.csv', index=False)
    start = time.perf_counter()
    frames = add_folds(recipe, read_tables(recipe, folder), folder / 'folds.csv')
    write_folds(recipe, frames, folder / 'folds.csv')
    add_folds(recipe, frames, folder / 'folds.csv')
    return time.perf_counter() - start


def find_duplicates(n: int, folder: Path) -> float:
    """Time group_duplicates on random hashes, 1 % of them near copies.

    As in real hashes, a word has one of about 500 values.
    """
    from aptos_fastai.data.duplicates import group_duplicates
    words = np.random.default_rng(0).integers(0, 500, (n, 36), dtype=np.uint16) * 131
    copies, middle = n // 100, n // 2
    one_bit = (np.arange(36) == 3).astype(np.uint16)
    words[:copies] = words[middle:middle + copies] ^ one_bit
    ids = [f'a{i}' for i in range(n)]
    hashes = [base64.b64encode(o.tobytes()).decode() for o in words]
    frame = pd.DataFrame(dict(id_code=ids, perceptual_hash=hashes, pixel_sha256=ids, group=ids, source='train'))
    start = time.perf_counter()
    out = group_duplicates(dict(train=frame))['train']
    seconds = time.perf_counter() - start
    assert out.duplicate_group.nunique() < n - n // 120, 'copies were not found'
    return seconds


def score_table(n: int, folder: Path) -> float:
    "Time predict_scores: loader, batches and means."
    import torch

    from aptos_fastai.data.retina import Prep
    from aptos_fastai.pipeline.scores import predict_scores
    from aptos_fastai.recipe.sections import Augment, Stage
    from aptos_fastai.training import loaders
    from aptos_fastai.training.model import get_learner
    loaders.read_square = lambda *_: np.zeros((32, 32, 3), np.uint8)
    stage = Stage('s', ('t',), arch='test_resnet', weights='none', size=32, bs=2)
    small = pd.DataFrame(dict(stored=['a.jpg'] * 8, diagnosis=[0., 1.] * 4, valid=[False, True] * 4))
    stats = (.5,) * 3, (.2,) * 3
    learn = get_learner(stage, loaders.get_dls(small, stage, Prep(size=32), Augment(), stats))
    learn.model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 1))
    frame = pd.DataFrame(dict(id_code=np.arange(n).astype(str), stored='a.jpg', diagnosis=np.nan))
    start = time.perf_counter()
    assert len(predict_scores(learn, frame)) == n
    return time.perf_counter() - start


def write_reports(n: int, folder: Path) -> float:
    "Time the out-of-fold table, the summary and report.html."
    from grades import report, synthetic_run
    run = synthetic_run(folder, n)
    start = time.perf_counter()
    report(run)
    return time.perf_counter() - start


JOBS = dict(tables=read_and_fold_tables, duplicates=find_duplicates, scoring=score_table, report=write_reports)


def run_job(job: str, n: str) -> dict:
    "Run a job in this process; returns its seconds and the peak MB."
    from aptos_fastai.common.console import console
    console.quiet = True
    with tempfile.TemporaryDirectory() as tmp: seconds = JOBS[job](int(n), Path(tmp))
    return dict(seconds=seconds, mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def run_in_process(job: str, n: int) -> dict:
    "Run a job in a process of its own."
    command = [sys.executable, '-W', 'ignore', __file__, '--job', job, str(n)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode: sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main(*counts: str):
    from aptos_fastai.common.console import table
    rows = []
    for job in JOBS:
        base = run_in_process(job, 100)
        for n in [int(o) for o in counts] or [10_000, 100_000, 1_000_000]:
            result = run_in_process(job, n)
            mb = result['mb'] - base['mb']
            rows.append([job, f'{n:,}', f'{result["seconds"]:.1f} s', f'{mb:.0f} MB', f'{1e6 * mb / n:.0f} bytes'])
    columns = ['job', 'images', 'time', 'memory', 'memory per image']
    table('memory above that of 100 rows', columns, rows, right=columns[1:])


if __name__ == '__main__':
    if sys.argv[1:2] == ['--job']: print(json.dumps(run_job(*sys.argv[2:])))
    else: main(*sys.argv[1:])
