"""Build the layouts of tables that people have, small: `python tests/layouts.py FOLDER`.

Each function writes one layout below a folder from images that are drawn (`draw`). Used by the tests and for trying the
documents by hand; it holds no image and no grade of a published table.
"""
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np

PATIENTS = 30                                # of a layout with two eyes each


def draw(grade: int, seed: int, side: int = 96) -> np.ndarray:
    "Return a BGR image of a disc with vessels and 4 x `grade` dark spots"
    rng = np.random.default_rng(seed)
    width, height = int(1.3 * side), side
    im = np.zeros((height, width, 3), np.uint8)
    centre = np.array([width // 2, height // 2])
    cv2.circle(im, centre.tolist(), side // 2 - 4, (40, 80, 180 + int(rng.integers(40))), -1)
    for _ in range(30):
        a, b = (centre + rng.uniform(-.34, .34, (2, 2)) * side).astype(int)
        cv2.line(im, a.tolist(), b.tolist(), (30, 60, 150), 2)
    for _ in range(4 * grade):
        spot = (centre + rng.uniform(-.28, .28, 2) * side).astype(int)
        cv2.circle(im, spot.tolist(), 4, (20, 20, 60), -1)
    return im


def grade_of(i: int) -> int:
    "Return the grade of the image number `i`, a fixed mix without an order"
    return int(np.random.default_rng(i).choice(5, p=[.4, .15, .2, .15, .1]))


def write_image(file: Path, i: int, grade: int | None = None) -> None:
    "Write the image number `i`"
    file.parent.mkdir(parents=True, exist_ok=True)
    im = draw(grade_of(i) if grade is None else grade, i)
    if file.suffix.lower() == '.png': cv2.imwrite(str(file), im)
    else: file.write_bytes(cv2.imencode('.jpg', im, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes())


def write_lines(file: Path, lines: Iterable[str], encoding: str = 'utf-8') -> None:
    "Write the lines of a CSV"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('\n'.join(lines) + '\n', encoding=encoding)


# Published tables

def aptos2019(root: Path) -> Path:
    folder = root / 'aptos2019-blindness-detection'
    train, test = [f'{i:012x}' for i in range(60)], [f'{i:012x}' for i in range(100, 112)]
    for i, name in enumerate(train): write_image(folder / f'train_images/{name}.png', i)
    for i, name in enumerate(test, 100): write_image(folder / f'test_images/{name}.png', i)
    write_lines(folder / 'train.csv', ['id_code,diagnosis', *(f'{n},{grade_of(i)}' for i, n in enumerate(train))])
    write_lines(folder / 'test.csv', ['id_code', *test])
    write_lines(folder / 'sample_submission.csv', ['id_code,diagnosis', *(f'{n},0' for n in test)])
    return root


def eyepacs2015(root: Path) -> Path:
    folder = root / 'diabetic-retinopathy-detection'
    for part, csv, header, start in (('train', 'trainLabels.csv', 'image,level', 10),
                                     ('test', 'retinopathy_solution.csv', 'image,level,Usage', 1)):
        rows = [header]
        for i in range(2 * PATIENTS):
            name = f'{start + i // 2}_{"left" if i % 2 == 0 else "right"}'
            write_image(folder / f'{part}/{name}.jpeg', i + 500 * start)
            usage = f',{"Private" if i % 4 else "Public"}' if part == 'test' else ''
            rows.append(f'{name},{grade_of(i + 500 * start)}{usage}')
        write_lines(folder / csv, rows)
    return root


def idrid(root: Path) -> Path:
    folder = root / 'B. Disease Grading'
    for letter, part, n, start in (('a', 'Training', 60, 0), ('b', 'Testing', 20, 300)):
        rows = ['Image name,Retinopathy grade,Risk of macular edema ' + ',' * 9]
        for i in range(1, n + 1):
            write_image(folder / f'1. Original Images/{letter}. {part} Set/IDRiD_{i:03}.jpg', start + i)
            rows.append(f'IDRiD_{i:03},{grade_of(start + i)},{i % 3}' + ',' * 9)
        write_lines(folder / f'2. Groundtruths/{letter}. IDRiD_Disease Grading_{part} Labels.csv', rows)
    return root


def messidor2(root: Path) -> Path:
    names = [f'20051020_{43808 + 3 * i}_0100_PP.png' for i in range(PATIENTS)]
    names += [f'IM{i:06}.jpg' for i in range(PATIENTS)]
    rows, pairs = ['image_id,adjudicated_dr_grade,adjudicated_dme,adjudicated_gradable'], ['left;right']
    for i, name in enumerate(names):
        write_image(root / 'IMAGES' / name.replace('.jpg', '.JPG'), 700 + i)
        rows.append(f'{name},,,0' if i == 7 else f'{name},{grade_of(700 + i)},{i % 2},1')
    for a, b in zip(names[::2], names[1::2], strict=True): pairs.append(f'{a};{b}')
    write_lines(root / 'messidor_data.csv', rows)
    write_lines(root / 'messidor-2.csv', pairs)
    return root


def ddr(root: Path) -> Path:
    folder = root / 'DDR-dataset/DR_grading'
    for part, n, start in (('train', 60, 1000), ('valid', 20, 1100), ('test', 20, 1200)):
        names = [f'007-{i:04}-000.jpg' if i % 2 else f'20170331{start + i:09}.jpg' for i in range(n)]
        for i, name in enumerate(names): write_image(folder / part / name, start + i)
        write_lines(folder / f'{part}.txt',
                    [f'{name} {5 if i == 3 else grade_of(start + i)}' for i, name in enumerate(names)])
    return root


def deepdrid(root: Path) -> Path:
    header = ('patient_id,image_id,image_path,Overall quality,left_eye_DR_Level,right_eye_DR_Level,patient_DR_Level,'
              'Clarity,Field definition,Artifact')
    for part, first in (('training', 1), ('validation', 265)):
        folder = root / f'regular_fundus_images/regular-fundus-{part}'
        rows = [header]
        for i in range(80 if part == 'training' else 40):
            patient, eye, view = first + i // 4, 'lr'[i // 2 % 2], i % 2 + 1
            name, grade = f'{patient}_{eye}{view}', 5 if i == 9 else grade_of(1300 + i // 2 + first)
            write_image(folder / f'Images/{patient}/{name}.jpg', 1300 + 3 * i + first, min(grade, 4))
            grades = f'{grade}.0,' if eye == 'l' else f',{grade}.0'
            rows.append(f'{patient},{name},\\{patient}\\{name}.jpg,{i % 2},{grades},{grade}.0,8,6,1')
        write_lines(folder / f'regular-fundus-{part}.csv', rows)
    return root


# Tables of one's own

def clinic_excel(root: Path) -> Path:
    "An .xlsx with two eyes a patient, words as grades, further columns; images in a folder a patient"
    import openpyxl
    book = openpyxl.Workbook()
    book.active.append(['Patient No.', 'Name', 'Eye', 'Photo', 'DR grade', 'Macular oedema', 'Camera', 'Age', 'Sex'])
    words = ['No DR', 'Mild NPDR', 'Moderate NPDR', 'Severe NPDR', 'PDR']
    for i in range(2 * PATIENTS):
        name = f'P{i // 2:03}/{"OD" if i % 2 else "OS"}_{2000 + i}.JPG'
        write_image(root / 'photos' / name, 2000 + i)
        grade = 'ungradable' if i == 5 else words[grade_of(2000 + i)]
        book.active.append([f'{i // 2:06}', f'Person {i // 2}', 'OD' if i % 2 else 'OS', name, grade,
                            'yes' if i % 3 else 'no', 'Topcon' if i % 4 else 'Canon', 40 + i // 2, 'fm'[i // 2 % 2]])
    root.mkdir(parents=True, exist_ok=True)
    book.save(root / 'labels.xlsx')
    return root


def class_folders(root: Path) -> Path:
    "Sub-folders named by grade, no CSV"
    for i in range(60): write_image(root / f'images/{grade_of(2200 + i)}/eye{i:03}.png', 2200 + i)
    return root


def semicolons(root: Path) -> Path:
    "A CSV of a German spreadsheet: semicolons, Windows-1252, decimal commas; ids without suffix; unlabelled images"
    rows = ['Bild;Grad der Retinopathie;Kamera']
    for i in range(60):
        name = f'Müller {i:03}' if i % 2 else f'Süd-{i:03}'
        write_image(root / f'Bilder/{name}.JPG', 2400 + i)
        rows.append(f'{name}.png;{grade_of(2400 + i)},0;{"A" if i % 2 else "B"}')
    write_lines(root / 'Befunde.csv', rows, 'cp1252')
    for i in range(20): write_image(root / f'ohne Befund/neu{i}.jpg', 2500 + i)
    return root


def row_per_patient(root: Path) -> Path:
    "A row for each patient, with the images and grades of both eyes; one patient has one eye"
    rows = ['Patient,Left-Fundus,Right-Fundus,Left DR,Right DR,Sex']
    for i in range(PATIENTS):
        for side in range(2): write_image(root / f'eyes/{i}_{side}.jpg', 2700 + 2 * i + side)
        right = f'{i}_1.jpg' if i else ''
        grades = f'{grade_of(2700 + 2 * i)},{grade_of(2701 + 2 * i) if i else ""}'
        rows.append(f'{i},{i}_0.jpg,{right},{grades},{"fm"[i % 2]}')
    write_lines(root / 'patients.csv', rows)
    return root


def no_header(root: Path) -> Path:
    "A label file: name.jpg 3"
    for i in range(60): write_image(root / f'img/{i}.jpg', 2600 + i)
    write_lines(root / 'labels.txt', [f'{i}.jpg {grade_of(2600 + i)}' for i in range(60)])
    return root


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    f.__name__: f for f in (aptos2019, eyepacs2015, idrid, messidor2, ddr, deepdrid, clinic_excel, class_folders,
                            semicolons, row_per_patient, no_header)}


def main(folder: str) -> None:
    "Write every layout to a folder of its name"
    for name, write in LAYOUTS.items(): print(write(Path(folder) / name))


if __name__ == '__main__': main(sys.argv[1])
