"A run -> folders to upload for the offline code competition: a dataset with weights and this package, and a notebook that answers whatever test.csv is there."
import json
import re
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from aptos_fastai.common.console import format_duration, say
from aptos_fastai.common.io import AptosError, write_bytes, write_csv, write_json, write_record
from aptos_fastai.data import decode
from aptos_fastai.inference.grade_files import grade_files
from aptos_fastai.inference.grader import load_grader
from aptos_fastai.inference.model_spec import read_model

COMPETITION = 'aptos2019-blindness-detection'
IMAGES, HOURS = 13_000, 9                  # of the hidden test set, at most; the competition's limit
HERE = Path(__file__).parents[1]

CELLS = [
    ('markdown', '# Diabetic retinopathy, graded offline\n\nWeights and code come with the dataset; nothing is downloaded. Made by `run.py kaggle`. '
                 'Run again after an interruption, it goes on where it was.'),
    ('code', "import os, sys\nfrom pathlib import Path\n\n"
             "source, work = (Path(os.environ.get(k, v)) for k, v in (('KAGGLE_INPUT', '/kaggle/input'), ('KAGGLE_WORKING', '/kaggle/working')))\n"
             "bundle = next(source.rglob('bundle.json')).parent                    # the dataset\n"
             "test = next(p for p in sorted(source.rglob('test.csv')) if (p.parent / 'test_images').is_dir())\n"
             "sys.path.insert(0, str(bundle))\nbundle, test"),
    ('code', 'from aptos_fastai.deploy.kaggle import answer\n\nanswer(bundle, test, work)'),
]


def write_kaggle(run: str, user: str):
    "`kaggle RUN`: <RUN>/kaggle/dataset and <RUN>/kaggle/kernel"
    if not re.fullmatch(r'[A-Za-z0-9-]{1,40}', user): raise AptosError(f'--user {user}: a Kaggle user name is needed (letters, digits, -)')
    model, root = read_model(run)
    out = Path(run) / 'kaggle'
    slug = re.sub('[^a-z0-9]+', '-', f'aptos-fastai-{model.name}'.lower()).strip('-')[:50].ljust(6, '0')
    shutil.rmtree(out, ignore_errors=True)
    members = []
    for m in model.members:
        file = m.file.replace('/', '-')
        write_bytes(out / 'dataset' / file, (root / m.file).read_bytes())
        members.append(replace(m, file=file))
    shutil.copytree(HERE, out / 'dataset/aptos_fastai', ignore=shutil.ignore_patterns('__pycache__'))
    write_record(out / 'dataset/bundle.json', dict(format=1, model=asdict(replace(model, members=tuple(members))), files={}))
    write_json(out / 'dataset/dataset-metadata.json', dict(title=slug, id=f'{user}/{slug}', licenses=[dict(name='other')]))
    write_json(out / 'kernel/kernel-metadata.json', dict(
        id=f'{user}/{slug}-answer', title=f'{slug}-answer', code_file='answer.ipynb', language='python', kernel_type='notebook', is_private='true',
        enable_gpu='true', enable_internet='false', dataset_sources=[f'{user}/{slug}'], competition_sources=[COMPETITION], kernel_sources=[]))
    write_bytes(out / 'kernel/answer.ipynb', json.dumps(notebook(), indent=1).encode())
    say(f'{len(members)} network{"s" * (len(members) > 1)}, {sum(f.stat().st_size for f in (out / "dataset").rglob("*")) / 1e6:.0f} MB -> {out}. To upload:')
    if model.synthetic: say('SYNTHETIC: this model was trained on painted images; its answers say nothing about eyes', 'yellow')
    say(f'  kaggle datasets create -p {out / "dataset"} --dir-mode zip\n  kaggle kernels push -p {out / "kernel"}\n'
        'The second once the dataset is processed; then submit the notebook on the competition\'s page. Later: kaggle datasets version -m TEXT -p …')


def notebook() -> dict:
    "The notebook as its JSON"
    run = dict(code=dict(outputs=[], execution_count=None), markdown={})
    cells = [dict(cell_type=kind, id=f'cell{i}', metadata={}, source=text.splitlines(keepends=True), **run[kind]) for i, (kind, text) in enumerate(CELLS)]
    return dict(cells=cells, metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python')), nbformat=4, nbformat_minor=5)


def answer(bundle: str | Path, test: str | Path, work: str | Path):
    """submission.csv in `work` for the ids of `test` (id_code), in the order of the sample_submission.csv beside it where there is one, from the images in
    test_images beside it. Goes on after an interruption; an image that cannot be read gets the commonest grade, and is named."""
    bundle, test, work = Path(bundle), Path(test), Path(work)
    if decode.pyvips is None: say('pyvips is not installed: large PNGs are decoded by Pillow, in twice the time')
    ids = pd.read_csv(next(p for p in (test.parent / 'sample_submission.csv', test) if p.is_file()), dtype=str).id_code
    grader = load_grader(bundle)
    first = [str(f) for f in sorted((test.parent / 'test_images').iterdir())[:32]]
    t0 = time.time()
    grader.predict(first)
    each = (time.time() - t0) / len(first)
    say(f'{1 / each:.1f} images a second on {grader.device.type}: about {format_duration(each * len(ids))} for these {len(ids)}, {format_duration(each * IMAGES)} for {IMAGES:,}'
        + (f', more than the {HOURS} hours allowed: submit fewer networks' if each * IMAGES > HOURS * 3600 else ''))
    try: grade_files(str(bundle), [str(test)], str(work / 'grades.csv'), 'torch', 'f32')
    except AptosError as e: say(str(e))      # what could not be read; its rows are answered below
    df = pd.read_csv(work / 'grades.csv', dtype=dict(file=str))
    grade = df.set_index(df.file.map(lambda f: Path(f).stem)).grade
    lost = ids[~ids.isin(grade.dropna().index)]
    if len(lost): say(f'{len(lost)} of {len(ids)} are answered with the commonest grade: {", ".join(lost[:5])}')
    write_csv(work / 'submission.csv', pd.DataFrame(dict(id_code=ids, diagnosis=ids.map(grade).fillna(grade.mode()[0]).astype(int))))
    say(f'{len(ids)} answers -> {work / "submission.csv"}')
