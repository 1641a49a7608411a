"Which images a model was trained or tuned on, and which images of a table are among them. Imports no torch."
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from aptos_fastai.common.io import AptosError, file_hash, read_record, verify_file, write_bytes
from aptos_fastai.data.duplicates import known_bits, near_known
from aptos_fastai.data.spreadsheet import first_few
from aptos_fastai.run_folder import FINISHED, WEIGHTS

if TYPE_CHECKING:
    from aptos_fastai.inference.model_spec import ModelSpec

RUN_IMAGES = 'images.csv'                    # of a run: the hashes of all images of its tables
BUNDLE_IMAGES = 'training_images.csv'        # of a bundle: the hashes of the images that its model was trained on
HASHES = ['pixel_sha256', 'perceptual_hash']
IDENTICAL, NEAR_COPY = 'identical', 'near copy'
OLD = 'it cannot be known which images the model was trained on: {} is missing, because an older version wrote it. {}'
FOREIGN_WEIGHTS = '{} starts from the weights {}: it cannot be known which images these were trained on'
FEWER = ('{} lists fewer images than {} was trained on, because the tables were changed since: removed images are not '
         'recognised. Run `all` again')

Known = tuple[pd.DataFrame | None, str]      # the hashes of the images, None: unknown; and what is not known of them


def write_run_images(root: Path, frames: dict[str, pd.DataFrame]) -> None:
    """Write images.csv (source, id_code, hashes) of a run's prepared tables, unless it is up to date.

    Images that left the tables stay in it: an older model may have seen them.
    """
    file, columns = root / RUN_IMAGES, ['source', 'id_code', *HASHES]
    rows = pd.concat(frames.values())[columns]
    if file.is_file(): rows = pd.concat([rows, _read(file)[columns]]).drop_duplicates(['source', *HASHES])
    data = rows.to_csv(index=False, lineterminator='\n').encode()
    if not file.is_file() or file.read_bytes() != data: write_bytes(file, data)


def training_images(model: 'ModelSpec', root: Path) -> Known:
    "Return the images that a model in a bundle or run folder `root` was trained or tuned on. Raises `AptosError`"
    bundle = read_record(root / 'bundle.json')
    if bundle: return _of_bundle(root, bundle)
    return _of_run(root, [Path(m.file).parent.as_posix() for m in model.members])


def images_of_weights(file: Path) -> Known | None:
    "Return the images that a file of weights was trained on, by a run's or bundle's record beside it; None: no record"
    bundle, record = read_record(file.parent / 'bundle.json'), read_record(file.parent / FINISHED)
    if bundle and file.name in bundle['files']: return _of_bundle(file.parent, bundle)
    if not record or file.name != WEIGHTS or file_hash(file) != record['files'][WEIGHTS]['sha256']: return None
    return _of_run(file.parents[2], [f'{file.parents[1].name}/{file.parent.name}'])


def _of_bundle(root: Path, bundle: dict) -> Known:
    "Return the training images that a bundle lists"
    sha256 = bundle['files'].get(BUNDLE_IMAGES)
    if not sha256: return None, OLD.format(root / BUNDLE_IMAGES, 'Export the run again')
    return _read(verify_file(root / BUNDLE_IMAGES, sha256, 'Export the run again.')), bundle['training_images']


def _of_run(root: Path, networks: list[str]) -> Known:
    "Return the images of the tables that networks (STAGE/foldK) and their parents were trained on"
    file = root / RUN_IMAGES
    if not file.is_file(): return None, OLD.format(file, 'Run `all` again')
    images, records = _read(file), _records(root, networks)
    counts, notes, used, foreign = images.source.value_counts(), list[str](), set[str](), dict[str, list[str]]()
    for name, record in records.items():
        tables = [entry.rpartition(':')[2] for entry in record['settings']['train']]
        used.update(tables)
        if _is_foreign(record): foreign.setdefault(record['settings']['weights'], []).append(name)
        if sum(record['images'].values()) > counts.reindex(tables).sum(): notes.append(FEWER.format(file.name, name))
    notes += [FOREIGN_WEIGHTS.format(first_few(sorted(names)), file) for file, names in foreign.items()]
    known = images[images.source.isin(used)]
    return known[HASHES].drop_duplicates(), '; '.join(notes)


def _records(root: Path, networks: list[str]) -> dict[str, dict]:
    "Return STAGE/foldK -> record of networks and of those that they build on. Raises `AptosError`"
    todo, records = list(networks), {}
    while todo:
        name = todo.pop()
        record = read_record(root / name / FINISHED)
        if not record: raise AptosError(f'{root / name}: no finished fold here, but the model builds on it. Run `all`.')
        records[name] = record
        todo += [parent for parent in _parents(record) if parent not in records]
    return records


def _parents(record: dict) -> list[str]:
    "Return STAGE/foldK of the networks that one builds on; in a record of an older version they had its own fold"
    return list(record.get('trained_on') or (f'{stage}/fold{record["fold"]}' for stage in record['parents']))


def _is_foreign(record: dict) -> bool:
    "Return whether a network starts from a file of weights"
    settings = record['settings']
    return not settings['init'] and settings['weights'] not in ('imagenet', 'bundled', 'none')


def _read(file: Path) -> pd.DataFrame: return pd.read_csv(file, dtype=str, keep_default_na=False)


class SeenImages:
    "Tell which images are among those that a model was trained or tuned on (columns `HASHES`; None: unknown)"
    def __init__(self, known: pd.DataFrame | None):
        self.pixels = set() if known is None else set(known.pixel_sha256)
        self.bits = known_bits(known.perceptual_hash) if known is not None and len(known) else None

    def find(self, images: pd.DataFrame) -> np.ndarray:
        """Return for each of `images` (columns `HASHES`) identical, near copy, or ''.

        A near copy has a similar perceptual hash, as duplicates have.
        """
        if self.bits is None or not len(images): return np.full(len(images), '', object)
        near, identical = near_known(images.perceptual_hash, self.bits), images.pixel_sha256.isin(self.pixels)
        return np.where(identical, IDENTICAL, np.where(near, NEAR_COPY, '')).astype(object)
