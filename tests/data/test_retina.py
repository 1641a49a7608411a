from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
from example_images import ORANGE, add_noise, disc_image, encode

from aptos_fastai.data.decode import decode
from aptos_fastai.data.demo import CAMERAS, generate_fundus
from aptos_fastai.data.retina import Circle, Prep, crop_box, crop_square, find_retina, prepare, square_of

DISC = disc_image(600, 900, 450, 300, 280)


def with_frame(im, colour, thickness):
    "Return the image with a rectangle along its border."
    return cv2.rectangle(im, (0, 0), (im.shape[1] - 1, im.shape[0] - 1), colour, thickness)


def with_shadow(im):
    "Return the image darkened from right to left."
    return (im * np.linspace(.12, 1, im.shape[1])[None, :, None]).astype(np.uint8)


HARD_IMAGES = {                              # name: image, its circle x, y, r
    'full circle': (DISC, (450, 300, 280)),
    'off centre': (disc_image(600, 900, 350, 290, 250), (350, 290, 250)),
    'dark': (disc_image(600, 900, 450, 300, 280, colour=(24, 12, 6)), (450, 300, 280)),
    'cut off at top and bottom': (disc_image(500, 900, 450, 250, 330), (450, 250, 330)),
    'cut off on one side': (disc_image(600, 500, 210, 300, 270), (210, 300, 270)),
    'grey background': (disc_image(600, 900, 450, 300, 280, background=14), (450, 300, 280)),
    'bright frame': (with_frame(disc_image(600, 900, 450, 300, 270), (250, 250, 250), 9), (450, 300, 270)),
    'wide white frame': (with_frame(disc_image(600, 900, 450, 300, 240), (255, 255, 255), 60), (450, 300, 240)),
    'over-exposed': (disc_image(600, 900, 450, 300, 280, colour=(255, 250, 240)), (450, 300, 280)),
    'half in shadow': (with_shadow(DISC), (450, 300, 280)),
    'small': (disc_image(60, 90, 45, 30, 27), (45, 30, 27)),
}


@pytest.mark.parametrize('name', HARD_IMAGES)
@pytest.mark.parametrize('noise', [0, 3])
def test_the_circle_is_found(name, noise):
    im, (x, y, r) = HARD_IMAGES[name]
    c = find_retina(add_noise(im, noise))
    assert c.how == 'circle', c
    assert np.allclose([c.x, c.y, c.r], [x, y, r], atol=.02 * r + 1.5), c


def test_text_and_notch_do_not_move_the_circle():
    im = DISC.copy()
    cv2.rectangle(im, (715, 280), (740, 320), ORANGE, -1)
    cv2.putText(im, 'OD 2019', (10, 580), cv2.FONT_HERSHEY_SIMPLEX, 1, (255, 255, 255), 2)
    c = find_retina(im)
    assert c.how == 'circle'
    assert np.allclose([c.x, c.y, c.r], [450, 300, 280], atol=7)


@pytest.mark.parametrize('shape, value', [((300, 400, 3), 0), ((300, 400, 3), 255), ((5, 7, 3), 0)])
def test_nothing_found_keeps_the_whole_image(shape, value):
    c = find_retina(np.full(shape, value, np.uint8))
    height, width = shape[:2]
    assert c.how == 'whole'
    assert (c.x, c.y, c.r) == (width / 2, height / 2, max(height, width) / 2)


def test_a_bright_rectangle_gives_its_bounding_box():
    im = np.zeros((300, 400, 3), np.uint8)
    im[50:250, 50:350] = 120
    c = find_retina(im)
    assert c.how == 'box'
    assert np.allclose([c.x, c.y, c.r], [200, 150, 150], atol=3)


def test_real_images(idrid):
    for file in sorted((idrid / 'originals').iterdir())[:4]:
        data = file.read_bytes()
        assert find_retina(decode(data, 512)[0]).how == 'circle'
        _, found = prepare(data, Prep(size=512))
        assert found['how'] == 'circle'
        assert 1600 < found['r'] < 1900
        assert found['width'] > 4000


# Images that were resized to another aspect

