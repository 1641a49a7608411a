"The OpenAPI document of `serve`: every path, every field of its answers and what it means."
from typing import Any

import aptos_fastai
from aptos_fastai.deploy.about import CROSS_FITTED, MAX_IMAGES, MAX_MEGABYTES
from aptos_fastai.deploy.batching import HEATMAP_SIDE
from aptos_fastai.deploy.pairing import ANSWERS, DECISIONS, MAX_ROWS
from aptos_fastai.inference.explain import DISPLAY_SIDE
from aptos_fastai.inference.patients import COLUMNS as PATIENT_COLUMNS
from aptos_fastai.inference.patients import MISSING_EYE
from aptos_fastai.metrics import GRADE_NAMES, GRADES

NOTHING_KEPT = 'Nothing is kept on the server.'

Schema = dict[str, Any]


# Types

def text(description: str, **more: Any) -> Schema:
    "Return the schema of a text"
    return dict(type='string', description=description, **more)


def optional_text(description: str) -> Schema:
    "Return the schema of a text, or null"
    return dict(type=['string', 'null'], description=description)


def number(description: str, **more: Any) -> Schema:
    "Return the schema of a number, or null"
    return dict(type=['number', 'null'], description=description, **more)


def grade(description: str) -> Schema:
    "Return the schema of a grade, or null"
    return dict(type=['integer', 'null'], description=description, minimum=0, maximum=GRADES - 1)


def probability(description: str) -> Schema:
    "Return the schema of a probability, or null"
    return number(f'{description}; null where the image is not gradable or the model has no probabilities', minimum=0,
                  maximum=1)


def answer(description: str) -> Schema:
    "Return the schema of yes, no, ungradable or empty"
    return text(description, enum=list(ANSWERS))


def array(items: Schema, description: str) -> Schema:
    "Return the schema of a list"
    return dict(type='array', items=items, description=description)


def record(description: str, properties: dict[str, Schema], optional: tuple[str, ...] = ()) -> Schema:
    "Return the schema of an object with exactly these properties; all are required but the `optional` ones"
    required = [name for name in properties if name not in optional]
    return dict(type='object', description=description, properties=properties, required=required,
                additionalProperties=False)


def reference(name: str, description: str = '') -> Schema:
    "Return a reference to a schema of the document"
    link = {'$ref': f'#/components/schemas/{name}'}
    return link | dict(description=description) if description else link


# Fields

NAMES = '; '.join(f'{i} {name}' for i, name in enumerate(GRADE_NAMES))
DECISION_TEXT = ("refer; do not refer; uncertain: refer (the score is below the operating point, the prediction set "
                 'reaches grade 2, and the recipe says [refer] uncertain = refer); not gradable; empty after an error')

IMAGE: dict[str, Schema] = dict(
    file=text('name of the uploaded file'),
    score=number('mean score of all networks and views, around 0 to 4; null after an error'),
    grade=grade(f'{NAMES}; null where not gradable'),
    grade_name=text('name of the grade, or ungradable'),
    decision=text(DECISION_TEXT, enum=['', *DECISIONS]),
    referable=answer('by the operating point, which is chosen apart from the thresholds of the grades'),
    sight_threatening=answer('grade 3 or above, by its own operating point'),
    referable_high_specificity=answer('by the second operating point; empty if the model has one only'),
    p_referable=probability('probability of grade 2 or above'),
    p_sight_threatening=probability('probability of grade 3 or above'),
    **{f'p_{i}': probability(f'probability of grade {i}, {name}') for i, name in enumerate(GRADE_NAMES)},
    ungradable=text('why the image gets no grade: reasons joined by "; ", or empty'),
    score_sd=number('standard deviation of the score over views, folds and networks'),
    grade_low=grade('lowest grade of the prediction set'),
    grade_high=grade('highest grade of the prediction set'),
    flags=text('warnings about the image quality, or empty'),
    image_sha256=text('SHA-256 of the bytes of the image file, hex'),
    error=text('why the image cannot be read; then it has no score and no grade'))

PERSON: dict[str, Schema] = dict(
    patient=optional_text('key of the patient, by Patient ID of a DICOM file; null for another file. No name is read'),
    issuer=optional_text('who issued the key of the patient, by Issuer of Patient ID: the same key of two issuers is '
                         'two patients; null for none'),
    eye=optional_text('left or right, by the laterality of a DICOM file; null for another file or where the tags '
                      'contradict each other'))

HEATMAP: dict[str, Schema] = dict(
    image=text(f'the image as the data URI of a JPEG, its longest side {DISPLAY_SIDE} px; only with heatmap=1'),
    heatmap=text('which places raise the score: data URI of a grey PNG over the same frame as `image`, its longest '
                 f'side {HEATMAP_SIDE} px; white raises the score most. It shows what the network used, not where '
                 'lesions are; only with heatmap=1'))

DIGESTS: dict[str, Schema] = dict(
    model=text('short hash of all that the predictions depend on: two models with one name differ in it'),
    weights=text('short hash of weights and image preparation'), gate=text('short hash of the gate'),
    operating_point=text('short hash of operating points and probabilities'),
    thresholds=text('short hash of thresholds and prediction sets'))

