"Decode image bytes to RGB."
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from aptos_fastai.common.io import AptosError

try:
    import pyvips
    pyvips.cache_set_max(0)                 # libvips would keep the images of past operations in memory
    pyvips.concurrency_set(1)               # the thread pool of the store already uses every core
except (ImportError, OSError): pyvips = None   # missing on Kaggle: Pillow decodes PNG instead

MAX_PIXELS = 64_000_000                     # a fundus image has 5-50 million; decoding needs up to 16 bytes a pixel
Image.MAX_IMAGE_PIXELS = None               # `check_size` does it for every format


HEADER_BYTES = 132                          # of a file: enough to recognise its format
SIGNATURES = {b'\xff\xd8\xff': 'JPEG', b'\x89PNG\r\n\x1a\n': 'PNG', b'II*\0': 'TIFF', b'MM\0*': 'TIFF',
              b'II+\0': 'TIFF', b'MM\0+': 'TIFF', b'BM': 'BMP', b'GIF8': 'GIF', b'\0\0\0\x0cjP  ': 'JPEG 2000',
              b'\xff\x4f\xff\x51': 'JPEG 2000'}
ISO_BRANDS = {b'heic': 'HEIC', b'heix': 'HEIC', b'hevc': 'HEIC', b'mif1': 'HEIC', b'msf1': 'HEIC', b'avif': 'AVIF'}
PILLOW_NAMES = {'JPEG 2000': 'JPEG2000', 'WebP': 'WEBP', 'HEIC': 'HEIF'}     # where Pillow's name is another
DEFLATED = b'1.2.840.10008.1.2.1.99'        # transfer syntax of a DICOM file that is compressed as a whole
DICOM_HEADER = 300_000                      # bytes that surely hold the file meta information
ROWS_AT_ONCE = 256                          # of a DICOM image that are scaled to 8 bits


class PixelBudget:
    "Bound the pixels that all threads decode at once; an image larger than the budget is decoded alone"
    def __init__(self, limit: int):
        self.limit, self.used, self.changed = limit, 0, Condition()

    @contextmanager
    def pixels(self, n: int) -> Iterator[None]:
        "Wait until `n` pixels may be decoded, and keep them reserved while the block runs"
        with self.changed:
            self.changed.wait_for(lambda: not self.used or self.used + n <= self.limit)
            self.used += n
        try: yield
        finally:
            with self.changed:
                self.used -= n
                self.changed.notify_all()


BUDGET = PixelBudget(4 * MAX_PIXELS)         # about 4 GB


class ImageError(AptosError):
    "Raised for an image that cannot be read; the message says why."


def image_format(header: bytes) -> str:
    "Return the image format that the first `HEADER_BYTES` of a file show; an empty string for anything else."
    if header[128:132] == b'DICM': return 'DICOM'
    if header[:4] == b'RIFF' and header[8:12] == b'WEBP': return 'WebP'
    if header[4:8] == b'ftyp': return ISO_BRANDS.get(header[8:12], '')
    return next((name for signature, name in SIGNATURES.items() if header.startswith(signature)), '')


def check_size(width: int, height: int, frames: int = 1, max_pixels: int = MAX_PIXELS) -> None:
    "Raise `ImageError` for an image with too many pixels; called before any of them is decoded."
    pixels = width * height * frames
    if pixels > max_pixels:
        shape = f'{width} x {height}' + (f' x {frames} frames' if frames > 1 else '')
        raise ImageError(f'too large: {shape} = {pixels / 1e6:.0f} megapixels, the limit is {max_pixels / 1e6:.0f}; '
                         'save a smaller copy')


def _is_complete(data: bytes, fmt: str) -> bool:
    "Return False for a truncated file; decoders fill the missing rows with grey and raise nothing."
    if fmt == 'JPEG': return data.rfind(b'\xff\xd9') > data.rfind(b'\xff\xda')
    if fmt == 'PNG': return b'IEND' in data[-4096:]
    return True


def reduction(side: int, min_side: int) -> int:
    "Return the largest of 8, 4, 2, 1 that divides `side` to at least `min_side`; 1 if `min_side` is 0."
    for factor in (8, 4, 2):
        if min_side and side // factor >= min_side: return factor
    return 1


