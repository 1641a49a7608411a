"Patients: whose eye an image shows, and the result of the worse eye."
import itertools
import random
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import dicom, expect_error, write_dicom

from aptos_fastai.cli import main
from aptos_fastai.common.io import AptosError
from aptos_fastai.data.dicom import DicomTags, read_tags
from aptos_fastai.inference.find_images import find_images
from aptos_fastai.inference.gate import GateSpec
from aptos_fastai.inference.patients import COLUMNS, counts_text, identify, patient_table

DECISIONS = ['do not refer', 'uncertain: refer', 'refer']


def image(patient, eye, level=0, grade=None, bad='', error='', p=None):
    "A graded image as `predict` writes it; `level` is its decision: 0 not referred, 1 uncertain, 2 referred"
    if bad or error:
        given = 'ungradable' if bad else ''
        return dict(patient=patient, eye=eye, file='f.png', grade=pd.NA, decision='not gradable' if bad else '',
                    referable=given, sight_threatening=given, p_referable=np.nan, ungradable=bad, error=error)
    return dict(patient=patient, eye=eye, file='f.png', grade=level if grade is None else grade,
                decision=DECISIONS[level], referable='yes' if level == 2 else 'no', sight_threatening='no',
                p_referable=level / 4 if p is None else p, ungradable='', error='')


def table(*rows, missing_eye='ungradable'):
    return patient_table(pd.DataFrame(rows), missing_eye).set_index('patient')


# The worse eye, by an independent oracle

def rank_of(eye_images):
    "The worst rank of an eye's readable images (0 not referred, 1 uncertain, 2 referred); None if there is none"
    ranks = [DECISIONS.index(o['decision']) for o in eye_images if o['decision'] in DECISIONS]
    return max(ranks) if ranks else None


def worse_eye(images, missing_eye):
    "The decision on a patient whose eyes are known, spelled out eye by eye"
    left, right = (rank_of([o for o in images if o['eye'] == side]) for side in ('left', 'right'))
    if left is None and right is None: return 'not gradable'
    if left is None or right is None:
        only = left if right is None else right
        if only > 0 or missing_eye == 'ignore': return DECISIONS[only]
        return 'not gradable'
    return DECISIONS[max(left, right)]


KINDS = [dict(level=0), dict(level=1), dict(level=2), dict(bad='blurred'), dict(error='no such file')]


@pytest.mark.parametrize('missing_eye', ['ungradable', 'ignore'])
def test_every_pair_of_eyes_gives_the_worse_one(missing_eye):
    sides = [[], *([kind] for kind in KINDS), *map(list, itertools.combinations_with_replacement(KINDS, 2))]
    patients = {f'p{i}': [image(f'p{i}', 'left', **o) for o in left] + [image(f'p{i}', 'right', **o) for o in right]
                for i, (left, right) in enumerate(itertools.product(sides, sides)) if left or right}
    rows = [row for images in patients.values() for row in images]
    random.Random(0).shuffle(rows)                               # the order of images changes nothing
    found = table(*rows, missing_eye=missing_eye)
    assert len(found) == len(patients) == 21 ** 2 - 1
    assert found.decision.to_dict() == {key: worse_eye(images, missing_eye) for key, images in patients.items()}
    assert {*found.decision} == {*DECISIONS, 'not gradable'}
    for key, images in patients.items():
        row = found.loc[key]
        assert row.images == len(images)
        grades = [o['grade'] for o in images if o['grade'] is not pd.NA]
        for side in ('left', 'right'):
            own = [o['grade'] for o in images if o['eye'] == side and o['grade'] is not pd.NA]
            assert row[f'{side}_grade'] is pd.NA if not own else row[f'{side}_grade'] == max(own)
            assert (side in row.missing.split()) == (not any(o['eye'] == side for o in images))
        if row.decision == 'not gradable': assert row.grade is pd.NA and row.p_referable is pd.NA
        else: assert row.grade == max(grades) and row.p_referable == max(grades) / 4
        assert row.eyes_gradable == sum(row[f'{side}_grade'] is not pd.NA for side in ('left', 'right'))


