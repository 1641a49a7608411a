import ast
import subprocess
import sys

import pytest
from conftest import ROOT, fails

from aptos_fastai.cli import _commands, main


@pytest.mark.parametrize('args', [['--help'], *([c, '--help'] for c in _commands())])
def test_help_imports_no_torch(args):
    code = (f'import sys\nfrom aptos_fastai.cli import main\ntry: main({args!r})\nexcept SystemExit: pass\n'
            'assert not {"torch", "fastai", "pandas", "cv2"} & set(sys.modules)')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0 and 'usage: run.py' in out.stdout, out.stderr

def test_every_command_shows_an_example(capsys):
    for c in _commands():
        with pytest.raises(SystemExit): main([c, '--help'])
        assert f'python run.py {c}' in capsys.readouterr().out

def test_keys_lists_every_key_of_the_shipped_recipe(capsys):
    main(['keys'])
    out = capsys.readouterr().out
    for line in (ROOT / 'settings.ini').read_text().splitlines():
        if '=' in line and not line.startswith('#'): assert f'  {line.split("=")[0].strip()} ' in out

def test_no_stage_is_asked_for_by_name():
    for p in (ROOT / 'aptos_fastai').rglob('*.py'):
        for n in ast.walk(ast.parse(p.read_text())):
            if isinstance(n, ast.Compare):
                for o in [n.left, *n.comparators]:
                    assert not (isinstance(o, ast.Constant) and str(o.value).startswith(('pretrain_', 'finetune_', 'retrain'))), f'{p.name}:{n.lineno}'


def test_init_writes_what_is_shipped_and_nothing_over(tmp_path, capsys):
    main(['init', str(tmp_path)])
    for f in [ROOT / 'settings.ini', *(ROOT / 'recipes').glob('*.ini')]: assert (tmp_path / f.relative_to(ROOT)).read_bytes() == f.read_bytes()
    (tmp_path / 'settings.ini').write_text('mine')
    fails(capsys, ['init', tmp_path], 'settings.ini: is there already; give another folder')
    assert (tmp_path / 'settings.ini').read_text() == 'mine'
