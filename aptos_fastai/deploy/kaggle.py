"Write the folders to upload for the offline code competition: a dataset (weights, this package) and a notebook."
import json
import re
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from aptos_fastai.common.console import format_duration, plural, say
from aptos_fastai.common.disclaimer import DISCLAIMER
from aptos_fastai.common.io import AptosError, file_hash, write_bytes, write_csv, write_json, write_record
from aptos_fastai.data import decode
from aptos_fastai.inference.grade_files import grade_files, safe_cell
from aptos_fastai.inference.grader import Grader, load_grader
from aptos_fastai.inference.model_spec import BUNDLE, SYNTHETIC_MODEL, copy_members, read_model
from aptos_fastai.metrics import apply_thresholds

COMPETITION = 'aptos2019-blindness-detection'
HIDDEN_IMAGES = 13_000                       # of the hidden test set, at most
MAX_HOURS = 9                                # of the competition's notebooks
TIMED_IMAGES = 32
PACKAGE = Path(__file__).parents[1]
NOTEBOOK = 'submission.ipynb'

CELLS = [
    ('markdown', """\
# Diabetic retinopathy grades, offline

Weights and code come with the dataset; nothing is downloaded. Made by `run.py kaggle`.
An interrupted notebook resumes when it runs again.
"""),
    ('code', """\
import hashlib
import os
import sys
from pathlib import Path

source = Path(os.environ.get('KAGGLE_INPUT', '/kaggle/input'))
work = Path(os.environ.get('KAGGLE_WORKING', '/kaggle/working'))
bundles = sorted(source.rglob('bundle.json'))
own = [f for f in bundles if hashlib.sha256(f.read_bytes()).hexdigest() == 'SHA256']
others = ', '.join(str(f.parent) for f in bundles) or 'none'
if not own:
    raise FileNotFoundError(f'{source} lacks the dataset SLUG as it was when this notebook was made (there are: '
                            f'{others}). Attach it, or push the notebook that was made with the attached one.')
bundle = own[0].parent
test = next(p for p in sorted(source.rglob('test.csv')) if (p.parent / 'test_images').is_dir())
sys.path.insert(0, str(bundle))
bundle, test
"""),
    ('code', """\
from aptos_fastai.deploy.kaggle import write_submission

write_submission(bundle, test, work)
"""),
]


def write_kaggle(run: str, user: str) -> None:
    "`kaggle RUN`: write <RUN>/kaggle/dataset and <RUN>/kaggle/kernel"
    if not re.fullmatch(r'[A-Za-z0-9-]{1,40}', user):
        raise AptosError(f'--user {user}: not a Kaggle user name. Use letters, digits and -.')
    model, root = read_model(run)
    if model.eyes:
        raise AptosError(f'{run}: grades by both eyes of a patient, but the images of {COMPETITION} name no patients. '
                         'Set [submit] eyes = single and run `all`, which trains nothing.')
    out = Path(run) / 'kaggle'
    dataset, kernel = out / 'dataset', out / 'kernel'
    slug = _slug(f'aptos-fastai-{model.name}')
    shutil.rmtree(out, ignore_errors=True)
    bundled = copy_members(model, root, dataset)
    shutil.copytree(PACKAGE, dataset / 'aptos_fastai', ignore=shutil.ignore_patterns('__pycache__'))
    write_record(dataset / BUNDLE, dict(format=1, model=asdict(bundled), files={}))
    write_json(dataset / 'dataset-metadata.json', dict(title=slug, id=f'{user}/{slug}', licenses=[dict(name='other')]))
    write_json(kernel / 'kernel-metadata.json', dict(
        id=f'{user}/{slug}-submission', title=f'{slug}-submission', code_file=NOTEBOOK, language='python',
        kernel_type='notebook', is_private='true', enable_gpu='true', enable_internet='false',
        dataset_sources=[f'{user}/{slug}'], competition_sources=[COMPETITION], kernel_sources=[]))
    write_bytes(kernel / NOTEBOOK, json.dumps(notebook(slug, file_hash(dataset / BUNDLE)), indent=1).encode())
    megabytes = sum(f.stat().st_size for f in dataset.rglob('*')) / 1e6
    say(f'networks: {len(model.members)}, {megabytes:.0f} MB -> {out}')
    if model.synthetic: say(SYNTHETIC_MODEL, 'yellow')
    say(f'To upload the dataset:\n  kaggle datasets create -p {dataset} --dir-mode zip\n'
        f'When Kaggle has processed it, upload the notebook and submit it on the competition\'s page:\n'
        f'  kaggle kernels push -p {kernel}\n'
        f'To update the dataset later, and push the notebook again:\n'
        f'  kaggle datasets version -p {dataset} --dir-mode zip -m TEXT')


