"Make a recipe smaller: without tables that are not there, or stages for which there is no time."
from collections.abc import Collection, Iterable, Set
from dataclasses import replace

from aptos_fastai.recipe.check import checked
from aptos_fastai.recipe.graph import Recipe
from aptos_fastai.recipe.sections import ConfigError, Ensemble, Stage, Submit


def without_tables(recipe: Recipe, tables: Iterable[str]) -> Recipe:
    """Return the recipe without some tables and the stages that need them.

    An ensemble averages its remaining members; one that has a single member left is replaced by it.
    """
    tables = list(tables)
    stages, ensembles, submit = _remaining(recipe, _stages_that_need(recipe, set(tables)))
    if not submit.final:
        raise ConfigError(f'{recipe.path} [submit] final = {recipe.submit.final}: needs {", ".join(tables)}, which '
                          '--data lacks. Add it, or name another stage.')
    submit = replace(submit, table='' if submit.table in tables else submit.table)
    kept = {n: t for n, t in recipe.tables.items() if n not in tables}
    return checked(replace(recipe, tables=kept, stages=stages, ensembles=ensembles, submit=submit))


def postpone_stages(recipe: Recipe, names: Iterable[str]) -> Recipe:
    """Return the recipe without some stages, which are postponed, and those that build on them.

    Ensembles change as in `without_tables`. If nothing of `final` is left, the last one of `also` that is left takes
    its place; its `eyes` are single if no table that validates it names eyes. Tables, squares and folds stay those of
    the `whole` recipe. Raises `ConfigError` if no model is left.
    """
    lost = _stages_that_need(recipe, set(), set(names))
    if not lost: return recipe
    stages, ensembles, submit = _remaining(recipe, lost)
    if not submit.final:
        if not submit.also:
            raise ConfigError(f'{recipe.path} [submit] final = {recipe.submit.final}: without {", ".join(lost)} no '
                              'model is left.')
        submit = replace(submit, final=submit.also[-1], also=submit.also[:-1])
    smaller = replace(recipe, stages=stages, ensembles=ensembles, submit=submit, whole=recipe.whole or recipe)
    return checked(smaller if smaller.names_eyes(submit.final) else smaller.with_single_eyes())


def _remaining(recipe: Recipe, lost: Collection[str]) -> tuple[dict[str, Stage], dict[str, Ensemble], Submit]:
    "Return the stages, ensembles and submission without the `lost` stages; `final` is '' if nothing of it is left"
    stages = {n: s for n, s in recipe.stages.items() if n not in lost}
    ensembles, instead = {}, dict.fromkeys(lost, '')
    for name, e in recipe.ensembles.items():
        left = _shares_left(recipe, e, stages)
        if len(left) < 2: instead[name] = next(iter(left), '')
        else: ensembles[name] = e.with_shares(left)
    final, *also = (instead.get(name, name) for name in (recipe.submit.final, *recipe.submit.also))
    return stages, ensembles, replace(
        recipe.submit, final=final, also=tuple(dict.fromkeys(name for name in also if name not in ('', final))))


def _shares_left(recipe: Recipe, e: Ensemble, stages: Collection[str]) -> dict[str, float]:
    """Return the weights of an ensemble's members that are left, among `stages`; none if all of them are 0.

    That of a lost member which is one of several `seeds` goes to the others, so that their mean weighs as much.
    """
    means = [mean.members for name, mean in recipe.ensembles.items() if f'stage.{name}' in recipe.sections]
    left = {m: w for m, w in e.shares.items() if m in stages}
    for m in e.shares.keys() - left.keys():
        others = [o for members in means if m in members for o in members if o in left]
        for o in others: left[o] += e.shares[m] / len(others)
    return left if any(left.values()) else {}


def _stages_that_need(recipe: Recipe, tables: Set[str], stages: Set[str] = frozenset()) -> list[str]:
    "Return `stages`, those that train on one of `tables`, and those that build on such stages"
    lost: dict[str, None] = {}
    for name in recipe.order:
        if name not in recipe.stages: continue
        stage = recipe.stages[name]
        parents = {m for parent in stage.parents for m in recipe.members(parent)}
        if name in stages or parents & lost.keys() or tables & {table for _, table in stage.sources}:
            lost[name] = None
    return list(lost)
