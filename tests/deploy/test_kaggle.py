"The offline notebook, run as Kaggle runs it: no network, its own folders, the package from the dataset."
import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import fails

from aptos_fastai.cli import main

nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')


@pytest.fixture
def uploaded(copied, tmp_path):
    "/kaggle/input with the dataset and the competition, and the kernel's folder"
    main(['kaggle', str(copied), '--user', 'me'])
    shutil.copytree(copied / 'kaggle/dataset', tmp_path / 'input/aptos-fastai')
    shutil.copytree(copied.parent / 'demo-60-60-20-seed42/aptos2019-blindness-detection', tmp_path / 'input/aptos2019-blindness-detection')
    (tmp_path / 'working').mkdir()
    return copied / 'kaggle', tmp_path


def execute(kernel: Path, at: Path) -> str:
    "Runs the notebook; what it printed"
    nb = nbformat.read(kernel / 'answer.ipynb', 4)
    hide = ('import socket, sys, builtins\n'
            'def no(*a, **k): raise OSError("no network here")\nsocket.create_connection = no\nsys.modules["pyvips"] = None\n')
    nb.cells.insert(0, nbformat.v4.new_code_cell(hide))
    nb.cells.append(nbformat.v4.new_code_cell('import aptos_fastai; print("from", aptos_fastai.__file__)'))
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    env |= dict(KAGGLE_INPUT=str(at / 'input'), KAGGLE_WORKING=str(at / 'working'), OMP_NUM_THREADS='1')
    client = nbclient.NotebookClient(nb, timeout=300, kernel_name='python3', resources=dict(metadata=dict(path=str(at / 'working'))))
    client.execute(env=env)
    return ''.join(o.get('text', '') + o.get('data', {}).get('text/plain', '') for c in nb.cells if c.cell_type == 'code' for o in c.outputs)


def test_the_notebook_answers_offline(uploaded):
    folder, at = uploaded
    test = at / 'input/aptos2019-blindness-detection'
    ids = pd.read_csv(test / 'test.csv').id_code
    (test / 'test_images' / f'{ids[3]}.png').write_bytes(b'broken')
    pd.DataFrame(dict(id_code=ids[::-1], diagnosis=0)).to_csv(test / 'sample_submission.csv', index=False)
    out = execute(folder / 'kernel', at)
    got = pd.read_csv(at / 'working/submission.csv', dtype=dict(id_code=str))
    rows = pd.read_csv(at / 'working/grades.csv')
    rows.index = rows.file.map(lambda f: Path(f).stem)
    want = pd.read_csv(folder.parent / 'scores.csv', dtype=dict(id_code=str)).set_index('id_code')['mean']
    assert got.id_code.tolist() == ids[::-1].tolist()
    assert (rows.score - want[rows.index]).abs().max() < 2e-3        # Pillow's pixels, not libvips'
    assert (got.set_index('id_code').diagnosis[rows.index] == rows.grade).sum() == 19
    assert f'from {at / "input"}' in out and 'pyvips is not installed' in out and 'for 13,000' in out and f'commonest grade: {ids[3]}' in out


def test_what_is_uploaded(uploaded):
    folder, _ = uploaded
    kernel, data = (json.loads((folder / f).read_text()) for f in ('kernel/kernel-metadata.json', 'dataset/dataset-metadata.json'))
    assert kernel['enable_internet'] == 'false' and kernel['dataset_sources'] == [data['id']] == ['me/' + data['title']] and 6 <= len(data['title']) <= 50
    assert (folder / 'kernel' / kernel['code_file']).is_file() and kernel['competition_sources'] == ['aptos2019-blindness-detection']
    text = (folder / 'kernel/answer.ipynb').read_text()
    assert '1928' not in text and 'http' not in text
    names = {p.name for p in (folder / 'dataset').rglob('*') if p.is_file()}
    assert not {n for n in names if n.endswith(('.pkl', '.pyc', '.png', '.csv'))} and 'report.html' in names and 'bundle.json' in names


def test_a_bad_user_name_is_told(toy, capsys): fails(capsys, ['kaggle', toy, '--user', 'a b'], '--user a b: a Kaggle user name is needed')
