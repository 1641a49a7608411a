"A recipe as a graph: its tables, stages and ensembles, and what depends on what."
from dataclasses import dataclass, field, replace
from pathlib import Path

from aptos_fastai.recipe.sections import (
    FITTED,
    Augment,
    Demo,
    Ensemble,
    Gate,
    Images,
    Ini,
    Ranges,
    Refer,
    Resolve,
    Stage,
    Submit,
    Table,
)


@dataclass(frozen=True)
class Recipe:
    "A checked recipe: its tables, stages and ensembles by name, and the `order` in which they can run"
    name: str
    path: Path
    demo: Demo | None                        # None unless the recipe runs on the demo
    images: Images
    augment: Augment
    tables: dict[str, Table]
    stages: dict[str, Stage]
    ensembles: dict[str, Ensemble]
    submit: Submit
    gate: Gate = Gate()
    refer: Refer = Refer()
    seed: int = 42
    splits: int = 5
    conflicts: str = 'keep'
    owner: str = ''
    contact: str = ''
    order: tuple[str, ...] = ()              # stages and ensembles, parents first
    tune: dict[str, Ranges] = field(default_factory=dict, repr=False, compare=False)       # of [tune.STAGE]
    whole: 'Recipe | None' = field(default=None, repr=False)    # the recipe before stages were postponed
    sections: Ini = field(default_factory=dict, repr=False, compare=False)      # its texts, with those of --set
    sets: tuple[str, ...] = field(default=(), repr=False, compare=False)        # the SECTION.KEY=VALUE of --set
    other_runs: dict[str, Path] = field(default_factory=dict)        # stage -> its folder in the run that trained it
    resolve: Resolve | None = field(default=None, repr=False, compare=False)

    @property
    def nodes(self) -> dict[str, Stage | Ensemble]:
        "Stages and ensembles by name"
        return {**self.stages, **self.ensembles}

    @property
    def prepared_sizes(self) -> list[int]:
        "Sides of the prepared squares, pixels, the largest first: `[images] size`, or without it that of each stage"
        stages = (self.whole or self).stages.values()
        return [self.images.size] if self.images.size else sorted({s.size for s in stages}, reverse=True)

    @property
    def used_tables(self) -> list[Table]:
        "Tables that a stage or the submission needs, in the order of the recipe"
        stages = (self.whole or self).stages.values()
        names = {table for s in stages for _, table in s.sources} | {self.submit.table}
        return [t for name, t in self.tables.items() if name in names]

    @property
    def carried(self) -> list[str]:
        "Further columns of the tables that stay with the images"
        return list(dict.fromkeys(name for t in self.used_tables for name in t.carried))

    def with_single_eyes(self) -> 'Recipe':
        "Return the recipe with [submit] eyes = single"
        return replace(self, submit=replace(self.submit, eyes='single'))

    @property
    def postponed(self) -> list[str]:
        "The stages that `postpone_stages` has left out"
        return [name for name in self.whole.stages if name not in self.stages] if self.whole else []

    def folds_of(self, node: str) -> int:
        "Return how many folds a stage has, or all members of an ensemble"
        return min(self.stages[m].folds for m in self.members(node))

    def held_out_tables(self, stage: str) -> list[str]:
        """Return the tables of which no image, nor a copy or another eye of its patient, may train a stage.

        They validate stages of more folds, which all start from or learn from the one fold of this stage.
        """
        if self.whole: return self.whole.held_out_tables(stage)
        found: dict[str, None] = {}
        for child in self.stages.values():
            nodes = [o for o in child.parents if stage in self.members(o)]
            if any(self.folds_of(o) < child.folds for o in nodes): found |= dict.fromkeys(child.validated_tables)
            if nodes: found |= dict.fromkeys(self.held_out_tables(child.name))
        return list(found)

    def members(self, node: str) -> dict[str, float]:
        """Return the stages whose scores `node` averages, with weights that add up to 1.

        Weights that are fitted (`is_fitted`) are equal here: `Run.member_weights` has the fitted ones.
        """
        if node in self.stages: return {node: 1.}
        shares = self.ensembles[node].shares
        return {m: w / sum(shares.values()) for m, w in shares.items()}

    def names_eyes(self, node: str) -> bool:
        "Return whether a table that validates a stage or ensemble names both patients and eyes"
        return any(self.tables[table].names_eyes for m in self.members(node)
                   for table in self.stages[m].validated_tables)

    def is_fitted(self, node: str) -> bool:
        "Return whether `node` is an ensemble whose weights are fitted to out-of-fold scores"
        return node in self.ensembles and self.ensembles[node].weights == FITTED