RESIZED = {                                  # name: image, its circle x, y, r, width and height after resizing
    'full, to a square': (DISC, (450, 300, 280), (512, 512)),
    'full, to a small square': (DISC, (450, 300, 280), (224, 224)),
    'cut off at top and bottom, to a square': (disc_image(500, 900, 450, 250, 330), (450, 250, 330), (512, 512)),
    'cut off at left and right, to a square': (disc_image(900, 540, 270, 450, 330), (270, 450, 330), (400, 400)),
    'narrower': (DISC, (450, 300, 280), (800, 600)),
    'flatter': (DISC, (450, 300, 280), (900, 450)),
    'off centre': (disc_image(600, 900, 350, 290, 250), (350, 290, 250), (512, 512)),
}


def resized(im, width, height):
    return cv2.resize(im, (width, height), interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize('name', RESIZED)
@pytest.mark.parametrize('noise', [0, 3])
def test_the_ellipse_of_a_resized_image_is_found(name, noise):
    im, (x, y, r), (width, height) = RESIZED[name]
    kx, ky = width / im.shape[1], height / im.shape[0]
    c = find_retina(add_noise(resized(im, width, height), noise))
    assert c.how == 'circle'
    assert abs(c.stretch / (kx / ky) - 1) < .02, c
    assert np.allclose([c.x, c.y, *c.half_axes], [x * kx, y * ky, r * kx, r * ky], atol=.02 * r * max(kx, ky) + 1.5), c
    assert c == find_retina(add_noise(resized(im, width, height), noise))


@pytest.mark.parametrize('name', HARD_IMAGES)
def test_no_circle_is_an_ellipse(name):
    im, _ = HARD_IMAGES[name]
    assert find_retina(add_noise(im, 3)).stretch == 1


def test_no_generated_image_is_an_ellipse_until_it_is_resized():
    rng = np.random.default_rng(0)
    for camera in CAMERAS:
        im, _ = generate_fundus(rng, 4, camera, True)
        height, width, _ = im.shape
        assert find_retina(im).stretch == 1, camera
        assert abs(find_retina(resized(im, width * 3 // 4, height)).stretch - .75) < .02, camera


def rectangle(height, width, margin):
    im = np.zeros((height, width, 3), np.uint8)
    im[margin:-margin, margin:-margin] = ORANGE
    return im


def two_discs(distance):
    im = disc_image(300, 700, 150, 150, 130)
    return cv2.circle(im, (150 + distance, 150), 130, ORANGE, -1)


@pytest.mark.parametrize('im', [
    rectangle(300, 400, 40), rectangle(300, 300, 20), rectangle(400, 250, 60), two_discs(270), two_discs(200),
    np.random.default_rng(0).integers(0, 255, (200, 300, 3)).astype(np.uint8), np.zeros((40, 50, 3), np.uint8),
    resized(np.hstack([disc_image(300, 300, 150, 150, 170)] * 2), 400, 400),
], ids=['rectangle', 'square', 'upright', 'two', 'overlapping', 'noise', 'black', 'two squashed'])
def test_what_is_no_retina_is_no_ellipse(im):
    assert find_retina(im).stretch == 1


@pytest.mark.parametrize('name', RESIZED)
def test_a_resized_image_is_prepared_like_the_original(name):
    im, _, (width, height) = RESIZED[name]
    prep, im = Prep(size=128), add_noise(np.where(im > 0, draw_vessels(im.copy()), 0).astype(np.uint8), 3)
    (square, found), (again, squashed) = (prepare(encode(o, 'PNG'), prep) for o in (im, resized(im, width, height)))
    difference = np.abs(square_of(square, prep, 128).astype(int) - square_of(again, prep, 128))
    assert difference.mean() < 9 and (difference.max(2) > 40).mean() < .05
    flags = squashed['flags'].split()
    assert (found['stretch'], 'squashed' in found['flags']) == (1, False)
    assert 'squashed' in flags and {*flags} - {'squashed', 'blurred'} == {*found['flags'].split()} - {'blurred'}
    assert abs(squashed['red_green'] - found['red_green']) < .02
    assert (squashed['width'], squashed['height'], squashed['how']) == (width, height, 'circle')


def test_recipes_that_do_not_search_the_retina_keep_resized_images():
    im = resized(DISC, 512, 512)
    for prep in (Prep('none', 'squash', 64), Prep('none', 'pad', 64)):
        jpeg, found = prepare(encode(im, 'PNG'), prep)
        assert (found['how'], found['stretch'], found['flags']) == ('whole', 1, '')
        expected = cv2.resize(im, (64, 64), interpolation=cv2.INTER_AREA).astype(int)
        assert np.abs(square_of(jpeg, prep, 64) - expected).mean() < 3


def test_two_resized_retinas_are_multiple():
    im = resized(two_discs(290), 700, 360)
    assert 'multiple' in flags(im)


def test_heat_lies_on_the_lesion_of_a_resized_image(monkeypatch):
    from aptos_fastai.inference import explain
    prep = Prep(size=128)

    def prepared(data):
        jpeg, info = prepare(data, prep)
        assert info['flags'].split()[-1] == 'squashed'
        return {128: square_of(jpeg, prep, 128)}, info

    def bright_spot(grader, squares): return 9 * (squares[128].min(3) > 180).astype(np.float32)

    monkeypatch.setattr(explain, 'heatmap', bright_spot)
    grader = SimpleNamespace(prepare=prepared, model=SimpleNamespace(prep=prep),
                             grade=lambda names, images: pd.DataFrame([dict(score=3.)]))
    im = cv2.circle(DISC.copy(), (600, 150), 14, (255, 255, 255), -1)
    shown, overlay, _ = explain.explain_image(grader, encode(resized(im, 500, 600), 'PNG'))
    y, x = np.argwhere(np.abs(overlay.astype(int) - shown).sum(2) > 100).mean(0)
    assert abs(x - 600 * 500 / 900) < 4 and abs(y - 150) < 4


def test_the_crop_removes_the_shape_of_resized_images():
    from aptos_fastai.reports.shortcuts import mask_shape
    rng = np.random.default_rng(0)
    for i in range(8):
        im = image_of_a_camera(rng, i, i % 2)
        squashed = resized(im, 256, 256)
        shapes = [mask_shape(crop_square(o, find_retina(o), Prep(size=128))) for o in (im, squashed)]
        assert np.abs(shapes[0] - shapes[1]).max() <= 1             # pixels of the width and the height
        assert np.abs(shapes[0] - shapes[1])[3:].max() < .05        # fractions of columns and rows


def test_the_shortcut_check_sees_the_stretch(monkeypatch):
    from aptos_fastai.reports import shortcuts
    stretch = 1 - .01 * np.arange(10)
    df = pd.DataFrame(dict(width=512, height=512, x=256, y=256, r=250, stretch=stretch, diagnosis=np.arange(10) % 5,
                           group=range(10), stored='', path=__file__))
    monkeypatch.setattr(shortcuts, '_sample', lambda run: df)
    monkeypatch.setattr(shortcuts, 'read_square', lambda path, prep, size: np.zeros((size, size, 3), np.uint8))
    monkeypatch.setattr(shortcuts, 'forest_kappa', lambda features, *_: (features, (0., 0.)))
    features = {name: x for name, _, x, _ in shortcuts.shortcut_check(SimpleNamespace(prep=Prep()))}
    assert stretch.tolist() in features[shortcuts.IMAGE_SIZE].T.tolist()


def test_real_images_that_were_resized(idrid):
    for file in sorted((idrid / 'train_images').iterdir())[:6]:
        im, _ = decode(file.read_bytes(), 512)
        height, width, _ = im.shape
        assert find_retina(im).stretch == 1
        for shown in (resized(im, 512, 512), resized(im, 224, 224)):
            assert abs(find_retina(shown).stretch / (height / width) - 1) < .015


# Crop

CUT_OFF = disc_image(500, 900, 450, 250, 330)        # cut off at top and bottom
CUT_OFF_CIRCLE = Circle(450, 250, 330)


def test_crop_is_centred_and_keeps_the_aspect():
    sq = crop_square(CUT_OFF, CUT_OFF_CIRCLE, Prep(size=132, cut_off='black'))
    lit = sq.max(2) > 40
    assert sq.shape == (132, 132, 3)
    assert not lit[:12].any() and not lit[-12:].any()              # the part outside the image is black
    assert lit[66].sum() >= 130 and 98 <= lit[:, 66].sum() <= 102  # the same scale in x and y


def test_cut_off_parts_are_mirrored():
    im = CUT_OFF.copy()
    im[40:60] = (10, 200, 30)                # a green band near the upper edge, mirrored above it
    sq = crop_square(im, CUT_OFF_CIRCLE, Prep(size=132))
    middle = sq[:, 66]
    green = middle[:, 1] > 120
    assert (middle.max(1) > 40).sum() >= 130
    assert green[:30].sum() == 8 and green[22:30].sum() == 4 and green[:16].sum() == 4
    assert (sq[0, 0] == 0).all()


def test_squash_stretches_the_whole_image():
    sq = crop_square(np.full((100, 200, 3), 9, np.uint8), Circle(100, 50, 100), Prep('none', 'squash', 50))
    assert sq.shape == (50, 50, 3) and (sq == 9).all()


def test_the_box_of_an_ellipse_becomes_a_square():
    ellipse = Circle(200, 300, 280, stretch=.5)
    assert ellipse.half_axes == (140, 280)
    assert Circle(200, 300, 280, stretch=2.).half_axes == (280, 140)
    assert crop_box(600, 400, ellipse, Prep()) == (60, 340, 20, 580)
    im = cv2.ellipse(np.zeros((600, 400, 3), np.uint8), (200, 300), (140, 280), 0, 0, 360, ORANGE, -1)
    lit = crop_square(im, ellipse, Prep(size=100)).max(2) > 40
    assert lit.sum(0).max() >= 97 and lit.sum(1).max() >= 97
    assert abs(lit.mean() - np.pi / 4 * .98 ** 2) < .01


def test_outside_the_circle_is_black():
    im = disc_image(600, 900, 450, 300, 280, background=60)
    assert (crop_square(im, Circle(450, 300, 280), Prep(size=100))[0, 0] == 0).all()


def image_of_a_camera(rng, seed, cuts_off):
    "Return an image by one of two cameras: the first cuts the circle off at top and bottom."
    r = int(rng.uniform(140, 160))
    height, width = (int(1.5 * r), int(2.4 * r)) if cuts_off else (int(2.1 * r), int(2.8 * r))
    x, y = width // 2 + int(rng.uniform(-4, 4)), height // 2 + int(rng.uniform(-3, 3))
    colour = tuple(int(o * rng.uniform(.7, 1.2)) for o in ORANGE)
    return add_noise(disc_image(height, width, x, y, r, colour=colour), 3, seed)


def test_the_crop_removes_the_shape_of_the_camera():
    "One camera took most of the high grades: the shape predicts the grade in squashed images, not in prepared ones."
    from aptos_fastai.reports.shortcuts import forest_kappa, mask_shape
    rng = np.random.default_rng(0)
    preps = Prep('none', 'squash', 128), Prep(size=128, cut_off='black'), Prep(size=128)
    shapes = []
    grades = np.arange(240) % 5
    for i, grade in enumerate(grades):
        im = image_of_a_camera(rng, i, rng.random() < (.9 if grade >= 2 else .1))
        c = find_retina(im)
        assert c.how == 'circle'
        shapes.append([mask_shape(crop_square(im, c, p)) for p in preps])
    folds = np.arange(240) // 5 % 5
    kappas = [forest_kappa(np.array([s[j] for s in shapes]), grades.astype(float), folds)[0] for j in range(3)]
    squashed, black, mirrored = kappas
    assert squashed > .5 and black > .5 and abs(mirrored) < .15, kappas


# Quality

def flags(im):
    return prepare(encode(im, 'PNG'), Prep(size=128))[1]['flags'].split()


def draw_vessels(im, n=60):
    "Draw fine dark lines on an image: they make it sharp."
    rng = np.random.default_rng(0)
    for _ in range(n):
        (x0, y0), (x1, y1) = rng.integers(0, im.shape[0], (2, 2)).tolist()
        cv2.line(im, (x0 + 150, y0), (x1 + 150, y1), (110, 45, 20), 3, cv2.LINE_AA)
    return im


def test_quality_flags():
    good = draw_vessels(DISC.copy())
    assert flags(good) == []
    assert flags((good * .2).astype(np.uint8)) == ['dark']
    assert 'blurred' in flags(cv2.GaussianBlur(good, (0, 0), 16))
    assert 'bright' in flags(np.where(good > 30, 255, good).astype(np.uint8))
    assert flags(draw_vessels(disc_image(400, 900, 450, 200, 280))) == ['cut-off']
