import base64
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, fundus

import aptos_fastai.data.duplicates as duplicates_module
from aptos_fastai.cli import main
from aptos_fastai.data.decode import decode
from aptos_fastai.data.duplicates import (
    NEAR,
    TURNS,
    duplicates_table,
    group_duplicates,
    is_same_image,
    known_bits,
    near_known,
    near_pairs,
    resolve_conflicts,
    texture,
    turned,
    turned_bits,
)
from aptos_fastai.data.folds import add_folds
from aptos_fastai.data.retina import Prep, crop_square, find_retina, perceptual_hash, prepare
from aptos_fastai.data.store import jpeg_hash
from aptos_fastai.pipeline.stage import training_frame
from aptos_fastai.recipe.read import read_recipe
from aptos_fastai.run_folder import Run


def hash_image(im):
    return perceptual_hash(crop_square(im, find_retina(im), Prep(size=128)))


def hash_from_seed(seed):
    "Return a random perceptual hash; that of a black image for seed 0."
    bits = np.random.default_rng(seed).bytes(72) if seed else bytes(72)
    return base64.b64encode(bits).decode()


def differing_bits(hash1, hash2):
    bytes1, bytes2 = (np.frombuffer(base64.b64decode(o), np.uint8) for o in (hash1, hash2))
    return int(np.bitwise_count(bytes1 ^ bytes2).sum())


def prepared_frame(source, rows):
    "Return a prepared table; a row is id, grade, pixel hash, seed of the perceptual hash, group."
    df = pd.DataFrame(rows, columns=['id_code', 'diagnosis', 'pixel_sha256', 'perceptual_hash', 'group'])
    df['diagnosis'] = df.diagnosis.astype(np.float32)
    df['perceptual_hash'] = [hash_from_seed(o) for o in df.perceptual_hash]
    return df.assign(source=source)


def reencode_smaller(im):
    small = cv2.resize(im, None, fx=.6, fy=.6, interpolation=cv2.INTER_AREA)
    jpeg = cv2.imencode('.jpg', small, [cv2.IMWRITE_JPEG_QUALITY, 80])[1]
    return cv2.imdecode(jpeg, cv2.IMREAD_COLOR)


def brighten(im):
    brighter = np.clip(im * 1.1 + 3, 0, 255).astype(np.uint8)
    return np.where(im.max(2, keepdims=True) > 20, brighter, 0).astype(np.uint8)


def test_copies_of_an_image_have_near_hashes_and_different_images_do_not():
    rng = np.random.default_rng(0)
    images = [fundus(rng, 400, i % 5) for i in range(12)]
    hashes = [hash_image(im) for im in images]
    for im, sha in zip(images, hashes, strict=True):
        assert differing_bits(sha, hash_image(reencode_smaller(im))) <= NEAR
        assert differing_bits(sha, hash_image(brighten(im))) <= NEAR
    for i, sha in enumerate(hashes):
        for other in hashes[:i]: assert differing_bits(sha, other) > NEAR


# The second look

def look(im):
    "Return the texture of an image, as the second look sees it"
    return texture(crop_square(im, find_retina(im), Prep(size=256)))


def defocus(im, share):
    return cv2.GaussianBlur(im, (0, 0), share * im.shape[0])


def test_a_second_look_confirms_copies_and_no_other_images():
    rng = np.random.default_rng(0)
    images = [fundus(rng, 400, i % 5) for i in range(8)]
    for share in (0, .01):
        blurred = [defocus(im, share) if share else im for im in images]
        looks = [look(im) for im in blurred]
        for im, first in zip(blurred, looks, strict=True):
            assert is_same_image(first, look(reencode_smaller(im)))
            assert is_same_image(first, look(brighten(im)))
        for i, first in enumerate(looks):
            for second in looks[:i]: assert not is_same_image(first, second)


def test_images_without_structure_are_no_copies():
    flat = look(np.zeros((256, 256, 3), np.uint8))
    assert not is_same_image(flat, flat.copy())


def test_near_hashes_of_different_images_are_no_duplicates(tmp_path):
    "Three images with equal hashes: a copy of the first, and another; one more is missing from the store"
    rng, prep = np.random.default_rng(0), Prep(size=256)
    first, other = fundus(rng, 400, 1), fundus(rng, 400, 2)
    df = prepared_frame('a', [(i, 0, f'pixels {i}', 1, f'a:{i}') for i in 'abcd'])
    df['stored'] = [str(tmp_path / f'{i}.{jpeg_hash(jpeg)}{prep.suffix}') for i, jpeg in zip('abcd', [
        stored_jpeg(im, prep) for im in (first, reencode_smaller(first), other, first)], strict=True)]
    for path, im in zip(df.stored[:3], (first, reencode_smaller(first), other), strict=True):
        Path(path).write_bytes(stored_jpeg(im, prep))
    assert group_duplicates(dict(a=df))['a'].duplicate_group.tolist() == [0, 0, 0, 0]
    out = group_duplicates(dict(a=df), prep)['a']
    assert out.duplicate_group.tolist() == [0, 0, 2, 0]       # the missing image is prepared again before it is used
    assert out.group.tolist() == ['a:a', 'a:a', 'a:c', 'a:a']


