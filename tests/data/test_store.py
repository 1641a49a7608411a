import io
import os
from pathlib import Path

import cv2
import pandas as pd
import pytest
from conftest import dicom
from example_images import SMALL_RETINA, add_noise
from PIL import Image

import aptos_fastai.data.store as store_module
from aptos_fastai.common.console import Bars
from aptos_fastai.data.decode import ImageError
from aptos_fastai.data.retina import Prep, prepare_sizes
from aptos_fastai.data.store import (
    colour_warning,
    image_warnings,
    missing_images,
    prepare_table,
    read_prepared,
    read_square,
    resized_warning,
    store_folder,
)

PREP = Prep(size=64)


@pytest.fixture
def frame(tmp_path):
    "A table `t` of four images p0 … p3."
    ids = [f'p{i}' for i in range(4)]
    files = [tmp_path / f'originals/{i}.png' for i in ids]
    files[0].parent.mkdir()
    for seed, file in enumerate(files): Image.fromarray(add_noise(SMALL_RETINA, 3, seed)).save(file)
    return pd.DataFrame(dict(id_code=ids, path=[str(f) for f in files], source='t'))


def prepare_images(frame, store, **options):
    with Bars() as bars: return prepare_table(frame, store, PREP, bars, **options)


def prepared_csv(frame, store):
    return read_prepared(store_folder(frame, store, PREP))


def test_a_stored_image_has_the_pixels_of_the_prepared_original(frame, tmp_path):
    for row in prepare_images(frame, tmp_path / 'store').itertuples():
        for size in (64, 32):
            assert (read_square(row.stored, PREP, size) == read_square(row.path, PREP, size)).all()


def test_a_dicom_original_is_prepared(tmp_path):
    (tmp_path / 'a.dcm').write_bytes(dicom(SMALL_RETINA, 'RGB', 8))
    Image.fromarray(SMALL_RETINA).save(tmp_path / 'b.png')
    from_dicom, from_png = (read_square(tmp_path / f, PREP, 64) for f in ('a.dcm', 'b.png'))
    assert (from_dicom == from_png).all()


def test_only_changed_originals_and_missing_copies_are_prepared_again(frame, tmp_path):
    first = prepare_images(frame, tmp_path / 'store')
    times = {p: os.stat(p).st_mtime_ns for p in first.stored}
    Image.fromarray(add_noise(SMALL_RETINA, 3, 99)).save(frame.path[1])
    os.utime(frame.path[1], ns=(1, 1))
    Path(first.stored[2]).unlink()
    again = prepare_images(frame, tmp_path / 'store')
    rewritten = [i for i, p in zip(again.id_code, again.stored, strict=True) if os.stat(p).st_mtime_ns != times.get(p)]
    assert rewritten == ['p1', 'p2']
    assert not os.path.exists(first.stored[1])
    assert (first.pixel_sha256 != again.pixel_sha256).tolist() == [False, True, False, False]
    record = prepared_csv(frame, tmp_path / 'store')
    assert (record.how == 'circle').all() and (record.width == 120).all() and abs(record.r - 36).max() < 2


def test_images_of_an_earlier_version_are_prepared_again(frame, tmp_path):
    prepare_images(frame, tmp_path / 'store')
    file = store_folder(frame, tmp_path / 'store', PREP) / 'prepared.csv'
    record = pd.read_csv(file)
    assert (record.stretch == 1).all()
    record.drop(columns='stretch').to_csv(file, index=False)
    assert prepared_csv(frame, tmp_path / 'store') is None
    prepare_images(frame, tmp_path / 'store')
    assert (prepared_csv(frame, tmp_path / 'store').stretch == 1).all()


def records(n=40, width=512, height=512, how='circle', flags='', red_green=.7, green_blue=.9):
    return pd.DataFrame(dict(width=width, height=height, how=how, flags=[flags] * n, red_green=red_green,
                             green_blue=green_blue))


