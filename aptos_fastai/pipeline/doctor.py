"Check what would stop `all`: packages, devices, tables, weights, the run folder, disk space and time."
import os
import platform
import shlex
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from aptos_fastai.common.console import Bars, format_duration, plural, say
from aptos_fastai.common.distributed import cores
from aptos_fastai.common.io import AptosError, run_lock
from aptos_fastai.common.program import COMMAND
from aptos_fastai.data.decode import ImageError
from aptos_fastai.data.groups import shared_patients
from aptos_fastai.data.id_order import compare_id_orders, id_order_text
from aptos_fastai.data.retina import Prep, get_prep, prepare
from aptos_fastai.data.spreadsheet import TableError, first_few
from aptos_fastai.data.store import image_warnings
from aptos_fastai.data.tables import archives_text, describe, table_contents, with_present_tables
from aptos_fastai.pipeline.other_runs import read_run_recipe
from aptos_fastai.recipe.files import shipped_folder
from aptos_fastai.recipe.graph import Recipe
from aptos_fastai.recipe.read import read_recipe
from aptos_fastai.recipe.sections import Stage

if TYPE_CHECKING:
    from aptos_fastai.training.weight_files import Loaded

PACKAGES = 'aptos_fastai fastai torch timm pandas numpy scikit-learn opencv-python-headless pillow'.split()
EXTRAS = dict(dicom='pydicom', excel='openpyxl', export='onnxruntime', openvino='openvino', serve='starlette',
              parallel='accelerate', tensorboard='tensorboard', mlflow='mlflow', wandb='wandb', tune='optuna',
              test='pytest', **{'dicom-report': 'highdicom'})
DOWNLOADS = {                                # folder that a recipe names -> commands that download and unpack it
    'aptos2019-blindness-detection': [
        'kaggle competitions download -c aptos2019-blindness-detection -p {data}',
        'unzip -q {data}/aptos2019-blindness-detection.zip -d {data}/aptos2019-blindness-detection',
    ],
    'diabetic-retinopathy-detection': [
        'kaggle competitions download -c diabetic-retinopathy-detection -p {data}',
        'unzip -q {data}/diabetic-retinopathy-detection.zip "train.zip.*" trainLabels.csv.zip'
        ' -d {data}/diabetic-retinopathy-detection',
        '(cd {data}/diabetic-retinopathy-detection',
        'cat train.zip.0* > train.zip',
        'unzip -q train.zip',
        'unzip -q trainLabels.csv.zip)',
    ],
}

SMALL = 'recipes/cpu.ini'                    # the recipe that needs least
SAMPLED_IMAGES = 50                          # of each table that `doctor` reads, unless it reads all
WARNING = 'warning'                          # `all` can run, but something should be changed
Finding = tuple[str, str, bool | str]        # what was checked, what was found, whether it is in order (or `WARNING`)


def check_software() -> Iterator[Finding]:
    "Check Python, packages and extras"
    yield 'python', platform.python_version(), True
    yield 'packages', ', '.join(f'{p} {metadata.version(p)}' for p in PACKAGES), True
    missing = [extra for extra, module in EXTRAS.items() if find_spec(module) is None]
    extras = 'all installed'
    if missing: extras = f'not installed: {", ".join(missing)}. Install one: pip install "aptos_fastai[{missing[0]}]"'
    yield 'extras', extras, True
    slow = 'Pillow decodes them, in twice the time of libvips. Install libvips: pip install "pyvips[binary]"'
    yield 'PNG originals', 'libvips decodes them' if find_spec('pyvips') else slow, True


def check_devices() -> Iterator[Finding]:
    "Check processor, memory and GPUs"
    import torch

    from aptos_fastai.training.precision import cpu_has_bf16, has_bf16
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30 if hasattr(os, 'sysconf') else 0
    load = busy_text()
    if load: yield 'machine', load, WARNING
    yield 'CPU', (f'{plural(cores(), "core")}, {memory:.0f} GB memory, '
                  f'{plural(torch.get_num_threads(), "PyTorch thread")}'), True
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        precision = 'bf16' if has_bf16() else 'fp16'
        yield f'GPU {i}', f'{gpu.name}, {gpu.total_memory / 2**30:.0f} GB, {precision}', True
    if not torch.cuda.is_available(): yield 'GPU', 'none: networks run on the CPU', True
    yield 'bf16 on the CPU', 'supported' if cpu_has_bf16() else 'not supported: it trains and predicts in f32', True


def busy_text() -> str:
    "Return that other programs keep the machine busy, or an empty text"
    if not hasattr(os, 'getloadavg'): return ''            # Windows
    load, n = os.getloadavg()[0], os.cpu_count() or 1
    if load <= n: return ''
    return (f'busy: load average {load:.1f} on {plural(n, "core")}. Training is slower than on a quiet machine, and '
            'measured times are too long.')


