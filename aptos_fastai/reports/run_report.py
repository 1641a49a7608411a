"A finished run -> report.html: what it is worth, where it errs, and what it was made from, on one page."
import numpy as np
import pandas as pd

from aptos_fastai.common.console import Bars, format_duration
from aptos_fastai.data.duplicates import duplicates_table
from aptos_fastai.data.store import read_prepared, read_square, store_folder
from aptos_fastai.inference.explain import heat, lay_over
from aptos_fastai.inference.grader import Grader
from aptos_fastai.inference.model_spec import fold_model
from aptos_fastai.metrics import (
    MIDPOINTS,
    PUBLISHED_THRESHOLDS,
    REFERABLE,
    GradeThresholds,
    PredictionSets,
    apply_thresholds,
    auc,
    confusion,
    kappa_interval,
    quadratic_kappa,
    sensitivity_at,
    share_interval,
)
from aptos_fastai.pipeline.summary import SYNTHETIC, honest_grades, interval_text, tables_text, thresholds_of, validated
from aptos_fastai.recipe import Stage, parse_thresholds
from aptos_fastai.reports import plots
from aptos_fastai.reports.html import Bar, Figure, Table, image, write_html
from aptos_fastai.reports.shortcuts import CAMERA, MOST, audit
from aptos_fastai.run_folder import HISTORY, Run


def fig(title: str, drawn, caption: str = '') -> Figure:
    "A drawing with its title and caption"
    return Figure(title, plots.svg(drawn, title), caption)


def kappas(run: Run, summary: dict) -> list:
    "Kappa of each stage, as a plot and a table"
    rows = summary['stages']
    ns = sorted({r['validated'] for r in rows})
    return [fig(f'Quadratic weighted kappa of each stage, n = {" to ".join(map(str, dict.fromkeys((ns[0], ns[-1]))))} images',
                plots.dots([r['stage'] for r in rows], [r['kappa'] for r in rows], [r['kappa_interval'] for r in rows], 'quadratic weighted kappa'),
                'Out of fold, graded by fixed thresholds or by thresholds fitted on other images; the lines are 95 % bootstrap intervals over images.'),
            Table(['stage', 'trained on', 'network', 'validated', 'kappa [95 %]', 'thresholds', 'time'],
                  [[r['stage'], tables_text(run.recipe.stages[r['stage']]) if r['stage'] in run.recipe.stages else 'mean of ' + ', '.join(r['tables']),
                    f'{r["arch"]} {r["size"]} px' if r['size'] else '', r['validated'], interval_text(r['kappa'], r['kappa_interval']),
                    f'{" ".join(f"{c:.2f}" for c in r["thresholds"])} ({"fixed" if parse_thresholds(r["threshold_method"]) else r["threshold_method"]})',
                    format_duration(r['seconds']) if r['seconds'] else ''] for r in rows])]


def cut_choices(run: Run, oof: pd.DataFrame) -> list:
    "Kappa of each stage by each way to choose thresholds"
    rows = []
    for n in run.recipe.order:
        o = validated(oof, n)
        def k(g, o=o): return interval_text(quadratic_kappa(g, o.diagnosis), kappa_interval(g, o.diagnosis))
        rows.append([n, *(k(apply_thresholds(o.score, c)) for c in (MIDPOINTS, PUBLISHED_THRESHOLDS)), *(k(honest_grades(run, o, how)) for how in ('optimal', 'regularised')),
                     f'{GradeThresholds().fit(o.score, o.diagnosis).kappa_:.3f}', thresholds_of(run, n)])
    how = ['midpoints (.5 1.5 2.5 3.5)', 'published (.75 1.5 2.5 3.5)', 'optimal, nested', 'regularised, nested', 'optimal, in sample', 'used here']
    return [Table(['stage', *how], rows, 'Nested: the thresholds that grade a fold were fitted on the other folds. In sample: fitted on the images they grade, '
                  'an optimist\'s figure, shown to be seen as one.')]


def mistakes(v: pd.DataFrame) -> list:
    "Confusion and recall of the answer"
    cm = confusion(v.grade, v.diagnosis)
    right, n = np.diag(cm), cm.sum(1)
    return [fig(f'Confusion of grades, n = {len(v)}', plots.confusion_matrix(cm), 'Images, and their share of the true grade.'),
            fig(f'Share of each grade that is graded right, n = {len(v)}',
                plots.recall_bars(right / np.maximum(n, 1), [share_interval(*o) for o in zip(right, n, strict=True)], n), 'Lines: 95 % (Wilson).')]


