"Draw the figures of the report as SVG. Lines and text take the text colour of the page, in light and dark mode."
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from aptos_fastai.common.io import atomic_write
from aptos_fastai.metrics import GRADES
from aptos_fastai.reports.colours import BLUE, GRADES_LIGHT, GREEN, ORANGE, RED

INK = '#010203'                              # replaced by `currentColor`
PAGE_INK = '#010209'                         # replaced by the colour of the page
GRADE_INKS = tuple(f'#01020{4 + grade}' for grade in range(GRADES))            # replaced by the colours of the page
PIXELS_PER_INCH = 125
WIDE = 900                                   # pixels: on a phone, a figure wider than this scrolls
MIN_WIDTH = 680                              # and does not shrink further
BOX_CHARACTERS = 36                          # of a line in a box of the graph of stages; a longer one is smaller
CURVE_POINTS = 600                           # at most this many points of a ROC curve are drawn

styled = matplotlib.rc_context({
    'svg.fonttype': 'none',
    'svg.hashsalt': 'report',
    'font.family': 'sans-serif',
    'font.size': 9.5,
    'axes.titlesize': 10,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.facecolor': 'none',
    'axes.grid': True,
    'axes.axisbelow': True,
    'figure.facecolor': 'none',
    'legend.frameon': False,
    'lines.linewidth': 1.6,
    'grid.color': INK,
    'grid.alpha': .13,
    'text.color': INK,
    'axes.edgecolor': INK,
    'axes.labelcolor': INK,
    'axes.titlecolor': INK,
    'xtick.color': INK,
    'ytick.color': INK,
})


def subplots(width: float = 5.6, height: float = 3.4, rows: int = 1, columns: int = 1,
             **kwargs: Any) -> tuple[Figure, Any]:
    "Return a new figure of `width` x `height` inches and its axes."
    fig = Figure(figsize=(width, height), layout='constrained')
    return fig, fig.subplots(rows, columns, **kwargs)


@styled
def to_svg(fig: Figure, title: str) -> Markup:
    "Return the figure as inline SVG that shrinks with the page; `title` is its text for screen readers."
    buffer = io.StringIO()
    fig.savefig(buffer, format='svg', metadata={'Date': None})
    text = buffer.getvalue()
    text = text[text.index('<svg'):].replace(INK, 'currentColor')
    text = text.replace(PAGE_INK, 'var(--page, #fff)')
    for grade, ink in enumerate(GRADE_INKS): text = text.replace(ink, f'var(--grade-{grade}, {GRADES_LIGHT[grade]})')
    text = re.sub(r'<metadata>.*?</metadata>|<style type="text/css">.*?</style>', '', text, flags=re.S)
    for size in ('width', 'height'):
        text = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r'\1', text, count=1)
    width = PIXELS_PER_INCH * fig.get_figwidth()
    style = f'max-width:{width:.0f}px'
    if width > WIDE: style += f';min-width:{MIN_WIDTH}px'
    return Markup(text.replace('<svg', f'<svg role="img" aria-label="{Markup.escape(title)}" style="{style}"', 1))


@styled
def write_png(fig: Figure, file: Path) -> None:
    "Write the figure as a PNG on white, atomically."
    with atomic_write(file) as temp: fig.savefig(temp, format='png', dpi=PIXELS_PER_INCH, facecolor='white')


@styled
def importance_bars(importance: dict[str, float], label: str) -> Figure:
    "Draw a bar for each key, the longest first."
    fig, ax = subplots(5.6, .9 + .34 * len(importance))
    y = np.arange(len(importance))[::-1]
    ax.barh(y, list(importance.values()), .62, color=BLUE)
    for value, row in zip(importance.values(), y, strict=True):
        ax.annotate(f'{value:.2f}', (value, row), (5, 0), textcoords='offset points', va='center')
    ax.set_yticks(y, list(importance))
    ax.set(xlabel=label, xlim=(0, 1.12), ylim=(-.6, len(importance) - .4))
    return fig


@styled
def interval_dots(names: Sequence[str], values: Sequence[float], intervals: ArrayLike, label: str) -> Figure:
    "Draw each value as a dot with its interval, one row per name; `intervals` is (n, 2)."
    fig, ax = subplots(5.6, .9 + .34 * len(names))
    y = np.arange(len(names))[::-1]
    low, high = np.array(intervals, float).T
    ax.hlines(y, low, high, color=BLUE, lw=2.4, alpha=.55)
    ax.plot(values, y, 'o', color=BLUE, ms=6)
    for value, right, row in zip(values, high, y, strict=True):
        ax.annotate(f'{value:.3f}', (right, row), (5, 0), textcoords='offset points', va='center')
    ax.set_yticks(y, names)
    ax.set_xlabel(label)
    span = max(high.max() - low.min(), .05)
    left, right = max(-1.02, low.min() - .15 * span), high.max() + .3 * span                # room for the numbers
    ax.set_xticks([tick for tick in MaxNLocator(6).tick_values(left, right) if left <= tick <= min(right, 1)])
    ax.set_xlim(left, right)
    ax.set_ylim(-.6, len(names) - .4)
    return fig