def test_a_missing_or_ungradable_eye_by_hand():
    found = table(image('whole', 'left'), image('whole', 'right'), image('half', 'left'),
                  image('sick', 'right', 2, grade=3), image('dim', 'left'), image('dim', 'right', bad='blurred'),
                  image('retaken', 'left'), image('retaken', 'right', bad='dark'),
                  image('retaken', 'right', 0, grade=1))
    assert list(found.reset_index()) == COLUMNS
    assert found.decision.to_dict() == dict(whole='do not refer', half='not gradable', sick='refer',
                                            dim='not gradable', retaken='do not refer')
    assert found.missing.to_dict() == dict(whole='', half='right', sick='left', dim='', retaken='')
    assert found.ungradable.to_dict() == dict(whole='', half='', sick='', dim='right: blurred', retaken='')
    assert found.referable.tolist() == ['no', 'ungradable', 'yes', 'ungradable', 'no']
    assert found.loc['sick', 'sight_threatening'] == 'ungradable' and found.loc['retaken', 'grade'] == 1
    assert found.eyes_gradable.tolist() == [2, 1, 1, 1, 2]


def test_where_no_eye_is_known_the_worst_image_counts_and_none_is_missing():
    found = table(image('a', '', 0), image('a', '', 2), image('b', ''), image('c', ''), image('c', '', bad='dark'))
    assert found.decision.to_dict() == dict(a='refer', b='do not refer', c='not gradable')
    assert (found.missing == '').all() and found.eyes_gradable.isna().all() and found.left_grade.isna().all()
    assert found.loc['c', 'ungradable'] == 'unknown eye: dark'


def test_an_ungradable_image_of_an_unknown_eye_counts_unless_both_eyes_are_gradable():
    found = table(image('a', 'left'), image('a', '', bad='dark'), image('b', 'left'), image('b', 'right'),
                  image('b', '', bad='dark'), image('c', 'left'), image('c', 'right'), image('c', '', 2))
    assert found.decision.to_dict() == dict(a='not gradable', b='do not refer', c='refer')
    assert found.missing.to_dict() == dict(a='right', b='', c='')


def test_images_without_a_patient_are_rows_of_their_own():
    rows = [dict(image('', 'left'), file=f'{i}.png') for i in range(2)]
    found = table(*rows, image('a', 'left'), image('a', 'right'))
    assert found.decision.to_dict() == {'image 0.png': 'not gradable', 'image 1.png': 'not gradable',
                                        'a': 'do not refer'}


def test_counts_follow_the_gate():
    patients = pd.DataFrame(dict(decision=['refer', 'uncertain: refer', 'do not refer', 'not gradable']))
    text = '4 patients: 2 referred, 1 not referred, 1 not gradable'
    assert counts_text(patients, GateSpec()) == f'{text} (counted as referred, 3 in all: [gate] ungradable = refer)'
    assert counts_text(patients, GateSpec(ungradable='exclude')) == (
        f'{text} (not counted as referred: [gate] ungradable = exclude)')
    assert counts_text(patients[:1], GateSpec()) == '1 patient: 1 referred, 0 not referred, 0 not gradable'


# Whose eye

def csv_of_images(folder, **columns):
    "Write images and the CSV that lists them"
    for name in columns['file']: (folder / name).write_bytes(b'')
    pd.DataFrame(columns).to_csv(folder / 'images.csv', index=False)
    return find_images([str(folder / 'images.csv')])


def test_columns_of_the_csv_name_patient_and_eye(tmp_path):
    entries = csv_of_images(tmp_path, file=['a.png', 'b.png', 'c.png'], subject=['007', '007', 'n/a'],
                            side=['OD', 'left', ''])
    df, notes = identify(entries, 'subject', 'side')
    assert df.patient.tolist() == ['007', '007', ''] and df.eye.tolist() == ['right', 'left', '']
    assert '1 of 3 images have no patient' in notes[0] and '1 of 3 images show an unknown eye' in notes[1]


def test_patients_written_in_several_ways_stay_apart_and_are_named(tmp_path):
    "One row for two people would hide one of them; two rows for one are only incomplete"
    entries = csv_of_images(tmp_path, file=['a.png', 'b.png', 'c.png', 'd.png'], who=['1', '0001', 'P1', '2'])
    df, notes = identify(entries, 'who', '')
    assert df.patient.tolist() == ['1', '0001', 'P1', '2']
    assert '--patient who: 1 patient is written in several ways (1 = 0001); each way of writing is a' in notes[0]


