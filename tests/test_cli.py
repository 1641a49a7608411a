"The command line: help, usage errors, and the commands that need no run."
import ast
import os
import signal
import subprocess
import sys
import threading
from inspect import signature

import pytest
from conftest import ROOT, expect_error

import aptos_fastai
from aptos_fastai import cli
from aptos_fastai.cli import COMMANDS, ask_user, main, uses_run

# Help

def test_help_imports_no_heavy_library():
    code = ('import sys\nfrom aptos_fastai.cli import COMMANDS, main\n'
            'for args in [["--help"], *([name, "--help"] for name in COMMANDS)]:\n'
            '    main(args)\n'
            '    found = {"torch", "fastai", "pandas", "cv2", "rich"} & set(sys.modules)\n'
            '    assert not found, (args, found)')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0, out.stderr
    assert out.stdout.count('Usage: run.py') == 1 + len(COMMANDS)


@pytest.mark.parametrize('name', COMMANDS)
def test_help_of_a_command(name, capsys):
    main([name, '--help'])
    out = capsys.readouterr().out
    examples = out[out.index('Example'):].partition('\n\n')[0].splitlines()[1:]
    assert examples and all(line.startswith(f'    python run.py {name}') for line in examples)
    has_runs = uses_run(COMMANDS[name]) or 'runs' in signature(COMMANDS[name]).parameters
    assert ('--runs FOLDER' in out) == has_runs
    assert '{' not in out and '<str>' not in out


def test_help_of_predict_shows_its_arguments_as_they_are_typed(capsys):
    main(['predict', '--help'])
    out = capsys.readouterr().out
    assert out.startswith('Usage: run.py predict [OPTIONS] MODEL IMAGES...\n') and '\n  IMAGES  ' in out


def test_help_of_demo_shows_only_the_options_that_it_uses(capsys):
    main(['demo', '--help'])
    out = capsys.readouterr().out
    assert '--recipe' in out and '--set' in out
    for option in ('--data FOLDER', '--runs FOLDER', '--trust FILE'): assert option not in out


def test_help_of_the_program_shows_complete_sentences(capsys):
    main(['--help'])
    out = capsys.readouterr().out
    for name in COMMANDS: assert f'  {name} ' in out
    assert '...\n' not in out.partition('Commands:')[2]


def test_help_keeps_square_brackets(capsys):
    main(['train', '-h'])
    assert '[default: settings.ini]' in ' '.join(capsys.readouterr().out.split())


def test_version(capsys):
    main(['--version'])
    assert capsys.readouterr().out == f'aptos-fastai {aptos_fastai.__version__}\n'


# Errors

@pytest.mark.parametrize('args, words', [
    ([], ['Missing command', 'run.py --help']),
    (['trian', 'finetune_256'], ['trian', "'train'"]),
    (['batch', 'pretrain_256'], ['No such command', 'batch']),
    (['all', '--recip', 'x'], ['--recip', '--recipe', 'run.py all --help']),
    (['all', 'more'], ['more']),
    (['train'], ["Missing argument 'STAGE'", 'run.py train --help']),
    (['predict', 'runs/settings'], ["Missing argument 'IMAGES'"]),
    (['inspect', 'aptos_train', 'many'], ["'COUNT'", 'many is not a whole number']),
    (['serve', 'x', '--port', 'http'], ["'--port'", 'http is not a whole number']),
    (['serve', 'x', '--port', '0'], ['--port 0: choose a port from 1 to 65535']),
    (['all', '--set'], ['--set']),
])
def test_usage_errors(capsys, args, words):
    expect_error(capsys, args, *words)


def fail_with(error):
    "Return a function that raises `error`"
    def function(*_): raise error
    return function


@pytest.mark.parametrize('error, status, words', [
    (KeyboardInterrupt('teacher has finished 1 of 2 epochs'), 130, ['stopped: teacher has finished', 'to resume']),
    (cli.Terminated(), 143, ['stopped.', 'to resume']),
    (MemoryError(), 1, ['plan: out of memory']),
    (OSError(28, 'No space left on device', 'x.csv'), 1, ['x.csv: No space left on device'])])
def test_failures_of_a_command(capsys, monkeypatch, error, status, words):
    monkeypatch.setattr(cli.RunOptions, 'load', fail_with(error))
    with pytest.raises(SystemExit) as e: main(['plan'])
    err = capsys.readouterr().err
    assert e.value.code == status and err.startswith('error: ') and err.count('\n') == 1
    for word in words: assert word in err


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli.RunOptions, 'load', fail_with(RuntimeError('a bug')))
    with pytest.raises(RuntimeError, match='a bug'): main(['plan'])