@styled
def confusion_matrix(counts: np.ndarray) -> Figure:
    "Draw the (5, 5) counts (row: true grade), shaded by their proportion of the row."
    fig, ax = subplots(4.6, 3.9)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    for true, predicted in np.ndindex(counts.shape):
        count, share = counts[true, predicted], shares[true, predicted]
        corner = predicted - .5, true - .5
        ax.add_patch(Rectangle(corner, 1, 1, color=BLUE, alpha=.06 + .8 * share, lw=0))
        ax.text(predicted, true, f'{count}\n{100 * share:.0f} %', ha='center', va='center', fontsize=8.5)
    ax.set(xlim=(-.5, 4.5), ylim=(4.5, -.5), xlabel='predicted grade', ylabel='true grade')
    ax.set(xticks=range(GRADES), yticks=range(GRADES))
    ax.grid(False)
    return fig


@styled
def recall_bars(recall: ArrayLike, intervals: ArrayLike, counts: Sequence[int]) -> Figure:
    "Draw the recall of each grade (5,), its interval (5, 2) and the number of images (5,)."
    fig, ax = subplots(4.6, 3.4)
    x = np.arange(GRADES)
    ax.bar(x, np.nan_to_num(recall), .62, color=GRADE_INKS)
    low, high = np.array(intervals).T
    ax.vlines(x, low, high, color=PAGE_INK, lw=3.4)                    # a rim, so that it shows on a dark bar
    ax.vlines(x, low, high, color=INK, lw=1.3)
    ax.set_xticks(x, [f'{grade}\nn = {n}' for grade, n in enumerate(counts)])
    ax.set(ylim=(0, 1), xlabel='true grade', ylabel='recall')
    return fig


@dataclass
class RocPoint:
    "An operating point on a ROC curve; the intervals are those of specificity and sensitivity."
    specificity: dict
    sensitivity: dict
    label: str


@styled
def roc_curve(fpr: ArrayLike, tpr: ArrayLike, points: Sequence[RocPoint]) -> Figure:
    "Draw the ROC curve and the operating points with their intervals, named in a legend."
    fig, ax = subplots(4.6, 4.2)
    fpr, tpr = np.asarray(fpr), np.asarray(tpr)
    drawn = np.linspace(0, len(fpr) - 1, min(len(fpr), CURVE_POINTS)).astype(int)
    ax.plot([0, 1], [0, 1], color=INK, alpha=.3, lw=1)
    ax.plot(fpr[drawn], tpr[drawn], color=BLUE)
    for point, (marker, colour) in zip(points, zip('os^D', (RED, ORANGE, GREEN, INK), strict=True), strict=False):
        x, y = 1 - point.specificity['value'], point.sensitivity['value']
        across, up = point.specificity['interval'], point.sensitivity['interval']
        if across: ax.hlines(y, 1 - across[1], 1 - across[0], color=colour, lw=1, alpha=.7)
        if up: ax.vlines(x, *up, color=colour, lw=1, alpha=.7)
        ax.plot(x, y, marker, color=colour, ms=5.5, ls='', label=point.label)
    ax.set(xlim=(-.02, 1.02), ylim=(-.02, 1.02), xlabel='1 - specificity', ylabel='sensitivity')
    if points: ax.legend(loc='lower right', fontsize=8.5)
    return fig


@styled
def threshold_curves(thresholds: ArrayLike, curves: dict[str, np.ndarray], points: dict[str, float]) -> Figure:
    "Draw proportions (k,) against the score threshold (k,), and named operating points as vertical lines."
    fig, ax = subplots(4.6, 4.4)
    for (name, values), colour in zip(curves.items(), (BLUE, ORANGE, INK), strict=True):
        ax.plot(thresholds, values, color=colour, label=name, lw=1.1 if colour == INK else 1.6)
    for (name, threshold), dashes in zip(points.items(), ('--', ':', '-.', '-'), strict=False):
        ax.axvline(threshold, color=RED, ls=dashes, lw=1.2, label=name)
    ax.set(xlim=(np.min(thresholds), np.max(thresholds)), ylim=(-.02, 1.02), xlabel='referable if score ≥',
           ylabel='proportion')
    fig.legend(fontsize=8.5, loc='outside lower center', ncols=2)
    return fig


