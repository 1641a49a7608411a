"Decode image bytes to RGB."
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition
from typing import Any, cast

import cv2
import numpy as np
from PIL import Image, ImageChops, ImageOps, TiffImagePlugin, UnidentifiedImageError

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
ROWS_AT_ONCE = 256                          # of an image that are scaled to 8 bits
STRIP_ROWS = 64                             # that libvips decodes at once: they stay in the cache; a multiple of 8
DEPTHS = 8, 10, 12, 14, 16                  # bits of a channel that cameras write
DARKEST_WHITE = 16                          # floats with a maximum between 1 and this are not on the scale 0-255
TRUNCATED = 'cannot be decoded: the file is truncated'
ONE_BIT = 'cannot be decoded: a one-bit image has no shades of grey; save it with 8 bits a channel'
ORIENTATION, BITS, PHOTOMETRIC, ALPHA, SAMPLE_FORMAT = 0x112, 258, 262, 338, 339     # tags of TIFF and EXIF


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


MARKER = re.compile(rb'\xff[^\0\xff]')       # of a JPEG, between its segments
MARKER_IN_SCAN = re.compile(rb'\xff[^\0\xff\xd0-\xd7]')                   # in a scan, FF 00 and FF D0-D7 are data


def _is_complete_jpeg(data: bytes) -> bool:
    "Return whether a JPEG's segments end with EOI; thumbnails lie inside segments, and what follows EOI is no part."
    scans, marker = 0, MARKER.search(data, 2)
    while marker:
        code, start = data[marker.end() - 1], marker.end()
        if code == 0xd9: return scans > 0
        is_scan, has_length = code == 0xda, code != 1 and not 0xd0 <= code <= 0xd8
        scans += is_scan
        if has_length: start += int.from_bytes(data[start:start + 2], 'big')
        marker = (MARKER_IN_SCAN if is_scan else MARKER).search(data, start)
    return False


def _png_chunks(data: bytes) -> list[bytes]:
    "Return the types of a PNG's chunks up to IEND, the last one if the file is complete."
    types: list[bytes] = []
    start = 8
    while start + 12 <= len(data) and b'IEND' not in types[-1:]:
        end = start + 12 + int.from_bytes(data[start:start + 4], 'big')
        if end <= len(data): types.append(data[start + 4:start + 8])
        start = end
    return types


def _is_complete(data: bytes, fmt: str) -> bool:
    "Return False for a truncated file; decoders of JPEG and PNG fill the missing rows with grey and raise nothing."
    if fmt == 'JPEG': return _is_complete_jpeg(data)
    if fmt == 'PNG': return _png_chunks(data)[-1:] == [b'IEND']
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


def box_mean(im: np.ndarray, factor: int) -> np.ndarray:
    "Return the means of `factor` x `factor` pixels; rows and columns at the end that fill no box are left out."
    if factor == 1: return im
    h, w = (side // factor for side in im.shape[:2])
    return cv2.resize(im[:h * factor, :w * factor], (w, h), interpolation=cv2.INTER_AREA)


def _decode_strips(data: bytes, factor: int) -> np.ndarray | None:
    """Decode a JPEG or PNG to RGB by libvips, reduced by `box_mean`; None if damaged, not of 8 bits or with alpha.

    Raises `ImageError` for a JPEG whose data end early though its segments are complete.
    """
    if pyvips is None: return None
    try:
        fail_on = 'warning' if image_format(data[:HEADER_BYTES]) == 'JPEG' else 'error'     # PNG: warns of ICC profiles
        im = pyvips.Image.new_from_buffer(data, '', access='sequential', fail_on=fail_on)
        if im.format != 'uchar' or im.bands not in (1, 3): return None
        region, strips = pyvips.Region.new(im), []
        for y in range(0, im.height, STRIP_ROWS):
            rows = min(STRIP_ROWS, im.height - y)
            strip = np.frombuffer(region.fetch(0, y, im.width, rows), np.uint8).reshape(rows, im.width, im.bands)
            if rows >= factor: strips.append(box_mean(strip, factor))
    except pyvips.Error as e:
        if 'premature end' in str(e): raise ImageError(TRUNCATED) from None
        return None
    pixels = np.concatenate(strips)
    return pixels if im.bands == 3 else np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, 2)


