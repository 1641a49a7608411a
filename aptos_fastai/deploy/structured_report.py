"""Write the grade of one DICOM image as a DICOM structured report: Comprehensive SR, template TID 1500.

Coded values are those of LOINC (severity of diabetic retinopathy, answer list LL2117-1), SNOMED CT (retina, side,
fundus photography) and DICOM; what these lack has codes of the private scheme 99APTOS. Names, birth date and sex are
not copied: the report belongs to its patient and study by Patient ID and UIDs.
"""
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aptos_fastai
from aptos_fastai.common.console import say
from aptos_fastai.common.disclaimer import DISCLAIMER
from aptos_fastai.common.io import AptosError, atomic_write, check_output_file
from aptos_fastai.common.privacy import patient_data
from aptos_fastai.data.dicom import is_dicom, tags_of
from aptos_fastai.inference.explain import grade_text
from aptos_fastai.inference.eyes import GRADED_ALONE
from aptos_fastai.inference.grader import Grader, load_grader
from aptos_fastai.inference.model_spec import SYNTHETIC_MODEL

if TYPE_CHECKING:
    from highdicom.sr import CodedConcept, ComprehensiveSR

PRIVATE = '99APTOS'                          # coding scheme of what no standard names
SEVERITY = dict(left=('71490-7', 'Left eye Diabetic retinopathy severity level by Ophthalmoscopy'),
                right=('71491-5', 'Right eye Diabetic retinopathy severity level by Ophthalmoscopy'))     # LOINC
GRADES = [('LA18643-9', 'No apparent retinopathy'), ('LA18644-7', 'Mild non-proliferative retinopathy'),
          ('LA18645-4', 'Moderate non-proliferative retinopathy'),
          ('LA18646-2', 'Severe non-proliferative retinopathy'), ('LA18648-8', 'Proliferative retinopathy')]   # LOINC
RETINA = '5665001', 'Retina'                 # SNOMED CT, as are the next three
SIDES = dict(left=('7771000', 'Left'), right=('24028007', 'Right'))
YES_NO = dict(yes=('373066001', 'Yes'), no=('373067005', 'No'))
FUNDUS_PHOTOGRAPHY = '314971001', 'Camera fundoscopy'
NUMBERS = dict(score='Diabetic retinopathy score, about 0 to 4', score_sd='Standard deviation of the score',
               p_referable='Probability of referable diabetic retinopathy',
               p_sight_threatening='Probability of sight-threatening retinopathy')
ANSWERS = dict(decision='Referral decision', referable='Referable diabetic retinopathy',
               sight_threatening='Sight-threatening diabetic retinopathy')
COPIED = ('SOPClassUID', 'SOPInstanceUID', 'StudyInstanceUID', 'SeriesInstanceUID', 'PatientID', 'IssuerOfPatientID',
          'StudyDate', 'StudyTime', 'StudyID', 'AccessionNumber', 'Modality', 'Rows', 'Columns', 'NumberOfFrames')
NEEDED = 'SOPClassUID', 'SOPInstanceUID', 'StudyInstanceUID', 'SeriesInstanceUID'
EMPTY = 'PatientName', 'PatientBirthDate', 'PatientSex', 'ReferringPhysicianName'    # required, may be empty
MEANING = 64                                 # characters of a code's meaning, at most
SERIES_NUMBER = 9700                         # of the report, in the study; unlikely to be taken


def write_dicom_report(model: str, image: str, output: str) -> None:
    "`dicom_report MODEL IMAGE`: grade a DICOM image and write its structured report. Raises `AptosError`"
    file, out = Path(image), Path(output)
    if find_spec('highdicom') is None:
        raise AptosError('dicom_report needs the extra dicom-report. Run pip install highdicom.')
    check_output_file(out)
    if out.exists(): raise AptosError(f'{out}: already exists. Choose another file with -o.')
    source = read_source(file)
    grader = load_grader(model)
    row = grader.predict([file]).iloc[0].to_dict()
    if row['error']: raise AptosError(f'{file}: {row["error"]}')
    report = get_report(grader, source, row)
    with atomic_write(out) as temp: report.save_as(temp)
    say(f'{grade_text(row).strip()}: {row["decision"]} -> {out}')
    say(patient_data(out.name, 'names the patient by key, study and image by their UIDs'), 'dim')
    say(DISCLAIMER, 'dim')
    if grader.model.synthetic: say(SYNTHETIC_MODEL, 'yellow')
    if grader.model.eyes: say(GRADED_ALONE, 'yellow')


def read_source(file: Path) -> Any:
    """Return the tags of a DICOM image that its report needs, without names; and its eye as the attribute `eye`.

    Raises `AptosError` for another file, or one that belongs to no study.
    """
    import pydicom
    if file.is_dir(): raise AptosError(f'{file}: is a folder. Name one image in it; each gets a report of its own.')
    if not file.is_file(): raise AptosError(f'{file}: no such file')
    if not is_dicom(file):
        raise AptosError(f'{file}: is no DICOM file, so there is no study that a report could belong to. Give a DICOM '
                         'image, or use predict.')
    try: ds = pydicom.dcmread(file, stop_before_pixels=True)
    except Exception as e:                   # pydicom raises anything on damaged files
        raise AptosError(f'{file}: cannot be decoded ({type(e).__name__}: {e})') from None
    missing = [name for name in NEEDED if not ds.get(name)]
    if missing: raise AptosError(f'{file}: has no {", ".join(missing)}, so no report can refer to it. Set the tags.')
    source = pydicom.Dataset()
    for name in COPIED:
        if name in ds: source[name] = ds[name]
    for name in EMPTY: setattr(source, name, '')
    for name in ('PatientID', 'StudyDate', 'StudyTime', 'StudyID', 'AccessionNumber'):
        if name not in source: setattr(source, name, '')
    source.eye = tags_of(ds).eye
    return source


