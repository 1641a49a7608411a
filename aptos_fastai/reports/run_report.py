"Write report.html of a finished run: its results, its errors, and the settings behind them."
from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Plot

from aptos_fastai.common.console import Bars, format_duration
from aptos_fastai.common.disclaimer import DISCLAIMER
from aptos_fastai.data.duplicates import duplicates_table
from aptos_fastai.data.store import read_prepared, read_square, store_folder
from aptos_fastai.inference.explain import heatmap, overlay_heatmap
from aptos_fastai.inference.grader import Grader
from aptos_fastai.inference.model_spec import fold_model
from aptos_fastai.metrics import (
    GRADES,
    MIDPOINTS,
    PUBLISHED_THRESHOLDS,
    REFERABLE,
    PredictionSets,
    apply_thresholds,
    auc,
    confusion,
    kappa_interval,
    proportion_interval,
    quadratic_kappa,
    sensitivity_at,
    thresholds_or_midpoints,
)
from aptos_fastai.pipeline.clusters import MIN_IMAGES
from aptos_fastai.pipeline.summary import (
    EPOCH_CHOSEN,
    OUT_OF_FOLD,
    SETS_CONDITION,
    SYNTHETIC,
    all_warnings,
    by_value,
    interval_text,
    out_of_fold_grades,
    tables_text,
    threshold_setting,
    validated,
)
from aptos_fastai.recipe import Stage, parse_thresholds
from aptos_fastai.reports import plots
from aptos_fastai.reports.html import Bar, Figure, Section, Table, embed_image, write_html
from aptos_fastai.reports.shortcuts import CROP_SHAPE, IMAGE_SIZE, MAX_IMAGES, shortcut_check
from aptos_fastai.run_folder import HISTORY, Run

STAGES_A_FIGURE = 4                          # of the learning curves
GALLERY_IMAGES = 12
THUMBNAIL = 224                              # side of a gallery image, pixels


def write_report(run: Run, summary: dict, oof: pd.DataFrame, predictions: pd.DataFrame | None, bars: Bars):
    "Write <run>/report.html from summary.json, the out-of-fold table and the test predictions (scores.csv), if any."
    final = run.recipe.submit.final
    valid = validated(oof, final)
    result = next(r for r in summary['stages'] if r['stage'] == final)
    sections = result_sections(run, summary, oof, valid, predictions)
    sections += [Section('Shortcut check', shortcut_section(run, bars, result)),
                 Section('Ungradable images', gate_section(summary['gate'])),
                 Section('Tables', [tables_section(run)])]
    with bars('report: heat maps', 2, 'galleries') as bar:
        errors = largest_errors(run, valid)
        bar.to(1)
        uncertain = [] if predictions is None else most_uncertain(run, predictions)
        bar.to(2)
    write_html(run.root / 'report.html', 'report.html', title=f'{run.recipe.name}: report',
               note=introduction(run, result), warning=SYNTHETIC if run.recipe.demo else '',
               cards=cards(run, result, valid, predictions),
               sections=sections, errors=errors, uncertain=uncertain, settings=settings(run))


def introduction(run: Run, result: dict) -> str:
    "Return the first lines of the report: what it is, what the model was trained on, its limits and warnings."
    submit = run.recipe.submit
    trained_on = {table for stage in run.recipe.stages.values() for _, table in stage.sources}
    tables = []
    for name, frame in run.frames.items():
        labels = 'images' if run.recipe.tables[name].graded else 'pseudo-labelled images'
        if name in trained_on: tables.append(f'{name} ({len(frame)} {labels})')
    tested = f' Predictions: {submit.table} ({len(run.frames[submit.table])} images).' if submit.table else ''
    left_out = [f'{run.left_out}'] if run.left_out else []
    return '\n'.join([
        f'Results of the training run {run.recipe.name} ({run.recipe.path.name}): '
        f'{submit.final} grades diabetic retinopathy (DR) from 0 to 4 in fundus images.',
        f'Trained on: {", ".join(tables)}.{tested}',
        *left_out,
        f'{OUT_OF_FOLD} Where a metric is not, it is labelled.',
        *(f'Warning: {text}.' for text in result['warnings']),
        DISCLAIMER])


