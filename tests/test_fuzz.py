"Damaged images and requests: the result is a prediction or one clear line, never a crash, a hang or exhausted memory."
import os
import subprocess
import sys
import time
from importlib.util import find_spec

import cv2
import numpy as np
import pytest
from conftest import ROOT, dicom, fundus
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aptos_fastai.data.decode import ImageError, decode
from aptos_fastai.data.retina import Prep, prepare

EXAMPLES = int(os.environ.get('FUZZ', 60))   # per test; FUZZ=5000 is the long run
fuzz = settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
fuzz_server = settings(fuzz, max_examples=max(8, EXAMPLES // 4))

FORM = 'multipart/form-data; boundary=x'


def encoded_images() -> dict[str, bytes]:
    "Return one image in each format that the program reads"
    im = fundus(np.random.default_rng(0), 64, 3)
    images = {e: cv2.imencode(f'.{e}', im)[1].tobytes() for e in ('png', 'jpg', 'webp', 'bmp', 'tiff')}
    images['16 bit'] = cv2.imencode('.png', im[..., 0].astype(np.uint16) * 257)[1].tobytes()
    if find_spec('pydicom'): images['dicom'] = dicom(np.ascontiguousarray(im), 'RGB', 8)
    return images


IMAGES = encoded_images()
SIGNATURES = [b'', b'\x89PNG\r\n\x1a\n', b'\xff\xd8\xff', b'II*\0', b'MM\0*', b'RIFF\0\0\0\0WEBP', b'BM', b'GIF89a',
              b'\0' * 128 + b'DICM']
DAMAGES = ['flip', 'cut', 'insert', 'zero', 'repeat']

formats = st.sampled_from(sorted(IMAGES))
damages = st.lists(st.tuples(st.floats(0, 1), st.sampled_from(DAMAGES), st.binary(min_size=1, max_size=8)),
                   min_size=1, max_size=6)


def damage(data: bytes, todo) -> bytes:
    "Apply each (place as a fraction of the length, kind of damage, bytes) of `todo` to `data`"
    for where, how, other in todo:
        i = int(where * (len(data) - 1)) if data else 0
        j = i + len(other)
        if how == 'cut': data = data[:i]
        elif how == 'insert': data = data[:i] + other + data[i:]
        elif how == 'zero': data = data[:i] + bytes(len(other)) + data[j:]
        elif how == 'repeat': data = data[:i] + data[i:i + 64] * len(other) + data[i:]
        else: data = data[:i] + bytes(a ^ b for a, b in zip(data[i:j], other, strict=False)) + data[j:]
    return data


def check_decoding(data: bytes) -> None:
    "Decode and prepare `data`: it must give an RGB image, or an `ImageError` of one line, within 20 seconds"
    started = time.monotonic()
    try:
        im, _ = decode(data, 64)
        assert im.dtype == np.uint8
        assert im.ndim == 3 and im.shape[2] == 3
        assert im.flags.c_contiguous
        prepare(data, Prep(size=64))
    except ImageError as e: assert str(e) and '\n' not in str(e)
    assert time.monotonic() - started < 20


@fuzz
@given(formats, damages)
def test_damaged_images(kind, todo):
    check_decoding(damage(IMAGES[kind], todo))


@fuzz
@given(st.binary(max_size=400), st.sampled_from(SIGNATURES))
def test_noise_after_any_signature(noise, signature):
    check_decoding(signature + noise)


FUZZ_REAL_IMAGES = '''
import random, resource, sys
from pathlib import Path
tests, images = sys.argv[1:]
sys.path[:0] = [str(Path(tests).parent), tests]
from test_fuzz import DAMAGES, check_decoding, damage
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
files = sorted(Path(images).rglob('*.jp*g'))[::20]
rng = random.Random(0)
for i in range(1500):
    data = files[i % len(files)].read_bytes()
    n = rng.randint(1, 6)
    todo = [(rng.random() ** 3, rng.choice(DAMAGES), rng.randbytes(rng.randint(1, 8))) for _ in range(n)]
    check_decoding(damage(data, todo))
print('finished', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10, 'MB')
'''


@pytest.mark.slow
def test_damaged_real_images(idrid):
    "Damaged IDRiD images in a process that must survive and use less than 3 GB"
    command = [sys.executable, '-W', 'ignore', '-c', FUZZ_REAL_IMAGES, str(ROOT / 'tests'), str(idrid)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert out.returncode == 0 and 'finished' in out.stdout, out.stderr[-2000:]
    assert int(out.stdout.split()[1]) < 3000


def post_predict(url, **request):
    return pytest.importorskip('httpx').post(url + '/api/predict', timeout=60, **request)


@fuzz_server
@given(st.lists(st.tuples(formats, damages, st.text(max_size=30)), min_size=1, max_size=3))
def test_uploads_of_damaged_images(server_url, uploads):
    files = [('files', (name or 'x', damage(IMAGES[kind], todo))) for kind, todo, name in uploads]
    response = post_predict(server_url, files=files)
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400: return
    rows = response.json()['rows']
    assert len(rows) == len(files)
    for row in rows:
        assert row['error'] or row['ungradable'] or row['grade'] in range(5)
        assert '/' not in row['file'] and '\\' not in row['file']


@fuzz_server
@given(damages, st.sampled_from([FORM, 'multipart/form-data', 'multipart/form-data; boundary=', 'text/plain', '']))
def test_damaged_requests(server_url, todo, content_type):
    header = b'Content-Disposition: form-data; name="files"; filename="a.png"\r\nContent-Type: image/png'
    body = b'--x\r\n' + header + b'\r\n\r\n' + IMAGES['png'] + b'\r\n--x--\r\n'
    damaged = post_predict(server_url, content=damage(body, todo), headers={'content-type': content_type})
    assert damaged.status_code in (200, 400, 411, 413, 415), (damaged.status_code, damaged.text)
    intact = post_predict(server_url, content=body, headers={'content-type': FORM})
    assert intact.status_code == 200
    assert len(intact.json()['rows']) == 1
