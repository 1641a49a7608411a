"Write and show the evaluation of a model on a graded table: evaluation.html, predictions.csv, evaluation.json."
import numpy as np
import pandas as pd

from aptos_fastai.common.console import plural, say, table
from aptos_fastai.common.disclaimer import DISCLAIMER
from aptos_fastai.common.io import file_hash, write_csv, write_record
from aptos_fastai.data.spreadsheet import safe_cell
from aptos_fastai.data.tables import MISSING_IMAGES
from aptos_fastai.decisions import LEVELS, DecisionSpec, OperatingPoint
from aptos_fastai.inference.evaluate import Evaluation, differences_text
from aptos_fastai.inference.measures import EVALUATION, HTML, PREDICTIONS
from aptos_fastai.inference.model_spec import SYNTHETIC_MODEL
from aptos_fastai.inference.subgroups import ALPHA, MIN_IMAGES
from aptos_fastai.metrics import REFERABLE
from aptos_fastai.pipeline.summary import SETS_CONDITION
from aptos_fastai.reports import plots
from aptos_fastai.reports.grade_report import recall_figure
from aptos_fastai.reports.html import Bar, Figure, Section, Table, write_html
from aptos_fastai.reports.parts import card, eyes_table, figure, measure_text, percent, thresholds_text
from aptos_fastai.reports.referral_report import (
    brier_table,
    decision_curve_section,
    level_text,
    reliability_figures,
    rules,
    threshold_figure,
)

IN_SAMPLE = 'in-sample: the best thresholds for these very images, a bound that no other thresholds exceed'
LARGEST_ERRORS = 12


def write_evaluation(evaluation: Evaluation) -> None:
    "Write predictions.csv, evaluation.html, the list of rows without an image and, last, evaluation.json"
    folder, rows = evaluation.folder, evaluation.predictions
    text = rows.select_dtypes(exclude='number').columns
    write_csv(folder / PREDICTIONS, rows.assign(**{name: rows[name].map(safe_cell) for name in text}))
    write_report(evaluation)
    missing = pd.DataFrame(dict(source=evaluation.record['table']['name'], id_code=evaluation.missing))
    if len(missing): write_csv(folder / MISSING_IMAGES, missing.map(safe_cell))
    else: (folder / MISSING_IMAGES).unlink(missing_ok=True)
    write_record(folder / EVALUATION, dict(evaluation.record, predictions_sha256=file_hash(folder / PREDICTIONS)))


# Texts

def images_text(record: dict) -> str:
    "Return which images are evaluated: '300 of 302 images; left out: 2 that cannot be read'"
    counts = record['counts']
    left_out = []
    if not record['include_seen'] and seen_count(record):
        left_out.append(f'{seen_count(record)} that trained or tuned the model ({counts["identical"]} identical, '
                        f'{counts["near_copies"]} near copies)')
    if counts.get('missing'): left_out.append(f'{plural(counts["missing"], "row")} without an image')
    if counts['unreadable']: left_out.append(f'{counts["unreadable"]} that cannot be read')
    if counts['ungradable_by_graders']:
        left_out.append(f'{counts["ungradable_by_graders"]} that their graders called ungradable')
    text = f'{counts["evaluated"]} of {counts["images"]} images'
    return f'{text}; left out: {", ".join(left_out)}' if left_out else text


def seen_count(record: dict) -> int:
    "Return how many graded images were used to train or tune the model"
    return record['counts']['identical'] + record['counts']['near_copies']


def own_kappa_text(record: dict) -> str:
    "Return the model's kappa on its own tables beside that on this one"
    here = measure_text(record['kappa']['deployed'], record['table']['grouped_by'])
    own = record['model']['kappa']
    return f'Kappa out-of-fold on its own tables: {own or "not recorded"}; on this table: {here}.'


def prevalence_text(record: dict) -> str:
    "Return at which prevalence of referable retinopathy PPV and NPV hold"
    prevalence = record['prevalence']
    origin = '--prevalence'
    if prevalence['of_table']: origin = "this table's own; set --prevalence to that of your programme"
    return f'{100 * prevalence["value"]:.3g} % ({origin})'