def cards(run: Run, result: dict, valid: pd.DataFrame, predictions: pd.DataFrame | None) -> list[tuple[str, str]]:
    "Return the (figure, label) pairs at the top of the report."
    submit = run.recipe.submit
    over = run.grouped_by(valid)
    kappa, kappa_ci = interval_text(result['kappa'], result['kappa_interval'], over).split(' ', 1)
    area, *area_interval = auc(valid.score, valid.diagnosis >= REFERABLE, valid.group)
    area_text, area_ci = interval_text(area, area_interval, over).split(' ', 1) if np.isfinite(area) else ('none', '')
    distance = (valid.grade - valid.diagnosis).abs()
    thresholds = thresholds_text(run.thresholds(submit.final, submit.thresholds))
    last = ('none', f'predictions: no test table; thresholds {thresholds}')
    if predictions is not None:
        last = str(len(predictions)), f'predictions for {submit.table}, thresholds {thresholds}'
    return [(kappa, f'quadratic weighted kappa {kappa_ci}, {submit.final}, out-of-fold, n = {len(valid)}'),
            (percent((distance == 0).mean()), f'accuracy; {percent((distance <= 1).mean())} within one grade'),
            (area_text, f'AUC {area_ci}, referable DR (grade ≥ {REFERABLE})'),
            last]


def result_sections(run: Run, summary: dict, oof: pd.DataFrame, valid: pd.DataFrame,
                    predictions: pd.DataFrame | None) -> list[Section]:
    "Return the sections that show how well the stages and the final model (`valid`) predict."
    over = run.grouped_by(valid)
    return [Section('Results by stage', [stage_graph(run, summary), *stage_results(run, summary)]),
            Section('Kappa by cluster', cluster_section(run, summary)),
            Section('Thresholds', [threshold_comparison(run, oof)]),
            Section('Confusion matrix and per-grade recall', confusion_section(valid, over), grid=True),
            Section(f'Referable DR (grade ≥ {REFERABLE})', referable_section(valid, over), grid=True),
            Section('Calibration', calibration_section(run, valid, predictions), grid=True),
            Section('Prediction sets', prediction_sets(run, summary, valid, predictions), grid=True),
            Section('Learning curves', learning_curves(run))]


def figure(title: str, plot: Plot, caption: str = '') -> Figure:
    "Return a plot with its title and caption, as SVG."
    return Figure(title, plots.to_svg(plot, title), caption)


def percent(share: float) -> str:
    "Return 0.153 as '15 %'."
    return f'{100 * share:.0f} %'


def thresholds_text(thresholds: Iterable[float]) -> str:
    "Return the thresholds with two decimals, separated by spaces."
    return ' '.join(f'{t:.2f}' for t in thresholds)


def stage_graph(run: Run, summary: dict) -> Figure:
    "Draw the stages, the weights and labels they take from each other, and their kappas."
    recipe = run.recipe
    results = {r['stage']: r for r in summary['stages']}
    depth: dict[str, int] = {}
    edges = []
    for name in recipe.order:
        parents = dict.fromkeys(recipe.nodes[name].parents)
        depth[name] = 1 + max((depth[p] for p in parents), default=-1)
        teachers = {teacher for teacher, _ in recipe.stages[name].sources} if name in recipe.stages else set()
        edges += [(parent, name, parent in teachers) for parent in parents]
    texts = {name: _box_text(run, name, results[name]) for name in recipe.order}
    return figure('Training stages', plots.stage_graph(depth, edges, texts, recipe.submit.final),
                  'Solid arrows: weights or scores. Dashed arrows: pseudo-labels. The darker box makes the submission.')


def _box_text(run: Run, name: str, result: dict) -> str:
    "Return what the graph says of a stage or ensemble."
    stage = run.recipe.stages.get(name)
    kappa = f'kappa {result["kappa"]:.3f}'
    if not stage: return f'mean of {len(run.recipe.members(name))}, {kappa}'
    return f'{stage.arch}\n{stage.size} px, {format_duration(result["seconds"])}, {kappa}'


