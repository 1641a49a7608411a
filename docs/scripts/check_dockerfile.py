"""Run the steps of the Dockerfile without Docker: `python docs/scripts/check_dockerfile.py BUNDLE`.

Its absolute folders lie in a new temporary folder. `RUN` and `COPY` are executed there, then `ENTRYPOINT` on the
bundle, which must stay unchanged, until `HEALTHCHECK` succeeds. It differs from Docker: the base image is this machine,
the user is the present one (`useradd` is left out), and PyTorch is the usual CUDA build (6 GB).
"""
import argparse
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = '/venv', '/src', '/model'          # of the image, which become folders of the temporary one
START_SECONDS = 180
Step = tuple[str, str]                       # instruction, its text


def read_steps(text: str) -> list[Step]:
    "Return the instructions of a Dockerfile: comments removed, continued lines joined"
    lines = [line for line in text.splitlines() if not line.lstrip().startswith('#')]
    joined = re.sub(r'\\\n\s*', ' ', '\n'.join(lines))
    steps = (line.partition(' ') for line in joined.splitlines() if line.strip())
    return [(name, rest.strip()) for name, _, rest in steps]


def last(steps: list[Step], name: str) -> str:
    "Return the text of the last instruction of a name, which is the one that counts"
    return [text for instruction, text in steps if instruction == name][-1]


def health_command(steps: list[Step]) -> list[str]:
    "Return the words of the health check"
    return json.loads(last(steps, 'HEALTHCHECK').partition('CMD ')[2])


class Image:
    "What the steps build, below the folder `top`"
    def __init__(self, top: Path):
        self.top, self.folder = top, top
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'VIRTUAL_ENV'))}

    def placed(self, text: str) -> str:
        "Return `text` with the folders of the image moved into the temporary one"
        return re.sub(rf'(?<![\w.])({"|".join(FOLDERS)})(?=[/:\s"]|$)', lambda m: f'{self.top}{m[1]}', text)

    def run(self, name: str, text: str) -> None:
        "Execute one instruction"
        if name == 'WORKDIR' and text in FOLDERS:
            self.folder = self.top / text.strip('/')
            self.folder.mkdir(exist_ok=True)
        elif name == 'ARG':
            key, _, value = text.partition('=')
            if value: self.env[key] = value
        elif name == 'COPY' and '--from' not in text: self.copy(*text.split())
        elif name == 'ENV': self.env |= dict(pair.split('=', 1) for pair in self.placed(text).split())
        elif name == 'RUN' and not text.startswith('useradd'): self.shell(text)
        else: return print(f'not run: {name} {text}')
        print(f'ok: {name} {text}', flush=True)

    def copy(self, *words: str) -> None:
        "Copy files of the repository, as COPY does: the content of a folder"
        *sources, target = words
        for source in (Path(f) for pattern in sources for f in glob.glob(str(ROOT / pattern))):
            to = self.folder / target
            if source.is_dir(): shutil.copytree(source, to, ignore=shutil.ignore_patterns('__pycache__'))
            else: shutil.copy(source, to)

    def shell(self, command: str) -> None:
        "Execute a RUN"
        subprocess.run(['sh', '-ec', self.placed(command)], cwd=self.folder, env=self.env, check=True)

    def environment(self) -> dict[str, str]:
        "Return the environment in which the image runs; PATH is that of the image and of this machine"
        return self.env | dict(PATH=self.env['PATH'].replace('$PATH', os.environ['PATH']))


def start_and_ask(image: Image, steps: list[Step]) -> None:
    "Run ENTRYPOINT until HEALTHCHECK succeeds. Raises `SystemExit` if it does not"
    env = image.environment()
    words = [image.placed(word) for word in json.loads(last(steps, 'ENTRYPOINT'))]
    words[0] = shutil.which(words[0], path=env['PATH']) or words[0]
    print(f'start: {" ".join(words)}', flush=True)
    started = time.monotonic()
    server = subprocess.Popen(words, cwd=tempfile.gettempdir(), env=env)
    try:
        while server.poll() is None and time.monotonic() - started < START_SECONDS:
            if subprocess.run(health_command(steps), env=env, stderr=subprocess.DEVNULL).returncode == 0:
                return print(f'healthy after {time.monotonic() - started:.0f} s')
            time.sleep(1)
        sys.exit(f'no health check succeeded in {START_SECONDS} s')
    finally:
        server.terminate()
        server.wait(20)


def state(folder: Path) -> dict[Path, int]:
    "Return the time of the last change of everything in a folder"
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob('*')]}


def main() -> None:
    "Build, start, ask"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('bundle', type=Path)
    args = parser.parse_args()
    steps = read_steps((ROOT / 'Dockerfile').read_text(encoding='utf-8'))
    with tempfile.TemporaryDirectory() as top:
        image = Image(Path(top))
        model = shutil.copytree(args.bundle, image.top / 'model')
        before = state(model)
        for step in steps: image.run(*step)
        start_and_ask(image, steps)
        if state(model) != before: sys.exit('the model was written to, but it is mounted read-only')


if __name__ == '__main__': main()
