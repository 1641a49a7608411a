import cv2
import numpy as np
import pytest
from example_images import ORANGE, add_noise, disc_image, encode

from aptos_fastai.data.decode import decode
from aptos_fastai.data.retina import Circle, Prep, crop_square, find_retina, prepare

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
