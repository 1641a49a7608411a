"Keep `all` to a number of hours: train the stages that end in time, and leave out the others."
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from aptos_fastai.common import clock
from aptos_fastai.common.console import format_duration, say
from aptos_fastai.common.io import AptosError
from aptos_fastai.pipeline.eyes import MIN_PATIENTS, without_stages
from aptos_fastai.pipeline.graph import check_run, submitted_nodes
from aptos_fastai.pipeline.plan import preparing_seconds, report_seconds, stage_cost, tables_scored_by
from aptos_fastai.recipe.graph import Recipe
from aptos_fastai.run_folder import Run

LATE = 1.05                                  # a stage starts if it is expected to end after this part of the hours


def goals(recipe: Recipe) -> list[str]:
    "Return the stages whose scores are submitted, in the order in which they are trained: of `also`, then of `final`"
    return list(dict.fromkeys(m for node in submitted_nodes(recipe) for m in recipe.members(node)))


@dataclass
class Deadline:
    """The hours that a command may take since it started.

    Times are those of `plan`, corrected by how long the folds of this command really took. A stage counts with those
    that lead to the same submitted stage: none is started if the submitted one would end too late.
    """
    hours: float
    start: float = field(default_factory=lambda: clock.seconds())
    measured: dict = field(default_factory=dict, repr=False)
    took: dict[str, tuple[float, float]] = field(default_factory=dict)       # stage -> real and estimated seconds
    refused: dict[str, str] = field(default_factory=dict)                    # stage -> why it is left out
    late: set[str] = field(default_factory=set)                              # submitted stages that end too late

    @property
    def left(self) -> float:
        "Seconds until no stage may end later"
        return self.start + self.hours * 3600 * LATE - clock.seconds()

    @property
    def budget(self) -> float:
        "Seconds until the hours are over"
        return max(0., self.start + self.hours * 3600 - clock.seconds())

    def check(self, run: Run) -> None:
        "Raise `AptosError`, before anything is prepared, if no submitted stage would end in time"
        todo = run.todo()
        if not todo: return
        check_run(run, todo)
        preparing = preparing_seconds(run, self.measured)
        times = {goal: preparing + self.until(run, goal, todo) for goal in goals(run.recipe)}
        first = min(times, key=times.__getitem__)
        if times[first] <= self.left: return
        seconds = clock.seconds() - self.start + times[first]
        raise AptosError(
            f'--hours {self.hours:g}: too little. {first} would be a model first, after about '
            f'{format_duration(seconds)} with its scores and the report. Set --hours {enough_hours(seconds)} or more, '
            'or write a smaller recipe with `configure`.')

    def in_order(self, run: Run, todo: dict[str, list[int]]) -> dict[str, list[int]]:
        "Return the folds to train with the stages that complete a submitted stage together"
        wanted = [run.ancestors(goal) for goal in goals(run.recipe)]
        by_goal = [name for names in [*wanted, set(todo)] for name in todo if name in names]
        return {name: todo[name] for name in dict.fromkeys(by_goal)}

    def allows(self, run: Run, stage: str) -> bool:
        """Return whether the next fold of a stage is to be trained.

        Not if the submitted stage that it leads to would end too late, and there is or can still be another model. If
        there can be none, the training goes on, which is printed.
        """
        if stage in self.refused: return False
        todo = run.todo()
        missing = [m for m in run.recipe.stages if m in todo and m in self.refused and m in run.ancestors(stage)]
        if missing:
            self.refused[stage] = f'needs {missing[0]}'
            return False
        submitted = goals(run.recipe)
        goal = next((o for o in submitted if stage in run.ancestors(o) and o not in self.refused), stage)
        needed = self.until(run, goal, todo)
        if needed <= self.left: return True
        others = [o for o in submitted if o != goal and o not in self.refused]
        if any(self.until(run, o, todo) <= self.left or not todo.keys() & run.ancestors(o) for o in others):
            self.refused[stage] = (f'about {format_duration(needed)} to {goal} and the report, '
                                   f'{format_duration(max(0, self.left))} left')
            return False
        if goal not in self.late:
            say(f'  {goal} will end about {format_duration(needed - self.left)} too late for --hours {self.hours:g}, '
                'but nothing less is a model: it goes on. After Ctrl-C the same command resumes it.', 'yellow')
        self.late.add(goal)
        return True

    def until(self, run: Run, goal: str, todo: dict[str, list[int]]) -> float:
        "Return the expected seconds until `goal` and what is finished already are trained, scored and reported"
        needed = {name: folds for name, folds in todo.items() if name in run.ancestors(goal)}
        reported = {*needed, *(o for o in goals(run.recipe) if o not in todo)}
        training = sum(self.training(run, name, folds) for name, folds in needed.items())
        scoring = sum(self.scoring(run, name) for name in reported)
        return training + scoring + report_seconds(run, reported, self.measured)

    def training(self, run: Run, stage: str, folds: list[int]) -> float:
        "Return the expected seconds to train folds of a stage; the first one may have finished epochs"
        from aptos_fastai.training.checkpoint import finished_epochs
        s = run.recipe.stages[stage]
        epochs = s.epochs + s.freeze_epochs
        done = min(epochs, finished_epochs(run.fold_dir(stage, folds[0])))
        seconds = stage_cost(run, stage, folds, self.measured).training * (1 - done / epochs / len(folds))
        return seconds * self.correction(stage)

    def scoring(self, run: Run, stage: str) -> float:
        "Return the expected seconds to score the tables that a stage scores, in the folds that have not done so"
        tables = tables_scored_by(run.recipe, stage)
        folds = [k for k in run.folds_of(stage)
                 if not all(run.scores_file(stage, k, table, tta).is_file() for table, tta in tables)]
        return stage_cost(run, stage, folds, self.measured).scoring * self.correction(stage) if folds else 0.

    def correction(self, stage: str) -> float:
        "Return how many times longer than estimated the folds of this command took: of the stage, or of all stages"
        times = [self.took[stage]] if stage in self.took else list(self.took.values())
        real, estimated = (sum(o) for o in zip(*times, strict=True)) if times else (1., 1.)
        return real / estimated if estimated else 1.

    @contextmanager
    def timed(self, run: Run, stage: str, fold: int) -> Iterator[None]:
        "Compare how long a fold really takes with its estimate"
        estimated = self.training(run, stage, [fold]) / self.correction(stage)
        start = clock.seconds()
        yield
        real, total = self.took.get(stage, (0., 0.))
        self.took[stage] = real + clock.seconds() - start, total + estimated

    def without_rest(self, run: Run) -> Run:
        "Return the run without the stages that are not finished, which is printed, recorded and reported"
        rest = run.todo()
        if not rest: return run
        smaller = without_stages(run, rest)
        why = '; '.join(f'{name}: {self.refused[name]}' for name in rest if name in self.refused)
        text = (f'left out for lack of time (--hours {self.hours:g}): {", ".join(rest)} ({why}). The model is '
                f'{smaller.recipe.submit.final}. A later `all` trains the rest.')
        if smaller.recipe.submit.eyes != run.recipe.submit.eyes:
            text += (f' It grades each image alone, because fewer than {MIN_PATIENTS} patients have validation images '
                     'of both eyes.')
        say(text, 'yellow')
        return replace(smaller, left_out=' '.join(filter(None, [run.left_out, text])))


def enough_hours(seconds: float) -> str:
    "Return a number of hours that is a little more than `seconds`"
    return f'{math.ceil(105 * seconds / 3600) / 100:g}'
