"The documentation is true: its examples run, its generated parts are current, its names exist."
import re
import runpy
import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT

from aptos_fastai.cli import main
from aptos_fastai.common.io import read_record
from aptos_fastai.inference.grader import COLUMNS
from aptos_fastai.recipe.read import read_recipe

DOCS = ROOT / 'docs'
PAGES = [*(ROOT / f'{name}.md' for name in ('README', 'CONTRIBUTING', 'ROADMAP', 'SECURITY', 'CODE_OF_CONDUCT')),
         *sorted(DOCS.glob('*.md'))]


def code_blocks(text, language):
    "The fenced code blocks of a page in one language"
    return re.findall(rf'^```{language}\n(.*?)^```', text, re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings('ignore:load_learner')
def test_examples_of_the_python_page_run(toy, tmp_path, monkeypatch):
    shutil.copy(ROOT / 'settings.ini', tmp_path)
    for folder in toy.parent.iterdir():      # the page's demo is that of the toy run: its images are there already
        if folder != toy: shutil.copytree(folder, tmp_path / 'runs' / folder.name)
    demos = list((tmp_path / 'runs').glob('demo-*'))
    monkeypatch.chdir(tmp_path)
    names = {}
    page = DOCS / 'python.md'
    for code in code_blocks(page.read_text(encoding='utf-8'), 'python'):
        exec(compile(code, str(page), 'exec'), names)
    assert list((tmp_path / 'runs').glob('demo-*')) == demos
    assert names['oof'].score.notna().all()
    assert names['df'].grade.between(0, 4).all()
    assert names['fastai_scores'].shape == (4, 1)
    assert 0 < names['circle'].r
    assert sorted(names['fitted'].thresholds_) == list(names['fitted'].thresholds_)


@pytest.mark.parametrize('page', ['README.md', 'docs/train.md'])
def test_recipe_on_a_page_is_complete(page, tmp_path):
    recipe, = code_blocks((ROOT / page).read_text(encoding='utf-8'), 'ini')
    (tmp_path / 'mine.ini').write_text(recipe)
    assert read_recipe(tmp_path / 'mine.ini').order == ('teacher',)


@pytest.mark.parametrize('script, function, file', [
    ('recipe_reference.py', 'page', 'recipe.md'), ('import_graph.py', 'drawing', 'images/import_graph.svg')])
def test_generated_file_is_current(script, function, file):
    generated = runpy.run_path(str(DOCS / 'scripts' / script))[function]()
    assert (DOCS / file).read_text(encoding='utf-8') == generated, f'run python docs/scripts/{script}'


def test_commands_on_the_pages_exist(capsys):
    text = '\n'.join(p.read_text(encoding='utf-8') for p in PAGES)
    steps = (DOCS / 'train.md').read_text(encoding='utf-8').partition('## Run the steps')[2]
    commands = {*re.findall(r'run\.py ([a-z_]+)', text), *re.findall(r'^\| `([a-z_]+)', steps, re.MULTILINE)}
    assert {'all', 'predict', 'score', 'label'} <= commands
    for command in commands:
        main([command, '--help'])              # exits with status 2 if there is no such command
        assert f'run.py {command}' in capsys.readouterr().out


def test_notebooks_are_listed_and_small():
    page = (DOCS / 'python.md').read_text(encoding='utf-8')
    for file in sorted((ROOT / 'nbs').glob('*.ipynb')):
        text = file.read_text(encoding='utf-8')
        assert f'`nbs/{file.name}`' in page and len(text.encode()) < 150_000, file.name
        for unwanted in ('"output_type": "error"', '"name": "stderr"', str(Path.home()), 'site-packages'):
            assert unwanted not in text, f'{file.name}: {unwanted}'


def test_images_are_shown_and_small():
    shown = '\n'.join(p.read_text(encoding='utf-8') for p in PAGES)
    for file in (DOCS / 'images').iterdir():
        assert f'images/{file.name})' in shown and file.stat().st_size < 200_000, file.name


def test_links_between_pages_lead_to_files():
    for page in PAGES:
        for link in re.findall(r'\]\(([^)#:]+)(?:#[^)]*)?\)', page.read_text(encoding='utf-8')):
            assert (page.parent / link).exists(), f'{page.name}: {link}'


def test_paths_on_the_pages_exist():
    pattern = r'`((?:aptos_fastai|tests|benchmarks|docs|recipes|nbs)/[\w./-]+)`'
    for page in PAGES:
        for path in re.findall(pattern, page.read_text(encoding='utf-8')):
            assert (ROOT / path).exists(), f'{page.name}: {path}'


def test_places_to_edit_exist():
    "CONTRIBUTING.md names files of the package, each followed by the names that it defines"
    rows = [o for o in (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8').splitlines() if o.startswith('| ')]
    found = [o for row in rows for o in re.findall(r'`([a-z_]+(?:/[a-z_]+)?\.py)`((?: (?:and )?`[\w.]+`,?)*)', row)]
    assert len(found) > 15
    for path, names in found:
        source = (ROOT / 'aptos_fastai' / path).read_text(encoding='utf-8')
        for name in re.findall(r'[\w.]+', names.replace('and ', '')):
            for part in name.split('.'):
                definition = rf'^\s*(?:(?:def|class) {part}\b|{part}(?:: [^=\n]+)? = )'
                assert re.search(definition, source, re.MULTILINE), f'{path}: {name}'


def test_readme_fits_a_page_and_holds_both_commands_in_a_line_each():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert len(text.encode()) <= 7000
    quick_start = text.partition('## Quick start')[2].partition('\n## ')[0]
    commands = code_blocks(quick_start, 'bash')[0].splitlines()
    assert [c.split('&&')[-1].split()[1:3] for c in commands] == [['run.py', 'all'], ['-m', 'pytest']]


def general_name(file):
    "The name of a run folder's file as docs/files.md writes it"
    name = file.name
    if name.endswith('.jpg'): return '<id>.<hash>.<prep>.jpg'
    if file.parent.name == 'submissions': return '<name>.csv'
    if name.startswith('scores_'): return f'scores_<table>_<tta>{file.suffix}'
    return name


def test_files_page_names_every_file_and_column_of_a_run(toy):
    page = (DOCS / 'files.md').read_text(encoding='utf-8')
    stages = read_recipe(ROOT / 'settings.ini').nodes
    for file in [*toy.rglob('*'), *(toy.parent / 'prepared').rglob('*')]:
        if not file.is_file(): continue
        assert general_name(file) in page, file
        record = read_record(file) if file.suffix == '.json' else None
        for key in record or (): assert f'`{key}`' in page, f'{file.name}: {key}'
        if file.suffix != '.csv': continue
        for column in pd.read_csv(file, nrows=1).columns:
            if column.removesuffix('_grade') in stages: continue     # named after a stage or an ensemble
            assert f'`{column}`' in page, f'{file.name}: {column}'
    summary = read_record(toy / 'summary.json')
    for key in [*summary['stages'][0], *summary['submission'], *COLUMNS]: assert f'`{key}`' in page, key