def metric_rows(record: dict) -> list[tuple[str, dict]]:
    "Return the metrics of the terminal and the report: label and measure"
    kappa, programme = record['kappa'], record['referral']['programme']
    rows = [('kappa, thresholds as deployed, all images', kappa['deployed']),
            ('kappa of the images that the gate accepts', kappa['accepted']),
            ('kappa, midpoints 0.5 1.5 2.5 3.5', kappa['midpoints']),
            ('kappa, best thresholds (in-sample bound)', kappa['best_thresholds'])]
    for key in ('referable', 'sight_threatening'):
        part = record[key]
        name = f'{key.replace("_", "-")} (grade ≥ {part["lowest_grade"]})'
        rows += [(f'AUC, {name}', part['auc']), (f'sensitivity, {name}', part['sensitivity']),
                 (f'specificity, {name}', part['specificity'])]
    rows += [(f'{name}, all rules: operating point or ungradable', programme[name.lower()])
             for name in ('sensitivity', 'specificity', 'PPV', 'NPV')]
    if record.get('eyes'):
        eyes = record['eyes']
        rows += [('kappa of images with a fellow, alone', eyes['alone']),
                 ('the same, by both eyes (fused)', eyes['fused']),
                 ('fused minus alone', eyes['gain']), ('sensitivity, referable, fused', eyes['sensitivity']),
                 ('specificity, referable, fused', eyes['specificity'])]
    return [*rows, ('coverage of prediction sets', record['prediction_sets']['coverage']),
            ('their mean size, of 5 grades', record['prediction_sets']['mean_size']),
            ('share rejected by the gate', record['gate']['rejected'])]


# On the terminal

def show_evaluation(evaluation: Evaluation) -> None:
    "Print the metrics, warnings and where the files are"
    record = evaluation.record
    over, model, name = record['table']['grouped_by'], record['model']['name'], record['table']['name']
    rows = [[label, measure_text(o), o['images']] for label, o in metric_rows(record)]
    table(f'{model} on {name}', ['metric', 'value (95 % CI)', 'images'], rows, right=('images',),
          wrap=('metric', 'value (95 % CI)'))
    say(f'{images_text(record)}.\nIntervals over {over}. PPV and NPV at a prevalence of {prevalence_text(record)}.\n'
        f'{own_kappa_text(record)}', 'dim')
    for text in record['warnings']: say(f'warning: {text}', 'yellow')
    for text in record['model']['warnings']: say(f'warning of the model: {text}', 'yellow')
    say(f'{evaluation.folder}: {HTML}, {PREDICTIONS}, {EVALUATION}')
    say(DISCLAIMER, 'dim')
    if record['synthetic']: say(SYNTHETIC_MODEL, 'yellow')


# The report

def write_report(evaluation: Evaluation) -> None:
    "Write evaluation.html"
    record, df = evaluation.record, evaluated(evaluation)
    model, name = record['model'], record['table']['name']
    sections = [Section('Kappa', kappa_section(record)),
                Section('Detection', detection_section(record, df), grid=True),
                Section('Confusion matrix and per-grade recall', grade_section(record, df), grid=True),
                *probability_sections(record, df),
                Section('Calibration of the score', calibration_section(record, df), grid=True),
                Section('Prediction sets', set_section(record)),
                *eyes_sections(record),
                Section('Ungradable images', gate_section(record)),
                Section('Subgroups', subgroup_section(record)),
                Section('Largest errors', [error_table(df)]),
                Section('Images, model and table', source_section(evaluation))]
    note = '\n'.join([
        f'{model["name"]} grades {name} ({record["table"]["csv"] or "class folders"}), {record["date"]}. '
        f'{images_text(record)}.', own_kappa_text(record), DISCLAIMER])
    warnings = [*record['warnings'], *(f'{text} (of the model)' for text in model['warnings'])]
    write_html(evaluation.folder / HTML, 'evaluation.html', title=f'{model["name"]} on {name}: evaluation', note=note,
               warning=SYNTHETIC_MODEL if record['synthetic'] else '', cards=cards(record), facts=facts(record),
               warnings=warnings, sections=sections)


def eyes_sections(record: dict) -> list[Section]:
    "Return the section on both eyes, of a model that fuses them and a table that names patients and eyes"
    return [Section('Both eyes', [eyes_table(record['eyes'])])] if record.get('eyes') else []


def evaluated(evaluation: Evaluation) -> pd.DataFrame:
    "Return the rows of predictions that the metrics are of"
    rows = evaluation.predictions
    used = (rows.error == '') & rows.diagnosis.notna()
    if not evaluation.record['include_seen']: used &= rows.seen == ''
    return rows[used].astype(dict(diagnosis=int, grade=int, score=float))