QUARTERS = [lambda a: np.rot90(a, 1), lambda a: np.rot90(a, 2), lambda a: np.rot90(a, 3)]
MIRRORED = [lambda a: a[:, ::-1], lambda a: a[::-1], lambda a: a.transpose(1, 0, 2),
            lambda a: np.rot90(a, 2).transpose(1, 0, 2)]


def turned_frame(tmp_path, images, prep):
    "Return the prepared table of images, each a group of its own"
    rows = []
    for i, im in enumerate(images):
        jpeg, found = prepare(cv2.imencode('.png', np.ascontiguousarray(im))[1].tobytes(), prep)
        file = tmp_path / f'{i}.{jpeg_hash(jpeg)}{prep.suffix}'
        file.write_bytes(jpeg)
        rows.append((str(i), 0., found['pixel_sha256'], found['perceptual_hash'], f'a:{i}', str(file)))
    columns = ['id_code', 'diagnosis', 'pixel_sha256', 'perceptual_hash', 'group', 'stored']
    return pd.DataFrame(rows, columns=columns).assign(source='a')


def test_mirrored_and_rotated_copies_share_a_group_and_other_images_do_not(tmp_path):
    "As in tables that were balanced by turned copies; the copies are smaller and encoded again, too"
    rng, prep = np.random.default_rng(0), Prep(size=256)
    first, other = fundus(rng, 400, 3), fundus(rng, 400, 3)
    turns = [*QUARTERS, *MIRRORED]
    images = [first, *(reencode_smaller(np.ascontiguousarray(turn(first))) for turn in turns), other]
    out = group_duplicates(dict(a=turned_frame(tmp_path, images, prep)), prep)['a']
    assert out.duplicate_group.tolist() == [0] * 8 + [8] and out.group.tolist() == ['a:0'] * 8 + ['a:8']


def test_turned_copies_are_confirmed_by_the_turned_image(tmp_path):
    "A hash as of a mirrored copy is not enough"
    rng, prep = np.random.default_rng(0), Prep(size=256)
    df = turned_frame(tmp_path, [fundus(rng, 400, 1), fundus(rng, 400, 2)], prep)
    bits = np.frombuffer(base64.b64decode(df.perceptual_hash[0]), np.uint8)[None]
    df.loc[1, 'perceptual_hash'] = base64.b64encode(turned_bits(bits, TURNS[0]).tobytes()).decode()
    assert group_duplicates(dict(a=df))['a'].duplicate_group.tolist() == [0, 0]
    assert group_duplicates(dict(a=df), prep)['a'].duplicate_group.tolist() == [0, 1]


def test_among_too_many_images_turned_copies_are_not_searched_and_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(duplicates_module, 'MOST_TURNED', 1)
    rng, prep = np.random.default_rng(0), Prep(size=256)
    first = fundus(rng, 400, 1)
    df = turned_frame(tmp_path, [first, first[:, ::-1]], prep)
    assert group_duplicates(dict(a=df), prep)['a'].duplicate_group.tolist() == [0, 1]
    assert '2 images: mirrored and rotated copies are not searched' in capsys.readouterr().out


@pytest.mark.parametrize('turn', TURNS)
def test_bits_of_a_turned_image_are_those_of_its_hash(turn):
    sq = crop_square(im := fundus(np.random.default_rng(0), 400, 2), find_retina(im), Prep(size=128))
    bits, of_turned = (np.frombuffer(base64.b64decode(perceptual_hash(o)), np.uint8)[None] for o in (
        sq, np.stack([turned(sq[..., k], turn) for k in range(3)], -1)))
    assert np.bitwise_count(turned_bits(bits, turn) ^ of_turned).sum() <= 20
    assert np.bitwise_count(bits ^ of_turned).sum() > NEAR


def stored_jpeg(im, prep):
    return prepare(cv2.imencode('.png', im)[1].tobytes(), prep)[0]


