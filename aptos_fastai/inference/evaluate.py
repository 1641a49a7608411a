"Evaluate a model on a graded table: scores, metrics with intervals, subgroups, images that the model has seen."
import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

import aptos_fastai
from aptos_fastai.common.console import Bars, plural, say
from aptos_fastai.common.io import AptosError, check_output_folder, digest, read_record
from aptos_fastai.data.duplicates import group_duplicates
from aptos_fastai.data.spreadsheet import first_few, read_spreadsheet, require_column
from aptos_fastai.data.tables import MISSING_IMAGES, PATIENT_OF_EYE, TableContents, describe, find_folder
from aptos_fastai.data.understand import Ask, Understood, find_table
from aptos_fastai.decisions import DECISION_COLUMNS, LEVELS, P_COLUMNS, UNGRADABLE, DecisionSpec
from aptos_fastai.inference.eyes import evaluate_eyes
from aptos_fastai.inference.grader import Grader, load_grader
from aptos_fastai.inference.measures import (
    EVALUATION,
    EVALUATIONS,
    HTML,
    PREDICTIONS,
    calibration_results,
    confusion_results,
    detection_results,
    gate_results,
    kappa_results,
    model_record,
    probability_results,
    recall_results,
    referral_results,
    set_results,
)
from aptos_fastai.inference.model_spec import ModelSpec
from aptos_fastai.inference.subgroups import subgroup_results
from aptos_fastai.inference.training_images import HASHES, IDENTICAL, NEAR_COPY, SeenImages, training_images
from aptos_fastai.metrics import REFERABLE, apply_thresholds
from aptos_fastai.recipe.sections import Table

FORMAT = 2                                   # of evaluation.json
DECIDED = [*DECISION_COLUMNS, *P_COLUMNS]
COLUMNS = ['id_code', 'diagnosis', 'score', 'grade', *DECIDED, 'grade_low', 'grade_high', 'ungradable', 'group',
           'pixel_sha256', 'image_sha256', 'seen', 'error']
RESERVED = {*COLUMNS, *HASHES, 'path', 'source', 'called'}               # names that no column of the table can have
FEW_IMAGES = 30                              # fewer are too few for any conclusion
SEEN = ('{} of {} images were used to train or tune the model ({} identical, {} near copies) and are counted all the '
        'same (--include-seen): these figures are optimistic')
PATIENTS = 'patients unknown: the intervals may be too narrow'
ALONE = ('the model grades by both eyes of a patient in predict; these figures are of every image graded alone, except '
         'where they are called fused')


@dataclass
class Evaluation:
    "What `evaluate` found: `record` becomes evaluation.json, `predictions` (`COLUMNS`, then the table's) a CSV"
    folder: Path
    record: dict
    predictions: pd.DataFrame
    reasons: list[str]                       # how the table was understood
    missing: list[str] = field(default_factory=list)         # ids without an image, which are left out


@dataclass(frozen=True)
class Choices:
    "The options of `evaluate`"
    prevalence: float | None = None          # of referable retinopathy; None: that of the table
    by: Sequence[str] = ()                   # columns of subgroups; none: those that the table carries
    include_seen: bool = False
    output: str = ''
    skip_missing: bool = False               # leave out rows without an image


DEFAULTS = Choices()


def evaluate_table(model: str, table: str, images: str = '', recipe: str = '', data: str = '',
                   choices: Choices = DEFAULTS, ask: Ask | None = None, **keys: str) -> Evaluation:
    """Grade the images of a graded table and compare with their grades; nothing is written.

    `table` is a CSV or a folder of class folders with its `images`, a preset, or a table of `recipe` in `data`; `keys`
    (id, grade, patient, eye, sheet) name its columns, `ask` lets the user choose between two. Raises `AptosError`.
    """
    if choices.prevalence is not None and not 0 < choices.prevalence < 1:
        raise AptosError(f'--prevalence {choices.prevalence:g}: enter a number between 0 and 1, for example 0.1.')
    understood = _named(find_table(table, images, recipe, data, ask, choices.skip_missing, **keys), table)
    understood = replace(understood, table=_with_columns(understood.table, understood.data, choices.by))
    contents = understood.contents
    reasons = [*understood.reasons, describe(understood.table, contents)]
    for text in reasons: say(f'{understood.table.name}: {text}')
    for text in contents.notes: say(f'{understood.table.name}: {text}', 'yellow')
    grader = load_grader(model)
    name = re.sub(r'[^\w.-]+', '_', understood.table.name)
    folder = Path(choices.output) if choices.output else Path(model) / EVALUATIONS / name
    identity = dict(model=model_record(grader.model), table=_table_record(understood))
    check_folder(folder, identity, own=not choices.output)
    known, unknown = training_images(grader.model, grader.root)
    rows = _predict(grader, _all_images(contents), SeenImages(known), choices.include_seen)
    place = find_folder(understood.table, understood.data)
    folders = [Path(images or '.'), grader.root, understood.data, place, place / understood.table.images]
    unknown = _without_folders([unknown], folders)[0]
    record = dict(
        format=FORMAT, **identity, date=time.strftime('%Y-%m-%d'), aptos_fastai=aptos_fastai.__version__,
        synthetic=grader.model.synthetic, notes=_without_folders(contents.notes, folders), seen_unknown=unknown,
        **_results(rows, understood.table, grader.model, choices, len(contents.missing)))
    if unknown: record['warnings'].insert(0, unknown)
    return Evaluation(folder, record, _in_order(rows, understood.table), _without_folders(reasons, folders),
                      contents.missing)