def test_filtered_and_grey_images_are_warned_of():
    def warning(*parts): return colour_warning(pd.concat(parts))
    grey, dark = records(10, red_green=.05, green_blue=-.02), records(10, flags='dark', red_green=0., green_blue=0.)
    assert warning(records()) == warning(records(), grey) == warning(records(10), dark) == warning(dark) == ''
    assert warning(records(30), grey, dark).startswith('10 of 40 images have hardly any colour: they look filtered')
    assert warning(records(40, red_green=.02, green_blue=.3)) == ''
    both = image_warnings(pd.concat([grey, records(10, how='box', green_blue=.02, red_green=0.)]))
    assert [text[:6] for text in both] == ['All 20', '20 of ']


def test_resized_tables_are_warned_of():
    def warning(*parts): return resized_warning(pd.concat(parts))
    unreadable = records(5, 0, 0, '')
    assert warning(records()) == warning(records(flags='blurred')) == warning(unreadable) == ''
    assert warning(records(98), records(2, flags='squashed')) == ''
    text = warning(records(20, flags='dark squashed'), records(20, 600, 400), unreadable)
    assert text.startswith('20 of 40 images look resized (their retinas are ellipses; they are made circles again).')
    squares = records(30), records(10, how='box')
    assert warning(*squares).startswith('All 40 images are squares of 512 pixels, and 10 of them show no circle')
    assert warning(*squares, records(1, 600, 600)) == warning(records(35), records(5, how='box')) == ''
    assert warning(records(40, how='whole')) == ''                   # [images] crop = none searches no retina
    assert warning(records(30, 600), records(10, 600, how='box')) == warning(records(19, how='box')) == ''


def test_old_temporary_files_of_killed_runs_are_removed(frame, tmp_path):
    first = prepare_images(frame, tmp_path / 'store')
    left = Path(first.stored[0]).with_name('.x.jpg.1.tmp')
    left.write_bytes(b'x')
    prepare_images(frame, tmp_path / 'store')
    assert left.exists()                      # another run may be writing it
    os.utime(left, (1, 1))
    prepare_images(frame, tmp_path / 'store')
    assert not left.exists()


def test_interrupted_preparation_resumes(frame, tmp_path, monkeypatch):
    prepare, calls = store_module.prepare_sizes, []

    def prepare_and_count(data, prep, sizes):
        calls.append(1)
        return prepare(data, prep, sizes)

    def prepare_three(data, prep, sizes):
        if len(calls) == 3: raise KeyboardInterrupt
        return prepare_and_count(data, prep, sizes)

    monkeypatch.setattr(store_module, 'cores', lambda: 1)
    monkeypatch.setattr(store_module, 'BATCH', 1)
    monkeypatch.setattr(store_module, 'prepare_sizes', prepare_three)
    with pytest.raises(KeyboardInterrupt): prepare_images(frame, tmp_path)
    assert len(prepared_csv(frame, tmp_path)) == 3
    monkeypatch.setattr(store_module, 'prepare_sizes', prepare_and_count)
    assert len(prepare_images(frame, tmp_path)) == len(frame) == len(calls)


def test_unreadable_images_are_listed(frame, tmp_path):
    Path(frame.path[0]).write_bytes(b'no image')
    message = r'\[table.t\]: 1 of 4 images are unreadable: p0 cannot be decoded: unknown .*skip_unreadable = yes'
    with pytest.raises(ImageError, match=message): prepare_images(frame, tmp_path / 'store')
    assert (prepared_csv(frame, tmp_path / 'store').error != '').tolist() == [True, False, False, False]


def test_unreadable_images_are_left_out_on_request(frame, tmp_path, capsys):
    Path(frame.path[1]).write_bytes(b'no image')
    out = prepare_images(frame, tmp_path / 'store', skip_unreadable=True)
    assert out.id_code.tolist() == ['p0', 'p2', 'p3']
    assert [Path(p).name[:2] for p in out.stored] == ['p0', 'p2', 'p3']
    printed = capsys.readouterr().out
    assert '1 of 4 images are unreadable' in printed and 'They are left out (skip_unreadable = yes).' in printed