def _slug(name: str) -> str:
    "Return a name for Kaggle: 6 to 50 lower-case letters, digits and -"
    slug = re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')
    return slug[:50].ljust(6, '0')


def notebook(slug: str, digest: str) -> dict:
    "Return the notebook as its JSON, for the dataset of a name whose bundle.json has a SHA-256"
    extra: dict[str, dict] = dict(code=dict(outputs=[], execution_count=None), markdown={})
    cells: list[dict] = []
    for i, (kind, text) in enumerate(CELLS):
        source = text.replace('SLUG', slug).replace('SHA256', digest).strip().splitlines(keepends=True)
        cells.append(dict(cell_type=kind, id=f'cell{i}', metadata={}, source=source, **extra[kind]))
    kernel = dict(name='python3', display_name='Python 3', language='python')
    return dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)


def write_submission(bundle: str | Path, test: str | Path, work: str | Path) -> None:
    """Write submission.csv to `work` for the ids (id_code) of the CSV `test`, from the images in test_images beside it.

    Rows are in the order of sample_submission.csv beside `test`, if there is one. An interrupted call resumes.
    An ungradable image gets the grade of its score, because the competition needs one for every id; an unreadable image
    gets the most frequent grade. Both are named.
    """
    bundle, test, work = Path(bundle), Path(test), Path(work)
    say(DISCLAIMER, 'dim')
    if decode.pyvips is None: say('pyvips is not installed: Pillow decodes large PNGs, which takes twice as long')
    sample = test.parent / 'sample_submission.csv'
    ids = pd.read_csv(sample if sample.is_file() else test, dtype=str).id_code
    grader = load_grader(bundle)
    say_duration(grader, test.parent / 'test_images', len(ids))
    grades_csv = work / 'grades.csv'
    try: grade_files(str(bundle), [str(test)], str(grades_csv), root=str(test.parent / 'test_images'), overwrite=True)
    except AptosError as e: say(str(e))      # names the unreadable images, which get a grade below
    df = pd.read_csv(grades_csv, dtype=dict(id_code=str)).set_index('id_code')
    ungradable = df.index[df.ungradable.notna()]
    if len(ungradable):
        say(f'ungradable: {plural(len(ungradable), "image")} ({", ".join(ungradable[:5])}), graded by the score all '
            'the same, because the competition needs a grade for every id', 'yellow')
    of_score = pd.Series(apply_thresholds(df.score, grader.model.thresholds), df.index).where(df.score.notna())
    df['grade'] = df.grade.fillna(of_score)
    grades = ids.map(safe_cell).map(df.grade)          # as grades.csv has the ids
    missing = ids[grades.isna()]
    most_frequent = df.grade.mode()[0]
    if len(missing):
        say(f'without a grade: {len(missing)} of {plural(len(ids), "image")} ({", ".join(missing[:5])}), given the '
            f'most frequent one, {most_frequent:.0f}')
    diagnosis = grades.fillna(most_frequent).astype(int)
    write_csv(work / 'submission.csv', pd.DataFrame(dict(id_code=ids, diagnosis=diagnosis)))
    say(f'{plural(len(ids), "grade")} -> {work / "submission.csv"}')


def say_duration(grader: Grader, folder: Path, images: int) -> None:
    "Time a few images of `folder`; say how long `images`, and the hidden test set, will take"
    first = [str(f) for f in sorted(folder.iterdir())[:TIMED_IMAGES]]
    start = time.time()
    grader.predict(first)
    seconds = (time.time() - start) / len(first)
    say(f'{1 / seconds:.1f} images/s on {grader.device.type}: about {format_duration(seconds * images)} for '
        f'{plural(images, "image")}, {format_duration(seconds * HIDDEN_IMAGES)} for {HIDDEN_IMAGES:,}')
    if seconds * HIDDEN_IMAGES > MAX_HOURS * 3600:
        say(f'That is more than the {MAX_HOURS} hours that Kaggle allows. Submit fewer networks.', 'yellow')
