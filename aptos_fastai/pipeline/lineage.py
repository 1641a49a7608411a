"Show for each fold that no image which validates it has trained it, or a stage that it starts from or learns from."
from collections.abc import Iterable
from pathlib import Path

from aptos_fastai.common.console import say
from aptos_fastai.common.io import AptosError
from aptos_fastai.data.spreadsheet import first_few
from aptos_fastai.inference.training_images import SeenImages, images_of_weights
from aptos_fastai.recipe.sections import Stage
from aptos_fastai.run_folder import Run


def training_images(run: Run, stage: str, fold: int) -> dict[str, int]:
    "Return how many images trained a fold of a stage and each of its ancestors: STAGE/foldK -> images"
    s, found = run.recipe.stages[stage], dict[str, int]()
    for parent, k in run.parent_folds(stage, fold).items(): found |= training_images(run, parent, k)
    return found | {f'{stage}/fold{fold}': sum(int(run.training_part(s, table, fold).sum()) for _, table in s.sources)}


def check_lineage(run: Run, stage: str, fold: int) -> None:
    """Raise `AptosError` if an image that validates a fold trained it or an ancestor, itself, as a copy or by patient.

    Images are compared one by one, whatever folds the ancestors were trained in.
    """
    valid = set(run.validation_images(stage, fold).group)
    _check_ancestor(run, f'{stage} fold {fold}', valid, stage, fold)


def _check_ancestor(run: Run, validated: str, valid: set[str], stage: str, fold: int) -> None:
    s = run.recipe.stages[stage]
    for _, table in s.sources:
        frame = run.frames[table]
        shared = frame[run.training_part(s, table, fold) & frame.group.isin(valid)]
        if not len(shared): continue
        raise AptosError(f'{run.root}: {validated} is validated by images that train {stage} fold {fold}: {table} '
                         f'{first_few(shared.id_code.tolist())}, themselves, as copies or by patient. Set folds of '
                         f'{stage} to that of the stages that build on it.')
    for parent, k in run.parent_folds(stage, fold).items(): _check_ancestor(run, validated, valid, parent, k)


def report_held_out(run: Run) -> None:
    "Print how many images a stage leaves out because they are copies, or of patients, of images it may not see"
    for name, stage in run.recipe.stages.items():
        counts = {table: int(run.held_out(stage, table).sum()) for _, table in stage.sources}
        parts = [f'{n} of {len(run.frames[table])} images of {table}' for table, n in counts.items() if n]
        if parts: say(f'{name} leaves out {" and ".join(parts)}: copies or patients of '
                      f'{", ".join(run.recipe.held_out_tables(name))}, whose folds all build on it', 'yellow')


def seen_by_weights(run: Run, stage: Stage) -> dict:
    """Return what a stage's record says of the images that its file of initial weights was trained on; {} without one.

    `known`: whether the file lies in a run or bundle that lists its images; `note`: what is not known of them; `seen`:
    table -> how many of its graded images are among them, or near copies.
    """
    if not stage.weights_file: return {}
    found = images_of_weights(Path(stage.weights_file))
    if not found or found[0] is None: return dict(known=False, note=found[1] if found else '', seen={})
    graded = {name: frame for name, frame in run.frames.items() if run.recipe.tables[name].graded}
    seen = SeenImages(found[0])
    counts = {name: int((seen.find(frame) != '').sum()) for name, frame in graded.items()}
    return dict(known=True, note=found[1], seen={name: n for name, n in counts.items() if n})


def weights_warnings(file: str, origin: dict, tables: Iterable[str]) -> list[str]:
    "Return a warning if validated `tables` hold images that initial weights were trained on, or if that is unknown"
    if not origin: return []
    if not origin['known']:
        return [f'the images that {file} was trained on are unknown: if some of them validate, this is optimistic']
    seen = [f'{n} images of {table}' for table, n in origin['seen'].items() if table in set(tables)]
    return [f'{file} was trained on {" and ".join(seen)}, which validate: optimistic'] if seen else []


def report_weights(run: Run, stage: Stage) -> None:
    "Print the warnings of a stage's file of initial weights"
    origin = seen_by_weights(run, stage)
    for line in weights_warnings(stage.weights_file, origin, stage.validated_tables): say(f'  {line}', 'yellow')
