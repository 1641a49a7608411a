"""Write docs/recipe.md from aptos_fastai/recipe/sections.py: python docs/scripts/recipe_reference.py."""
from dataclasses import MISSING, Field, fields
from pathlib import Path

from aptos_fastai.recipe.sections import NAMED_SECTIONS, SECTIONS

PAGE = Path(__file__).parents[1] / 'recipe.md'

INTRO = """\
# Recipe reference

A recipe is an INI file. Its sections are tables, stages and ensembles; together they form a graph.
This page is generated from `aptos_fastai/recipe/sections.py`; `python run.py keys` prints the same list.

- `[stage]` holds the defaults of every `[stage.NAME]`.
- `[demo.stage]` and `[demo.stage.NAME]` override stage keys when the recipe runs on the demo.
- `[tune.STAGE]` holds the ranges of `python run.py tune STAGE`: [Tune a stage](train.md#tune-a-stage).
- `--set SECTION.KEY=VALUE` changes one key for one run: `--set stage.finetune_256.epochs=5`.
- A list is written with spaces: `train = aptos_train finetune_256:aptos_test`.
- Sections and keys are checked before anything runs. An unknown key is an error that names the file,
  the section, the key and the accepted values.

## Shipped recipes

- `settings.ini`: EyePACS 2015 and APTOS 2019, or the demo; a GPU. The mean of three fine-tuned networks and one that is
  retrained with soft labels, five folds each.
- `recipes/published.ini`: the same tables; the constants of the 2020 team's code. One retrained network.
- `recipes/gold.ini`: the same tables; a GPU with 16 GB, a night. ConvNeXt V2 and EfficientNetV2, retrained twice with
  soft labels of all networks, two seeds.
- `recipes/cpu.ini`: APTOS 2019 alone, or the demo; two CPU cores, 4 hours. A teacher at 160 px, a student that starts
  from it at 192 px, the mean of both, five folds each.
- `recipes/one_table.ini`: a graded table of your own, and an ungraded one if there is one; two CPU cores. A teacher, a
  student retrained on its labels, the mean of both, five folds each.

`python run.py init FOLDER` copies them to a folder when you installed the package without a clone.
"""


def default_text(field: Field) -> str:
    "Return the default of a key as a recipe would write it."
    if field.default is MISSING: return '*required*'
    if isinstance(field.default, tuple): text = ' '.join(map(str, field.default))
    else: text = str(field.default)
    return f'`{text}`' if text else '*empty*'


def accepted_text(field: Field) -> str:
    "Return the accepted values of a key: choices, or a range."
    choices, low, high = (field.metadata[k] for k in ('choices', 'low', 'high'))
    if choices: return ', '.join(f'`{c}`' for c in choices)
    if low is not None: return f'{low} to {high}'
    return ''


def section_text(name: str, cls: type) -> str:
    "Return the table of one section's keys as Markdown."
    heading = f'[{name}.NAME]' if name in NAMED_SECTIONS else f'[{name}]'
    lines = [f'## {heading}', '', '| Key | Default | Accepted | Meaning |', '|---|---|---|---|']
    for field in fields(cls):
        if field.name == 'name': continue
        meaning = field.metadata['help'].replace('|', '\\|')
        lines.append(f'| `{field.name}` | {default_text(field)} | {accepted_text(field)} | {meaning} |')
    return '\n'.join(lines) + '\n'


def page() -> str:
    "Return docs/recipe.md."
    return '\n'.join([INTRO, *(section_text(name, cls) for name, cls in SECTIONS.items())])


if __name__ == '__main__': PAGE.write_text(page(), encoding='utf-8')