def check_tables(recipe: Recipe, data: Path, every_image: bool) -> Iterator[Finding]:
    "Check each table on its own, so that one missing table does not hide another"
    frames = {}
    for table in recipe.used_tables:
        name = f'table {table.name}'
        try: contents = table_contents(table, data, recipe.images.skip_unreadable == 'yes')
        except TableError as e:
            yield name, str(e), False
            continue
        yield name, describe(table, contents), True
        tests = compare_id_orders(contents.frame, recipe.seed) if table.graded else []
        for warning in (*contents.notes, id_order_text(tests, table)):
            if warning: yield name, warning, WARNING
        yield from check_images(recipe, contents.frame, every_image)
        frames[table.name] = contents.frame
    for table_name, note in shared_patients(recipe.used_tables, frames): yield f'table {table_name}', note, WARNING


def check_images(recipe: Recipe, frame: pd.DataFrame, every_image: bool) -> Iterator[Finding]:
    "Check whether images of a table can be read and were resized: a random sample, or all of them"
    name = frame.source.iloc[0]
    sample = frame if every_image else frame.sample(min(len(frame), SAMPLED_IMAGES), random_state=recipe.seed)
    prep, records = get_prep(recipe), []
    with Bars() as bars, bars(f'reading images of {name}', len(sample), 'images') as bar, \
            ThreadPoolExecutor(cores()) as pool:
        for record in pool.map(partial(_image_record, prep=prep), sample.path):
            records.append(record)
            bar.to(len(records))
    found = pd.DataFrame(records)
    bad = [f'{i} {error}' for i, error in zip(sample.id_code, found.error, strict=True) if error]
    part = f'{len(sample)} of {len(frame)} images read'
    advice = '' if every_image or len(sample) == len(frame) else '; read all of them: doctor --images'
    stops = recipe.images.skip_unreadable == 'no' or len(bad) == len(frame)
    if bad: yield f'images of {name}', f'{part}, {len(bad)} unreadable: {first_few(bad)}{advice}', not stops and WARNING
    else: yield f'images of {name}', f'{part}{advice}', True
    for warning in image_warnings(found[found.error == '']): yield f'images of {name}', warning, WARNING


def _image_record(path: str, prep: Prep) -> dict:
    "Return what `prepare` found in an image, and `error`"
    try: return dict(prepare(Path(path).read_bytes(), prep)[1], error='')
    except ImageError as e: return dict(error=str(e))
    except OSError as e: return dict(error=f'cannot be read ({e.strerror})')


def download_commands(recipe: Recipe, data: Path) -> list[list[str]]:
    "Return the commands that download and unpack the missing tables, a list for each Kaggle competition"
    missing = {folder for t in recipe.used_tables for folder in t.folders
               if t.csv and not any((data / f / t.csv).is_file() for f in t.folders)}
    place = shlex.quote(str(data))
    return [[c.format(data=place) for c in commands] for folder, commands in DOWNLOADS.items() if folder in missing]


def check_initial_weights(recipe: Recipe) -> Iterator[Finding]:
    "Check whether the weights that stages start from are available; a few seconds at most"
    from aptos_fastai.training.weights import WARNED, examine_weights
    def key(s: Stage) -> tuple: return (s.arch, s.weights, *((s.size, s.mean, s.std) if s.weights_file else ()))
    for (arch, weights, *_), stage in {key(s): s for s in recipe.stages.values() if not s.init}.items():
        name = f'weights {weights} of {arch}'
        try: loaded, warnings = examine_weights(stage)
        except AptosError as e:
            yield name, str(e).removeprefix(f'weights = {weights}: '), False
            continue
        if loaded: yield name, fit_text(loaded, arch), True
        else: yield name, 'random, nothing to download' if weights == 'none' else 'available', True
        WARNED.update(warnings)                # `check_plan` need not say them again
        for warning in warnings: yield name, warning.removeprefix(f'weights = {weights}: '), WARNING


def fit_text(loaded: 'Loaded', arch: str) -> str:
    "Return what of a file fits the network `arch`"
    left_over = f', {sum(loaded.left_over.values())} left over ({", ".join(loaded.left_over)})'
    return f'fits {arch}: {loaded.tensors} tensors' + (left_over if loaded.left_over else '')


def check_run_folder(root: Path) -> Iterator[Finding]:
    "Check whether the run folder can be written and locked; remove again what this creates"
    created = [p for p in [root, *root.parents] if not p.exists()]
    try:
        with run_lock(root): yield 'run folder', f'{root}: writable, not in use', True
    except AptosError as e: yield 'run folder', str(e), False
    finally:
        if root in created: shutil.rmtree(root, ignore_errors=True)
        for p in created[1:]: p.rmdir()


