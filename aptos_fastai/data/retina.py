"Find the retina in a fundus image, crop it and measure its quality."
import base64
import hashlib
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from aptos_fastai.data.decode import ImageError, decode, decode_jpeg, reduction
from aptos_fastai.recipe import Recipe


@dataclass(frozen=True)
class Prep:
    "How an image becomes a square; its `name` names the store, so that several recipes share one"
    crop: str = 'retina'                     # retina | none
    aspect: str = 'pad'                      # pad | squash
    size: int = 512                          # side, pixels
    quality: int = 95                        # JPEG
    cut_off: str = 'mirror'                  # mirror | black

    @property
    def name(self) -> str:
        more = [self.cut_off] * (self.crop == 'retina' and self.aspect == 'pad')
        return '-'.join([self.crop, self.aspect, *more, str(self.size), f'q{self.quality}'])
    @property
    def suffix(self) -> str: return f'.{self.name}.jpg'


@dataclass(frozen=True)
class Circle:
    "The retina found, pixels of the image; `how` is circle, box (its bounding box) or whole (nothing found)"
    x: float
    y: float
    r: float
    how: str = 'circle'


def get_prep(recipe: Recipe) -> Prep:
    "How a recipe prepares its images"
    i = recipe.images
    return Prep(i.crop, i.aspect, recipe.store_size, i.quality, i.cut_off)


def _brightest(im: np.ndarray) -> np.ndarray:
    "The brightest of the channels, HxW"
    r, g, b = cv2.split(im)
    return cv2.max(cv2.max(r, g), b)


def _edge_points(mask: np.ndarray) -> np.ndarray:
    "(n, 2) x, y of the outermost mask pixels of each row and column, but for those at the image's border"
    h, w = mask.shape
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, right = mask[rows].argmax(1), w - 1 - mask[rows, ::-1].argmax(1)
    top, bottom = mask[:, cols].argmax(0), h - 1 - mask[::-1, cols].argmax(0)
    p = np.concatenate([np.c_[left, rows], np.c_[right, rows], np.c_[cols, top], np.c_[cols, bottom]]).astype(float)
    inside = (p[:, 0] > 1) & (p[:, 0] < w - 2) & (p[:, 1] > 1) & (p[:, 1] < h - 2)
    return p[inside]


def _lsq_circle(p: np.ndarray) -> tuple[float, float, float]:
    "The circle of least squares through points p (Kåsa 1976)"
    m = p.mean(0); q = p - m
    a, b, c = np.linalg.lstsq(np.c_[2 * q, np.ones(len(q))], (q ** 2).sum(1), rcond=None)[0]
    return a + m[0], b + m[1], float(np.sqrt(max(c + a * a + b * b, 0)))


