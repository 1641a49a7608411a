import io
import os
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import dicom
from PIL import Image

from aptos_fastai.common.console import Bars
from aptos_fastai.data.decode import ImageError, decode
from aptos_fastai.data.retina import Circle, Prep, crop_square, find_retina, prepare
from aptos_fastai.data.store import prepare_table, read_prepared, read_square, store_folder


def disc(h, w, x, y, r, ground=0, colour=(190, 90, 40)):
    im = np.full((h, w, 3), ground, np.uint8)
    cv2.circle(im, (x, y), r, colour, -1)
    return im

def noisy(im, sigma=4, seed=0): return np.clip(im + np.random.default_rng(seed).normal(0, sigma, im.shape), 0, 255).astype(np.uint8)


hard = {
    'full circle': (disc(600, 900, 450, 300, 280), (450, 300, 280)),
    'off centre': (disc(600, 900, 350, 290, 250), (350, 290, 250)),
    'dark': (disc(600, 900, 450, 300, 280, colour=(24, 12, 6)), (450, 300, 280)),
    'cut at top and bottom': (disc(500, 900, 450, 250, 330), (450, 250, 330)),
    'cut on one side': (disc(600, 500, 210, 300, 270), (210, 300, 270)),
    'grey ground': (disc(600, 900, 450, 300, 280, ground=14), (450, 300, 280)),
    'bright frame': (cv2.rectangle(disc(600, 900, 450, 300, 270), (0, 0), (899, 599), (250, 250, 250), 9), (450, 300, 270)),
    'black frame, bright page': (cv2.rectangle(disc(600, 900, 450, 300, 240), (0, 0), (899, 599), (255, 255, 255), 60), (450, 300, 240)),
    'over-exposed': (disc(600, 900, 450, 300, 280, colour=(255, 250, 240)), (450, 300, 280)),
    'half in shadow': ((disc(600, 900, 450, 300, 280) * np.linspace(.12, 1, 900)[None, :, None]).astype(np.uint8), (450, 300, 280)),
    'small': (disc(60, 90, 45, 30, 27), (45, 30, 27)),
}

@pytest.mark.parametrize('name', hard)
@pytest.mark.parametrize('noise', [0, 3])
def test_the_circle_is_found(name, noise):
    im, (x, y, r) = hard[name]
    c = find_retina(noisy(im, noise))
    assert c.how == 'circle' and np.allclose([c.x, c.y, c.r], [x, y, r], atol=.02 * r + 1.5), c

def test_text_and_notch_do_not_move_the_circle():
    im = disc(600, 900, 450, 300, 280)
    cv2.rectangle(im, (715, 280), (740, 320), (190, 90, 40), -1)
    cv2.putText(im, 'OD 2019', (10, 580), cv2.FONT_HERSHEY_SIMPLEX, 1, (255, 255, 255), 2)
    c = find_retina(im)
    assert c.how == 'circle' and np.allclose([c.x, c.y, c.r], [450, 300, 280], atol=7)

@pytest.mark.parametrize('im', [np.zeros((300, 400, 3), np.uint8), np.full((300, 400, 3), 255, np.uint8), np.zeros((5, 7, 3), np.uint8)])
def test_nothing_found_keeps_the_whole_image(im):
    c = find_retina(im)
    assert c.how == 'whole' and (c.x, c.y) == (im.shape[1] / 2, im.shape[0] / 2) and c.r == max(im.shape[:2]) / 2

def test_a_square_of_light_is_its_box():
    im = np.zeros((300, 400, 3), np.uint8); im[50:250, 50:350] = 120
    c = find_retina(im)
    assert c.how == 'box' and np.allclose([c.x, c.y, c.r], [200, 150, 150], atol=3)


def test_crop_is_centred_and_keeps_the_aspect():
    im = disc(500, 900, 450, 250, 330)
    sq = crop_square(im, Circle(450, 250, 330), Prep(size=132, cut_off='black'))
    lit = sq.max(2) > 40
    assert sq.shape == (132, 132, 3) and not lit[:12].any() and not lit[-12:].any()             # what the frame cut off is black
    assert lit[66].sum() >= 130 and 98 <= lit[:, 66].sum() <= 102                                # a pixel is a pixel both ways

def test_what_is_cut_off_is_mirrored():
    im = disc(500, 900, 450, 250, 330); im[40:60] = (10, 200, 30)                               # a band near the upper edge, seen again above it
    sq = crop_square(im, Circle(450, 250, 330), Prep(size=132))
    band = (sq[:, 66, 1] > 120)
    assert (sq.max(2) > 40)[:, 66].sum() >= 130 and band[:30].sum() == 8 and band[22:30].sum() == 4 and band[:16].sum() == 4
    assert (sq[0, 0] == 0).all()