@styled
def reliability(bins: Sequence[dict], p: ArrayLike, name: str) -> Figure:
    """Draw the observed share against the mean predicted probability of each bin, with intervals.

    `bins` are those of `decisions.reliability`, `p` (n,) the probabilities, whose histogram stands below.
    """
    fig, (ax, below) = subplots(4.6, 4.4, 2, 1, sharex=True, height_ratios=(4, 1))
    x, y = ([o[key] for o in bins] for key in ('predicted', 'observed'))
    low, high = np.array([o['interval'] for o in bins]).T
    ax.plot([0, 1], [0, 1], color=INK, alpha=.3, lw=1)
    ax.vlines(x, low, high, color=BLUE, lw=1.2)
    ax.plot(x, y, 'o-', color=BLUE, ms=4.5)
    ax.set(xlim=(-.02, 1.02), ylim=(-.02, 1.02), ylabel=f'observed share of {name}')
    below.hist(np.asarray(p), np.linspace(0, 1, 21), color=INK, alpha=.45)
    below.set(xlabel=f'predicted probability of {name}', ylabel='images')
    below.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    return fig


@styled
def decision_curve(p: ArrayLike, benefits: dict[str, np.ndarray]) -> Figure:
    "Draw the net benefit (k,) of each rule against the threshold probability `p` (k,)."
    fig, ax = subplots(5.2, 4.2)
    styles = zip((BLUE, RED, INK, INK, ORANGE), ('-', '-', '--', ':', '-.'), strict=True)
    for (name, benefit), (colour, dashes) in zip(benefits.items(), styles, strict=False):
        ax.plot(100 * np.asarray(p), benefit, color=colour, ls=dashes, label=name)
    top = max(float(np.max(o)) for o in benefits.values())
    ax.set(xlim=(0, 100 * np.max(p)), ylim=(-.12 * top - .01, 1.08 * top + .01))
    ax.set(xlabel='threshold probability, %', ylabel='net benefit')
    ax.legend(fontsize=8.5)
    return fig


@styled
def calibration(scores: ArrayLike, grades: ArrayLike, bins: int = 10) -> Figure:
    "Draw the mean true grade against the mean score, for `bins` bins of equally many images."
    fig, ax = subplots(4.6, 3.6)
    scores, grades = np.asarray(scores), np.asarray(grades, float)
    order = np.argsort(scores, kind='stable')
    rows = [part for part in np.array_split(order, bins) if len(part)]
    x = [scores[r].mean() for r in rows]
    y = [grades[r].mean() for r in rows]
    half_widths = [1.96 * grades[r].std() / np.sqrt(len(r)) for r in rows]
    ax.plot([0, 4], [0, 4], color=INK, alpha=.3, lw=1)
    ax.errorbar(x, y, half_widths, fmt='o-', color=BLUE, ms=4.5, elinewidth=1.2)
    ax.set(xlim=(min(-.1, min(x)), max(4.1, max(x))), ylim=(-.1, 4.1))
    ax.set(xlabel='mean score (tenths of the images, by score)', ylabel='mean true grade')
    return fig


@styled
def score_histograms(scores: ArrayLike, grades: ArrayLike, thresholds: Iterable[float]) -> Figure:
    "Draw a histogram of the scores for each true grade, and the thresholds."
    fig, axes = subplots(6.2, 4.4, GRADES, 1, sharex=True)
    scores, grades = np.asarray(scores), np.asarray(grades)
    edges = np.linspace(min(-.5, scores.min()), max(4.5, scores.max()), 51)
    for grade, ax in enumerate(axes):
        of_grade = scores[grades == grade]
        ax.hist(of_grade, edges, color=GRADE_INKS[grade])
        for t in thresholds: ax.axvline(t, color=INK, lw=1, ls='--', alpha=.65)
        ax.set_ylabel(f'grade {grade}\nn = {len(of_grade)}', rotation=0, ha='right', va='center')
        ax.set_yticks([0, max(1, int(ax.get_ylim()[1]))])
    axes[-1].set_xlabel('score (number of images; one row per true grade; dashed: thresholds)')
    return fig


@styled
def learning_curves(histories: dict[str, list[pd.DataFrame]]) -> Figure:
    "Draw loss, kappa and learning rate of each stage, one line per fold; `histories`: stage -> frames of history.csv."
    columns = len(histories)
    fig, axes = subplots(max(min(7.1, 3.8 * columns), 2.3 * columns), 5.4, 3, columns, sharex='col', squeeze=False)
    for column, (stage, folds) in zip(axes.T, histories.items(), strict=True): _stage_curves(column, stage, folds)
    for ax, label in zip(axes[:, 0], ('loss', 'kappa', 'learning rate'), strict=True): ax.set_ylabel(label)
    return fig