def decode_jpeg(data: bytes, factor: int = 1) -> np.ndarray | None:
    """Decode a JPEG to RGB at 1/`factor` of its size; None if OpenCV cannot.

    The decoder scales the DCT, which costs a fraction of a full decode.
    """
    flag = getattr(cv2, f'IMREAD_REDUCED_COLOR_{factor}') if factor > 1 else cv2.IMREAD_COLOR
    im = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    return None if im is None else cv2.cvtColor(im, cv2.COLOR_BGR2RGB, dst=im)


def _decode_png(data: bytes, factor: int = 1) -> np.ndarray | None:
    """Decode an 8-bit PNG to RGB, each pixel the mean of `factor` x `factor` pixels.

    None for a damaged PNG and for one that needs more steps (16 bit, alpha, EXIF).
    """
    if b'eXIf' in data: return None
    if pyvips is None: return _decode_png_pillow(data, factor)
    try:
        im = pyvips.Image.new_from_buffer(data, '', access='sequential', fail_on='error')
        if im.format != 'uchar' or im.bands not in (1, 3): return None
        if factor > 1: im = im.shrink(factor, factor)
        pixels = im.numpy()
    except pyvips.Error: return None
    if pixels.ndim == 3 and pixels.shape[2] == 3: return pixels
    return np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, 2)


def _decode_png_pillow(data: bytes, factor: int) -> np.ndarray | None:
    "`_decode_png` without libvips: Pillow decodes the whole image, then shrinks it."
    with Image.open(io.BytesIO(data), formats=['PNG']) as im:
        if im.mode not in ('RGB', 'L'): return None
        try: pixels = np.array((im.reduce(factor) if factor > 1 else im).convert('RGB'))
        except (OSError, SyntaxError): return None
    height, width = int(im.height / factor + .5), int(im.width / factor + .5)
    return pixels[:height, :width]           # libvips rounds the size, Pillow rounds it up


FAST_DECODERS: dict[str, Callable[[bytes, int], np.ndarray | None]] = dict(JPEG=decode_jpeg, PNG=_decode_png)


