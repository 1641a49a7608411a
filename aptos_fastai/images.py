"Bytes -> retina crop -> uint8 square, and the store of prepared pictures."
import base64
import hashlib
import io
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from PIL import Image, ImageOps, UnidentifiedImageError

from aptos_fastai.config import Recipe
from aptos_fastai.console import say
from aptos_fastai.files import AptosError, sweep, write_bytes, write_csv
from aptos_fastai.ranks import collect, cores, everyone, mine, size

Image.MAX_IMAGE_PIXELS = 400_000_000        # a fundus photograph has 5-50 million; more is a bomb
try:
    import pyvips
    pyvips.cache_set_max(0)                 # its cache of past operations would keep past pictures in memory
    pyvips.concurrency_set(1)               # the pool has the cores
except (ImportError, OSError): pyvips = None   # Kaggle's machines lack it: `kaggle.answer` says so


class ImageError(AptosError):
    "A picture that cannot be read: names the file and why."


@dataclass(frozen=True)
class Prep:
    "How a picture becomes a square; its `name` names the store, so that several recipes share one"
    crop: str = 'retina'                     # retina | none
    aspect: str = 'pad'                      # pad | squash
    size: int = 512                          # side, pixels
    quality: int = 95                        # JPEG
    colour: str = 'none'                     # none | graham
    cut_off: str = 'mirror'                  # mirror | black

    @property
    def name(self) -> str:
        more = [self.cut_off] * (self.crop == 'retina' and self.aspect == 'pad') + [self.colour] * (self.colour != 'none')
        return '-'.join([self.crop, self.aspect, *more, str(self.size), f'q{self.quality}'])
    @property
    def suffix(self) -> str: return f'.{self.name}.jpg'


@dataclass(frozen=True)
class Circle:
    "The retina found, pixels of the picture; `how` is circle, box (its bounding box) or whole (nothing found)"
    x: float
    y: float
    r: float
    how: str = 'circle'


def get_prep(recipe: Recipe) -> Prep:
    "How a recipe prepares its pictures"
    i = recipe.images
    return Prep(i.crop, i.aspect, recipe.store_size, i.quality, i.colour, i.cut_off)


def _complete(data: bytes, fmt: str) -> bool:
    "False where the file ends before its picture does: decoders fill the rest with grey and say nothing"
    if fmt == 'JPEG': return data.rfind(b'\xff\xd9') > data.rfind(b'\xff\xda')
    if fmt == 'PNG': return b'IEND' in data[-4096:]
    return True


