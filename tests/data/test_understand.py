"Tables without a recipe: which column is what, and what happens where two would do."
import datetime
import re
import shutil
import unicodedata
from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
from layouts import LAYOUTS, grade_of, write_image, write_lines

from aptos_fastai.common.io import AptosError
from aptos_fastai.data.id_order import compare_id_orders
from aptos_fastai.data.tables import table_contents
from aptos_fastai.data.understand import PRESET_KEYS, find_table, sides_of, understand_table
from aptos_fastai.recipe.sections import Table


def keys(understood, *names): return tuple(getattr(understood.table, name) for name in names)


def write_rows(folder, header, rows):
    "Write t.csv and its images, which the first cell of each row names"
    write_lines(folder / 't.csv', [header, *rows])
    for i, row in enumerate(rows): write_image(folder / f'{row.split(",")[0]}.png', i)
    return folder / 't.csv'


@pytest.mark.parametrize('layout, csv, images, expected', [
    ('clinic_excel', 'labels.xlsx', 'photos', dict(
        id='Photo', grade='DR grade', patient='Patient No.', eye='Eye', ungradable='ungradable',
        carry='Macular oedema | Camera | Sex | Age')),
    ('semicolons', 'Befunde.csv', 'Bilder', dict(id='Bild', grade='Grad der Retinopathie', carry='Kamera')),
    ('no_header', 'labels.txt', 'img', dict(header='no', id='1', grade='2')),
    ('messidor2', 'messidor_data.csv', 'IMAGES', dict(
        id='image_id', grade='adjudicated_dr_grade', ungradable='blank')),
    ('eyepacs2015', 'diabetic-retinopathy-detection/trainLabels.csv', 'diabetic-retinopathy-detection/train',
     dict(id='image', grade='level')),
])
def test_columns_of_a_layout(tmp_path, layout, csv, images, expected):
    root = LAYOUTS[layout](tmp_path)
    understood = understand_table(root / csv, root / images)
    assert {name: getattr(understood.table, name) for name in expected} == expected
    assert all(any(reason.startswith(f'{key}: ') for reason in understood.reasons) for key in expected)
    df = table_contents(understood.table, understood.data).frame
    assert 59 <= len(df) <= 60
    if layout == 'eyepacs2015': assert df.group.nunique() == 30 and set(df.eye) == {'left', 'right'}
    if layout == 'clinic_excel': assert df.group.nunique() == 30 and 'Name' not in df


def test_both_eyes_in_two_columns(tmp_path):
    root = LAYOUTS['deepdrid'](tmp_path) / 'regular_fundus_images/regular-fundus-training'
    understood = understand_table(root / 'regular-fundus-training.csv')
    assert keys(understood, 'id', 'grade', 'patient') == (
        'image_id', 'left_eye_DR_Level | right_eye_DR_Level', 'patient_id')


def test_a_row_with_both_eyes_of_a_patient(tmp_path):
    root = LAYOUTS['row_per_patient'](tmp_path)
    understood = understand_table(root / 'patients.csv', root / 'eyes')
    assert keys(understood, 'id', 'grade', 'patient', 'carry') == (
        'Left-Fundus | Right-Fundus', 'Left DR | Right DR', 'Patient', 'Sex')
    df = table_contents(understood.table, understood.data).frame
    assert len(df) == 59 and df.group.nunique() == 30
    assert df.diagnosis.tolist() == [
        grade_of(2700 + 2 * int(name.partition('_')[0]) + int(name[-5])) for name in df.id_code]
    without = understand_table(root / 'patients.csv', root / 'eyes', id='Left-Fundus | Right-Fundus',
                               grade='Left DR | Right DR', patient='')
    df = table_contents(without.table, without.data).frame
    assert without.table.grouped_by == 'patients' and df.group.nunique() == 30
    with pytest.raises(AptosError, match='no column has the grade of Right-Fundus'):
        lines = (root / 'patients.csv').read_text().replace('Right DR', 'comment').splitlines()
        write_lines(root / 'other.csv', lines)
        understand_table(root / 'other.csv', root / 'eyes')


def test_scales_that_are_not_the_international_one(tmp_path):
    "5 and no 0; the R0 to R3 of the English programme, whose R3 is proliferative"
    csv = write_rows(tmp_path, 'image,level', [f'a{i},{1 + i % 5}' for i in range(20)])
    with pytest.raises(AptosError, match='column level has no grade 0 .* If its scale begins at 1'):
        understand_table(csv)
    assert keys(understand_table(csv, ungradable='5'), 'ungradable') == ('5',)
    assert keys(understand_table(csv, grade='level'), 'ungradable') == ('5',)
    csv = write_rows(tmp_path, 'image,level', [f'a{i},R{i % 4}' for i in range(20)])
    with pytest.raises(AptosError, match='R0, R1, R2, R3 look like those of the English screening programme'):
        understand_table(csv)
    csv = write_rows(tmp_path, 'image,level', [f'a{i},R{i % 5}' for i in range(20)])
    understood = understand_table(csv)
    assert table_contents(understood.table, understood.data).frame.diagnosis.tolist() == [i % 5 for i in range(20)]


def test_the_column_of_the_international_scale_wins_and_a_yes_or_no_never_does(tmp_path):
    rows = [f'a{i},{i % 5},{(i + 1) % 5},{int(i % 5 > 0)}' for i in range(20)]
    csv = write_rows(tmp_path, 'image,DR_SDRG,DR_ICDR,diabetic_retinopathy', rows)
    assert keys(understand_table(csv), 'grade') == ('DR_ICDR',)
    csv = write_rows(tmp_path, 'image,DR_SDRG,retinopathy_level,diabetic_retinopathy', rows)
    with pytest.raises(AptosError, match='can be in 2 columns: DR_SDRG, retinopathy_level. Choose one'):
        understand_table(csv)


def test_the_table_of_a_preset_keeps_all_its_keys(tmp_path, monkeypatch):
    rows = [f'a{i},{i % 5},{("good", "bad")[i % 2]}' for i in range(20)]
    csv = write_rows(tmp_path, 'image,level,quality', rows)
    preset = Table(name='own', csv='t.csv', images='.', id='image', grade='level', where='quality = good')
    monkeypatch.setattr('aptos_fastai.data.understand.preset_files', lambda: ['own'])
    monkeypatch.setattr('aptos_fastai.data.understand.preset_table', lambda name: preset)
    understood = understand_table(csv)
    assert understood.table.where == 'quality = good' and len(understood.contents.frame) == 10
    others = 'name', 'preset', 'csv', 'images', 'header', 'order', 'optional', 'folder'
    assert {f.name for f in fields(Table)} == {*PRESET_KEYS, *others}


def test_a_column_that_divides_rows_is_named(tmp_path):
    rows = [f'a{i},{i % 5},{("train", "test")[i % 2]},{i % 5}' for i in range(20)]
    understood = understand_table(write_rows(tmp_path, 'image,level,split,prediction', rows), grade='level')
    assert keys(understood, 'carry') == ('split',)
    assert any('all rows are used, whatever their split (test, train)' in reason for reason in understood.reasons)