def _decode_full_jpeg(im: Image.Image, data: bytes, factor: int) -> np.ndarray | None:
    """Decode a JPEG to RGB, rotated and reduced by `box_mean`; None if OpenCV cannot.

    Scaling the DCT would take a fifth of the time, but its pixels are not those of the same image in another format:
    a difference of one grey level in 4 % of them moves a score by up to 0.05.
    """
    pixels = None if _is_rotated(im) else _decode_strips(data, factor)
    if pixels is not None: return pixels
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    return None if bgr is None else cv2.cvtColor(box_mean(bgr, factor), cv2.COLOR_BGR2RGB)


def _is_rotated(im: Image.Image) -> bool:
    "Return whether an image has an EXIF orientation, or EXIF that Pillow cannot read."
    try: return im.getexif().get(ORIENTATION, 1) != 1
    except Exception: return True             # Pillow raises anything from SyntaxError to struct.error


def _decode_png(im: Image.Image, data: bytes, factor: int) -> np.ndarray | None:
    "Decode a PNG to RGB, reduced by `box_mean`; None for one that needs Pillow (damaged, 16 bit, alpha, EXIF)."
    return None if b'eXIf' in _png_chunks(data) else _decode_strips(data, factor)


FAST_DECODERS: dict[str, Callable[[Image.Image, bytes, int], np.ndarray | None]] = dict(
    JPEG=_decode_full_jpeg, PNG=_decode_png)