@pytest.mark.parametrize('letters, eyes', [('SDDS', 'left right right left'), ('LRDL', ''), ('DSES', '')])
def test_single_letters_are_eyes_only_as_a_pair(tmp_path, letters, eyes):
    entries = csv_of_images(tmp_path, file=['a.png', 'b.png', 'c.png', 'd.png'], who=list('aabb'), side=list(letters))
    if eyes: assert identify(entries, 'who', 'side')[0].eye.tolist() == eyes.split()
    else:
        with pytest.raises(AptosError, match='--eye side: found .*D .*write L and R'): identify(entries, 'who', 'side')


def test_eyes_that_contradict_the_file_names(tmp_path):
    entries = csv_of_images(tmp_path, file=['1_L.png', '1_R.png', '2_L.png', '2_R.png'], who=list('aabb'),
                            side=['links', 'RA', 'R', 'R'])
    df, (note,) = identify(entries, 'who', 'side')
    assert df.eye.tolist() == ['left', 'right', 'right', 'right']
    assert note == ('--eye side: the eye contradicts the name of 1 image of 4 (2_L.png is right); 1 patient with one '
                    'eye twice where the names say both. Correct the eyes or the names')


def test_patterns_name_patient_and_eye(tmp_path):
    for name in ('12/34_L.png', '12/34_R.png'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b'')
    entries = find_images([str(tmp_path)])
    df, notes = identify(entries, r'^(\d+)_', r'_([LR])\.')
    assert df.patient.tolist() == ['34', '34'] and df.eye.tolist() == ['left', 'right'] and notes == []
    assert identify(entries, r'(\d+)/', '')[0].patient.tolist() == ['12', '12']       # a slash: its folder, too
    assert 'eyes unknown' in identify(entries, r'(\d+)/', '')[1][0]


def test_a_pattern_is_applied_to_the_id_of_a_csv(tmp_path):
    entries = csv_of_images(tmp_path, id_code=['9_left', '9_right'], file=['x.png', 'y.png'])
    df, _ = identify(entries, '(.*)_', '_(.*)')
    assert df.patient.tolist() == ['9', '9'] and df.eye.tolist() == ['left', 'right']


@pytest.mark.parametrize('patient, eye, words', [
    ('subjct', '', 'subjct: no such column, and no pattern with a group in parentheses. Columns of the CSV: file, id'),
    ('(', '', 'is no regular expression'),
    (r'(\d{9})', '', 'gives no patient for any of the 2 images'),
    ('id', 'id', '--eye id: found 1 (a.png), 2 (b.png). Expected are L, R, left'),
    ('id', 'id', 'Which eye a number means is not known: write L and R.'),
    ('', 'id', 'patients are unknown. Add --patient'),
    ('dicom', '', 'none of the images is a DICOM file'),
])
def test_wrong_choices_say_what_to_do(tmp_path, patient, eye, words):
    entries = csv_of_images(tmp_path, file=['a.png', 'b.png'], id=['1', '2'])
    with pytest.raises(AptosError) as e: identify(entries, patient, eye)
    assert words in str(e.value) and '\n' not in str(e.value)


def test_without_options_only_dicom_with_patient_and_eye_gives_patients(tmp_path):
    write_dicom(tmp_path / 'a', PatientID='17', ImageLaterality='L', Manufacturer='Topcon',
                ManufacturerModelName='NW400')
    write_dicom(tmp_path / 'b', PatientID='17', Laterality='R')
    df, notes = identify(find_images([str(tmp_path)]), '', '')
    assert df.patient.tolist() == ['17', '17'] and df.eye.tolist() == ['left', 'right']
    assert df.device.tolist() == ['Topcon NW400', ''] and 'from the DICOM tags' in notes[0]
    (tmp_path / 'c.png').write_bytes(b'')
    assert identify(find_images([str(tmp_path)]), '', '') == (None, [])
    df, notes = identify(find_images([str(tmp_path)]), 'dicom', 'dicom')
    assert df.patient.tolist() == ['17', '17', ''] and '1 of 3 images have no patient' in notes[0]


def test_one_key_of_two_issuers_is_two_patients(tmp_path):
    for name, issuer in dict(a='North', b='South').items():
        write_dicom(tmp_path / name, PatientID='17', IssuerOfPatientID=issuer, ImageLaterality='L')
    df, _ = identify(find_images([str(tmp_path)]), '', '')
    assert df.patient.tolist() == ['17 (North)', '17 (South)']