def test_a_table_without_a_readable_image_is_an_error_even_on_request(frame, tmp_path):
    for p in frame.path: Path(p).write_bytes(b'no image')
    with pytest.raises(ImageError, match='4 of 4 images are unreadable'):
        prepare_images(frame, tmp_path / 'store', skip_unreadable=True)


def test_a_damaged_stored_image_is_an_error(frame, tmp_path):
    stored = prepare_images(frame, tmp_path / 'store').stored[0]
    Path(stored).write_bytes(b'xx')
    with pytest.raises(ImageError, match='content changed'): read_square(stored, PREP, 64)


def test_sizes_have_their_own_folders_and_one_decode(frame, tmp_path, monkeypatch):
    first = prepare_images(frame, tmp_path / 'store')
    decoded, calls = store_module.prepare_sizes, []

    def count(data, prep, sizes):
        calls.append(sizes)
        return decoded(data, prep, sizes)
    monkeypatch.setattr(store_module, 'prepare_sizes', count)
    with Bars() as bars: df = prepare_table(frame, tmp_path / 'store', Prep(size=96), bars, sizes=[96, 64, 48])
    assert calls == [[96, 48]] * len(frame)                    # 64 is there: each original is decoded once for the rest
    assert df.stored_64.tolist() == first.stored.tolist() and df.stored.tolist() == df.stored_96.tolist()
    for size in (96, 64, 48):
        prep = Prep(size=size)
        for path, original in zip(df[f'stored_{size}'], df.path, strict=True):
            assert (read_square(path, prep, size) == read_square(original, prep, size)).all()
    with pytest.raises(ImageError, match='is prepared, but not as .*Use the column stored_48'):
        read_square(df.stored_96[0], Prep(size=48), 48)


@pytest.mark.parametrize('jpeg', ['full', 'fast'])
@pytest.mark.parametrize('side, orientation', [(1700, 1), (2413, 6)])
def test_what_is_found_does_not_depend_on_the_sizes(side, orientation, jpeg):
    "Nor does a square depend on the other sizes; a side of 2413 pixels leaves rows over at every reduction"
    large = cv2.resize(SMALL_RETINA, (side, side - 7), interpolation=cv2.INTER_CUBIC)
    exif = Image.Exif()
    exif[274] = orientation
    data = io.BytesIO()
    Image.fromarray(add_noise(large, 3, 0)).save(data, 'JPEG', quality=95, exif=exif)
    prep = Prep(size=1000, jpeg=jpeg)
    alone = {size: prepare_sizes(data.getvalue(), prep, [size]) for size in (64, 224, 512, 640, 1000)}
    together, found = prepare_sizes(data.getvalue(), prep, [1000, 640, 512, 224, 64])
    for size, (jpegs, found_alone) in alone.items():
        assert found_alone == found and jpegs[size] == together[size]
    assert found['how'] == 'circle'


def test_images_of_an_older_version_are_prepared_again_but_can_be_read(frame, tmp_path):
    df = prepare_images(frame, tmp_path / 'store')
    file = store_folder(frame, tmp_path / 'store', PREP) / 'prepared.csv'
    pd.read_csv(file).drop(columns='measured_at').to_csv(file, index=False)
    assert len(prepared_csv(frame, tmp_path / 'store')) == 4
    assert missing_images(frame, tmp_path / 'store', PREP) == {64: {'p0', 'p1', 'p2', 'p3'}}
    again = prepare_images(frame, tmp_path / 'store')
    assert again.stored.tolist() == df.stored.tolist()
    assert missing_images(frame, tmp_path / 'store', PREP) == {64: set()}
