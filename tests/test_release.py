"What strangers pick up: version, completion, constraints, wheel, workflows, forms, citation and Dockerfile agree."
import os
import re
import runpy
import subprocess
import sys
import tomllib

import pytest
import yaml
from conftest import ROOT

import aptos_fastai
from aptos_fastai.cli import main
from aptos_fastai.recipe.files import preset_files, shipped_folder

PYPROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))
WORKFLOWS = sorted((ROOT / '.github/workflows').glob('*.yml'))


def read(path): return (ROOT / path).read_text(encoding='utf-8')


def jobs(name): return yaml.safe_load(read(f'.github/workflows/{name}.yml'))['jobs']


def commands(job): return '\n'.join(step.get('run', '') for step in job['steps'])


# Version

def test_the_version_is_written_once_and_everything_agrees_with_it():
    assert PYPROJECT['project']['dynamic'] == ['version'] and 'version' not in PYPROJECT['project']
    source = (ROOT / PYPROJECT['tool']['hatch']['version']['path']).read_text(encoding='utf-8')
    assert re.findall(r"^__version__ = '(.+?)'", source, re.MULTILINE) == [aptos_fastai.__version__]
    assert yaml.safe_load(read('CITATION.cff'))['version'] == aptos_fastai.__version__
    assert re.search(r'^## (\S+)', read('CHANGELOG.md'), re.MULTILINE)[1] == aptos_fastai.__version__


def test_the_citation_has_the_licence_of_the_package_and_all_that_the_format_requires():
    citation = yaml.safe_load(read('CITATION.cff'))
    assert citation['license'] == PYPROJECT['project']['license']
    assert {'cff-version', 'message', 'title', 'authors'} <= citation.keys()


# Completion

def complete(*words):
    "Return what the installed program offers for the last of `words` in bash, and whether it imported PyTorch"
    code = ('import atexit, sys; sys.argv = ["aptos-fastai"]; '
            'atexit.register(lambda: print("torch" in sys.modules, file=sys.stderr)); '
            'from aptos_fastai.cli import main; main()')
    env = os.environ | dict(_APTOS_FASTAI_COMPLETE='complete_bash', COMP_CWORD=str(len(words)),
                            COMP_WORDS=' '.join(['aptos-fastai', *words]))
    out = subprocess.run([sys.executable, '-c', code], env=env, cwd=ROOT, capture_output=True, text=True)
    return out.stdout.split(), out.stderr.split()


@pytest.mark.parametrize('words, expected', [(['in'], ['inspect', 'init']), (['predict', '--pa'], ['--patient'])])
def test_the_shell_completes_commands_and_options_without_pytorch(words, expected):
    offered, imported_torch = complete(*words)
    assert (sorted(offered), imported_torch) == (sorted(expected), ['False'])


# Constraints

def test_constraints_satisfy_pyproject_and_hold_versions_only():
    of_script = runpy.run_path(str(ROOT / '.ci/constraints.py'))
    pinned = of_script['read_constraints']()
    assert of_script['disagreements'](of_script['requirements'](), pinned) == []
    assert all(re.fullmatch(r'[\w.!+]+', version) and '+' not in version for version in pinned.values())
    assert {'torch', 'fastai', 'timm', 'pytest', 'mkdocs-material'} <= pinned.keys()


def test_constraints_that_are_too_old_or_missing_are_named():
    of_script = runpy.run_path(str(ROOT / '.ci/constraints.py'))
    needed = [o for o in of_script['requirements']() if o.name in ('timm', 'pandas', 'wandb')]
    assert of_script['disagreements'](needed, dict(timm='0.1')) == [
        'timm: pyproject.toml needs >=1.0.15, constraints.txt has 0.1', 'pandas: no version in constraints.txt']


# Wheel

def test_a_wheel_holds_the_recipes_where_the_installed_package_looks_for_them():
    included = PYPROJECT['tool']['hatch']['build']['targets']['wheel']['force-include']
    assert included == {'settings.ini': 'aptos_fastai/shipped/settings.ini', 'recipes': 'aptos_fastai/shipped/recipes'}
    assert shipped_folder() == ROOT and preset_files()     # in a clone: the folder that holds both sources
    for source in included: assert (ROOT / source).exists()


def test_nothing_that_the_package_or_its_tests_read_is_left_out_of_wheel_and_sdist():
    "The build leaves out what git ignores, and nothing else"
    build = PYPROJECT['tool']['hatch']['build']
    assert build.keys() == {'targets'} and build['targets'].keys() == {'wheel'}
    assert build['targets']['wheel'].keys() == {'force-include'}
    ignored = read('.gitignore').split()
    assert not {'templates', 'tests/', 'docs/', 'recipes/', '*.html', '*.css', '*.js', '*.ini'} & set(ignored)


# Workflows

