import cv2
import numpy as np
import pandas as pd
import pytest

from aptos_fastai.data.demo import CAMERAS, COUNTS, paint_fundus, write_demo
from aptos_fastai.data.retina import find_retina


def test_a_image_depends_on_its_seed_alone():
    a, b, c = (paint_fundus(np.random.default_rng(s), 3, 'square19', True)[0] for s in (1, 1, 2))
    assert (a == b).all() and (a != c).any()

@pytest.mark.parametrize('camera', CAMERAS)
def test_cameras_show_a_retina_that_is_found(camera):
    im, _ = paint_fundus(np.random.default_rng(0), 2, camera, False)
    cam, c = CAMERAS[camera], find_retina(im)
    assert im.shape == (cam.height, cam.width, 3) and c.how == 'circle' and abs(c.r - cam.height * cam.radius) < .05 * c.r

@pytest.mark.parametrize('grade', range(5))
def test_lesions_follow_the_scale_and_stand_where_they_are_said_to(grade):
    im, found = paint_fundus(np.random.default_rng(5), grade, 'square19', True)
    kinds = pd.Series([o['kind'] for o in found], dtype=str).value_counts().to_dict()
    assert set(kinds) == set(COUNTS[grade]) and all(COUNTS[grade][k][0] <= n <= COUNTS[grade][k][1] for k, n in kinds.items())
    for o in found:
        if o['kind'] == 'haem' and 20 < o['x'] < 268 and 20 < o['y'] < 268:
            assert im[int(o['y']), int(o['x'])].astype(int).sum() < .7 * np.median(im[100:190, 100:190].astype(int).sum(2))

def test_tables_as_kaggle_unpacks_them(tmp_path):
    d = write_demo(tmp_path / 'd', pretrain=40, train=30, test=10)
    old, new = pd.read_csv(d / 'diabetic-retinopathy-detection/trainLabels.csv'), pd.read_csv(d / 'aptos2019-blindness-detection/train.csv')
    assert list(old) == ['image', 'level'] and len(old) == 40 and set(old.level) == set(range(5)) == set(new.diagnosis)
    assert all((d / f'diabetic-retinopathy-detection/train/{i}.jpeg').is_file() for i in old.image)
    assert all(cv2.imread(str(d / f'aptos2019-blindness-detection/train_images/{i}.png')) is not None for i in new.id_code)
    assert 'SYNTHETIC' in (d / 'README.txt').read_text()
    eyes = old.assign(p=old.image.str.split('_').str[0]).groupby('p')['level'].agg(['min', 'max'])
    assert (eyes['max'] - eyes['min']).max() <= 1 and (eyes['max'] == eyes['min']).mean() > .6

def test_a_demo_is_written_once_and_nothing_foreign_is_touched(tmp_path):
    d = write_demo(tmp_path / 'd', pretrain=40, train=30, test=10)
    seen = []
    write_demo(d, pretrain=40, train=30, test=10, progress=lambda *o: seen.append(o))
    assert not seen
    with pytest.raises(FileExistsError, match='other settings'): write_demo(d, pretrain=42, train=30, test=10)
    (tmp_path / 'mine').mkdir(); (tmp_path / 'mine/photo.png').write_text('x')
    with pytest.raises(FileExistsError, match='holds no demo'): write_demo(tmp_path / 'mine')
    assert (tmp_path / 'mine/photo.png').read_text() == 'x' and not list(tmp_path.glob('.*tmp'))

def test_a_planted_shortcut_is_there_only_when_asked_for(tmp_path):
    from aptos_fastai.data.demo import _plan
    for planted in (False, True):
        p = _plan(600, 10, 10, 0, planted).query('table == "pretrain"')
        share = pd.crosstab(p.grade, p.camera, normalize='index').max(axis=1)
        assert (share > .6).all() if planted else (share < .6).all()