def cards(record: dict) -> list[tuple[str, str]]:
    "Return the (figure, label) pairs at the top"
    over, referable, gate = record['table']['grouped_by'], record['referable'], record['gate']['rejected']
    kappa, sets = record['kappa']['deployed'], record['prediction_sets']
    return [card(kappa, 'quadratic weighted kappa', over),
            card(referable['auc'], f'AUC, referable DR (grade ≥ {REFERABLE})', over),
            card(referable['sensitivity'], f'sensitivity, {rule_text("operating_point", record)}', over),
            card(referable['specificity'], f'specificity, {rule_text("operating_point", record)}', over),
            card(gate, 'share rejected by the gate', over),
            card(sets['coverage'], f'coverage of the {percent(sets["target"])} prediction sets', over)]


def facts(record: dict) -> list[tuple[str, str]]:
    "Return what the figures belong to: date, model and its digest, thresholds, version"
    model = record['model']
    return [('evaluated', record['date']), ('table', record['table']['name']),
            ('model', f'{model["name"]}, digest {model["key"]}'),
            ('thresholds of the grades', thresholds_text(model['thresholds'])),
            ('evaluated by', f'aptos_fastai {record["aptos_fastai"]}')]


def _intervals(record: dict) -> str: return f'95 % CI over {record["table"]["grouped_by"]}'


def kappa_section(record: dict) -> list[Table | str]:
    "Return kappa by each kind of thresholds, and what each means"
    kappa, thresholds = record['kappa'], record['model']['thresholds']
    best = kappa['best_thresholds']
    fitted = f'{thresholds_text(best["thresholds"])}; {IN_SAMPLE}' if best['thresholds'] else ''
    rows = [['as deployed, all images', thresholds_text(thresholds), kappa['deployed']],
            ['as deployed, images that the gate accepts', thresholds_text(thresholds), kappa['accepted']],
            ['midpoints', '0.50 1.50 2.50 3.50', kappa['midpoints']],
            ['best thresholds', fitted, best]]
    return [Table(['thresholds', 'values', 'images', 'kappa'],
                  [[name, text, o['images'], measure_text(o)] for name, text, o in rows],
                  f'In parentheses: {_intervals(record)} (bootstrap). The first row grades every image, so that a gate '
                  'that rejects difficult images cannot raise it.'),
            own_kappa_text(record)]


def detection_section(record: dict, df: pd.DataFrame) -> list[Figure | Table | str]:
    "Return AUC, sensitivity and specificity, what a programme gets, and the ROC curve"
    parts = [record['referable'], record['sight_threatening']]
    rows = [[f'{name} (grade ≥ {o["lowest_grade"]})', o['positives'], o['auc']['images'],
             *(measure_text(o[key]) for key in ('auc', 'sensitivity', 'specificity'))]
            for name, o in zip(('referable', 'sight-threatening'), parts, strict=True)]
    keys = 'sensitivity', 'specificity', 'ppv', 'npv', 'referred'
    rules = {rule_text(name, record): o for name, o in record['referral'].items()}
    over = f'In parentheses: {_intervals(record)}'
    return [*points_table(record),
            Table(['retinopathy', 'images with it', 'images', 'AUC', 'sensitivity', 'specificity'], rows,
                  f'By the operating points as deployed, without the gate. {over}. Macular oedema is not graded.',
                  whole=True),
            Table(['refer if', *('PPV' if k == 'ppv' else 'NPV' if k == 'npv' else k for k in keys)],
                  [[rule, *(measure_text(o[key]) for key in keys)] for rule, o in rules.items()],
                  f'PPV and NPV by Bayes at a prevalence of referable retinopathy of {prevalence_text(record)}; their '
                  'intervals have the ends of those of sensitivity and specificity. referred: share of these images.',
                  whole=True),
            *_roc(df, record)]


def points_table(record: dict) -> list[Table | str]:
    "Return the operating points: what they promise by the model's own images, and what they do here"
    points = record['model']['operating_points']
    here = {level: [record[name]] for level, name in LEVELS.items()}           # of the first point of each level …
    here[REFERABLE].append(record['referral'].get('high_specificity'))         # … and of the second
    rows = []
    for o in points:
        found = here[o['lowest_grade']].pop(0) if here[o['lowest_grade']] else None
        if not found: continue
        figures = [measure_text(of[key]) for key in ('sensitivity', 'specificity') for of in (o, found)]
        rows.append([level_text(o['lowest_grade']), f'score ≥ {o["threshold"]:.2f}', *figures])
    if not rows: return ['The model has no operating point: it refers by its grades.']
    return [Table(['detects', 'positive if', 'sensitivity of\nthe model', 'sensitivity\nhere',
                   'specificity of\nthe model', 'specificity\nhere'], rows,
                  'Of the model: cross-fitted on its validation images. Here: this table. In parentheses: '
                  f'{_intervals(record)} (Wilson).', whole=True)]


