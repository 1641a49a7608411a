"Texts and figures that all reports make in the same way."
from collections.abc import Iterable

from matplotlib.figure import Figure as Plot

from aptos_fastai.decisions import OperatingPoint
from aptos_fastai.inference.eyes import NO_INDEPENDENT_READING
from aptos_fastai.pipeline.summary import eyes_rows, interval_text
from aptos_fastai.reports import plots
from aptos_fastai.reports.html import Figure, Table


def figure(title: str, plot: Plot, caption: str = '', whole: bool = False) -> Figure:
    "Return a plot with its title and caption, as SVG; `whole`: as wide as the page."
    return Figure(title, plots.to_svg(plot, title), caption, whole)


def eyes_table(results: dict) -> Table:
    "Return kappa and AUC of images with a fellow, alone and by both eyes."
    rows = [[name, kappa, auc] for name, kappa, auc in eyes_rows(results)]
    refitted = (' Refitted: the score goes through the same regression without the other eye; what is gained over it '
                'is the part of the other eye.') if 'own_score' in results else ''
    return Table(['graded', 'kappa (95 % CI)', 'AUC, referable (95 % CI)'], rows,
                 f'{results["images"]} images of {results["patients"]} patients with an image of the other eye; '
                 f'intervals over patients, paired where something is subtracted.{refitted} Coverage of the prediction '
                 f'sets of fused images: {measure_text(results["coverage"])}. Caution: {NO_INDEPENDENT_READING}.')


def percent(share: float) -> str:
    "Return 0.153 as '15 %'."
    return f'{100 * share:.0f} %'


def thresholds_text(thresholds: Iterable[float]) -> str:
    "Return the thresholds with two decimals, separated by spaces."
    return ' '.join(f'{t:.2f}' for t in thresholds)


def measure_text(measure: dict, over: str = '') -> str:
    "Return a metric as text, '0.833 (0.80–0.86)', or why it is undefined."
    if measure['value'] is None: return f'undefined: {measure["reason"]}'
    if measure['interval'] is None: return f'{measure["value"]:.3f}'
    return interval_text(measure['value'], measure['interval'], over)


def chosen_for(point: OperatingPoint) -> str:
    "Return how an operating point was chosen: 'chosen for sensitivity 0.90'."
    return 'fixed in the recipe' if point.target == 'threshold' else f'chosen for {point.target_text}'


def set_rows(sets: dict) -> list[list]:
    "Return true grade, images, coverage and mean size of prediction sets, of all images and by grade."
    all_images = dict(sets['coverage'], grade='all', mean_size=sets['mean_size']['value'])
    return [[str(o['grade']), o['images'], measure_text(o), f'{o["mean_size"]:.2f}']
            for o in [all_images, *sets['by_grade']] if o['images']]


def cluster_kappa(cluster: dict) -> str:
    "Return the kappa of a cluster of images with its interval, or why there is none."
    return 'one grade' if cluster['kappa'] is None else interval_text(cluster['kappa'], cluster['kappa_interval'])


def card(measure: dict, label: str, over: str = '') -> tuple[str, str]:
    "Return the (figure, label) pair of a card: the value, and the label with interval and number of images."
    if measure['value'] is None: return 'none', f'{label}: {measure["reason"]}'
    value, _, interval = measure_text(measure, over).partition(' ')
    return value, f'{label} {interval}, n = {measure["images"]}'.replace(' ,', ',')