def referable(v: pd.DataFrame) -> tuple[list, float]:
    "Plots and table of grade 2 and above against the rest, and the area under the curve"
    from sklearn.metrics import roc_curve
    pos = (v.diagnosis >= REFERABLE).to_numpy()
    area = auc(v.score, pos)
    if not np.isfinite(area[0]): return [f'Only {"referable" if pos.all() else "not referable"} images were validated: there is no ROC curve.'], np.nan
    rows, points = [], []
    for spec in (.90, .95):
        sens, t = sensitivity_at(v.score, pos, spec)
        rows.append([f'score ≥ {t:.2f}', *_sens_spec(v.score >= t, pos)])
        points.append((1 - (v.score[~pos] < t).mean(), sens, f'sensitivity {sens:.0%} at {spec:.0%} specificity'))
    rows.append([f'grade ≥ {REFERABLE}', *_sens_spec(v.grade >= REFERABLE, pos)])
    fpr, tpr, _ = roc_curve(pos, v.score)
    title = f'Referable retinopathy (grade 2-4), ROC: area {interval_text(area[0], area[1:])}, n = {pos.sum()} + {(~pos).sum()}'
    return [fig(title, plots.roc(fpr, tpr, points), 'By out-of-fold score; the interval is DeLong\'s, which closes at an area of 1.'),
            Table(['referred where', 'sensitivity [95 %]', 'specificity [95 %]'], rows, 'The two thresholds were chosen on these images for a specificity of '
                  '90 % and 95 %; the thresholds of the grades never saw the image they grade.')], area[0]


def _sens_spec(called, pos) -> list[str]:
    called = np.asarray(called)
    right = (int(called[pos].sum()), int(pos.sum())), (int((~called[~pos]).sum()), int((~pos).sum()))
    return [interval_text(k / n, share_interval(k, n)) for k, n in right]


def scores(run: Run, v: pd.DataFrame, given: pd.DataFrame, thresholds) -> list:
    "Scores by true grade, calibration, shares of grades"
    r = np.corrcoef(v.score, v.diagnosis)[0, 1]
    graded = np.concatenate([run.frames[n].diagnosis.dropna().astype(int) for n in v.source.unique()])
    shares = {'graded tables, true': graded, 'validation, given': v.grade.to_numpy(), 'answer, given': given.grade.to_numpy()}
    moved = np.abs(_shares(given.grade) - _shares(v.grade)).sum() / 2
    return [fig(f'Scores by true grade, n = {len(v)}', plots.score_histograms(v.score, v.diagnosis, thresholds),
                f'Correlation {r:.3f}, mean distance to the grade {np.abs(v.score - v.diagnosis).mean():.3f}.'),
            fig(f'Calibration, n = {len(v)}', plots.calibration(v.score, v.diagnosis), 'On the line a score can be read as a grade. Lines: 95 % of the mean.'),
            fig('Grades: true, validated, answered', plots.grade_shares(shares),
                f'Between validation and answer {moved:.0%} of the images would have to change '
                'their grade for equal shares (half of the summed differences): other patients, another camera, or chance.')]


def _shares(g): return np.bincount(g, minlength=5)[:5] / len(g)


def certainty(v: pd.DataFrame, parts: np.ndarray, given: pd.DataFrame, coverage: float) -> list:
    "Sets of grades: what they hold, each of `parts` by distances learnt on the others"
    low, high = np.empty(len(v), int), np.empty(len(v), int)
    for k in np.unique(parts):
        mine = parts == k
        low[mine], high[mine] = PredictionSets(coverage).fit(v.score[~mine], v.diagnosis[~mine]).predict(v.score[mine], v.grade[mine])
    held, size = (low <= v.diagnosis) & (v.diagnosis <= high), high - low + 1
    rows = [[name, int(m.sum()), interval_text(held[m].mean(), share_interval(held[m].sum(), m.sum())), f'{size[m].mean():.2f}']
            for name, m in [('all', np.full(len(v), True)), *((f'grade {g}', (v.diagnosis == g).to_numpy()) for g in range(5))] if m.any()]
    wide = (given.grade_high - given.grade_low + 1).value_counts().sort_index()
    return [Table(['validated', 'images', f'held (asked for: {coverage:.0%})', 'grades a set'], rows,
                  'Measured on each fold with distances learnt on the others. The sets of the answer are grade_low to grade_high in scores.csv; its scores are '
                  'means over folds, a little surer than what was measured here.'),
            Table(['grades in the set', 'images answered', 'share'], [[int(k), int(n), Bar(n / len(given))] for k, n in wide.items()])]