@pytest.mark.parametrize('name, is_carried', [
    *((name, False) for name in (
        'Remarks', 'Kommentar', 'Geb.-Dat.', 'Geb_Jahr', 'Date de naissance', 'YOB', 'Referring doctor', 'Hausarzt',
        'Tel.', 'mobile_no', 'HomePhone', 'E-Mail', 'PLZ', 'Prenom', 'Next of kin', 'Graded_by', 'reader', 'Gutachter',
        'NHS', 'annotated_by', 'GraderID', 'gradedby', 'DRGrader', 'Diagnosed by', 'Befundet von', 'Médecin',
        unicodedata.normalize('NFD', 'Médecin'), 'Nome', '姓名', 'Stadt', 'ZipCode', 'UserID', 'Behandler')),
    *((name, True) for name in (
        'Sex', 'Camera', 'device_name', 'mobile_unit', 'smartphone', 'Diabetes type', 'Insulin', 'Country',
        'Department', 'annotation_quality', 'upgrader', 'Gebrauch', 'Ethnicity', 'Smoker', 'iPhone model',
        'mobile_device', 'CenterName', 'Sport'))])
def test_columns_that_may_name_people_are_not_carried(tmp_path, name, is_carried):
    csv = write_rows(tmp_path, f'image,level,{name}', [f'a{i},{i % 5},{"xyz"[i % 3]}' for i in range(20)])
    understood = understand_table(csv)
    assert keys(understood, 'carry') == (name if is_carried else '',)
    assert is_carried != any(o.startswith(f'not carried: {name} (may name people') for o in understood.reasons)


def test_values_of_few_rows_are_not_carried(tmp_path):
    "They may be names of patients, in whatever language"
    rows = [f'a{i},{i % 5},{"abcdefghijklmnopqrst"[i // 2]},{"xy"[i % 2]}' for i in range(40)]
    assert keys(understand_table(write_rows(tmp_path, 'image,level,Ονομα,camera', rows)), 'carry') == ('camera',)


@pytest.mark.parametrize('name', ['Paciente', 'PatNr', 'Pat.-Nr.', 'Pat_ID', 'Fallnummer', 'UHID', 'case_id', '患者ID',
                                  'Hospital No'])
def test_names_of_patients(tmp_path, name):
    csv = write_rows(tmp_path, f'image,level,{name}', [f'a{i},{i % 5},{1000 + i // 2}' for i in range(40)])
    assert keys(understand_table(csv), 'patient') == (name,)


def test_columns_that_may_be_patients_are_named(tmp_path):
    rows = [f'a{i},{i % 5},K{i // 2},{i // 2},{i % 3}' for i in range(60)]
    understood = understand_table(write_rows(tmp_path, 'image,level,Kennung,patient_bmi,camera', rows))
    assert keys(understood, 'patient') == ('',)
    assert any('; Kennung may be the patient: if so, --patient COLUMN' in reason for reason in understood.reasons)
    rows = [f'a{i},{i % 5},{i % 4}' for i in range(60)]
    understood = understand_table(write_rows(tmp_path, 'image,level,Study', rows))
    assert any('4 patients of 60 images; CHECK whether so few' in reason for reason in understood.reasons)


def test_a_column_made_of_the_grade_is_no_subgroup(tmp_path):
    "But a camera that goes with the grade is the worst of shortcuts, which the report must show"
    rows = [f'a{i},{i % 5},{("no", "yes")[i % 5 > 0]},{"fm"[i % 2]},{"AB"[i % 5 > 0]}' for i in range(20)]
    for column in ('camera', 'referring_clinic', 'referral_site', 'site_label', 'hospital_level'):
        understood = understand_table(write_rows(tmp_path, f'image,level,binary,sex,{column}', rows))
        assert keys(understood, 'carry') == (f'sex | {column}',)
        assert 'not carried: binary (goes with the grade: one value for each)' in understood.reasons
    for column in ('refer', 'referred', 'vtdr', 'dr_yes'):
        csv = write_rows(tmp_path, f'image,level,{column}', [f'a{i},{i % 5},{int(i % 5 > 1)}' for i in range(20)])
        assert keys(understand_table(csv), 'carry') == ('',)
    rows = [f'a{i},{i % 5},{i % 3},{i % 2},{i % 4},{i % 3}' for i in range(20)]
    csv = write_rows(tmp_path, 'image,level,predictedScore,probs,ai_score,Model output', rows)
    assert keys(understand_table(csv), 'carry') == ('',)
    rows = [f'a{i},{i % 5},{i % 3},{i % 2}' for i in range(20)]
    csv = write_rows(tmp_path, 'image,level,risk_score,eye_problems', rows)
    assert keys(understand_table(csv), 'carry') == ('risk_score | eye_problems',)


@pytest.mark.parametrize('blank', ['', 'ungradable'])
def test_a_yes_or_no_with_blanks_is_one_too(tmp_path, blank):
    cells = ['0', '1', '1', '1', blank]
    csv = write_rows(tmp_path, 'image,retinopathy,dme', [f'a{i},{cells[i % 5]},{cells[i % 5]}' for i in range(20)])
    with pytest.raises(AptosError, match='column retinopathy has only the grades 0 and 1'): understand_table(csv)
    assert understand_table(csv, grade='retinopathy').table.grade == 'retinopathy'
    with pytest.raises(AptosError, match='column dme has only 0 and 1, which by its name'):
        understand_table(csv, grade='dme')
    csv = write_rows(tmp_path, 'image,dr,dr_level', [f'a{i},{cells[i % 5]},{i % 5}' for i in range(20)])
    assert keys(understand_table(csv), 'grade') == ('dr_level',)
    for name in ('grade', 'level', 'dr_severity'):
        csv = write_rows(tmp_path, f'image,dr,{name}', [f'a{i},{cells[i % 5]},{i % 5}' for i in range(20)])
        assert keys(understand_table(csv), 'grade') == (name,)
    csv = write_rows(tmp_path, 'image,retinopathy,drusen_grade', [f'a{i},{cells[i % 5]},{i % 4}' for i in range(20)])
    with pytest.raises(AptosError, match='can be in 2 columns: retinopathy, drusen_grade. Choose one: --grade COLUMN'):
        understand_table(csv)
    csv = write_rows(tmp_path, 'image,dr_left,dr_right', [
        f'a{i},{i % 2 if i < 10 else ""},{i % 2 if i >= 10 else ""}' for i in range(20)])
    with pytest.raises(AptosError, match='column dr_left, dr_right has only the grades 0 and 1'): understand_table(csv)


@pytest.mark.parametrize('name', ['label', 'class', 'stage', 'image_label', 'diagnosis', 'grade'])
def test_a_column_that_contradicts_the_yes_or_no_is_not_taken_unasked(tmp_path, name):
    "0 normal, 1 retinopathy, 2 glaucoma, 3 cataract; then the grades of the same yes or no, with one error"
    disease = write_rows(tmp_path, f'image,dr,{name}', [f'a{i},{int(i % 4 == 1)},{i % 4}' for i in range(20)])
    with pytest.raises(AptosError, match=f'can be in 2 columns: dr, {name}'): understand_table(disease)
    grade = write_rows(tmp_path, f'image,dr,{name}', [f'a{i},{int(i % 5 > 1 or i == 0)},{i % 5}' for i in range(20)])
    assert keys(understand_table(grade), 'grade') == (name,)


@pytest.mark.parametrize('name', ['dr_pred', 'predicted_dr_grade', 'AI grade', 'y_hat'])
def test_predictions_are_no_grades(tmp_path, name):
    rows = [f'a{i},{int(i % 5 > 1)},{i % 5}' for i in range(20)]
    with pytest.raises(AptosError, match='column dr has only the grades 0 and 1'):
        understand_table(write_rows(tmp_path, f'image,dr,{name}', rows))
    csv = write_rows(tmp_path, f'image,{name}', [f'a{i},{i % 5}' for i in range(20)])
    with pytest.raises(AptosError, match='no column has grades'): understand_table(csv)
    assert understand_table(csv, grade=name).table.grade == name


