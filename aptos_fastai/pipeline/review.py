"""Which labels of a finished run a reader should look at again: those that out-of-fold scores contradict most.

Reads a run folder alone: summary.json, oof.csv, duplicates.csv, folds.csv and relabels.csv.
"""
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from aptos_fastai.common.clock import now
from aptos_fastai.common.io import AptosError, read_record
from aptos_fastai.data.relabels import RELABELS, append_decisions, decision_of, last_decisions, read_decisions
from aptos_fastai.decisions import UNGRADABLE
from aptos_fastai.inference.validation_scores import oof_file
from aptos_fastai.metrics import GRADES, stratified_group_parts

DISAGREEMENT, DUPLICATE = 'disagreement', 'duplicate'      # why an image is in the list
MAD_TO_SD = 1.4826                           # of a normal distribution: SD / median absolute deviation
LEAST_WIDTH = .05                            # of the scores of a grade
SHARE = .1                                   # of the list, by default
KEY = ['source', 'id_code']


# Ranking

def label_surprise(scores: ArrayLike, labels: ArrayLike, parts: ArrayLike) -> np.ndarray:
    """Return -log p(label | score) of each image (n,): how surprising its label is, given its out-of-fold score.

    The probabilities of each part's images are fitted on the other `parts`, so that no label explains itself. Unlike
    |score - label| this knows where the scores of a grade really lie, and how rare the grade is. By
    average precision it finds more planted wrong labels than that and ordinal logistic regression where a network is
    weak, and as many where it is good (docs/review.md, benchmarks/label_errors.py).
    """
    s, y, part = np.asarray(scores, float), np.asarray(labels, int), np.asarray(parts)
    surprise = np.empty(len(s))
    for k in np.unique(part):
        inside = part == k
        others = inside if inside.all() else ~inside
        log_p = log_probabilities(s[inside], s[others], y[others])
        surprise[inside] = -log_p[np.arange(len(log_p)), y[inside]]
    return surprise


def log_probabilities(scores: ArrayLike, known_scores: np.ndarray, known_labels: np.ndarray) -> np.ndarray:
    """Return log p(grade | score), (n, 5), by Bayes' rule: the scores of a grade are normal around their median.

    All grades have one width, from the median absolute deviation, and are as frequent as among the known images. Wrong
    labels hardly move medians. A grade without known images is centred at its own number.
    """
    counts = np.bincount(known_labels, minlength=GRADES)
    centres = np.array([np.median(known_scores[known_labels == g]) if counts[g] else g for g in range(GRADES)])
    width = max(MAD_TO_SD * np.median(np.abs(known_scores - centres[known_labels])), LEAST_WIDTH)
    density = -((np.asarray(scores, float)[:, None] - centres) / width) ** 2 / 2
    log_p = density + np.log(counts + .5)
    return log_p - np.logaddexp.reduce(log_p, axis=1, keepdims=True)


