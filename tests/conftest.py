"Shared by the tests: small tables of drawn images, a complete toy run of the shipped settings.ini, and helpers."
import io
import os
import shutil
import socket
import threading
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from aptos_fastai.cli import main
from aptos_fastai.common.io import file_hash, write_csv, write_record
from aptos_fastai.deploy import parity
from aptos_fastai.metrics import quadratic_kappa
from aptos_fastai.pipeline.graph import load_run

settings.register_profile('untimed', deadline=None)     # a busy machine is no failure
settings.load_profile('untimed')

ROOT = Path(__file__).parents[1]
IDRID = Path(os.environ.get('IDRID', ROOT.parent / 'shared/data/idrid'))
STAGES = ['pretrain_256', 'finetune_256', 'pretrain_512', 'finetune_512', 'retrain_512', 'pretrain_dense',
          'finetune_dense']
TOY_KEYS = [
    'demo.pretrain=60', 'demo.train=60', 'demo.test=20', 'demo.shrink=8',
    'demo.archs=legacy_seresnet50:test_resnet densenet121:test_resnet', 'demo.stage.epochs=1', 'stage.tta=hflip',
    'stage.precision=f32',                   # `auto` would time both precisions in every test
    'submit.final=retrain_512',              # a single network, whose files many tests look into
]
TOY = [option for key in TOY_KEYS for option in ('--set', key)]

TABLES = '''
[table.train]
csv = train.csv
images = train_images
grade = diagnosis
[table.test]
csv = test.csv
images = test_images
'''                                          # what `write_table` writes: train and test

# With pytest-xdist, a process that is free takes the next file: the files that take long come first, so that all
# processes end at about the same time. The first two start with different runs, which they make
LONG = [f'{name}.py' for name in (
    'test_offline', 'test_kill', 'test_parallel', 'test_serve', 'test_retraining', 'test_graph', 'test_faults',
    'test_tune', 'test_weights', 'test_optimizer', 'test_probe', 'test_fit', 'test_deadline', 'test_fused_eyes',
    'test_other_runs', 'test_explain', 'test_transformers', 'test_kaggle', 'test_bundle', 'test_networks',
    'test_precision', 'test_loaders')]

torch.set_num_threads(1)
os.environ.setdefault('OMP_NUM_THREADS', '1')            # of the programs that tests start, beside other tests
parity.PARITY_IMAGES = 24                    # each export compares four backends on so many images


def pytest_configure(config): config.option.loadscopereorder = False   # pytest-xdist: files of most tests first


def pytest_collection_modifyitems(items):
    "Put the tests of `LONG` files first"
    order = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


# Images and tables