def test_names_of_other_diseases_are_refused_only_where_they_are_of_diseases(tmp_path):
    rows = [f'a{i},{i % 2}' for i in range(20)]
    for name in ('diabetic_macular_edema', 'glaucoma', 'dr_quality'):
        with pytest.raises(AptosError, match=f'column {name} has only 0 and 1, which by its name'):
            understand_table(write_rows(tmp_path, f'image,{name}', rows), grade=name)
    for name in ('Retinopathy risk', 'Diagnosis visit 1', 'Retinopathy (camera 1)'):
        understood = understand_table(write_rows(tmp_path, f'image,{name}', rows), grade=name)
        assert understood.table.grade == name


def test_the_grade_of_one_reader_does_not_win_by_its_scale(tmp_path):
    csv = write_rows(tmp_path, 'image,dr_grade_final,icdr_reader1', [f'a{i},{i % 5},{i % 5}' for i in range(20)])
    with pytest.raises(AptosError, match='can be in 2 columns: dr_grade_final, icdr_reader1'): understand_table(csv)


def test_grades_of_both_eyes_beside_one_image_are_refused(tmp_path):
    csv = write_rows(tmp_path, 'image,left_grade,right_grade', [f'a{i},{i % 5},{(i + 1) % 5}' for i in range(20)])
    with pytest.raises(AptosError, match='left_grade and right_grade are grades of both eyes, but a row names one'):
        understand_table(csv)


@pytest.mark.parametrize('ids, hint', [(lambda i: i, True), (lambda i: f'{i}.0', True), (lambda i: f'x{i}', False)])
def test_ids_that_a_spreadsheet_made_numbers_are_explained(tmp_path, ids, hint):
    csv = write_rows(tmp_path, 'image,level', [f'{i:04},{i % 5}' for i in range(20)])
    write_lines(csv, ['image,level', *(f'{ids(i)},{i % 5}' for i in range(20))])
    with pytest.raises(AptosError) as e: understand_table(csv)
    assert ('Column image has the names of images as numbers' in str(e.value)) == hint


@pytest.mark.parametrize('name', ['{}.png.jpg', 'sub/{}.PNG.jpeg'])
@pytest.mark.parametrize('row', ['{}', '{}.png'])
def test_names_with_two_suffixes(tmp_path, name, row):
    for i in range(20):
        file = tmp_path / name.format(f'a{i}')
        file.parent.mkdir(exist_ok=True)
        write_image(tmp_path / 'x.png', i)
        (tmp_path / 'x.png').rename(file)
    write_lines(tmp_path / 't.csv', ['image,level', *(f'{row.format(f"a{i}")},{i % 5}' for i in range(20))])
    paths = understand_table(tmp_path / 't.csv').contents.frame.path
    assert paths.tolist() == [str(tmp_path / name.format(f'a{i}')) for i in range(20)]


@pytest.mark.parametrize('words', [('LE', 'RE'), ('Lt', 'Rt'), ('sx', 'dx')])
def test_short_words_for_eyes(tmp_path, words):
    rows = [f'a{i},{i % 5},{i // 2},{words[i % 2]}' for i in range(20)]
    contents = understand_table(write_rows(tmp_path, 'image,level,patient,eye', rows)).contents
    assert contents.frame.eye.tolist() == ['left', 'right'] * 10


def test_values_that_name_a_grade_are_not_suggested_as_ungradable(tmp_path):
    cells = 'No signs of DR', 'grade 2?', 'healthy retina', 'lost', '2.5', '>2', 'L3', 'sev', '53', 'PRP done', 'leicht'
    csv = write_rows(tmp_path, 'image,level', [f'a{i},{cells[i % 11]}' for i in range(20)])
    with pytest.raises(AptosError, match='20 of 20 rows'): understand_table(csv)
    csv = write_rows(tmp_path, 'image,level', [f'a{i},{cells[i] if i < 11 else i % 5}' for i in range(24)])
    with pytest.raises(AptosError, match='--ungradable "lost"[.]'): understand_table(csv)


def test_one_column_for_each_grade_is_refused(tmp_path):
    rows = [f'a{i},{",".join(str(int(i % 5 == k)) for k in range(5))}' for i in range(20)]
    healthy = [f'b{i},0,0,0,0,0' for i in range(40)]     # without a grade, or grade 0 has no column
    for more in (rows, [*rows, *healthy]):
        with pytest.raises(AptosError, match='the columns grade_0, .*, grade_4 have at most one 1 in each row'):
            understand_table(write_rows(tmp_path, 'image,grade_0,grade_1,grade_2,grade_3,grade_4', more))


@pytest.mark.parametrize('names', ['no_dr,mild_npdr,moderate_npdr,severe_npdr,pdr', 'none,mild,moderate,severe,pdr',
                                   'dr_none,dr_mild,dr_moderate,dr_severe,dr_pdr',
                                   'grade 0,grade I,grade II,grade III,grade IV'])
def test_one_column_for_each_grade_in_words_is_refused(tmp_path, names):
    rows = [f'a{i},{",".join(str(int(i % 9 == k)) for k in range(5))}' for i in range(36)]
    with pytest.raises(AptosError, match='have at most one 1 in each row'):
        understand_table(write_rows(tmp_path, f'image,{names}', rows))


def test_one_of_the_columns_for_each_grade_is_no_grade_though_it_is_named(tmp_path):
    names = 'No_DR,Mild,Moderate,Severe,Proliferate_DR'
    csv = write_rows(tmp_path, f'image,{names}', [f'a{i},{",".join(str(int(i % 5 == k)) for k in range(5))}'
                                                  for i in range(40)])
    for more in ({}, dict(grade='Proliferate_DR')):
        with pytest.raises(AptosError, match='No_DR, .*, Proliferate_DR have at most one 1 in each row'):
            understand_table(csv, **more)
    csv = write_rows(tmp_path, f'image,level,{names}', [
        f'a{i},{i % 5},{",".join(str(int(i % 5 == k)) for k in range(5))}' for i in range(40)])
    assert keys(understand_table(csv), 'grade') == ('level',)


NAMES = 'No_DR', 'Mild', 'Moderate', 'Severe', 'Proliferate_DR'


@pytest.mark.parametrize('index, name', [('class_idx', 'class_name'), ('label', 'label_name'), ('diagnosis', 'name')])
def test_names_of_grades_that_are_numbered_as_in_the_alphabet_are_refused(tmp_path, index, name):
    number = {word: k for k, word in enumerate(sorted(NAMES))}
    csv = write_rows(tmp_path, f'image,{name},{index}', [
        f'a{i},{NAMES[i % 5]},{number[NAMES[i % 5]]}' for i in range(20)])
    with pytest.raises(AptosError, match=f'column {index} may not hold .* {name} numbers the grades otherwise: '
                       'Mild is 0, Moderate is 1, No_DR is 2'):
        understand_table(csv)
    understood = understand_table(csv, grade=name)
    assert understood.contents.frame.diagnosis.tolist() == [i % 5 for i in range(20)]
    assert any(f'CHECK {index}' in reason for reason in understand_table(csv, grade=index).reasons)
    csv = write_rows(tmp_path, f'image,{name},{index}', [f'a{i},{NAMES[i % 5]},{i % 5}' for i in range(20)])
    assert keys(understand_table(csv), 'grade')[0] in (index, name)


