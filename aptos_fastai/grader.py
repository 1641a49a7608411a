"A trained model for pictures of one's own: what it needs travels with it, and nothing but weights and numbers is loaded."
import csv
import glob
import io
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load

from aptos_fastai.config import Stage, parse_cuts
from aptos_fastai.console import Bars, say
from aptos_fastai.files import AptosError, digest, file_hash, read_record, write_bytes
from aptos_fastai.images import ImageError, Prep, prepare, square_of
from aptos_fastai.metrics import GRADE_NAMES, GRADES, HALF, REFERABLE, GradeSets, apply_cuts, fit_cuts
from aptos_fastai.model import body_stats, create_model, keep_freed_memory
from aptos_fastai.precision import has_bf16
from aptos_fastai.predict import views
from aptos_fastai.record import FINISHED, PREDS, WEIGHTS

FIXED = 8                                    # pictures at once in OpenVINO
SUFFIXES = {'.jpg', '.jpeg', '.png', '.tif', '.tiff', '.bmp', '.webp', '.dcm'}
COLUMNS = ['file', 'score', 'grade', 'grade_name', 'referable', 'spread', 'grade_low', 'grade_high', 'flags', 'error']


@dataclass(frozen=True)
class Member:
    "One network of a model: a fold of a stage"
    file: str                                # its weights (safetensors), inside the model's folder
    sha256: str
    arch: str
    head: str
    size: int                                # side of the square it sees, pixels
    tta: str
    mean: tuple[float, ...]                  # of the pictures, 0-1
    std: tuple[float, ...]
    weight: float                            # of its score in the mean; they add up to 1


@dataclass(frozen=True)
class Model:
    "What turns a photograph into a grade, but for the weights themselves"
    name: str
    prep: Prep
    members: tuple[Member, ...]
    cuts: tuple[float, ...]
    reach: tuple[float | None, ...]          # of `GradeSets`; None: no end
    coverage: float
    synthetic: bool

    @property
    def key(self) -> str: return digest(asdict(self))[:12]


def _member(root: Path, folder: Path, weight: float) -> tuple[Member, dict]:
    "A finished fold as a member, and its record"
    rec = read_record(folder / FINISHED)
    if not rec: raise AptosError(f'{folder}: holds no finished fold; run `all` or `train`')
    s = rec['settings']
    mean, std = body_stats(s['arch'])
    return Member(str((folder / WEIGHTS).relative_to(root)), rec['files'][WEIGHTS]['sha256'], s['arch'], s['head'], s['size'], s['tta'],
                  tuple(map(float, mean)), tuple(map(float, std)), weight), rec


def _model(root: Path, name: str, stages: dict[str, float], cuts, reach, coverage: float) -> Model:
    "The mean over `stages` (folder -> weight) and their folds"
    found = []
    for s, w in stages.items():
        folds = sorted((root / s).glob('fold*'), key=lambda p: int(p.name[4:]))
        found += [_member(root, f, w / len(folds)) for f in folds]
    if not found: raise AptosError(f'{root}: holds no finished fold; run `all` or `train`')
    preps = {digest(r['prep']): r['prep'] for _, r in found}
    if len(preps) > 1: raise AptosError(f'{root}: its stages were trained on pictures prepared in {len(preps)} ways; run `all` again')
    return Model(name, Prep(**found[0][1]['prep']), tuple(m for m, _ in found), tuple(map(float, cuts)),
                 tuple(None if not np.isfinite(r) else float(r) for r in reach), coverage, found[0][1]['synthetic'])