def fundus(rng, side=96, grade=0):
    "Draw a BGR disc with vessels and 4 x `grade` dark spots, which a tiny network can learn to count"
    im = np.zeros((side, int(side * 1.3), 3), np.uint8)
    x0, y0 = im.shape[1] // 2, side // 2
    cv2.circle(im, (x0, y0), side // 2 - 4, (60, 90, 200), -1)
    for _ in range(30):                      # vessels, different in every eye
        x1, y1, x2, y2 = (rng.uniform(-.34, .34, 4) * side).astype(int)
        cv2.line(im, (x0 + x1, y0 + y1), (x0 + x2, y0 + y2), (50, 75, 180), 2)
    for _ in range(4 * grade):
        x, y = (rng.uniform(-.28, .28, 2) * side).astype(int)
        cv2.circle(im, (x0 + x, y0 + y), 4, (20, 20, 60), -1)
    return im


@cache
def png_files(n, seed):
    "Return `n` images of the grades 0, 1, 2, 3, 4, 0, … as PNG files"
    rng = np.random.default_rng(seed)
    return [cv2.imencode('.png', fundus(rng, grade=i % 5))[1].tobytes() for i in range(n)]


def write_table(folder: Path, n=40, graded=True, seed=0, name='train'):
    "Write `name`.csv and `name`_images/ with `n` images of grades 0, 1, 2, 3, 4, 0, …; return the graded table"
    images = folder / f'{name}_images'
    images.mkdir(parents=True, exist_ok=True)
    df = pd.DataFrame(dict(id_code=[f'{name}{i:03}' for i in range(n)], diagnosis=np.arange(n) % 5))
    for i, png in zip(df.id_code, png_files(n, seed), strict=True): (images / f'{i}.png').write_bytes(png)
    columns = ['id_code', 'diagnosis'] if graded else ['id_code']
    df[columns].to_csv(folder / f'{name}.csv', index=False)
    return df


def dicom(a, photometric, stored, frames=None, signed=0, syntax=None):
    "Return the bytes of a DICOM file with the pixels of `a`, `stored` bits each"
    pydicom = pytest.importorskip('pydicom')
    ds = pydicom.dataset.FileDataset(None, {}, preamble=b'\0' * 128)
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax or pydicom.uid.ExplicitVRLittleEndian
    ds.SOPClassUID = '1.2.840.10008.5.1.4.1.1.77.1.5.1'                # ophthalmic photography, 8 bit
    ds.SOPInstanceUID = '1.2.3.4'
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.Rows, ds.Columns = a.shape[:2]
    ds.SamplesPerPixel = 3 if a.ndim == 3 else 1
    ds.PhotometricInterpretation = photometric
    if a.ndim == 3: ds.PlanarConfiguration = 0
    if frames: ds.NumberOfFrames = frames
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = a.itemsize * 8, stored, stored - 1
    ds.PixelRepresentation = signed
    ds.PixelData = a.tobytes()
    f = io.BytesIO()
    ds.save_as(f, enforce_file_format=True)
    return f.getvalue()


def write_dicom(file, pixels=None, **tags):
    "Write a DICOM file of RGB pixels, with a name, a birth date and further tags; return its path"
    pydicom = pytest.importorskip('pydicom')
    pixels = np.zeros((8, 8, 3), np.uint8) if pixels is None else pixels
    ds = pydicom.dcmread(io.BytesIO(dicom(np.ascontiguousarray(pixels), 'RGB', 8)))
    tags = dict(PatientName='DOE^JANE', PatientBirthDate='19500131') | tags
    with pydicom.config.disable_value_validation():
        for name, value in tags.items(): setattr(ds, name, value)
        ds.save_as(file)
    return file


@pytest.fixture
def tables(tmp_path):
    "A data folder with a graded and an ungraded table, for recipes/one_table.ini"
    write_table(tmp_path / 'data', 40)
    write_table(tmp_path / 'data', 10, graded=False, seed=1, name='test')
    return tmp_path / 'data'


SMALL = {                                    # what recipes/one_table.ini says -> at toy size
    'tf_efficientnet_lite0': 'test_resnet',
    'bundled': 'none',
    'size = 224': 'size = 32\nprecision = f32',
    'size = 320': 'size = 64',
    'folds = 5': 'folds = 2',
    'epochs = 11': 'epochs = 1',
    'freeze_epochs = 1': 'freeze_epochs = 0',
    'bs = 16': 'bs = 8',
    'tta = d4': 'tta = hflip',
}


def write_small_recipe(file: Path):
    "Write recipes/one_table.ini at toy size; return its path"
    text = (ROOT / 'recipes/one_table.ini').read_text()
    for old, new in SMALL.items():
        assert old in text, f'{old} is not in recipes/one_table.ini'
        text = text.replace(old, new)
    file.write_text(text)
    return file


@pytest.fixture
def small_recipe(tmp_path):
    "recipes/one_table.ini at toy size"
    return write_small_recipe(tmp_path / 'small.ini')


@pytest.fixture(scope='session')
def idrid():
    "The folder of the IDRiD images; skips the test where they are missing"
    if not (IDRID / 'train.csv').is_file(): pytest.skip(f'no IDRiD images in {IDRID}; set IDRID to their folder')
    return IDRID


# Finished runs

@contextmanager
def without_report():
    "Runs in this block write an empty report.html: its figures take most of the time of a toy run"
    def write_nothing(run, *args): (run.root / 'report.html').write_text('none')
    with pytest.MonkeyPatch.context() as m:
        m.setattr('aptos_fastai.reports.run_report.write_report', write_nothing)
        yield


@pytest.fixture
def no_report():
    "A test whose runs write an empty report.html"
    with without_report(): yield


def made_once(tmp_path_factory, name, make):
    "Return a folder that `make(folder)` fills: once for all processes of pytest-xdist, of which each gets a copy"
    own, base = tmp_path_factory.mktemp(name), tmp_path_factory.getbasetemp()
    shared = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base) / f'{name}_of_all'
    with FileLock(f'{shared}.lock'):
        made = shared.with_suffix('.made')
        if not made.is_file():
            shutil.rmtree(shared, ignore_errors=True)                  # of a process that failed
            shared.mkdir()
            make(shared)
            made.touch()
    return shutil.copytree(shared, own, dirs_exist_ok=True)


def make_toy(folder): main(['all', '--recipe', str(ROOT / 'settings.ini'), '--runs', str(folder), *TOY])


@pytest.fixture(scope='session')
def toy(tmp_path_factory):
    "The run folder of `run.py all` with the shipped settings.ini on a toy demo; tests must not change it"
    return made_once(tmp_path_factory, 'toy', make_toy) / 'settings-demo'


