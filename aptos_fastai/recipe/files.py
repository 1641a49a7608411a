"The files of recipes: their sections as text, the shipped ones, the presets of tables."
import configparser
from pathlib import Path

from aptos_fastai.common.io import write_bytes
from aptos_fastai.recipe.sections import ConfigError, Ini


def read_ini(path: Path) -> Ini:
    "Return the sections of the file as plain text"
    if not path.is_file():
        raise ConfigError(f'{path}: no such recipe. Name one with --recipe FILE, or write settings.ini with `init`.')
    parser = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=None, default_section='\0')
    parser.optionxform = str                 # type: ignore  # keys are case-sensitive
    try: parser.read_string(path.read_text(encoding='utf-8-sig'), source=str(path))
    except UnicodeDecodeError:
        raise ConfigError(f'{path}: is no recipe, but another kind of file, or a text that is not UTF-8.') from None
    except configparser.Error as e:
        raise ConfigError(f'{path}: invalid recipe ({" ".join(str(e).split())}). Correct this line.') from None
    return {section: dict(parser[section]) for section in parser.sections()}


def shipped_folder() -> Path:
    "Return the folder of the shipped settings.ini and recipes/: in an installed wheel, or in a clone"
    package = Path(__file__).parents[1]
    return package / 'shipped' if (package / 'shipped').is_dir() else package.parent


def preset_files() -> dict[str, Path]:
    "Return the file of each preset of a table"
    return {file.stem: file for file in sorted((shipped_folder() / 'recipes/tables').glob('*.ini'))}


def write_recipes(folder: Path) -> list[Path]:
    "Copy the shipped settings.ini and recipes/ into `folder`. Raises `ConfigError` instead of overwriting a file"
    source = shipped_folder()
    files = [source / 'settings.ini', *sorted((source / 'recipes').glob('*.ini'))]
    targets = [folder / f.relative_to(source) for f in files]
    for target in targets:
        if target.exists(): raise ConfigError(f'{target}: already exists. Choose another folder.')
    for f, target in zip(files, targets, strict=True): write_bytes(target, f.read_bytes())
    return targets