def test_defocused_images_of_idrid_are_told_apart(idrid):
    "Blurred by 3 % of the diameter, hashes of different images come near; the second look rejects nearly all"
    found, copies = [], {(28, 327), (45, 333), (73, 375), (21, 391), (79, 279)}
    for file in sorted((idrid / 'train_images').glob('*.jpg'))[:200]:
        im, _ = decode(file.read_bytes(), 256)
        circle = find_retina(im)
        sq = crop_square(cv2.GaussianBlur(im, (0, 0), .03 * 2 * circle.r), circle, Prep(size=256))
        found.append((int(file.stem.rpartition('_')[2]), perceptual_hash(sq), texture(sq)))
    near = [(a, b) for i, a in enumerate(found) for b in found[:i]
            if (b[0], a[0]) not in copies and differing_bits(a[1], b[1]) <= NEAR]
    assert len(near) >= 3
    assert sum(is_same_image(a[2], b[2]) for a, b in near) <= len(near) / 3


# Pairs

def test_near_pairs_equal_a_comparison_of_all_pairs():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (300, 576), dtype=np.uint8)
    for i in range(0, 80, 2): bits[i + 1] = bits[i] ^ (rng.random(576) < .05)        # about 29 of 576
    distances = (bits[:, None] != bits[None]).sum(2)
    expected = {(i, j) for i, j in zip(*np.nonzero(distances <= NEAR), strict=True) if i < j}
    found = near_pairs(np.packbits(bits, axis=1))
    assert len(expected) == 40
    assert set(found) == expected


def test_near_pairs_among_many_rows_that_share_words():
    "All rows share words, so each is compared with its neighbours alone; near copies are still found."
    rng = np.random.default_rng(0)
    words = rng.integers(0, 1 << 16, (3000, 36), dtype=np.uint16)
    words[:, ::4] = 7                         # as in dark corners
    words[1500:1530] = words[:30] ^ (np.arange(36) % 9 == 5).astype(np.uint16)
    assert near_pairs(words.view(np.uint8), neighbours=3) == [(i, 1500 + i) for i in range(30)]


# Groups

def test_duplicates_merge_groups_across_tables():
    a = prepared_frame('a', [('1', 0, 'p', 1, 'a:x'), ('2', 1, 'q', 2, 'a:x'), ('3', 2, 'r', 3, 'a:y'),
                             ('4', 0, 's', 0, 'a:z'), ('5', 0, 't', 0, 'a:w')])
    b = prepared_frame('b', [('1', np.nan, 'q', 9, 'b:1'), ('2', np.nan, 'u', 3, 'b:2'), ('3', np.nan, 'v', 8, 'b:3')])
    out = group_duplicates(dict(a=a, b=b))
    assert out['a'].group.tolist() == ['a:x', 'a:x', 'a:y', 'a:z', 'a:w']      # two black images are no duplicates
    assert out['b'].group.tolist() == ['a:x', 'a:y', 'b:3']                    # equal pixels; equal perceptual hash
    first, second = out['a'].duplicate_group[:2]
    assert first != second == out['b'].duplicate_group[0]                      # images of one patient are no duplicates
    assert duplicates_table(out).id_code.tolist() == ['2', '1', '3', '2']


def test_a_chain_of_duplicates_is_one_group_named_after_its_first_row():
    a = prepared_frame('a', [('1', 0, 'p', 1, 'a:1'), ('2', 0, 'q', 2, 'a:2'), ('3', 0, 'r', 3, 'a:3')])
    b = prepared_frame('b', [('1', 0, 'r', 2, 'b:1'), ('2', 0, 'q', 5, 'b:2'), ('3', 0, 's', 6, 'a:3')])
    out = group_duplicates(dict(a=a, b=b))
    assert out['a'].duplicate_group.tolist() == [0, 1, 1] and out['b'].duplicate_group.tolist() == [1, 1, 5]
    assert out['a'].group.tolist() == ['a:1', 'a:2', 'a:2'] and out['b'].group.tolist() == ['a:2', 'a:2', 'a:2']


def test_different_grades_of_duplicates():
    a = prepared_frame('a', [('1', 0, 'p', 1, 'a:1'), ('2', 3, 'p', 1, 'a:2'), ('3', 2, 'r', 3, 'a:3'),
                             ('4', 2, 'r', 3, 'a:4'), ('5', 1, 's', 5, 'a:5')])
    b = prepared_frame('b', [('1', np.nan, 'p', 1, 'b:1')])
    out = group_duplicates(dict(a=a, b=b))
    assert duplicates_table(out).conflict.tolist() == [True, True, True, False, False]
    keep, mean, drop = (resolve_conflicts(out, how) for how in ('keep', 'mean', 'drop'))
    assert keep['a'].target.tolist() == [0, 3, 2, 2, 1]
    assert mean['a'].target.tolist() == [1.5, 1.5, 2, 2, 1]
    assert mean['a'].diagnosis.tolist() == [0, 3, 2, 2, 1]
    assert mean['b'].target.isna().all()
    assert drop['a'].id_code.tolist() == ['3', '4', '5']
    assert len(drop['b']) == 1