def ranked(oof: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `oof` (source, id_code, diagnosis, fold, group, score), the most surprising label first.

    With fewer than three folds the probabilities are fitted on five parts that keep groups together.
    """
    parts = oof.fold if oof.fold.nunique() > 2 else stratified_group_parts(oof.diagnosis, oof.group)
    surprise = label_surprise(oof.score, oof.diagnosis, parts)
    return oof.assign(surprise=surprise).sort_values('surprise', ascending=False, kind='stable', ignore_index=True)


# The list

@dataclass
class ReviewItem:
    "An image whose label a reader should look at again"
    table: str
    id_code: str
    original: int                            # the grade in the table's own CSV
    label: int                               # the grade that the run was trained on, which a decision may have set
    score: float | None                      # out-of-fold; None where no fold has validated the image
    fold: int                                # whose networks have not seen the image
    reason: str                              # DISAGREEMENT, DUPLICATE, or both
    decision: str | None = None              # '0' to '4', 'ungradable', '' (skipped); None: still to do

    @property
    def changed(self) -> bool:
        "Whether the decision differs from the table's grade"
        return self.decision not in (None, '', str(self.original))


class Review:
    """The list of a finished run, or of a stage in it, and the reader's decisions, which go to <run>/relabels.csv.

    The list holds the duplicates with unequal grades, then the fraction `share` of the validated images whose labels
    are the most surprising. Images that were decided earlier keep their decision. Raises `AptosError`.
    """
    def __init__(self, path: str | Path, share: float = SHARE):
        self.root, self.node, self.summary = open_results(Path(path))
        self.file = self.root / RELABELS
        self.folds = read_folds(self.root)             # (table, id) -> fold
        self.validated = read_validated(self.root, self.summary, self.node)
        first = ranked(self.validated).head(int(np.ceil(share * len(self.validated))))
        self.items = self._items(first, unequal_duplicates(self.root))
        self._read_decisions()

    def _items(self, first: pd.DataFrame, duplicates: pd.DataFrame) -> list[ReviewItem]:
        "Return the duplicates, then the rows of the ranking, each image once"
        reasons: dict[tuple[str, str], list[str]] = {}
        for rows, reason in ((duplicates, DUPLICATE), (first, DISAGREEMENT)):
            for key in zip(rows.source, rows.id_code, strict=True): reasons.setdefault(key, []).append(reason)
        scores = self.validated.set_index(KEY).score
        labels = pd.concat([duplicates, self.validated]).drop_duplicates(KEY).set_index(KEY).diagnosis
        originals = applied_originals(self.root)
        return [ReviewItem(*key, original=originals.get(key, int(labels[key])), label=int(labels[key]),
                           score=float(scores[key]) if key in scores.index else None, fold=self.folds.get(key, -1),
                           reason='; '.join(found)) for key, found in reasons.items()]

    def _read_decisions(self) -> None:
        "Give the items the decisions of relabels.csv; before it exists, those that the run was trained on"
        files = [self.file] if self.file.is_file() else set(applied_files(self.root).values())
        rows = [row for file in files for row in last_decisions(read_decisions(file)).itertuples()]
        found = {(row.table, row.id_code): decision_of(row.grade, row.note) for row in rows}
        for item in self.items: item.decision = found.get((item.table, item.id_code))

    @cached_property
    def members(self) -> dict[str, float]:
        "The stages whose networks give the scores, with their weights"
        result = next(o for o in self.summary['stages'] if o['stage'] == self.node)
        submission = self.summary['submission']
        older = submission['members'] if self.node == submission['node'] else {self.node: 1.}
        return {m: weight for m, weight in result.get('members', older).items() if weight}

    def progress(self) -> dict[str, int]:
        "Return how many images the list has, how many are reviewed, and what became of them"
        decided = [item for item in self.items if item.decision is not None]
        return dict(images=len(self.items), reviewed=len(decided), changed=sum(item.changed for item in decided),
                    ungradable=sum(item.decision == UNGRADABLE for item in decided),
                    skipped=sum(item.decision == '' for item in decided))

    def decide(self, item: ReviewItem, grade: str, reviewer: str, shown_label: bool, notes: Iterable[str] = ()) -> None:
        """Append a decision to relabels.csv: a grade '0' to '4', 'ungradable', or '' for a skipped image.

        `notes` follow the reason in the column note (`decision_of` reads them). A new file begins with the decisions
        that the run was trained on. Raises `AptosError` if the file cannot be written.
        """
        note = '; '.join([item.reason, *notes])
        row = dict(table=item.table, id_code=item.id_code, original=item.original, grade=grade, reviewer=reviewer,
                   time=now(), shown_label='yes' if shown_label else 'no', note=note)
        earlier = [] if self.file.is_file() else set(applied_files(self.root).values())
        rows = [row for file in earlier for row in read_decisions(file).to_dict('records')]
        append_decisions(self.file, [*rows, row])
        item.decision = decision_of(grade, note)


def open_results(path: Path) -> tuple[Path, str, dict]:
    "Return the run folder of a run or stage, the name of the stage or ensemble, and summary.json. Raises `AptosError`"
    for root, node in ((path, ''), (path.parent, path.name)):
        summary = read_record(root / 'summary.json')
        if not summary: continue
        names = [result['stage'] for result in summary['stages']]
        node = node or summary['submission']['node']
        if node in names: return root, node, summary
    raise AptosError(f'{path}: not a finished run or a stage of one (no summary.json). Give <runs>/<recipe>, or run '
                     '`all` first.')


def read_validated(root: Path, summary: dict, node: str) -> pd.DataFrame:
    "Return source, id_code, diagnosis, fold, group and score of the images that a stage or ensemble has validated"
    oof = pd.read_csv(oof_file(root, summary), dtype=dict(source=str, id_code=str, group=str), keep_default_na=False,
                      na_values={node: ['']})
    oof = oof[oof[node].notna()].reset_index(drop=True)
    oof = oof.assign(score=oof[node].astype(float), diagnosis=oof.diagnosis.astype(float).astype(int))
    return oof[[*KEY, 'diagnosis', 'fold', 'group', 'score']]


def unequal_duplicates(root: Path) -> pd.DataFrame:
    "Return source, id_code and diagnosis of the graded images in duplicates.csv whose copies have another grade"
    file = root / 'duplicates.csv'
    if not file.is_file(): return pd.DataFrame(columns=[*KEY, 'diagnosis'])
    rows = pd.read_csv(file, dtype=dict(source=str, id_code=str), keep_default_na=False, na_values=dict(diagnosis=['']))
    return rows[rows.conflict & rows.diagnosis.notna()][[*KEY, 'diagnosis']].reset_index(drop=True)


def read_folds(root: Path) -> dict[tuple[str, str], int]:
    "Return (table, id) -> fold of folds.csv"
    file = root / 'folds.csv'
    if not file.is_file(): raise AptosError(f'{file}: no such file. Run `all` again.')
    df = pd.read_csv(file, dtype=dict(source=str, id_code=str), keep_default_na=False)
    return dict(zip(zip(df.source, df.id_code, strict=True), df.fold, strict=True))


# Decisions that the run was trained on already

def applied_files(root: Path) -> dict[str, Path]:
    "Return the file of decisions that each table of a run was read with. Raises `AptosError` if one is missing"
    record = read_record(root / 'run.json') or {}
    files = {name: (root / o['file']).resolve() for name, o in record.get('relabels', {}).items()}
    for file in files.values():
        if not file.is_file():
            raise AptosError(f'{file}: the run was trained on these decisions, and the file is missing. Restore it.')
    return files


def applied_originals(root: Path) -> dict[tuple[str, str], int]:
    "Return (table, id) -> the grade in the table's own CSV, of the images whose decisions the run was trained on"
    found: dict[tuple[str, str], int] = {}
    for name, file in applied_files(root).items():
        rows = last_decisions(read_decisions(file))
        found |= {(name, row.id_code): int(row.original) for row in rows[rows.table == name].itertuples()}
    return found