def rule_text(name: str, record: dict) -> str:
    "Return in words which images a rule of `referral` refers"
    referable = [o for o in record['model']['operating_points'] if o['lowest_grade'] == REFERABLE]
    by_score = f'score ≥ {referable[0]["threshold"]:.2f}' if referable else f'grade ≥ {REFERABLE}'
    return dict(grade=f'grade ≥ {REFERABLE}', operating_point=by_score,
                programme=f'{by_score}, uncertain or ungradable',
                high_specificity=f'score ≥ {referable[-1]["threshold"]:.2f}' if referable else '')[name]


def _roc(df: pd.DataFrame, record: dict) -> list[Figure]:
    "Return the ROC curve of referable retinopathy, if there is one"
    from sklearn.metrics import roc_curve
    area, found = record['referable']['auc'], record['referable']
    if area['value'] is None: return []
    fpr, tpr, _ = roc_curve(df.diagnosis >= REFERABLE, df.score)
    rates = {'operating_point': found} | {name: record['referral'][name] for name in ('high_specificity', 'grade')
                                          if name in record['referral']}
    points = [plots.RocPoint(o['specificity'], o['sensitivity'], rule_text(name, record)) for name, o in rates.items()]
    return [figure(f'ROC curve of referable DR: AUC {measure_text(area)}', plots.roc_curve(fpr, tpr, points),
                   f'The marks: rules as deployed, with their {_intervals(record)} (Wilson).'),
            threshold_figure(df, operating_points(record), 'Scores')]


def probability_sections(record: dict, df: pd.DataFrame) -> list[Section]:
    "Return the sections on the probabilities of the model, and its decision curve; nothing if it has none"
    found = record['probabilities']
    if not found: return []
    p = {name: df[f'p_{name}'].astype(float).to_numpy() for name in found}
    over = record['table']['grouped_by']
    referred = rules(p['referable'], called_by_score(record, df), rule_text('operating_point', record))
    return [Section('Probabilities', [brier_table(found, over), *reliability_figures(df, p, over)], grid=True),
            Section('Decision curve', decision_curve_section(
                referred, df.diagnosis, 'Probabilities and rules as deployed, without the gate.'), grid=True)]


def called_by_score(record: dict, df: pd.DataFrame) -> np.ndarray:
    "Return which images the operating point calls referable; without one, those of grade 2 and above"
    return DecisionSpec(operating_points(record)).positive(df.score, df.grade, REFERABLE)


def operating_points(record: dict) -> tuple[OperatingPoint, ...]:
    "Return the operating points of the evaluated model"
    return tuple(OperatingPoint(**o) for o in record['model']['operating_points'])


def grade_section(record: dict, df: pd.DataFrame) -> list[Figure]:
    "Return the confusion matrix and the recall of each grade"
    recall = record['recall']
    n = len(df)
    return [figure(f'Confusion matrix, n = {n} images', plots.confusion_matrix(np.array(record['confusion'])),
                   'Number of images and proportion of the true grade (row).'),
            recall_figure(recall, n, record['table']['grouped_by'])]


def calibration_section(record: dict, df: pd.DataFrame) -> list[Figure]:
    "Return the scores by true grade and the calibration curve"
    error = record['calibration']
    return [figure(f'Calibration, n = {len(df)} images', plots.calibration(df.score, df.diagnosis),
                   f'Mean error (score minus true grade) {error["mean_error"]:+.3f}, mean absolute error '
                   f'{error["mean_absolute_error"]:.3f}. On the diagonal, the score equals the mean true grade. '
                   'Vertical lines: 95 % CI of the mean over images.'),
            figure(f'Scores by true grade, n = {len(df)} images',
                   plots.score_histograms(df.score, df.diagnosis, record['model']['thresholds']),
                   'Dashed: the thresholds as deployed.')]


def set_section(record: dict) -> list[Table]:
    "Return coverage and size of the prediction sets"
    sets = record['prediction_sets']
    rows = [['all', sets['coverage']['images'], measure_text(sets['coverage'])],
            *([str(o['grade']), o['images'], measure_text(o)] for o in sets['by_grade'] if o['images'])]
    return [Table(['true grade', 'images', f'coverage (target {percent(sets["target"])})'], rows,
                  f'Images that get a grade. Mean size: {measure_text(sets["mean_size"])} grades. The target applies '
                  f'to images {SETS_CONDITION}. In parentheses: {_intervals(record)} (Wilson).')]


