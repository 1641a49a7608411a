import io
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import cv2
import numpy as np
import pytest
from conftest import dicom
from example_images import SMALL_RETINA, encode
from PIL import Image, ImageChops, ImageOps

import aptos_fastai.data.decode as decode_module
from aptos_fastai.data.decode import ImageError, PixelBudget, decode
from aptos_fastai.data.retina import Prep, prepare

RGB = SMALL_RETINA


def mean_difference(a, b):
    return abs(a.astype(int) - b).mean()


def largest_difference(a, b):
    return abs(a.astype(int) - b).max()


@pytest.mark.parametrize('fmt, options', [('PNG', {}), ('BMP', {}), ('TIFF', {}), ('WEBP', dict(lossless=True))])
def test_lossless_formats_decode_exactly(fmt, options):
    assert (decode(encode(RGB, fmt, **options))[0] == RGB).all()


def test_other_modes_decode():
    im = Image.fromarray(RGB)
    grey = np.asarray(im.convert('L'))
    grey16 = grey.astype(np.uint16) * 257
    assert (decode(encode(grey, 'PNG'))[0][..., 0] == grey).all()
    assert (decode(encode(im.convert('RGBA'), 'PNG'))[0] == RGB).all()
    assert mean_difference(decode(encode(im.convert('CMYK'), 'JPEG'))[0], RGB) < 6
    assert mean_difference(decode(encode(im.quantize(64), 'PNG'))[0], RGB) < 8
    assert largest_difference(decode(encode(grey16, 'PNG'))[0][..., 0], grey) <= 1


def test_transparent_pixels_are_black():
    opaque = RGB.max(2) > 60
    im = np.dstack([RGB, np.where(opaque, 255, 0).astype(np.uint8)])
    im[~opaque, :3] = 200
    decoded = decode(encode(im, 'PNG'))[0]
    assert (decoded[~opaque] == 0).all()
    assert (decoded[opaque] == RGB[opaque]).all()


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x112] = 6                           # rotate by 90 degrees
    assert decode(encode(RGB, 'JPEG', exif=exif))[0].shape == (120, 80, 3)


def test_large_jpegs_are_decoded_small():
    big = cv2.resize(RGB, (2400, 1600), interpolation=cv2.INTER_CUBIC)
    im, size = decode(encode(big, 'JPEG', quality=95), 200)
    assert im.shape == (200, 300, 3) and size == (2400, 1600)
    jpegs = [prepare(encode(big, fmt, **options), Prep(size=200))[0]
             for fmt, options in (('PNG', {}), ('JPEG', dict(quality=98)))]
    from_png, from_jpeg = (cv2.imdecode(np.frombuffer(o, np.uint8), 1) for o in jpegs)
    assert mean_difference(from_png, from_jpeg.astype(int)) < 3


@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_fast_png_decoder_gives_the_pixels_of_pillow(mode):
    im = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)).convert(mode)
    data = encode(im, 'PNG')
    full, size = decode(data)
    assert size == (90, 70) and np.array_equal(full, np.asarray(im.convert('RGB')))
    half, _ = decode(data, 32)
    assert half.shape == (35, 45, 3)
    means = full.reshape(35, 2, 45, 2, 3).mean((1, 3))
    assert abs(half - means).max() <= 1


@pytest.mark.parametrize('height, width', [(800, 1200), (805, 1201)])
def test_without_libvips_the_pixels_are_the_same(height, width, monkeypatch):
    im = cv2.resize(RGB, (width, height))
    files = [encode(im, 'PNG'), encode(im, 'JPEG'), encode(im[..., 0], 'PNG'), encode(im[..., 0], 'JPEG')]
    jobs = [(data, side) for data in files for side in (0, 400, 200, 100)]
    by_libvips = [decode(*job)[0] for job in jobs]
    monkeypatch.setattr(decode_module, 'pyvips', None)
    for job, expected in zip(jobs, by_libvips, strict=True): assert np.array_equal(decode(*job)[0], expected)


# The same pixels in another container