# Folds and training

def run_with_duplicates(tmp_path, how='keep'):
    "Return a run of 60 graded images with 5 pairs of copies and of 5 ungraded ones, 4 of them copies of graded ones."
    recipe = read_recipe(ROOT / 'recipes/one_table.ini', sets=['stage.bs=2', f'recipe.conflicts={how}'])
    train = [(str(i), i % 5, f'p{i // 2 if i < 10 else i}', i + 1, f'train:{i}') for i in range(60)]
    test = [(f't{i}', np.nan, f'p{i + 20}', 100 + i, f'test:{i}') for i in range(4)]
    test.append(('t9', np.nan, 'new', 200, 'test:9'))
    frames = group_duplicates(dict(train=prepared_frame('train', train), test=prepared_frame('test', test)))
    frames = add_folds(recipe, resolve_conflicts(frames, how), tmp_path / 'folds.csv')
    return Run(recipe, tmp_path, tmp_path, frames)


@pytest.mark.parametrize('fold', range(5))
def test_no_image_trains_and_validates(tmp_path, fold):
    run = run_with_duplicates(tmp_path)
    test = run.frames['test']
    labels = pd.DataFrame(dict(id_code=test.id_code, **{f'fold{k}': 2. for k in range(5)}))
    df = training_frame(run, run.recipe.stages['retrain'], fold, {('teacher', 'test'): labels})
    assert not set(df.pixel_sha256[df.valid]) & set(df.pixel_sha256[~df.valid])
    assert (df.source == 'teacher:test').sum() == 5 - (test.fold == fold).sum()
    assert (test.fold >= 0).tolist() == [True] * 4 + [False]


def test_mean_grades_train_and_own_grades_validate(tmp_path):
    run = run_with_duplicates(tmp_path, 'mean')
    df = pd.concat([training_frame(run, run.recipe.stages['teacher'], k, {}) for k in range(5)])
    pair = df[df.pixel_sha256 == 'p0']
    assert set(pair.diagnosis[~pair.valid]) == {.5}
    assert set(pair.diagnosis[pair.valid]) == {0, 1}


def test_duplicates_are_reported_and_listed(tables, small_recipe, tmp_path, capsys):
    image = (tables / 'train_images/train001.png').read_bytes()
    for copy in ('train_images/train013.png', 'test_images/test002.png'): (tables / copy).write_bytes(image)
    runs = tmp_path / 'runs'
    main(['prepare', '--recipe', str(small_recipe), '--data', str(tables), '--runs', str(runs)])
    assert '3 duplicate images in 1 group, 1 with conflicting grades' in ' '.join(capsys.readouterr().out.split())
    df = pd.read_csv(runs / 'small/duplicates.csv')
    assert df.id_code.tolist() == ['test002', 'train001', 'train013']
    assert df.conflict.all() and df.duplicate_group.nunique() == 1


def test_hashes_near_a_known_one_are_found_and_black_images_are_like_no_other():
    rng = np.random.default_rng(0)
    known = rng.integers(0, 256, (50, 72), dtype=np.uint8)

    def with_changed_bits(n):
        bits = np.unpackbits(known[7])
        bits[rng.choice(576, n, replace=False)] ^= 1
        return np.packbits(bits)
    rows = [with_changed_bits(0), with_changed_bits(NEAR), with_changed_bits(NEAR + 1), np.zeros(72, np.uint8)]
    hashes, others = (pd.Series([base64.b64encode(o.tobytes()).decode() for o in part])
                      for part in ([*rows, rows[0]], [*known, np.zeros(72, np.uint8)]))
    assert near_known(hashes, known_bits(others)).tolist() == [True, True, False, False, True]
    assert not near_known(hashes, known_bits(others[-1:])).any()


def test_idrid_has_known_duplicates(idrid):
    "Found by eye: 021/391, 028/327, 045/333, 073/375, 079/279 of the graded images, and one pair of ungraded ones."
    rows = []
    for name in ('train', 'test'):
        for file in sorted((idrid / f'{name}_images').glob('*.jpg')):
            im, _ = decode(file.read_bytes(), 256)
            rows.append((name, file.stem, hash_image(im)))
    df = pd.DataFrame(rows, columns=['source', 'id_code', 'perceptual_hash'])
    df = df.assign(pixel_sha256=df.id_code, group=df.id_code, diagnosis=0.)
    found = duplicates_table(group_duplicates({name: df[df.source == name] for name in ('train', 'test')}))
    groups = {tuple(int(i.rsplit('_', 1)[1]) for i in rows.id_code) for _, rows in found.groupby('duplicate_group')}
    assert groups >= {(28, 327), (45, 333), (73, 375), (21, 391), (79, 279)}
    assert len(groups) <= 8
