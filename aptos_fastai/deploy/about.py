"What the page and the API of `serve` say about the model."
from collections.abc import Iterable
from dataclasses import asdict

from aptos_fastai.common.disclaimer import DISCLAIMER
from aptos_fastai.decisions import OperatingPoint
from aptos_fastai.inference.audit import audit_record
from aptos_fastai.inference.grader import COLUMNS, Grader
from aptos_fastai.metrics import GRADE_NAMES
from aptos_fastai.pipeline.summary import OUT_OF_FOLD, interval_text

MAX_MEGABYTES = 50                           # of one image
MAX_IMAGES = 20                              # in one request
CROSS_FITTED = 'cross-fitted (each image by a threshold that was chosen on other images)'


def describe_model(grader: Grader, url: str) -> dict:
    "Return the answer of `/api`: the model, what it decides, its figures, and the limits; `url` is that of the server"
    model = grader.model
    decision = model.decision
    audit = audit_record(grader)
    return dict(
        model=model.name, key=model.key, digests=audit['digests'], aptos_fastai=audit['aptos_fastai'],
        backend=audit['backend'], precision=audit['precision'], device=audit['device'], prevalence=audit['prevalence'],
        synthetic=model.synthetic, disclaimer=DISCLAIMER, warnings=list(model.warnings), kappa=model.kappa,
        figures=OUT_OF_FOLD, networks=len(model.members), gate=asdict(model.gate), thresholds=list(model.thresholds),
        grade_names=list(GRADE_NAMES), coverage=model.coverage,
        operating_points=[describe_point(point) for point in decision.points], uncertain=decision.uncertain,
        probabilities=decision.probabilities is not None, columns=COLUMNS, max_megabytes=MAX_MEGABYTES,
        max_images=MAX_IMAGES, example=example(url), openapi=f'{url}openapi.json', docs=f'{url}docs')


def example(url: str) -> str:
    "Return a command that grades an image through the server at `url`, which ends with a slash"
    return f'curl -F files=@eye.jpg {url}api/predict'


def describe_point(point: OperatingPoint) -> dict:
    "Return an operating point as JSON holds it, with a sentence for people as `text`"
    return dict(name=point.name, **asdict(point), text=point_text(point))


def point_text(point: OperatingPoint) -> str:
    "Return an operating point as a sentence: 'referable (grade 2 or above) from score 1.53, chosen for …'"
    chosen = '' if point.target == 'threshold' else f', chosen for {point.target_text}'
    source = f' on {point.chosen_on}' if chosen and point.chosen_on else ''
    figures = '; '.join(figure_texts(point))
    text = f'{point.label} (grade {point.lowest_grade} or above) from score {point.threshold:.2f}{chosen}{source}'
    return f'{text}. {CROSS_FITTED.capitalize()}: {figures}' if figures else text


def figure_texts(point: OperatingPoint) -> Iterable[str]:
    "Yield 'sensitivity 0.912 (0.87–0.94) on 180 images' and the specificity, or why there is none"
    for name in ('sensitivity', 'specificity'):
        figure = getattr(point, name)
        if not figure: continue
        if figure['value'] is None: yield f'{name} unknown ({figure["reason"]})'
        elif figure['interval'] is None: yield f'{name} {figure["value"]:.3f} on {figure["images"]} images'
        else: yield f'{name} {interval_text(figure["value"], figure["interval"])} on {figure["images"]} images'