def containers(rgb):
    "Return an image as files of every lossless format"
    files = {fmt: encode(rgb, fmt) for fmt in ('PNG', 'BMP', 'TIFF')}
    files['WebP'] = encode(rgb, 'WEBP', lossless=True)
    files['RGBA'] = encode(np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)]), 'PNG')
    files['16 bit'] = cv2.imencode('.png', rgb[..., ::-1].astype(np.uint16) * 257)[1].tobytes()
    if find_spec('pydicom'): files['DICOM'] = dicom(rgb, 'RGB', 8)
    return files


def naive_means(im, factor):
    h, w = (side // factor for side in im.shape[:2])
    return im[:h * factor, :w * factor].reshape(h, factor, w, factor, 3).mean((1, 3))


@pytest.mark.parametrize('options', [{}, dict(subsampling=0), dict(subsampling=2, progressive=True)])
@pytest.mark.parametrize('min_side, factor', [(0, 1), (100, 2), (50, 4), (25, 8)])
def test_the_container_does_not_change_the_pixels(min_side, factor, options):
    jpeg = encode(cv2.resize(RGB, (331, 217), interpolation=cv2.INTER_CUBIC), 'JPEG', quality=90, **options)
    full = np.asarray(Image.open(io.BytesIO(jpeg)))
    files = containers(full)
    expected = decode(jpeg, min_side)[0]
    assert expected.shape == (217 // factor, 331 // factor, 3)
    assert abs(expected - naive_means(full, factor)).max() <= .5
    for name, data in files.items(): assert np.array_equal(decode(data, min_side)[0], expected), name


@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_rotated_jpeg_is_the_image_saved_upright(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    jpeg = encode(cv2.resize(RGB, (331, 217)), 'JPEG', exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(jpeg)))
    for side in (0, 50): assert np.array_equal(decode(jpeg, side)[0], decode(encode(upright, 'BMP'), side)[0])


def test_real_images_are_the_same_in_every_container(idrid):
    for file in sorted((idrid / 'originals').glob('*.jpg'))[:2]:
        jpeg = file.read_bytes()
        bmp = encode(Image.open(file), 'BMP')
        for side in (320, 512): assert np.array_equal(decode(jpeg, side)[0], decode(bmp, side)[0])


# Values of other depths

GREY = RGB[..., 0].copy()
GREY[0, 0] = 255


def to_bits(im, bits):
    return (im / 255 * ((1 << bits) - 1)).round().astype(np.uint16)


def opencv(ext, im):
    return cv2.imencode(ext, im[..., [2, 1, 0, 3][:im.shape[2]]] if im.ndim == 3 else im)[1].tobytes()


def tag_tiff(data, tag, value):
    "Change the one short value of a tag in a little-endian TIFF"
    at = data.index(struct.pack('<HHI', tag, 3, 1)) + 8
    return data[:at] + struct.pack('<H', value) + data[at + 2:]


@pytest.mark.parametrize('bits', [8, 10, 12, 14, 16])
def test_values_of_fewer_than_16_bits_are_scaled(bits):
    colour = RGB.copy()
    colour[0, 0] = 255
    opaque = np.full(GREY.shape, 65535, np.uint16)
    for ext in ('.png', '.tiff'):
        assert largest_difference(decode(opencv(ext, to_bits(GREY, bits)))[0][..., 0], GREY) == 0
        assert largest_difference(decode(opencv(ext, to_bits(colour, bits)))[0], colour) == 0
    assert largest_difference(decode(opencv('.png', np.dstack([to_bits(colour, bits), opaque])))[0], colour) == 0
    white_is_0 = tag_tiff(encode(((1 << bits) - 1 - to_bits(GREY, bits)).astype(np.uint16), 'TIFF'), 262, 0)
    assert largest_difference(decode(white_is_0)[0][..., 0], GREY) == 0
    assert largest_difference(decode(encode(to_bits(GREY, bits), 'JPEG2000'))[0][..., 0], GREY) == 0


def test_a_dark_image_saved_with_16_bits_stays_dark():
    dark = (RGB // 8).astype(np.uint8)
    assert (decode(opencv('.png', dark.astype(np.uint16) * 257))[0] == dark).all()


def test_16_bit_images_are_rotated():
    exif = Image.Exif()
    exif[0x112] = 6
    assert np.array_equal(decode(encode(to_bits(GREY, 12), 'PNG', exif=exif))[0][..., 0], np.rot90(GREY, 3))


@pytest.mark.parametrize('im', [GREY, RGB])
@pytest.mark.parametrize('kind', [np.float32, np.float64])
def test_float_tiffs_are_scaled_or_refused(im, kind):
    for values in (im / 255, im): assert (decode(opencv('.tiff', values.astype(kind)))[0].T == im.T).all()
    nan = (im / 255).astype(kind)
    nan[3, 3] = np.nan
    for values in (im / 255 - .1, im * 9., im / 50, nan):
        with pytest.raises(ImageError, match='values from .* to .*; save it with values from 0 to 255'):
            decode(opencv('.tiff', values.astype(kind)))


@pytest.mark.parametrize('im', [GREY, RGB])
def test_tiffs_of_signed_integers_are_scaled_or_refused(im):
    for kind in (np.int16, np.int32):
        assert largest_difference(decode(opencv('.tiff', (im * 16.06).astype(kind)))[0].T, im.T) <= 4
        with pytest.raises(ImageError, match='values from -.* to .*; save it'):
            decode(opencv('.tiff', im.astype(kind) - kind(90)))
    with pytest.raises(ImageError, match='values from 0 to .*; save it'):
        decode(opencv('.tiff', im.astype(np.int32) * 8_000_000))


def test_large_float_tiffs_are_refused_before_they_are_decoded():
    with pytest.raises(ImageError, match='too large: 120 x 80'):
        decode(opencv('.tiff', RGB.astype(np.float32)), max_pixels=9_599)


@pytest.mark.parametrize('fmt', ['PNG', 'TIFF', 'BMP', 'GIF'])
def test_one_bit_images_are_refused(fmt):
    with pytest.raises(ImageError, match='one-bit image has no shades'): decode(encode(GREY > 99, fmt))


def test_cmyk_is_inverted_only_by_adobe():
    plain = Image.merge('CMYK', [ImageChops.invert(o) for o in Image.fromarray(RGB).convert('CMYK').split()])
    data = encode(plain, 'JPEG', quality=95)
    adobe = data.index(b'\xff\xee\0\x0eAdobe')
    assert mean_difference(decode(data[:adobe] + data[adobe + 16:])[0], RGB) < 6
    assert mean_difference(decode(encode(Image.fromarray(RGB).convert('CMYK'), 'JPEG', quality=95))[0], RGB) < 6


# DICOM

def test_dicom_colour():
    pytest.importorskip('pydicom')
    from pydicom.pixels import convert_color_space
    decoded, size = decode(dicom(RGB, 'RGB', 8))
    assert (decoded == RGB).all() and size == (120, 80)
    ybr = convert_color_space(RGB, 'RGB', 'YBR_FULL')
    assert largest_difference(decode(dicom(ybr, 'YBR_FULL', 8))[0], RGB) <= 3


def test_dicom_greyscale():
    grey = RGB[..., 1]
    assert (decode(dicom(grey, 'MONOCHROME2', 8))[0] == grey[..., None]).all()
    assert (decode(dicom(255 - grey, 'MONOCHROME1', 8))[0] == grey[..., None]).all()
    grey12 = (grey * (4095 / 255)).round().astype(np.uint16)
    assert largest_difference(decode(dicom(grey12, 'MONOCHROME2', 12))[0][..., 0], grey) <= 1


def retag(data, **tags):
    "Change tags of a DICOM file, or remove those that are None"
    ds = pytest.importorskip('pydicom').dcmread(io.BytesIO(data))
    for name, value in tags.items():
        if value is None: delattr(ds, name)
        else: setattr(ds, name, value)
    f = io.BytesIO()
    ds.save_as(f)
    return f.getvalue()


@pytest.mark.parametrize('stored, tags', [
    (8, {}),                                 # fewer than the values have
    (16, {}),
    (12, dict(BitsStored=None, HighBit=None)),
    (12, dict(BitsAllocated=None)),
    (12, dict(BitsAllocated=8)),
    (12, dict(PixelRepresentation=None)),
    (12, dict(SamplesPerPixel=None)),
    (12, dict(SamplesPerPixel=3, PlanarConfiguration=0)),
])
def test_wrong_tags_of_a_twelve_bit_dicom_are_mended(stored, tags):
    data = retag(dicom(to_bits(GREY, 12), 'MONOCHROME2', stored), **tags)
    assert largest_difference(decode(data)[0][..., 0], GREY) == 0


def test_wrong_tags_of_an_eight_bit_dicom_are_mended():
    assert (decode(retag(dicom(GREY, 'MONOCHROME2', 8), BitsAllocated=16))[0][..., 0] == GREY).all()
    for tags in (dict(SamplesPerPixel=1), dict(SamplesPerPixel=None), dict(PlanarConfiguration=None)):
        assert (decode(retag(dicom(RGB, 'RGB', 8), **tags))[0] == RGB).all()


@pytest.mark.parametrize('bits', [8, 12, 16])
def test_signed_dicom(bits):
    "Unsigned values with the tag of signed ones, and signed values whose lowest is black"
    pytest.importorskip('pydicom')
    smooth = cv2.GaussianBlur(cv2.resize(GREY, (240, 160)), (0, 0), 2)
    smooth[0, :2] = 0, 255
    values = smooth if bits == 8 else to_bits(smooth, bits)
    signed = (values.astype(np.int32) - (1 << (bits - 1))).astype(np.int8 if bits == 8 else np.int16)
    for pixels in (values, signed):
        assert largest_difference(decode(dicom(pixels, 'MONOCHROME2', bits, signed=1))[0][..., 0], smooth) == 0


@pytest.mark.parametrize('photometric, grey, tags, words', [
    ('RGB', True, {}, 'DICOM with 1 bytes per pixel does not fit RGB, BitsAllocated 8'),
    ('MONOCHROME2', False, {}, 'DICOM with 3 bytes per pixel does not fit MONOCHROME2'),
    ('MONOCHROME2', True, dict(Rows=90), 'DICOM with 0.889 bytes per pixel'),
    ('MONOCHROME2', True, dict(Rows=40), 'DICOM with 2 bytes per pixel'),
    ('MONOCHROME2', True, dict(PhotometricInterpretation=None), 'DICOM without PhotometricInterpretation'),
    ('MONOCHROME2', True, dict(BitsStored=1), 'one-bit image'),
])
def test_contradictory_tags_of_a_dicom_are_errors(photometric, grey, tags, words):
    data = retag(dicom(GREY if grey else RGB, photometric, 8), **tags)
    with pytest.raises(ImageError, match=words): decode(data)


def test_signed_noise_in_a_dicom_is_an_error():
    noise = np.random.default_rng(0).integers(-128, 128, (64, 64)).astype(np.int8)
    with pytest.raises(ImageError, match='values from -128 to 127; set PixelRepresentation to 0'):
        decode(dicom(noise, 'MONOCHROME2', 8, signed=1))


def test_dicom_with_two_frames_is_an_error():
    frames = np.concatenate([RGB, RGB])[:80]
    with pytest.raises(ImageError, match='2 frames'): decode(dicom(frames, 'RGB', 8, frames=2))


def test_dicom_without_pydicom_says_what_to_install(monkeypatch):
    data = dicom(RGB, 'RGB', 8)
    monkeypatch.setitem(sys.modules, 'pydicom', None)
    with pytest.raises(ImageError, match='pip install pydicom'): decode(data)


# Damaged files

@pytest.mark.parametrize('data, words', [
    (encode(RGB, 'JPEG')[:-200], 'the file is truncated'),
    (encode(RGB, 'PNG')[:-40], 'the file is truncated'),
    (b'', 'cannot be decoded'),
    (b'hello' * 99, 'unknown image format'),
    (encode(RGB, 'TIFF')[:300], 'cannot be decoded'),
])
def test_damaged_files_are_errors(data, words):
    with pytest.raises(ImageError, match=words): decode(data)


def jpeg_with_thumbnail(**options):
    "Return a JPEG with a thumbnail in an APP segment"
    data, thumbnail = encode(RGB, 'JPEG', **options), encode(RGB[:16, :16], 'JPEG')
    return data[:2] + b'\xff\xe2' + struct.pack('>H', 2 + len(thumbnail)) + thumbnail + data[2:]


WHOLE = [jpeg_with_thumbnail(), jpeg_with_thumbnail(progressive=True), jpeg_with_thumbnail(restart_marker_blocks=2),
         encode(RGB, 'PNG')]


@pytest.mark.parametrize('data', WHOLE)
@pytest.mark.parametrize('tail', [b'\0' * 9999, b'\xff\xda' * 99, b'IEND\xff\xd9\xff', encode(RGB, 'JPEG')[:-9]])
def test_bytes_behind_an_image_are_ignored(data, tail):
    assert np.array_equal(decode(data + tail)[0], decode(data)[0])


@pytest.mark.parametrize('data', WHOLE)
def test_truncation_is_found_at_every_byte(data):
    fmt = decode_module.image_format(data[:132])
    assert [cut for cut in range(len(data)) if decode_module._is_complete(data[:cut], fmt)] == []
    assert decode_module._is_complete(data, fmt)


@pytest.mark.parametrize('progressive', [False, True])
def test_jpeg_data_that_end_early_are_truncated(progressive):
    pytest.importorskip('pyvips')
    data = encode(RGB, 'JPEG', progressive=progressive)
    with pytest.raises(ImageError, match='truncated'): decode(data[:len(data) * 3 // 4] + b'\xff\xd9')


@pytest.mark.parametrize('fmt, options', [
    ('WEBP', {}), ('WEBP', dict(lossless=True)), ('BMP', {}), ('TIFF', {}), ('TIFF', dict(compression='tiff_lzw')),
    ('TIFF', dict(compression='jpeg')), ('GIF', {}), ('JPEG2000', {}), ('MPO', {})])
def test_truncated_files_of_other_formats_are_errors(fmt, options):
    data = encode(RGB, fmt, **options)
    for share in (.3, .5, .9):
        with pytest.raises(ImageError): decode(data[:int(len(data) * share)])


def test_the_segments_of_a_large_jpeg_are_walked_fast():
    data = WHOLE[0]
    scan = data.rindex(b'\xff\xda') + 14           # behind the header of the last scan
    large = data[:scan] + b'\x12\xff\0' * 3_000_000 + data[scan:]
    start = time.perf_counter()
    assert decode_module._is_complete(large, 'JPEG')
    assert time.perf_counter() - start < 2


def test_too_many_pixels_are_refused_before_any_is_decoded(monkeypatch):
    monkeypatch.setattr('aptos_fastai.data.decode._decode_opened', lambda *a: pytest.fail('decoded'))
    png = encode(np.zeros((100, 100, 3), np.uint8), 'PNG')
    with pytest.raises(ImageError, match='too large: 100 x 100 = 0 megapixels'): decode(png, max_pixels=9_999)
    many = dicom(np.zeros((50, 2, 3), np.uint8), 'RGB', 8, frames=100)
    with pytest.raises(ImageError, match='too large: 2 x 50 x 100 frames'): decode(many, max_pixels=9_999)


@pytest.mark.parametrize('mode', ['L', 'P', 'RGB', 'RGBA', 'I;16'])
def test_memory_of_large_images_is_bounded(mode):
    "Decoding takes at most 16 bytes a pixel, so that `MAX_PIXELS` take 1 GB"
    code = f'''
import io, resource
from PIL import Image
from aptos_fastai.data.decode import decode
def png(side):
    out = io.BytesIO()
    Image.new({mode!r}, (side, side)).save(out, 'PNG', compress_level=1)
    return out.getvalue()
side = 3000
small = png(side)
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
decode(small, 512)
used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) * 1024
assert used <= 16 * side ** 2 + 60e6, f'{{used / side ** 2:.1f}} bytes a pixel'
'''
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


def test_heic_and_unknown_dicom_compressions_say_what_helps(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pillow_heif', None)
    with pytest.raises(ImageError, match='HEIC needs pillow-heif .*convert it to JPEG'):
        decode(b'\0\0\0\x18ftypheic' + b'\0' * 200)
    pytest.importorskip('pydicom')
    odd = dicom(np.zeros((8, 8, 3), np.uint8), 'RGB', 8).replace(b'1.2.840.10008.1.2.1\0', b'1.2.840.10008.9.9.9\0')
    with pytest.raises(ImageError, match='transfer syntax 1.2.840.10008.9.9.9 is not supported; export'): decode(odd)


def test_deflated_dicom_is_refused_before_it_is_inflated():
    pydicom = pytest.importorskip('pydicom')
    data = dicom(np.zeros((64, 64), np.uint8), 'MONOCHROME2', 8, syntax=pydicom.uid.DeflatedExplicitVRLittleEndian)
    with pytest.raises(ImageError, match='deflated DICOM is not read; export'): decode(data)


def test_memory_of_16_bit_colour_dicom_is_bounded(tmp_path):
    "Beside the file itself, at most 16 bytes a pixel"
    side = 2500
    pixels = np.random.default_rng(0).integers(0, 65536, (side, side, 3)).astype(np.uint16)
    (tmp_path / 'a').write_bytes(dicom(pixels, 'RGB', 16))
    code = f'''
import resource
from aptos_fastai.data.decode import decode
from pathlib import Path
import pydicom
data = Path({str(tmp_path / 'a')!r}).read_bytes()
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
decode(data)
used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) * 1024 - len(data)
assert used <= 16 * {side} ** 2 + 60e6, f'{{used / {side} ** 2:.1f}} bytes a pixel'
'''
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert abs(decode((tmp_path / 'a').read_bytes())[0] - (pixels / 257)).max() <= .5001


def test_no_other_program_is_started_for_an_image(monkeypatch):
    monkeypatch.setattr('PIL.EpsImagePlugin.Ghostscript', lambda *a, **k: pytest.fail('Ghostscript was started'))
    with pytest.raises(ImageError, match='unknown image format'):
        decode(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n' + b' ' * 200)


def test_files_of_several_pages_are_errors():
    pages = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    for fmt in ('TIFF', 'GIF', 'WEBP', 'PNG'):
        out = io.BytesIO()
        pages[0].save(out, fmt, save_all=True, append_images=pages[1:])
        with pytest.raises(ImageError, match=f'{fmt} with 2 pages; save one image per file'): decode(out.getvalue())
    thumbnail = io.BytesIO()
    pages[0].save(thumbnail, 'TIFF', save_all=True, append_images=[pages[1].resize((12, 8))])
    assert (decode(thumbnail.getvalue())[0] == RGB).all()
    phone = io.BytesIO()
    pages[0].save(phone, 'MPO', save_all=True, append_images=pages[1:])
    assert decode(phone.getvalue())[0].shape == RGB.shape


def test_dicom_without_pixels_says_so():
    pydicom = pytest.importorskip('pydicom')
    ds = pydicom.dcmread(io.BytesIO(dicom(np.zeros((8, 8), np.uint8), 'MONOCHROME2', 8)))
    del ds.PixelData
    out = io.BytesIO()
    ds.save_as(out)
    with pytest.raises(ImageError, match='DICOM without pixels'): decode(out.getvalue())


def test_the_pixels_decoded_at_once_are_bounded():
    budget, now, most = PixelBudget(100), [], []

    def work(n):
        with budget.pixels(n):
            now.append(n)
            most.append(sum(now))
            time.sleep(.005)
            now.remove(n)
    sizes = [60, 30, 50, 10, 300, 40, 100, 20] * 3
    with ThreadPoolExecutor(8) as pool: list(pool.map(work, sizes))
    assert len(most) == len(sizes) and all(total <= 100 or total == 300 for total in most) and budget.used == 0


def test_a_fast_jpeg_resembles_the_full_one():
    "It is reduced by scaling the DCT: nearly the same pixels, and the same size where the sides are multiples of 8"
    rng = np.random.default_rng(0)
    im = cv2.GaussianBlur(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8), (0, 0), 5)
    data = cv2.imencode('.jpg', im, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    full, fast = decode(data, 60)[0], decode(data, 60, fast_jpeg=True)[0]
    assert full.shape == fast.shape == (60, 80, 3)
    assert 0 < np.abs(full.astype(int) - fast).mean() < 1
    png = cv2.imencode('.png', cv2.imdecode(np.frombuffer(data, np.uint8), 1))[1].tobytes()
    assert np.array_equal(decode(png, 60, fast_jpeg=True)[0], full)