def stage_results(run: Run, summary: dict) -> list[Figure | Table]:
    "Return the kappa of each stage as a plot and as a table."
    rows = summary['stages']
    fewest, most = min(r['validated'] for r in rows), max(r['validated'] for r in rows)
    images = str(most) if fewest == most else f'{fewest} to {most}'
    plot = plots.interval_dots([r['stage'] for r in rows], [r['kappa'] for r in rows],
                               [r['kappa_interval'] for r in rows], 'quadratic weighted kappa')
    columns = ['stage', 'trained on', 'network', 'validation images', 'kappa', 'thresholds', 'time']
    return [figure(f'Out-of-fold quadratic weighted kappa by stage, n = {images} images', plot,
                   'Thresholds are fixed, or fitted on other images than those they grade (cross-fitted); '
                   f'{EPOCH_CHOSEN}. Lines: 95 % CI, bootstrap over '
                   f'{by_value({r["stage"]: r["resampled"] for r in rows})}.'),
            Table(columns, [_stage_row(run, r) for r in rows]),
            *(f'Warning: {text}.' for text in all_warnings(rows))]


def _stage_row(run: Run, result: dict) -> list:
    "Return the table row of a stage or ensemble."
    stage = run.recipe.stages.get(result['stage'])
    method = result['threshold_method']
    if parse_thresholds(method): method = 'fixed'
    return [result['stage'],
            tables_text(stage) if stage else 'mean of ' + ', '.join(result['tables']),
            f'{stage.arch} {stage.size} px' if stage else '',
            result['validated'],
            interval_text(result['kappa'], result['kappa_interval'], result['resampled']),
            f'{thresholds_text(result["thresholds"])} ({method})',
            format_duration(result['seconds']) if stage else '']


def cluster_section(run: Run, summary: dict) -> list[Table | str]:
    "Return the out-of-fold kappa of the submitted model by camera, visual cluster and range of ids."
    over = next(o for o in summary['stages'] if o['stage'] == summary['submission']['node'])['resampled']
    columns = ['cluster', 'images', f'kappa (95 % CI over {over})', 'thresholds of\nthe other clusters',
               'mean\nabsolute error']
    tables = []
    for kind in summary['clusters']:
        rows = [[o['name'], o['images'],
                 'one grade' if o['kappa'] is None else interval_text(o['kappa'], o['kappa_interval']),
                 '' if o['kappa_others'] is None else f'{o["kappa_others"]:.3f}',
                 f'{o["mean_error"]:.2f}'] for o in kind['clusters']]
        drop = 'Fewer than two clusters can be compared.'
        if kind['drop'] is not None:
            drop = (f'Drop from the highest to the lowest kappa without others: {kind["drop"]:.2f}; 95 % of random '
                    f'clusters: up to {kind["drop_by_chance"]:.2f}.')
        caption = f'{kind["kind"].capitalize()}: {kind["meaning"]}. {drop}'
        tables.append(Table([kind['kind'], *columns[1:]], rows, caption))
    return [f'Out-of-fold kappa of images that resemble each other. Clusters of fewer than {MIN_IMAGES} images are '
            'merged into others, which is not compared. A drop well above chance warns that other cameras or clinics '
            'can be graded worse. This is no test on other images: the networks have trained on images of every '
            'cluster. For "thresholds of the other clusters", only the thresholds are fitted without the cluster. '
            'Kappa also depends on the mix of grades in a cluster.', *tables]


def threshold_comparison(run: Run, oof: pd.DataFrame) -> Table:
    "Compare the kappa of each stage between the ways to set its thresholds."
    def kappa(grades, valid):
        interval = kappa_interval(grades, valid.diagnosis, valid.group)
        text = interval_text(quadratic_kappa(grades, valid.diagnosis), interval)
        return text.replace(' (', '\n(')     # two lines: the table fits the page
    rows, over = [], {}
    for name in run.recipe.order:
        valid = validated(oof, name)
        grades = [
            apply_thresholds(valid.score, MIDPOINTS),
            apply_thresholds(valid.score, PUBLISHED_THRESHOLDS),
            out_of_fold_grades(run, valid, 'optimal'),
            out_of_fold_grades(run, valid, 'regularised'),
        ]
        best, _ = thresholds_or_midpoints('optimal', valid.score, valid.diagnosis)
        in_sample = quadratic_kappa(apply_thresholds(valid.score, best), valid.diagnosis)
        kappas = [kappa(g, valid) for g in grades]
        over[name] = run.grouped_by(valid)
        rows.append([name, *kappas, f'{in_sample:.3f}', threshold_setting(run, name)])
    columns = ['stage', 'midpoints\n0.5 1.5 2.5 3.5', 'published\n0.75 1.5 2.5 3.5', 'optimal,\ncross-fitted',
               'regularised,\ncross-fitted', 'optimal,\nin-sample', 'used in this run']
    return Table(columns, rows,
                 'Kappa of each stage for each way to set the thresholds. Cross-fitted: the thresholds for a fold '
                 '(for one of five random parts, if fewer than three folds are trained) are fitted on the others. '
                 'In-sample: fitted on the images they grade, not out-of-fold, too high. '
                 f'In parentheses: 95 % CI over {by_value(over)}.')


