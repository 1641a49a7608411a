"Read a recipe (settings.ini), presets of tables and values of --set into checked, frozen dataclasses."
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from aptos_fastai.recipe.check import check_refer, checked
from aptos_fastai.recipe.files import preset_files, read_ini
from aptos_fastai.recipe.graph import Recipe
from aptos_fastai.recipe.sections import (
    ACCEPTED_SECTIONS,
    NAMED_SECTIONS,
    SECTION_NAME,
    SECTIONS,
    ConfigError,
    Demo,
    Ensemble,
    Ini,
    Parts,
    Refer,
    Resolve,
    Stage,
    Table,
    parse_weights,
)
from aptos_fastai.recipe.smaller import without_tables
from aptos_fastai.recipe.values import build, did_you_mean, parse_ranges, stage_key


def _check_tuned(path: Path, ini: Ini) -> None:
    "Raise `ConfigError` for a section [tune.NAME] that is of no stage"
    stages, ensembles = _names(ini, 'stage'), _names(ini, 'ensemble')
    for name in _names(ini, 'tune'):
        if name in stages: continue
        what = f'no such stage{did_you_mean(name, stages)}'
        if name in ensembles: what = 'an ensemble, which is not trained. Tune a stage.'
        raise ConfigError(f'{path} [tune.{name}]: {what} Stages: {", ".join(stages)}.')


def key_text(recipe: Recipe, stage: str, key: str) -> str:
    "Return the text of a key of a stage, as [stage.NAME], its defaults or --set give it"
    texts = _stage_texts(recipe.sections, stage, bool(recipe.demo))
    default = stage_key(key).default
    return texts.get(key, ' '.join(map(str, default)) if isinstance(default, tuple) else str(default)).strip()


def read_recipe(path: str | Path, *, demo: bool = False, sets: Sequence[str] = (),
                resolve: Resolve | None = None) -> Recipe:
    """Return the checked recipe of the file at `path`; with `demo`, as it runs on the demo.

    `sets` are SECTION.KEY=VALUE strings (from --set) that override the file; `resolve` adds the stages of other runs
    that ensembles name by path. Raises `ConfigError`.
    """
    ini = read_ini(Path(path))
    _check_sets(ini, sets, demo)
    return parse_recipe(Path(path), ini, demo, sets, resolve)


def changed(recipe: Recipe, sets: Sequence[str]) -> Recipe:
    "Return the checked recipe with further SECTION.KEY=VALUE. Raises `ConfigError`"
    ini = {section: dict(keys) for section, keys in recipe.sections.items()}
    parsed = parse_recipe(recipe.path, ini, bool(recipe.demo), [*recipe.sets, *sets], recipe.resolve)
    left_out = [name for name in parsed.tables if name not in recipe.tables]
    return replace(without_tables(parsed, left_out) if left_out else parsed, name=recipe.name)


def parse_recipe(path: Path, ini: Ini, demo: bool, sets: Sequence[str], resolve: Resolve | None = None) -> Recipe:
    "Return the checked recipe of the sections of a file, which it changes. Raises `ConfigError`"
    for text in sets: override(ini, text)
    sections = dict(ini)
    _check_section_names(path, ini)
    _check_tuned(path, ini)
    for name in _names(ini, 'table'): ini[f'table.{name}'] = _with_preset(path, name, ini[f'table.{name}'])
    tables = {n: build(path, f'table.{n}', Table, ini[f'table.{n}'], name=n) for n in _names(ini, 'table')}
    ensembles = {n: build(path, f'ensemble.{n}', Ensemble, ini[f'ensemble.{n}'], name=n)
                 for n in _names(ini, 'ensemble')}
    for e in ensembles.values(): _check_weights(path, e)
    stages = {n: build(path, f'stage.{n}', Stage, _stage_texts(ini, n, demo), name=n) for n in _names(ini, 'stage')}
    ranges = {n: parse_ranges(path, n, ini[f'tune.{n}']) for n in _names(ini, 'tune')}
    single = {s: build(path, s, SECTIONS[s], ini.get(s, {})) for s in SECTIONS if s not in NAMED_SECTIONS}
    if demo: stages = {n: _demo_stage(path, s, single['demo']) for n, s in stages.items()}
    parts = Parts(tables, *_with_seeds(path, stages, ensembles, single['recipe'].seed))
    if resolve: parts = resolve(path, parts)
    recipe = Recipe(name=run_name(path, demo), path=path,
                    demo=single['demo'] if demo else None, images=single['images'], augment=single['augment'],
                    **vars(parts), resolve=resolve, submit=single['submit'], gate=single['gate'],
                    refer=single['refer'], tune=ranges, sections=sections, sets=tuple(sets),
                    **vars(single['recipe']))
    return checked(recipe)


def run_name(path: Path, demo: bool) -> str:
    "Return the name of a recipe's run folder, unless --name gives another"
    return f'{path.stem}-demo' if demo else path.stem


def preset_table(name: str, **keys: str) -> Table:
    "Return a preset as a table of its own name; `keys` override its keys. Raises `ConfigError`"
    return parse_table(name, _with_preset(Path('--preset'), name, dict(preset=name, **keys)))


def parse_table(name: str, texts: dict[str, str]) -> Table:
    "Return a table from the texts of its keys. Raises `ConfigError`"
    return build(Path('options'), f'table.{name}', Table, texts, name=name)


def parse_refer(texts: dict[str, str]) -> Refer:
    "Return [refer] from the texts of its keys. Raises `ConfigError`"
    if not texts: raise ConfigError('name --sensitivity, --specificity or --threshold, for example --sensitivity 0.95.')
    refer = build(Path('options'), 'refer', Refer, texts)
    check_refer(Path('options'), refer)
    return refer