def test_the_crop_takes_away_the_shape_of_the_camera():
    "Two cameras, one of which took most of the high grades: the squashed images' shape gives the grade away, the prepared ones' does not"
    from aptos_fastai.reports.shortcuts import forest_kappa, mask_shape
    rng, shapes, grades = np.random.default_rng(0), [], []
    for i in range(240):
        g = i % 5
        cut = rng.random() < (.9 if g >= 2 else .1)
        r = int(rng.uniform(140, 160))
        h, w = (int(1.5 * r), int(2.4 * r)) if cut else (int(2.1 * r), int(2.8 * r))
        im = noisy(disc(h, w, w // 2 + int(rng.uniform(-4, 4)), h // 2 + int(rng.uniform(-3, 3)), r,
                        colour=tuple(int(o * rng.uniform(.7, 1.2)) for o in (190, 90, 40))), 3, i)
        c = find_retina(im)
        assert c.how == 'circle'
        shapes.append([mask_shape(crop_square(im, c, p)) for p in (Prep('none', 'squash', 128), Prep(size=128, cut_off='black'), Prep(size=128))])
        grades.append(g)
    y = np.array(grades, float)
    squashed, black, mirrored = (forest_kappa(np.array([s[j] for s in shapes]), y, np.arange(240) // 5 % 5)[0] for j in range(3))
    assert squashed > .5 and black > .5 and abs(mirrored) < .15, (squashed, black, mirrored)

def test_squash_stretches():
    sq = crop_square(np.full((100, 200, 3), 9, np.uint8), Circle(100, 50, 100), Prep('none', 'squash', 50))
    assert (sq == 9).all()

def test_outside_the_circle_is_black():
    im = disc(600, 900, 450, 300, 280, ground=60)
    assert (crop_square(im, Circle(450, 300, 280), Prep(size=100))[0, 0] == 0).all()


def encoded(im, fmt, **kw):
    f = io.BytesIO(); Image.fromarray(im).save(f, fmt, **kw)
    return f.getvalue()

rgb = noisy(disc(80, 120, 60, 40, 36))

@pytest.mark.parametrize('fmt', ['PNG', 'BMP', 'TIFF', 'WEBP'])
def test_lossless_formats_decode_exactly(fmt): assert (decode(encoded(rgb, fmt, **(dict(lossless=True) if fmt == 'WEBP' else {})))[0] == rgb).all()

def test_other_modes_decode():
    p = Image.fromarray(rgb)
    grey = np.asarray(p.convert('L'))
    def dec(im, fmt):
        f = io.BytesIO(); im.save(f, fmt); return decode(f.getvalue())[0].astype(int)
    assert (dec(p.convert('L'), 'PNG')[..., 0] == grey).all()
    assert abs(dec(p.convert('CMYK'), 'JPEG') - rgb).mean() < 6 and abs(dec(p.quantize(64), 'PNG') - rgb).mean() < 8
    assert (dec(p.convert('RGBA'), 'PNG') == rgb).all()
    assert abs(dec(Image.fromarray(grey.astype(np.uint16) * 257), 'PNG')[..., 0] - grey).max() <= 1

def test_what_is_see_through_is_black():
    im = np.dstack([rgb, np.where(rgb.max(2) > 60, 255, 0).astype(np.uint8)]); im[im[..., 3] == 0, :3] = 200
    out = decode(encoded(im, 'PNG'))[0]
    assert (out[im[..., 3] == 0] == 0).all() and (out[im[..., 3] > 0] == rgb[im[..., 3] > 0]).all()


def test_dicom():
    grey = rgb[..., 1]
    out, size = decode(dicom(rgb, 'RGB', 8))
    assert (out == rgb).all() and size == (120, 80)
    assert (decode(dicom(grey, 'MONOCHROME2', 8))[0] == grey[..., None]).all() and (decode(dicom(255 - grey, 'MONOCHROME1', 8))[0] == grey[..., None]).all()
    twelve = (grey * (4095 / 255)).round().astype(np.uint16)
    assert abs(decode(dicom(twelve, 'MONOCHROME2', 12))[0][..., 0].astype(int) - grey).max() <= 1
    from pydicom.pixels import convert_color_space
    ybr = convert_color_space(rgb, 'RGB', 'YBR_FULL')
    assert abs(decode(dicom(ybr, 'YBR_FULL', 8))[0].astype(int) - rgb).max() <= 3
    with pytest.raises(ImageError, match='2 frames'): decode(dicom(np.concatenate([rgb, rgb])[:80], 'RGB', 8, frames=2))

def test_a_dicom_original_is_prepared(tmp_path):
    (tmp_path / 'a.dcm').write_bytes(dicom(rgb, 'RGB', 8)); Image.fromarray(rgb).save(tmp_path / 'b.png')
    a, b = (read_square(tmp_path / f, Prep(size=64), 64) for f in ('a.dcm', 'b.png'))
    assert (a == b).all()

def test_dicom_without_its_extra_says_what_to_install(monkeypatch):
    data = dicom(rgb, 'RGB', 8)
    monkeypatch.setitem(__import__('sys').modules, 'pydicom', None)
    with pytest.raises(ImageError, match='pip install pydicom'): decode(data)

def test_exif_turns():
    exif = Image.Exif(); exif[0x112] = 6
    assert decode(encoded(rgb, 'JPEG', exif=exif))[0].shape == (120, 80, 3)

def test_large_jpegs_are_decoded_small():
    big = cv2.resize(rgb, (2400, 1600), interpolation=cv2.INTER_CUBIC)
    im, size = decode(encoded(big, 'JPEG', quality=95), 200)
    assert im.shape == (200, 300, 3) and size == (2400, 1600)
    whole, _ = prepare(encoded(big, 'PNG'), Prep(size=200)); half, _ = prepare(encoded(big, 'JPEG', quality=98), Prep(size=200))
    a, b = (cv2.imdecode(np.frombuffer(o, np.uint8), 1).astype(int) for o in (whole, half))
    assert abs(a - b).mean() < 3

@pytest.mark.parametrize('data, words', [(encoded(rgb, 'JPEG')[:-200], 'cut short'), (encoded(rgb, 'PNG')[:-40], 'cut short'), (b'', 'cannot be decoded'),
                                         (b'hello' * 99, 'cannot be decoded'), (encoded(rgb, 'TIFF')[:300], 'cannot be decoded')])
def test_damaged_files_are_errors(data, words):
    with pytest.raises(ImageError, match=words): decode(data)

def test_a_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    with pytest.raises(ImageError, match='DecompressionBomb'): decode(encoded(rgb, 'PNG'))


@pytest.fixture
def frame(tmp_path):
    (tmp_path / 'pics').mkdir()
    for i in range(4): Image.fromarray(noisy(rgb, 3, i)).save(tmp_path / f'pics/p{i}.png')
    return pd.DataFrame(dict(id_code=[f'p{i}' for i in range(4)], path=[str(tmp_path / f'pics/p{i}.png') for i in range(4)], source='t'))

def prep_all(frame, store):
    with Bars() as bars: return prepare_table(frame, store, Prep(size=64), bars)

def test_the_store_gives_the_pixels_of_the_original(frame, tmp_path):
    out, prep = prep_all(frame, tmp_path / 's'), Prep(size=64)
    for size in (64, 32):
        for o in out.itertuples(): assert (read_square(o.stored, prep, size) == read_square(o.path, prep, size)).all()

def test_preparing_twice_reads_nothing_and_a_changed_original_is_redone(frame, tmp_path, monkeypatch):
    first = prep_all(frame, tmp_path / 's')
    before = {p: os.stat(p).st_mtime_ns for p in first.stored}
    Image.fromarray(noisy(rgb, 3, 99)).save(frame.path[1]); os.utime(frame.path[1], ns=(1, 1))
    Path(first.stored[2]).unlink()
    again = prep_all(frame, tmp_path / 's')
    redone = [Path(p).name[:2] for p in again.stored if p not in before or os.stat(p).st_mtime_ns != before[p]]
    assert redone == ['p1', 'p2'] and not os.path.exists(first.stored[1]) and (first.pixel_sha256 != again.pixel_sha256).tolist() == [False, True, False, False]
    rec = read_prepared(store_folder(frame, tmp_path / 's', Prep(size=64)))
    assert (rec.how == 'circle').all() and (rec.width == 120).all() and abs(rec.r - 36).max() < 2

def test_what_a_killed_run_left_in_the_store_goes(frame, tmp_path):
    first = prep_all(frame, tmp_path / 's')
    left = Path(first.stored[0]).with_name('.x.jpg.1.tmp')
    left.write_bytes(b'x')
    prep_all(frame, tmp_path / 's')
    assert left.exists()                      # perhaps of a run beside this one
    os.utime(left, (1, 1))
    prep_all(frame, tmp_path / 's')
    assert not left.exists()

def test_preparing_goes_on_where_it_was_stopped(frame, tmp_path, monkeypatch):
    import aptos_fastai.data.store as images
    real, calls = images.prepare, []
    def stops(data, prep):
        if len(calls) == 3: raise KeyboardInterrupt
        calls.append(1)
        return real(data, prep)
    monkeypatch.setattr(images, 'cores', lambda: 1)
    monkeypatch.setattr(images, 'BATCH', 1)
    monkeypatch.setattr(images, 'prepare', stops)
    with pytest.raises(KeyboardInterrupt): prep_all(frame, tmp_path)
    assert len(read_prepared(store_folder(frame, tmp_path, Prep(size=64)))) == 3
    monkeypatch.setattr(images, 'prepare', lambda data, prep: calls.append(1) or real(data, prep))
    assert len(prep_all(frame, tmp_path)) == len(frame) == len(calls)


def test_bad_images_are_listed_not_lost(frame, tmp_path):
    Path(frame.path[0]).write_bytes(b'no image')
    with pytest.raises(ImageError, match=r'1 of 4 images of t cannot be used: p0 cannot be decoded'): prep_all(frame, tmp_path / 's')
    rec = read_prepared(store_folder(frame, tmp_path / 's', Prep(size=64)))
    assert (rec.error != '').tolist() == [True, False, False, False]

def test_a_damaged_store_entry_is_named(frame, tmp_path):
    out = prep_all(frame, tmp_path / 's')
    Path(out.stored[0]).write_bytes(b'xx')
    with pytest.raises(ImageError, match='is not what was stored'): read_square(out.stored[0], Prep(size=64), 64)

def test_real_images(idrid):
    for p in sorted((idrid / 'originals').iterdir())[:4]:
        c = find_retina(decode(p.read_bytes(), 512)[0])
        assert c.how == 'circle'
        _, info = prepare(p.read_bytes(), Prep(size=512))
        assert info['how'] == 'circle' and 1600 < info['r'] < 1900 and info['width'] > 4000


# Quality

def flags(im): return prepare(encoded(im, 'PNG'), Prep(size=128))[1]['flags'].split()

def vessels(im, n=60):
    "Fine dark lines: what makes an image sharp"
    rng = np.random.default_rng(0)
    for _ in range(n):
        a, b = rng.integers(0, im.shape[0], (2, 2))
        cv2.line(im, (int(a[0] + 150), int(a[1])), (int(b[0] + 150), int(b[1])), (110, 45, 20), 3, cv2.LINE_AA)
    return im

def test_flags_name_what_a_person_would_look_at_again():
    good = vessels(disc(600, 900, 450, 300, 280))
    assert flags(good) == [] and flags((good * .2).astype(np.uint8)) == ['dark']
    assert 'blurred' in flags(cv2.GaussianBlur(good, (0, 0), 16)) and 'bright' in flags(np.where(good > 30, 255, good).astype(np.uint8))
    assert flags(vessels(disc(400, 900, 450, 200, 280))) == ['cut-off']

def test_skip_bad_goes_on_and_says_so(frame, tmp_path, capsys):
    Path(frame.path[1]).write_bytes(b'no image')
    with Bars() as bars: out = prepare_table(frame, tmp_path / 's', Prep(size=64), bars, skip_unreadable=True)
    assert out.id_code.tolist() == ['p0', 'p2', 'p3'] and all(Path(p).name.startswith(i) for i, p in zip(out.id_code, out.stored, strict=True))
    assert 'skipped (skip_unreadable = yes): 1 of 4' in capsys.readouterr().out


@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_png_fast_path_gives_the_pixels_of_pillow(mode):
    a = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    im = Image.fromarray(a).convert(mode)
    b = io.BytesIO(); im.save(b, 'PNG')
    got, size = decode(b.getvalue())
    assert size == (90, 70) and np.array_equal(got, np.asarray(im.convert('RGB')))
    half, _ = decode(b.getvalue(), 32)
    assert half.shape == (35, 45, 3)
    assert abs(half.astype(float) - got.reshape(35, 2, 45, 2, 3).mean((1, 3))).max() <= 1


@pytest.mark.parametrize('hw', [(800, 1200), (805, 1201)])
def test_without_libvips_the_pixels_are_the_same(hw, monkeypatch):
    import aptos_fastai.data.decode as images
    data = encoded(cv2.resize(rgb, hw[::-1]), 'PNG')
    first = [images._decode_png(data, k) for k in (1, 2, 4, 8)]
    monkeypatch.setattr(images, 'pyvips', None)
    for k, want in zip((1, 2, 4, 8), first, strict=True):
        got = images._decode_png(data, k)
        assert got.shape == want.shape and abs(got.astype(int) - want)[:-1, :-1].max() <= 1
