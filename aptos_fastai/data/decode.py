"Decode image bytes to RGB."
import io
import warnings

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from aptos_fastai.common.io import AptosError

Image.MAX_IMAGE_PIXELS = 400_000_000        # a fundus image has 5-50 million; more is a bomb
try:
    import pyvips
    pyvips.cache_set_max(0)                 # its cache of past operations would keep past images in memory
    pyvips.concurrency_set(1)               # the pool has the cores
except (ImportError, OSError): pyvips = None   # Kaggle's machines lack it: `kaggle.answer` says so


class ImageError(AptosError):
    "An image that cannot be read: names the file and why."


def _complete(data: bytes, fmt: str) -> bool:
    "False where the file ends before its image does: decoders fill the rest with grey and say nothing"
    if fmt == 'JPEG': return data.rfind(b'\xff\xd9') > data.rfind(b'\xff\xda')
    if fmt == 'PNG': return b'IEND' in data[-4096:]
    return True


def reduction(side: int, least: int) -> int:
    "How many times smaller, of 8, 4, 2 and 1, `side` may become without falling under `least`; 1 where `least` is 0"
    return next((k for k in (8, 4, 2) if least and side // k >= least), 1)


def decode_jpeg(data: bytes, k: int = 1) -> np.ndarray | None:
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
    "`_decode_png` by Pillow, which decodes the whole first; what is no 8-bit image without EXIF goes the way of every other file"
    with Image.open(io.BytesIO(data)) as im:
        if im.mode not in ('RGB', 'L'): return None
        try: out = np.array((im.reduce(k) if k > 1 else im).convert('RGB'))
        except (OSError, SyntaxError): return None
    return out[:int(im.height / k + .5), :int(im.width / k + .5)]      # libvips rounds, Pillow adds what is left over


FAST = dict(JPEG=decode_jpeg, PNG=_decode_png)


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
                out = FAST[fmt](data, reduction(min(size), min_side)) if fmt in FAST and mode in ('RGB', 'L') else None
                if out is not None: return out, size
                im = ImageOps.exif_transpose(im)
                if im.mode.startswith('I'): im = Image.fromarray((np.asarray(im) / 257).clip(0, 255).astype(np.uint8))
                if 'A' in im.getbands() or 'transparency' in im.info:
                    im = im.convert('RGBA')
                    im = Image.alpha_composite(Image.new('RGBA', im.size, (0, 0, 0, 255)), im)      # what is see-through is black
                return np.array(im.convert('RGB')), size
    except ImageError: raise
    except UnidentifiedImageError: raise ImageError('cannot be decoded: it is no image of a known kind') from None
    except Exception as e:   # Pillow's plugins raise anything from SyntaxError to struct.error on damaged files
        raise ImageError(f'cannot be decoded ({type(e).__name__}: {e})') from None


def decode_dicom(data: bytes) -> tuple[np.ndarray, tuple[int, int]]:
    "`decode` of a DICOM file with one frame, in colour or grey of any depth. Raises `ImageError`, also where the `dicom` extra is not installed"
    try:
        import pydicom
    except ImportError: raise ImageError('is DICOM, which needs the extra dicom: pip install pydicom') from None
    ds = pydicom.dcmread(io.BytesIO(data))
    if int(ds.get('NumberOfFrames', 1)) != 1: raise ImageError(f'is DICOM of {ds.NumberOfFrames} frames; an image has one')
    a = pydicom.pixels.pixel_array(ds)       # RGB where it was YBR
    if ds.PhotometricInterpretation == 'PALETTE COLOR': a = pydicom.pixels.apply_color_lut(a, ds)
    if a.dtype != np.uint8 or a.ndim == 2:   # by the depth the file states, signed or not
        low = -(1 << ds.BitsStored - 1) if ds.get('PixelRepresentation') else 0
        a = ((a.astype(np.float32) - low) * (255 / ((1 << (16 if ds.PhotometricInterpretation == 'PALETTE COLOR' else ds.BitsStored)) - 1))).clip(0, 255)
    if ds.PhotometricInterpretation == 'MONOCHROME1': a = 255 - a
    a = np.ascontiguousarray(a.round().astype(np.uint8))
    return (a if a.ndim == 3 else np.repeat(a[..., None], 3, 2)), (a.shape[1], a.shape[0])
