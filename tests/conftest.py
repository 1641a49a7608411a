"What tests share: a tiny table on disk, real images where they are, and one whole toy run of the shipped settings.ini."
import io
import os
import shutil
import socket
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from aptos_fastai.cli import main
from aptos_fastai.pipeline.graph import open_run

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
    "`name`.csv and `name`_images/ of `n` images with grades in turn"
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
    if not (IDRID / 'train.csv').is_file(): pytest.skip(f'the IDRiD images are not at {IDRID}; set IDRID to their folder')
    return IDRID


def fails(capsys, args, *words):
    "The command ends in one line on stderr that holds `words`, exit status 1; returns the line"
    with pytest.raises(SystemExit) as e: main([str(o) for o in args])
    err = capsys.readouterr().err
    assert e.value.code == 1, err
    assert err.startswith('error: ') and err.count('\n') == 1, err
    for w in words: assert str(w) in err, f'{w!r} is not in: {err}'
    return err


STAGES = 'pretrain_256 finetune_256 pretrain_512 finetune_512 retrain_512 pretrain_dense finetune_dense'.split()


def run_of(toy): return open_run(str(ROOT / 'settings.ini'), 'demo', str(toy.parent), [o for o in TOY if o != '--set'])
def toy_args(toy, *more): return ['--recipe', str(ROOT / 'settings.ini'), '--runs', str(toy.parent), *TOY, *more]
def sets(*stage_keys): return [o for k in stage_keys for o in ('--set', f'stage.{k}')]
def stamps(folder): return {p: p.stat().st_mtime_ns for p in folder.rglob('*') if p.is_file()}


@pytest.fixture
def copied(toy, tmp_path):
    "A copy of the toy run that a test may spoil"
    shutil.copytree(toy.parent, tmp_path / 'runs')
    return tmp_path / 'runs' / toy.name


@pytest.fixture(scope='session')
def photos(toy): return run_of(toy).frames['aptos_test'].path.tolist()


@pytest.fixture(scope='session')
def address(toy):
    "A server of the toy run in a thread; its url"
    uvicorn = pytest.importorskip('uvicorn')
    from aptos_fastai.deploy import serve
    from aptos_fastai.inference.grader import load_grader
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(serve.get_app(load_grader(toy), ['127.0.0.1']), port=port, log_level='warning'))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started: time.sleep(.05)
    yield f'http://127.0.0.1:{port}'
    server.should_exit = True
    thread.join(10)


def dicom(a, photometric, stored, frames=None, signed=0, syntax=None):
    "A DICOM file's bytes with the pixels of `a`"
    pydicom = pytest.importorskip('pydicom')
    ds = pydicom.dataset.FileDataset(None, {}, preamble=b'\0' * 128)
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax or pydicom.uid.ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = '1.2.840.10008.5.1.4.1.1.77.1.5.1'       # ophthalmic photography, 8 bit
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = '1.2.3.4'
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *a.shape[:2], 3 if a.ndim == 3 else 1, photometric
    if a.ndim == 3: ds.PlanarConfiguration = 0
    if frames: ds.NumberOfFrames = frames
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.PixelData = a.itemsize * 8, stored, stored - 1, signed, a.tobytes()
    f = io.BytesIO(); ds.save_as(f, enforce_file_format=True)
    return f.getvalue()
