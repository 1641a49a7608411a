"Damaged images and requests: an answer or one clear line, never a crash, a hang or a full memory."
import os
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
from conftest import ROOT, dicom, fundus
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aptos_fastai.data.decode import ImageError, decode
from aptos_fastai.data.retina import Prep, prepare

EXAMPLES = int(os.environ.get('FUZZ', 60))   # of each; FUZZ=5000 is the long run
quiet = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


def seeds() -> dict[str, bytes]:
    im = fundus(np.random.default_rng(0), 64, 3)
    out = {e: cv2.imencode(f'.{e}', im)[1].tobytes() for e in ('png', 'jpg', 'webp', 'bmp', 'tiff')}
    out['16 bit'] = cv2.imencode('.png', im[..., 0].astype(np.uint16) * 257)[1].tobytes()
    try: out['dicom'] = dicom(np.ascontiguousarray(im), 'RGB', 8)
    except ImportError: pass
    return out

SEEDS = seeds()
HOWS = ['flip', 'cut', 'insert', 'zero', 'repeat']
SIGNATURES = [b'', b'\x89PNG\r\n\x1a\n', b'\xff\xd8\xff', b'II*\0', b'MM\0*', b'RIFF\0\0\0\0WEBP', b'BM', b'GIF89a', b'\0' * 128 + b'DICM']
edits = st.lists(st.tuples(st.floats(0, 1), st.sampled_from(HOWS), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6)


def damaged(data: bytes, todo) -> bytes:
    for at, how, with_ in todo:
        i = int(at * (len(data) - 1)) if data else 0
        if how == 'cut': data = data[:i]
        elif how == 'insert': data = data[:i] + with_ + data[i:]
        elif how == 'zero': data = data[:i] + bytes(len(with_)) + data[i + len(with_):]
        elif how == 'repeat': data = data[:i] + data[i:i + 64] * len(with_) + data[i:]
        else: data = data[:i] + bytes(b ^ w for b, w in zip(data[i:i + len(with_)], with_, strict=False)) + data[i + len(with_):]
    return data


def reads_or_says(data: bytes):
    t = time.monotonic()
    try:
        im, _ = decode(data, 64)
        assert im.dtype == np.uint8 and im.ndim == 3 and im.shape[2] == 3 and im.flags.c_contiguous
        prepare(data, Prep(size=64))
    except ImageError as e: assert str(e) and '\n' not in str(e)
    assert time.monotonic() - t < 20


@quiet
@given(st.sampled_from(sorted(SEEDS)), edits)
def test_damaged_images(kind, todo): reads_or_says(damaged(SEEDS[kind], todo))


@quiet
@given(st.binary(max_size=400), st.sampled_from(SIGNATURES))
def test_noise_behind_any_signature(data, head): reads_or_says(head + data)


@pytest.mark.slow
def test_damaged_real_images(idrid):
    "Of IDRiD, in a process of 3 GB that must not die"
    code = f'''
import random, resource, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from test_fuzz import HOWS, damaged, reads_or_says
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
files, rng = sorted(Path({str(idrid)!r}).rglob('*.jp*g'))[::20], random.Random(0)
for i in range(1500):
    data = files[i % len(files)].read_bytes()
    reads_or_says(damaged(data, [(rng.random() ** 3, rng.choice(HOWS), rng.randbytes(rng.randint(1, 8))) for _ in range(rng.randint(1, 6))]))
print('whole', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10, 'MB')
'''
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, timeout=1200)
    assert out.returncode == 0 and 'whole' in out.stdout, out.stderr[-2000:]
    assert int(out.stdout.split()[1]) < 3000


def ask(url, **request): return pytest.importorskip('httpx').post(url + '/api/predict', timeout=60, **request)


@settings(quiet, max_examples=max(8, EXAMPLES // 4))
@given(st.lists(st.tuples(st.sampled_from(sorted(SEEDS)), edits, st.text(max_size=30)), min_size=1, max_size=3))
def test_uploads_of_damaged_images(address, given_):
    files = [('files', (name or 'x', damaged(SEEDS[kind], todo))) for kind, todo, name in given_]
    got = ask(address, files=files)
    assert got.status_code in (200, 400), got.text
    if got.status_code == 200:
        assert len(got.json()['rows']) == len(files) and all(r['error'] or r['grade'] in range(5) for r in got.json()['rows'])
        assert not any('/' in r['file'] or '\\' in r['file'] for r in got.json()['rows'])


@settings(quiet, max_examples=max(8, EXAMPLES // 4))
@given(edits, st.sampled_from(['multipart/form-data; boundary=x', 'multipart/form-data', 'multipart/form-data; boundary=', 'text/plain', '']))
def test_damaged_requests(address, todo, kind):
    whole = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n' + SEEDS['png'] + b'\r\n--x--\r\n'
    got = ask(address, content=damaged(whole, todo), headers={'content-type': kind})
    assert got.status_code in (200, 400, 411, 413, 415), (got.status_code, got.text)
    again = ask(address, content=whole, headers={'content-type': 'multipart/form-data; boundary=x'})
    assert again.status_code == 200 and len(again.json()['rows']) == 1                  # whatever came before, the next is answered