# The table

def _named(understood: Understood, name: str) -> Understood:
    "Return a table with the name of its CSV or folder, if `name` is one"
    if not Path(name).exists(): return understood
    return replace(understood, table=replace(understood.table, name=Path(name).resolve().stem))


def _with_columns(table: Table, data: Path, by: Iterable[str]) -> Table:
    "Return a graded table that carries the columns `by`, too, and none of `RESERVED`. Raises `AptosError`"
    if not table.graded: raise AptosError(f'{table.name}: has no grades to compare with. Name a graded table.')
    more = [column for column in by if column not in table.carried]
    for column in more:
        problem = ''
        if column == 'eye': problem = 'it is not known which eye an image shows'
        if column in RESERVED: problem = 'predictions.csv has another column of this name; rename it in the CSV'
        if not table.csv: problem = 'a table without a CSV has no columns'
        if problem: raise AptosError(f'--by {column}: {problem}. Choose another column of {table.name}.')
    if more:
        csv = find_folder(table, data) / table.csv
        df = read_spreadsheet(csv, header=table.header == 'yes', sheet=table.sheet)
        for column in more: require_column(csv, df, column, 'Name one of them: --by COLUMN.')
    kept = [column for column in table.carry_columns if column not in RESERVED]
    return replace(table, carry=' | '.join([*kept, *more]))


def _all_images(contents: TableContents) -> pd.DataFrame:
    "Return the graded images, then those that their graders called ungradable, whose diagnosis is empty"
    frame = contents.frame.assign(diagnosis=contents.frame.diagnosis.astype(int).astype('Int64'))
    rows = pd.concat([frame, contents.ungradable], ignore_index=True) if len(contents.ungradable) else frame
    text = [name for name in rows if name != 'diagnosis']
    return rows.assign(**{name: rows[name].fillna('') for name in text})


def _table_record(understood: Understood) -> dict:
    "Return what tells one table from another: its name, its CSV's name, its grades, and a hash of where it lies"
    table = understood.table
    place = find_folder(table, understood.data).resolve() / (table.csv or table.images)
    return dict(name=table.name, csv=Path(table.csv).name, grade=table.grade, grouped_by=table.grouped_by,
                place=digest([os.fspath(place), table.where, *filter(None, [table.sheet])])[:12])


def check_folder(folder: Path, identity: dict, own: bool) -> None:
    """Raise `AptosError` if `folder` holds anything but an earlier evaluation of the same model on the same table.

    With `own` it lies in the model's folder, so that an evaluation of its older weights is replaced, too.
    """
    check_output_folder(folder)
    if not folder.exists(): return
    where = 'Choose another folder with -o.'
    others = sorted(f.name for f in folder.iterdir() if f.name not in (EVALUATION, PREDICTIONS, HTML, MISSING_IMAGES)
                    and not f.name.endswith('.tmp'))
    if others: raise AptosError(f'{folder}: holds files that evaluate did not write ({first_few(others)}). {where}')
    record = read_record(folder / EVALUATION)
    if not record: return
    if record['table']['place'] != identity['table']['place']:
        raise AptosError(f'{folder}: holds an evaluation on another table ({record["table"]["name"]}, '
                         f'{record["table"]["csv"]}), or on this one before it was moved. {where}')
    if record['table'].get('grade', identity['table']['grade']) != identity['table']['grade']:
        raise AptosError(f'{folder}: holds an evaluation by the grades of column {record["table"]["grade"]}. {where}')
    if own or record['model']['weights'] == identity['model']['weights']: return
    raise AptosError(f'{folder}: holds an evaluation of another model ({record["model"]["name"]}). {where}')


def _without_folders(texts: Iterable[str], folders: Iterable[Path]) -> list[str]:
    "Return texts that name files without their folders, which can name people; reports and bundles are passed on"
    names = {str(path): path.name for folder in folders for path in (folder, folder.resolve())}
    found = []
    for text in texts:
        for name in sorted(names, key=len, reverse=True):
            if len(name) > 1: text = text.replace(name, names[name])
        found.append(re.sub(r'/(?:[^\s/]+/)+', '', text))
    return found


