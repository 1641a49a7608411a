"Example images that the tests of this folder share."
import io

import cv2
import numpy as np
from PIL import Image

ORANGE = (190, 90, 40)


def disc_image(height, width, x, y, radius, background=0, colour=ORANGE):
    "Return an image of a disc, RGB."
    im = np.full((height, width, 3), background, np.uint8)
    cv2.circle(im, (x, y), radius, colour, -1)
    return im


def add_noise(im, sigma=4, seed=0):
    noise = np.random.default_rng(seed).normal(0, sigma, im.shape)
    return np.clip(im + noise, 0, 255).astype(np.uint8)


def encode(im, fmt, **options):
    "Return an image (an array or a Pillow image) as the bytes of a file."
    if isinstance(im, np.ndarray): im = Image.fromarray(im)
    f = io.BytesIO()
    im.save(f, fmt, **options)
    return f.getvalue()


SMALL_RETINA = add_noise(disc_image(80, 120, 60, 40, 36))
