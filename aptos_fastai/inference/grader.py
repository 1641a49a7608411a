"Grade fundus images with a trained model: weights and numbers are loaded, never a pickle."
import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from aptos_fastai.common.console import plural
from aptos_fastai.common.distributed import cores
from aptos_fastai.common.io import AptosError
from aptos_fastai.data.decode import MAX_PIXELS, ImageError
from aptos_fastai.data.retina import prepare_sizes
from aptos_fastai.decisions import DECISION_COLUMNS, P_COLUMNS, UNGRADABLE, without_ungradable
from aptos_fastai.inference.backends import BACKENDS, check_backend
from aptos_fastai.inference.find_images import ImageEntry
from aptos_fastai.inference.model_spec import MemberSpec, ModelSpec, read_distance, read_model, read_net
from aptos_fastai.inference.views import mean_and_sd
from aptos_fastai.metrics import GRADE_NAMES, grade_scores
from aptos_fastai.training.model import keep_freed_memory

COLUMNS = ['file', 'score', 'grade', 'grade_name', *DECISION_COLUMNS, *P_COLUMNS, 'ungradable', 'score_sd', 'grade_low',
           'grade_high', 'flags', 'image_sha256', 'error']

NOT_READ = dict(flags='', image_sha256='', error='')     # what is known of an image that cannot be read

Squares = dict[int, np.ndarray]              # the prepared square of an image (or of a batch) for each side in pixels
Prepared = tuple[Squares | None, dict]       # None for an unreadable image; `prepare`'s record, with flags and error