def read_model(path: str | Path) -> tuple[Model, Path]:
    """The model of a bundle (`export`), a run folder <runs>/<recipe> (its final answer) or a stage's folder (the mean of its folds), and the folder
    its weights are relative to. Raises `AptosError` where `path` is none of them."""
    root = Path(path)
    bundle, summary = (read_record(root / f) for f in ('bundle.json', 'summary.json'))
    if bundle:
        o = bundle['model']
        return Model(**{**o, 'prep': Prep(**o['prep']), 'members': tuple(Member(**m) for m in o['members'])}), root
    if summary:
        s = summary['submission']
        if 'weights' not in s: raise AptosError(f'{root / "summary.json"}: was written by an older version; run `all` again')
        reach = [np.inf if r is None else r for r in s['reach']]
        model = _model(root, f'{summary["recipe"]}/{s["node"]}', s['members'], s['cuts'], reach, s['coverage'])
        if {str(Path(m.file).parent): m.sha256 for m in model.members} != s['weights']:
            raise AptosError(f'{root}: was trained anew since its answers were made; run `all` again, its cuts belong to the old weights')
        return model, root
    if (root / 'fold0' / FINISHED).is_file():
        how, coverage = read_record(root / 'fold0' / FINISHED)['settings']['cuts'], .9
        o = pd.concat([_preds(f) for f in sorted(root.glob(f'fold*/{PREDS}'))])
        cuts = parse_cuts(how) or fit_cuts(how, o.score, o.diagnosis)
        reach = GradeSets(coverage).fit(o.score, o.diagnosis).reach_
        return _model(root.parent, f'{root.parent.name}/{root.name}', {root.name: 1.}, cuts, reach, coverage), root.parent
    raise AptosError(f'{root}: is no model; name a bundle (bundle.json), a finished run (<runs>/<recipe>) or a stage\'s folder in it')


def _preds(file: Path) -> pd.DataFrame:
    "Validation scores of a finished fold, their hash as recorded"
    rec = read_record(file.parent / FINISHED)
    if not rec or file_hash(file) != rec['files'][PREDS]['sha256']: raise AptosError(f'{file}: is not what was written (its hash differs); train again')
    return pd.read_csv(file)


def read_net(member: Member, root: Path) -> torch.nn.Module:
    "The network of a member, its weights checked by their hash. Raises `AptosError`"
    file = root / member.file
    if not file.resolve().is_relative_to(root.resolve()): raise AptosError(f'{member.file}: lies outside {root}; this bundle is not to be trusted')
    if not file.is_file(): raise AptosError(f'{file}: is gone; export or train again')
    if file_hash(file) != member.sha256: raise AptosError(f'{file}: is not what was written (its hash differs); export or train again')
    net = create_model(Stage(member.file, ('',), arch=member.arch, head=member.head, size=member.size))
    net.load_state_dict(load(file.read_bytes()))
    return net.eval().to(memory_format=torch.channels_last)


def fold_model(root: Path, stages: dict[str, float], fold: int) -> Model:
    "The networks of one fold of `stages` (folder -> weight) with a single view and no cuts of their own, as a validated picture met them"
    found = [_member(root, root / s / f'fold{fold}', w) for s, w in stages.items()]
    rec = found[0][1]
    return Model(f'fold{fold}', Prep(**rec['prep']), tuple(replace(m, tta='none') for m, _ in found), HALF, (None,) * GRADES, .9, rec['synthetic'])


def torch_runner(grader: 'Grader', member: Member, precision: str) -> Callable[[np.ndarray], np.ndarray]:
    "Squares (n, side, side, 3) uint8 -> scores (views, n) by PyTorch"
    net = next(n for m, n in grader.nets if m is member)

    @torch.no_grad()
    def run(squares):
        with torch.autocast(grader.device.type, torch.bfloat16, enabled=precision == 'bf16'):
            return torch.stack([net(v).float().flatten() for v in views(grader.tensor(member, squares), member.tta)]).double().cpu().numpy()
    return run


def _by_onnx(grader: 'Grader', member: Member, package: str, get_run: Callable) -> Callable[[np.ndarray], np.ndarray]:
    "The same by a runtime that reads the bundle's ONNX; `get_run` gives (squares) -> scores of a file"
    file = (grader.root / member.file).with_suffix('.onnx')
    if not file.is_file(): raise AptosError(f'{file}: is not there; only a bundle has ONNX: run `export` and name its folder')
    if file_hash(file) != read_record(grader.root / 'bundle.json')['files'].get(file.name):
        raise AptosError(f'{file}: is not what was written (its hash differs); export again')
    try: one = get_run(file)
    except ImportError: raise AptosError(f'{package} is needed for this backend: pip install {package}') from None

    def run(squares):
        x = torch.from_numpy(squares).permute(0, 3, 1, 2)
        return np.stack([one(np.ascontiguousarray(v.permute(0, 2, 3, 1).numpy())) for v in views(x, member.tta)]).astype(float)
    return run