def test_images_in_folders_of_other_grades_are_refused(tmp_path):
    rows = []
    for i in range(20):
        folder = tmp_path / 'images' / NAMES[i % 5]
        folder.mkdir(parents=True, exist_ok=True)
        write_image(folder / f'a{i}.png', i)
        rows.append(f'a{i},{i % 5}')
    right, wrong = tmp_path / 'right.csv', tmp_path / 'wrong.csv'
    write_lines(right, ['image,level', *rows])
    write_lines(wrong, ['image,level', *rows[:-1], 'a19,1'])
    assert keys(understand_table(right, tmp_path / 'images'), 'grade') == ('level',)
    text = '1 of 20 images lie in a folder of another grade: grade 1 in Proliferate_DR/'
    with pytest.raises(AptosError, match=text): understand_table(wrong, tmp_path / 'images')
    assert any(text in reason for reason in understand_table(wrong, tmp_path / 'images', grade='level').reasons)


def test_one_wrong_row_does_not_hide_other_numbers_of_names(tmp_path):
    number = {word: k for k, word in enumerate(sorted(NAMES))}
    rows = [f'a{i},{NAMES[i % 5]},{number[NAMES[i % 5]] if i != 7 else 0}' for i in range(30)]
    with pytest.raises(AptosError, match='class_name numbers the grades otherwise'):
        understand_table(write_rows(tmp_path, 'image,class_name,class_idx', rows))
    alphabetical = [f'a{i},{NAMES[i % 5]},{0 if i == 3 else number[NAMES[i % 5]]}' for i in range(30)]
    with pytest.raises(AptosError, match='class_name numbers the grades otherwise'):        # not one to one
        understand_table(write_rows(tmp_path, 'image,class_name,class_idx', alphabetical))
    rows = [f'a{i},{NAMES[i % 5]},{i % 5 if i % 7 else (i + 1) % 5}' for i in range(30)]
    csv = write_rows(tmp_path, 'image,reader_2,level', rows)       # another reader, who differs at times
    assert keys(understand_table(csv, grade='level'), 'grade') == ('level',)
    assert not [o for o in understand_table(csv, grade='level').reasons if 'CHECK' in o]


@pytest.mark.parametrize('name', ['dme_severity', 'predicted_class', 'last_visit'])
def test_names_of_something_else_do_not_contradict_the_grade(tmp_path, name):
    rows = [f'a{i},{i % 5},{NAMES[(i + 1) % 5]}' for i in range(60)]
    assert keys(understand_table(write_rows(tmp_path, f'image,level,{name}', rows)), 'grade') == ('level',)
    with pytest.raises(AptosError, match='name_of_class numbers the grades otherwise: Mild is 0'):
        understand_table(write_rows(tmp_path, 'image,level,name_of_class', rows))


@pytest.mark.parametrize('title', ['class_name', 'label_name_en', 'Diagnosis name (English)'])
def test_two_rare_names_that_are_swapped_are_refused(tmp_path, title):
    grades = [*[0] * 49, *[1] * 10, *[2] * 27, *[3] * 6, *[4] * 8]
    rows = [f'a{i},{NAMES[g]},{(0, 1, 2, 4, 3)[g]}' for i, g in enumerate(grades)]
    text = 'numbers the grades otherwise: .*Severe is 4'
    csv = write_rows(tmp_path, f'image,{title},class_idx', rows)
    with pytest.raises(AptosError, match=text): understand_table(csv, id='image')
    assert any(re.search(text, o) for o in understand_table(csv, id='image', grade='class_idx').reasons)
    rows = [row if i % 5 < 2 else f'a{i},,{g}' for i, (row, g) in enumerate(zip(rows, grades, strict=True))]
    with pytest.raises(AptosError, match=text):                            # most rows have no name
        understand_table(write_rows(tmp_path, f'image,{title},class_idx', rows), id='image')
    rows = [f'a{i},{NAMES[g]},{4 if i == 91 else g}' for i, g in enumerate(grades)]          # one error is no code
    assert keys(understand_table(write_rows(tmp_path, f'image,{title},class_idx', rows), grade='class_idx'), 'grade')


def test_one_numbered_folder_does_not_hide_names_of_other_grades(tmp_path):
    for i in range(40):
        folder = tmp_path / 'images' / (NAMES[(i + 1) % 5] if i else '1')
        folder.mkdir(parents=True, exist_ok=True)
        write_image(folder / f'a{i}.png', i)
    write_lines(tmp_path / 't.csv', ['image,level', *(f'a{i},{i % 5}' for i in range(40))])
    with pytest.raises(AptosError, match='39 of 40 images lie in a folder of another grade'):
        understand_table(tmp_path / 't.csv', tmp_path / 'images')


def test_folders_are_compared_where_images_are_missing_too(tmp_path):
    for i in range(40):
        folder = tmp_path / 'images' / NAMES[i % 5]
        folder.mkdir(parents=True, exist_ok=True)
        if i != 7: write_image(folder / f'a{i}.png', i)
    write_lines(tmp_path / 't.csv', ['image,level', *(f'a{i},{i % 5 if i else 2}' for i in range(40))])
    reasons = ' '.join(understand_table(tmp_path / 't.csv', tmp_path / 'images', skip_missing=True).reasons)
    assert 'CHECK level: 1 of 39 images that were found lie in a folder of another grade: grade 2 in No_DR/' in reasons


@pytest.mark.parametrize('folders, checked', [('01234', True), ('1234', False)])
def test_folders_called_0_to_4_that_contradict_the_grades_are_named(tmp_path, folders, checked):
    for i in range(40):
        folder = tmp_path / 'images' / folders[i % len(folders)]
        folder.mkdir(parents=True, exist_ok=True)
        write_image(folder / f'a{i}.png', i)
    write_lines(tmp_path / 't.csv', ['image,level', *(f'a{i},{(i + 1) % 5}' for i in range(40))])
    understood = understand_table(tmp_path / 't.csv', tmp_path / 'images')
    assert keys(understood, 'grade') == ('level',)
    assert any('CHECK level: 40 of 40' in o for o in understood.reasons) == checked


def test_folders_that_are_numbers_are_no_grades_and_few_errors_are_only_named(tmp_path):
    for i in range(60):
        for folder in (f'{i // 2}', NAMES[i % 5]):
            (tmp_path / 'images' / folder).mkdir(parents=True, exist_ok=True)
    for i in range(60): write_image(tmp_path / f'images/{i // 2}/a{i}.png', i)
    write_lines(tmp_path / 't.csv', ['image,level', *(f'a{i},{i % 5}' for i in range(60))])
    assert not [o for o in understand_table(tmp_path / 't.csv', tmp_path / 'images').reasons if 'CHECK' in o]
    for i in range(60):
        (tmp_path / f'images/{i // 2}/a{i}.png').rename(tmp_path / 'images' / NAMES[i % 5] / f'a{i}.png')
    write_lines(tmp_path / 't.csv', ['image,level', *(f'a{i},{i % 5 if i else 3}' for i in range(60))])
    reasons = understand_table(tmp_path / 't.csv', tmp_path / 'images').reasons
    assert any('CHECK level: 1 of 60 images lie in a folder of another grade: grade 3 in No_DR/' in o for o in reasons)


def test_a_rare_yes_is_not_the_grade_of_a_rare_class(tmp_path):
    rows = [f'a{i},{int(i in (3, 9))},{4 if i == 5 else i % 4}' for i in range(60)]
    with pytest.raises(AptosError, match='can be in 2 columns: dr, class'):
        understand_table(write_rows(tmp_path, 'image,dr,class', rows))


