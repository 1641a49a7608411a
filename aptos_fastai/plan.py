"What `all` would do, and roughly how long and how large; trains nothing."
from dataclasses import dataclass

from aptos_fastai.config import Stage
from aptos_fastai.console import ago, say, table
from aptos_fastai.pipeline import answers_finished, check_run
from aptos_fastai.ranks import cores
from aptos_fastai.record import Run
from aptos_fastai.summary import tables_text

BYTES_PER_PIXEL = .28                        # of a stored JPEG: 74 kB at 512 px, quality 95, 4:4:4 (measured on IDRiD)
CHECKPOINT = 5.                              # times what a stage leaves: weights, best weights, two moments, twice while one replaces the other
PREPARE_SECONDS = .03                        # an original of 12 megapixels, one core (benchmarks/images.py)


def measured_step(s: Stage, measured: dict) -> tuple[float, float, int]:
    "Seconds a picture of a training step as it would be trained, and of a forward pass; parameters"
    from aptos_fastai.precision import precisions, step_seconds
    key = s.arch, s.size, s.precision
    if key not in measured: measured[key] = step_seconds(s, precisions(s), rounds=1)
    steps, look, params = measured[key]
    return min(steps.values()), look, params


def stage_cost(run: Run, name: str, folds: list[int], measured: dict) -> tuple[int, int, float, float]:
    "(training pictures, validation pictures, seconds, bytes) of training the folds of a stage"
    s = run.recipe.stages[name]
    step, look, params = measured_step(s, measured)
    train = sum(len(run.frames[t]) if teacher else int((run.frames[t].fold != folds[0]).sum()) for teacher, t in s.sources)
    valid = sum(int((run.frames[t].fold == folds[0]).sum()) for teacher, t in s.sources if not teacher)
    seen = dict(none=1, hflip=2, d4=8)[s.tta] * valid + (s.epochs + s.freeze_epochs) * valid
    return train, valid, len(folds) * ((s.epochs + s.freeze_epochs) * train * step + seen * look), len(folds) * params * 8.


@dataclass
class Costs:
    "What `all` would still do: a row a node for the table, seconds, bytes on disk, pictures to prepare"
    rows: list[list]
    seconds: float
    disk: float
    new: int


def costs(run: Run, todo: dict[str, list[int]]) -> Costs:
    "Of the folds in `todo`, by one timed step of each network on this machine"
    r, measured = run.recipe, {}
    rows, seconds, disk, most = [], 0., 0., 0.
    for n in r.order:
        s = r.stages.get(n)
        if s is None: rows.append([n, 'mean of ' + ', '.join(r.members(n)), '', '', '', '']); continue
        ks = todo.get(n, [])
        train, valid, t, b = stage_cost(run, n, ks or [0], measured)
        if ks: seconds, disk, most = seconds + t, disk + b, max(most, CHECKPOINT * b / len(ks))
        start = s.init or dict(none='random').get(s.weights, s.weights) + ' weights'
        rows.append([n, f'{start}; {tables_text(s)}', f'{s.arch} {s.size} px', f'{train}+{valid}',
                     f'{s.folds} x {s.freeze_epochs + s.epochs}', f'about {ago(t)}' if ks else 'finished'])
    new = sum(len(f) for f in run.frames.values() if 'pixels' not in f)
    disk += most + new * r.store_size ** 2 * BYTES_PER_PIXEL
    return Costs(rows, seconds + new * PREPARE_SECONDS / cores(), disk, new)


def show_plan(run: Run):
    "The graph as a table: what stands, what would run, on what, for how long"
    r, todo = run.recipe, run.todo()
    if todo: check_run(run, todo)
    o = costs(run, todo)
    title = f'{r.path} on {run.data}' + (' (SYNTHETIC demo)' if r.demo else '')
    table(title, ['stage', 'starts from; trains on', 'network', 'pictures', 'epochs', 'to do'], o.rows,
          right=('pictures', 'epochs'), wrap=('starts from; trains on', 'network', 'to do'))
    tabs = ', '.join(f'{n} {len(f)}' for n, f in run.frames.items())
    say(f'tables: {tabs}. To prepare: {o.new} pictures at {r.store_size} px.')
    if not todo and answers_finished(run): return say('Everything is done already: `all` would do nothing.')
    say(f'{r.submit.final} answers {r.submit.table}: {run.root / "submission.csv"}')
    say(f'about {ago(o.seconds)} (one step of each network timed on this machine just now) and {o.disk / 1e9:.2f} GB on disk')