def frame_laterality(value):
    import pydicom
    anatomy, group = pydicom.Dataset(), pydicom.Dataset()
    anatomy.FrameLaterality = value
    group.FrameAnatomySequence = [anatomy]
    return [group]


@pytest.mark.parametrize('tags, eye', [
    (dict(ImageLaterality='L'), 'left'), (dict(Laterality='R'), 'right'), (dict(ImageLaterality='B'), ''), ({}, ''),
    (dict(ImageLaterality='L', Laterality='R'), ''), (dict(ImageLaterality='r', Laterality='R'), 'right'),
])
def test_laterality_is_read_and_a_contradiction_is_unknown(tmp_path, tags, eye):
    assert read_tags(write_dicom(tmp_path / 'a', **tags)).eye == eye


def test_laterality_of_frames_is_read(tmp_path):
    for name in ('SharedFunctionalGroupsSequence', 'PerFrameFunctionalGroupsSequence'):
        assert read_tags(write_dicom(tmp_path / name, **{name: frame_laterality('R')})).eye == 'right'
    two = dict(PerFrameFunctionalGroupsSequence=frame_laterality('R') + frame_laterality('L'))
    assert read_tags(write_dicom(tmp_path / 'two', **two)).eye == ''


def test_names_and_birth_dates_are_not_read(tmp_path):
    tags = read_tags(write_dicom(tmp_path / 'a', PatientID=' 17 ', PatientSex='F', DeviceSerialNumber='4711'))
    assert tags == DicomTags(patient='17')


def test_damaged_and_deflated_files_have_no_tags(tmp_path):
    pydicom = pytest.importorskip('pydicom')
    file = write_dicom(tmp_path / 'a', PatientID='17')
    (tmp_path / 'short').write_bytes(file.read_bytes()[:140])
    (tmp_path / 'noise').write_bytes(file.read_bytes()[:132] + b'\xff' * 500)
    deflated = pydicom.uid.DeflatedExplicitVRLittleEndian
    (tmp_path / 'deflated').write_bytes(dicom(np.zeros((8, 8, 3), np.uint8), 'RGB', 8, syntax=deflated))
    assert read_tags(tmp_path / 'deflated') is None and read_tags(tmp_path / 'missing') is None
    for name in ('short', 'noise'): assert not read_tags(tmp_path / name) or read_tags(tmp_path / name).patient == ''


# The command

PATTERNS = ['--patient', r'^(p\d+)_', '--eye', r'_([LR])\.']


@pytest.fixture
def eyes(tmp_path, image_paths):
    "A folder with both eyes of p1 and the left one of p2, and one that is no image"
    folder = tmp_path / 'eyes'
    folder.mkdir()
    for name, path in zip(('p1_L', 'p1_R', 'p2_L'), image_paths, strict=False):
        shutil.copy(path, folder / f'{name}.png')
    return folder


def read(file): return pd.read_csv(file, dtype=str, keep_default_na=False)


def test_predict_writes_patients_beside_its_output(toy, eyes, tmp_path, capsys):
    out = tmp_path / 'grades.csv'
    main(['predict', str(toy), str(eyes), '-o', str(out), *PATTERNS])
    images, patients = read(out), read(tmp_path / 'patients.csv')
    assert list(images)[-2:] == ['patient', 'eye'] and images.patient.tolist() == ['p1', 'p1', 'p2']
    assert images.eye.tolist() == ['left', 'right', 'left'] and list(patients) == COLUMNS
    assert patients.patient.tolist() == ['p1', 'p2'] and patients.missing.tolist() == ['', 'right']
    of_p1 = images[images.patient == 'p1']
    assert patients.left_grade[0] == of_p1.grade.iloc[0] and patients.right_grade[0] == of_p1.grade.iloc[1]
    assert float(patients.p_referable[0]) == max(of_p1.p_referable.astype(float))
    printed = ' '.join(capsys.readouterr().out.split())
    referred = int(patients.decision.isin(['refer', 'uncertain: refer']).sum())
    assert f'2 patients: {referred} referred' in printed and 'treat as patient data' in printed
    expect_error(capsys, ['predict', toy, eyes, '-o', tmp_path / 'other.csv', *PATTERNS],
                 'patients.csv: already exists', '--overwrite')
    expect_error(capsys, ['predict', toy, eyes, '-o', tmp_path / 'patients.csv', '--overwrite', *PATTERNS],
                 'patients.csv: is')
    expect_error(capsys, ['predict', toy, eyes, '-o', tmp_path / 'x.csv', '--missing-eye', 'skip'],
                 '--missing-eye skip: choose one of ungradable, ignore')
    main(['predict', str(toy), str(eyes), '-o', str(out), '--overwrite', '--missing-eye', 'ignore', *PATTERNS])
    assert read(out).equals(images) and 'not gradable' not in read(tmp_path / 'patients.csv').decision.tolist()
    capsys.readouterr()
    main(['predict', str(toy), str(eyes), '-o', str(tmp_path / 'none.csv')])
    assert 'patients.csv: is of another call' in ' '.join(capsys.readouterr().out.split())
    (tmp_path / 'patients.csv').write_text('name\nJane\n')
    expect_error(capsys, ['predict', toy, eyes, '-o', out, '--overwrite', *PATTERNS], 'is not a CSV that predict wrote')
    assert (tmp_path / 'patients.csv').read_text() == 'name\nJane\n'