def onnx_runner(grader: 'Grader', member: Member, precision: str):
    "Squares (n, side, side, 3) uint8 -> scores (views, n) by ONNX Runtime"
    if precision != 'f32': raise AptosError(f'backend onnx with precision {precision}: ONNX Runtime computes in f32 on the CPU; choose openvino or f32')

    def get(file):
        import onnxruntime
        session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
        return lambda x: session.run(None, {'squares': x})[0]
    return _by_onnx(grader, member, 'onnxruntime', get)


def openvino_runner(grader: 'Grader', member: Member, precision: str):
    "Squares (n, side, side, 3) uint8 -> scores (views, n) by OpenVINO"
    def get(file):
        import openvino
        core = openvino.Core()
        net = core.read_model(str(file))
        net.reshape([FIXED, member.size, member.size, 3])                    # a tenth faster than any number of pictures
        net = core.compile_model(net, 'CPU', dict(INFERENCE_PRECISION_HINT=precision, PERFORMANCE_HINT='LATENCY'))

        def one(x):
            more = np.concatenate([x, np.zeros((-len(x) % FIXED, *x.shape[1:]), x.dtype)])
            return np.concatenate([net([p])[0] for p in np.split(more, len(more) // FIXED)])[:len(x)]
        return one
    return _by_onnx(grader, member, 'openvino', get)


def _check_parity(root: Path, backend: str, precision: str):
    "Refuses what `export` found to differ too much"
    for o in (read_record(root / 'bundle.json') or {}).get('parity', []):
        if (o['backend'], o['precision']) == (backend, precision) and not o['fine']:
            changed = f'{o["grades_changed"]} of {o["pictures"]} grades'
            raise AptosError(f'{root}: {backend} {precision} changes scores by up to {o["max_difference"]:.2f} and {changed}; use f32')


BACKENDS = dict(torch=torch_runner, onnx=onnx_runner, openvino=openvino_runner)      # to add one: a function here


class Grader:
    """Grades photographs as the run did that trained it: `load_grader(path).predict(files)`.

    Retina crop, sizes, normalisation, views, cuts and sets of grades come with the model. Answers on the GPU where there is one.
    """
    def __init__(self, model: Model, root: Path, backend: str = 'torch', precision: str = 'f32'):
        if backend not in BACKENDS: raise AptosError(f'backend {backend}: there is no such; accepted: {", ".join(BACKENDS)}')
        if precision not in ('f32', 'bf16'): raise AptosError(f'precision {precision}: accepted: f32, bf16')
        _check_parity(root, backend, precision)
        if precision == 'bf16' and not has_bf16(): say('bf16: this machine has none: PyTorch is slower in it than in f32, OpenVINO answers in f32', 'yellow')
        keep_freed_memory()
        self.model, self.root, self.device = model, root, torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        self.runners = [(m, BACKENDS[backend](self, m, precision)) for m in model.members]
        self.sets = GradeSets(model.coverage)
        self.sets.reach_ = np.array([np.inf if r is None else r for r in model.reach])

    @cached_property
    def nets(self) -> list[tuple[Member, torch.nn.Module]]:
        "The members with their networks in PyTorch"
        return [(m, read_net(m, self.root).to(self.device)) for m in self.model.members]

    def __repr__(self): return f'Grader({self.model.name}, {len(self.runners)} networks, cuts {" ".join(f"{c:.2f}" for c in self.model.cuts)})'

    def tensor(self, member: Member, squares: np.ndarray) -> torch.Tensor:
        "(n, side, side, 3) uint8 -> (n, 3, side, side) as the network of `member` takes it"
        x = torch.from_numpy(squares).to(self.device).permute(0, 3, 1, 2).float().div_(255)
        return ((x - x.new_tensor(member.mean)[:, None, None]) / x.new_tensor(member.std)[:, None, None]).contiguous(memory_format=torch.channels_last)

    def scores(self, squares: dict[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        "Score and spread (n,) of prepared squares: side -> (n, side, side, 3) uint8"
        mean, square = 0., 0.
        for m, run in self.runners:
            s = run(squares[m.size])
            mean, square = mean + m.weight * s.mean(0), square + m.weight * (s ** 2).mean(0)
        return mean, np.sqrt(np.maximum(square - mean ** 2, 0))

    def read(self, file: str | Path) -> tuple[dict[int, np.ndarray] | None, dict]:
        "The squares of a photograph by side, None where it cannot be read, and what is known of it: flags, error and the circle"
        try: return self.prepared(Path(file).read_bytes())
        except OSError as e: return None, dict(flags='', error=f'cannot be read ({e.strerror})')

    def prepared(self, data: bytes) -> tuple[dict[int, np.ndarray] | None, dict]:
        "`read` of a file's bytes"
        try: jpeg, info = prepare(data, self.model.prep)
        except ImageError as e: return None, dict(flags='', error=str(e))
        return {n: square_of(jpeg, self.model.prep, n) for n in {m.size for m in self.model.members}}, dict(info, error='')

    def grade(self, names: list[str], got: list[tuple[dict | None, dict]]) -> pd.DataFrame:
        "Rows (`COLUMNS`) of what `read` gave"
        df = pd.DataFrame(dict(file=names, flags=[i['flags'] for _, i in got], error=[i['error'] for _, i in got])).reindex(columns=COLUMNS)
        fine = np.array([s is not None for s, _ in got])
        if fine.any():
            squares = [s for s, _ in got if s is not None]
            score, spread = self.scores({n: np.stack([s[n] for s in squares]) for n in squares[0]})
            given = apply_cuts(score, self.model.cuts)
            low, high = self.sets.predict(score, given)
            for c, v in dict(score=score, spread=spread, grade=given, grade_low=low, grade_high=high).items(): df.loc[fine, c] = v
        whole = ['grade', 'grade_low', 'grade_high']
        df[whole] = df[whole].astype('Int64')
        df['grade_name'] = [GRADE_NAMES[g] if ok else '' for g, ok in zip(df.grade, fine, strict=True)]
        df['referable'] = [('yes' if g >= REFERABLE else 'no') if ok else '' for g, ok in zip(df.grade, fine, strict=True)]
        return df

    def stream(self, files: Iterable[str | Path], batch: int = 16) -> Iterator[pd.DataFrame]:
        "Frames of `batch` rows in the order of `files`; the next pictures are read while these are graded, and no more than that is held"
        it = map(str, files)
        with ThreadPoolExecutor() as pool:
            def begin(): return [(f, pool.submit(self.read, f)) for f in islice(it, batch)]
            now = begin()
            while now:
                after = begin()
                yield self.grade([f for f, _ in now], [r.result() for _, r in now])
                now = after

    def predict(self, files: Iterable[str | Path] | str | Path) -> pd.DataFrame:
        "A row for each photograph: file, score, grade, grade_name, referable, spread, grade_low, grade_high, flags, error (empty: read)"
        parts = list(self.stream([files] if isinstance(files, (str, Path)) else files))
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=COLUMNS)


def load_grader(path: str | Path, backend: str = 'torch', precision: str = 'f32') -> Grader:
    """The `Grader` of a bundle, a run folder or a stage's folder. Loads no pickle. Raises `AptosError`.

    `backend`: torch, or for a bundle onnx or openvino; `precision`: f32 as trained, or bf16, faster on CPUs that know it (export says what it changes).
    """
    return Grader(*read_model(path), backend, precision)


def find_pictures(given: Iterable[str]) -> list[str]:
    """The photographs that files, folders (with their sub-folders), globs and CSVs name. A CSV names them in its column file, path, image or id_code,
    beside itself or in one folder below. Raises `AptosError` where something names none."""
    out = []
    for o in given:
        p = Path(o)
        found = ([str(f) for f in sorted(p.rglob('*')) if f.suffix.lower() in SUFFIXES] if p.is_dir() else _of_csv(p) if p.suffix.lower() == '.csv'
                 else [o] if p.is_file() else sorted(glob.glob(o, recursive=True)))
        if not found: raise AptosError(f'{o}: names no picture; give files, folders, a glob in quotes or a CSV')
        out += found
    return list(dict.fromkeys(out))


def _of_csv(table: Path) -> list[str]:
    try: df = pd.read_csv(table, dtype=str, keep_default_na=False)
    except FileNotFoundError: raise AptosError(f'{table}: no such file') from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as e: raise AptosError(f'{table}: is no readable CSV ({e})') from None
    col = next((c for c in ('file', 'path', 'image', 'id_code') if c in df), None)
    if not col: raise AptosError(f'{table}: has no column file, path, image or id_code; it has {", ".join(df.columns)}')
    by_stem = {f.stem: str(f) for f in sorted(table.parent.glob('**/*')) if f.suffix.lower() in SUFFIXES}
    inside = table.parent.resolve()

    def place(o: str) -> str | None:
        p = table.parent / o
        if p.is_file(): return str(p) if p.resolve().is_relative_to(inside) else None
        return by_stem.get(p.name) or by_stem.get(p.stem)
    at = [place(o) for o in df[col]]
    lost = [o for o, a in zip(df[col], at, strict=True) if a is None]
    if lost: raise AptosError(f'{table}: {len(lost)} of {len(df)} have no picture beside it or in a folder below: {", ".join(lost[:5])}')
    return at


def grade_files(model: str, given: Iterable[str], output: str, backend: str, precision: str):
    """`predict MODEL PICTURES`: rows are written as they come beside `output`, which appears when all are there; an interrupted run goes on.

    Raises `AptosError` at the end where pictures could not be read; their rows say why.
    """
    files, grader, out = find_pictures(given), load_grader(model, backend, precision), Path(output)
    if not out.parent.is_dir(): raise AptosError(f'{out.parent}: no such folder; make it or choose another with -o')
    part = out.with_name(f'.{out.name}.{grader.model.key}-{backend}-{precision}.part')
    done = _begun(part, files)
    if done: say(f'{done} of {len(files)} pictures were graded before; going on')
    with Bars() as bars, bars(f'grading by {grader.model.name}', len(files), 'pictures') as bar, open(part, 'a', encoding='utf-8') as f:
        if not done: f.write(','.join(COLUMNS) + '\n')
        for df in grader.stream(files[done:]):
            f.write(df.to_csv(index=False, header=False, lineterminator='\n', float_format='%.4f')); f.flush()
            done += len(df)
            bar.to(done)
    os.replace(part, out)
    df = pd.read_csv(out, usecols=['file', 'error'], dtype=str, keep_default_na=False)
    bad = df[df.error != '']
    say(f'{len(df) - len(bad)} pictures graded by {grader.model.name} -> {out}')
    if grader.model.synthetic: say('This model was trained on SYNTHETIC pictures: its grades say nothing about eyes', 'yellow')
    if len(bad):
        first = '; '.join(f'{f} {e}' for f, e in bad.head(3).itertuples(index=False))
        raise AptosError(f'{len(bad)} of {len(df)} pictures could not be graded: {first}; all rows with an error in {out} say why')


def _begun(part: Path, files: list[str]) -> int:
    "How many of the first files stand in `part` whole; what else is in it is cut off"
    if not part.is_file(): return 0
    text = part.read_text(encoding='utf-8')
    try: rows = list(csv.reader(io.StringIO(text[:text.rfind('\n') + 1])))
    except csv.Error: rows = []
    done = [r[0] for r in rows[1:] if len(r) == len(COLUMNS)]
    if rows[:1] != [COLUMNS] or done != files[:len(done)] or len(done) != len(rows) - 1: done = []
    write_bytes(part, text[:text.rfind('\n') + 1].encode() if done else b'')
    return len(done)
