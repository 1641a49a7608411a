"A trained model for images of one's own: what it needs travels with it, and nothing but weights and numbers is loaded."
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from aptos_fastai.common.console import say
from aptos_fastai.common.io import AptosError
from aptos_fastai.data.decode import ImageError
from aptos_fastai.data.retina import prepare, square_of
from aptos_fastai.inference.backends import BACKENDS, check_parity
from aptos_fastai.inference.model_spec import MemberSpec, ModelSpec, read_model, read_net
from aptos_fastai.metrics import GRADE_NAMES, REFERABLE, PredictionSets, apply_thresholds
from aptos_fastai.training.model import keep_freed_memory
from aptos_fastai.training.precision import has_bf16

COLUMNS = ['file', 'score', 'grade', 'grade_name', 'referable', 'score_sd', 'grade_low', 'grade_high', 'flags', 'error']


class Grader:
    """Grades images as the run did that trained it: `load_grader(path).predict(files)`.

    Retina crop, sizes, normalisation, views, thresholds and prediction sets come with the model. Answers on the GPU where there is one.
    """
    def __init__(self, model: ModelSpec, root: Path, backend: str = 'torch', precision: str = 'f32'):
        if backend not in BACKENDS: raise AptosError(f'backend {backend}: there is no such; accepted: {", ".join(BACKENDS)}')
        if precision not in ('f32', 'bf16'): raise AptosError(f'precision {precision}: accepted: f32, bf16')
        check_parity(root, backend, precision)
        if precision == 'bf16' and not has_bf16(): say('bf16: this machine has none: PyTorch is slower in it than in f32, OpenVINO answers in f32', 'yellow')
        keep_freed_memory()
        self.model, self.root, self.device = model, root, torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        self.runners = [(m, BACKENDS[backend](self, m, precision)) for m in model.members]
        self.sets = PredictionSets(model.coverage)
        self.sets.radius_ = np.array([np.inf if r is None else r for r in model.radius])

    @cached_property
    def nets(self) -> list[tuple[MemberSpec, torch.nn.Module]]:
        "The members with their networks in PyTorch"
        return [(m, read_net(m, self.root).to(self.device)) for m in self.model.members]

    def __repr__(self): return f'Grader({self.model.name}, {len(self.runners)} networks, thresholds {" ".join(f"{c:.2f}" for c in self.model.thresholds)})'

    def tensor(self, member: MemberSpec, squares: np.ndarray) -> torch.Tensor:
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
        "The squares of an image by side, None where it cannot be read, and what is known of it: flags, error and the circle"
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
            given = apply_thresholds(score, self.model.thresholds)
            low, high = self.sets.predict(score, given)
            for c, v in dict(score=score, score_sd=spread, grade=given, grade_low=low, grade_high=high).items(): df.loc[fine, c] = v
        whole = ['grade', 'grade_low', 'grade_high']
        df[whole] = df[whole].astype('Int64')
        df['grade_name'] = [GRADE_NAMES[g] if ok else '' for g, ok in zip(df.grade, fine, strict=True)]
        df['referable'] = [('yes' if g >= REFERABLE else 'no') if ok else '' for g, ok in zip(df.grade, fine, strict=True)]
        return df

    def stream(self, files: Iterable[str | Path], batch: int = 16) -> Iterator[pd.DataFrame]:
        "Frames of `batch` rows in the order of `files`; the next images are read while these are graded, and no more than that is held"
        it = map(str, files)
        with ThreadPoolExecutor() as pool:
            def begin(): return [(f, pool.submit(self.read, f)) for f in islice(it, batch)]
            now = begin()
            while now:
                after = begin()
                yield self.grade([f for f, _ in now], [r.result() for _, r in now])
                now = after

    def predict(self, files: Iterable[str | Path] | str | Path) -> pd.DataFrame:
        "A row for each image: file, score, grade, grade_name, referable, spread, grade_low, grade_high, flags, error (empty: read)"
        parts = list(self.stream([files] if isinstance(files, (str, Path)) else files))
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=COLUMNS)


def load_grader(path: str | Path, backend: str = 'torch', precision: str = 'f32') -> Grader:
    """The `Grader` of a bundle, a run folder or a stage's folder. Loads no pickle. Raises `AptosError`.

    `backend`: torch, or for a bundle onnx or openvino; `precision`: f32 as trained, or bf16, faster on CPUs that know it (export says what it changes).
    """
    return Grader(*read_model(path), backend, precision)