def test_patients_folders_of_one_grade_each_stay_part_of_the_ids(tmp_path):
    frame = pd.DataFrame(dict(id_code=[f'P{i // 2:03}/{i}.png' for i in range(80)], group=[f'g{i}' for i in range(80)],
                              diagnosis=np.random.default_rng(0).integers(0, 5, 40).repeat(2)))
    assert any(test.is_related for test in compare_id_orders(frame, 0))


def test_names_in_class_folders_are_not_related_to_the_grade_by_their_folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(60):
        folder = tmp_path / 'images' / NAMES[i % 5]
        folder.mkdir(parents=True, exist_ok=True)
        write_image(folder / f'{rng.integers(1 << 40):x}.png', i)
    understood = understand_table(tmp_path / 'images')
    assert not [t for t in compare_id_orders(understood.contents.frame, 0) if t.is_related]
    assert understood.contents.frame.diagnosis.value_counts().tolist() == [12] * 5


def test_three_readers_who_are_never_positive_together_are_not_columns_of_grades(tmp_path):
    rows = [f'a{i},{int(i == 1)},{int(i == 5)},{int(i == 7)}' for i in range(20)]
    with pytest.raises(AptosError, match='can be in 3 columns'):
        understand_table(write_rows(tmp_path, 'image,label_1,label_2,label_3', rows))


def test_letters_for_diseases_are_no_grades_of_the_two_eyes(tmp_path):
    "D and G are eyes in French, and in a public table diabetes and glaucoma"
    rows = [f'{i}_left,{i}_right,{int(i % 3 > 0)},{int(i % 4 > 2)}' for i in range(20)]
    csv = write_rows(tmp_path, 'Left-Fundus,Right-Fundus,D,G', rows)
    for row in rows: shutil.copy(csv.parent / f'{row.split(",")[0]}.png', csv.parent / f'{row.split(",")[1]}.png')
    with pytest.raises(AptosError, match='column G, D has only the grades 0 and 1'): understand_table(csv)


def test_mostly_other_values_are_not_called_ungradable(tmp_path):
    rows = [f'a{i},{("1a", "2b", "3c", "4")[i % 4]}' for i in range(20)]
    with pytest.raises(AptosError, match='15 of 20 rows.* Write them as 0 to 4 in another column'):
        understand_table(write_rows(tmp_path, 'image,level', rows))