def learning(run: Run) -> list:
    "Learning curves, four stages a figure"
    hist = {n: [pd.read_csv(run.fold_dir(n, k) / HISTORY) for k in range(s.folds)] for n, s in run.recipe.stages.items()}
    names = list(hist)
    return [fig('Learning curves' + (f' ({i // 4 + 1})' if len(names) > 4 else ''), plots.curves({n: hist[n] for n in names[i:i + 4]}),
                'A line a fold. Blue: training loss, orange: validation loss; green: kappa at fixed thresholds, dot: the epoch kept.')
            for i in range(0, len(names), 4)]


def stage_graph(run: Run, summary: dict) -> Figure:
    "The graph of the recipe with what came out"
    depth, info = {}, {r['stage']: r for r in summary['stages']}
    for n in run.recipe.order: depth[n] = 1 + max((depth[p] for p in run.recipe.nodes[n].parents), default=-1)
    def words(n):
        s, r = run.recipe.stages.get(n), info[n]
        kappa = f'kappa {r["kappa"]:.3f}'
        return f'{s.arch}\n{s.size} px, {format_duration(r["seconds"])}, {kappa}' if s else f'mean of {len(run.recipe.members(n))}, {kappa}'
    teachers = {n: {t for t, _ in s.sources if t} for n, s in run.recipe.stages.items()}
    edges = [(p, n, p in teachers.get(n, ())) for n in run.recipe.order for p in dict.fromkeys(run.recipe.nodes[n].parents)]
    return fig('The stages', plots.graph(depth, edges, {n: words(n) for n in depth}, run.recipe.submit.final),
               'Arrows: weights or scores handed on; dashed: pseudo-labels. The darker box gives the answer.')


def tables(run: Run) -> Table:
    "What the tables hold, and their warnings"
    duplicates, rows = duplicates_table(run.frames), []
    for n, f in run.frames.items():
        rec, t = read_prepared(store_folder(f, run.store, run.prep)), duplicates[duplicates.source == n]
        flags = rec['flags'].str.split().explode().value_counts()
        grades = ' '.join(str((f.diagnosis == g).sum()) for g in range(5)) if run.recipe.tables[n].graded else 'ungraded'
        bad = rec.error != ''
        rows.append([n, len(f), grades, int(bad.sum()), int((rec.how[~bad] != 'circle').sum()),
                     ', '.join(f'{k} {m}' for k, m in flags.items()) or 'none', len(t), int(t.conflict.sum())])
    return Table(['table', 'images', 'of grade 0 1 2 3 4', 'unreadable', 'no circle found', 'flags', 'stand there twice', 'with unequal grades'], rows)


def gallery(run: Run, df: pd.DataFrame, words) -> list[tuple]:
    "(image, its heat, words) of the rows of `df`: source, id_code, fold (whose networks explain it) and what `words` asks for"
    stored = {n: f.set_index('id_code').stored for n, f in run.frames.items()}
    graders = {k: Grader(fold_model(run.root, run.recipe.members(run.recipe.submit.final), k), run.root) for k in df.fold.unique()}
    out = []
    for o in df.itertuples():
        g, path = graders[o.fold], stored[o.source][o.id_code]
        hot = heat(g, {n: read_square(path, run.prep, n)[None] for n in {m.size for m in g.model.members}})[0]
        sq = read_square(path, run.prep, 224)
        out.append((image(sq, o.id_code), image(lay_over(sq, hot, (0, 224, 0, 224), o.score), f'{o.id_code}: where the score comes from'), words(o)))
    return out


def worst(run: Run, v: pd.DataFrame, count: int = 12) -> list[tuple]:
    "The mistakes that are farthest off"
    v = v.assign(off=(v.score - v.diagnosis).abs())
    return gallery(run, v[v.grade != v.diagnosis].nlargest(count, 'off'), lambda o: f'{o.id_code}: true {o.diagnosis}, given {o.grade} (score {o.score:.2f})')


def uncertain(run: Run, given: pd.DataFrame, count: int = 12) -> list[tuple]:
    "The answers of the largest spread"
    df = given[given.score_sd.notna()].assign(source=run.recipe.submit.table, score=given['mean'], fold=0).nlargest(count, 'score_sd')
    return gallery(run, df, lambda o: f'{o.id_code}: given {o.grade} ({o.grade_low}-{o.grade_high}), score {o.score:.2f} ± {o.score_sd:.2f}')


