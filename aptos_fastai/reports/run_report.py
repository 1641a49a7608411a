"Write report.html of a finished run: its conclusion, its results, its errors, and the settings behind them."
from collections.abc import Callable
from dataclasses import replace

import pandas as pd

from aptos_fastai.common.console import Bars, say
from aptos_fastai.common.disclaimer import DISCLAIMER
from aptos_fastai.common.privacy import LEAVE_OUT, patient_data
from aptos_fastai.data.store import read_square, stored_column
from aptos_fastai.decisions import decision_of_record
from aptos_fastai.inference.deidentify import without_ids
from aptos_fastai.inference.explain import heatmap, overlay_heatmap
from aptos_fastai.inference.grader import Grader
from aptos_fastai.inference.model_spec import fold_model, run_model
from aptos_fastai.pipeline.summary import OUT_OF_FOLD, SYNTHETIC, largest_errors, points_text, validated
from aptos_fastai.reports.conclusion import cards, conclusion, submitted
from aptos_fastai.reports.grade_report import (
    cluster_section,
    confusion_section,
    prediction_sets,
    score_section,
    threshold_comparison,
)
from aptos_fastai.reports.html import Section, Table, embed_image, write_html
from aptos_fastai.reports.parts import eyes_table, thresholds_text
from aptos_fastai.reports.referral_report import (
    cross_fitted_rules,
    decision_curve_section,
    probability_section,
    referral_section,
)
from aptos_fastai.reports.training_report import (
    gate_section,
    learning_curves,
    settings,
    shortcut_section,
    stage_graph,
    stage_results,
    tables_section,
)
from aptos_fastai.run_folder import Run

UNCERTAIN_IMAGES = 12
BOTH_EYES = ('Figures are of images graded alone; the section "Both eyes" has those of images that are graded by both '
             'eyes of the patient.')
THUMBNAIL = 224                              # side of a gallery image, pixels


def write_report(run: Run, summary: dict, oof: pd.DataFrame, predictions: pd.DataFrame | None, bars: Bars,
                 deidentify: bool = False) -> None:
    """Write <run>/report.html from summary.json, the out-of-fold table and the test predictions (scores.csv), if any.

    `deidentify` leaves out ids and images.
    """
    if deidentify: summary = without_ids(summary)
    valid = validated(oof, run.recipe.submit.final)
    result = submitted(summary)
    sections = [*grade_sections(summary, valid, predictions), *decision_sections(run, summary, valid),
                *training_sections(run, summary, oof, bars)]
    errors, uncertain = ([], []) if deidentify else galleries(run, valid, predictions, bars)
    write_html(run.root / 'report.html', 'report.html', title=f'{run.recipe.name}: report',
               note=introduction(run, result), warning=SYNTHETIC if run.synthetic else '',
               conclusion=conclusion(summary), cards=cards(summary), facts=facts(run, summary),
               sections=sections, errors=errors, uncertain=uncertain, settings=settings(run))
    say(report_privacy_text(run, len(errors) + len(uncertain), deidentify), 'dim')


def report_privacy_text(run: Run, shown: int, deidentify: bool) -> str:
    "Return the line that says what report.html holds of patients."
    file = run.root / 'report.html'
    if run.recipe.demo: return f'{file}: holds generated images only'
    if deidentify: return f'{file}: de-identified, without ids and images'
    return patient_data(file, f'embeds {shown} images, their heat maps and ids', LEAVE_OUT)


def galleries(run: Run, valid: pd.DataFrame, predictions: pd.DataFrame | None,
              bars: Bars) -> tuple[list[dict], list[dict]]:
    "Return the images of the largest errors and, with test predictions, of the most uncertain ones."
    with bars('report: heat maps', 2, 'galleries') as bar:
        errors = error_gallery(run, valid)
        bar.to(1)
        uncertain = [] if predictions is None else most_uncertain(run, predictions)
        bar.to(2)
    return errors, uncertain


def introduction(run: Run, result: dict) -> str:
    "Return what the model was trained on, what it predicts, its limits and warnings."
    submit = run.recipe.submit
    trained_on = {table for stage in run.recipe.stages.values() for _, table in stage.sources}
    tables = []
    for name, frame in run.frames.items():
        labels = 'images' if run.recipe.tables[name].graded else 'pseudo-labelled images'
        if name in trained_on: tables.append(f'{name} ({len(frame)} {labels})')
    tested = f' Predictions: {submit.table} ({len(run.frames[submit.table])} images).' if submit.table else ''
    left_out = [f'{run.left_out}'] if run.left_out else []
    return '\n'.join([
        f'Trained on: {", ".join(tables)}.{tested}',
        *left_out,
        *([BOTH_EYES] if submit.eyes == 'fused' else []),
        f'{OUT_OF_FOLD} Exceptions are labelled.',
        *(f'Warning: {text}.' for text in result['warnings']),
        DISCLAIMER])


