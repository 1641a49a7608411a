"What would go wrong, before it does: versions, devices, disk, tables, weights, the run folder, time."
import os
import platform
import shlex
import shutil
from collections.abc import Iterable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from aptos_fastai.common.console import format_duration, say
from aptos_fastai.common.distributed import cores
from aptos_fastai.common.io import AptosError, run_lock
from aptos_fastai.data.tables import TableError, read_table
from aptos_fastai.recipe import Recipe, read_recipe

PACKAGES = 'aptos_fastai fastai torch timm pandas numpy scikit-learn opencv-python-headless pillow'.split()
EXTRAS = dict(dicom='pydicom', export='onnxruntime', openvino='openvino', serve='fasthtml', parallel='accelerate', tensorboard='tensorboard', wandb='wandb',
              test='pytest')
KAGGLE = {                                   # folder that a recipe names -> how its archive comes to stand there
    'aptos2019-blindness-detection': 'kaggle competitions download -c aptos2019-blindness-detection -p {data} && '
                                     'unzip -q {data}/aptos2019-blindness-detection.zip -d {data}/aptos2019-blindness-detection',
    'diabetic-retinopathy-detection': 'kaggle competitions download -c diabetic-retinopathy-detection -p {data} && '
                                      'unzip -q {data}/diabetic-retinopathy-detection.zip "train.zip.*" trainLabels.csv.zip '
                                      '-d {data}/diabetic-retinopathy-detection && '
                                      '(cd {data}/diabetic-retinopathy-detection && cat train.zip.0* > train.zip && unzip -q train.zip && '
                                      'unzip -q trainLabels.csv.zip)'}

Finding = tuple[str, str, bool]              # what was looked at, what was found, whether it is well


def software() -> Iterator[Finding]:
    "Python, packages, extras"
    yield 'python', platform.python_version(), True
    yield 'packages', ', '.join(f'{p} {metadata.version(p)}' for p in PACKAGES), True
    missing = [e for e, m in EXTRAS.items() if find_spec(m) is None]
    yield 'extras', 'all installed' if not missing else f'not installed: {", ".join(missing)} (pip install -e ".[{missing[0]}]")', True
    yield 'PNG originals', 'libvips decodes them' if find_spec('pyvips') else 'Pillow decodes them, at half the speed: pip install "pyvips[binary]"', True


def devices() -> Iterator[Finding]:
    "Processor, memory, GPUs"
    import torch

    from aptos_fastai.training.precision import cpu_has_bf16, has_bf16
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30 if hasattr(os, 'sysconf') else 0
    yield 'processor', f'{cores()} cores, {memory:.0f} GB; {torch.get_num_threads()} threads for the networks', True
    for i in range(torch.cuda.device_count()):
        o = torch.cuda.get_device_properties(i)
        yield f'GPU {i}', f'{o.name}, {o.total_memory / 2**30:.0f} GB, {"bf16" if has_bf16() else "fp16"}', True
    if not torch.cuda.is_available(): yield 'GPU', 'none: networks run on the processor', True
    yield 'bf16 on the processor', 'yes' if cpu_has_bf16() else 'no: networks on it train and answer in float32', True


def tables(r: Recipe, data: Path) -> Iterator[Finding]:
    "Each table by itself, so that one that is missing hides no other"
    for t in r.used_tables:
        try: df = read_table(t, data)
        except TableError as e:
            yield f'table {t.name}', str(e), False
            continue
        grades = ', grades ' + '/'.join(str(int((df.diagnosis == g).sum())) for g in range(5)) if t.graded else ''
        yield f'table {t.name}', f'{len(df)} images, {df.group.nunique()} patients or images{grades}', True


def downloads(r: Recipe, data: Path) -> list[str]:
    "The commands that put the archives of missing tables where they are looked for, each archive once"
    missing = {f for t in r.used_tables if not any((data / f / t.csv).is_file() for f in t.folder) for f in t.folder}
    return [h.format(data=shlex.quote(str(data))) for f, h in KAGGLE.items() if f in missing]


def weights(r: Recipe) -> Iterator[Finding]:
    "Whether the weights that stages start from can be had; a few seconds at most"
    from aptos_fastai.training.weights import check_weights
    for what, s in {(s.arch, s.weights): s for s in r.stages.values() if not s.init}.items():
        try: check_weights(s)
        except AptosError as e: yield ' '.join(what), str(e), False
        else: yield ' '.join(what), 'no weights to fetch' if s.weights == 'none' else 'can be had', True


def folder(root: Path) -> Iterator[Finding]:
    "Whether the run folder can be written; what is made to find out is removed again"
    made = [p for p in [root, *root.parents] if not p.exists()]
    try:
        with run_lock(root): yield 'run folder', f'{root}: can be written, nobody is at work in it', True
    except AptosError as e: yield 'run folder', str(e), False
    finally:
        if root in made: shutil.rmtree(root, ignore_errors=True)
        for p in made[1:]: p.rmdir()


def work(recipe: str, data: str, runs: str, sets: list[str]) -> Iterator[Finding]:
    "Time and disk that `all` would still take"
    from aptos_fastai.pipeline.graph import check_run, open_run
    from aptos_fastai.pipeline.plan import costs
    run = open_run(recipe, data, runs, sets)
    todo = run.todo()
    check_run(run, todo)
    o = costs(run, todo)
    free = shutil.disk_usage(next(p for p in [run.root, *run.root.resolve().parents] if p.exists())).free
    yield 'time', f'about {format_duration(o.seconds)} left, by one step of each network timed just now' if todo else 'every stage is finished', True
    yield 'disk', f'{o.disk / 1e9:.2f} GB needed, {free / 1e9:.1f} GB free', free > 1.1 * o.disk


def examine(recipe: str, data: str, runs: str, sets: Iterable[str]) -> Iterator[Finding]:
    "Every finding, in the order in which a run would meet it"
    sets, demo = list(sets), data == 'demo'
    yield from software()
    yield from devices()
    try: r = read_recipe(recipe, demo=demo, sets=sets)
    except AptosError as e: yield 'recipe', str(e), False; return
    yield 'recipe', f'{r.path}: {len(r.stages)} stages, {r.submit.final} answers {r.submit.table}', True
    found = [] if demo else list(tables(r, Path(data)))
    yield from found or [('tables', 'the synthetic demo, which is painted when it is needed', True)]
    yield from weights(r)
    if not Path(runs).is_file(): yield from folder(Path(runs) / r.name)
    if all(ok for *_, ok in found):
        try: yield from work(recipe, data, runs, sets)
        except AptosError as e: yield 'what would run', str(e), False


def doctor(recipe: str, data: str, runs: str, sets: Iterable[str]):
    "`doctor`: a line for each finding as it is made. Raises `AptosError` where `all` would fail"
    bad = 0
    for what, found, ok in examine(recipe, data, runs, sets):
        say(f'{"ok  " if ok else "BAD "} {what}: {found}', None if ok else 'red')
        bad += not ok
    lines = downloads(read_recipe(recipe, sets=list(sets)), Path(data)) if bad and data != 'demo' and Path(recipe).is_file() else []
    if lines: say('To get Kaggle\'s tables (pip install kaggle, its API token in place, both competitions\' rules accepted on their pages):')
    for o in lines: say('  ' + o.replace(' && ', ' && \\\n    '))
    if bad: raise AptosError(f'{bad} thing{"s" * (bad > 1)} would stop `all`: the lines above that begin with BAD say what to do')
    say('Nothing found that would stop `all`.')
