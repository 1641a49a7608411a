"""Write the model card of a bundle, by the sections of Mitchell et al. 2019 (arXiv:1810.03993).

Figures come from the bundle's record, which `export` took from the run; what the record lacks is called unknown.
"""
from collections.abc import Sequence

import numpy as np

from aptos_fastai.common.disclaimer import DISCLAIMER
from aptos_fastai.decisions import LEVELS
from aptos_fastai.inference.model_spec import ModelSpec
from aptos_fastai.metrics import GRADE_NAMES, GRADES, REFERABLE, SIGHT_THREATENING, proportion_interval
from aptos_fastai.pipeline.summary import OUT_OF_FOLD, SETS_CONDITION, eyes_rows
from aptos_fastai.recipe.sections import parse_thresholds
from aptos_fastai.reports.html import render
from aptos_fastai.reports.parts import chosen_for, cluster_kappa, measure_text, percent, set_rows, thresholds_text
from aptos_fastai.reports.referral_report import level_text

NOT_STATED = 'not stated'


def card_text(model: ModelSpec, bundle: dict, parity: list[dict], evaluations: list[dict]) -> str:
    "Return MODEL_CARD.md; `parity` and `evaluations` are the rows on backends and on other tables."
    metrics = bundle['metrics']
    fixed = bool(metrics) and parse_thresholds(metrics['threshold_method'])
    return render('MODEL_CARD.md', model=model, bundle=bundle, metrics=metrics, table=markdown_table, parity=parity,
                  evaluations=evaluations, fixed_thresholds=fixed, details=details(model, bundle),
                  networks=network_rows(model, bundle), tables=table_rows(metrics), recall=recall_rows(metrics),
                  points=point_rows(model), programme=programme_rows(model, metrics), brier=brier_rows(metrics),
                  sets=set_rows(metrics['prediction_sets']) if 'prediction_sets' in metrics else [],
                  clusters=cluster_tables(metrics), errors=error_rows(metrics),
                  error_kinds=error_kinds(metrics), carried=carried_texts(metrics), gate=gate_texts(metrics),
                  grades=', '.join(f'{grade} {name}' for grade, name in enumerate(GRADE_NAMES)),
                  thresholds=thresholds_text(model.thresholds), thresholds_text=thresholds_text,
                  eyes_rows=eyes_rows, percent=percent, measure=measure_text,
                  out_of_fold=OUT_OF_FOLD, sets_condition=SETS_CONDITION, disclaimer=DISCLAIMER)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence]) -> str:
    "Return a Markdown table; a | or a line break in a cell becomes a space."
    def line(cells: Sequence) -> str:
        return '| ' + ' | '.join(' '.join(str(cell).replace('|', ' ').split()) for cell in cells) + ' |'
    return '\n'.join([line(columns), '|' + '---|' * len(columns), *map(line, rows)])


# Model and data

def details(model: ModelSpec, bundle: dict) -> list[tuple[str, str]]:
    "Return what the model is, who made it when, and who answers for it."
    metrics, digests = bundle['metrics'], model.digests
    versions = bundle['lineage'][0]['versions']
    git = f' (git {versions["git"]})' if versions.get('git') else ''
    parts = ', '.join(f'{name} {value}' for name, value in digests.items() if name != 'model')
    return [('owner', metrics.get('owner') or NOT_STATED), ('contact', metrics.get('contact') or NOT_STATED),
            ('date of the training run', metrics.get('date') or 'unknown'),
            ('version', f'digest {digests["model"]} ({parts})'),
            ('made by', f'aptos_fastai {versions["aptos_fastai"]}{git}, exported by {bundle["aptos_fastai"]}'),
            ('recipe', metrics.get('recipe') or 'unknown'),
            ('licence', bundle['licence'])]


def network_rows(model: ModelSpec, bundle: dict) -> list[list]:
    "Return a row for each network."
    return [[f'{o["stage"]} fold {o["fold"]}, {m.arch}', f'{m.weight:.3f}', m.size, ', '.join(o['settings']['train']),
             o['images']['train'], o['images']['valid']] for o, m in zip(bundle['lineage'], model.members, strict=True)]


def table_rows(metrics: dict) -> list[list]:
    "Return a row for each table of the run: use, images, patients, grades, images without a grade."
    rows = []
    for o in metrics.get('tables', ()):
        patients = o['groups'] if o['grouped_by'] == 'patients' else 'unknown'
        grades = ' / '.join(map(str, o['grades'])) if o['grades'] else 'ungraded'
        rows.append([o['table'], ', '.join(o['uses']), o['images'], patients, grades, o['ungradable_by_graders']])
    return rows


