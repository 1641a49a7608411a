import base64

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, fundus

from aptos_fastai.cli import main
from aptos_fastai.data.decode import decode
from aptos_fastai.data.duplicates import NEAR, duplicates_table, group_duplicates, near_pairs, resolve_conflicts
from aptos_fastai.data.folds import add_folds
from aptos_fastai.data.retina import Prep, crop_square, find_retina, perceptual_hash
from aptos_fastai.pipeline.stage import training_frame
from aptos_fastai.recipe import read_recipe
from aptos_fastai.run_folder import Run


def hash_of(im): return perceptual_hash(crop_square(im, find_retina(im), Prep(size=128)))

def apart(a, b): return int(np.unpackbits(np.frombuffer(base64.b64decode(a), np.uint8) ^ np.frombuffer(base64.b64decode(b), np.uint8)).sum())


def frame(source, rows):
    "rows: id, grade, pixels, look (an int), group"
    df = pd.DataFrame(rows, columns=['id_code', 'diagnosis', 'pixel_sha256', 'perceptual_hash', 'group'])
    return df.assign(diagnosis=df.diagnosis.astype(np.float32), source=source,
                     perceptual_hash=[base64.b64encode(np.random.default_rng(o).bytes(72) if o else bytes(72)).decode() for o in df['perceptual_hash']])


def test_the_same_image_stored_anew_looks_the_same():
    rng = np.random.default_rng(0)
    ims = [fundus(rng, 400, g % 5) for g in range(12)]
    looks = [hash_of(o) for o in ims]
    for a, im in zip(looks, ims, strict=True):
        small = cv2.resize(im, None, fx=.6, fy=.6, interpolation=cv2.INTER_AREA)
        assert apart(a, hash_of(cv2.imdecode(cv2.imencode('.jpg', small, [cv2.IMWRITE_JPEG_QUALITY, 80])[1], 1))) <= NEAR
        assert apart(a, hash_of(np.clip(im * 1.1 + 3, 0, 255).astype(np.uint8) * (im.max(2, keepdims=True) > 20).astype(np.uint8))) <= NEAR
    assert min(apart(a, b) for i, a in enumerate(looks) for b in looks[:i]) > NEAR


def test_near_pairs_are_those_of_all_pairs():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (300, 576), dtype=np.uint8)
    for i in range(0, 80, 2): bits[i + 1] = bits[i] ^ (rng.random(576) < .05)        # about 29 of 576
    d = (bits[:, None] != bits[None]).sum(2)
    want = {(i, j) for i, j in zip(*np.nonzero(d <= NEAR), strict=True) if i < j}
    assert len(want) == 40 and {tuple(sorted(p)) for p in near_pairs(np.packbits(bits, axis=1))} == want


def test_duplicates_join_groups_across_tables():
    a = frame('a', [('1', 0, 'p', 1, 'a:x'), ('2', 1, 'q', 2, 'a:x'), ('3', 2, 'r', 3, 'a:y'), ('4', 0, 's', 0, 'a:z'), ('5', 0, 't', 0, 'a:w')])
    b = frame('b', [('1', np.nan, 'q', 9, 'b:1'), ('2', np.nan, 'u', 3, 'b:2'), ('3', np.nan, 'v', 8, 'b:3')])
    out = group_duplicates(dict(a=a, b=b))
    ga, gb = out['a'].group, out['b'].group
    assert ga[0] == ga[1] == gb[0] and ga[2] == gb[1]                         # same pixels; same look; a patient's other image follows
    assert ga[3] != ga[4] and len({ga[0], ga[2], ga[3], ga[4], gb[2]}) == 5   # two black images look like nothing
    assert out['a'].duplicate[0] != out['a'].duplicate[1] == out['b'].duplicate[0]           # of one patient, but not the same image
    assert duplicates_table(out).id_code.tolist() == ['2', '1', '3', '2']


def test_unequal_grades_of_one_image():
    a = frame('a', [('1', 0, 'p', 1, 'a:1'), ('2', 3, 'p', 1, 'a:2'), ('3', 2, 'r', 3, 'a:3'), ('4', 2, 'r', 3, 'a:4'), ('5', 1, 's', 5, 'a:5')])
    b = frame('b', [('1', np.nan, 'p', 1, 'b:1')])
    out = group_duplicates(dict(a=a, b=b))
    assert duplicates_table(out).conflict.tolist() == [True, True, True, False, False]
    assert resolve_conflicts(out, 'keep')['a'].target.tolist() == [0, 3, 2, 2, 1]
    mean, drop = resolve_conflicts(out, 'mean'), resolve_conflicts(out, 'drop')
    assert mean['a'].target.tolist() == [1.5, 1.5, 2, 2, 1] and mean['a'].diagnosis.tolist() == [0, 3, 2, 2, 1] and mean['b'].target.isna().all()
    assert drop['a'].id_code.tolist() == ['3', '4', '5'] and len(drop['b']) == 1