def test_workflows_run_the_commands_of_the_readme():
    demo, tests = (line.split(' && ') for line in re.findall(r'^python3 -m venv .*', read('README.md'), re.MULTILINE))
    ci = jobs('ci')
    for command in [demo[2], *tests[1:]]:
        assert command.replace('.venv/bin/python', 'python').replace('.venv/bin/pip', 'python -m pip') \
            in commands(ci['tests']).splitlines(), command
    assert commands(ci['checks']) .strip() == '.ci/run' and 'README.md' in read('.ci/run')


def test_workflows_test_every_system_every_stated_python_and_both_sets_of_versions():
    matrix = jobs('ci')['tests']['strategy']['matrix']
    classifiers = [o.split(' :: ')[-1] for o in PYPROJECT['project']['classifiers'] if 'Python :: 3.' in o]
    assert matrix['python'] == classifiers and f'>={classifiers[0]}' == PYPROJECT['project']['requires-python']
    assert {o.split('-')[0] for o in matrix['os']} == {'ubuntu', 'macos', 'windows'}
    constraints = [o['constraints'] for o in jobs('ci')['checks']['strategy']['matrix']['include']]
    assert sorted(constraints) == ['', 'constraints.txt']


@pytest.mark.parametrize('file', WORKFLOWS, ids=lambda f: f.name)
def test_a_workflow_has_limits_and_only_the_permissions_that_it_needs(file):
    workflow = yaml.safe_load(file.read_text(encoding='utf-8'))
    assert workflow['permissions'] == {'contents': 'read'}
    for name, job in workflow['jobs'].items():
        assert job['timeout-minutes'] <= 180
        assert job.get('permissions', {}) == ({'id-token': 'write'} if name == 'publish' else {})
        for step in job['steps']: assert ('run' in step) != ('uses' in step)


def test_a_release_compares_tag_and_version_before_it_publishes():
    release = jobs('release')
    assert 'aptos-fastai ${GITHUB_REF_NAME#v}' in commands(release['build'])
    assert release['publish']['needs'] == 'build' and 'run' not in release['publish']['steps'][-1]


# Forms

def test_issue_forms_ask_for_something_and_warn_of_patient_data():
    forms = {f.stem: yaml.safe_load(f.read_text(encoding='utf-8'))
             for f in (ROOT / '.github/ISSUE_TEMPLATE').glob('*.yml') if f.stem != 'config'}
    assert forms.keys() == {'bug', 'wrong_grades', 'feature'}
    for name, form in forms.items():
        assert form['name'] and form['description']
        fields = [o for o in form['body'] if o['type'] != 'markdown']
        assert len({o['id'] for o in fields}) == len(fields)
        assert any(o.get('validations', {}).get('required') for o in fields)
        assert name == 'feature' or 'patients' in form['body'][0]['attributes']['value']


# Dockerfile

@pytest.fixture(scope='module')
def dockerfile():
    "The functions of docs/scripts/check_dockerfile.py, and the steps"
    of_script = runpy.run_path(str(ROOT / 'docs/scripts/check_dockerfile.py'))
    return of_script, of_script['read_steps'](read('Dockerfile'))


def test_the_image_runs_serve_as_another_user_than_root(dockerfile, capsys):
    of_script, steps = dockerfile
    names = [name for name, _ in steps]
    assert of_script['last'](steps, 'USER') not in ('root', '0')
    assert 'RUN' not in names[names.index('USER'):] and 'COPY' not in names[names.index('USER'):]
    program, command, *_ = yaml.safe_load(of_script['last'](steps, 'ENTRYPOINT'))
    assert program in PYPROJECT['project']['scripts']
    main([command, '--help'])
    assert f'default: {of_script["last"](steps, "EXPOSE")}' in capsys.readouterr().out


def test_the_image_is_built_from_files_that_exist_and_are_sent_to_docker(dockerfile):
    _, steps = dockerfile
    sources = [word for name, text in steps if name == 'COPY' and '--from' not in text for word in text.split()[:-1]]
    sent = [line[1:] for line in read('.dockerignore').splitlines() if line.startswith('!')]
    assert sorted(sources) == sorted(sent) and all((ROOT / source).exists() for source in sources)
    assert {*PYPROJECT['tool']['hatch']['build']['targets']['wheel']['force-include'], 'aptos_fastai'} <= set(sources)


def test_the_health_check_asks_a_path_that_the_server_has(dockerfile):
    of_script, steps = dockerfile
    path = re.search(r'127\.0\.0\.1:8000(/\w+)', of_script['health_command'](steps)[2])[1]
    assert f"Route('{path}'," in read('aptos_fastai/deploy/serve.py')


def test_steps_of_a_dockerfile_are_read_as_docker_reads_them(dockerfile):
    of_script, _ = dockerfile
    text = '# a comment\nFROM a AS b\nRUN one \\\n    two\nHEALTHCHECK --timeout=5s \\\n  CMD ["x", "y"]\nUSER 1\n'
    steps = of_script['read_steps'](f'{text}USER 2\n')
    assert steps[:2] == [('FROM', 'a AS b'), ('RUN', 'one  two')]
    assert of_script['health_command'](steps) == ['x', 'y'] and of_script['last'](steps, 'USER') == '2'