@pytest.mark.parametrize('header, row, expected', [
    ('image,patient_id,patient_age,patient_sex,diagnosis', '{p},{a},{s},{g}', 'patient_id'),
    ('image,examination date,diagnosis', '{p}/1/2020,{g}', ''),
    ('image,subject,diagnosis', 'S{p},{g}', 'subject'),
    ('image,patient_age,study_site,diagnosis', '{a},{s},{g}', ''),
])
def test_which_column_is_the_patient(tmp_path, header, row, expected):
    rows = [f'a{i},' + row.format(p=i // 2, a=40 + i % 30, s='fm'[i % 2], g=grade_of(i)) for i in range(40)]
    assert keys(understand_table(write_rows(tmp_path, header, rows)), 'patient') == (expected,)


def test_a_number_of_each_image_is_no_patient_where_ids_show_the_eyes(tmp_path):
    rows = [f'{i // 2}_{"left" if i % 2 else "right"},{i},{grade_of(i)}' for i in range(40)]
    understood = understand_table(write_rows(tmp_path, 'image,examination_id,level', rows))
    assert understood.table.group and not understood.table.patient
    assert table_contents(understood.table, understood.data).frame.group.nunique() == 20
    rows = [f'scan_{i}_l1,{grade_of(i)}' for i in range(20)]                     # one eye alone is no eye
    assert keys(understand_table(write_rows(tmp_path, 'image,level', rows)), 'eye', 'group') == ('', '')


@pytest.mark.parametrize('header, row, expected', [
    ('image,binary_label,gt', '{b},{g}', 'asks'),
    ('image,ckd_stage,gt', '{g},{h}', 'gt'),
    ('image,dr_id,gt', '{b},{g}', 'gt'),
    ('image,hypertensive_grade,icdr', '{h},{g}', 'icdr'),
    ('image,no_dr,mild,moderate,severe,pdr', '{b},{b},{b},{b},{b}', 'refused'),
    ('image,education_level,DR', '{h},{g}', 'DR'),
])
def test_columns_that_only_look_like_grades(tmp_path, header, row, expected):
    rows = [f'a{i},' + row.format(b=i % 2, g=grade_of(i), h=i % 3) for i in range(40)]
    csv = write_rows(tmp_path, header, rows)
    if expected in header.split(','): assert keys(understand_table(csv), 'grade') == (expected,)
    else:
        with pytest.raises(AptosError, match='can be in 2 columns|only the grades 0 and 1|no column has grades'):
            understand_table(csv)


def test_a_running_number_is_no_image(tmp_path):
    "Images are called 0.png, 1.png …; one of the named images is missing, but the number has an image in every row"
    for i in range(40): write_image(tmp_path / f'{i}.png', i)
    rows = [f'{i},{(i + 7) % 40 if i else "missing"}.png,{grade_of(i)}' for i in range(40)]
    write_lines(tmp_path / 't.csv', ['n,image,diagnosis', *rows])
    with pytest.raises(AptosError, match='1 of 40 ids have no image in .*: missing.png'):
        understand_table(tmp_path / 't.csv')
    write_lines(tmp_path / 't.csv', ['n,other,diagnosis', *rows])
    with pytest.raises(AptosError, match='the image can be in 2 columns'): understand_table(tmp_path / 't.csv')


def test_a_column_with_a_bar_and_a_header_of_two_lines(tmp_path):
    csv = write_rows(tmp_path, 'image,grade|ICDR', [f'a{i},{i % 5}' for i in range(20)])
    with pytest.raises(AptosError, match='has a | in its name'): understand_table(csv)
    write_lines(csv, ['image,"DR\ngrade"', *(f'a{i},{i % 5}' for i in range(20))])
    assert keys(understand_table(csv), 'grade') == ('DR grade',)


def test_class_folders_that_are_no_grades(tmp_path):
    for i, name in enumerate(['No_DR', 'Mild', 'Moderate', 'Severe', 'Laser_scars']):
        write_image(tmp_path / f'a/{name}/{i}.png', i)
    with pytest.raises(AptosError, match='Laser_scars hold images but are named by no grade'):
        understand_table(tmp_path / 'a')
    for i in range(1, 6): write_image(tmp_path / f'b/{i}/{i}.png', i)
    with pytest.raises(AptosError, match='no folder is grade 0'): understand_table(tmp_path / 'b')
    for i in range(5): write_image(tmp_path / f'c/{i}/{i}.png', i)
    write_image(tmp_path / 'c/Ungradable/x.png', 9)
    understood = understand_table(tmp_path / 'c')
    contents = table_contents(understood.table, understood.data)
    assert (len(contents.frame), len(contents.ungradable)) == (5, 1)


def test_a_row_of_both_eyes_without_its_patient_is_one_patient(tmp_path):
    root = LAYOUTS['row_per_patient'](tmp_path)
    lines = (root / 'patients.csv').read_text().splitlines()
    write_lines(root / 'p.csv', [lines[0], *(line if i % 2 else ',' + line.partition(',')[2]
                                            for i, line in enumerate(lines[1:]))])
    understood = understand_table(root / 'p.csv', root / 'eyes')
    df = table_contents(understood.table, understood.data).frame
    assert understood.table.patient == 'Patient' and df.group.nunique() == 30


def test_names_of_people_are_never_carried(tmp_path):
    rows = [f'a{i},{i // 4},Person {i // 4},P{i // 4},{"AB"[i % 2]},{grade_of(i)}' for i in range(40)]
    csv = write_rows(tmp_path, 'image,patient_id,Full name,Initials,camera,diagnosis', rows)
    assert keys(understand_table(csv), 'carry') == ('camera',)
    csv = write_rows(tmp_path, 'image,patient_id,who,camera,diagnosis',
                     [f'a{i},{i // 4},Person {i // 4},{"AB"[i % 2]},{grade_of(i)}' for i in range(40)])
    assert keys(understand_table(csv), 'carry') == ('camera',)              # unique for each patient


@pytest.mark.parametrize('layout, csv, images, expected', [
    ('messidor2', 'messidor_data.csv', 'IMAGES', dict(pairs='messidor-2.csv', ungradable='blank')),
    ('idrid', 'B. Disease Grading/2. Groundtruths/a. IDRiD_Disease Grading_Training Labels.csv',
     'B. Disease Grading/1. Original Images/a. Training Set', dict(block=10)),
])
def test_a_published_csv_is_read_as_its_preset(tmp_path, layout, csv, images, expected):
    root = LAYOUTS[layout](tmp_path)
    understood = understand_table(root / csv, root / images)
    assert {name: getattr(understood.table, name) for name in expected} == expected
    assert any('as the preset' in reason for reason in understood.reasons)


def test_paths_of_another_computer(tmp_path):
    rows = [f'C:\\Users\\me\\img\\eye{i}.jpg;{grade_of(i)}' for i in range(20)]
    write_lines(tmp_path / 't.csv', ['Path;grade', *rows])
    for i in range(20): write_image(tmp_path / f'scans/img/eye{i}.jpg', i)
    understood = understand_table(tmp_path / 't.csv', tmp_path / 'scans')
    contents = table_contents(understood.table, understood.data)
    assert [path.rpartition('/')[2] for path in contents.frame.path] == [f'eye{i}.jpg' for i in range(20)]
    assert '20 of 20 ids differ from their file in folder' in contents.notes[0]


def test_values_that_are_no_grades_are_named(tmp_path):
    csv = write_rows(tmp_path, 'image,grade', [f'a{i},{"mäßig" if i == 3 else i % 5}' for i in range(20)])
    with pytest.raises(AptosError, match='column grade has values that are no grades: mäßig'): understand_table(csv)
    csv = write_rows(tmp_path, 'image,referable', [f'a{i},{i % 2}' for i in range(20)])
    with pytest.raises(AptosError, match='says whether an image is referable'): understand_table(csv, grade='referable')


@pytest.mark.parametrize('column', ['grade', 'diagnosis'])
def test_a_yes_or_no_is_no_grade(tmp_path, column):
    csv = write_rows(tmp_path, f'image,{column}', [f'a{i},{i % 2}' for i in range(20)])
    with pytest.raises(AptosError, match=f'column {column} has only the grades 0 and 1'): understand_table(csv)
    assert keys(understand_table(csv, grade=column), 'grade') == (column,)


def test_files_that_are_no_tables(tmp_path):
    csv = write_rows(tmp_path, 'image,grade', [f'a{i},{i % 5}' for i in range(20)])
    (tmp_path / 'images.zip').write_bytes(b'PK')
    (tmp_path / '~$t.xlsx').write_bytes(b'lock')
    with pytest.raises(AptosError, match='images.zip: is a file. Unpack it'):
        understand_table(csv, tmp_path / 'images.zip')
    with pytest.raises(AptosError, match='is the lock file of an open spreadsheet'):
        understand_table(tmp_path / '~$t.xlsx', tmp_path)


def test_class_folders(tmp_path):
    root = LAYOUTS['class_folders'](tmp_path)
    understood = understand_table(root / 'images')
    df = table_contents(understood.table, understood.data).frame
    assert df.diagnosis.tolist() == [grade_of(2200 + int(name[-7:-4])) for name in df.id_code]
    with pytest.raises(AptosError, match='has no folders named by grade'): understand_table(root)


def test_two_columns_that_would_do(tmp_path):
    csv = write_rows(tmp_path, 'image,grade_1,grade_2', [f'a{i},{grade_of(i)},{grade_of(i + 50)}' for i in range(20)])
    with pytest.raises(AptosError) as e: understand_table(csv)
    assert 'the grade can be in 2 columns: grade_1, grade_2. Choose one: --grade COLUMN.' in str(e.value)
    assert keys(understand_table(csv, ask=lambda question, answers: answers[1]), 'grade') == ('grade_2',)
    assert keys(understand_table(csv, grade='grade_2'), 'grade') == ('grade_2',)


def test_two_columns_of_the_same_images(tmp_path):
    csv = write_rows(tmp_path, 'key,image_path,diagnosis', [f'a{i},./a{i}.png,{grade_of(i)}' for i in range(20)])
    assert keys(understand_table(csv), 'id') == ('key',)                     # the first of them
    rows = [f'a{i},a{(i + 1) % 20},{grade_of(i)}' for i in range(20)]
    csv = write_rows(tmp_path, 'first,second,diagnosis', rows)
    with pytest.raises(AptosError, match='the image can be in 2 columns: first, second'): understand_table(csv)


@pytest.mark.parametrize('header, row, words', [
    ('image,note', 'a{i},good', 'no column has grades'),
    ('image,dme,age', 'a{i},1,5{i}', 'no column has grades'),
    ('nothing,diagnosis', 'b{i},1', 'no column names images in'),
])
def test_what_is_not_understood(tmp_path, header, row, words):
    write_rows(tmp_path, header, [row.format(i=i) for i in range(12)])
    for file in tmp_path.glob('b*.png'): file.rename(file.with_name('x' + file.name))
    with pytest.raises(AptosError) as e: understand_table(tmp_path / 't.csv')
    assert words in str(e.value) and all(name in str(e.value) for name in header.split(','))


def test_neighbours_with_equal_grades_become_blocks(tmp_path):
    csv = write_rows(tmp_path, 'image,diagnosis', [f'a{i:03},{i // 12 % 5}' for i in range(120)])
    understood = understand_table(csv)
    assert understood.table.block == 10 and any('block = 10' in reason for reason in understood.reasons)


def test_a_sample_submission_is_no_table_to_train_on(tmp_path):
    csv = write_rows(tmp_path, 'id_code,diagnosis', [f'a{i},0' for i in range(20)])
    with pytest.raises(AptosError, match='It looks like a sample submission'): understand_table(csv)


def test_find_table_takes_a_csv_a_preset_or_a_table_of_a_recipe(tmp_path):
    root = LAYOUTS['messidor2'](tmp_path)
    assert find_table('messidor2', data=str(root)).table.grade == 'adjudicated_dr_grade'
    assert find_table(str(root / 'messidor_data.csv'), str(root / 'IMAGES')).table.id == 'image_id'
    recipe = tmp_path / 'r.ini'
    recipe.write_text('[table.mine]\ncsv = t.csv\ngrade = g\n[stage.s]\ntrain = mine\n[submit]\nfinal = s\n')
    assert find_table('mine', recipe=str(recipe), data=str(tmp_path)).table.csv == 't.csv'
    for name, data, words in (('messidor2', '', 'add --data FOLDER'), ('messidor3', str(root), 'no such file'),
                              ('mine', str(root), 'Give a CSV')):
        with pytest.raises(AptosError, match=words): find_table(name, data=data)


def test_a_sheet_of_a_workbook(tmp_path):
    openpyxl = pytest.importorskip('openpyxl')
    for i in range(20): write_image(tmp_path / f'a{i}.png', i)
    book = openpyxl.Workbook()
    for sheet in (book.active, book.create_sheet('second reading')):
        for row in (['image', 'grade'], *([f'a{i}', i % 5] for i in range(20))): sheet.append(row)
    book.save(tmp_path / 't.xlsx')
    with pytest.raises(AptosError, match=r'2 sheets have data: Sheet \(20 rows\), second reading \(20 rows\)'):
        understand_table(tmp_path / 't.xlsx')
    understood = understand_table(tmp_path / 't.xlsx', sheet='second reading')
    assert keys(understood, 'sheet', 'grade') == ('second reading', 'grade') and len(understood.contents.frame) == 20


@pytest.mark.parametrize('column, left, right', [
    ('Auge', 'links', 'rechts'), ('Auge', 'LA', 'RA'), ('Œil', 'OG', 'OD'), ('Œil', 'œil gauche', 'Œil droit'),
    ('Ojo', 'izquierdo', 'derecho'), ('Eye', 'left eye', 'O.D.'), ('Seite', 'linkes Auge', 'rechtes Auge')])
def test_words_for_eyes(tmp_path, column, left, right):
    rows = [f'a{i},P{i // 2},{(left, right)[i % 2] if i else "?"},{grade_of(i)}' for i in range(20)]
    understood = understand_table(write_rows(tmp_path, f'image,patient,{column},grade', rows))
    assert keys(understood, 'eye') == (column,)
    assert understood.contents.frame.eye.tolist() == ['', *(['right', 'left'] * 10)[:19]]


def test_why_a_column_is_not_the_eye(tmp_path):
    rows = [f'a{i},P{i // 2},{("links", "beide")[i % 2]},{i},{grade_of(i)}' for i in range(30)]
    understood = understand_table(write_rows(tmp_path, 'image,patient,Auge,eye pressure,grade', rows))
    assert keys(understood, 'eye') == ('',)
    reason, = [o for o in understood.reasons if o.startswith('eye')]
    assert reason.startswith('eye: not Auge, which has beide. Expected are L, R, left, right')


def test_ids_that_end_in_words_for_eyes(tmp_path):
    rows = [f'{i // 2}_{("OG", "OD")[i % 2]},{grade_of(i)}' for i in range(40)]
    frame = understand_table(write_rows(tmp_path, 'image,level', rows)).contents.frame
    assert frame.group.nunique() == 20 and frame.eye.tolist() == ['left', 'right'] * 20


@pytest.mark.parametrize('ends, known', [
    ('OD OS', True), ('left right', True), ('RA LA', True), ('OG OD', True), ('links rechts', True), ('D S', True),
    ('R L', True), ('l1 r2', True), ('OD OS L R', True), ('gauche droite', True), ('oi od', True), ('D G', True),
    ('left r', True), ('L R right', True), ('l d', False), ('s r', False), ('M D', False), ('a b', False),
    ('l', False), ('l left', False), ('OD OS macula', False), ('S D E', False), ('1 2', False)])
def test_which_ends_of_ids_are_eyes(tmp_path, ends, known):
    words = ends.split()
    rows = [f'P{i // len(words)}_{words[i % len(words)]},{grade_of(i)}' for i in range(40)]
    table = understand_table(write_rows(tmp_path, 'image,level', rows)).table
    assert bool(table.eye) == bool(table.group) == known


@pytest.mark.parametrize('ends, grade, words', [
    ('L R', lambda i: i % 5, '1 of 40 ids does not end in the eye: x)'),
    ('d l', lambda i: i // 8, 'the ids end in d, l, which are not known to be the two eyes); neighbouring ids have'),
    ('a b', lambda i: i % 5, 'no eye at the end of the ids)')])
def test_why_ids_name_no_patients(tmp_path, ends, grade, words):
    rows = [f'P{i // 2}_{ends.split()[i % 2]},{grade(i)}' for i in range(39)]
    rows.append(f'{"P19_l" if ends == "d l" else "x"},{grade(39)}')
    reasons = understand_table(write_rows(tmp_path, 'image,level', rows)).reasons
    assert any(f'patient: unknown (no column; {words}' in reason for reason in reasons), reasons


def test_one_odd_word_loses_no_patient(tmp_path):
    rows = [f'{i // 2}_{"right" if i == 7 else "LR"[i % 2]},{i % 5}' for i in range(40)]
    frame = understand_table(write_rows(tmp_path, 'image,level', rows)).contents.frame
    assert frame.group.nunique() == 20 and frame.eye.tolist() == ['left', 'right'] * 20


@pytest.mark.parametrize('columns, sides', [
    (['left_image', 'ImageOD'], ['left', 'right']), (["image de l'œil droit", 'image'], ['right', '']),
    (['foto de la derecha', "photo d'oeil gauche"], ['right', 'left']),
    (['immagine_s', 'ImmagineD'], ['left', 'right']),
    (["patient's grade", 'grade (i.e. ICDR)', 'E-grade', 'Vitamin D', 'right grade'], ['', '', '', '', 'right'])])
def test_the_sides_of_columns(columns, sides): assert list(sides_of(columns).values()) == sides


def test_a_grade_of_the_patient_is_no_grade_of_the_left_eye(tmp_path):
    for i in range(40): write_image(tmp_path / f'{i // 2}{"ab"[i % 2]}.png', i)
    write_lines(tmp_path / 't.csv', ["left image,right image,patient's grade,right grade",
                                     *(f'{i}a,{i}b,{i % 5},{i % 4}' for i in range(20))])
    with pytest.raises(AptosError, match='no column has the grade of left image'): understand_table(tmp_path / 't.csv')


@pytest.mark.parametrize('letters, eyes', [
    ('DS', 'right left'), ('GD', 'left right'), ('LRD', ''), ('DSE', ''), ('DL', ''), ('D', '')])
def test_single_letters_are_eyes_only_as_a_pair(tmp_path, letters, eyes):
    "D is also double, and E an image of the fovea"
    rows = [f'a{i},P{i // 2},{letters[i % len(letters)]},{i % 5}' for i in range(20)]
    csv = write_rows(tmp_path, 'image,patient,eye,grade', rows)
    understood = understand_table(csv)
    if eyes: assert understood.contents.frame.eye.tolist() == eyes.split() * 10
    else:
        assert not understood.table.eye and any(o.startswith('eye: not eye, which has D') for o in understood.reasons)
        with pytest.raises(AptosError, match='found D.* write L and R'):
            assert understand_table(csv, eye='eye').contents


def test_class_folders_whose_names_end_in_the_eye(tmp_path):
    "The eyes of a patient lie in two folders of grades, and share a fold"
    for i in range(40): write_image(tmp_path / f'a/{i % 5}/{i // 2}_{("left", "right")[i % 2]}.png', i)
    understood = understand_table(tmp_path / 'a')
    frame = understood.contents.frame
    assert frame.group.nunique() == 20 and (frame.groupby('group').eye.nunique() == 2).all()
    assert (frame.groupby('group').diagnosis.nunique() == 2).all()
    assert any('every name ends in the eye (0_left.png' in reason for reason in understood.reasons)
    with pytest.raises(AptosError, match=f'Its sub-folders a have: name one of them, as {tmp_path / "a"}'):
        understand_table(tmp_path)


def test_class_folders_that_number_their_patients_anew(tmp_path):
    "1_left of grade 0 and 1_left of grade 4 are of two people"
    for i in range(30): write_image(tmp_path / f'{i % 5}/{i // 10}_{("left", "right")[i // 5 % 2]}.png', i)
    understood = understand_table(tmp_path)
    assert keys(understood, 'group', 'eye') == ('', '') and understood.contents.frame.group.nunique() == 30
    assert any('patient: unknown (the names end in the eye, but several folders have the same: 0_left, ' in reason
               for reason in understood.reasons)


def test_an_ungradable_value_in_a_column_without_a_name(tmp_path):
    rows = [f'a{i}.png {5 if i == 3 else i % 5}' for i in range(40)]
    for i in range(40): write_image(tmp_path / f'a{i}.png', i)
    write_lines(tmp_path / 't.txt', rows)
    assert keys(understand_table(tmp_path / 't.txt'), 'grade', 'ungradable') == ('2', '5')


def test_ids_that_a_spreadsheet_changed(tmp_path):
    "Days have no time; numbers without their zeros are shown beside the files"
    openpyxl = pytest.importorskip('openpyxl')
    book = openpyxl.Workbook()
    book.active.append(['Image', 'Grade'])
    for i in range(20):
        write_image(tmp_path / f'2020-01-{i + 1:02}.png', i)
        book.active.append([datetime.datetime(2020, 1, i + 1), i % 5])
    book.save(tmp_path / 't.xlsx')
    assert understand_table(tmp_path / 't.xlsx').contents.frame.id_code[0] == '2020-01-01'
    csv = write_rows(tmp_path / 'b', 'image,grade', [f'{i:03},{i % 5}' for i in range(20)])
    write_lines(csv, ['image,grade', *(f'{i},{i % 5}' for i in range(20))])
    with pytest.raises(AptosError, match='has 000.png, 001.png, .* image has 0, 1, 2. Column image has the names of'):
        understand_table(csv)


@pytest.mark.parametrize('codes', ['12', '01', ['1.0', '2.0']])
def test_numbers_are_no_eyes(tmp_path, codes):
    "Nobody knows whether 1 is left: the column is not used, and refused if it is named"
    csv = write_rows(tmp_path, 'image,patient,eye,grade', [f'a{i},P{i // 2},{codes[i % 2]},{i % 5}' for i in range(20)])
    words = 'Which eye a number means is not known: write L and R.'
    understood = understand_table(csv)
    assert not understood.table.eye and any(o.startswith('eye: not eye') and words in o for o in understood.reasons)
    with pytest.raises(AptosError, match=f'found {codes[0]}, {codes[1]}. Expected are .* {words}'):
        assert understand_table(csv, eye='eye').contents


def test_one_error_names_all_that_is_wrong(tmp_path):
    rows = [f'a{i},{i % 5},{"LR"[i % 2]}' for i in range(20)]
    csv = write_rows(tmp_path, 'image,grade,eye', rows)
    rows[2], rows[3], rows[4], rows[5], rows[6] = 'a1,2,L', ',3,L', 'gone,7,up', 'A9.PNG,bad,', 'a6,II+,L'
    write_lines(csv, ['image,grade,eye', '', *rows])
    ids = ['1 row without an id in column image: row 6.', '1 duplicate value in column image: a1.',
           '1 id in column image of an image that another row names: a9.', '1 of 20 ids have no image in',
           'gone. Add the images']
    with pytest.raises(AptosError) as e:
        assert understand_table(csv, grade='grade', eye='eye', ungradable='x').contents
    for words in ('t.csv: 6 problems: (1) ', *ids, '3 invalid values in column grade: gone = 7, A9.PNG = bad, a6 = II',
                  '(6) [table.train] eye = eye: found up. Expected'): assert words in str(e.value), words
    with pytest.raises(AptosError) as e: understand_table(csv)
    for words in ('5 problems: (1) column grade has values that are no grades: 7, II+, bad', *ids):
        assert words in str(e.value), words
    with pytest.raises(AptosError, match='2 problems: .1. no column grad, did you mean grade.* .2. no column ag'):
        table_contents(Table('t', 't.csv', '.', id='image', grade='grad', carry='ag'), tmp_path)


@pytest.mark.parametrize('column', ['Grad', 'Befund', 'Stade', 'Stadium', 'Grado', 'DR-Grad', 'gt'])
def test_a_column_that_nearly_has_grades(tmp_path, column):
    "Its values are named with what to type, although another column has values that could be grades"
    odd = {3: 'nicht beurteilbar', 9: 'unklar'}
    rows = [f'a{i},{odd.get(i, i % 5)},{i % 3}' for i in range(40)]
    csv = write_rows(tmp_path, f'image,{column},Aufnahmen', rows)
    with pytest.raises(AptosError) as e: understand_table(csv)
    words = f'column {column} has values that are no grades: nicht beurteilbar, unklar (2 of 40 rows)'
    option = 'nicht beurteilbar | unklar'
    assert words in str(e.value) and f'--grade "{column}" --ungradable "{option}"' in str(e.value)
    assert len(understand_table(csv, grade=column, ungradable=option).contents.ungradable) == 2
    with pytest.raises(AptosError, match=r'name it: --ungradable "nicht beurteilbar \| unklar", or the key'):
        assert understand_table(csv, grade=column).contents


@pytest.mark.parametrize('column', ['Grad', 'Befund', 'Stade', 'Stadium', 'Grado'])
def test_names_of_grades(tmp_path, column):
    csv = write_rows(tmp_path, f'image,Aufnahmen,{column}', [f'a{i},{i % 3},{i % 4}' for i in range(40)])
    assert keys(understand_table(csv), 'grade') == (column,)


def test_rows_without_an_image_are_left_out_if_asked_for(tmp_path):
    csv = write_rows(tmp_path, 'image,grade', [f'a{i},{i % 5}' for i in range(20)])
    for i in (3, 8): (tmp_path / f'a{i}.png').unlink()
    with pytest.raises(AptosError, match=r'2 of 20 ids .*: a3, a8.*--set images.skip_unreadable=yes'):
        assert understand_table(csv).contents
    contents = understand_table(csv, skip_missing=True).contents
    assert contents.missing == ['a3', 'a8'] and len(contents.frame) == 18
    expected = [(f'a{i}', i % 5, str(tmp_path / f'a{i}.png')) for i in range(20) if i not in (3, 8)]
    assert list(contents.frame[['id_code', 'diagnosis', 'path']].itertuples(index=False, name=None)) == expected
    assert '2 of 20 ids have no image and are left out: a3, a8' in contents.notes


def test_an_ungradable_row_without_an_image_is_counted(tmp_path):
    csv = write_rows(tmp_path, 'image,grade', [f'a{i},{"x" if i in (2, 3) else i % 5}' for i in range(20)])
    for i in (3, 8): (tmp_path / f'a{i}.png').unlink()
    contents = understand_table(csv, skip_missing=True).contents
    assert (contents.missing, contents.ungradable.id_code.tolist(), len(contents.frame)) == (['a3', 'a8'], ['a2'], 17)
    assert '2 of 20 ids have no image and are left out: a3, a8' in contents.notes
    with pytest.raises(AptosError, match='1 of 20 ids have no image'): assert understand_table(csv).contents
