"""The Python API of a run: `open_run(...)` in a notebook or script.

    from aptos_fastai import open_run
    run = open_run('settings.ini', data='demo')      # reads the recipe, prepares every image
    run.train('pretrain_256')                        # trains the stage and what it builds on
    learn = run.learner('finetune_256')              # a fastai Learner
    run.oof('finetune_256')                          # out-of-fold scores
    run.grader.predict('eye.jpg')                    # grades of new images
"""
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from aptos_fastai.common.io import read_record
from aptos_fastai.pipeline.graph import load_run, start_run, train_nodes
from aptos_fastai.recipe.check import require_name
from aptos_fastai.run_folder import RecordError, Run

if TYPE_CHECKING:
    import pandas as pd
    from fastai.learner import Learner

    from aptos_fastai.inference.grader import Grader


class PreparedRun(Run):
    """A run whose images are prepared.

    Attributes: `recipe`, `data` and `root` (folders), `frames` (table name -> DataFrame, a row an image).
    Any function that takes a `Run` takes this one. The run folder is locked only while `train` works in it.
    """
    @property
    def folder(self) -> Path:
        "The run folder, `<runs>/<recipe name>`"
        return self.root

    def train(self, stage: str, replace: bool = False) -> Path:
        """Train a stage and the unfinished stages that it builds on; return the stage's folder.

        Raises `AptosError` if that would `replace` stages of a finished run that have other settings.
        """
        needed = self.ancestors(require_name(self.recipe, stage, self.recipe.stages))
        with start_run(self, needed, replaces=replace) as (run, bars): train_nodes(run, needed, bars)
        return self.root / stage

    def learner(self, stage: str, fold: int = 0) -> 'Learner':
        "Return the fastai Learner of a stage as its training starts. Raises `AptosError` if its parent is not trained"
        from aptos_fastai.pipeline.stage import stage_learner
        return stage_learner(self, stage, fold)

    @cached_property
    def grader(self) -> 'RunGrader':
        "The model: `run.grader.predict(files)`; `run.grader(STAGE)` is the `Grader` of one trained stage"
        return RunGrader(self)

    def summary(self) -> dict:
        """Return summary.json: `stages` (a dict each, with kappa and kappa_interval) and `submission`.

        Raises `RecordError` before `all` has finished.
        """
        summary = read_record(self.root / 'summary.json')
        if not summary: raise RecordError(f'{self.root}: no summary.json. Run `all` first.')
        return summary


class RunGrader:
    "Grades images with the model of a run once `all` is finished, or with one trained stage"
    def __init__(self, run: Run):
        self.run = run
        self._grader: Grader | None = None

    def __call__(self, stage: str = '', backend: str = 'torch', precision: str = 'f32') -> 'Grader':
        "Return the `Grader` of the run's model, or of a stage"
        from aptos_fastai.inference.grader import load_grader
        root, recipe = self.run.root, self.run.recipe
        return load_grader(root / require_name(recipe, stage, recipe.stages) if stage else root, backend, precision)

    def predict(self, files: Iterable[str | Path] | str | Path) -> 'pd.DataFrame':
        "Return a row for each image file, as `Grader.predict` does; the networks are read once"
        self._grader = self._grader or self()
        return self._grader.predict(files)


def open_run(recipe: str | Path = 'settings.ini', data: str | Path = 'demo', runs: str | Path = 'runs',
             sets: Iterable[str] = (), name: str = '') -> PreparedRun:
    """Read a recipe and its tables, prepare every image, write the folds; return the `PreparedRun`.

    `data` is the folder of the tables, or 'demo' for generated images; results go to `<runs>/<name>`, by default the
    name of the recipe; `sets` change keys of the recipe: ['stage.epochs=5']. Trains nothing. Raises `AptosError`.
    """
    with start_run(load_run(recipe, data, runs, sets, name=name)) as (run, _): return as_prepared(run)


def as_prepared(run: Run) -> PreparedRun:
    "Return a run whose images are prepared as a `PreparedRun`"
    return PreparedRun(run.recipe, run.data, run.root, run.frames, run.left_out, run.ungradable)