def test_sigterm_stops_a_command_and_its_handler_is_restored(capsys, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli.RunOptions, 'load', lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as e: main(['plan'])
    assert e.value.code == 143 and signal.getsignal(signal.SIGTERM) == before


def test_a_command_runs_outside_the_main_thread(capsys):
    thread = threading.Thread(target=main, args=(['keys'],))
    thread.start()
    thread.join()
    assert '[recipe]' in capsys.readouterr().out


# The environment

ENTRIES = {
    'run.py': [sys.executable, '-c', 'import runpy, sys; sys.argv = ["run.py", "keys"]; runpy.run_path("run.py", '
               'run_name="__main__"); SHOW'],
    'console script': [sys.executable, '-c', 'from aptos_fastai.cli import main; SHOW; main(["--version"])'],
    'import': [sys.executable, '-c', 'import aptos_fastai; SHOW'],
}
SHOW = 'import os; print("\\n", os.environ.get("GOMP_SPINCOUNT"), os.environ.get("ORT_DISABLE_TELEMETRY"))'


@pytest.mark.parametrize('entry, own, expected', [
    *((entry, {}, aptos_fastai.SPIN_COUNT) for entry in ENTRIES),
    ('import', dict(GOMP_SPINCOUNT='7'), '7'), ('import', dict(OMP_WAIT_POLICY='active'), 'None')])
def test_openmp_waits_briefly_unless_the_user_chose_otherwise(entry, own, expected):
    changed = 'GOMP_SPINCOUNT', 'OMP_WAIT_POLICY', 'ORT_DISABLE_TELEMETRY'
    env = {k: v for k, v in os.environ.items() if k not in changed}
    command = [o.replace('SHOW', SHOW) for o in ENTRIES[entry]]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env | own)
    assert f'\n {expected} 1\n' in out.stdout, out.stdout + out.stderr


# Commands that need no run

def test_keys_lists_every_key_of_the_shipped_recipe(capsys):
    main(['keys'])
    out = capsys.readouterr().out
    for line in (ROOT / 'settings.ini').read_text().splitlines():
        if '=' in line and not line.startswith('#'): assert f'  {line.split("=")[0].strip()} ' in out


def test_keys_can_be_piped_in_the_encoding_of_windows_and_shows_no_emoji():
    env = os.environ | dict(PYTHONIOENCODING='cp1252')
    out = subprocess.run([sys.executable, 'run.py', 'keys'], env=env, cwd=ROOT, capture_output=True)
    assert out.returncode == 0 and b'dicom:eye:' in out.stdout, out.stderr


def test_init_writes_the_shipped_recipes_and_overwrites_nothing(tmp_path, capsys):
    main(['init', str(tmp_path)])
    for file in [ROOT / 'settings.ini', *(ROOT / 'recipes').glob('*.ini')]:
        assert (tmp_path / file.relative_to(ROOT)).read_bytes() == file.read_bytes()
    (tmp_path / 'settings.ini').write_text('mine')
    expect_error(capsys, ['init', tmp_path], 'settings.ini: already exists', 'Choose another folder')
    assert (tmp_path / 'settings.ini').read_text() == 'mine'


def test_demo_writes_its_tables(tmp_path, capsys):
    keys = ['--set', 'demo.pretrain=20', '--set', 'demo.train=20', '--set', 'demo.test=5']
    main(['demo', str(tmp_path / 'demo'), '--recipe', str(ROOT / 'settings.ini'), *keys])
    assert (tmp_path / 'demo/aptos2019-blindness-detection/train.csv').is_file()
    assert 'synthetic images ->' in capsys.readouterr().out


# Code

def test_no_code_asks_for_a_stage_by_name():
    prefixes = ('pretrain_', 'finetune_', 'retrain')
    for file in (ROOT / 'aptos_fastai').rglob('*.py'):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Compare): continue
            for value in [node.left, *node.comparators]:
                named = isinstance(value, ast.Constant) and str(value.value).startswith(prefixes)
                assert not named, f'{file.name}:{node.lineno}'


def test_a_user_at_a_terminal_is_asked_until_an_answer_is_one_of_the_choices(monkeypatch):
    for stream in (sys.stdin, sys.stdout): monkeypatch.setattr(stream, 'isatty', lambda: True)
    answers = iter(['grade', 'Grader 2'])
    monkeypatch.setattr('builtins.input', lambda *_: next(answers))
    assert ask_user()('which column is the grade?', ['Grader 1', 'Grader 2']) == 'Grader 2'
    monkeypatch.setattr(sys.stdin, 'isatty', lambda: False)
    assert ask_user() is None