def carried_texts(metrics: dict) -> list[str]:
    "Return how many images have each value of the columns that the tables carry (device, site, sex …)."
    return [f'{o["table"]}, {column}: ' + ', '.join(f'{value} {n}' for value, n in counts.items())
            for o in metrics.get('tables', ()) for column, counts in o['carried'].items()]


# Figures

def recall_rows(metrics: dict) -> list[list]:
    "Return recall and number of images of each grade."
    return [[f'{o["grade"]} {GRADE_NAMES[o["grade"]]}', o['images'], measure_text(o)]
            for o in metrics.get('recall', ())]


def point_rows(model: ModelSpec) -> list[list]:
    "Return a row for each operating point."
    return [[level_text(o.lowest_grade), f'score ≥ {o.threshold:.3f}', chosen_for(o), measure_text(o.sensitivity),
             measure_text(o.specificity), o.note] for o in model.decision.points]


def programme_rows(model: ModelSpec, metrics: dict) -> list[list]:
    "Return what is referred by all rules together; nothing if the operating points were changed after the run."
    if metrics.get('points') != [o.threshold for o in model.decision.points]: return []
    keys = 'sensitivity', 'specificity', 'referred'
    return [[name, o['referred']['images'], *(measure_text(o[key]) for key in keys)]
            for name, o in metrics.get('decision', {}).get('programme', {}).items() if o]


def brier_rows(metrics: dict) -> list[list]:
    "Return the Brier score of the probabilities of each level, beside that of the prevalence."
    found = metrics.get('decision', {}).get('brier', {})
    return [[level_text(level), o['images'], measure_text(o), f'{o["of_prevalence"]:.3f}', percent(o['mean_predicted']),
             percent(o['observed'])] for level, name in LEVELS.items() for o in [found.get(name)] if o]


def cluster_tables(metrics: dict) -> list[tuple[str, list[list]]]:
    "Return a title and rows for each kind of clusters."
    return [(_cluster_title(kind), [[o['name'], o['images'], cluster_kappa(o), f'{o["mean_error"]:.2f}']
                                    for o in kind['clusters']]) for kind in metrics.get('clusters', ())]


def _cluster_title(kind: dict) -> str:
    "Return what a kind of clusters is, and its drop of kappa."
    drop = 'fewer than two clusters can be compared'
    if kind['drop'] is not None:
        drop = f'kappa drops by {kind["drop"]:.2f} (by chance up to {kind["drop_by_chance"]:.2f})'
    return f'{kind["kind"]} ({kind["meaning"]}): {drop}'


def gate_texts(metrics: dict) -> list[str]:
    "Return how many validation and test images the gate rejects, and why."
    texts = []
    for name, o in metrics.get('gate', {}).items():
        low, high = proportion_interval(np.arange(o['images']) < o['ungradable'])
        reasons = ', '.join(f'{reason} {n}' for reason, n in o['reasons'].items())
        texts.append(f'{name} images: {o["ungradable"]} of {o["images"]} rejected (95 % CI over images '
                     f'{percent(low)}–{percent(high)})' + (f': {reasons}' if reasons else ''))
    return texts


# Errors

def error_kinds(metrics: dict) -> list[list]:
    "Return how many validation images are graded wrongly in which way: kind, images, of how many, share."
    if 'confusion' not in metrics: return []
    counts = np.array(metrics['confusion'])
    true, grade = np.indices(counts.shape)
    levels = f'grade {REFERABLE} to {GRADES - 1}'
    kinds = [('one grade too low or too high', np.abs(true - grade) == 1, true >= 0),
             ('two or more grades too low', true - grade >= 2, true >= 0),
             ('two or more grades too high', grade - true >= 2, true >= 0),
             (f'{levels}, graded below {REFERABLE}', (true >= REFERABLE) & (grade < REFERABLE), true >= REFERABLE),
             (f'grade {SIGHT_THREATENING} or {GRADES - 1}, graded below {REFERABLE}',
              (true >= SIGHT_THREATENING) & (grade < REFERABLE), true >= SIGHT_THREATENING),
             (f'grade 0, graded {REFERABLE} or higher', (true == 0) & (grade >= REFERABLE), true == 0)]
    return [[kind, int(counts[rows].sum()), int(counts[of].sum()),
             percent(counts[rows].sum() / counts[of].sum()) if counts[of].sum() else 'no images']
            for kind, rows, of in kinds]


def error_rows(metrics: dict) -> list[list]:
    "Return the largest errors: image, table, true grade, grade, score."
    return [[o['id_code'], o['table'], o['diagnosis'], o['grade'], f'{o["score"]:.2f}']
            for o in metrics.get('largest_errors', ())]