def shortcuts(run: Run, bars: Bars, kappa: float) -> list:
    "The audit as a table, with what it means"
    n = len(run.oof(run.recipe.submit.final))
    with bars('report: shortcut audit', min(n, MOST), 'images') as bar: rows = audit(run, bar)
    means = dict(zip(CAMERA, ('grades go with the camera in these tables; crop = retina hides that from the network',
                              'what the camera leaves of the retina tells of grades, and the network sees it'), strict=True))
    told = [f'{k}: kappa {q:.2f} by this alone, {means[k]}.' for k, _, q, i in rows if k in means and i[0] > 0]
    told = told or ['Neither the camera\'s geometry nor the shape it leaves tells the grades apart here.']
    told = ' '.join(told) + ' Bytes, colour and contrast go with the camera and with lesions, too.'
    rows = [[k, m, interval_text(q, i)] for k, m, q, i in rows] + [['the answer, for comparison', n, f'{kappa:.3f}'.replace('0.', '.')]]
    return [Table(['a forest that knows of the', 'images', 'kappa [95 %]'], rows, told)]


def settings(run: Run) -> list:
    "Every key of the stages, those that are equal everywhere in one column"
    stages = run.recipe.stages
    keys = [k for k in Stage.__dataclass_fields__ if k != 'name']
    def text(o): return ' '.join(map(str, o)) if isinstance(o, tuple) else str(o)
    rows = [[k, *(text(getattr(s, k)) for s in stages.values())] for k in keys]
    same = [f'{r[0]} = {r[1] or "(empty)"}' for r in rows if len(set(r[1:])) == 1]
    rec = run.record(list(stages)[-1], 0)
    r = run.recipe
    other = [[k, ', '.join(f'{a} = {text(b)}' for a, b in vars(o).items())] for k, o in (('images', r.images), ('augment', r.augment), ('submit', r.submit))]
    return [Table(['key', *stages], [r for r in rows if len(set(r[1:])) > 1]),
            Table(['section', 'keys'],
                  [['stage, all', ', '.join(same)], *other, ['recipe', f'seed = {r.seed}, splits = {r.splits}, conflicts = {r.conflicts}']]),
            Table(['made with', 'version'], [[k, v] for k, v in rec['versions'].items() if v])]


def write_report(run: Run, summary: dict, oof: pd.DataFrame, given: pd.DataFrame, bars: Bars):
    "report.html in the run folder: self-contained, for reading on screen and on paper"
    sub = run.recipe.submit
    v, final = validated(oof, sub.final), next(r for r in summary['stages'] if r['stage'] == sub.final)
    dr, area = referable(v)
    thresholds = run.thresholds(sub.final, sub.thresholds)
    cards = [(interval_text(final['kappa'], final['kappa_interval']), f'kappa of {sub.final}, out of fold, n = {len(v)}'),
             (f'{(v.grade == v.diagnosis).mean():.0%}', f'graded right; {((v.grade - v.diagnosis).abs() <= 1).mean():.0%} within one grade'),
             (f'{area:.3f}'.replace('0.', '.'), 'area under the ROC curve, referable retinopathy'),
             (f'{len(given)}', f'images of {sub.table} answered, by thresholds ' + ' '.join(f'{c:.2f}' for c in thresholds))]
    sections = [('Stages', [stage_graph(run, summary), *kappas(run, summary)]), ('Choice of thresholds', cut_choices(run, oof)),
                ('Mistakes of the answer', mistakes(v)), ('Referable retinopathy', dr),
                ('Scores', scores(run, v, given, thresholds)), ('Certainty', certainty(v, run.parts(v), given, sub.coverage)),
                ('Learning', learning(run)), ('Shortcuts', shortcuts(run, bars, final['kappa'])), ('Tables', [tables(run)])]
    with bars('report: heat maps', 2, 'galleries') as bar:
        galleries = [worst(run, v)]; bar.to(1)
        galleries.append(uncertain(run, given)); bar.to(2)
    write_html(run.root / 'report.html', 'report.html', title=f'{run.recipe.name}: report', warning=SYNTHETIC if run.recipe.demo else '',
               note=f'{run.recipe.path.name} on {", ".join(f"{n} ({len(f)} images)" for n, f in run.frames.items())}. Research software, no medical device.',
               cards=cards, sections=sections, worst=galleries[0], uncertain=galleries[1], settings=settings(run))
