"""Kappa and time of fewer views and fewer networks: python benchmarks/pareto.py PLOT.png RUN TABLE [RUN TABLE ...]

RUN is a finished run, TABLE a CSV (or folder of class folders) of graded images that the run has not seen, its images
beside it. Several pairs of one recipe are judged together, each image by the networks of its own run. Every network
sees all 8 views once; each row of the table ("5 teacher × 2") takes some networks and 1, 2, 4 or 8 of the views (2:
the mirror image; 4: the rotations). Grades are made with the thresholds of the run, fitted out-of-fold: those of the
stage, or of the run's model for all its networks. `lost` is kappa minus that of all its networks with 8 views, with its
paired bootstrap interval; `rank` is Spearman's correlation of score and grade, which needs no thresholds, as AUC.
"""
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from aptos_fastai.common.console import say, table
from aptos_fastai.common.io import AptosError, write_bytes
from aptos_fastai.data.understand import find_table
from aptos_fastai.inference.grader import Grader
from aptos_fastai.inference.model_spec import ModelSpec, read_model
from aptos_fastai.inference.training_images import SeenImages, training_images
from aptos_fastai.metrics import REFERABLE, apply_thresholds, auc, kappa_interval, paired_interval, quadratic_kappa
from aptos_fastai.reports.colours import BLUE, GREEN, ORANGE, RED
from aptos_fastai.training.precision import machine

VIEWS = {1: [0], 2: [0, 1], 4: [0, 2, 4, 6], 8: list(range(8))}      # of the order of `inference.views.views`
COLOURS = RED, BLUE, GREEN, ORANGE, '#7b5aa6', '#777777'
MARKERS = {1: 'o', 2: 's', 4: '^', 8: 'D'}


@dataclass
class Judged:
    "What the networks of one run say of the images of one table"
    scores: dict[str, np.ndarray]            # STAGE/foldK -> (images, 8 views)
    thresholds: dict[str, tuple[float, ...]]             # of each stage, and of the ensemble as ''
    members: list[str]                       # STAGE/foldK of the ensemble
    grades: np.ndarray                       # true ones (images,)
    seconds: dict[str, float]                # an image and view, of each network
    read_seconds: float                      # to read and prepare an image


@dataclass
class Choice:
    "Some networks and views: what they are worth and cost"
    name: str
    views: int
    passes: int
    ms: float                                # an image, without reading it
    grades: np.ndarray
    scores: np.ndarray


def fold_name(file: str) -> str:
    "Return STAGE/foldK of a network's file"
    return str(PurePosixPath(file).parent)


def all_networks(root: Path) -> tuple[ModelSpec, list[str], dict[str, tuple[float, ...]]]:
    "Return a model of every finished network of a run, which of them its ensemble has, and thresholds as in `Judged`"
    final, _ = read_model(root)
    stages = sorted(p.parent.parent.name for p in root.glob('*/fold0/stage.json'))
    models = {stage: read_model(root / stage)[0] for stage in stages}
    members = [replace(m, tta='d4') for model in models.values() for m in model.members]
    thresholds = {stage: model.thresholds for stage, model in models.items()} | {'': final.thresholds}
    in_final = [fold_name(m.file) for m in final.members]
    return replace(final, members=tuple(members)), in_final, thresholds


def judge(run: str, name: str) -> Judged:
    "Show the images of a table to every network of a run. Raises `AptosError` if the run was trained on one"
    root, frame = Path(run), find_table(name).contents.frame
    model, members, thresholds = all_networks(root)
    grader = Grader(model, root)
    start, squares, infos = time.perf_counter(), [], []
    for _, images in grader.read_batches(frame.path):
        squares += [o for o, _ in images if o is not None]
        infos += [info for o, info in images if o is not None]
    read_seconds = (time.perf_counter() - start) / len(frame)
    unreadable = len(frame) - len(squares)
    if unreadable: raise AptosError(f'{name}: {unreadable} images cannot be read. Remove their rows.')
    check_unseen(frame.assign(**{key: [info[key] for info in infos] for key in ('pixel_sha256', 'perceptual_hash')}),
                 model, root)
    scores, seconds = {}, {}
    for member, run_network in grader.runners:
        x = np.stack([o[member.size] for o in squares])
        start = time.perf_counter()
        parts = [run_network(x[i:i + 16])[0] for i in range(0, len(x), 16)]
        seconds[fold_name(member.file)] = (time.perf_counter() - start) / len(x) / 8
        scores[fold_name(member.file)] = np.concatenate(parts)
    return Judged(scores, thresholds, members, frame.diagnosis.to_numpy(int), seconds, read_seconds)


def check_unseen(frame, model: ModelSpec, root: Path) -> None:
    "Raise `AptosError` if an image was used to train or tune the model"
    seen = SeenImages(training_images(model, root)[0]).find(frame) != ''
    if seen.any():
        raise AptosError(f'{root}: was trained on {seen.sum()} of {len(frame)} images, for example '
                         f'{frame.id_code[seen].iloc[0]}. Give a table that the run has not seen.')