def confusion_section(valid: pd.DataFrame, over: str) -> list[Figure]:
    "Return the confusion matrix and the recall of each grade."
    counts = confusion(valid.grade, valid.diagnosis)
    correct, n = np.diag(counts), counts.sum(1)
    by_grade = [valid[valid.diagnosis == grade] for grade in range(GRADES)]
    intervals = [proportion_interval(o.grade == o.diagnosis, o.group) for o in by_grade]
    return [figure(f'Confusion matrix, n = {len(valid)} images', plots.confusion_matrix(counts),
                   'Number of images and proportion of the true grade (row), out-of-fold.'),
            figure(f'Per-grade recall, n = {len(valid)} images',
                   plots.recall_bars(correct / np.maximum(n, 1), intervals, n),
                   f'Proportion of each true grade that is predicted correctly. Lines: 95 % CI over {over} (Wilson).')]


def referable_section(valid: pd.DataFrame, over: str) -> list[Figure | Table | str]:
    "Return the ROC curve and the operating points of referable against non-referable DR."
    from sklearn.metrics import roc_curve
    referable = (valid.diagnosis >= REFERABLE).to_numpy()
    area, *interval = auc(valid.score, referable, valid.group)
    if not np.isfinite(area):
        kind = 'referable' if referable.all() else 'non-referable'
        return [f'No ROC curve: all validation images are {kind}.']
    fpr, tpr, _ = roc_curve(referable, valid.score)
    points, rows = operating_points(valid, referable)
    counts = f'n = {referable.sum()} referable + {(~referable).sum()} non-referable'
    return [figure(f'ROC curve: AUC {interval_text(area, interval, over)}, {counts}', plots.roc_curve(fpr, tpr, points),
                   f'Out-of-fold scores. CI: {"DeLong" if over == "images" else "Obuchowski 1997"}; it has no width at '
                   'an AUC of 1.'),
            Table(['referable if', 'sensitivity', 'specificity'], rows,
                  'The score thresholds are chosen on these images, for a specificity of 90 % and 95 %: in-sample. '
                  f'The grade thresholds are cross-fitted or fixed. In parentheses: 95 % CI over {over} (Wilson).')]


def operating_points(valid: pd.DataFrame, referable: np.ndarray) -> tuple[list[tuple], list[list[str]]]:
    "Return the points on the ROC curve (1 - specificity, sensitivity, label) and the rows of the table."
    points, rows = [], []
    for specificity in (.90, .95):
        sensitivity, threshold = sensitivity_at(valid.score, referable, specificity)
        false_positives = 1 - (valid.score[~referable] < threshold).mean()
        points.append((false_positives, sensitivity,
                       f'sensitivity {percent(sensitivity)} at {percent(specificity)} specificity'))
        predicted = valid.score >= threshold
        rows.append([f'score ≥ {threshold:.2f}', *_sensitivity_specificity(valid, predicted, referable)])
    rows.append([f'grade ≥ {REFERABLE}', *_sensitivity_specificity(valid, valid.grade >= REFERABLE, referable)])
    return points, rows


def _sensitivity_specificity(valid: pd.DataFrame, predicted: pd.Series, referable: np.ndarray) -> list[str]:
    "Return both with their Wilson intervals."
    return [_share_text(predicted[referable], valid.group[referable]),
            _share_text(~predicted[~referable], valid.group[~referable])]