# Scores

def _predict(grader: Grader, frame: pd.DataFrame, seen: SeenImages, include_seen: bool) -> pd.DataFrame:
    """Return `frame` with score, grade, prediction set, gate, hashes, `seen` and error of each image in its `path`.

    Graded images that the model has `seen` are counted only with `include_seen`: without it they are not graded. Grade
    and probabilities are those of the score, also where the gate rejects the image. Raises `AptosError` if none is
    readable.
    """
    parts, done = [], 0
    left_out = frame.diagnosis.notna().to_numpy() & (not include_seen)           # if the model has seen them
    with Bars() as bars, bars(f'grading with {grader.model.name}', len(frame), 'images') as bar:
        for names, images in grader.read_batches(frame.path):
            hashes = pd.DataFrame([[info.get(key, '') for key in HASHES] for _, info in images], columns=HASHES)
            hashes['seen'] = ''
            readable = [squares is not None for squares, _ in images]
            hashes.loc[readable, 'seen'] = seen.find(hashes[readable])
            skipped = left_out[done:done + len(names)] & (hashes.seen != '')
            found = grader.grade(names, [(None if skip else squares, info)
                                         for skip, (squares, info) in zip(skipped, images, strict=True)])
            parts.append(found.join(hashes))
            done += len(names)
            bar.to(done)
    found = pd.concat(parts, ignore_index=True)
    columns = ['score', *DECIDED, 'grade_low', 'grade_high', 'ungradable', 'image_sha256', 'error', *HASHES, 'seen']
    rows = frame.reset_index(drop=True).assign(**{name: found[name] for name in columns})
    if (rows.error != '').all():
        raise AptosError(f'all {len(rows)} images cannot be read: {first_few(_errors(rows))}. Check the files.')
    score = rows.score.dropna().astype(float)
    grade = apply_thresholds(score, grader.model.thresholds)
    rows['grade'] = pd.Series(grade, index=score.index).reindex(rows.index).astype('Int64')
    decided = pd.DataFrame(grader.model.decision.decide(score, grade, grade), index=score.index)
    return rows.assign(**decided[list(P_COLUMNS)].reindex(rows.index))


def _errors(rows: pd.DataFrame) -> list[str]:
    "Return what is wrong with each unreadable image"
    bad = rows[rows.error != '']
    return [f'{name}: {error}' for name, error in zip(bad.id_code, bad.error, strict=True)]


def _in_order(rows: pd.DataFrame, table: Table) -> pd.DataFrame:
    "Return predictions.csv: `COLUMNS`, then the columns that the table carries"
    return rows[[*COLUMNS, *(name for name in table.carried if name not in COLUMNS)]]


# Metrics

def _results(rows: pd.DataFrame, table: Table, model: ModelSpec, choices: Choices, missing: int) -> dict:
    """Return counts, metrics, subgroups and warnings of the images that can be read, are graded, and were not seen.

    `missing` rows of the table have no image.
    """
    readable = rows[rows.error == '']
    graded = readable[readable.diagnosis.notna()]
    df = graded if choices.include_seen else graded[graded.seen == '']
    if not len(df): raise AptosError(_nothing_left(rows, graded, table))
    df = df.reset_index(drop=True).astype(dict(diagnosis=int, grade=int, score=float))
    by_graders = readable.ungradable[readable.diagnosis.isna()]
    own = float((df.diagnosis >= REFERABLE).mean())
    prevalence = own if choices.prevalence is None else choices.prevalence
    counts = dict(_counts(rows, graded, df), missing=missing)
    called = model.decision.positive(df.score, df.grade, REFERABLE)
    subgroups = subgroup_results(df.assign(called=called), choices.by or table.carried)
    return dict(
        counts=counts, prevalence=dict(value=prevalence, of_table=choices.prevalence is None),
        kappa=kappa_results(df), **_detection(df, model.decision), referral=_referral(df, model.decision, prevalence),
        probabilities=_probabilities(df, model.decision),
        recall=recall_results(df), confusion=confusion_results(df), calibration=calibration_results(df),
        prediction_sets=set_results(df, model.coverage), gate=gate_results(df, by_graders), subgroups=subgroups,
        **_eyes(df, table, model), include_seen=choices.include_seen, unreadable=_errors(rows)[:20],
        warnings=[*_missing_grades(df), *_warnings(counts, table, choices, subgroups, bool(model.eyes))])


def _missing_grades(df: pd.DataFrame) -> list[str]:
    "Return a warning of images of the grades 0 and 1 alone, or of one grade"
    grades = sorted(df.diagnosis.unique())
    if grades[-1] > 1 and len(grades) > 1: return []
    return [f'all images have grade {" or ".join(map(str, grades))}: is it a yes or no? Kappa and detection tell '
            'nothing of the other grades']


