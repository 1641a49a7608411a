"Arrays -> SVG figures, for the report: titles, units and n on each; ink in the page's own colour, so that they suit light, dark and print."
import io
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

INK = '#010203'                              # becomes `currentColor`
GRADE_COLOURS = ('#3b82c4', '#35a79c', '#d8a31a', '#e8743b', '#c93a5b')
styled = matplotlib.rc_context({
    'svg.fonttype': 'none', 'svg.hashsalt': 'report', 'font.family': 'sans-serif', 'font.size': 9.5, 'axes.titlesize': 10,
    'axes.spines.top': False, 'axes.spines.right': False, 'axes.facecolor': 'none', 'figure.facecolor': 'none', 'legend.frameon': False,
    'lines.linewidth': 1.6, 'grid.color': INK, 'grid.alpha': .13, 'axes.grid': True, 'axes.axisbelow': True,
    **{k: INK for k in ('text.color', 'axes.edgecolor', 'axes.labelcolor', 'xtick.color', 'ytick.color', 'axes.titlecolor')}})


def figure(width: float = 5.6, height: float = 3.4, rows: int = 1, columns: int = 1, **kw):
    "A figure in the page's style and its axes"
    fig = Figure(figsize=(width, height), layout='constrained')
    return fig, fig.subplots(rows, columns, **kw)


@styled
def svg(fig: Figure, title: str) -> Markup:
    "The figure as inline SVG that grows no wider than it was drawn"
    out = io.StringIO()
    fig.savefig(out, format='svg', metadata={'Date': None})
    s = out.getvalue()
    s = re.sub(r'<metadata>.*?</metadata>|<style type="text/css">.*?</style>', '', s[s.index('<svg'):].replace(INK, 'currentColor'), flags=re.S)
    for size in ('width', 'height'): s = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r'\1', s, count=1)
    wide = 125 * fig.get_figwidth()                                      # pixels; what is drawn wide is scrolled on a phone, not shrunk
    style = f'max-width:{wide:.0f}px' + (';min-width:680px' if wide > 900 else '')
    return Markup(s.replace('<svg', f'<svg role="img" aria-label="{Markup.escape(title)}" style="{style}"', 1))


@styled
def dots(names: Sequence[str], values, intervals, unit: str) -> Figure:
    "A dot with its interval for each name"
    fig, ax = figure(5.6, .9 + .34 * len(names))
    y = np.arange(len(names))[::-1]
    lo, hi = np.array(intervals, float).T
    ax.hlines(y, lo, hi, color=GRADE_COLOURS[0], lw=2.4, alpha=.55)
    ax.plot(values, y, 'o', color=GRADE_COLOURS[0], ms=6)
    for v, h, k in zip(values, hi, y, strict=True): ax.annotate(f'{v:.3f}', (h, k), (5, 0), textcoords='offset points', va='center')
    ax.set_yticks(y, names)
    ax.set_xlabel(unit)
    ax.set_xlim(max(-1, lo.min() - .05), min(1.08, hi.max() + .1))
    ax.set_ylim(-.6, len(names) - .4)
    return fig


@styled
def confusion_matrix(cm: np.ndarray) -> Figure:
    "Counts, shaded by the share of the true grade's row"
    fig, ax = figure(4.6, 3.9)
    share = cm / np.maximum(cm.sum(1, keepdims=True), 1)
    for g in range(5):
        for k in range(5):
            ax.add_patch(matplotlib.patches.Rectangle((k - .5, g - .5), 1, 1, color=GRADE_COLOURS[0], alpha=.06 + .8 * share[g, k], lw=0))
            ax.text(k, g, f'{cm[g, k]}\n{share[g, k]:.0%}', ha='center', va='center', fontsize=8.5)
    ax.set(xlim=(-.5, 4.5), ylim=(4.5, -.5), xlabel='given grade', ylabel='true grade', xticks=range(5), yticks=range(5))
    ax.grid(False)
    return fig


@styled
def recall_bars(recall, intervals, counts) -> Figure:
    "Share of each grade (5,) that is graded right, its intervals (5, 2) and how many there are (5,)"
    fig, ax = figure(4.6, 3.4)
    x = np.arange(5)
    ax.bar(x, np.nan_to_num(recall), .62, color=GRADE_COLOURS, alpha=.85)
    lo, hi = np.array(intervals).T
    ax.vlines(x, lo, hi, color=INK, lw=1.3)
    ax.set_xticks(x, [f'{g}\nn = {n}' for g, n in enumerate(counts)])
    ax.set(ylim=(0, 1), xlabel='true grade', ylabel='share graded right')
    return fig


@styled
def roc(fpr, tpr, points: Sequence[tuple[float, float, str]]) -> Figure:
    "The curve and named points (1 - specificity, sensitivity, label)"
    fig, ax = figure(4.6, 3.7)
    some = np.linspace(0, len(fpr) - 1, min(len(fpr), 600)).astype(int)
    ax.plot([0, 1], [0, 1], color=INK, alpha=.3, lw=1)
    ax.plot(np.asarray(fpr)[some], np.asarray(tpr)[some], color=GRADE_COLOURS[0])
    for (x, y, text), dy in zip(points, (-4, -16, -28), strict=False):
        ax.plot(x, y, 'o', color=GRADE_COLOURS[4], ms=5)
        ax.annotate(text, (x, y), (10, dy), textcoords='offset points', va='top', fontsize=8.5)
    ax.set(xlim=(-.02, 1.02), ylim=(-.02, 1.02), xlabel='1 - specificity', ylabel='sensitivity')
    return fig


