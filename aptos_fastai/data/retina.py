"Find the retina in a fundus image, crop it and measure its quality."
import base64
import hashlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache

import cv2
import numpy as np

from aptos_fastai.data.decode import MAX_PIXELS, ImageError, box_mean, decode, decode_jpeg, reduction
from aptos_fastai.recipe.graph import Recipe


@dataclass(frozen=True)
class Prep:
    "Settings that turn an image into a prepared square. Recipes with equal settings share one store, named `name`."
    crop: str = 'retina'                     # retina | none
    aspect: str = 'pad'                      # pad | squash
    size: int = 512                          # side of the square, pixels
    quality: int = 95                        # JPEG quality
    cut_off: str = 'mirror'                  # mirror | black: how to fill the part of the retina outside the image
    jpeg: str = 'full'                       # full | fast: how a large JPEG is decoded

    @property
    def name(self) -> str:
        "Folder name in the store: the settings that change the pixels."
        parts = [self.crop, self.aspect]
        if self.crop == 'retina' and self.aspect == 'pad': parts.append(self.cut_off)
        if self.jpeg == 'fast': parts.append('fast')
        return '-'.join([*parts, str(self.size), f'q{self.quality}'])

    @property
    def suffix(self) -> str:
        "End of the file name of every image in the store."
        return f'.{self.name}.jpg'


@dataclass(frozen=True)
class Circle:
    """Centre and radius of the retina, pixels of the image.

    `how` it was found: circle (fitted), box (its bounding box) or whole (nothing found, so the whole image).
    `stretch` is its width / height: 1, or that of the ellipse in an image that was resized to another aspect. `r` is
    then the longer half axis, which is the radius after the shorter axis is stretched.
    """
    x: float
    y: float
    r: float
    how: str = 'circle'
    stretch: float = 1.

    @property
    def half_axes(self) -> tuple[float, float]:
        "Half the width and half the height of the retina, pixels of the image."
        return self.r * min(self.stretch, 1), self.r / max(self.stretch, 1)


def get_prep(recipe: Recipe) -> Prep:
    "Return the image preparation that a recipe asks for; its size is the largest of `prepared_sizes`."
    i = recipe.images
    return Prep(i.crop, i.aspect, recipe.prepared_sizes[0], i.quality, i.cut_off, i.jpeg)


def _max_channel(im: np.ndarray) -> np.ndarray:
    "Return the brightest channel of each pixel, HxW."
    r, g, b = cv2.split(im)
    return cv2.max(cv2.max(r, g), b)


def _edge_points(mask: np.ndarray) -> np.ndarray:
    "Return (n, 2) x, y of the first and last mask pixel of each row and column, without those at the image's border."
    h, w = mask.shape
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, right = mask[rows].argmax(1), w - 1 - mask[rows, ::-1].argmax(1)
    top, bottom = mask[:, cols].argmax(0), h - 1 - mask[::-1, cols].argmax(0)
    sides = [np.c_[left, rows], np.c_[right, rows], np.c_[cols, top], np.c_[cols, bottom]]
    points = np.concatenate(sides).astype(float)
    x, y = points.T
    return points[(x > 1) & (x < w - 2) & (y > 1) & (y < h - 2)]


def _circumcircles(p1: np.ndarray, p2: np.ndarray, p3: np.ndarray):
    "Return x, y, r (n,) of the circles through three points each (n, 2), and which exist (points not on a line)."
    (x1, y1), (x2, y2), (x3, y3) = p1.T, p2.T, p3.T
    d = 2 * (x1 * (y2 - y3) + x2 * (y3 - y1) + x3 * (y1 - y2))
    exists = np.abs(d) > 1e-6
    d = np.where(exists, d, 1)
    s1, s2, s3 = x1**2 + y1**2, x2**2 + y2**2, x3**2 + y3**2
    x = (s1 * (y2 - y3) + s2 * (y3 - y1) + s3 * (y1 - y2)) / d
    y = (s1 * (x3 - x2) + s2 * (x1 - x3) + s3 * (x2 - x1)) / d
    return x, y, np.hypot(x1 - x, y1 - y), exists