MADE_BY: dict[str, Schema] = dict(
    model=text('name of the model'), digests=record('what identifies the model', DIGESTS),
    aptos_fastai=text('version of this program'), backend=text('torch, onnx or openvino'),
    precision=text('f32, bf16 or fp16'), device=text('cpu, or the name of the GPU'),
    prevalence=number('of referable images, to which the probabilities are re-weighted; null: as validated'))
THRESHOLDS = array(dict(type='number'), 'scores at which grades 1 to 4 begin')

AUDIT: dict[str, Schema] = dict(
    MADE_BY, thresholds=THRESHOLDS, torch=text('version of PyTorch'), backend_version=text('version of the backend'),
    processor=text('name of the processor'), time=text('of the answer, ISO 8601 in UTC', format='date-time'),
    operating_points=array(record('an operating point', dict(
        name=text('referable or sight_threatening'), chosen_for=text('target: sensitivity 0.90'),
        threshold=dict(type='number', description='lowest score that counts'))), 'scores that decide'))

FIGURE: dict[str, Schema] = dict(
    value=number('the figure; null where undefined'),
    interval=dict(type=['array', 'null'], items=dict(type='number'), description='95 % confidence interval'),
    images=dict(type='integer', description='how many images it is measured on'), reason=text('why it is undefined'))

EMPTY = dict(type='object', maxProperties=0)
POINT: dict[str, Schema] = dict(
    name=text('referable or sight_threatening'),
    lowest_grade=dict(type='integer', description='grades from this one on are to be found'),
    target=text('what it was chosen for', enum=['sensitivity', 'specificity', 'threshold']),
    value=dict(type='number', description='of the target'),
    threshold=dict(type='number', description='lowest score that counts'),
    chosen_on=text('the images whose scores chose it'),
    sensitivity=dict(anyOf=[reference('Figure'), EMPTY], description=f'{CROSS_FITTED}; empty for none'),
    specificity=dict(anyOf=[reference('Figure'), EMPTY], description=f'{CROSS_FITTED}; empty for none'),
    note=text('what a reader must know of it'), text=text('all of this as a sentence'))

MODEL: dict[str, Schema] = dict(
    MADE_BY, key=text('the same as digests.model'),
    synthetic=dict(type='boolean', description='trained on generated images: grades have no clinical meaning'),
    disclaimer=text('what every use must respect'), warnings=array(dict(type='string'), 'about its figures'),
    kappa=text('out-of-fold quadratic weighted kappa with interval, or empty'), figures=text('what the figures claim'),
    networks=dict(type='integer', description='how many networks are averaged'),
    gate=dict(type='object', description='what counts as a gradable image'), thresholds=THRESHOLDS,
    grade_names=array(dict(type='string'), 'names of grades 0 to 4'),
    coverage=dict(type='number', description='share of prediction sets that are meant to hold the true grade'),
    operating_points=array(reference('OperatingPoint'), 'the first of a name decides, a second one stands beside it'),
    uncertain=text('whether a prediction set that reaches grade 2 refers an image', enum=['decide', 'refer']),
    probabilities=dict(type='boolean', description='whether the model has calibrated probabilities'),
    columns=array(dict(type='string'), 'fields of an image, in the order of a CSV'),
    max_megabytes=dict(type='integer', description='of one image'),
    max_images=dict(type='integer', description='in one request'), example=text('a command that grades an image'),
    openapi=text('address of this document'), docs=text('address of the documentation'))

PREDICTION: dict[str, Schema] = dict(
    model=text('name of the model'), synthetic=MODEL['synthetic'], disclaimer=MODEL['disclaimer'],
    audit=reference('Audit', 'what made the predictions'),
    rows=array(reference('Image'), 'one for each file, in their order'))

PAIRED: dict[str, Schema] = dict(
    file=IMAGE['file'], patient=optional_text('key of the patient; empty or null: the image is a patient of its own'),
    eye=optional_text('left, right, l, r, os, od; empty or null where it is unknown'), decision=IMAGE['decision'],
    referable=IMAGE['referable'], sight_threatening=IMAGE['sight_threatening'], grade=IMAGE['grade'],
    p_referable=IMAGE['p_referable'], ungradable=IMAGE['ungradable'])

PATIENT_FIELDS: dict[str, Schema] = dict(
    patient=text('key of the patient'), images=dict(type='integer', description='how many images'),
    left_grade=grade('of the left eye'), right_grade=grade('of the right eye'), grade=grade('of the worse eye'),
    decision=text('of the worse eye; not gradable where an eye is missing or not gradable and no other is referred',
                  enum=list(DECISIONS)),
    referable=answer('of the worse eye'), sight_threatening=answer('of the worse eye'),
    p_referable=number('the highest of the eyes', minimum=0, maximum=1),
    eyes_gradable=dict(type=['integer', 'null'], description='how many eyes have a gradable image; null if unknown'),
    missing=text('eyes without an image: left, right'), ungradable=text('eyes without a gradable image, and why'))
