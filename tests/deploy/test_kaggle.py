"The offline notebook, run as Kaggle runs it: no network, its own folders, the package from the dataset."
import json
import os
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import expect_error

from aptos_fastai.cli import main
from aptos_fastai.common.console import plural
from aptos_fastai.inference.model_spec import read_model
from aptos_fastai.metrics import apply_thresholds

nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')

COMPETITION = 'aptos2019-blindness-detection'
WITHOUT_NETWORK_AND_PYVIPS = '''\
import socket
import sys


def refuse(*args, **kwargs): raise OSError("no network here")


socket.create_connection = refuse
sys.modules["pyvips"] = None
'''


@pytest.fixture
def uploaded(toy_copy, tmp_path):
    "The folder that `kaggle` wrote, and a folder with Kaggle's input and working folders"
    main(['kaggle', str(toy_copy), '--user', 'me'])
    demo = next(toy_copy.parent.glob('demo-*'))
    shutil.copytree(toy_copy / 'kaggle/dataset', tmp_path / 'input/aptos-fastai')
    shutil.copytree(demo / COMPETITION, tmp_path / 'input' / COMPETITION)
    (tmp_path / 'working').mkdir()
    return toy_copy / 'kaggle', tmp_path


def run_notebook(kernel: Path, root: Path) -> str:
    "Run the notebook and return what it printed"
    nb = nbformat.read(kernel / 'submission.ipynb', 4)
    nb.cells.insert(0, nbformat.v4.new_code_cell(WITHOUT_NETWORK_AND_PYVIPS))
    nb.cells.append(nbformat.v4.new_code_cell('import aptos_fastai\nprint("from", aptos_fastai.__file__)'))
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    env |= dict(KAGGLE_INPUT=str(root / 'input'), KAGGLE_WORKING=str(root / 'working'), OMP_NUM_THREADS='1')
    resources = dict(metadata=dict(path=str(root / 'working')))
    nbclient.NotebookClient(nb, timeout=300, kernel_name='python3', resources=resources).execute(env=env)
    outputs = [o for cell in nb.cells if cell.cell_type == 'code' for o in cell.outputs]
    return ''.join(o.get('text', '') + o.get('data', {}).get('text/plain', '') for o in outputs)


def test_the_notebook_writes_a_submission_offline(uploaded):
    folder, root = uploaded
    test = root / 'input' / COMPETITION
    ids = pd.read_csv(test / 'test.csv').id_code
    unreadable = ids[3]
    (test / 'test_images' / f'{unreadable}.png').write_bytes(b'broken')
    (root / 'input/another').mkdir()         # a dataset of this package with another model
    (root / 'input/another/bundle.json').write_text('{}')
    ungradable = ids[5]
    cv2.imwrite(str(test / 'test_images' / f'{ungradable}.png'), np.zeros((96, 128, 3), np.uint8))
    pd.DataFrame(dict(id_code=ids[::-1], diagnosis=0)).to_csv(test / 'sample_submission.csv', index=False)
    printed = run_notebook(folder / 'kernel', root)
    submission = pd.read_csv(root / 'working/submission.csv', dtype=dict(id_code=str))
    grades = pd.read_csv(root / 'working/grades.csv')
    grades.index = grades.file.map(lambda f: Path(f).stem)
    expected = pd.read_csv(folder.parent / 'scores.csv', dtype=dict(id_code=str)).set_index('id_code').score
    assert submission.id_code.tolist() == ids[::-1].tolist()
    # Pillow decodes a little differently from libvips
    assert (grades.score - expected[grades.index]).drop(ungradable).abs().max() < 2e-3
    diagnosis = submission.set_index('id_code').diagnosis
    graded = grades[grades.grade.notna()]
    assert len(graded) > len(ids) / 2 and (diagnosis[graded.index] == graded.grade).all()
    refused = (grades.referable == 'ungradable').sum()
    assert grades.referable[ungradable] == 'ungradable' and f'ungradable: {plural(refused, "image")} (' in printed
    thresholds = read_model(folder.parent)[0].thresholds
    assert diagnosis[ungradable] == apply_thresholds(grades.score[ungradable], thresholds)
    assert diagnosis[unreadable] == grades.grade.mode()[0]
    assert f'from {root / "input"}' in printed
    assert 'pyvips is not installed' in printed and 'for 13,000' in printed
    assert 'most frequent' in printed and f'without a grade: 1 of {len(ids)} images ({unreadable})' in printed


def test_what_is_uploaded(uploaded):
    folder, _ = uploaded
    kernel = json.loads((folder / 'kernel/kernel-metadata.json').read_text())
    dataset = json.loads((folder / 'dataset/dataset-metadata.json').read_text())
    assert kernel['enable_internet'] == 'false' and kernel['competition_sources'] == [COMPETITION]
    assert kernel['dataset_sources'] == [dataset['id']] == ['me/' + dataset['title']]
    assert 6 <= len(dataset['title']) <= 50
    notebook = (folder / 'kernel' / kernel['code_file']).read_text()
    assert '1928' not in notebook and 'http' not in notebook
    names = {p.name for p in (folder / 'dataset').rglob('*') if p.is_file()}
    assert not {n for n in names if n.endswith(('.pkl', '.pyc', '.png', '.csv'))}
    assert 'report.html' in names and 'bundle.json' in names


def test_a_notebook_without_its_dataset_ends(uploaded, monkeypatch):
    "A newer dataset, or that of another model: the cell that looks for it says so, before anything is graded"
    folder, root = uploaded
    code = nbformat.read(folder / 'kernel/submission.ipynb', 4).cells[1].source
    monkeypatch.setenv('KAGGLE_INPUT', str(root / 'input'))
    monkeypatch.setattr('sys.path', list(sys.path))
    exec(code, {})
    bundle = root / 'input/aptos-fastai/bundle.json'
    bundle.write_text(bundle.read_text() + ' ')
    with pytest.raises(FileNotFoundError, match=r'lacks the dataset aptos-fastai-\S+ as it was .*input/aptos-fastai\)'):
        exec(code, {})


def test_a_bad_user_name_is_an_error(toy, capsys):
    expect_error(capsys, ['kaggle', toy, '--user', 'a b'], '--user a b: not a Kaggle user name')