def decode(data: bytes, min_side: int = 0, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode the bytes of an image file.

    Returns uint8 HxWx3 RGB, rotated as its EXIF orientation says, and the (width, height) of the file.
    With `min_side`, a JPEG or a plain PNG is decoded at 1/2, 1/4 or 1/8 of its size if its shorter side stays at least
    `min_side`. Raises `ImageError`, for more than `max_pixels` before anything is decoded.
    """
    fmt = image_format(data[:HEADER_BYTES])
    try:
        if fmt == 'DICOM': return decode_dicom(data, max_pixels)
        if fmt == 'HEIC': _register_heic()
        if not fmt: raise UnidentifiedImageError
        # only this format: for EPS, Pillow would start another program
        with Image.open(io.BytesIO(data), formats=[PILLOW_NAMES.get(fmt, fmt)]) as im:
            check_size(*im.size, max_pixels=max_pixels)
            _check_one_page(im)
            with BUDGET.pixels(im.width * im.height): return _decode_opened(im, data, min_side), im.size
    except ImageError: raise
    except UnidentifiedImageError: raise ImageError('cannot be decoded: unknown image format') from None
    except Exception as e:   # Pillow's plugins raise anything from SyntaxError to struct.error on damaged files
        raise ImageError(f'cannot be decoded ({type(e).__name__}: {e})') from None


def _check_one_page(im: Image.Image) -> None:
    "Raise `ImageError` for an image with further pages; the small ones in a TIFF and those of a phone's JPEG are none"
    pages = getattr(im, 'n_frames', 1)
    if pages == 1 or im.format == 'MPO': return
    if im.format == 'TIFF':
        widths = []
        for page in range(pages):
            im.seek(page)
            widths.append(im.width)
        im.seek(0)
        pages = sum(width > widths[0] / 2 for width in widths)
    if pages > 1: raise ImageError(f'cannot be decoded: {im.format} with {pages} pages; save one image per file')


def _register_heic() -> None:
    "Let Pillow open HEIC, the format of phones. Raises `ImageError` if pillow-heif is not installed."
    try:
        import pillow_heif
    except ImportError:
        raise ImageError('cannot be decoded: HEIC needs pillow-heif (pip install pillow-heif); or convert it to JPEG') \
            from None
    pillow_heif.register_heif_opener()


def _decode_opened(im: Image.Image, data: bytes, min_side: int) -> np.ndarray:
    "Decode an image that Pillow opened from `data`, by the fast decoder of its format if there is one."
    fmt = im.format or ''
    if not _is_complete(data, fmt): raise ImageError('cannot be decoded: the file is truncated')
    if fmt in FAST_DECODERS and im.mode in ('RGB', 'L'):
        pixels = FAST_DECODERS[fmt](data, reduction(min(im.size), min_side))
        if pixels is not None: return pixels
    return _to_rgb(im)


def _to_rgb(im: Image.Image) -> np.ndarray:
    "Decode with Pillow: apply the EXIF orientation, scale 16 bit to 8, put transparent pixels on black."
    im = ImageOps.exif_transpose(im)
    if im.mode.startswith('I'): im = Image.fromarray((np.asarray(im) / 257).clip(0, 255).astype(np.uint8))
    if 'A' in im.getbands() or 'transparency' in im.info:
        im = im.convert('RGBA')
        im = Image.alpha_composite(Image.new('RGBA', im.size, (0, 0, 0, 255)), im)
    return np.array(im.convert('RGB'))


def decode_dicom(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode a DICOM file with one frame, colour or greyscale, of any bit depth; returns what `decode` returns.

    Raises `ImageError`, also if pydicom (the extra `dicom`) is not installed.
    """
    try:
        import pydicom
    except ImportError: raise ImageError('cannot be decoded: DICOM needs pydicom (pip install pydicom)') from None
    if DEFLATED in data[:DICOM_HEADER]:      # pydicom would inflate it before its size is known
        raise ImageError('cannot be decoded: deflated DICOM is not read; export the image uncompressed or as JPEG')
    ds = pydicom.dcmread(io.BytesIO(data))
    frames = int(ds.get('NumberOfFrames') or 1)
    check_size(ds.get('Columns') or 0, ds.get('Rows') or 0, frames, max_pixels)
    if frames != 1: raise ImageError(f'cannot be decoded: DICOM with {frames} frames; save one frame per file')
    if 'PixelData' not in ds: raise ImageError('cannot be decoded: DICOM without pixels')
    _check_transfer_syntax(ds.file_meta.TransferSyntaxUID)
    with BUDGET.pixels(ds.Columns * ds.Rows): pixels = _dicom_pixels(ds)
    height, width = pixels.shape[:2]
    return pixels, (width, height)


def _dicom_pixels(ds: Any) -> np.ndarray:
    "Return the pixels of a DICOM dataset as uint8 RGB; values are scaled by the bits that are stored."
    import pydicom
    pixels = pydicom.pixels.pixel_array(ds)          # converts YBR to RGB
    palette = ds.PhotometricInterpretation == 'PALETTE COLOR'
    if palette: pixels = pydicom.pixels.apply_color_lut(pixels, ds)
    if pixels.dtype != np.uint8 or pixels.ndim == 2:
        bits = 16 if palette else ds.BitsStored
        lowest = -(1 << (ds.BitsStored - 1)) if ds.get('PixelRepresentation') else 0     # signed values start below 0
        pixels = _scaled(pixels, lowest, 255 / ((1 << bits) - 1))
    if ds.PhotometricInterpretation == 'MONOCHROME1': pixels = 255 - pixels             # 0 is white there
    pixels = np.ascontiguousarray(pixels)
    return np.repeat(pixels[..., None], 3, 2) if pixels.ndim == 2 else pixels


def _scaled(pixels: np.ndarray, lowest: int, scale: float) -> np.ndarray:
    "Return (`pixels` - `lowest`) * `scale` as uint8, a few rows at a time to save memory."
    out = np.empty(pixels.shape, np.uint8)
    for start in range(0, len(pixels), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        out[rows] = ((pixels[rows].astype(np.float32) - lowest) * scale).clip(0, 255).round()
    return out


def _check_transfer_syntax(uid: Any) -> None:
    "Raise `ImageError` for a compression of DICOM pixels that is unknown or that no installed package decodes."
    from pydicom.pixels import get_decoder
    try: decoder = get_decoder(uid)
    except NotImplementedError:
        raise ImageError(f'cannot be decoded: DICOM transfer syntax {uid.name} is not supported; export the image '
                         'uncompressed or as JPEG') from None
    if decoder.is_available: return
    packages = ' or '.join(sorted({o.partition(' - ')[0] for o in decoder.missing_dependencies}))
    raise ImageError(f'cannot be decoded: DICOM transfer syntax {uid.name} needs {packages} (pip install pylibjpeg '
                     'pylibjpeg-libjpeg pylibjpeg-openjpeg)')
