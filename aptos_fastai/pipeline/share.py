"Take finished folds from the other runs of a folder: same settings, images, folds and parents, so the same weights."
import os
import shutil
from collections.abc import Collection, Iterator
from copy import copy
from itertools import groupby
from pathlib import Path

from aptos_fastai.common.console import say
from aptos_fastai.common.io import AptosError, atomic_write, changed_message, file_hash, read_record, write_record
from aptos_fastai.pipeline.reasons import CHECKPOINT_RECORD, folds_text
from aptos_fastai.run_folder import FINISHED, WEIGHTS, Run


def with_shared(run: Run, stages: Collection[str]) -> Run:
    """Return the run with `shared`: the folds of `stages` that it lacks and another run beside it has finished.

    They are up to date as the run's own would be: by fingerprint, precision, initial weights and the weights of their
    parents, which come first. Those of a stage that an ensemble names by path are of that run and of no other, whose
    weights replace others. Nothing is copied.
    """
    run, named = copy(run), run.recipe.other_runs      # what it knows of its tables stays known
    run.shared = {}
    if not any('pixel_sha256' in frame for frame in run.frames.values()): return run     # no image is prepared yet
    folds = [(name, k) for name in run.recipe.order if name in stages for k in range(run.recipe.stages[name].folds)]
    lacking = {(name, k): run.fingerprint(name, k) for name, k in folds
               if name not in named and not _is_begun(run.fold_dir(name, k))}
    there = _finished_elsewhere(run.root, set(lacking.values())) if lacking else {}
    for name, k in folds:
        if name in named: found = [named[name] / f'fold{k}'] if not has_weights_of(run, name, k) else []
        else: found = there.get(lacking.get((name, k), ''), [])
        for folder in found:
            run.shared[name, k] = folder
            if run.finished(name, k): break
            del run.shared[name, k]
    return run


def has_weights_of(run: Run, name: str, fold: int) -> bool:
    "Return whether the weights of a stage that an ensemble names by path are those of the run that trained it"
    own, there = run.record(name, fold), read_record(run.recipe.other_runs[name] / f'fold{fold}' / FINISHED)
    return own is not None and there is not None and own['files'][WEIGHTS] == there['files'][WEIGHTS]


def _is_begun(folder: Path) -> bool:
    return any((folder / record).exists() for record in (FINISHED, CHECKPOINT_RECORD))


def _finished_elsewhere(root: Path, fingerprints: set[str]) -> dict[str, list[Path]]:
    "Return the folders of finished folds of the other runs beside `root`, by those of `fingerprints` that they have"
    found: dict[str, list[Path]] = {}
    for file in sorted(root.parent.glob(f'*/*/fold*/{FINISHED}')):
        if file.parents[2].name == root.name: continue
        try: fingerprint = (read_record(file) or {}).get('fingerprint', '')
        except AptosError: continue          # a damaged record of a run that this one does not need
        if fingerprint in fingerprints: found.setdefault(fingerprint, []).append(file.parent)
    return found


def take_shared(run: Run, stages: Collection[str]) -> Run:
    """Copy the folds of `stages` that other runs have finished into the run; return the run. Raises `AptosError`.

    A copy is a hard link where the disk allows it: files of a run are replaced, never changed. A fold whose files are
    not those of its record is left where it is, and trained here.
    """
    run = with_shared(run, stages)
    found, taken = dict(run.shared), {}
    run.shared.clear()
    for (name, k), folder in found.items():
        record, to = read_record(folder / FINISHED), run.fold_dir(name, k)
        assert record
        (to / FINISHED).unlink(missing_ok=True)                  # of an earlier member: finished again at the end
        for file in record['files']: _link_or_copy(folder / file, to / file)
        changed = [file for file, state in record['files'].items() if file_hash(to / file) != state['sha256']]
        if changed:
            say(changed_message(folder / changed[0], f'{name} fold {k} is not taken.'), 'yellow')
            for file in record['files']: (to / file).unlink(missing_ok=True)
            continue
        write_record(to / FINISHED, record)
        taken[name, k] = folder
    for line in shared_lines(taken): say(line)
    return run


def _link_or_copy(file: Path, to: Path) -> None:
    "Put a file of another run into this one"
    if to.exists() and to.samefile(file): return                 # linked before an interruption
    with atomic_write(to) as temporary:
        try: os.link(file, temporary)
        except OSError: shutil.copyfile(file, temporary)         # another disk, or one that knows no links


def shared_lines(taken: dict[tuple[str, int], Path]) -> Iterator[str]:
    "Yield what was taken from where, a line for each stage and run"
    for (name, stage_there), group in groupby(taken, key=lambda key: (key[0], taken[key].parent)):
        yield f'{name}: {folds_text([k for _, k in group])} from {stage_there}, trained with the same settings on ' \
              'the same images'
