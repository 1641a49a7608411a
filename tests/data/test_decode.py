import io
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from conftest import dicom
from example_images import SMALL_RETINA, encode
from PIL import Image

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
    data = encode(cv2.resize(RGB, (width, height)), 'PNG')
    factors = (1, 2, 4, 8)
    by_libvips = [decode_module._decode_png(data, k) for k in factors]
    monkeypatch.setattr(decode_module, 'pyvips', None)
    for k, expected in zip(factors, by_libvips, strict=True):
        got = decode_module._decode_png(data, k)
        assert got.shape == expected.shape
        assert largest_difference(got[:-1, :-1], expected[:-1, :-1].astype(int)) <= 1


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


def test_too_many_pixels_are_refused_before_any_is_decoded(monkeypatch):
    monkeypatch.setattr('aptos_fastai.data.decode._decode_opened', lambda *a: pytest.fail('decoded'))
    png = encode(np.zeros((100, 100, 3), np.uint8), 'PNG')
    with pytest.raises(ImageError, match='too large: 100 x 100 = 0 megapixels'): decode(png, max_pixels=9_999)
    many = dicom(np.zeros((50, 2, 3), np.uint8), 'RGB', 8, frames=100)
    with pytest.raises(ImageError, match='too large: 2 x 50 x 100 frames'): decode(many, max_pixels=9_999)


@pytest.mark.parametrize('mode', ['L', 'P', '1', 'RGB', 'RGBA', 'I;16'])
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