def _with_preset(path: Path, table: str, texts: dict[str, str]) -> dict[str, str]:
    "Return the texts of a table's keys with those of its preset as defaults"
    name, files = texts.get('preset', '').strip(), preset_files()
    if not name: return texts
    if name not in files:
        raise ConfigError(f'{path} [table.{table}] preset = {name}: no such preset{did_you_mean(name, files)} '
                          f'Accepted: {", ".join(files)}.')
    return read_ini(files[name])['table'] | texts


def override(ini: Ini, text: str) -> None:
    "Put SECTION.KEY=VALUE into `ini`; a stage's key also overrides the demo's value of it"
    name, equals, value = text.partition('=')
    section, dot, key = name.strip().rpartition('.')
    if not equals or not dot:
        raise ConfigError(f'--set {text}: enter SECTION.KEY=VALUE, for example stage.finetune_256.epochs=5.')
    sections = [section]
    if section.partition('.')[0] == 'stage': sections.append(f'demo.{section}')
    for s in sections: ini.setdefault(s, {})[key] = value.strip()


def _check_section_names(path: Path, ini: Ini) -> None:
    "Raise `ConfigError` for a section that does not exist"
    for section in ini:
        if not SECTION_NAME.fullmatch(section):
            raise ConfigError(f'{path} [{section}]: no such section. Accepted: {ACCEPTED_SECTIONS}.')
    stages = _names(ini, 'stage')
    for name in _names(ini, 'demo.stage'):
        if name not in stages:
            raise ConfigError(f'{path} [demo.stage.{name}]: no such stage. Stages: {", ".join(stages)}.')


def _check_sets(ini: Ini, sets: Sequence[str], demo: bool) -> None:
    "Raise `ConfigError` for a --set of a key of [stage] that changes nothing, as every stage has its own value"
    stages, kind = _names(ini, 'stage'), 'demo.stage' if demo else 'stage'
    for text in sets:
        section, _, key = text.partition('=')[0].strip().rpartition('.')
        if section != 'stage' or not stages: continue
        if all(key in ini.get(f'{kind}.{name}', {}) for name in stages):
            raise ConfigError(f'--set {text}: changes nothing, as every stage has its own {key}. Name the stage: '
                              f'--set {section}.{stages[0]}.{key}=VALUE.')


def _names(ini: Ini, kind: str) -> list[str]:
    "Return each NAME of the sections [kind.NAME]"
    return [section.removeprefix(f'{kind}.') for section in ini if section.startswith(f'{kind}.')]


def _stage_texts(ini: Ini, name: str, demo: bool) -> dict[str, str]:
    "Return the texts of a stage's keys; later sections override earlier ones"
    sections = ['stage', f'stage.{name}']
    if demo: sections += ['demo.stage', f'demo.stage.{name}']
    texts: dict[str, str] = {}
    for section in sections: texts |= ini.get(section, {})
    return texts


def _demo_stage(path: Path, stage: Stage, demo: Demo) -> Stage:
    "Return `stage` with the demo's size and network"
    try: archs = dict(pair.split(':') for pair in demo.archs)
    except ValueError:
        raise ConfigError(f'{path} [demo] archs = {" ".join(demo.archs)}: enter BIG:SMALL pairs.') from None
    return replace(stage, arch=archs.get(stage.arch, stage.arch), size=max(32, stage.size // demo.shrink))


# Stages of several seeds

def _with_seeds(path: Path, stages: dict[str, Stage], ensembles: dict[str, Ensemble],
                seed: int) -> tuple[dict[str, Stage], dict[str, Ensemble]]:
    """Return the stages, one of `seeds` = n replaced by n stages, and the ensembles, with the mean of these n.

    A stage starts from the stage `init` of its own number; if that has fewer seeds, from the first one.
    """
    copies = {n: [f'{n}_seed{i}' for i in range(1, s.seeds + 1)] if s.seeds > 1 else [n] for n, s in stages.items()}
    for n, names in copies.items():
        taken = {*stages, *ensembles} & set(names) - {n}
        if taken: raise ConfigError(f'{path} [stage.{n}] seeds = {stages[n].seeds}: makes a stage {min(taken)}, which '
                                    'the recipe has already. Rename that one.')
    found = {}
    for n, s in stages.items():
        first = seed if s.seed < 0 else s.seed
        for i, name in enumerate(copies[n]):
            parents = copies.get(s.init, [s.init])
            init = parents[i] if i < len(parents) else parents[0]
            found[name] = replace(s, name=name, init=init, seed=first + i, seeds=1)
    means = {n: Ensemble(n, tuple(names)) for n, names in copies.items() if len(names) > 1}
    return found, means | {n: _with_members(e, copies) for n, e in ensembles.items()}


def _check_weights(path: Path, e: Ensemble) -> None:
    "Check that an ensemble names each member once, and has no weights or one for each"
    twice = [m for m in e.members if e.members.count(m) > 1]
    if twice:
        raise ConfigError(f'{path} [ensemble.{e.name}] members = {" ".join(e.members)}: {twice[0]} is named twice. '
                          'Name each stage once; weights can make it count more.')
    weights = parse_weights(e.weights)
    if not weights or (len(weights) == len(e.members) and any(weights)): return
    raise ConfigError(f'{path} [ensemble.{e.name}] weights = {e.weights}: enter one number for '
                      f'each of the {len(e.members)} members, not all 0.')


def _with_members(e: Ensemble, copies: dict[str, list[str]]) -> Ensemble:
    "Return an ensemble with each member of several seeds replaced by its stages, which share its weight if it is fixed"
    if all(len(copies.get(m, [])) < 2 for m in e.members): return e
    return e.with_shares({name: w / len(copies[m]) for m, w in e.shares.items() for name in copies.get(m, [m])})
