"""Exact versions of all that the package needs, with its extras, as they are installed here.

    python .ci/constraints.py > constraints.txt             # of this environment
    python .ci/constraints.py MORE/site-packages > …        # also of another one, where the extra docs is installed
    python .ci/constraints.py --check                       # do constraints.txt and pyproject.toml agree?
"""
import sys
import tomllib
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / 'constraints.txt'
NOT_INSTALLED = {'wandb'}                    # needs an account, so no test runs it: no version has passed
HEADER = f"""\
# Versions that passed the tests on Linux with Python {sys.version_info.major}.{sys.version_info.minor}: \
pip install -e . -c constraints.txt
# Made by .ci/constraints.py. Packages that only other systems need are not listed.
"""


def requirements() -> list[Requirement]:
    "Return what pyproject.toml needs: dependencies and extras"
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']
    texts = project['dependencies'] + [text for extra in project['optional-dependencies'].values() for text in extra]
    return [Requirement(text) for text in texts]


def read_constraints() -> dict[str, str]:
    "Return name -> version of constraints.txt"
    lines = [line for line in CONSTRAINTS.read_text(encoding='utf-8').splitlines() if not line.startswith('#')]
    return {canonicalize_name(name): version for name, _, version in (line.partition('==') for line in lines)}


def disagreements(needed: list[Requirement], pinned: dict[str, str]) -> list[str]:
    "Return a line for each requirement that the constraints do not list or do not satisfy"
    found = []
    for r in needed:
        version = pinned.get(canonicalize_name(r.name))
        if version is None and r.name not in NOT_INSTALLED: found.append(f'{r.name}: no version in constraints.txt')
        elif version and not r.specifier.contains(version, prereleases=True):
            found.append(f'{r.name}: pyproject.toml needs {r.specifier}, constraints.txt has {version}')
    return found


def installed(folders: list[str]) -> dict[str, Distribution]:
    "Return the packages of this environment and of further folders; it has the last word"
    found = [*distributions(path=folders), *distributions()] if folders else distributions()
    return {canonicalize_name(d.name): d for d in found}


def closure(needed: list[Requirement], packages: dict[str, Distribution]) -> dict[str, str]:
    "Return name -> version of the installed packages among `needed` and all that they need in turn"
    found: dict[str, str] = {}
    queue, done = [(r.name, e) for r in needed for e in (r.extras or {''})], set()
    while queue:
        name, extra = queue.pop()
        if (name, extra) in done or canonicalize_name(name) not in packages: continue
        done.add((name, extra))
        package = packages[canonicalize_name(name)]
        found[package.name] = package.version
        for r in map(Requirement, package.requires or ()):
            if r.marker and not r.marker.evaluate({'extra': extra}): continue
            queue += [(r.name, e) for e in ('', *r.extras)]
    return found


def main(arguments: list[str]) -> None:
    "Print the constraints, or with --check what disagrees"
    if arguments == ['--check']:
        sys.exit('\n'.join(disagreements(requirements(), read_constraints())) or 0)
    versions = closure(requirements(), installed(arguments))
    print(HEADER + '\n'.join(f'{name}=={versions[name]}' for name in sorted(versions, key=str.casefold)))


if __name__ == '__main__': main(sys.argv[1:])
