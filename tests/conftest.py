"What tests share: a tiny table on disk, real photographs where they are, and one whole toy run of the shipped settings.ini."
import os
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from aptos_fastai.cli import main

ROOT = Path(__file__).parents[1]
IDRID = Path(os.environ.get('IDRID', ROOT.parent / 'shared/data/idrid'))
TOY = ['--set', 'demo.pretrain=60', '--set', 'demo.train=60', '--set', 'demo.test=20', '--set', 'demo.shrink=8',
       '--set', 'demo.archs=legacy_seresnet50:test_resnet densenet121:test_resnet', '--set', 'demo.stage.epochs=1', '--set', 'stage.tta=hflip',
       '--set', 'stage.precision=f32']      # what is faster is another's question, and would take its time in each test

torch.set_num_threads(1)


def fundus(rng, side=96, grade=0):
    "A disc with as many dark spots as the grade says: enough for a tiny network to learn from"
    im = np.zeros((side, int(side * 1.3), 3), np.uint8)
    c = im.shape[1] // 2, side // 2
    cv2.circle(im, c, side // 2 - 4, (60, 90, 200), -1)
    for _ in range(30):                       # vessels: what tells one eye from another
        x, y, u, v = (rng.uniform(-.34, .34, 4) * side).astype(int)
        cv2.line(im, (c[0] + x, c[1] + y), (c[0] + u, c[1] + v), (50, 75, 180), 2)
    for _ in range(4 * grade):
        x, y = (rng.uniform(-.28, .28, 2) * side).astype(int)
        cv2.circle(im, (c[0] + x, c[1] + y), 4, (20, 20, 60), -1)
    return im


def write_table(folder: Path, n=40, graded=True, seed=0, name='train'):
    "`name`.csv and `name`_images/ of `n` pictures with grades in turn"
    rng = np.random.default_rng(seed)
    (folder / f'{name}_images').mkdir(parents=True, exist_ok=True)
    ids = [f'{name}{i:03}' for i in range(n)]
    grades = np.arange(n) % 5
    for i, g in zip(ids, grades, strict=True): cv2.imwrite(str(folder / f'{name}_images/{i}.png'), fundus(rng, grade=int(g)))
    df = pd.DataFrame(dict(id_code=ids, diagnosis=grades))
    (df if graded else df[['id_code']]).to_csv(folder / f'{name}.csv', index=False)
    return df


@pytest.fixture
def tables(tmp_path):
    "A folder with a graded and an ungraded table, as recipes/one_table.ini wants them"
    write_table(tmp_path / 'data', 40)
    write_table(tmp_path / 'data', 10, graded=False, seed=1, name='test')
    return tmp_path / 'data'


@pytest.fixture
def small_recipe(tmp_path):
    "recipes/one_table.ini at toy size"
    text = (ROOT / 'recipes/one_table.ini').read_text()
    for a, b in [('tf_efficientnet_lite0', 'test_resnet'), ('bundled', 'none'),
                 ('size = 224', 'size = 32\nprecision = f32'), ('size = 320', 'size = 64'), ('folds = 5', 'folds = 2'),
                 ('epochs = 11', 'epochs = 1'), ('freeze_epochs = 1', 'freeze_epochs = 0'), ('bs = 16', 'bs = 8'), ('tta = d4', 'tta = hflip')]:
        assert a in text, f'{a} is no longer in recipes/one_table.ini'
        text = text.replace(a, b)
    file = tmp_path / 'small.ini'
    file.write_text(text)
    return file


@pytest.fixture(scope='session')
def toy(tmp_path_factory):
    "The run folder of the shipped settings.ini driven by `run.py all` on a toy demo"
    runs = tmp_path_factory.mktemp('toy')
    main(['all', '--recipe', str(ROOT / 'settings.ini'), '--runs', str(runs), *TOY])
    return runs / 'settings-demo'


@pytest.fixture(scope='session')
def idrid():
    if not (IDRID / 'train.csv').is_file(): pytest.skip(f'the IDRiD photographs are not at {IDRID}; set IDRID to their folder')
    return IDRID


def fails(capsys, args, *words):
    "The command ends in one line on stderr that holds `words`, exit status 1; returns the line"
    with pytest.raises(SystemExit) as e: main([str(o) for o in args])
    err = capsys.readouterr().err
    assert e.value.code == 1, err
    assert err.startswith('error: ') and err.count('\n') == 1, err
    for w in words: assert str(w) in err, f'{w!r} is not in: {err}'
    return err