def _share_text(correct: pd.Series, groups: pd.Series) -> str:
    "Return the proportion of True values with its Wilson interval."
    return interval_text(correct.mean(), proportion_interval(correct, groups))


def calibration_section(run: Run, valid: pd.DataFrame, predictions: pd.DataFrame | None) -> list[Figure]:
    "Return the scores by true grade, the calibration curve and the grade distributions."
    submit = run.recipe.submit
    thresholds = run.thresholds(submit.final, submit.thresholds)
    correlation = np.corrcoef(valid.score, valid.diagnosis)[0, 1]
    error = np.abs(valid.score - valid.diagnosis).mean()
    true = np.concatenate([run.frames[name].diagnosis.dropna().astype(int) for name in valid.source.unique()])
    groups = {'true, graded tables': true, 'predicted, validation': valid.grade.to_numpy()}
    caption = ''
    if predictions is not None:
        groups['predicted, test'] = predictions.grade.to_numpy()
        shift = np.abs(_grade_shares(predictions.grade) - _grade_shares(valid.grade)).sum() / 2
        caption = (f'Total variation distance between the predicted grades of validation and test: {shift:.2f} '
                   '(0: equal proportions; 1: no common grade). Possible causes: other patients, another camera, '
                   'chance.')
    return [figure(f'Scores by true grade, n = {len(valid)} images',
                   plots.score_histograms(valid.score, valid.diagnosis, thresholds),
                   f'Pearson correlation {correlation:.3f}, mean absolute error {error:.3f}, out-of-fold.'),
            figure(f'Calibration, n = {len(valid)} images', plots.calibration(valid.score, valid.diagnosis),
                   'On the diagonal, the score equals the mean true grade. Vertical lines: 95 % CI of the mean over '
                   'images.'),
            figure('Grade distribution', plots.grade_distribution(groups), caption)]


def _grade_shares(grades: pd.Series) -> np.ndarray: return np.bincount(grades, minlength=GRADES)[:GRADES] / len(grades)


def prediction_sets(run: Run, summary: dict, valid: pd.DataFrame,
                    predictions: pd.DataFrame | None) -> list[Table | str]:
    "Return the empirical coverage and the size of the prediction sets; each part by sets fitted on the others."
    coverage, parts = run.recipe.submit.coverage, run.parts(valid)
    low, high = np.empty(len(valid), int), np.empty(len(valid), int)
    for part in np.unique(parts):
        test, fit = valid[parts == part], valid[parts != part]
        sets = PredictionSets(coverage).fit(fit.score, fit.diagnosis)
        low[parts == part], high[parts == part] = sets.predict(test.score, test.grade)
    covered, size = (low <= valid.diagnosis) & (valid.diagnosis <= high), high - low + 1
    groups = {'all': np.full(len(valid), True)}
    for grade in range(GRADES): groups[str(grade)] = (valid.diagnosis == grade).to_numpy()
    rows = [[name, int(group.sum()), _share_text(covered[group], valid.group[group]), f'{size[group].mean():.2f}']
            for name, group in groups.items() if group.any()]
    columns = ['true grade', 'images', f'empirical coverage\n(target {percent(coverage)})', 'mean set size']
    return [Table(columns, rows,
                  'Conformal prediction sets, measured out-of-fold: the sets of each fold (of five random parts, if '
                  'fewer than three folds are trained) are fitted on the others and use the scores of one fold. The '
                  'predictions use the scores of all folds (CV+). '
                  f'In parentheses: 95 % CI over {run.grouped_by(valid)} (Wilson). '
                  f'The target applies to images {SETS_CONDITION}. '
                  'grade_low to grade_high in scores.csv are the sets of the predictions.'),
            *(f'Caution: {text}.' for text in summary['submission']['cautions']),
            *_set_sizes(predictions)]


def _set_sizes(predictions: pd.DataFrame | None) -> list[Table]:
    "Return how many predictions have a set of each size."
    if predictions is None: return []
    sizes = (predictions.grade_high - predictions.grade_low + 1).value_counts().sort_index()
    return [Table(['set size (grades)', 'predictions', 'proportion'],
                  [[int(k), int(n), Bar(n / len(predictions))] for k, n in sizes.items()])]