def _stage_curves(axes: np.ndarray, stage: str, folds: list[pd.DataFrame]) -> None:
    "Draw the three curves of a stage on its three axes, one line per fold."
    loss_ax, kappa_ax, rate_ax = axes
    for h in folds:
        epoch = h.epoch + 1
        line: dict[str, Any] = dict(lw=1.1, alpha=.8, marker='.' if len(h) == 1 else None)     # one epoch is no line
        loss_ax.plot(epoch, h.train_loss, color=BLUE, **line)
        loss_ax.plot(epoch, h.valid_loss, color=ORANGE, **line)
        kappa_ax.plot(epoch, h.kappa, color=GREEN, **line)
        kappa_ax.plot(epoch[h.kept], h.kappa[h.kept], 'o', color=RED, ms=4)
        rate_ax.stairs(h.lr, np.arange(len(h) + 1) + .5, baseline=None, color=INK, lw=1.1)
    losses = np.concatenate([h[key] for h in folds for key in ('valid_loss', 'train_loss')])
    loss_ax.set_title(stage)
    loss_ax.set_ylim(0, 1.1 * np.nanquantile(losses, .97))               # an outlier does not flatten the curves
    kappas = np.concatenate([h.kappa for h in folds])
    middle, half = (np.nanmin(kappas) + np.nanmax(kappas)) / 2, .55 * max(np.nanmax(kappas) - np.nanmin(kappas), .1)
    kappa_ax.set_ylim(middle - half, middle + half)
    rate_ax.set_ylim(0, 1.15 * max(h.lr.max() for h in folds) or 1)
    rate_ax.set(xlabel='epoch', xlim=(.5, max(len(h) for h in folds) + .5))
    rate_ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    rate_ax.ticklabel_format(axis='y', style='sci', scilimits=(0, 0))


@styled
def grade_distribution(groups: dict[str, np.ndarray]) -> Figure:
    "Draw the proportion of each grade in each of `groups` (name -> grades)."
    fig, ax = subplots(7.1, 2.8)
    width = .8 / len(groups)
    for i, (name, grades) in enumerate(groups.items()):
        shares = np.bincount(grades, minlength=GRADES)[:GRADES] / max(1, len(grades))
        x = np.arange(GRADES) + (i - (len(groups) - 1) / 2) * width
        colour, alpha = (INK, .45) if i == 0 else ((BLUE, ORANGE)[i - 1], .85)
        ax.bar(x, shares, width * .92, color=colour, alpha=alpha, label=f'{name}, n = {len(grades)}')
    ax.set(xlabel='grade', ylabel='proportion of images', xticks=range(GRADES))
    ax.set_ylim(0, 1.3 * ax.get_ylim()[1])   # room for the legend
    ax.legend(fontsize=8.5, loc='upper right')
    return fig


@styled
def stage_graph(depth: dict[str, int], edges: Sequence[tuple[str, str, bool]], texts: dict[str, str],
                final: str) -> Figure:
    """Draw the stages as boxes, in columns by `depth`, and an arrow from each parent.

    `edges` are (parent, child, dashed), `texts` the lines below each name, `final` the name of the darker box.
    """
    columns = [[n for n in depth if depth[n] == d] for d in sorted(set(depth.values()))]
    rows = max(map(len, columns))
    position = {n: (x, (rows - len(names)) / 2 + i) for x, names in enumerate(columns) for i, n in enumerate(names)}
    fig, ax = subplots(3 * len(columns) + .4, 1.05 * rows + .3)
    for parent, child, dashed in edges: _arrow(ax, position[parent], position[child], dashed)
    for name, (x, y) in position.items():
        alpha = .32 if name == final else .13
        page = dict(facecolor=PAGE_INK, edgecolor='none')          # hides the arrows that pass behind the box
        for style in (page, dict(facecolor=BLUE, alpha=alpha, edgecolor=INK, lw=.8)):
            ax.add_patch(FancyBboxPatch((x - .38, y - .3), .76, .6, boxstyle='round,pad=.02', **style))
        ax.text(x, y - .14, name, ha='center', va='center', fontweight='bold', fontsize=9)
        fits = min(1, BOX_CHARACTERS / max(map(len, texts[name].split('\n'))))
        ax.text(x, y + .1, texts[name], ha='center', va='center', fontsize=7.8 * fits, linespacing=1.35)
    ax.set(xlim=(-.5, len(columns) - .5), ylim=(rows - .5, -.5))
    ax.axis('off')
    return fig


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], dashed: bool) -> None:
    "Draw an arrow from the right edge of a box to the left edge of another, bent where it skips a column."
    (x0, y0), (x1, y1) = start, end
    bend = -.2 if x1 - x0 > 1 else 0
    style = dict(arrowstyle='-|>', color=INK, lw=1.1, ls='--' if dashed else '-', alpha=.6,
                 connectionstyle=f'arc3,rad={bend}')
    ax.annotate('', (x1 - .4, y1), (x0 + .4, y0), arrowprops=style, zorder=0)
