"All else is in pyproject.toml; this puts settings.ini and recipes/ into the wheel, for `aptos-fastai init`."
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithRecipes(build_py):
    def run(self):
        super().run()
        if self.editable_mode: return
        for f in [Path('settings.ini'), *Path('recipes').glob('*.ini')]:
            out = Path(self.build_lib) / 'aptos_fastai/recipes' / f
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(f, out)


setup(cmdclass=dict(build_py=WithRecipes))