def subsets(judged: Judged) -> dict[str, tuple[str, list[str]]]:
    "Return name -> (thresholds of, networks): the first and all of each stage, and all of the ensemble"
    sets: dict[str, tuple[str, list[str]]] = {}
    for stage in dict.fromkeys(name.partition('/')[0] for name in judged.scores):
        own = [name for name in judged.scores if name.startswith(f'{stage}/')]
        for n in sorted({1, len(own)}):
            if own[:n] != judged.members: sets[f'{n} {stage}'] = stage, own[:n]
    return sets | {f'all {len(judged.members)}': ('', judged.members)}


def choose(parts: Iterable[Judged], name: str, n_views: int) -> Choice:
    "Return the grades of some networks and views, of all tables together"
    grades, scores, seconds = [], [], []
    for judged in parts:
        whose, networks = subsets(judged)[name]
        score = np.mean([judged.scores[o][:, VIEWS[n_views]].mean(1) for o in networks], 0)
        grades.append(apply_thresholds(score, judged.thresholds[whose]))
        scores.append(score)
        seconds.append(n_views * sum(judged.seconds[o] for o in networks))
    return Choice(name, n_views, n_views * len(networks), 1000 * float(np.mean(seconds)), np.concatenate(grades),
                  np.concatenate(scores))


def short(number: float, sign: str = '') -> str:
    "Return a number between -1 and 1 in few characters: .79, -.02"
    return f'{number:{sign}.3f}'.replace('0.', '.')


def row(choice: Choice, best: Choice, truth: np.ndarray) -> list[str]:
    "Return the row of a choice in the table"
    low, high = kappa_interval(choice.grades, truth)
    lost, *interval = paired_interval(best.grades, choice.grades, truth)
    return [f'{choice.name} × {choice.views}', str(choice.passes), f'{choice.ms:.0f}',
            f'{short(quadratic_kappa(choice.grades, truth))} ({short(low)}–{short(high)})',
            '' if choice is best else f'{short(lost, "+")} ({" ".join(short(o, "+") for o in interval)})',
            short(auc(choice.scores, truth >= REFERABLE)[0]), short(float(spearmanr(choice.scores, truth).statistic))]


def panel(ax: Axes, choices: list[Choice], value, label: str) -> None:
    "Draw a value of each choice over its forward passes; a line joins the views of the same networks"
    for colour, name in zip(COLOURS * 2, dict.fromkeys(c.name for c in choices), strict=False):
        of_name = [c for c in choices if c.name == name]
        y = [value(c) for c in of_name]
        ax.plot([c.passes for c in of_name], y, '-', color=colour, linewidth=1.5, label=name)
        for c, one in zip(of_name, y, strict=True):
            ax.plot(c.passes, one, MARKERS[c.views], color=colour, markersize=7, markeredgecolor='white')
    ticks = sorted({c.passes for c in choices if c.passes in (1, 2, 4, 8, 16, 24, 40, 48, 80)})
    ax.set_xscale('log')
    ax.set_xticks(ticks, [str(o) for o in ticks], minor=False)
    ax.set_xticks([], minor=True)
    ax.set(xlabel='forward passes for an image', ylabel=label)
    ax.grid(alpha=.25)
    ax.spines[['top', 'right']].set_visible(False)


def plot(choices: list[Choice], truth: np.ndarray, title: str) -> bytes:
    "Return the plot as PNG: kappa by the run's thresholds, and Spearman's correlation, which needs none"
    fig = Figure(figsize=(8, 4), dpi=100, layout='constrained')
    left, right = fig.subplots(1, 2)
    panel(left, choices, lambda c: quadratic_kappa(c.grades, truth), "kappa, by the run's thresholds")
    panel(right, choices, lambda c: spearmanr(c.scores, truth).statistic, 'rank correlation of score and grade')
    for views, marker in MARKERS.items():
        right.plot([], [], marker, color='black', label=f'{views} view{"s" * (views > 1)}', linestyle='none')
    handles, labels = right.get_legend_handles_labels()
    fig.legend(handles, labels, loc='outside lower center', ncols=5, frameon=False, fontsize=9)
    fig.suptitle(title, fontsize=11)
    buffer = BytesIO()
    fig.savefig(buffer, format='png', metadata={'Software': None})
    return buffer.getvalue()


def main(png: str, *pairs: str) -> None:
    "Print the table and write the plot"
    parts = [judge(run, name) for run, name in zip(pairs[::2], pairs[1::2], strict=True)]
    truth = np.concatenate([o.grades for o in parts])
    choices = [choose(parts, name, views) for name in subsets(parts[0]) for views in VIEWS]
    best = choices[-1]
    title = f'{len(truth)} images that no network was trained on'
    say(f'{machine()}; PyTorch f32; reading and preparing an image: '
        f'{1000 * np.mean([o.read_seconds for o in parts]):.0f} ms')
    columns = ['choice', 'passes', 'ms', 'kappa (95 % CI)', 'lost (95 % CI)', 'AUC', 'rank']
    table(title, columns, [row(c, best, truth) for c in choices], right=('passes', 'ms'))
    write_bytes(Path(png), plot(choices, truth, title))


if __name__ == '__main__': main(*sys.argv[1:])
