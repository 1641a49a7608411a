"""Memory and time of what is not a network, by the number of images: python benchmarks/scale.py [ROWS …]

Tables read and cut into folds, duplicates looked for, a table scored (by a network that answers at once, on an image that is there already), and the report:
each on 10,000, 100,000 and 1,000,000 made-up rows, each in a process of its own. Megabytes are above those at 100 rows.
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


def recipe():
    from aptos_fastai.recipe import read_recipe
    return read_recipe(ROOT / 'recipes/one_table.ini')


def tables(n: int, folder: Path):
    "read_tables, add_folds, write_folds; the images are empty files"
    from aptos_fastai.data.folds import add_folds, write_folds
    from aptos_fastai.data.tables import read_tables
    r, rng = recipe(), np.random.default_rng(0)
    for name, m in (('train', n), ('test', 100)):
        (folder / f'{name}_images').mkdir()
        ids = [f'{name}{i:07}' for i in range(m)]
        for i in ids: (folder / f'{name}_images/{i}.jpg').touch()
        pd.DataFrame(dict(id_code=ids, diagnosis=rng.integers(0, 5, m))).to_csv(folder / f'{name}.csv', index=False)
    t = time.perf_counter()
    frames = add_folds(r, read_tables(r, folder), folder / 'folds.csv')
    write_folds(r, frames, folder / 'folds.csv')
    add_folds(r, frames, folder / 'folds.csv')
    return time.perf_counter() - t


def duplicates(n: int, folder: Path):
    "Groups of images that look alike; a hundredth are copies. As many share a word of their hash as of real ones (1 in 500)"
    from aptos_fastai.data.duplicates import group_duplicates
    rng = np.random.default_rng(0)
    looks = rng.integers(0, 500, (n, 36), dtype=np.uint16) * 131
    looks[:n // 100] = looks[n // 2:n // 2 + n // 100] ^ (np.arange(36) == 3).astype(np.uint16)
    frame = pd.DataFrame(dict(id_code=[f'a{i}' for i in range(n)], perceptual_hash=[base64.b64encode(o.tobytes()).decode() for o in looks], source='train'))
    frame['pixel_sha256'] = frame['group'] = frame.id_code
    t = time.perf_counter()
    out = group_duplicates(dict(train=frame))['train']
    took = time.perf_counter() - t
    assert out.duplicate.nunique() < n - n // 120, 'copies were not found'
    return took


def scoring(n: int, folder: Path):
    "`predict` of a table: loader, batches, means"
    import torch

    from aptos_fastai.data.retina import Prep
    from aptos_fastai.pipeline.scores import predict_scores
    from aptos_fastai.recipe import Augment, Stage
    from aptos_fastai.training import loaders as data
    from aptos_fastai.training.model import get_learner
    data.read_square = lambda *_: np.zeros((32, 32, 3), np.uint8)
    stage = Stage('s', ('t',), arch='test_resnet', weights='none', size=32, bs=2)
    small = pd.DataFrame(dict(stored=['a.jpg'] * 8, diagnosis=[0., 1.] * 4, valid=[False, True] * 4))
    learn = get_learner(stage, data.get_dls(small, stage, Prep(size=32), Augment(), ((.5,) * 3, (.2,) * 3)))
    learn.model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 1))
    frame = pd.DataFrame(dict(id_code=np.arange(n).astype(str), stored='a.jpg', diagnosis=np.nan))
    t = time.perf_counter()
    assert len(predict_scores(learn, frame)) == n
    return time.perf_counter() - t


def reporting(n: int, folder: Path):
    "Out-of-fold table, summary, report.html"
    from grades import made_up_run, report
    run = made_up_run(folder, n)
    t = time.perf_counter()
    report(run)
    return time.perf_counter() - t


PARTS = dict(tables=tables, duplicates=duplicates, scoring=scoring, report=reporting)


def one(part: str, n: str) -> dict:
    from aptos_fastai.common.console import console
    console.quiet = True
    with tempfile.TemporaryDirectory() as tmp: seconds = PARTS[part](int(n), Path(tmp))
    return dict(seconds=seconds, mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measure(part: str, n: int) -> dict:
    o = subprocess.run([sys.executable, '-W', 'ignore', __file__, '--one', part, str(n)], capture_output=True, text=True, check=False)
    if o.returncode: sys.exit(o.stderr)
    return json.loads(o.stdout.splitlines()[-1])


def main(*rows: str):
    from aptos_fastai.common.console import table
    counts = [int(o.replace('_', '')) for o in rows] or [10_000, 100_000, 1_000_000]
    out = []
    for p in PARTS:
        base, found = measure(p, 100), [measure(p, n) for n in counts]
        for n, o in zip(counts, found, strict=True):
            mb = o['mb'] - base['mb']
            out.append([p, f'{n:,}', f'{o["seconds"]:.1f} s', f'{mb:.0f} MB', f'{1e6 * mb / n:.0f} bytes'])
    table('memory above that of 100 rows', ['what', 'images', 'time', 'memory', 'an image'], out, right=('images', 'time', 'memory', 'an image'))


if __name__ == '__main__':
    if sys.argv[1:2] == ['--one']: print(json.dumps(one(*sys.argv[2:])))
    else: main(*sys.argv[1:])
