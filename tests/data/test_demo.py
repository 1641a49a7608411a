import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import modified_times

from aptos_fastai.common.io import read_record
from aptos_fastai.data import demo as module
from aptos_fastai.data.demo import CAMERAS, COUNTS, generate_fundus, holds_demo_images, plan_demo, write_demo
from aptos_fastai.data.retina import find_retina
from aptos_fastai.pipeline.graph import load_run, start_run
from aptos_fastai.pipeline.run_recipe import options_of

TINY = dict(pretrain=40, train=30, test=10)


def test_an_image_depends_on_its_seed_alone():
    a, b, c = (generate_fundus(np.random.default_rng(seed), 3, 'square19', True)[0] for seed in (1, 1, 2))
    assert (a == b).all() and (a != c).any()


@pytest.mark.parametrize('camera', CAMERAS)
def test_the_retina_of_every_camera_is_found(camera):
    im, _ = generate_fundus(np.random.default_rng(0), 2, camera, False)
    cam, circle = CAMERAS[camera], find_retina(im)
    assert im.shape == (cam.height, cam.width, 3)
    assert circle.how == 'circle'
    assert abs(circle.r - cam.height * cam.radius) < .05 * circle.r


@pytest.mark.parametrize('grade', range(5))
def test_lesions_match_the_grade(grade):
    _, lesions = generate_fundus(np.random.default_rng(5), grade, 'square19', True)
    kinds = [o['kind'] for o in lesions]
    assert set(kinds) == set(COUNTS[grade])
    for kind, (fewest, most) in COUNTS[grade].items(): assert fewest <= kinds.count(kind) <= most


@pytest.mark.parametrize('grade', [2, 3, 4])
def test_lesions_are_at_their_recorded_places(grade):
    im, lesions = generate_fundus(np.random.default_rng(5), grade, 'square19', True)
    usual = np.median(im[100:190, 100:190].astype(int).sum(2))
    haemorrhages = [(int(o['x']), int(o['y'])) for o in lesions if o['kind'] == 'haem']
    inside = [(x, y) for x, y in haemorrhages if 20 < x < 268 and 20 < y < 268]
    assert inside
    for x, y in inside: assert im[y, x].astype(int).sum() < .7 * usual


@pytest.fixture(scope='module')
def demo(tmp_path_factory): return write_demo(tmp_path_factory.mktemp('demo') / 'demo', **TINY)


def test_tables_have_the_layout_of_kaggle(demo):
    folder15, folder19 = demo / 'diabetic-retinopathy-detection', demo / 'aptos2019-blindness-detection'
    labels15, train19 = pd.read_csv(folder15 / 'trainLabels.csv'), pd.read_csv(folder19 / 'train.csv')
    assert list(labels15) == ['image', 'level'] and len(labels15) == 40
    assert set(labels15.level) == set(train19.diagnosis) == set(range(5))
    assert all((folder15 / f'train/{i}.jpeg').is_file() for i in labels15.image)
    assert all(cv2.imread(str(folder19 / f'train_images/{i}.png')) is not None for i in train19.id_code)
    assert 'SYNTHETIC' in (demo / 'README.txt').read_text()


def test_both_eyes_of_a_patient_have_close_grades():
    plan = plan_demo(**TINY, seed=42, camera_by_grade=False).query('table == "pretrain"')
    patient = plan.id_code.str.split('_').str[0]
    eyes = plan.groupby(patient).grade.agg(['min', 'max'])
    difference = eyes['max'] - eyes['min']
    assert difference.max() <= 1 and (difference == 0).mean() > .6


def test_a_demo_is_written_once(demo):
    calls, before = [], modified_times(demo)
    write_demo(demo, **TINY, progress=lambda *o: calls.append(o))
    assert not calls
    with pytest.raises(FileExistsError, match='other settings'): write_demo(demo, pretrain=42, train=30, test=10)
    assert modified_times(demo) == before


def test_two_processes_may_write_the_same_demo(tmp_path, monkeypatch):
    "The second to finish finds the folder of the first, which stays"
    folder, write = tmp_path / 'demo', module._write_tables

    def overtaken(*args):
        monkeypatch.setattr(module, '_write_tables', write)
        write(*args)
        monkeypatch.setattr('os.getpid', lambda: 1)
        write_demo(folder, **TINY)
        monkeypatch.undo()
        (folder / 'first').touch()
    monkeypatch.setattr(module, '_write_tables', overtaken)
    assert write_demo(folder, **TINY) == folder
    assert (folder / 'first').is_file() and [o.name for o in tmp_path.iterdir()] == ['demo']


def test_a_demo_does_not_overwrite_other_files(tmp_path):
    file = tmp_path / 'mine/image.png'
    file.parent.mkdir()
    file.write_text('x')
    with pytest.raises(FileExistsError, match='contains no demo'): write_demo(file.parent)
    assert file.read_text() == 'x'
    assert not list(tmp_path.glob('.*tmp'))


@pytest.mark.parametrize('camera_by_grade', [False, True])
def test_camera_depends_on_grade_only_on_request(camera_by_grade):
    plan = plan_demo(600, 10, 10, 0, camera_by_grade).query('table == "pretrain"')
    largest_share = pd.crosstab(plan.grade, plan.camera, normalize='index').max(axis=1)
    assert (largest_share > .6).all() if camera_by_grade else (largest_share < .6).all()


def test_tables_of_a_demo_are_synthetic_however_they_are_named(tmp_path):
    "The folder that `demo` wrote, given as --data or --images, is marked as the built-in demo is"
    folder = write_demo(tmp_path / 'demo', **TINY)
    images = folder / 'aptos2019-blindness-detection/train_images'
    assert holds_demo_images(images.glob('*.png'))
    link = tmp_path / 'photos'
    link.symlink_to(images)
    other = tmp_path / 'clinic/a.png'
    assert holds_demo_images([other, link / 'a.png']) and not holds_demo_images([other])
    (tmp_path / 'clinic').mkdir()
    (tmp_path / 'clinic/demo.json').write_text('{"demo": "a file of somebody else"}')
    assert not holds_demo_images([other])


def test_a_run_on_a_demo_folder_is_marked_and_opens_again(tmp_path, capsys):
    folder = write_demo(tmp_path / 'demo', **TINY)
    recipe = tmp_path / 'mine.ini'
    recipe.write_text('[table.train]\ncsv = aptos2019-blindness-detection/train.csv\n'
                      'images = aptos2019-blindness-detection/train_images\ngrade = diagnosis\n'
                      '[images]\nsize = 64\n[stage.a]\ntrain = train\narch = test_resnet\nweights = none\nsize = 64\n'
                      '[submit]\nfinal = a\n')
    run = load_run(recipe, folder, tmp_path / 'runs')
    assert run.synthetic
    with start_run(run): pass
    assert (run.root / 'SYNTHETIC.txt').is_file()
    record = read_record(run.root / 'run.json')
    assert (record['synthetic'], record['demo']) == (True, False)
    assert options_of(str(run.root))['data'] == str(folder.resolve())
