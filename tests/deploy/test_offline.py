"Nothing that grades, exports or tracks in the run folder opens a connection or leaves a file in the home folder."
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import ROOT

from aptos_fastai.deploy.bundle import PACKAGES

# What Matplotlib, which fastai imports, keeps in the home folder: its list of fonts, and settings
CACHES = '.cache/matplotlib', '.config/matplotlib'
# Set or read by packages that report their use; under these MLflow does not, whatever this package sets
TELEMETRY = ('ORT_DISABLE_TELEMETRY', 'MLFLOW_DISABLE_TELEMETRY', 'MLFLOW_TRACKING_URI', 'DO_NOT_TRACK', 'CI',
             'GITHUB_ACTIONS', 'PYTEST_CURRENT_TEST')
# Runs commands of this package, a JSON list of their arguments; a connection that Python code tries is refused and
# makes the exit status 1
PROGRAM = """
import json, socket, sys
tried = []

def refuse(*args, **kwargs):
    tried.append(args)
    raise OSError('no network in this test')

for name in ('connect', 'connect_ex', 'sendto'): setattr(socket.socket, name, refuse)
for name in ('getaddrinfo', 'gethostbyname', 'create_connection'): setattr(socket, name, refuse)

from aptos_fastai.cli import main
for args in json.loads(sys.argv[1]): main(args)
if tried: sys.exit(f'tried to connect: {tried}')
"""


def run_offline(home, *commands):
    """Run commands in one new process with `home` as empty home folder.

    Assert that they connect nowhere and leave no file there.
    """
    home.mkdir()
    env = {k: v for k, v in os.environ.items()
           if not k.startswith('XDG_') and k not in ('TORCH_HOME', 'HF_HOME', 'MPLCONFIGDIR', *TELEMETRY)}
    command = [sys.executable, '-c', PROGRAM, json.dumps([list(map(str, args)) for args in commands])]
    trace = home.with_suffix('.trace')
    if shutil.which('strace') and _can_trace(trace):       # sees the connections of native code, too
        command = ['strace', '-f', '--seccomp-bpf', '-e', 'trace=connect,sendto', '-o', str(trace), *command]
    out = subprocess.run(command, env=env | dict(HOME=str(home), USERPROFILE=str(home)), cwd=ROOT, capture_output=True,
                         text=True)
    assert out.returncode == 0, out.stdout + out.stderr
    if trace.is_file(): assert [line for line in trace.read_text().splitlines() if 'AF_INET' in line] == []
    left = [f.relative_to(home).as_posix() for f in home.rglob('*') if f.is_file()]
    assert [f for f in left if not f.startswith(CACHES)] == []
    return out


def _can_trace(file):
    "Return whether strace may trace programs here"
    command = ['strace', '-f', '--seccomp-bpf', '-o', str(file), 'true']
    return subprocess.run(command, capture_output=True).returncode == 0


def test_export_and_predict_make_no_connection(toy_copy, image_paths, tmp_path):
    for package in ('onnx', 'onnxscript', 'onnxruntime'): pytest.importorskip(package)
    backends = [name for name, package in PACKAGES.items() if find_spec(package)]
    outputs = [tmp_path / f'{backend}.csv' for backend in backends]
    run_offline(tmp_path / 'home', ['export', toy_copy, '--parity', '4'], *(
        ['predict', toy_copy / 'bundle', *image_paths[:4], '-o', out, '--backend', backend]
        for backend, out in zip(backends, outputs, strict=True)))
    compared = {o['backend'] for o in json.loads((toy_copy / 'bundle/bundle.json').read_text())['parity']}
    assert {'onnx'} <= compared <= set(backends)          # it compared the backends, so it ran them
    for out in outputs: assert len(out.read_text().splitlines()) == 5


def test_tracking_in_the_run_folder_makes_no_connection(tables, small_recipe, tmp_path):
    trackers = [tracker for tracker in ('tensorboard', 'mlflow') if find_spec(tracker)]
    if not trackers: pytest.skip('neither TensorBoard nor MLflow is installed')
    run_offline(tmp_path / 'home', *(
        ['train', 'teacher', '--recipe', small_recipe, '--data', tables, '--runs', tmp_path / tracker, '--set',
         'stage.folds=1', '--set', f'stage.track={tracker}'] for tracker in trackers))
    for tracker in trackers: assert any((tmp_path / tracker / 'small' / tracker).rglob('*'))


def test_a_connection_is_refused():
    code = 'import socket; socket.create_connection(("127.0.0.1", 9))'
    program = PROGRAM.partition('from aptos')[0] + code
    out = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert 'no network in this test' in out.stderr