def test_predict_without_patients_writes_none(toy, eyes, tmp_path):
    main(['predict', str(toy), str(eyes), '-o', str(tmp_path / 'grades.csv')])
    assert not (tmp_path / 'patients.csv').exists() and 'patient' not in read(tmp_path / 'grades.csv')


def test_deidentified_grades_name_nobody_and_keep_their_order(toy, eyes, tmp_path, capsys):
    (eyes / 'p3_R.png').write_bytes(b'no image of p3')
    files = ['p1_L.png', 'p1_R.png', 'p2_L.png', 'p3_R.png', 'p9_L.png']
    table = dict(id_code=['x1', 'x2', 'x3', 'x4', 'x5'], subject=['anna', 'anna', 'bert', 'carl', 'dora'], file=files)
    pd.DataFrame(table).to_csv(eyes / 'list.csv', index=False)
    for name, more in dict(a=[], b=['--deidentify']).items():
        (tmp_path / name).mkdir()
        args = ['predict', toy, eyes / 'list.csv', '-o', tmp_path / name / 'grades.csv', '--patient', 'subject']
        expect_error(capsys, [*args, '--eye', r'/p\d_([LR])', *more], '2 of 5 images')
    plain = read(tmp_path / 'a/grades.csv')
    hidden = read(tmp_path / 'b/grades.csv')
    assert hidden.file.tolist() == ['1', '2', '3', '4', '5'] and 'id_code' not in hidden
    assert hidden.patient.tolist() == ['P001', 'P001', 'P002', 'P003', 'P004']
    same = [name for name in hidden if name not in ('file', 'patient', 'image_sha256', 'error')]
    assert hidden[same].equals(plain[same]) and (hidden.image_sha256 == '').all() and plain.image_sha256[0]
    text = (tmp_path / 'b/grades.csv').read_text() + (tmp_path / 'b/patients.csv').read_text()
    for name in ('x1', 'anna', 'dora', 'p1', 'p3', 'p9', '.png', *plain.image_sha256[:4]): assert name not in text, name
    assert sorted(o.name for o in (tmp_path / 'b').iterdir() if o.suffix == '.csv') == ['grades.csv', 'patients.csv']
    a, b = (read(tmp_path / f'{o}/patients.csv').drop(columns='patient') for o in 'ab')
    assert a.equals(b)


def test_predict_of_dicom_images_finds_patients_by_itself(toy, image_paths, tmp_path, capsys):
    import cv2
    for name, side, path in zip('ab', 'LR', image_paths, strict=False):
        write_dicom(tmp_path / f'{name}.dcm', cv2.imread(path)[..., ::-1], PatientID='0017', ImageLaterality=side,
                    Manufacturer='Topcon')
    out = tmp_path / 'out'
    out.mkdir()
    main(['predict', str(toy), str(tmp_path / 'a.dcm'), str(tmp_path / 'b.dcm'), '-o', str(out / 'grades.csv')])
    assert 'from the DICOM tags' in ' '.join(capsys.readouterr().out.split())
    assert read(out / 'patients.csv').patient.tolist() == ['0017']
    assert read(out / 'grades.csv').device.tolist() == ['Topcon', 'Topcon']
    for file in out.iterdir():
        if file.suffix == '.csv': assert 'DOE' not in file.read_text() and '1950' not in file.read_text()