@pytest.fixture
def toy_copy(toy, tmp_path):
    "A copy of the toy run that a test may change"
    shutil.copytree(toy.parent, tmp_path / 'runs')
    return tmp_path / 'runs' / toy.name


def make_small(folder):
    write_table(folder / 'data', 40)
    write_table(folder / 'data', 10, graded=False, seed=1, name='test')
    recipe = write_small_recipe(folder / 'small.ini')
    recipe.write_text(recipe.read_text().replace('\n[table.train]\n', '\n[table.train]\nblock = 2\n'))
    with without_report(): main(['all', *small_options(folder)])


@pytest.fixture(scope='session')
def small(tmp_path_factory):
    """A folder with small.ini (recipes/one_table.ini at toy size, ids in blocks of 2), its data and its finished run.

    Tests must not change it.
    """
    return made_once(tmp_path_factory, 'small', make_small)


@pytest.fixture
def small_copy(small, tmp_path):
    "A copy of `small` that a test may change"
    return shutil.copytree(small, tmp_path / 'small')


def small_options(folder, *keys):
    "Return the command line arguments of the run in a folder such as `small`, with keys of --set"
    places = ['--recipe', str(folder / 'small.ini'), '--data', str(folder / 'data'), '--runs', str(folder / 'runs')]
    return [*places, *(option for key in keys for option in ('--set', key))]


@pytest.fixture(scope='session')
def image_paths(toy):
    "The paths of the toy run's test images"
    return open_toy_run(toy).frames['aptos_test'].path.tolist()


@contextmanager
def url_of(app):
    "Serve an ASGI application in a thread; yield its URL"
    uvicorn = pytest.importorskip('uvicorn')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level='warning'))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started: time.sleep(.05)
    yield f'http://127.0.0.1:{port}'
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope='session')
def server_url(toy):
    "The URL of a server of the toy run"
    pytest.importorskip('uvicorn')
    from aptos_fastai.deploy import serve
    from aptos_fastai.inference.grader import load_grader
    with url_of(serve.get_app(load_grader(toy), ['127.0.0.1'])) as url: yield url


@pytest.fixture(scope='module')
def browser():
    "Headless Chromium"
    chromium = shutil.which('chromium') or shutil.which('google-chrome')
    if not chromium: pytest.skip('no Chromium here')
    playwright = pytest.importorskip('playwright.sync_api')
    with playwright.sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        yield b
        b.close()


def open_toy_run(toy):
    "Return the `Run` of a toy run folder"
    return load_run(str(ROOT / 'settings.ini'), 'demo', str(toy.parent), TOY_KEYS)


def write_finished_run(root, grades=None, node='teacher', resampled='patients', **summary):
    """Write what `runs` and `compare` read of a finished run: summary.json and oof.csv. `grades` are those of the stage
    on 60 images of the grades 0, 1, 2, 3, 4, 0, …, two of each patient.
    """
    y = np.arange(60) % 5
    grades = y if grades is None else np.asarray(grades)
    oof = pd.DataFrame(dict(source='train', id_code=[f'0{i}' for i in range(60)], diagnosis=y, fold=np.arange(60) // 30,
                            group=[f'p{i // 2}' for i in range(60)], **{node: grades + .1, f'{node}_grade': grades}))
    oof = summary.pop('oof', oof)
    write_csv(root / 'oof.csv', oof)
    kappa = quadratic_kappa(oof[f'{node}_grade'], oof.diagnosis)
    stage = dict(stage=node, kappa=kappa, kappa_interval=[kappa - .1, kappa + .1], validated=len(oof), warnings=[],
                 resampled=resampled, seconds=90)
    write_record(root / 'summary.json', dict(
        stages=[stage], submission=dict(node=node), clusters=[], synthetic=False, date='2020-02-29',
        outputs={'oof.csv': file_hash(root / 'oof.csv')}) | summary)
    return root


def toy_args(toy, *more):
    "Return the command line arguments of a toy run folder"
    return ['--recipe', str(ROOT / 'settings.ini'), '--runs', str(toy.parent), *TOY, *more]


def stage_options(*keys):
    "Return --set options for keys of [stage]"
    return [option for key in keys for option in ('--set', f'stage.{key}')]


# Checks

def expect_error(capsys, args, *words):
    "Run a command that must end in one line on stderr that contains `words`, and exit status 1; return the line"
    with pytest.raises(SystemExit) as e: main([str(o) for o in args])
    err = capsys.readouterr().err
    assert e.value.code == 1, err
    assert err.startswith('error: ') and err.count('\n') == 1, err
    for word in words: assert str(word) in err, f'{word!r} is not in: {err}'
    return err


def modified_times(folder):
    "Return the modification time of each file in `folder`"
    return {p: p.stat().st_mtime_ns for p in folder.rglob('*') if p.is_file()}