def check_plan(recipe: str, data: str, runs: str, sets: list[str], name: str) -> Iterator[Finding]:
    "Check batch sizes, and time and disk space that `all` still needs"
    from aptos_fastai.pipeline.graph import check_run, load_run
    from aptos_fastai.pipeline.plan import plan_cost
    run = load_run(recipe, data, runs, sets, name=name)
    todo = run.todo()
    check_run(run, todo)
    plan = plan_cost(run, todo)
    existing = next(p for p in [run.root, *run.root.resolve().parents] if p.exists())
    free = shutil.disk_usage(existing).free
    estimate = f'about {format_duration(plan.seconds)} left, from a few training steps of each network on this machine'
    yield 'time', estimate if todo else 'every stage is finished', True
    yield 'disk', f'{plan.disk / 1e9:.2f} GB needed, {free / 1e9:.1f} GB free', free > 1.1 * plan.disk


def find_problems(recipe: str, data: str, runs: str, sets: Iterable[str], every_image: bool,
                  name: str) -> Iterator[Finding]:
    "Yield every finding, in the order in which a run would meet it"
    keys, demo = list(sets), data == 'demo'
    yield from check_software()
    yield from check_devices()
    try: parsed = read_run_recipe(recipe, runs, name, demo=demo, sets=keys)
    except AptosError as e:
        yield 'recipe', str(e), False
        return
    left_out = ''
    if not demo: parsed, left_out = with_present_tables(parsed, Path(data))
    submit = parsed.submit
    result = f'{submit.final} predicts {submit.table}' if submit.table else f'the model is {submit.final}'
    yield 'recipe', f'{parsed.path}: {plural(len(parsed.stages), "stage")}; {result}', True
    if left_out: yield 'tables', left_out, WARNING
    found = [] if demo else list(check_tables(parsed, Path(data), every_image))
    yield from found or [('tables', 'synthetic demo, generated at its first use', True)]
    weights = list(check_initial_weights(parsed))
    yield from weights
    if not Path(runs).is_file(): yield from check_run_folder(Path(runs) / (name or parsed.name))
    if all(ok for _, _, ok in found):
        try: yield from check_plan(recipe, data, runs, keys, name)
        except AptosError as e:
            if not any(not ok and text in str(e) for _, text, ok in weights): yield 'plan', str(e), False


# how `doctor` prints a finding that is, or is not, in order: its mark and its colour
MARKS: dict[bool | str, tuple[str, str | None]] = {
    True: ('ok  ', None), WARNING: ('WARN', 'yellow'), False: ('FAIL', 'red')}


def doctor(recipe: str, data: str, runs: str, sets: Iterable[str], every_image: bool = False, name: str = '') -> None:
    "Print a line for each finding; read a sample of the images, or all. Raises `AptosError` if `all` would fail"
    keys, problems, warnings = list(sets), 0, False
    for what, found, ok in find_problems(recipe, data, runs, keys, every_image, name):
        status, style = MARKS[ok]
        say(f'{status} {what}: {found}', style)
        problems += not ok
        warnings |= ok == WARNING
    small = smaller_recipe(recipe, keys, data)
    if small and (problems or not has_gpu()): say(small)
    if not problems:
        say('No problem would stop `all`. Read the lines above that begin with WARN.' if warnings else
            'No problem found: `all` can run.')
        return
    if data != 'demo': show_downloads(recipe, keys, Path(data))
    noun = 'problem' if problems == 1 else 'problems'
    raise AptosError(f'{problems} {noun} would stop `all`. The lines above that begin with FAIL say what to do.')


def has_gpu() -> bool:
    "Return whether PyTorch finds a GPU"
    import torch
    return torch.cuda.is_available()


def smaller_recipe(recipe: str, sets: list[str], data: str) -> str:
    "Return which command needs less than a recipe for Kaggle's tables, if those of recipes/cpu.ini are there, else ''"
    try: tables, small = read_recipe(recipe, sets=sets).tables, read_recipe(shipped_folder() / SMALL)
    except AptosError: return ''             # the recipe is wrong, which is a finding already
    of_kaggle = any(folder in DOWNLOADS for t in tables.values() for folder in t.folders)
    present = all(any((Path(data) / folder / t.csv).is_file() for folder in t.folders) for t in small.used_tables)
    if not of_kaggle or not present or set(tables) <= set(small.tables): return ''
    return (f'{SMALL} needs less: the folder of APTOS 2019 alone, two CPU cores, no download, under 4 hours. Check it: '
            f'{COMMAND} doctor --recipe {SMALL} --data {shlex.quote(data)}')


def show_downloads(recipe: str, sets: list[str], data: Path) -> None:
    "Print how to download the missing tables from Kaggle"
    try: downloads = download_commands(read_recipe(recipe, sets=sets), data)
    except AptosError: return                # the recipe is wrong, which is a finding already
    if not downloads: return
    archives = archives_text(data)
    if archives: say(f'{data}:{archives}', 'yellow')
    say('To download the tables from Kaggle:\n'
        '1. pip install kaggle, and save your API token as its documentation describes.\n'
        '2. Accept the rules on the page of each competition.\n'
        '3. Run:')
    for commands in downloads: say('  ' + ' && \\\n    '.join(commands))