def _lstsq_circle(points: np.ndarray) -> tuple[float, float, float]:
    "Fit a circle to points (n, 2) by least squares (Kåsa 1976); returns x, y, r."
    mean = points.mean(0)
    q = points - mean
    a, b, c = np.linalg.lstsq(np.c_[2 * q, np.ones(len(q))], (q ** 2).sum(1), rcond=None)[0]
    return a + mean[0], b + mean[1], float(np.sqrt(max(c + a * a + b * b, 0)))


def _is_near(points: np.ndarray, x, y, r, tol: float) -> np.ndarray:
    "Return which points (n, 2) lie within `tol` of the circle x, y, r."
    return np.abs(np.sqrt((points[:, 0] - x) ** 2 + (points[:, 1] - y) ** 2) - r) < tol


def _fit_circle(points: np.ndarray, tol: float, tries: int = 300) -> tuple[tuple[float, float, float], float]:
    """Fit a circle by RANSAC (Fischler and Bolles 1981).

    Returns x, y, r of the circle that most points (n, 2) lie within `tol` of, and the fraction of such points.
    """
    i = np.random.default_rng(0).integers(0, len(points), (tries, 3))
    x, y, r, exists = _circumcircles(*(points[i[:, k]] for k in range(3)))
    voters = points[::1 + len(points) // 300]        # 150-300 points vote, all points are fitted
    votes = _is_near(voters, x[:, None], y[:, None], r[:, None], tol).sum(1)
    best = np.where(exists, votes, -1).argmax()
    inliers = points[_is_near(points, x[best], y[best], r[best], tol)]
    circle = _lstsq_circle(inliers)
    return circle, float(_is_near(points, *circle, tol).mean())


MAX_STRETCH = 2                              # of an ellipse's longer to its shorter axis; 16:9 as a square is 1.78
MIN_STRETCH = 1.06                           # below it the ellipse counts as a circle
ELLIPSE_SHARE = .8                           # of the edge points lie on an ellipse ...
BETTER = .12                                 # ... and this much more of them than on the circle: shadows gain up to .11


def _ellipses(coefficients: np.ndarray) -> np.ndarray:
    "Return (k, 4) x, y and half axes of those of x^2 + b y^2 + d x + e y + f = 0, rows b, d, e, f, that are plausible."
    b, d, e, f = coefficients[(np.abs(np.log(np.maximum(coefficients[:, 0], 1e-9))) < 2 * np.log(MAX_STRETCH))].T
    x, y = -d / 2, -e / (2 * b)
    square = x ** 2 + b * y ** 2 - f
    rx = np.sqrt(np.maximum(square, 0))
    return np.c_[x, y, rx, rx / np.sqrt(b)][square > 1e-6]


def _is_near_ellipse(points: np.ndarray, ellipses: np.ndarray, tol: float) -> np.ndarray:
    "Return which points (n, 2) lie within `tol` of each ellipse (k, 4), along the line to its centre: (k, n)."
    x, y, rx, ry = ellipses.T[..., None]
    dx, dy = points[:, 0] - x, points[:, 1] - y
    relative = np.sqrt((dx / rx) ** 2 + (dy / ry) ** 2)
    return np.abs(relative - 1) * np.sqrt(dx ** 2 + dy ** 2) < tol * relative


def _fit_ellipse(points: np.ndarray, tol: float, tries: int = 300) -> tuple[np.ndarray, float]:
    """Fit an ellipse with a horizontal and a vertical axis, as `_fit_circle` fits a circle: by RANSAC of four points.

    Returns x, y and half axes, and the fraction of points (n, 2) within `tol`; the fraction is 0 if no ellipse fits.
    """
    mean, scale = points.mean(0), points.std()
    q, near = (points - mean) / scale, tol / scale
    equations = np.c_[q[:, 1] ** 2, q, np.ones(len(q))]
    four = np.random.default_rng(0).integers(0, len(q), (tries, 4))
    four = four[np.abs(np.linalg.det(equations[four])) > 1e-4]
    found = _ellipses(np.linalg.solve(equations[four], -q[four][..., :1] ** 2)[..., 0])
    for voters in (q[::1 + len(q) // 300], q):           # the best of RANSAC, then its least squares twice
        if not len(found): return np.zeros(4), 0.
        best = found[[_is_near_ellipse(voters, found, near).sum(1).argmax()]]
        on = _is_near_ellipse(q, best, near)[0]
        found = _ellipses(np.linalg.lstsq(equations[on], -q[on, 0] ** 2, rcond=None)[0][None])
    if not len(found): return np.zeros(4), 0.
    return found[0] * scale + np.r_[mean, 0, 0], float(_is_near_ellipse(q, found, near).mean())


def _fit_retina(points: np.ndarray, tol: float) -> list[tuple[float, float, float, float]]:
    "Return x, y and half axes of the shapes that fit edge points (n, 2), the better first: at most ellipse and circle."
    (x, y, r), share = _fit_circle(points, tol)
    shapes = [(x, y, r, r)] if share > .5 else []
    if share > 1 - BETTER: return shapes                                 # no ellipse is clearly better
    (x, y, rx, ry), ellipse_share = _fit_ellipse(points, tol)
    is_better = ellipse_share > max(ELLIPSE_SHARE, share + BETTER)
    return [(x, y, rx, ry), *shapes] if is_better and max(rx, ry) > MIN_STRETCH * min(rx, ry) else shapes


def _lit_mask(im: np.ndarray, side: int) -> tuple[np.ndarray, int]:
    """Return which pixels of a small copy are lit (1, else 0), and how many times smaller the copy is.

    The copy has about `side` pixels. Nothing is lit in an image that is too narrow for it.
    """
    h, w = im.shape[:2]
    n = max(1, round(max(h, w) / side))
    if min(h, w) < 16 * n: return np.zeros((1, 1), np.uint8), n
    # means of n x n pixels: the fast case of INTER_AREA
    small = cv2.resize(im[:h // n * n, :w // n * n], (w // n, h // n), interpolation=cv2.INTER_AREA)
    bright = cv2.medianBlur(_max_channel(small), 3)
    return (bright > max(8., .15 * np.percentile(bright, 95))).astype(np.uint8), n


def find_retina(im: np.ndarray, side: int = 256) -> Circle:
    """Find the circle of the retina in a uint8 HxWx3 image, on a copy of about `side` pixels.

    In an image that was resized to another aspect the circle is an ellipse (`stretch` is not 1). Returns the bounding
    box if neither fits, and the whole image if nothing is bright enough. Raises `ImageError` for another array.
    """
    if getattr(im, 'dtype', None) != np.uint8 or im.ndim != 3 or im.shape[2] != 3:
        raise ImageError("find_retina: give a uint8 array (height, width, 3): np.asarray(image.convert('RGB')).")
    h, w = im.shape[:2]
    whole = Circle(w / 2, h / 2, max(h, w) / 2, 'whole')
    mask, n = _lit_mask(im, side)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask)
    if count < 2: return whole
    largest = 1 + stats[1:, cv2.CC_STAT_AREA].argmax()
    bx, by, bw, bh, area = stats[largest]
    if area < .1 * mask.size: return whole
    k = 1 / n
    box = Circle((bx + bw / 2) / k, (by + bh / 2) / k, max(bw, bh) / 2 / k, 'box')
    points = _edge_points(labels == largest)
    if len(points) < 24: return box if area < .95 * mask.size else whole
    for x, y, rx, ry in _fit_retina(points, tol=max(1.5, .012 * max(mask.shape))):
        # an image may cut the retina off, but it is not much larger than the visible part
        fits = .625 <= max(bw / rx, bh / ry) / 2 <= 1.11 and _overlap(x, y, rx, ry, labels == largest) > .85
        if fits: return Circle((x + .5) / k, (y + .5) / k, (max(rx, ry) + .5) / k, stretch=round(float(rx / ry), 4))
    return box


def has_multiple_retinas(im: np.ndarray, side: int = 256) -> bool:
    """Return whether an image (uint8 HxWx3) shows more than one retina, apart or touching.

    The lit area is filled. Its depth at a pixel is the distance to its edge. There is more than one retina if the
    pixels deeper than 0.55 x the maximum form more than one region, or if the bounding box of the largest lit part is
    more than 1.75 times longer than wide.
    """
    mask, _ = _lit_mask(im, side)
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if not outlines: return False
    filled = cv2.drawContours(np.zeros_like(mask), outlines, -1, 1, cv2.FILLED)
    filled = cv2.copyMakeBorder(filled, 1, 1, 1, 1, cv2.BORDER_CONSTANT)       # the image's border is an edge, too
    depth = cv2.distanceTransform(filled, cv2.DIST_L2, 5)
    centres = cv2.connectedComponents((depth > .55 * depth.max()).astype(np.uint8))[0] - 1
    *_, width, height = cv2.boundingRect(max(outlines, key=cv2.contourArea))
    return centres > 1 or max(width, height) > 1.75 * min(width, height)


def _overlap(x: float, y: float, rx: float, ry: float, mask: np.ndarray) -> float:
    "Return the intersection over union of an ellipse with half axes `rx` and `ry` and a mask."
    yy, xx = np.ogrid[:mask.shape[0], :mask.shape[1]]
    disc = ((xx - x) / rx) ** 2 + ((yy - y) / ry) ** 2 <= 1
    return (disc & mask).sum() / max((disc | mask).sum(), 1)


def crop_box(h: int, w: int, c: Circle, prep: Prep) -> tuple[int, int, int, int]:
    """Return x0, x1, y0, y1 of the prepared square in an image of h x w pixels; outside the image where it is padded.

    The box of an ellipse is no square: the crop stretches its shorter side.
    """
    rx, ry = c.half_axes
    x0, x1, y0, y1 = (int(round(o)) for o in (c.x - rx, c.x + rx, c.y - ry, c.y + ry))
    if prep.crop == 'none': x0, x1, y0, y1 = 0, w, 0, h
    if prep.aspect == 'squash': return max(x0, 0), min(x1, w), max(y0, 0), min(y1, h)
    if prep.crop == 'none':
        side = max(h, w)
        x0, y0 = -((side - w) // 2), -((side - h) // 2)
        x1, y1 = x0 + side, y0 + side
    return x0, x1, y0, y1


def crop_square(im: np.ndarray, c: Circle, prep: Prep) -> np.ndarray:
    """Crop the square of side `prep.size` around the circle `c`; pixels outside a fitted circle are black.

    An ellipse becomes a circle again: its bounding box is resized to the square.
    Where the image cuts the circle off, its content is mirrored (`cut_off` = mirror), so that every retina is a full
    disc: the crop's shape identifies the camera, and cameras correlate with grades (the shortcut check of the
    report measures it).
    """
    h, w = im.shape[:2]
    x0, x1, y0, y1 = crop_box(h, w, c, prep)
    part = im[max(y0, 0):y1, max(x0, 0):x1]
    pads = max(-y0, 0), max(y1 - h, 0), max(-x0, 0), max(x1 - w, 0)
    is_disc = c.how == 'circle' and prep.crop == 'retina' and prep.aspect == 'pad'
    if any(pads):
        border = cv2.BORDER_REFLECT_101 if is_disc and prep.cut_off == 'mirror' else cv2.BORDER_CONSTANT
        part = cv2.copyMakeBorder(part, *pads, border)
    interpolation = cv2.INTER_AREA if min(part.shape[:2]) >= prep.size else cv2.INTER_CUBIC
    sq = cv2.resize(part, (prep.size, prep.size), interpolation=interpolation)
    return _blacken_outside(sq) if is_disc else sq


@lru_cache(8)
def _disc(n: int, share: float) -> np.ndarray:
    "Return uint8 n x n: 255 within `share` of the inscribed circle's radius, else 0."
    o = (np.arange(n) - (n - 1) / 2) ** 2
    return np.where(o[:, None] + o[None] <= (n / 2 * share) ** 2, 255, 0).astype(np.uint8)


def _blacken_outside(sq: np.ndarray) -> np.ndarray:
    """Set pixels outside the retina to black: they hold text, bright borders and sensor noise.

    The rim goes too, because it differs between full and mirrored circles.
    """
    return cv2.bitwise_and(sq, sq, mask=_disc(len(sq), .98))


FLAGS = 'dark', 'bright', 'blurred', 'cut-off', 'multiple', 'squashed'
DARK_LEVEL = 5                               # added to the mean of a channel: that of blue can be near 0
QUALITY_SIDE = 256                           # pixels of the square that flags, colour and hash are measured on
MEASURE_SIDE = 512                           # shorter side, at least, of the decoded image that all is measured on


def quality_square(im: np.ndarray, c: Circle, prep: Prep) -> np.ndarray:
    "Return the square of side `QUALITY_SIDE` that is measured, whatever the size of prepared squares."
    return crop_square(im, c, replace(prep, size=QUALITY_SIDE))


def measure_quality(im: np.ndarray, c: Circle, sq: np.ndarray) -> dict:
    """Return the flags of an image that a person should check, and its colour: keys flags, red_green, green_blue.

    Flags, separated by spaces: dark, bright, blurred, cut-off, multiple (retinas), squashed (the retina is an ellipse).
    The colours are logarithms of the ratios of the mean channels inside the retina. All are measured on `sq`, the
    `quality_square`, whatever the size of the image and of the prepared squares, with the ellipse a circle again. The
    limits lie outside the range of most of the 516 IDRiD images: mean of the brightest channel 71-228, edges 1.3-5 %
    of the green level in 99 % (.6-1.4 % after a blur of 1 % of the side).
    """
    brightest, green = _max_channel(sq), cv2.extractChannel(sq, 1)
    inside = (_disc(QUALITY_SIDE, .85) > 0) & (brightest > 12)
    if not inside.any(): return dict(flags='dark', red_green=0., green_blue=0.)
    smooth = cv2.GaussianBlur(green.astype(np.float32), (0, 0), 1)
    edges = cv2.Laplacian(smooth, cv2.CV_32F)[inside].std() / max(green[inside].mean(), 1)
    visible = _visible_share(c, *im.shape[:2]) if c.how == 'circle' else 1.
    flags = {
        'dark': brightest[inside].mean() < 60,
        'bright': (green[inside] >= 245).mean() > .05,
        'blurred': edges < .011,
        'cut-off': visible < .85,
        'multiple': has_multiple_retinas(_unsquash(im, c.stretch)),
        'squashed': c.stretch != 1,
    }
    red_level, green_level, blue_level = np.log(sq[inside].mean(0) + DARK_LEVEL)
    return dict(flags=' '.join(name for name, is_set in flags.items() if is_set),
                red_green=round(float(red_level - green_level), 4),
                green_blue=round(float(green_level - blue_level), 4))


def _unsquash(im: np.ndarray, stretch: float) -> np.ndarray:
    "Return an image with its shorter direction stretched so that an ellipse of width / height `stretch` is a circle."
    return im if stretch == 1 else cv2.resize(im, None, fx=max(1, 1 / stretch), fy=max(1, stretch))


def perceptual_hash(sq: np.ndarray) -> str:
    """Return a 576-bit perceptual hash (base64) of a `quality_square`.

    The bits are the signs of the low frequencies of its green channel after local levelling (after pHash, Zauner 2010).
    Copies of an image at another size or JPEG quality differ in up to 84 bits, different images in 120 or more
    (measured on the 516 IDRiD images).
    """
    green = cv2.resize(sq[..., 1], (64, 64), interpolation=cv2.INTER_AREA).astype(np.float32)
    frequencies = cv2.dct(green - cv2.GaussianBlur(green, (0, 0), 6))[1:25, 1:25]
    return base64.b64encode(np.packbits(frequencies > np.median(frequencies)).tobytes()).decode()


def _visible_share(c: Circle, h: int, w: int) -> float:
    "Return the fraction of the retina's area inside an image of h x w pixels, on a grid of 64 x 64."
    grid = (np.arange(64) + .5) / 32 - 1
    rx, ry = c.half_axes
    x, y = np.meshgrid(c.x + rx * grid, c.y + ry * grid)
    disc = np.hypot(*np.meshgrid(grid, grid)) < 1
    return float(((x >= 0) & (x < w) & (y >= 0) & (y < h))[disc].mean())


def prepare(data: bytes, prep: Prep, max_pixels: int = MAX_PIXELS) -> tuple[bytes, dict]:
    "Return the JPEG of the square of side `prep.size`, and what `prepare_sizes` found. Raises `ImageError`."
    jpegs, found = prepare_sizes(data, prep, [prep.size], max_pixels)
    return jpegs[prep.size], found


def prepare_sizes(data: bytes, prep: Prep, sizes: Collection[int],
                  max_pixels: int = MAX_PIXELS) -> tuple[dict[int, bytes], dict]:
    """Prepare the bytes of an original image; returns a JPEG of the square of each side, and what was found.

    Keys: width, height, x, y, r (pixels of the original, as it is: not stretched), stretch, how (see `Circle`),
    perceptual_hash, pixel_sha256, and those of `measure_quality`. None of them depends on the sizes, and no square on
    the other sizes. Raises `ImageError`.
    """
    images, (width, height) = _decode_sizes(data, prep, sorted(set(sizes)), max_pixels)
    im = images[MEASURE_SIDE]
    h, w = im.shape[:2]
    c = find_retina(im) if prep.crop == 'retina' else Circle(w / 2, h / 2, max(h, w) / 2, 'whole')
    k = max(width, height) / max(h, w)       # `im` may be decoded at a fraction of the original's size
    sq = quality_square(im, c, prep)
    found = dict(width=width, height=height, x=round(c.x * k, 1), y=round(c.y * k, 1), r=round(c.r * k, 1),
                 stretch=c.stretch, how=c.how,
                 **measure_quality(im, c, sq), perceptual_hash=perceptual_hash(sq),
                 pixel_sha256=hashlib.sha256(np.ascontiguousarray(im).data).hexdigest()[:24])
    jpegs = {}
    for size in sizes:
        of_size = images[size]
        circle = _scaled(c, max(of_size.shape[:2]) / max(h, w))
        square = crop_square(of_size, circle, replace(prep, size=size))
        jpegs[size] = _encode_jpeg(square, prep.quality)
    return jpegs, found


def _decode_sizes(data: bytes, prep: Prep, sizes: list[int],
                  max_pixels: int) -> tuple[dict[int, np.ndarray], tuple[int, int]]:
    """Return the decoded image for each of `sizes` (ascending) and for `MEASURE_SIDE`, and width, height of the file.

    One decoded image serves all sizes up to `MEASURE_SIDE`. With a larger one, the file is decoded in full; with `jpeg`
    = fast it is decoded for each.
    """
    if sizes[-1] <= MEASURE_SIDE:
        im, original = decode(data, MEASURE_SIDE, max_pixels, fast_jpeg=prep.jpeg == 'fast')
        return dict.fromkeys([*sizes, MEASURE_SIDE], im), original
    smallest_side = {size: max(size, MEASURE_SIDE) for size in [*sizes, MEASURE_SIDE]}
    if prep.jpeg == 'fast':
        decoded = {side: decode(data, side, max_pixels, fast_jpeg=True) for side in set(smallest_side.values())}
        return {size: decoded[side][0] for size, side in smallest_side.items()}, decoded[MEASURE_SIDE][1]
    full, original = decode(data, 0, max_pixels)
    factors = {size: reduction(min(original), side) for size, side in smallest_side.items()}
    reduced = {factor: box_mean(full, factor) for factor in set(factors.values())}
    return {size: reduced[factor] for size, factor in factors.items()}, original


def _scaled(c: Circle, factor: float) -> Circle:
    "Return a circle in an image that is `factor` times as large."
    return c if factor == 1 else replace(c, x=c.x * factor, y=c.y * factor, r=c.r * factor)


def _encode_jpeg(sq: np.ndarray, quality: int) -> bytes:
    "Encode RGB as JPEG with full-resolution colour (4:4:4)."
    options = [cv2.IMWRITE_JPEG_QUALITY, quality,
               cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return cv2.imencode('.jpg', cv2.cvtColor(sq, cv2.COLOR_RGB2BGR), options)[1].tobytes()


def square_of(data: bytes, prep: Prep, size: int) -> np.ndarray:
    "Decode a prepared JPEG to uint8 `size` x `size` x 3 RGB. Raises `ImageError`."
    im = decode_jpeg(data, reduction(prep.size, size))
    if im is None: raise ImageError('cannot be decoded')
    return im if size == len(im) else cv2.resize(im, (size, size), interpolation=cv2.INTER_AREA)