def _fit_circle(p: np.ndarray, tol: float, tries: int = 300) -> tuple[tuple[float, float, float], float]:
    "RANSAC (Fischler and Bolles 1981): the circle that most points of `p` lie on within `tol`, and their share"
    i = np.random.default_rng(0).integers(0, len(p), (tries, 3))
    (x1, y1), (x2, y2), (x3, y3) = (p[i[:, k]].T for k in range(3))
    d = 2 * (x1 * (y2 - y3) + x2 * (y3 - y1) + x3 * (y1 - y2))
    ok = np.abs(d) > 1e-6
    s1, s2, s3, d = x1**2 + y1**2, x2**2 + y2**2, x3**2 + y3**2, np.where(ok, d, 1)
    cx = (s1 * (y2 - y3) + s2 * (y3 - y1) + s3 * (y1 - y2)) / d
    cy = (s1 * (x3 - x2) + s2 * (x1 - x3) + s3 * (x2 - x1)) / d
    r = np.hypot(x1 - cx, y1 - cy)
    def near(q, x, y, r): return np.abs(np.sqrt((q[:, 0] - x) ** 2 + (q[:, 1] - y) ** 2) - r) < tol
    some = p[::1 + len(p) // 300]            # 150-300 points vote, all of them fit
    votes = near(some, cx[:, None], cy[:, None], r[:, None]).sum(1)
    best = np.where(ok, votes, -1).argmax()
    x, y, r = _lsq_circle(p[near(p, cx[best], cy[best], r[best])])
    return (x, y, r), float(near(p, x, y, r).mean())


def find_retina(im: np.ndarray, side: int = 256) -> Circle:
    "The circle of the retina in a uint8 HxWx3 image, found at about `side` pixels; the bounding box or the whole image failing that"
    h, w = im.shape[:2]
    whole = Circle(w / 2, h / 2, max(h, w) / 2, 'whole')
    n = max(1, round(max(h, w) / side)); k = 1 / n      # means of n x n pixels: the quick case of INTER_AREA
    if min(h, w) < 16 * n: return whole
    small = cv2.resize(im[:h // n * n, :w // n * n], (w // n, h // n), interpolation=cv2.INTER_AREA)
    v = cv2.medianBlur(_brightest(small), 3)
    n, lab, stats, _ = cv2.connectedComponentsWithStats((v > max(8., .15 * np.percentile(v, 95))).astype(np.uint8))
    if n < 2: return whole
    big = 1 + stats[1:, cv2.CC_STAT_AREA].argmax()
    bx, by, bw, bh, area = stats[big]
    if area < .1 * v.size: return whole
    box = Circle((bx + bw / 2) / k, (by + bh / 2) / k, max(bw, bh) / 2 / k, 'box')
    p = _edge_points(lab == big)
    if len(p) < 24: return box if area < .95 * v.size else whole
    (x, y, r), share = _fit_circle(p, tol=max(1.5, .012 * max(v.shape)))
    yy, xx = np.ogrid[:v.shape[0], :v.shape[1]]
    disc = (xx - x) ** 2 + (yy - y) ** 2 <= r * r
    agree = (disc & (lab == big)).sum() / max((disc | (lab == big)).sum(), 1)
    # the circle may stick out of an image that cuts it off, but not be much larger than what is seen
    fine = share > .5 and agree > .85 and .45 * max(bw, bh) <= r <= .8 * max(bw, bh)
    return Circle((x + .5) / k, (y + .5) / k, (r + .5) / k) if fine else box


def crop_box(h: int, w: int, c: Circle, prep: Prep) -> tuple[int, int, int, int]:
    "What the prepared square of an image of h x w covers: x0, x1, y0, y1 in its pixels, beyond its edges where it is padded"
    x0, x1, y0, y1 = (int(round(o)) for o in (c.x - c.r, c.x + c.r, c.y - c.r, c.y + c.r))
    if prep.crop == 'none': x0, x1, y0, y1 = 0, w, 0, h
    if prep.aspect == 'squash': return max(x0, 0), min(x1, w), max(y0, 0), min(y1, h)
    if prep.crop == 'none':
        x0, y0 = -((max(h, w) - w) // 2), -((max(h, w) - h) // 2)
        return x0, x0 + max(h, w), y0, y0 + max(h, w)
    return x0, x1, y0, y1


def crop_square(im: np.ndarray, c: Circle, prep: Prep) -> np.ndarray:
    """The square of side `prep.size` around the circle `c`, black outside a found one.

    Where the image thresholds the circle off, its content is mirrored (`cut_off` = mirror), so that every retina is a whole disc: the shape of what is
    missing belongs to the camera, and cameras go with grades (`audit` measures it).
    """
    h, w = im.shape[:2]
    x0, x1, y0, y1 = crop_box(h, w, c, prep)
    part = im[max(y0, 0):y1, max(x0, 0):x1]
    pads = max(-y0, 0), max(y1 - h, 0), max(-x0, 0), max(x1 - w, 0)
    disc = c.how == 'circle' and prep.crop == 'retina' and prep.aspect == 'pad'
    if any(pads): part = cv2.copyMakeBorder(part, *pads, cv2.BORDER_REFLECT_101 if disc and prep.cut_off == 'mirror' else cv2.BORDER_CONSTANT)
    shrink = min(part.shape[:2]) >= prep.size
    out = cv2.resize(part, (prep.size, prep.size), interpolation=cv2.INTER_AREA if shrink else cv2.INTER_CUBIC)
    return _outside_black(out) if disc else out


@lru_cache(8)
def _disc(n: int, share: float) -> np.ndarray:
    "uint8 n x n: 255 within `share` of the inscribed circle's radius"
    o = (np.arange(n) - (n - 1) / 2) ** 2
    return np.where(o[:, None] + o[None] <= (n / 2 * share) ** 2, 255, 0).astype(np.uint8)


def _outside_black(sq: np.ndarray) -> np.ndarray:
    "Text, bright borders and sensor noise outside the retina are no part of it; nor is its rim, by which a whole circle differs from a mirrored one"
    return cv2.bitwise_and(sq, sq, mask=_disc(len(sq), .98))


def quality_flags(sq: np.ndarray, seen: float) -> str:
    """Words for what a person would look at again, of a prepared square and the share of the circle that the image shows: dark, bright, blurred, cut-off.

    The limits lie outside what the 516 IDRiD images show: brightest channel 80-224 on average, edges 1.5-7 % of the green level
    (.9 % once blurred by 1 % of the side).
    """
    sq = cv2.resize(sq, (256, 256), interpolation=cv2.INTER_AREA)
    brightest, green = _brightest(sq), cv2.extractChannel(sq, 1)
    inside = (_disc(256, .85) > 0) & (brightest > 12)
    if not inside.any(): return 'dark'
    edges = cv2.Laplacian(cv2.GaussianBlur(green.astype(np.float32), (0, 0), 1), cv2.CV_32F)[inside].std() / max(green[inside].mean(), 1)
    found = dict(dark=brightest[inside].mean() < 60, bright=(green[inside] >= 245).mean() > .05, blurred=edges < .013)
    return ' '.join([k for k, v in found.items() if v] + (['cut-off'] if seen < .85 else []))


def perceptual_hash(sq: np.ndarray) -> str:
    """576 bits (base64) of how a prepared square looks: signs of the low frequencies of its locally levelled green channel (after pHash, Zauner 2010).

    Equal images stored anew at another size or quality differ in up to 84 bits, different ones in 120 and more (measured on the 516 of IDRiD).
    """
    g = cv2.resize(sq[..., 1], (64, 64), interpolation=cv2.INTER_AREA).astype(np.float32)
    d = cv2.dct(g - cv2.GaussianBlur(g, (0, 0), 6))[1:25, 1:25]
    return base64.b64encode(np.packbits(d > np.median(d)).tobytes()).decode()


def _seen(c: Circle, h: int, w: int) -> float:
    "Share of the circle's area that lies within the image, on a grid of 64 x 64"
    g = (np.arange(64) + .5) / 32 - 1
    x, y = np.meshgrid(c.x + c.r * g, c.y + c.r * g)
    disc = np.hypot(*np.meshgrid(g, g)) < 1
    return float(((x >= 0) & (x < w) & (y >= 0) & (y < h))[disc].mean())


def prepare(data: bytes, prep: Prep) -> tuple[bytes, dict]:
    "The prepared JPEG of an original's bytes, and what was found: width, height, x, y, r (original pixels), how, flags, look and pixels (hashes)"
    im, (w, h) = decode(data, prep.size)
    c = find_retina(im) if prep.crop == 'retina' else Circle(im.shape[1] / 2, im.shape[0] / 2, max(im.shape[:2]) / 2, 'whole')
    k = max(w, h) / max(im.shape[:2])
    sq = crop_square(im, c, prep)
    info = dict(width=w, height=h, x=round(c.x * k, 1), y=round(c.y * k, 1), r=round(c.r * k, 1), how=c.how,
                flags=quality_flags(sq, _seen(c, *im.shape[:2]) if c.how == 'circle' else 1.),
                perceptual_hash=perceptual_hash(sq), pixel_sha256=hashlib.sha256(np.ascontiguousarray(im).data).hexdigest()[:24])
    opts = [cv2.IMWRITE_JPEG_QUALITY, prep.quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return cv2.imencode('.jpg', cv2.cvtColor(sq, cv2.COLOR_RGB2BGR), opts)[1].tobytes(), info


def square_of(data: bytes, prep: Prep, size: int) -> np.ndarray:
    "uint8 `size` x `size` x 3 RGB of a prepared JPEG"
    im = decode_jpeg(data, reduction(prep.size, size))
    if im is None: raise ImageError('cannot be decoded')
    return cv2.resize(im, (size, size), interpolation=cv2.INTER_AREA) if size != len(im) else im