def gate_section(record: dict) -> list[Table | str]:
    "Return what the gate rejects, and why"
    gate, n = record['gate'], record['counts']['evaluated']
    rows = [['any reason', Bar(gate['rejected']['value'])], *([k, Bar(v / n)] for k, v in gate['reasons'].items())]
    by_graders = gate['rejected_of_ungradable']
    text = measure_text(by_graders)
    if by_graders['images']: text += f' of {by_graders["images"]} images'
    return [Table(['rejected by the gate', 'share of the graded images'], rows,
                  'Their graders graded these images. An image can have several reasons.'),
            f'Share of the images that their graders called ungradable which the gate rejects: {text}.']


def subgroup_section(record: dict) -> list[Table | str]:
    "Return a table for each column"
    if not record['subgroups']: return ['This table carries no further columns. Name some with --by COLUMN.']
    compared = [o for subgroup in record['subgroups'] for o in subgroup['values'] if o['level']]
    text = 'No subgroup has enough images to compare.'
    if compared:
        level = f'{100 * compared[0]["level"]:.4g} % ({percent(1 - ALPHA)}, corrected for all comparisons)'
        text = ('Marked where kappa, AUC or mean error differs from the other images: a bootstrap interval of '
                f'{level} of the difference excludes 0.')
    return [f'{text} Subgroups of fewer than {MIN_IMAGES} images are shown, not marked. Kappa depends on the mix of '
            f'grades, too. In parentheses: {_intervals(record)}. AUC: referable DR. '
            f'Sensitivity and specificity: of {rule_text("operating_point", record)}.',
            *(_subgroup_table(o) for o in record['subgroups'])]


def _subgroup_table(subgroup: dict) -> Table:
    "Return the table of one column"
    columns = [subgroup['column'], 'images', 'kappa', 'AUC', 'sensitivity', 'specificity', 'mean error', 'differs']
    keys = 'kappa', 'auc', 'sensitivity', 'specificity'
    rows = [[o['name'], o['images'], *(measure_text(o[key]) for key in keys), f'{o["mean_error"]["value"]:+.3f}',
             differences_text(o)] for o in subgroup['values']]
    return Table(columns, rows, f'{subgroup["column"]}: {subgroup["note"]}.' if subgroup['note'] else '')


def error_table(df: pd.DataFrame) -> Table:
    "Return the wrongly graded images whose scores are farthest from the true grade"
    wrong = df[df.grade != df.diagnosis]
    wrong = wrong.assign(error=(wrong.score - wrong.diagnosis).abs()).nlargest(LARGEST_ERRORS, 'error')
    return Table(['image', 'true grade', 'grade', 'score', 'ungradable'],
                 [[o.id_code, o.diagnosis, o.grade, f'{o.score:.2f}', o.ungradable] for o in wrong.itertuples()],
                 f'All images: {PREDICTIONS}. The true grade can be wrong, too.')


def source_section(evaluation: Evaluation) -> list[Table | str]:
    "Return which images were evaluated, how the table was understood, and what the model is"
    record = evaluation.record
    counts, model = record['counts'], record['model']
    what = 'counted all the same' if record['include_seen'] else 'left out'
    seen = f'{counts["identical"]} identical, {counts["near_copies"]} near copies ({what})'
    if record['seen_unknown']: seen += f'; {record["seen_unknown"]}'
    rows = [['images in the table', str(counts['images'])], ['evaluated', str(counts['evaluated'])],
            [f'groups ({record["table"]["grouped_by"]})', str(counts['groups'])],
            ['used to train or tune the model', seen],
            ['cannot be read', str(counts['unreadable'])],
            ['ungradable by their graders', str(counts['ungradable_by_graders'])],
            ['copies within the table', f'{plural(counts["copies"], "image")}; each counts as an image of its own'],
            ['model', f'{model["name"]}, {model["key"]}, {plural(len(model["weights"]), "network")}'],
            ['made by', f'aptos_fastai {record["aptos_fastai"]}, {record["date"]}']]
    unreadable = [f'Cannot be read: {"; ".join(record["unreadable"])}.'] if record['unreadable'] else []
    return [Table(['', ''], rows), *(f'{text}.' for text in [*evaluation.reasons, *record['notes']]), *unreadable]
