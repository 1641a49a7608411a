"Parse the value of a key, and name the right ones for a wrong one."
import re
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin

from aptos_fastai.recipe.sections import NOT_TUNED, OLD_KEYS, ConfigError, Range, Ranges, Stage, parse_number


def check_choice(value: str, choices: Iterable[str], problem: str) -> str:
    "Return `value`. Raises `ConfigError` if it is none of `choices`, with a `problem` and the right names"
    known = list(choices)
    if value in known: return value
    raise ConfigError(f'{problem}{did_you_mean(str(value), known)} Choose from: {", ".join(known)}.')


def check_fold(fold: int, folds: int, stage: str) -> None:
    "Raise `ConfigError` if `fold` is none of the `folds` of a stage or ensemble"
    if fold in range(folds): return
    raise ConfigError(f'fold {fold}: no such fold of {stage}. Choose from: {", ".join(map(str, range(folds)))}.')


def did_you_mean(word: str, known: Iterable[str]) -> str:
    "Return ', did you mean X?' if one of `known` is similar to `word` or contains it, whatever its case, else '.'"
    folded = {name.casefold(): name for name in known}
    text = word.casefold()
    similar = get_close_matches(text, folded, 1) or [name for name in folded if text and text in name]
    return f', did you mean {folded[similar[0]]}?' if similar else '.'


def _parse_value(key: Field, text: str) -> Any:
    "Return `text` as the type of the key. Raises ValueError with what to enter"
    accepts = key.metadata
    is_tuple = get_origin(key.type) is tuple
    kind: Any = get_args(key.type)[0] if is_tuple else key.type
    words = (text if kind is str else re.sub(r',\s', ' ', text)).split() if is_tuple else [text]
    if accepts['choices'] and text not in accepts['choices']:
        raise ValueError(f'no such value. Accepted: {", ".join(accepts["choices"])}.')
    try: values = words if kind is str else [parse_number(kind, o, accepts['low'], accepts['high']) for o in words]
    except ValueError as e: raise ValueError(f'{e} {accepts["advice"]}'.strip()) from None
    value = tuple(values) if is_tuple else values[0]
    if accepts['check']: accepts['check'](text, value)
    return value


def build(path: Path, section: str, cls: type, texts: dict[str, str], **given: str) -> Any:
    "Return the dataclass `cls` from the texts of one section"
    known = {f.name: f for f in fields(cls) if f.name != 'name'}
    for k in texts:
        if k in OLD_KEYS.get(cls, {}): raise ConfigError(f'{path} [{section}] {k}: {OLD_KEYS[cls][k]}')
        if k not in known:
            raise ConfigError(f'{path} [{section}] {k}: no such key{did_you_mean(k, known)} '
                              f'Accepted keys: {", ".join(known)}.')
    values: dict[str, Any] = dict(given)
    for k, f in known.items():
        required, text = f.default is MISSING, texts.get(k)
        if text is None:
            if required: raise ConfigError(f'{path} [{section}] {k}: missing. Enter: {f.metadata["help"]}.')
            continue
        try: values[k] = _parse_value(f, text.strip())
        except ValueError as e: raise ConfigError(f'{path} [{section}] {k} = {text}: {e}') from None
        if required and not values[k]:
            raise ConfigError(f'{path} [{section}] {k}: empty. Enter: {f.metadata["help"]}.')
    return cls(**values)


def parse_ranges(path: Path, stage: str, texts: dict[str, str]) -> Ranges:
    "Return the ranges of [tune.STAGE]"
    known = {f.name: f for f in fields(Stage) if f.name not in NOT_TUNED | {'name'}}
    found: Ranges = {}
    for k, text in texts.items():
        if k not in known:
            what = 'a key that is not tuned.' if k in NOT_TUNED else f'no such key{did_you_mean(k, known)}'
            raise ConfigError(f'{path} [tune.{stage}] {k}: {what} Accepted keys: {", ".join(known)}.')
        try: found[k] = _parse_range(known[k], text.strip())
        except ValueError as e: raise ConfigError(f'{path} [tune.{stage}] {k} = {text}: {e}') from None
    return found


def _parse_range(key: Field, text: str) -> Range:
    "Return what `tune` tries for a key of a stage. Raises ValueError with what to enter"
    if '|' in text or key.type not in (int, float):
        choices = tuple(o.strip() for o in text.split('|'))
        values = [_parse_value(key, o) for o in choices]
        if len(set(values)) < max(2, len(values)): raise ValueError('enter different values, separated by |.')
        return Range(' | '.join(choices), choices=choices)
    *numbers, last = text.split() or ['']
    log = last == 'log'
    if not log: numbers.append(last)
    if len(numbers) != 2: raise ValueError('enter FROM TO, FROM TO log, or values separated by |.')
    low, high = (_parse_value(key, o) for o in numbers)
    if low >= high: raise ValueError('enter the smaller number first.')
    if log and low <= 0: raise ValueError('a logarithmic scale begins above 0.')
    return Range(' '.join(text.split()), low, high, log)


def parse_key(key: str, text: str) -> Any:
    "Return the value of a key of [stage] from its text. Raises ValueError with what to enter"
    return _parse_value(stage_key(key), text)


def stage_key(name: str) -> Field:
    "Return the field of a key of [stage]"
    return next(f for f in fields(Stage) if f.name == name)