def facts(run: Run, summary: dict) -> list[tuple[str, str]]:
    "Return what the figures belong to: date, recipe, model and its digest, thresholds, version, owner."
    model, recipe = run_model(run.root, summary), run.recipe
    versions = run.finished_record(list(recipe.stages)[-1], 0)['versions']
    git = f' (git {versions["git"]})' if versions['git'] else ''
    owner = ', '.join(filter(None, [recipe.owner, recipe.contact]))
    return [('finished', summary['date']), ('recipe', f'{recipe.name} ({recipe.path.name})'),
            ('model', f'{model.name}, digest {model.key}'),
            ('thresholds of the grades', thresholds_text(model.thresholds)),
            ('trained by', f'aptos_fastai {versions["aptos_fastai"]}{git}'),
            *([('owner', owner)] if owner else [])]


def grade_sections(summary: dict, valid: pd.DataFrame, predictions: pd.DataFrame | None) -> list[Section]:
    "Return the sections that show how well the model grades."
    over, thresholds = submitted(summary)['resampled'], summary['submission']['thresholds']
    eyes = summary['submission'].get('eyes')
    return [Section('Confusion matrix and per-grade recall', confusion_section(submitted(summary)), grid=True),
            Section('Scores and grades', score_section(summary, valid, predictions, thresholds), grid=True),
            Section('Prediction sets', prediction_sets(summary, over, predictions), grid=True),
            *([Section('Both eyes', eyes_section(eyes))] if eyes else []),
            Section('Kappa by cluster', cluster_section(summary))]


def eyes_section(eyes: dict) -> list[Table | str]:
    "Return how well images are graded by both eyes, and by which formula."
    fusion = eyes['fusion']
    own, fellow = f'{fusion["own"]:.3f} × own score', f'{fusion["fellow"]:.3f} × mean score of the other eye'
    return ['Where there is a gradable image of the patient\'s other eye, the model grades by both. All other figures '
            'of this report but those of test images are of images graded alone.', eyes_table(eyes['results']),
            f'Fused score = {fusion["intercept"]:.3f} + {own} + {fellow}. '
            f'Thresholds: {thresholds_text(eyes["thresholds"])}.',
            f'Operating points of fused images: {points_text(eyes["decision"])}']


def decision_sections(run: Run, summary: dict, valid: pd.DataFrame) -> list[Section]:
    "Return the sections that show how well the model refers."
    result, decision = submitted(summary), summary['decision']
    spec, over, parts = decision_of_record(result['decision']), result['resampled'], run.parts(valid)
    referred = cross_fitted_rules(valid, parts, spec)
    return [Section('Referral', referral_section(valid, spec, decision['programme'], over),
                    grid=True),
            Section('Probabilities', probability_section(valid, parts, decision['brier'], over), grid=True),
            Section('Decision curve', decision_curve_section(
                referred, valid.diagnosis, 'Probabilities and operating point are cross-fitted.'), grid=True)]


def training_sections(run: Run, summary: dict, oof: pd.DataFrame, bars: Bars) -> list[Section]:
    "Return the sections on stages, images and tables."
    return [Section('Results by stage', [stage_graph(run, summary), *stage_results(run, summary)]),
            Section('Thresholds', [threshold_comparison(run, oof)]),
            Section('Learning curves', learning_curves(run)),
            Section('Shortcut check', shortcut_section(run, bars, submitted(summary))),
            Section('Ungradable images', gate_section(summary['gate'])),
            Section('Tables', [tables_section(run)])]


def error_gallery(run: Run, valid: pd.DataFrame) -> list[dict]:
    "Return the wrongly graded validation images whose scores are farthest from the true grade."
    wrong = largest_errors(valid)
    return gallery(run, wrong, lambda o: f'{o.id_code}: true {o.diagnosis}, predicted {o.grade} (score {o.score:.2f})')


def most_uncertain(run: Run, predictions: pd.DataFrame) -> list[dict]:
    "Return the predictions with the largest score SD."
    df = predictions[predictions.score_sd.notna()].nlargest(UNCERTAIN_IMAGES, 'score_sd')
    df = df.assign(source=run.recipe.submit.table, fold=0)
    return gallery(run, df, lambda o: f'{o.id_code}: predicted {o.grade} ({o.grade_low}–{o.grade_high}), '
                                      f'score {o.score:.2f} ± {o.score_sd:.2f}')


def gallery(run: Run, df: pd.DataFrame, caption: Callable) -> list[dict]:
    """Return image, heat map and caption of each row of `df` (source, id_code, score, fold).

    The networks of the row's fold explain the image; `caption` makes text of a row.
    """
    stored = {name: frame.set_index('id_code') for name, frame in run.frames.items()}
    members = run.member_weights(run.recipe.submit.final)
    graders = {k: Grader(fold_model(run.root, members, k), run.root) for k in df.fold.unique()}
    out = []
    for row in df.itertuples():
        grader, paths = graders[row.fold], stored[row.source].loc[row.id_code]
        squares = {size: read_square(paths[stored_column(side)], replace(run.prep, size=side), size)[None]
                   for size, side in grader.model.prepared.items()}
        square = read_square(paths.stored, run.prep, THUMBNAIL)
        box = (0, THUMBNAIL, 0, THUMBNAIL)
        overlay = overlay_heatmap(square, heatmap(grader, squares)[0], box, row.score)
        out.append(dict(image=embed_image(square, row.id_code),
                        heatmap=embed_image(overlay, f'{row.id_code}: heat map'),
                        caption=caption(row)))
    return out
