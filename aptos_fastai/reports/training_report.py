"Sections of the run's report on its training: stages, learning curves, shortcut check, gate, tables, settings."
import pandas as pd

from aptos_fastai.common.console import Bars, format_duration
from aptos_fastai.data.duplicates import duplicates_table
from aptos_fastai.metrics import GRADES
from aptos_fastai.pipeline.summary import EPOCH_CHOSEN, all_warnings, by_value, interval_text, mean_text, tables_text
from aptos_fastai.recipe.sections import General, Stage, parse_thresholds
from aptos_fastai.reports import plots
from aptos_fastai.reports.html import Figure, Table
from aptos_fastai.reports.parts import figure, thresholds_text
from aptos_fastai.reports.shortcuts import CROP_SHAPE, IMAGE_SIZE, MAX_IMAGES, shortcut_check
from aptos_fastai.run_folder import HISTORY, Run

STAGES_A_FIGURE = 4                          # of the learning curves


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


def stage_results(run: Run, summary: dict) -> list[Figure | Table | str]:
    "Return the kappa of each stage as a plot and as a table."
    rows = summary['stages']
    fewest, most = min(r['validated'] for r in rows), max(r['validated'] for r in rows)
    images = str(most) if fewest == most else f'{fewest} to {most}'
    plot = plots.interval_dots([r['stage'] for r in rows], [r['kappa'] for r in rows],
                               [r['kappa_interval'] for r in rows], 'quadratic weighted kappa')
    columns = ['stage', 'trained on', 'network', 'validation\nimages', 'kappa', 'thresholds', 'time']
    return [figure(f'Out-of-fold quadratic weighted kappa by stage, n = {images} images', plot,
                   'Thresholds are fixed, or fitted on other images than those they grade (cross-fitted), as are '
                   'fitted weights of an ensemble; '
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
            tables_text(stage) if stage else mean_text(result),
            f'{stage.arch} {stage.size} px' if stage else '',
            result['validated'],
            interval_text(result['kappa'], result['kappa_interval'], result['resampled']),
            f'{thresholds_text(result["thresholds"])} ({method})',
            format_duration(result['seconds']) if stage else '']


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
    prepared = run.prepared_record(name)
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


def settings(run: Run) -> list[Table]:
    "Return every key of the recipe and the versions of the packages."
    recipe, stages = run.recipe, run.recipe.stages
    differing, common = [], []
    for key in Stage.__dataclass_fields__:
        if key == 'name': continue
        values = [_value_text(getattr(stage, key)) for stage in stages.values()]
        if len(set(values)) > 1: differing.append([key, *values])
        else: common.append(f'{key} = {values[0]}')
    rows = [['stage, all', ', '.join(common)]]
    for section in ('images', 'augment', 'submit', 'gate', 'refer'):
        keys = vars(getattr(recipe, section)).items()
        rows.append([section, ', '.join(f'{key} = {_value_text(value)}' for key, value in keys)])
    keys = [(key, getattr(recipe, key)) for key in General.__dataclass_fields__]
    rows.append(['recipe', ', '.join(f'{key} = {_value_text(value)}' for key, value in keys)])
    versions = run.finished_record(list(stages)[-1], 0)['versions']
    return [Table(['key', *stages], differing), Table(['section', 'keys'], rows),
            Table(['package', 'version'], [[name, version] for name, version in versions.items() if version])]


def _value_text(value: object) -> str:
    "Return a value as a recipe has it; '(empty)' for an empty one."
    return (' '.join(map(str, value)) if isinstance(value, tuple) else str(value)) or '(empty)'
