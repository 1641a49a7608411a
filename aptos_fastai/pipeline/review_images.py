"The images of `review` and their heat maps: originals where they can be found, else prepared squares."
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from aptos_fastai.common.io import AptosError, read_record
from aptos_fastai.data.decode import ImageError
from aptos_fastai.data.locate import relative_files, without_suffix
from aptos_fastai.data.retina import Prep, prepare
from aptos_fastai.data.store import read_prepared, read_square, stored_path
from aptos_fastai.inference.explain import displayed, heatmap, overlay_heatmap
from aptos_fastai.inference.grader import Grader
from aptos_fastai.inference.model_spec import fold_model
from aptos_fastai.inference.training_images import RUN_IMAGES
from aptos_fastai.pipeline.review import Review, ReviewItem
from aptos_fastai.run_folder import FINISHED

LONGEST_SIDE = 3000                          # of a shown image, pixels


class ShownImage(NamedTuple):
    "An image as the page shows it"
    pixels: np.ndarray                       # uint8 RGB
    box: tuple[int, int, int, int]           # x0, x1, y0, y1 of the prepared square in it
    is_original: bool


class ReviewImages:
    """The images of a `Review`. Raises `AptosError` if the prepared images of the run are not beside it.

    An original is a file below the run's data folder with the id's name and the recorded size in bytes, and the
    recorded modification time or pixels. Heat maps come from the networks of the image's own fold, which have not seen
    it; a heat map is drawn in full colour whatever the score, so that it does not give the score away.
    """
    def __init__(self, review: Review):
        self.root, self.members = review.root, review.members
        model = fold_model(self.root, self.members, 0)
        self.prep, self.sides = model.prep, set(model.prepared.values())
        wanted = pd.DataFrame([(item.table, item.id_code) for item in review.items], columns=['source', 'id_code'])
        self.records = self._records(wanted)
        self.data = self._data_folder()
        self._graders: dict[int, Grader] = {}

    def _records(self, wanted: pd.DataFrame) -> dict[tuple[str, str], dict]:
        """Return (table, id) -> the image's row of prepared.csv, of its largest square.

        `path` is that square, `paths` are the squares by their sides, as far as they are in the store.
        """
        file = self.root / RUN_IMAGES
        if not file.is_file(): raise AptosError(f'{file}: no such file. Run `all` again.')
        images = pd.read_csv(file, dtype=str, keep_default_na=False)
        images = images.merge(wanted, on=['source', 'id_code'])
        of_side = {side: self._squares(images, replace(self.prep, size=side)) for side in self.sides}
        found = of_side[self.prep.size]
        for key, record in found.items():
            record['paths'] = {side: squares[key]['path'] for side, squares in of_side.items() if key in squares}
        if len(wanted) and not found:
            store = self.root.parent / 'prepared' / self.prep.name
            raise AptosError(f'{store}: the prepared images of the run are not there. Run `all` again, which prepares '
                             'them, or move the folder `prepared` beside the run folder.')
        return found

    def _squares(self, images: pd.DataFrame, prep: Prep) -> dict[tuple[str, str], dict]:
        "Return (table, id) -> the row of prepared.csv of an image prepared by `prep`, with the path of its square"
        found = {}
        for name, of_table in images.groupby('source'):
            for folder in sorted((self.root.parent / 'prepared' / prep.name).glob(f'{name}-*')):
                prepared = read_prepared(folder)
                if prepared is None: continue
                same = prepared.id_code.isin(of_table.id_code) & prepared.pixel_sha256.isin(of_table.pixel_sha256)
                for row in prepared[same].to_dict('records'):
                    path = stored_path(folder, row['id_code'], row['stored'], prep)
                    if path.is_file(): found[name, row['id_code']] = dict(row, path=path)
        return found

    def _data_folder(self) -> Path | None:
        "Return the folder of the run's tables; None if it is not there"
        record = read_record(self.root / 'run.json') or {}
        folder = (self.root / record.get('data', '')).resolve()
        return folder if record and folder.is_dir() else None

    @cached_property
    def originals(self) -> dict[str, list[Path]]:
        "The files below the data folder by the names of the wanted images"
        names = {name for _, id_code in self.records for name in _names(id_code)}
        found: dict[str, list[Path]] = {name: [] for name in names}
        if self.data is None: return found
        for file in relative_files(self.data):
            for name in _names(file) & names: found[name].append(self.data / file)
        return found

    def candidates(self, record: dict) -> list[Path]:
        "Return the files below the data folder with the name and the size in bytes of an image's original"
        files = {file for name in _names(record['id_code']) for file in self.originals[name]}
        return sorted(file for file in files if file.stat().st_size == record['bytes'])

    def original(self, record: dict) -> bytes | None:
        "Return the bytes of the file that an image was prepared from; None if it is not found"
        for file in self.candidates(record):
            data = file.read_bytes()
            if file.stat().st_mtime_ns == record['mtime'] or self._has_pixels(data, record): return data
        return None

    def _has_pixels(self, data: bytes, record: dict) -> bool:
        try: return prepare(data, self.prep)[1]['pixel_sha256'] == record['pixel_sha256']
        except ImageError: return False

    def record(self, item: ReviewItem) -> dict:
        "Return the row of prepared.csv of an image. Raises `AptosError` if it is not in the store"
        record = self.records.get((item.table, item.id_code))
        if record: return record
        raise AptosError('its prepared image is not in the store. Run `all` again, which prepares it.')

    def shown(self, item: ReviewItem) -> ShownImage:
        "Return the image of an item: the original, at most `LONGEST_SIDE` pixels long, or the prepared square"
        record = self.record(item)
        data = self.original(record)
        if data is None:
            side = self.prep.size
            return ShownImage(read_square(record['path'], self.prep, side), (0, side, 0, side), False)
        return ShownImage(*displayed(data, LONGEST_SIDE, record, self.prep), True)

    def heatmap(self, item: ReviewItem) -> np.ndarray:
        "Return the image of an item with its heat map. Raises `AptosError` if no networks of its fold were trained"
        shown, grader, paths = self.shown(item), self._grader(item.fold), self.record(item)['paths']
        missing = self.sides - set(paths)
        if missing:
            raise AptosError(f'no heat map: its prepared square of {min(missing)} px is not in the store. '
                             'Run `all` again, which prepares it.')
        squares = {size: read_square(paths[side], replace(self.prep, size=side), size)[None]
                   for size, side in grader.model.prepared.items()}
        return overlay_heatmap(shown.pixels, heatmap(grader, squares)[0], shown.box, 1.)

    def _grader(self, fold: int) -> Grader:
        "Return the networks of a fold"
        if fold not in self._graders:
            for stage in self.members:
                if (self.root / stage / f'fold{fold}' / FINISHED).is_file(): continue
                raise AptosError('no heat map: every trained network has seen this image (only the networks of its own '
                                 f'fold {fold} have not, and {stage} trains no such fold).')
            self._graders[fold] = Grader(fold_model(self.root, self.members, fold), self.root)
        return self._graders[fold]


def _names(path: str) -> set[str]:
    "Return the name of an image without its folders, with and without its suffix"
    name = path.replace('\\', '/').rpartition('/')[2]
    return {name, without_suffix(name)}