def get_report(grader: Grader, source: Any, row: dict) -> 'ComprehensiveSR':
    "Return the structured report of a graded image; `source` is what `read_source` returns"
    import highdicom as hd
    from highdicom.sr import ComprehensiveSR, LanguageOfContentItemAndDescendants, MeasurementReport
    language = LanguageOfContentItemAndDescendants(_code('RFC5646', ('en', 'English')))
    content = MeasurementReport(_observer(grader), _code('SCT', FUNDUS_PHOTOGRAPHY),
                                [_measurements(grader, source, row)], language_of_content_item_and_descendants=language)
    scheme = hd.coding_schemes.CodingSchemeIdentificationItem(PRIVATE, name='aptos_fastai')
    return ComprehensiveSR(
        [source], content[0], series_instance_uid=hd.UID(), series_number=SERIES_NUMBER, sop_instance_uid=hd.UID(),
        instance_number=1, manufacturer='aptos_fastai', is_complete=True, is_final=False,
        manufacturer_model_name=_short(grader.model.name), software_versions=aptos_fastai.__version__,
        device_serial_number=grader.model.key, series_description='Diabetic retinopathy grade, research use only',
        coding_schemes=[scheme])


def _observer(grader: Grader) -> Any:
    "Return who observed: a device, this model"
    from highdicom.sr import DeviceObserverIdentifyingAttributes, ObservationContext, ObserverContext
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid
    device = DeviceObserverIdentifyingAttributes(
        uid=generate_uid(entropy_srcs=['aptos_fastai', grader.model.key]), name='aptos_fastai',
        manufacturer_name='aptos_fastai', model_name=_short(grader.model.name), serial_number=grader.model.key)
    return ObservationContext(observer_device_context=ObserverContext(codes.DCM.Device, device))


def _measurements(grader: Grader, source: Any, row: dict) -> Any:
    "Return the measurement group: the numbers, grade and decision of the image, and by which algorithm"
    from highdicom.sr import (
        FindingSite,
        Measurement,
        MeasurementsAndQualitativeEvaluations,
        SourceImageForMeasurementGroup,
        TrackingIdentifier,
    )
    from pydicom.sr.codedict import codes
    side = _code('SCT', SIDES[source.eye]) if source.eye else None
    numbers = [Measurement(_private(name, text), float(row[name]), codes.UCUM.NoUnits) for name, text in NUMBERS.items()
               if row[name] == row[name] and row[name] is not None]          # NaN: none
    return MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(identifier='image'), algorithm_id=_algorithm(grader),
        finding_sites=[FindingSite(_code('SCT', RETINA), laterality=side)], measurements=numbers,
        qualitative_evaluations=_evaluations(source, row),
        source_images=[SourceImageForMeasurementGroup(source.SOPClassUID, source.SOPInstanceUID)])


def _algorithm(grader: Grader) -> Any:
    "Return which algorithm measured: name, version, and digests of the model and of its weights"
    from highdicom.sr import AlgorithmIdentification
    model = grader.model
    parameters = [f'model key {model.key}', *(f'weights SHA-256 {m.sha256}' for m in model.members),
                  f'thresholds {" ".join(f"{t:.4f}" for t in model.thresholds)}', DISCLAIMER]
    if model.synthetic: parameters.append(SYNTHETIC_MODEL)
    return AlgorithmIdentification(f'aptos_fastai {model.name}', f'{aptos_fastai.__version__} {model.key}', parameters)


def _evaluations(source: Any, row: dict) -> list:
    "Return grade, decision, reasons of an ungradable image, and what the report may be used for, as coded values"
    from highdicom.sr import QualitativeEvaluation
    found = [QualitativeEvaluation(_private(name, text), _answer(row[name])) for name, text in ANSWERS.items()
             if row[name]]
    if not row['ungradable']:
        name = _code('LN', SEVERITY[source.eye]) if source.eye else _private('severity', 'Retinopathy severity level')
        found.insert(0, QualitativeEvaluation(name, _code('LN', GRADES[int(row['grade'])])))
    for reason in filter(None, row['ungradable'].split('; ')):
        found.append(QualitativeEvaluation(_private('ungradable', 'Not gradable because'), _private(reason)))
    use = _private('research', 'Research use only. Not a medical device.')
    return [*found, QualitativeEvaluation(_private('use', 'Intended use'), use)]


def _code(scheme: str, code: tuple[str, str]) -> 'CodedConcept':
    "Return the coded concept of a standard's code and meaning; a meaning has at most `MEANING` characters"
    from highdicom.sr import CodedConcept
    return CodedConcept(code[0], scheme, _short(code[1]))


def _private(value: str, meaning: str = '') -> 'CodedConcept':
    "Return a concept of the private scheme: a text becomes a code of at most 16 characters"
    return _code(PRIVATE, (re.sub(r'\W+', '-', value)[:16], meaning or value))


def _answer(text: str) -> 'CodedConcept':
    "Return the concept of an answer: yes and no are those of SNOMED CT"
    return _code('SCT', YES_NO[text]) if text in YES_NO else _private(text)


def _short(text: str) -> str: return text[:MEANING]