@styled
def calibration(score, grade, bins: int = 10) -> Figure:
    "Mean true grade of each tenth of the images, by their mean score"
    fig, ax = figure(4.6, 3.6)
    parts = [p for p in np.array_split(np.argsort(score, kind='stable'), bins) if len(p)]
    s, g = np.asarray(score), np.asarray(grade, float)
    x, y = [s[p].mean() for p in parts], [g[p].mean() for p in parts]
    se = [1.96 * g[p].std() / np.sqrt(len(p)) for p in parts]
    ax.plot([0, 4], [0, 4], color=INK, alpha=.3, lw=1)
    ax.errorbar(x, y, se, fmt='o-', color=GRADE_COLOURS[0], ms=4.5, elinewidth=1.2)
    ax.set(xlim=(min(-.1, min(x)), max(4.1, max(x))), ylim=(-.1, 4.1), xlabel='mean score of a tenth of the images', ylabel='their mean true grade')
    return fig


@styled
def score_histograms(score, grade, thresholds) -> Figure:
    "A row of scores for each true grade, and the thresholds"
    fig, axs = figure(6.2, 4.4, 5, 1, sharex=True)
    edges = np.linspace(min(-.5, np.min(score)), max(4.5, np.max(score)), 51)
    for g, ax in enumerate(axs):
        s = np.asarray(score)[np.asarray(grade) == g]
        ax.hist(s, edges, color=GRADE_COLOURS[g], alpha=.85)
        for c in thresholds: ax.axvline(c, color=INK, lw=1, ls='--', alpha=.65)
        ax.set_ylabel(f'{g}\nn={len(s)}', rotation=0, ha='right', va='center')
        ax.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(2, integer=True))
    axs[-1].set_xlabel('score (images a bin, by true grade; dashed: the thresholds)')
    return fig


@styled
def curves(histories: dict[str, list]) -> Figure:
    "Loss, kappa and rate over the epochs of each stage, a line a fold; `histories`: stage -> frames of history.csv"
    n = len(histories)
    fig, axs = figure(max(3.4, 2.3 * n), 5.4, 3, n, sharex='col', squeeze=False)
    for j, (name, folds) in enumerate(histories.items()):
        for h in folds:
            x = h.epoch + 1
            axs[0, j].plot(x, h.train_loss, color=GRADE_COLOURS[0], lw=1.1, alpha=.8)
            axs[0, j].plot(x, h.valid_loss, color=GRADE_COLOURS[3], lw=1.1, alpha=.8)
            axs[1, j].plot(x, h.kappa, color=GRADE_COLOURS[1], lw=1.1, alpha=.8)
            axs[1, j].plot(x[h.kept], h.kappa[h.kept], 'o', color=GRADE_COLOURS[4], ms=4)
            axs[2, j].step(x, h.lr, where='mid', color=INK, lw=1.1)
        axs[0, j].set_title(name)
        axs[0, j].set_ylim(0, np.nanquantile(np.concatenate([h.valid_loss for h in folds] + [h.train_loss for h in folds]), .97) * 1.1)
        axs[2, j].set_xlabel('epoch')
        axs[2, j].xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, integer=True))
        axs[2, j].ticklabel_format(axis='y', style='sci', scilimits=(0, 0))
    for ax, text in zip(axs[:, 0], ('loss', 'kappa', 'rate at epoch\'s end'), strict=True): ax.set_ylabel(text)
    return fig


@styled
def grade_shares(groups: dict[str, np.ndarray]) -> Figure:
    "Share of each grade in each of the groups (name -> grades)"
    fig, ax = figure(5.6, 3.2)
    w = .8 / len(groups)
    for i, (name, g) in enumerate(groups.items()):
        ax.bar(np.arange(5) + (i - (len(groups) - 1) / 2) * w, np.bincount(g, minlength=5)[:5] / max(1, len(g)), w * .92,
               color=(INK, *GRADE_COLOURS)[i], alpha=.45 if not i else .85, label=f'{name}, n = {len(g)}')
    ax.set(xlabel='grade', ylabel='share of images', xticks=range(5))
    ax.set_ylim(0, 1.3 * ax.get_ylim()[1])
    ax.legend(fontsize=8.5, loc='upper right')
    return fig


@styled
def graph(depth: dict[str, int], edges: Sequence[tuple[str, str, bool]], words: dict[str, str], final: str) -> Figure:
    "Boxes by their depth, an arrow for each parent (dashed where it labels); `words` is what stands in a box"
    columns = {d: [n for n in depth if depth[n] == d] for d in sorted(set(depth.values()))}
    tall = max(map(len, columns.values()))
    fig, ax = figure(3 * len(columns) + .4, 1.05 * tall + .3)
    at = {n: (d, (tall - len(ns)) / 2 + i) for d, ns in columns.items() for i, n in enumerate(ns)}
    for a, b, labels in edges:
        (x0, y0), (x1, y1) = at[a], at[b]
        bend = f'arc3,rad={-.2 if x1 - x0 > 1 else 0}'                   # around the boxes between
        ax.annotate('', (x1 - .4, y1), (x0 + .4, y0), arrowprops=dict(arrowstyle='-|>', color=INK, lw=1.1, ls='--' if labels else '-', alpha=.6,
                                                                      connectionstyle=bend))
    for n, (x, y) in at.items():
        ax.add_patch(matplotlib.patches.FancyBboxPatch((x - .38, y - .3), .76, .6, boxstyle='round,pad=.02', facecolor=GRADE_COLOURS[0],
                                                       alpha=.32 if n == final else .13, edgecolor=INK, lw=.8))
        ax.text(x, y - .14, n, ha='center', va='center', fontweight='bold', fontsize=9)
        ax.text(x, y + .1, words[n], ha='center', va='center', fontsize=7.8, linespacing=1.35)
    ax.set(xlim=(-.5, len(columns) - .5), ylim=(tall - .5, -.5))
    ax.axis('off')
    return fig