def learning_curves(run: Run) -> list[Figure]:
    "Return the learning curves, `STAGES_A_FIGURE` stages a figure."
    histories = {name: [pd.read_csv(run.fold_dir(name, k) / HISTORY) for k in range(stage.folds)]
                 for name, stage in run.recipe.stages.items()}
    names = list(histories)
    chunks = [names[i:i + STAGES_A_FIGURE] for i in range(0, len(names), STAGES_A_FIGURE)]
    out = []
    for i, chunk in enumerate(chunks, 1):
        title = 'Learning curves' if len(chunks) == 1 else f'Learning curves ({i} of {len(chunks)})'
        out.append(figure(title, plots.learning_curves({name: histories[name] for name in chunk}),
                          'One line per fold. Blue: training loss. Orange: validation loss. Green: validation kappa, '
                          'by fixed thresholds or by thresholds fitted to the same images (in-sample). Red dot: the '
                          f'epoch kept; {EPOCH_CHOSEN}.'))
    return out


def shortcut_section(run: Run, bars: Bars, result: dict) -> list[Table | str]:
    "Return the kappa of each set of camera features, and what it means."
    n = len(run.oof(run.recipe.submit.final))
    with bars('report: shortcut check', min(n, MAX_IMAGES), 'images') as bar: found = shortcut_check(run, bar)
    over = result['resampled']
    rows = [[name, images, interval_text(kappa, interval, over)] for name, images, kappa, interval in found]
    kappa = interval_text(result['kappa'], result['kappa_interval'], over)
    rows.append([f'for comparison: {run.recipe.submit.final}', n, kappa])
    return ['A random forest predicts the grades from features of the camera, without the retina. Where its kappa is '
            'above 0, a network can learn the camera instead of the disease.',
            Table(['features', 'images', 'kappa'], rows, _shortcut_findings(found))]


def _shortcut_findings(found: list[tuple[str, int, float, tuple[float, float]]]) -> str:
    "Say what the kappas of the camera features mean."
    meaning = {
        IMAGE_SIZE: 'cameras correlate with grades; [images] crop = retina hides the image size from the network',
        CROP_SHAPE: "the crop's shape identifies the camera, and cameras correlate with grades; the network sees it",
    }
    sentences = [f'{name}: kappa {kappa:.2f}: {meaning[name]}.' for name, _, kappa, (low, _) in found
                 if name in meaning and low > 0]
    if not sentences: sentences = ["Neither the image size nor the crop's shape predicts the grades here."]
    sentences.append('File size, colour and contrast depend on the camera and on lesions: a kappa above 0 there does '
                     'not prove a shortcut.')
    return ' '.join(sentences)


def gate_section(gate: dict) -> list[Table | str]:
    "Return how many validation and test images the gate refuses, and why; `gate` is that of summary.json."
    titles = {'validation': 'validation images', 'test': 'test images'}
    parts = [gate[name] for name in titles if name in gate]
    names = dict.fromkeys(name for part in parts for name in part['reasons'])
    counts = [('any reason', [part['ungradable'] for part in parts]),
              *((name, [part['reasons'].get(name, 0) for part in parts]) for name in names)]
    rows = [[name, *(f'{k} of {part["images"]} ({100 * k / max(part["images"], 1):.1f} %)'
                     for k, part in zip(numbers, parts, strict=True))] for name, numbers in counts]
    return ['Images that the gate rejects get no grade. The metrics of this report count every '
            'validation image, and the submission grades every test image: scores.csv names the ungradable ones.',
            Table(['reason', *(title for name, title in titles.items() if name in gate)], rows,
                  'For validation images the distance from the training images is out-of-fold. Its limit rejects at '
                  'most the fraction [gate] reject of them.')]


def tables_section(run: Run) -> Table:
    "Return the number of images, grades, quality flags and duplicates of each table."
    duplicates = duplicates_table(run.frames)
    columns = ['table', 'images', 'grades 0 / 1 / 2 / 3 / 4', 'unreadable', 'no circle found', 'quality flags',
               'duplicates', 'with conflicting grades']
    return Table(columns, [_table_row(run, name, duplicates[duplicates.source == name]) for name in run.frames],
                 'The folder of the run lists the duplicates in duplicates.csv.' if len(duplicates) else '')


