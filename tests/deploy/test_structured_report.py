"DICOM structured reports: what they say is read back with pydicom alone, and names never get in."
import cv2
import pytest
from conftest import expect_error, write_dicom

from aptos_fastai.cli import main
from aptos_fastai.deploy import structured_report as sr
from aptos_fastai.inference.grader import load_grader

pydicom = pytest.importorskip('pydicom')
pytest.importorskip('highdicom')
UIDS = dict(StudyInstanceUID='1.2.3', SeriesInstanceUID='1.2.3.1', PatientID='4711', Modality='OP')


def pixels(path): return cv2.imread(str(path))[..., ::-1]


def items(node):
    "Every content item below `node` as (type, concept name, value)"
    for item in node.get('ContentSequence', ()):
        name = item.ConceptNameCodeSequence[0].CodeMeaning if 'ConceptNameCodeSequence' in item else ''
        value = ''
        if item.ValueType == 'NUM': value = item.MeasuredValueSequence[0].FloatingPointValue
        if item.ValueType == 'CODE':
            code = item.ConceptCodeSequence[0]
            value = code.CodingSchemeDesignator, code.CodeValue, code.CodeMeaning
        if item.ValueType == 'TEXT': value = str(item.TextValue)
        if item.ValueType == 'IMAGE': value = item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID
        yield item.ValueType, name, value
        yield from items(item)


def report_of(toy, file, out):
    main(['dicom_report', str(toy), str(file), '-o', str(out)])
    return pydicom.dcmread(out)


def test_a_report_says_what_predict_says(toy, image_paths, tmp_path, capsys):
    file = write_dicom(tmp_path / 'eye', pixels(image_paths[0]), ImageLaterality='R', StudyDate='20260102', **UIDS)
    ds = report_of(toy, file, tmp_path / 'report.dcm')
    row = load_grader(toy).predict([file]).iloc[0]
    assert ds.SOPClassUID == '1.2.840.10008.5.1.4.1.1.88.33'                   # Comprehensive SR
    assert ds.ContentTemplateSequence[0].TemplateIdentifier == '1500'
    assert ds.StudyInstanceUID == '1.2.3' and ds.PatientID == '4711' and ds.StudyDate == '20260102'
    assert ds.SeriesInstanceUID != '1.2.3.1' and ds.VerificationFlag == 'UNVERIFIED'
    evidence = ds.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
    assert evidence.SeriesInstanceUID == '1.2.3.1'
    assert evidence.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == '1.2.3.4'
    found = list(items(ds))
    values = {name: value for kind, name, value in found if kind in ('NUM', 'CODE')}
    assert values[sr.NUMBERS['score']] == pytest.approx(row.score)
    assert values[sr.NUMBERS['p_referable']] == pytest.approx(row.p_referable)
    loinc = ['LA18643-9', 'LA18644-7', 'LA18645-4', 'LA18646-2', 'LA18648-8'][row.grade]
    assert values['Right eye Diabetic retinopathy severity level by Ophthalmoscopy'][:2] == ('LN', loinc)
    assert values['Referral decision'][::2] == ('99APTOS', row.decision)
    assert values['Referable diabetic retinopathy'][0] == 'SCT'
    assert values['Referable diabetic retinopathy'][2].lower() == row.referable
    assert values['Laterality'][2] == 'Right' and values['Finding Site'][2] == 'Retina'
    assert values['Intended use'][2] == 'Research use only. Not a medical device.'
    assert ('IMAGE', 'Source of Measurement', '1.2.3.4') in found
    texts = ' '.join(value for kind, _, value in found if kind == 'TEXT')
    grader = load_grader(toy)
    for text in (grader.model.key, grader.model.members[0].sha256, 'SYNTHETIC', 'Not a medical device'):
        assert text in texts, text
    assert 'treat as patient data' in ' '.join(capsys.readouterr().out.split())


def test_names_do_not_get_into_a_report(toy, image_paths, tmp_path):
    private = dict(PatientSex='F', ReferringPhysicianName='HOUSE^GREGORY', PatientAddress='Baker Street',
                   OtherPatientIDs='OTHERKEY', OperatorsName='SMITH^ANN', InstitutionName='St Elsewhere',
                   PatientAge='070Y')
    file = write_dicom(tmp_path / 'eye', pixels(image_paths[0]), **UIDS, **private)
    ds = report_of(toy, file, tmp_path / 'report.dcm')
    assert ds.PatientName == '' and ds.PatientBirthDate == '' and ds.PatientSex == ''
    data = (tmp_path / 'report.dcm').read_bytes()
    for text in (b'DOE', b'19500131', b'HOUSE', b'Baker', b'OTHERKEY', b'SMITH', b'Elsewhere', b'070Y'):
        assert text not in data, text


def test_a_report_of_an_unknown_eye_and_one_without_a_grade(toy, image_paths, tmp_path):
    grader = load_grader(toy)
    source = sr.read_source(write_dicom(tmp_path / 'eye', pixels(image_paths[0]), **UIDS))
    row = grader.predict([tmp_path / 'eye']).iloc[0].to_dict()
    found = {name: value for _, name, value in items(sr.get_report(grader, source, row))}
    assert found['Retinopathy severity level'][0] == 'LN' and 'Laterality' not in found
    refused = dict(row, grade=None, ungradable='blurred; not a colour fundus image', decision='not gradable',
                   referable='ungradable', sight_threatening='ungradable', p_referable=float('nan'),
                   p_sight_threatening=float('nan'))
    found = list(items(sr.get_report(grader, source, refused)))
    reasons = [value[2] for _, name, value in found if name == 'Not gradable because']
    assert reasons == ['blurred', 'not a colour fundus image']
    names = [name for _, name, _ in found]
    assert 'Retinopathy severity level' not in names and sr.NUMBERS['p_referable'] not in names


def test_codes_have_the_lengths_of_the_standard():
    texts = [*sr.SEVERITY.values(), *sr.GRADES, *sr.SIDES.values(), *sr.YES_NO.values(), sr.RETINA]
    assert all(len(code) <= 16 and len(meaning) <= 64 for code, meaning in texts)
    assert all(len(text) <= 64 for text in [*sr.NUMBERS.values(), *sr.ANSWERS.values()])


@pytest.mark.parametrize('what, words', [
    ('png', 'is no DICOM file, so there is no study'), ('missing', 'no such file'),
    ('no study', 'has no StudyInstanceUID'), ('exists', 'report.dcm: already exists'),
    ('no package', 'pip install highdicom'), ('no pixels', 'DICOM without pixels')])
def test_what_cannot_be_reported_says_why(toy, image_paths, tmp_path, capsys, monkeypatch, what, words):
    file, out = tmp_path / 'eye', tmp_path / 'report.dcm'
    tags = {name: value for name, value in UIDS.items() if what != 'no study' or name != 'StudyInstanceUID'}
    if what == 'png': file = image_paths[0]
    elif what != 'missing': write_dicom(file, pixels(image_paths[0]), **tags)
    if what == 'exists': out.write_bytes(b'mine')
    if what == 'no package': monkeypatch.setattr(sr, 'find_spec', lambda name: None)
    if what == 'no pixels':
        ds = pydicom.dcmread(file)
        del ds.PixelData
        ds.save_as(file)
    expect_error(capsys, ['dicom_report', toy, file, '-o', out], words)
    assert out.exists() == (what == 'exists')
