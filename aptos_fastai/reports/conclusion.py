"What a reader of the report must know first: a conclusion of three sentences, four figures, and what they belong to."
from aptos_fastai.decisions import DecisionSpec, OperatingPoint, decision_of_record
from aptos_fastai.metrics import REFERABLE
from aptos_fastai.pipeline.summary import interval_text
from aptos_fastai.reports.parts import card, chosen_for, measure_text, percent

REFERABLE_DR = f'referable DR (grade ≥ {REFERABLE})'


def submitted(summary: dict) -> dict:
    "Return the entry of `stages` in summary.json that the model is."
    return next(o for o in summary['stages'] if o['stage'] == summary['submission']['node'])


def conclusion(summary: dict) -> list[str]:
    "Return three sentences: how well the model grades, how well it refers, and what limits these figures."
    result = submitted(summary)
    return [grading_sentence(result), referral_sentence(result, summary['decision']['programme']),
            limits_sentence(summary, result)]


def grading_sentence(result: dict) -> str:
    "Return what the model is, and its kappa against the labels."
    shares = result.get('members') or {}     # summaries of older builds lack them
    n = sum(shares.get(network.partition('/')[0], 1) > 0 for network in result['weights'])
    weighted = 'weighted ' if len({w for w in shares.values() if w}) > 1 else ''
    networks = 'one network' if n == 1 else f'{weighted}mean of {n} networks'
    kappa = interval_text(result['kappa'], result['kappa_interval'], result['resampled'])
    return (f'{result["stage"]} ({networks}) grades diabetic retinopathy (DR) from 0 to 4 in fundus images: quadratic '
            f'weighted kappa {kappa} against the labels of {result["validated"]} out-of-fold images.')


def referral_sentence(result: dict, programme: dict) -> str:
    "Return sensitivity and specificity at the operating point, and what is referred in all, by patient if known."
    point = decision_of_record(result['decision']).point(REFERABLE)
    images, patients = programme['images'], programme['patients']
    referred = f'it refers {percent(images["referred"]["value"])} of the images, ungradable ones included'
    if patients:
        referred += (f', and {percent(patients["referred"]["value"])} of {patients["referred"]["images"]} patients '
                     f'(sensitivity {measure_text(patients["sensitivity"])}, '
                     f'specificity {measure_text(patients["specificity"])})')
    if not point:
        return (f'It has no operating point and refers grade {REFERABLE} and above: sensitivity '
                f'{measure_text(images["sensitivity"])} and specificity {measure_text(images["specificity"])} for '
                f'{REFERABLE_DR}; {referred}.')
    return (f'At its operating point (score ≥ {point.threshold:.2f}, {chosen_for(point)}) it has a '
            f'sensitivity of {measure_text(point.sensitivity, result["resampled"])} and a specificity of '
            f'{measure_text(point.specificity, result["resampled"])} for {REFERABLE_DR}; {referred}.')


def limits_sentence(summary: dict, result: dict) -> str:
    "Return what limits the figures: the source of the images, unknown patients, clusters, synthetic images."
    limits = ['all images are of the source that the model was trained on']
    if summary['synthetic']: limits.insert(0, 'the images are generated, so that the figures have no clinical meaning')
    if result['resampled'] != 'patients':
        limits.append('the patients are unknown, so that images of one patient can be on both sides')
    limits += [f'kappa drops by {o["drop"]:.2f} between images that differ in {o["kind"]} (by chance up to '
               f'{o["drop_by_chance"]:.2f})'
               for o in summary['clusters'] if o['drop'] is not None and o['drop'] > o['drop_by_chance']]
    missing = [str(o['grade']) for o in result['recall'] if not o['images']]
    if missing: limits.append(f'no image has grade {", ".join(missing)}')
    return f'Limits: {"; ".join(limits)}.'


def cards(summary: dict) -> list[tuple[str, str]]:
    "Return the (figure, label) pairs at the top: kappa, AUC, and sensitivity and specificity as deployed."
    result = submitted(summary)
    over = result['resampled']
    kappa = dict(value=result['kappa'], interval=result['kappa_interval'], images=result['validated'])
    spec = decision_of_record(result['decision'])
    found = at_operating_point(spec, summary['decision']['programme'])
    where = 'at the operating point' if spec.point(REFERABLE) else f'grade ≥ {REFERABLE}'
    return [card(kappa, 'quadratic weighted kappa', over), card(result['auc'], f'AUC, {REFERABLE_DR}', over),
            card(found['sensitivity'], f'sensitivity {where}', over),
            card(found['specificity'], f'specificity {where}', over)]


def at_operating_point(spec: DecisionSpec, programme: dict) -> dict:
    "Return cross-fitted sensitivity and specificity of the operating point; without one, those of all rules."
    point: OperatingPoint | None = spec.point(REFERABLE)
    if not point: return programme['images']
    return dict(sensitivity=point.sensitivity, specificity=point.specificity)