def _shrink(side: int, least: int) -> int:
    "How many times smaller, of 8, 4, 2 and 1, `side` may become without falling under `least`; 1 where `least` is 0"
    return next((k for k in (8, 4, 2) if least and side // k >= least), 1)


def _decode_jpeg(data: bytes, k: int = 1) -> np.ndarray | None:
    "RGB at 1/k of the size, at a fraction of the cost: the DCT is scaled. None where OpenCV cannot"
    out = cv2.imdecode(np.frombuffer(data, np.uint8), getattr(cv2, f'IMREAD_REDUCED_COLOR_{k}') if k > 1 else cv2.IMREAD_COLOR)
    return None if out is None else cv2.cvtColor(out, cv2.COLOR_BGR2RGB, dst=out)


def _decode_png(data: bytes, k: int = 1) -> np.ndarray | None:
    "RGB in means of k x k pixels, row by row. None for what needs more than that (16 bit, alpha, EXIF) or is damaged"
    if b'eXIf' in data: return None
    if pyvips is None: return _reduced(data, k)
    try:
        im = pyvips.Image.new_from_buffer(data, '', access='sequential', fail_on='error')
        if im.format != 'uchar' or im.bands not in (1, 3): return None
        out = (im.shrink(k, k) if k > 1 else im).numpy()
    except pyvips.Error: return None
    return out if out.ndim == 3 and out.shape[2] == 3 else np.repeat(out.reshape(*out.shape[:2], 1), 3, 2)


def _reduced(data: bytes, k: int) -> np.ndarray | None:
    "`_decode_png` by Pillow, which decodes the whole first; what is no 8-bit picture without EXIF goes the way of every other file"
    with Image.open(io.BytesIO(data)) as im:
        if im.mode not in ('RGB', 'L'): return None
        try: out = np.array((im.reduce(k) if k > 1 else im).convert('RGB'))
        except (OSError, SyntaxError): return None
    return out[:int(im.height / k + .5), :int(im.width / k + .5)]      # libvips rounds, Pillow adds what is left over


FAST = dict(JPEG=_decode_jpeg, PNG=_decode_png)


def decode(data: bytes, min_side: int = 0) -> tuple[np.ndarray, tuple[int, int]]:
    """uint8 HxWx3 RGB, turned as its EXIF says, and the (width, height) of the file. A JPEG or a plain PNG is decoded at 1/2, 1/4 or 1/8
    as long as its shorter side stays `min_side`. Raises `ImageError`."""
    try:
        if data[128:132] == b'DICM': return decode_dicom(data)
        with warnings.catch_warnings():
            warnings.simplefilter('error', Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as file:
                im: Image.Image = file
                size, fmt, mode = im.size, im.format or '', im.mode
                if not _complete(data, fmt): raise ImageError('is cut short')
                out = FAST[fmt](data, _shrink(min(size), min_side)) if fmt in FAST and mode in ('RGB', 'L') else None
                if out is not None: return out, size
                im = ImageOps.exif_transpose(im)
                if im.mode.startswith('I'): im = Image.fromarray((np.asarray(im) / 257).clip(0, 255).astype(np.uint8))
                if 'A' in im.getbands() or 'transparency' in im.info:
                    im = im.convert('RGBA')
                    im = Image.alpha_composite(Image.new('RGBA', im.size, (0, 0, 0, 255)), im)      # what is see-through is black
                return np.array(im.convert('RGB')), size
    except ImageError: raise
    except UnidentifiedImageError: raise ImageError('cannot be decoded: it is no picture of a known kind') from None
    except Exception as e:   # Pillow's plugins raise anything from SyntaxError to struct.error on damaged files
        raise ImageError(f'cannot be decoded ({type(e).__name__}: {e})') from None


def decode_dicom(data: bytes) -> tuple[np.ndarray, tuple[int, int]]:
    "`decode` of a DICOM file with one frame, in colour or grey of any depth. Raises `ImageError`, also where the `dicom` extra is not installed"
    try:
        import pydicom
    except ImportError: raise ImageError('is DICOM, which needs the extra dicom: pip install pydicom') from None
    ds = pydicom.dcmread(io.BytesIO(data))
    if int(ds.get('NumberOfFrames', 1)) != 1: raise ImageError(f'is DICOM of {ds.NumberOfFrames} frames; a photograph has one')
    a = pydicom.pixels.pixel_array(ds)       # RGB where it was YBR
    if ds.PhotometricInterpretation == 'PALETTE COLOR': a = pydicom.pixels.apply_color_lut(a, ds)
    if a.dtype != np.uint8 or a.ndim == 2:   # by the depth the file states, signed or not
        low = -(1 << ds.BitsStored - 1) if ds.get('PixelRepresentation') else 0
        a = ((a.astype(np.float32) - low) * (255 / ((1 << (16 if ds.PhotometricInterpretation == 'PALETTE COLOR' else ds.BitsStored)) - 1))).clip(0, 255)
    if ds.PhotometricInterpretation == 'MONOCHROME1': a = 255 - a
    a = np.ascontiguousarray(a.round().astype(np.uint8))
    return (a if a.ndim == 3 else np.repeat(a[..., None], 3, 2)), (a.shape[1], a.shape[0])


def _brightest(im: np.ndarray) -> np.ndarray:
    "The brightest of the channels, HxW"
    r, g, b = cv2.split(im)
    return cv2.max(cv2.max(r, g), b)


def _edge_points(mask: np.ndarray) -> np.ndarray:
    "(n, 2) x, y of the outermost mask pixels of each row and column, but for those at the picture's border"
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
    "The circle of the retina in a uint8 HxWx3 picture, found at about `side` pixels; the bounding box or the whole picture failing that"
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
    # the circle may stick out of a picture that cuts it off, but not be much larger than what is seen
    fine = share > .5 and agree > .85 and .45 * max(bw, bh) <= r <= .8 * max(bw, bh)
    return Circle((x + .5) / k, (y + .5) / k, (r + .5) / k) if fine else box


def crop_box(h: int, w: int, c: Circle, prep: Prep) -> tuple[int, int, int, int]:
    "What the prepared square of a picture of h x w covers: x0, x1, y0, y1 in its pixels, beyond its edges where it is padded"
    x0, x1, y0, y1 = (int(round(o)) for o in (c.x - c.r, c.x + c.r, c.y - c.r, c.y + c.r))
    if prep.crop == 'none': x0, x1, y0, y1 = 0, w, 0, h
    if prep.aspect == 'squash': return max(x0, 0), min(x1, w), max(y0, 0), min(y1, h)
    if prep.crop == 'none':
        x0, y0 = -((max(h, w) - w) // 2), -((max(h, w) - h) // 2)
        return x0, x0 + max(h, w), y0, y0 + max(h, w)
    return x0, x1, y0, y1


def crop_square(im: np.ndarray, c: Circle, prep: Prep) -> np.ndarray:
    """The square of side `prep.size` around the circle `c`, black outside a found one.

    Where the picture cuts the circle off, its content is mirrored (`cut_off` = mirror), so that every retina is a whole disc: the shape of what is
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


def graham(sq: np.ndarray) -> np.ndarray:
    "Four times the difference from the local mean (a Gaussian of a thirtieth of the radius), about mid grey; black beyond .9 of the radius (Graham 2015)"
    n = len(sq)
    out = cv2.addWeighted(sq, 4, cv2.GaussianBlur(sq, (0, 0), n / 60), -4, 128)
    return cv2.bitwise_and(out, out, mask=_disc(n, .9))


def quality_flags(sq: np.ndarray, seen: float) -> str:
    """Words for what a person would look at again, of a prepared square and the share of the circle that the picture shows: dark, bright, blurred, cut-off.

    The limits lie outside what the 516 IDRiD photographs show: brightest channel 80-224 on average, edges 1.5-7 % of the green level
    (.9 % once blurred by 1 % of the side).
    """
    sq = cv2.resize(sq, (256, 256), interpolation=cv2.INTER_AREA)
    brightest, green = _brightest(sq), cv2.extractChannel(sq, 1)
    inside = (_disc(256, .85) > 0) & (brightest > 12)
    if not inside.any(): return 'dark'
    edges = cv2.Laplacian(cv2.GaussianBlur(green.astype(np.float32), (0, 0), 1), cv2.CV_32F)[inside].std() / max(green[inside].mean(), 1)
    found = dict(dark=brightest[inside].mean() < 60, bright=(green[inside] >= 245).mean() > .05, blurred=edges < .013)
    return ' '.join([k for k, v in found.items() if v] + (['cut-off'] if seen < .85 else []))


def look_hash(sq: np.ndarray) -> str:
    """576 bits (base64) of how a prepared square looks: signs of the low frequencies of its locally levelled green channel (after pHash, Zauner 2010).

    Equal pictures stored anew at another size or quality differ in up to 84 bits, different ones in 120 and more (measured on the 516 of IDRiD).
    """
    g = cv2.resize(sq[..., 1], (64, 64), interpolation=cv2.INTER_AREA).astype(np.float32)
    d = cv2.dct(g - cv2.GaussianBlur(g, (0, 0), 6))[1:25, 1:25]
    return base64.b64encode(np.packbits(d > np.median(d)).tobytes()).decode()


def _seen(c: Circle, h: int, w: int) -> float:
    "Share of the circle's area that lies within the picture, on a grid of 64 x 64"
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
                look=look_hash(sq), pixels=hashlib.sha256(np.ascontiguousarray(im).data).hexdigest()[:24])
    if prep.colour == 'graham': sq = graham(sq)
    opts = [cv2.IMWRITE_JPEG_QUALITY, prep.quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return cv2.imencode('.jpg', cv2.cvtColor(sq, cv2.COLOR_RGB2BGR), opts)[1].tobytes(), info


def read_square(path: str | Path, prep: Prep, size: int) -> np.ndarray:
    "uint8 `size` x `size` x 3 RGB of a picture of the store, or of an original prepared on the way: the same pixels"
    path = Path(path)
    try: data = path.read_bytes()
    except OSError as e: raise ImageError(f'{path}: cannot be read ({e.strerror})') from None
    if not path.name.endswith(prep.suffix):
        try: data = prepare(data, prep)[0]
        except ImageError as e: raise ImageError(f'{path}: {e}') from None
    elif _hash(data) != path.name.removesuffix(prep.suffix).rpartition('.')[2]:
        raise ImageError(f'{path}: is not what was stored (its hash differs); delete it and run again, it will be made anew')
    return square_of(data, prep, size)


def square_of(data: bytes, prep: Prep, size: int) -> np.ndarray:
    "uint8 `size` x `size` x 3 RGB of a prepared JPEG"
    im = _decode_jpeg(data, _shrink(prep.size, size))
    if im is None: raise ImageError('cannot be decoded')
    return cv2.resize(im, (size, size), interpolation=cv2.INTER_AREA) if size != len(im) else im


# The store: <store>/<prep.name>/<table>-<hash of the folder>/<id>.<hash of the file><suffix> and prepared.csv

BATCH = 32                                   # pictures a core between two looks at progress
KEEP_EVERY = 1000                            # pictures: how often prepared.csv is written on the way

def _hash(data: bytes) -> str:
    "Of a stored file, in its name: who reads it sees whether it is what was written"
    return hashlib.sha256(data).hexdigest()[:16]


def _place(folder: Path, id_code: str, stored: str, prep: Prep) -> Path:
    return folder / f'{id_code.replace("/", "_").replace(os.sep, "_")}.{stored}{prep.suffix}'


def _stored(row, folder: Path, prep: Prep, old: dict) -> dict:
    "The record of one picture, prepared now unless `old` has it and the original is as it was then"
    src = Path(row.path)
    try:
        st = src.stat()
        same = dict(bytes=st.st_size, mtime=st.st_mtime_ns)
        was = old.get(row.id_code)
        if was and not was['error'] and _place(folder, row.id_code, was['stored'], prep).exists() and all(was[k] == v for k, v in same.items()): return was
        jpeg, info = prepare(src.read_bytes(), prep)
        write_bytes(out := _place(folder, row.id_code, _hash(jpeg), prep), jpeg)
        if was and was['stored'] and (gone := _place(folder, row.id_code, was['stored'], prep)) != out: gone.unlink(missing_ok=True)
        return dict(id_code=row.id_code, **same, **info, stored=_hash(jpeg), error='')
    except ImageError as e: why = str(e)
    except OSError as e: why, same = f'cannot be read ({e.strerror})', dict(bytes=0, mtime=0)
    return dict(id_code=row.id_code, **same, width=0, height=0, x=0, y=0, r=0, how='', flags='', look='', pixels='', stored='', error=why)


def store_folder(frame: pd.DataFrame, store: Path, prep: Prep) -> Path:
    "Where the prepared pictures of `frame` are; tables of one name from two data folders keep apart, and data beside the store may move with it"
    where, beside = Path(frame.path.iloc[0]).resolve().parent, Path(store).resolve().parent
    if where.is_relative_to(beside): where = where.relative_to(beside)
    return Path(store) / prep.name / f'{frame.source.iloc[0]}-{hashlib.sha256(where.as_posix().encode()).hexdigest()[:8]}'


def read_prepared(folder: Path) -> pd.DataFrame | None:
    "The record of a prepared table, a row a picture; None where there is none of this version. Raises `ImageError`"
    file = folder / 'prepared.csv'
    if not file.is_file(): return None
    try: df = pd.read_csv(file, dtype=dict(id_code=str, stored=str), keep_default_na=False)
    except (ValueError, OSError) as e:
        raise ImageError(f'{file}: is damaged ({str(e).splitlines()[0]}); delete it and run again, it will be made anew') from None
    return df if {'stored', 'look', 'error', 'bytes', 'mtime'} <= set(df) else None        # of an earlier version


def _prepare_part(_, frame: pd.DataFrame, folder: Path, prep: Prep, old: dict) -> list[dict]:
    "The records of the rows of `frame`, by all cores of all processes"
    cv2.setNumThreads(1)                     # the pool has the cores
    with ThreadPoolExecutor(cores()) as pool:
        try: return collect(list(pool.map(partial(_stored, folder=folder, prep=prep, old=old), frame.iloc[mine(len(frame))].itertuples())))
        finally: pool.shutdown(cancel_futures=True)


def prepare_table(frame: pd.DataFrame, store: Path, prep: Prep, bars, *, skip_bad: bool = False) -> pd.DataFrame:
    """`frame` with its pictures prepared: columns `stored` (path), `pixels` and `look` (hashes).

    Raises `ImageError` with the list of those that cannot be read; with `skip_bad` they are said and their rows left out.
    """
    folder = store_folder(frame, store, prep)
    sweep(folder)                            # other runs may be writing here: only what is an hour old
    old = read_prepared(folder)
    known = {o['id_code']: o for o in old.to_dict('records')} if old is not None else {}
    done: list[dict] = []

    def keep():
        "What is done, and of the others what was known: an interrupted run goes on from here"
        rows = done + [known[i] for i in frame.id_code[len(done):] if i in known]
        if rows and (old is None or rows != old.to_dict('records')): write_csv(folder / 'prepared.csv', pd.DataFrame(rows))
    each = BATCH * cores() * size()
    with bars(f'preparing {frame.source.iloc[0]}', len(frame), 'pictures') as bar:
        try:
            for i in range(0, len(frame), each):
                part = frame.iloc[i:i + each]
                done += everyone(_prepare_part, bars, part, folder, prep, {o: known[o] for o in part.id_code if o in known})
                bar.to(len(done))
                if len(done) // KEEP_EVERY > i // KEEP_EVERY: keep()
        finally: keep()
    new = pd.DataFrame(done)
    bad = new[new.error != '']
    if len(bad):
        first = '; '.join(f'{o.id_code} {o.error}' for o in bad.head(5).itertuples())
        line = f'{len(bad)} of {len(new)} pictures of {frame.source.iloc[0]} cannot be used: {first}; all are in {folder / "prepared.csv"}'
        if not skip_bad or len(bad) == len(new): raise ImageError(f'{line}; [images] skip_bad = yes goes on without them')
        say(f'skipped (skip_bad = yes): {line}', 'yellow')
    return _with_stored(frame, folder, prep, new)


def prepared_already(frame: pd.DataFrame, store: Path, prep: Prep, *, skip_bad: bool = False) -> pd.DataFrame:
    "What `prepare_table` gives, by its record alone; `frame` itself where that is missing, of other pictures or holds bad ones"
    folder = store_folder(frame, store, prep)
    old = read_prepared(folder)
    if old is None or old.id_code.tolist() != frame.id_code.tolist(): return frame
    return frame if (old.error != '').any() and not skip_bad else _with_stored(frame, folder, prep, old)


def _with_stored(frame: pd.DataFrame, folder: Path, prep: Prep, record: pd.DataFrame) -> pd.DataFrame:
    "`frame` with the columns `stored`, `pixels` and `look` of its store's record, without the rows that could not be read"
    fine = (record.error == '').to_numpy()
    stored = [str(_place(folder, i, h, prep)) for i, h in zip(frame.id_code, record.stored, strict=True)]
    return frame.assign(stored=stored, pixels=record.pixels.to_numpy(), look=record.look.to_numpy())[fine].reset_index(drop=True)