class Grader:
    """Grade images as the run did that trained the model: `load_grader(path).predict(files)`.

    Retina crop, sizes, normalisation, views, thresholds, prediction sets and the gate come with the model. What the
    gate refuses gets no grade. It runs on the GPU if there is one. Raises `AptosError` for weights that are missing or
    changed. `prevalence` of referable images re-weights the probabilities; without it that of the model counts.
    """
    def __init__(self, model: ModelSpec, root: Path, backend: str = 'torch', precision: str = 'f32',
                 prevalence: float | None = None):
        check_backend(root, backend, precision)
        if prevalence is not None and not 0 < prevalence < 1:
            raise AptosError(f'prevalence {prevalence:g}: enter a number between 0 and 1, for example 0.1.')
        keep_freed_memory()
        self.model, self.root = model, root
        self.backend, self.precision = backend, precision
        self.prevalence = prevalence or model.decision.prevalence
        self.device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        self.prediction_sets = model.prediction_sets
        self._nets: dict[str, torch.nn.Module] = {}
        get_runner = BACKENDS[backend]
        self.runners = [(m, get_runner(m, root, self.device, precision, partial(self.net, m))) for m in model.members]
        judges_distance = model.gate.limit is not None
        self.feature_distances = {m.file: read_distance(m, root) for m in model.members} if judges_distance else {}

    def net(self, member: MemberSpec) -> torch.nn.Module:
        "Return the PyTorch network of a member; it is read once"
        if member.file not in self._nets: self._nets[member.file] = read_net(member, self.root).to(self.device)
        return self._nets[member.file]

    def __repr__(self):
        thresholds = ' '.join(f'{t:.2f}' for t in self.model.thresholds)
        return f'Grader({self.model.name}, {plural(len(self.runners), "network")}, thresholds {thresholds})'

    def scores(self, squares: Squares) -> tuple[np.ndarray, np.ndarray]:
        "Return the scores and their SD (n,) of prepared squares: side -> (n, side, side, 3) uint8 RGB"
        return mean_and_sd(self.member_scores(squares))

    def member_scores(self, squares: Squares) -> list[tuple[float, np.ndarray, np.ndarray]]:
        "Return the weight of each network, its scores and their SD over views (n,)"
        return self.scores_and_distances(squares)[0]

    def scores_and_distances(self, squares: Squares) -> tuple[list[tuple[float, np.ndarray, np.ndarray]], np.ndarray]:
        """Return what `member_scores` returns and the weighted mean of the networks' feature distances (n,).

        The distances are in units of the networks' own limits; 0 if the gate does not judge them.
        """
        parts, distance = [], np.zeros(len(next(iter(squares.values()))))
        for member, run in self.runners:
            scores, features = run(squares[member.size])
            parts.append((member.weight, scores.mean(1), scores.std(1)))
            if not self.feature_distances: continue
            own = self.feature_distances[member.file].distances(features)
            distance += member.weight * own / member.distance_unit
        return parts, distance

    def read(self, file: str | Path | ImageEntry) -> Prepared:
        "Read and prepare an image file; an unreadable or missing one gives None and its error"
        if isinstance(file, ImageEntry):
            if file.path is None: return None, dict(NOT_READ, error=file.error)
            file = file.path
        try: data = Path(file).read_bytes()
        except OSError as e: return None, dict(NOT_READ, error=f'cannot be read ({e.strerror})')
        return self.prepare(data)

    def prepare(self, data: bytes, max_pixels: int = MAX_PIXELS) -> Prepared:
        "Prepare the bytes of an image file, as `read` does; an image of more than `max_pixels` gives its error"
        sha256 = hashlib.sha256(data).hexdigest()
        sides = set(self.model.prepared.values())
        try: jpegs, info = prepare_sizes(data, self.model.prep, sides, max_pixels)
        except ImageError as e: return None, dict(NOT_READ, image_sha256=sha256, error=str(e))
        return self.model.squares(jpegs), dict(info, image_sha256=sha256, error='')

    def grade(self, names: list[str], images: list[Prepared]) -> pd.DataFrame:
        "Return a row (`COLUMNS`) for each image that `read` or `prepare` gave"
        read = {key: [info[key] for _, info in images] for key in NOT_READ}
        df = pd.DataFrame(dict(file=names, **read)).reindex(columns=COLUMNS)
        df[list(DECISION_COLUMNS)] = ''
        readable = [squares for squares, _ in images if squares is not None]
        ok = np.array([squares is not None for squares, _ in images])
        df['ungradable'] = ''
        if readable:
            parts, distance = self.scores_and_distances(
                {side: np.stack([o[side] for o in readable]) for side in readable[0]})
            score, score_sd = mean_and_sd(parts)
            fold_scores = self.model.fold_scores([mean for _, mean, _ in parts])
            grade, low, high = grade_scores(score, self.model.thresholds, self.prediction_sets, fold_scores)
            values = dict(score=score, score_sd=score_sd, grade=grade, grade_low=low, grade_high=high,
                          **self.model.decision.decide(score, grade, high, self.prevalence))
            for column, value in values.items(): df.loc[ok, column] = value
            found = [info for squares, info in images if squares is not None]
            df.loc[ok, 'ungradable'] = ['; '.join(self.model.gate.reasons(*of_image))
                                        for of_image in zip(found, distance, score, strict=True)]
        integers = ['grade', 'grade_low', 'grade_high']
        df[integers] = df[integers].astype('Int64')
        ungradable = df.ungradable != ''
        df.loc[ungradable, integers] = pd.NA
        df['grade_name'] = ['' if pd.isna(g) else GRADE_NAMES[g] for g in df.grade]
        df.loc[ungradable, 'grade_name'] = UNGRADABLE
        return without_ungradable(df, ungradable)

    def stream(self, files: Iterable[str | Path | ImageEntry], batch: int = 16) -> Iterator[pd.DataFrame]:
        "Yield the rows of `batch` images at a time, in the order of `files`"
        for names, images in self.read_batches(files, batch): yield self.grade(names, images)

    def read_batches(self, files: Iterable[str | Path | ImageEntry],
                     batch: int = 16) -> Iterator[tuple[list[str], list[Prepared]]]:
        """Yield the names of `batch` images at a time and what `read` gives, in the order of `files`.

        While the caller grades one batch, threads read the next one; no more images are in memory.
        """
        remaining = iter(files)
        with ThreadPoolExecutor(reader_threads()) as pool:
            def start_reading(): return [(str(file), pool.submit(self.read, file)) for file in islice(remaining, batch)]
            current = start_reading()
            while current:
                following = start_reading()
                yield [name for name, _ in current], [job.result() for _, job in current]
                current = following

    def predict(self, files: Iterable[str | Path] | str | Path) -> pd.DataFrame:
        """Return a row (`COLUMNS`) for each image file; an unreadable or missing one has its `error` and no grade.

        `files` are paths; of a folder, glob or CSV give `find_images([path])`. Raises `AptosError` for a folder.
        """
        files = [files] if isinstance(files, str | Path) else list(files)
        for file in files:
            if not isinstance(file, ImageEntry) and Path(file).is_dir():
                raise AptosError(f'{file}: a folder. Give its images: find_images(["{file}"]).')
        parts = list(self.stream(files))
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=COLUMNS)


def reader_threads() -> int:
    "Return how many images are decoded at once; each takes up to 1 GB (`MAX_PIXELS`)"
    return min(4, cores())


def load_grader(path: str | Path, backend: str = 'torch', precision: str = 'f32',
                prevalence: float | None = None) -> Grader:
    """Return the `Grader` of a bundle, a run folder or the folder of a stage. Loads no pickle. Raises `AptosError`.

    `backend`: torch, or for a bundle onnx or openvino. `precision`: f32; bf16, which is faster on processors that
    support it; or on a GPU fp16. `export` reports how much it changes scores. `prevalence` of referable images where
    the model is used re-weights the probabilities.
    """
    model, root = read_model(path)
    return Grader(model, root, backend, precision, prevalence)