PATIENT = {name: PATIENT_FIELDS[name] for name in PATIENT_COLUMNS} | dict(
    rows=array(dict(type='integer'), 'numbers of its images in the request, from 0'))

UPLOAD = dict(
    type='object', required=['files'], properties=dict(
        files=array(dict(type='string', contentMediaType='application/octet-stream'),
                    'image files: JPEG, PNG, TIFF, BMP, WebP or DICOM; repeat the field for several, at most '
                    f'{MAX_IMAGES} of {MAX_MEGABYTES} MB'),
        heatmap=text('1, true, yes or on: add the image and its heat map to each row', default='0')))


# The document

def response(description: str, schema: Schema) -> dict:
    "Return a response of JSON"
    return dict(description=description, content={'application/json': dict(schema=schema)})


def responses(description: str, schema: Schema, *errors: int) -> dict:
    "Return the responses of an operation: status 200 and its errors"
    return {'200': response(description, schema)} | {
        str(status): response(ERRORS[status], reference('Error')) for status in (400, *errors, 500)}


ERRORS = {400: 'the request is not valid, or its host name is not served', 404: 'no such path',
          405: 'another method is needed', 408: 'the upload took too long or stopped',
          411: 'the header Content-Length is missing',
          413: 'too many or too large images', 415: 'the content type is wrong', 500: 'an error of the server',
          503: 'the server is busy; try again after the seconds in the header Retry-After'}


def schemas() -> dict[str, Schema]:
    "Return the schemas of the document"
    missing = text('what a missing or ungradable eye makes of a patient who is not referred: not gradable, or the '
                   'other eye decides', enum=list(MISSING_EYE), default=MISSING_EYE[0])
    counts = {'patients': dict(type='integer', description='all of them')} | {
        name: dict(type='integer', description=f'with the decision {name!r}') for name in DECISIONS}
    return dict(
        Image=record('A graded image: the columns of `predict`, and what DICOM tags say of the patient',
                     IMAGE | PERSON | HEATMAP, optional=('image', 'heatmap')),
        Prediction=record('The grades of the images of a request', PREDICTION),
        Audit=record('What made the predictions', AUDIT),
        Model=record('The model and the limits of the server', MODEL),
        OperatingPoint=record('The lowest score that counts, and what it was chosen for', POINT),
        Figure=record('A measured figure', FIGURE),
        PairedImage=dict(record('A graded image whose patient is known', PAIRED, optional=tuple(PAIRED)[1:]),
                         additionalProperties=True),
        PatientsRequest=record('Graded images of patients', optional=('missing_eye',), properties=dict(
            rows=array(reference('PairedImage'), f'at most {MAX_ROWS}'), missing_eye=missing)),
        Patient=record('The result of a patient', PATIENT),
        Patients=record('Patients in the order of their first image', dict(
            patients=array(reference('Patient'), 'one for each patient'),
            counts=record('How many patients have each decision', counts))),
        Health=record('Whether the server works', dict(
            status=text('ok'), model=text('name of the model'),
            pending=dict(type='integer', description='images that wait for their grade'))),
        Error=record('Why a request failed', dict(error=text('one sentence'))))


def openapi_document(about: dict, url: str, kept: str = NOTHING_KEPT) -> dict:
    """Return the OpenAPI 3.1 document of the server at `url`.

    `about` is the answer of `/api`; `kept` says what the server keeps of a request.
    """
    predict = dict(
        operationId='predict', summary='Grade images', description=kept,
        requestBody=dict(required=True, content={'multipart/form-data': dict(schema=UPLOAD)}),
        responses=responses('the grades', reference('Prediction'), 405, 408, 411, 413, 415, 503))
    predict['x-example'] = about['example']
    patients = dict(
        operationId='patients', summary='Pair graded images of patients',
        description="A patient's result is that of the worse eye.",
        requestBody=dict(required=True, content={'application/json': dict(schema=reference('PatientsRequest'))}),
        responses=responses('the patients', reference('Patients'), 405, 408, 411, 413, 415))
    document = _get('openapi', 'Return this document', dict(type='object', description='OpenAPI 3.1'))
    return dict(
        openapi='3.1.0',
        info=dict(title='Diabetic retinopathy grading', version=aptos_fastai.__version__,
                  description=f'{about["disclaimer"]} Model: {about["model"]} ({about["key"]}). Every error is JSON '
                              'with the key error.'),
        servers=[dict(url=url.rstrip('/'))],
        paths={'/api/predict': dict(post=predict), '/api/patients': dict(post=patients),
               '/api': _get('about', 'Describe the model', reference('Model')),
               '/health': _get('health', 'Tell whether the server works', reference('Health')),
               '/openapi.json': document},
        components=dict(schemas=schemas()))


def _get(name: str, summary: str, schema: Schema) -> dict:
    return dict(get=dict(operationId=name, summary=summary, responses=responses(summary, schema, 405)))