def _table_row(run: Run, name: str, duplicates: pd.DataFrame) -> list:
    "Return the row of a table."
    frame = run.frames[name]
    prepared = read_prepared(store_folder(frame, run.store, run.prep))
    flags = prepared['flags'].str.split().explode().value_counts()
    readable = prepared[prepared.error == '']
    graded = run.recipe.tables[name].graded
    return [name, len(frame),
            ' / '.join(str((frame.diagnosis == grade).sum()) for grade in range(GRADES)) if graded else 'ungraded',
            len(prepared) - len(readable),
            int((readable.how != 'circle').sum()),
            ', '.join(f'{flag} {count}' for flag, count in flags.items()) or 'none',
            len(duplicates),
            int(duplicates.conflict.sum())]


def largest_errors(run: Run, valid: pd.DataFrame) -> list[dict]:
    "Return the wrongly graded validation images whose scores are farthest from the true grade."
    wrong = valid[valid.grade != valid.diagnosis]
    wrong = wrong.assign(error=(wrong.score - wrong.diagnosis).abs()).nlargest(GALLERY_IMAGES, 'error')
    return gallery(run, wrong, lambda o: f'{o.id_code}: true {o.diagnosis}, predicted {o.grade} (score {o.score:.2f})')


def most_uncertain(run: Run, predictions: pd.DataFrame) -> list[dict]:
    "Return the predictions with the largest score SD."
    df = predictions[predictions.score_sd.notna()].nlargest(GALLERY_IMAGES, 'score_sd')
    df = df.assign(source=run.recipe.submit.table, fold=0)
    return gallery(run, df, lambda o: f'{o.id_code}: predicted {o.grade} ({o.grade_low}–{o.grade_high}), '
                                      f'score {o.score:.2f} ± {o.score_sd:.2f}')


def gallery(run: Run, df: pd.DataFrame, caption: Callable) -> list[dict]:
    """Return image, heat map and caption of each row of `df` (source, id_code, score, fold).

    The networks of the row's fold explain the image; `caption` makes text of a row.
    """
    stored = {name: frame.set_index('id_code').stored for name, frame in run.frames.items()}
    members = run.recipe.members(run.recipe.submit.final)
    graders = {k: Grader(fold_model(run.root, members, k), run.root) for k in df.fold.unique()}
    out = []
    for row in df.itertuples():
        grader, path = graders[row.fold], stored[row.source][row.id_code]
        sizes = {m.size for m in grader.model.members}
        squares = {size: read_square(path, run.prep, size)[None] for size in sizes}
        square = read_square(path, run.prep, THUMBNAIL)
        box = (0, THUMBNAIL, 0, THUMBNAIL)
        overlay = overlay_heatmap(square, heatmap(grader, squares)[0], box, row.score)
        out.append(dict(image=embed_image(square, row.id_code),
                        heatmap=embed_image(overlay, f'{row.id_code}: heat map'),
                        caption=caption(row)))
    return out


def settings(run: Run) -> list[Table]:
    "Return every key of the recipe and the versions of the packages."
    recipe, stages = run.recipe, run.recipe.stages
    differing, common = [], []
    for key in Stage.__dataclass_fields__:
        if key == 'name': continue
        values = [_value_text(getattr(stage, key)) for stage in stages.values()]
        if len(set(values)) > 1: differing.append([key, *values])
        else: common.append(f'{key} = {values[0] or "(empty)"}')
    rows = [['stage, all', ', '.join(common)]]
    for section in ('images', 'augment', 'submit'):
        keys = vars(getattr(recipe, section)).items()
        rows.append([section, ', '.join(f'{key} = {_value_text(value)}' for key, value in keys)])
    rows.append(['recipe', f'seed = {recipe.seed}, splits = {recipe.splits}, conflicts = {recipe.conflicts}'])
    versions = run.record(list(stages)[-1], 0)['versions']
    return [Table(['key', *stages], differing), Table(['section', 'keys'], rows),
            Table(['package', 'version'], [[name, version] for name, version in versions.items() if version])]


def _value_text(value) -> str: return ' '.join(map(str, value)) if isinstance(value, tuple) else str(value)