def decode(data: bytes, min_side: int = 0, max_pixels: int = MAX_PIXELS, *,
           fast_jpeg: bool = False) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode the bytes of an image file.

    Returns uint8 HxWx3 RGB, rotated as its EXIF orientation says, and the (width, height) of the file.
    With `min_side`, the image is reduced to 1/2, 1/4 or 1/8 of its size if its shorter side stays at least `min_side`;
    its pixels are the same in every lossless format, and in a JPEG those of the JPEG decoded in full; with `fast_jpeg`
    they only resemble these. Raises `ImageError`, for more than `max_pixels` before anything is decoded.
    """
    fmt = image_format(data[:HEADER_BYTES])
    try:
        if fmt == 'DICOM':
            pixels, size = decode_dicom(data, max_pixels)
            return box_mean(pixels, reduction(min(size), min_side)), size
        if fmt == 'HEIC': _register_heic()
        if not fmt: raise UnidentifiedImageError
        # only this format: for EPS, Pillow would start another program
        try: opened = Image.open(io.BytesIO(data), formats=[PILLOW_NAMES.get(fmt, fmt)])
        except UnidentifiedImageError:
            if fmt == 'TIFF': return _decode_odd_tiff(data, min_side, max_pixels)
            raise
        with opened as im:
            check_size(im.width, im.height, max_pixels=max_pixels)
            _check_one_page(im)
            with BUDGET.pixels(im.width * im.height):
                return _decode_opened(im, data, fmt, reduction(min(im.size), min_side), fast_jpeg), im.size
    except ImageError: raise
    except UnidentifiedImageError:
        raise ImageError(f'cannot be decoded: {"unknown image format" if data else "empty file"}') from None
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


def _decode_opened(im: Image.Image, data: bytes, fmt: str, factor: int, fast_jpeg: bool) -> np.ndarray:
    "Decode an image that Pillow opened from `data`, by the fast decoder of its format if there is one."
    if not _is_complete(data, fmt): raise ImageError(TRUNCATED)
    if fmt in FAST_DECODERS and im.mode in ('RGB', 'L'):
        is_scaled = fast_jpeg and fmt == 'JPEG'
        pixels = decode_jpeg(data, factor) if is_scaled else FAST_DECODERS[fmt](im, data, factor)
        if pixels is not None: return pixels
    return box_mean(_to_rgb(_scale_deep(im, data, fmt)), factor)


def _to_rgb(im: Image.Image) -> np.ndarray:
    "Decode an 8-bit image with Pillow: apply the EXIF orientation, put transparent pixels on black."
    has_palette = im.mode == 'P' or im.format == 'GIF'            # a grey palette of a GIF gives L
    if im.mode == '1' or has_palette and len(im.getcolors(2) or ()) == 2: raise ImageError(ONE_BIT)
    is_plain_cmyk = im.mode == 'CMYK' and im.format == 'JPEG' and 'adobe' not in im.info
    im = ImageOps.exif_transpose(im)
    if is_plain_cmyk: im = ImageChops.invert(im)     # only Adobe inverts it; Pillow expects that of every JPEG
    if 'A' in im.getbands() or 'transparency' in im.info:
        im = im.convert('RGBA')
        im = Image.alpha_composite(Image.new('RGBA', im.size, (0, 0, 0, 255)), im)
    return np.array(im.convert('RGB'))


# More than 8 bits a channel

def _scale_deep(im: Image.Image, data: bytes, fmt: str) -> Image.Image:
    "Return an image with its values scaled to 8 bits: `im` itself if it has 8. Pillow cuts colours of 16 bits to 8."
    if fmt == 'TIFF': return _scale_deep_tiff(im, data, cast(Any, im).tag_v2)
    if fmt == 'JPEG 2000':
        bits = (data[data.find(b'\xff\x51') + 40] & 127) + 1               # of the first channel, in the marker SIZ
        return _to_pillow(_raw_pixels(data), bits) if bits > 8 else im
    if fmt != 'PNG' or data[24] != 16: return im
    scaled = _to_pillow(np.asarray(im) if im.mode.startswith('I') else _raw_pixels(data))
    if b'eXIf' in _png_chunks(data): scaled.getexif()[ORIENTATION] = im.getexif().get(ORIENTATION, 1)
    return scaled


def _is_deep_tiff(tags: Any) -> bool:
    "Return whether the tags of a TIFF say that values have more than 8 bits, are signed or float."
    return max(tags.get(BITS, (1,))) > 8 or not {1, 4}.issuperset(tags.get(SAMPLE_FORMAT, (1,)))


def _scale_deep_tiff(im: Image.Image | None, data: bytes, tags: Any) -> Image.Image:
    "`_scale_deep` for a TIFF; `im` is None if Pillow cannot open it."
    if im and not _is_deep_tiff(tags): return im
    bits, photometric = tags.get(BITS, (1,)), tags.get(PHOTOMETRIC)
    if im and im.mode[0] in 'IF': scaled = _to_pillow(np.asarray(im), bits[0])
    else:
        is_planar = len(bits) > 1 and tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2
        if is_planar or photometric not in (0, 1, 2) or not {8, 16, 32, 64}.issuperset(bits):
            raise ImageError(f'cannot be decoded: TIFF with {bits[0]} bits a channel in a rare layout; '
                             'save it with 8 bits a channel')
        has_alpha = tags.get(ALPHA) == (2,)
        scaled = _to_pillow(_raw_pixels(data), channels=4 if has_alpha else 3)
    return ImageChops.invert(scaled) if photometric == 0 else scaled            # 0 is white there


def _decode_odd_tiff(data: bytes, min_side: int, max_pixels: int) -> tuple[np.ndarray, tuple[int, int]]:
    "`decode` for a TIFF that Pillow cannot open: float or signed colour, for instance."
    tags = TiffImagePlugin.ImageFileDirectory_v2(data[:16 if 43 in data[2:4] else 8])
    f = io.BytesIO(data)
    f.seek(tags.next)
    tags.load(f)
    width, height = (int(tags.get(tag, 0)) for tag in (TiffImagePlugin.IMAGEWIDTH, TiffImagePlugin.IMAGELENGTH))
    if not width or not height or not _is_deep_tiff(tags): raise UnidentifiedImageError
    weight = max(max(tags[BITS]) // 16, 1)   # OpenCV needs more memory for values of 32 and 64 bits
    check_size(width, height, max_pixels=max_pixels // weight)
    if tags.next: raise ImageError('cannot be decoded: TIFF with several pages; save one image per file')
    with BUDGET.pixels(width * height * weight): pixels = _to_rgb(_scale_deep_tiff(None, data, tags))
    return box_mean(pixels, reduction(min(width, height), min_side)), (width, height)


def _raw_pixels(data: bytes) -> np.ndarray:
    "Return the values of a file as OpenCV decodes them: HxW, BGR or BGRA of any type."
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None: raise ImageError('cannot be decoded: damaged, or its values are of a rare type; '
                                        'save it with 8 bits a channel')
    return pixels


def _to_pillow(pixels: np.ndarray, stored: int = 16, channels: int = 4) -> Image.Image:
    "Scale what `_raw_pixels` returns to an 8-bit image of at most `channels`; `stored` as for `_white_value`."
    if pixels.ndim == 2: return Image.fromarray(_to_8_bits(pixels, stored))
    scaled = _to_8_bits(pixels[..., :3], stored)[..., ::-1]
    if pixels.shape[2] == 4 and channels == 4: scaled = np.dstack([scaled, _to_8_bits(pixels[..., 3], stored)])
    return Image.fromarray(np.ascontiguousarray(scaled))


def _to_8_bits(pixels: np.ndarray, stored: int) -> np.ndarray:
    return pixels if pixels.dtype == np.uint8 and stored >= 8 else _scaled(pixels, 255 / _white_value(pixels, stored))


def _white_value(pixels: np.ndarray, stored: int) -> int:
    """Return the value that is white.

    `stored` bits are believed if they are fewer than 16 and no value exceeds them: files often say 16 where a camera
    wrote 12. Then the fewest of `DEPTHS` that hold the largest value count. Raises `ImageError` for other values.
    """
    low, high = pixels.min(), pixels.max()
    if low >= 0 and pixels.dtype.kind == 'f':
        if high <= 1: return 1
        if DARKEST_WHITE <= high <= 255: return 255
    elif low >= 0 and high < 1 << 16:
        if stored < 16 and high < 1 << stored: return (1 << stored) - 1
        bits = next(bits for bits in DEPTHS if high < 1 << bits)
        return (1 << (16 if bits > 8 and _repeats_bytes(pixels) else bits)) - 1
    raise ImageError(f'cannot be decoded: values from {low:g} to {high:g}; save it with values from 0 to 255, or from '
                     '0 to 65535 (integers) or 0 to 1 (float)')


def _repeats_bytes(pixels: np.ndarray) -> bool:
    "Return whether all values are multiples of 257: an image of 8 bits that was saved with 16."
    blocks = (pixels[start:start + ROWS_AT_ONCE] for start in range(0, len(pixels), ROWS_AT_ONCE))
    return not any((block % 257).any() for block in blocks)


def _scaled(pixels: np.ndarray, scale: float) -> np.ndarray:
    "Return `pixels` * `scale` as uint8, a few rows at a time to save memory."
    out = np.empty(pixels.shape, np.uint8)
    for start in range(0, len(pixels), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        out[rows] = (pixels[rows].astype(np.float32) * scale).clip(0, 255).round()
    return out


# DICOM

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


def _mend_tags(ds: Any) -> None:
    """Set tags that are missing or wrong where the other tags and the length of uncompressed pixels leave no doubt.

    Raises `ImageError` where they do.
    """
    photometric = ds.get('PhotometricInterpretation')
    if not photometric: raise ImageError('cannot be decoded: DICOM without PhotometricInterpretation; set it')
    samples = 1 if photometric.startswith(('MONOCHROME', 'PALETTE')) else 3
    ds.PixelRepresentation = ds.get('PixelRepresentation') or 0
    if 'SamplesPerPixel' not in ds: ds.SamplesPerPixel = samples
    if not ds.file_meta.TransferSyntaxUID.is_compressed and photometric != 'YBR_FULL_422': _mend_lengths(ds, samples)
    if 'BitsStored' not in ds: ds.BitsStored = ds.BitsAllocated
    if 1 in (ds.BitsStored, ds.BitsAllocated): raise ImageError(ONE_BIT)


def _mend_lengths(ds: Any, samples: int) -> None:
    "Set the number of samples and bits that the length of uncompressed pixels shows, or raise `ImageError`."
    if ds.get('BitsAllocated') == 1: return
    area = max(ds.Rows * ds.Columns, 1)
    length, excess = divmod(len(ds.PixelData), area)             # bytes per pixel
    bits = 8 * length // samples
    allocated, stored = ds.get('BitsAllocated') or bits, ds.get('BitsStored') or bits
    is_sure = bits in (8, 16, 32) and (bits == allocated or bits // 2 < stored <= bits)
    if not is_sure or length * 8 != bits * samples or excess > ds.Columns * length:
        raise ImageError(f'cannot be decoded: DICOM with {len(ds.PixelData) / area:.3g} bytes per pixel does not fit '
                         f'{ds.PhotometricInterpretation}, BitsAllocated {allocated}, BitsStored {stored}; '
                         'correct the tags')
    ds.SamplesPerPixel, ds.BitsAllocated, ds.BitsStored = samples, bits, min(stored, bits)
    if samples == 3 and 'PlanarConfiguration' not in ds: ds.PlanarConfiguration = 0
    if excess > 1: ds.PixelData = ds.PixelData[:area * length + area * length % 2]


def _dicom_pixels(ds: Any) -> np.ndarray:
    "Return the pixels of a DICOM dataset as uint8 RGB; values are scaled by the bits that are stored."
    import pydicom
    _mend_tags(ds)
    # converts YBR to RGB; unless signed, it would clear the bits above BitsStored, which may be wrong
    pixels = pydicom.pixels.pixel_array(ds, correct_unused_bits=ds.PixelRepresentation == 1)
    stored = ds.BitsStored
    is_grey, photometric = pixels.ndim == 2, ds.PhotometricInterpretation
    if is_grey != photometric.startswith(('MONOCHROME', 'PALETTE')):
        raise ImageError(f'cannot be decoded: DICOM with PhotometricInterpretation {photometric} and '
                         f'{1 if is_grey else 3} samples per pixel; correct the tags')
    if photometric == 'PALETTE COLOR': pixels, stored = pydicom.pixels.apply_color_lut(pixels, ds), 16
    elif pixels.dtype.kind == 'i': pixels, stored = _unsigned(pixels, stored)
    pixels = _to_8_bits(pixels, stored)
    if photometric == 'MONOCHROME1': pixels = 255 - pixels                              # 0 is white there
    pixels = np.ascontiguousarray(pixels)
    return np.repeat(pixels[..., None], 3, 2) if pixels.ndim == 2 else pixels


def _unsigned(pixels: np.ndarray, stored: int) -> tuple[np.ndarray, int]:
    """Return signed pixels as unsigned ones, whose 0 is black, and their bits.

    PixelRepresentation is often wrong. Values that were unsigned jump where they become negative, and signed ones jump
    if read as unsigned. Raises `ImageError` if neither is smoother.
    """
    low, high, mask = int(pixels.min()), int(pixels.max()), (1 << stored) - 1
    unsigned = np.require(pixels, requirements='W').view(f'u{pixels.itemsize}')
    if low >= 0: return unsigned, stored
    as_signed, as_unsigned = _roughness(pixels), _roughness(unsigned, mask)
    if max(as_signed, as_unsigned) < 1.2 * min(as_signed, as_unsigned) + 1:
        raise ImageError(f'cannot be decoded: DICOM with values from {low} to {high}; set PixelRepresentation to 0')
    if as_unsigned < as_signed:
        unsigned &= mask
        return unsigned, stored
    half = max(high + 1, -low)
    is_believed = stored < 16 and half <= 1 << (stored - 1)
    bits = stored if is_believed else next((bits for bits in DEPTHS if half <= 1 << (bits - 1)), 32)
    unsigned += unsigned.dtype.type(1 << (bits - 1))
    return unsigned, bits


def _roughness(pixels: np.ndarray, mask: int = -1) -> float:
    "Return the sum of the differences between neighbouring pixels, of the bits in `mask`."
    total = 0.
    for start in range(0, len(pixels), ROWS_AT_ONCE):
        block = pixels[start:start + ROWS_AT_ONCE].astype(np.int64) & mask
        total += sum(float(np.abs(np.diff(block, axis=axis)).sum()) for axis in (0, 1))
    return total


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