def run_with_duplicates(tmp_path, how='keep'):
    r = read_recipe(ROOT / 'recipes/one_table.ini', sets=['stage.bs=2', f'recipe.conflicts={how}'])
    train = frame('train', [(str(i), i % 5, f'p{i // 2 if i < 10 else i}', i + 1, f'train:{i}') for i in range(60)])
    test = frame('test', [(f't{i}', np.nan, f'p{i + 20}', 100 + i, f'test:{i}') for i in range(4)] + [('t9', np.nan, 'new', 200, 'test:9')])
    return Run(r, tmp_path, tmp_path, add_folds(r, resolve_conflicts(group_duplicates(dict(train=train, test=test)), how), tmp_path / 'folds.csv'))


@pytest.mark.parametrize('fold', range(5))
def test_no_image_is_on_both_sides_of_a_fold(tmp_path, fold):
    run = run_with_duplicates(tmp_path)
    labels = {('teacher', 'test'): pd.DataFrame(dict(id_code=run.frames['test'].id_code, **{f'fold{k}': 2. for k in range(5)}))}
    df = training_frame(run, run.recipe.stages['retrain'], fold, labels)
    assert not set(df.pixel_sha256[df.valid]) & set(df.pixel_sha256[~df.valid])
    assert (df.source == 'teacher:test').sum() == 5 - (run.frames['test'].fold == fold).sum()
    assert (run.frames['test'].fold >= 0).tolist() == [True] * 4 + [False]


def test_mean_is_trained_on_but_never_validated_on(tmp_path):
    run = run_with_duplicates(tmp_path, 'mean')
    df = pd.concat([training_frame(run, run.recipe.stages['teacher'], k, {}) for k in range(5)])
    pair = df[df.pixel_sha256 == 'p0']
    assert set(pair.diagnosis[~pair.valid]) == {.5} and set(pair.diagnosis[pair.valid]) == {0, 1}


def test_duplicates_are_said_and_listed(tables, small_recipe, tmp_path, capsys):
    im = (tables / 'train_images/train001.png').read_bytes()
    for to in ('train_images/train013.png', 'test_images/test002.png'): (tables / to).write_bytes(im)
    main(['prepare', '--recipe', str(small_recipe), '--data', str(tables), '--runs', str(tmp_path / 'runs')])
    assert 'stand in the tables more than once: 1, 1 of them with unequal grades' in ' '.join(capsys.readouterr().out.split())
    t = pd.read_csv(tmp_path / 'runs/small/duplicates.csv')
    assert t.id_code.tolist() == ['test002', 'train001', 'train013'] and t.conflict.all()


def test_idrid_holds_six_images_twice(idrid):
    "Found by hand too: 021/391, 028/327, 045/333, 073/375, 079/279 of the graded, and one of them among the ungraded"
    rows = []
    for name in ('train', 'test'):
        for p in sorted((idrid / f'{name}_images').glob('*.jpg')):
            im, _ = decode(p.read_bytes(), 256)
            rows.append((name, p.stem, hash_of(im)))
    df = pd.DataFrame(rows, columns=['source', 'id_code', 'perceptual_hash']).assign(pixel_sha256=lambda o: o.id_code, group=lambda o: o.id_code, diagnosis=0.)
    t = duplicates_table(group_duplicates({n: df[df.source == n] for n in ('train', 'test')}))
    sets = {tuple(int(i.rsplit('_', 1)[1]) for i in o.id_code) for _, o in t.groupby('duplicate')}
    assert sets >= {(28, 327), (45, 333), (73, 375), (21, 391), (79, 279)} and len(sets) <= 8


def test_near_pairs_of_many_that_share_words_stay_few_comparisons(monkeypatch):
    "Rows that all share a word: each is compared with its neighbours alone, and a copy in which a few bits differ is still found"
    import aptos_fastai.data.duplicates as duplicates
    rng = np.random.default_rng(0)
    words = rng.integers(0, 1 << 16, (3000, 36), dtype=np.uint16)
    words[:, ::4] = 7                         # as dark corners are
    words[1500:1530] = words[:30] ^ (np.arange(36) % 9 == 5).astype(np.uint16)
    monkeypatch.setattr(duplicates, 'NEIGHBOURS', 3)
    found = near_pairs(words.view(np.uint8))
    assert found == [(i, 1500 + i) for i in range(30)]