def _detection(df: pd.DataFrame, spec: DecisionSpec) -> dict[str, dict]:
    "Return AUC of referable and sight-threatening grades, and sensitivity and specificity at the operating points"
    called = {level: pd.Series(spec.positive(df.score, df.grade, level), df.index) for level in LEVELS}
    return {name: detection_results(df, called[level], level) for level, name in LEVELS.items()}


def _referral(df: pd.DataFrame, spec: DecisionSpec, prevalence: float) -> dict[str, dict]:
    """Return what a programme gets that refers by grade, by an operating point, or by all rules of the model.

    Under all rules, uncertain images are referred if the model says so, and images that the gate rejects always.
    """
    by_score = pd.Series(spec.positive(df.score, df.grade, REFERABLE), df.index)
    called = dict(grade=df.grade >= REFERABLE, operating_point=by_score)
    second = spec.point(REFERABLE, 1)
    if second: called['high_specificity'] = df.score >= second.threshold
    called['programme'] = df.referable.isin(['yes', UNGRADABLE])
    return {name: referral_results(df, rows, prevalence) for name, rows in called.items()}


def _probabilities(df: pd.DataFrame, spec: DecisionSpec) -> dict[str, dict] | None:
    "Return how well the probabilities agree with the grades; None for a model that has none"
    if spec.probabilities is None: return None
    return {name: probability_results(df, df[f'p_{name}'].to_numpy(float), level) for level, name in LEVELS.items()}


def _eyes(df: pd.DataFrame, table: Table, model: ModelSpec) -> dict[str, dict | None]:
    "Return how well a model that fuses both eyes grades by them; all other metrics are of images graded alone"
    if not model.eyes: return {}
    if not table.names_eyes: return dict(eyes=None)
    return dict(eyes=evaluate_eyes(model.eyes, df.rename(columns={PATIENT_OF_EYE: 'patient'})))


def _nothing_left(rows: pd.DataFrame, graded: pd.DataFrame, table: Table) -> str:
    "Return the message for a table without images to evaluate"
    if len(graded):
        return (f'{table.name}: all {len(graded)} images were used to train or tune the model. Evaluate on other '
                'images; `evaluate --include-seen` shows optimistic figures.')
    return f'{table.name}: no graded image can be read: {first_few(_errors(rows))}. Check the images.'


def _counts(rows: pd.DataFrame, graded: pd.DataFrame, df: pd.DataFrame) -> dict:
    "Return how many images there are of each kind; copies are images that occur in the table more than once"
    copies = group_duplicates({'': df.assign(source='')})[''].duplicate_group.duplicated(keep=False)
    return dict(images=len(rows), evaluated=len(df), groups=int(df.group.nunique()),
                unreadable=int((rows.error != '').sum()), ungradable_by_graders=int(rows.diagnosis.isna().sum()),
                identical=int((graded.seen == IDENTICAL).sum()), near_copies=int((graded.seen == NEAR_COPY).sum()),
                copies=int(copies.sum()))


def _warnings(counts: dict, table: Table, choices: Choices, subgroups: list[dict], fuses: bool) -> list[str]:
    "Return what every reader of the metrics must know"
    found, seen = [], counts['identical'] + counts['near_copies']
    if choices.include_seen and seen:
        found.append(SEEN.format(seen, counts['evaluated'], counts['identical'], counts['near_copies']))
    if counts['evaluated'] < FEW_IMAGES:
        found.append(f'only {counts["evaluated"]} images: too few for a conclusion (at least {FEW_IMAGES})')
    if counts['unreadable']:
        found.append(f'{counts["unreadable"]} of {counts["images"]} images cannot be read and are left out')
    if counts['missing']: found.append(f'{plural(counts["missing"], "row")} of the table without an image left out')
    if table.grouped_by != 'patients': found.append(PATIENTS)
    if fuses: found.append(ALONE)
    for subgroup in subgroups:
        found += [subgroup_warning(subgroup['column'], o) for o in subgroup['values'] if o['differs']]
    return found


def subgroup_warning(column: str, values: dict) -> str:
    "Return the warning of a subgroup that differs: 'site = north: kappa lower (-0.210) than in the other images'"
    return f'{column} = {values["name"]}: {differences_text(values)} than in the other images'


def differences_text(values: dict) -> str:
    "Return in which metrics a subgroup differs: 'kappa lower (-0.210), mean error higher (+0.300)'"
    found = []
    for name in values['differs']:
        value = values['differences'][name]['value']
        label = 'AUC' if name == 'auc' else name.replace('_', ' ')
        found.append(f'{label} {"higher" if value > 0 else "lower"} ({value:+.3f})')
    return ', '.join(found)
