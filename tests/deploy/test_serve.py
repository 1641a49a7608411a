"The page and the endpoint of `serve`, used by programs and by people."
import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, expect_error

from aptos_fastai.deploy import serve
from aptos_fastai.inference.grader import load_grader
from aptos_fastai.pipeline.summary import OUT_OF_FOLD, PATIENTS_UNKNOWN

httpx = pytest.importorskip('httpx')
pytest.importorskip('uvicorn')
pytest.importorskip('starlette')


def upload(path, name=''): return 'files', (name or Path(path).name, Path(path).read_bytes())


def post_images(server_url, *paths, **options):
    "Send image files to the endpoint"
    return httpx.post(server_url + '/api/predict', files=[upload(p) for p in paths], timeout=60, **options)


def test_the_endpoint_gives_the_grades_of_the_grader(server_url, toy, image_paths):
    paths = image_paths[:5]
    reply, expected = post_images(server_url, *paths).json(), load_grader(toy).predict(paths)
    assert [row['file'] for row in reply['rows']] == [Path(p).name for p in paths]
    assert reply['synthetic']
    for row, e in zip(reply['rows'], expected.itertuples(), strict=True):
        assert row['score'] == pytest.approx(e.score, abs=1e-4) and row['grade'] == e.grade
        assert row['error'] == '' and 'heatmap' not in row


def test_the_endpoint_gives_a_heatmap_if_asked(server_url, image_paths):
    row = post_images(server_url, image_paths[0], data=dict(heatmap='1')).json()['rows'][0]
    assert row['heatmap'].startswith('data:image/jpeg;base64,')
    assert row['image'].startswith('data:image/jpeg;base64,')
    assert row['heatmap'] != row['image']


def test_unreadable_files_are_rows_with_their_error(server_url, image_paths, tmp_path):
    bad, short = tmp_path / 'a.png', tmp_path / 'b.png'
    bad.write_bytes(b'no image')
    short.write_bytes(Path(image_paths[0]).read_bytes()[:-50])
    rows = post_images(server_url, bad, image_paths[0], short).json()['rows']
    assert 'unknown image format' in rows[0]['error'] and rows[0]['grade'] is None
    assert rows[1]['error'] == ''
    assert 'the file is truncated' in rows[2]['error']


def test_requests_out_of_bounds_are_refused(server_url, image_paths, monkeypatch):
    url = server_url + '/api/predict'
    too_many = post_images(server_url, *image_paths[:1] * (serve.MAX_IMAGES + 1))
    assert too_many.status_code == 400 and 'Too many files' in too_many.json()['error']
    assert httpx.post(url, content=b'x', headers={'content-type': 'text/plain'}).status_code == 415
    assert post_images(server_url).status_code == 415
    assert httpx.post(url, content=iter([b'x'])).status_code == 411
    assert httpx.post(url, files={'other': b'x'}).json()['error'] == 'no image in the field `files`'
    assert httpx.get(server_url + '/nothing').status_code == 404
    assert httpx.get(url).status_code == 405
    monkeypatch.setattr(serve, 'MAX_MEGABYTES', 1e-5)
    too_large = post_images(server_url, image_paths[0])
    assert too_large.status_code == 413 and 'MB' in too_large.json()['error']


def test_a_decompression_bomb_is_refused(server_url, tmp_path, monkeypatch):
    from PIL import Image
    bomb = tmp_path / 'bomb.tif'
    Image.new('L', (3000, 3000)).save(bomb, compression='tiff_lzw')
    monkeypatch.setattr(serve, 'MAX_PIXELS', 1000)
    assert 'too large' in post_images(server_url, bomb).json()['rows'][0]['error']


def test_a_busy_server_says_so(server_url, image_paths, monkeypatch):
    monkeypatch.setattr(serve, 'MAX_PENDING', 0)
    response = post_images(server_url, image_paths[0])
    assert response.status_code == 503 and response.headers['retry-after'] and 'busy' in response.json()['error']


def test_fifty_requests_at_once_all_get_their_grade(server_url, toy, image_paths):
    expected = load_grader(toy).predict(image_paths).score.tolist()
    n = len(image_paths)

    async def send_all():
        limits = httpx.Limits(max_connections=50)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:
            def post(i):
                return client.post(server_url + '/api/predict', files=[upload(image_paths[i % n], f'{i}.png')])
            return await asyncio.gather(*map(post, range(50)))
    rows = [reply.json()['rows'][0] for reply in asyncio.run(send_all())]
    assert [row['file'] for row in rows] == [f'{i}.png' for i in range(50)]
    assert all(row['score'] == pytest.approx(expected[i % n], abs=1e-4) for i, row in enumerate(rows))
    assert httpx.get(server_url + '/health').json()['pending'] == 0


def test_after_an_error_in_a_batch_the_next_batch_is_graded(toy, image_paths):
    grader = load_grader(toy)
    queue, grade = serve.BatchingQueue(grader), grader.grade
    data = Path(image_paths[0]).read_bytes()

    async def fail_then_grade():
        worker = asyncio.create_task(queue.work())
        grader.grade = lambda *args: 1 / 0
        with pytest.raises(ZeroDivisionError): await queue.grade('a', data)
        grader.grade = grade
        row = await queue.grade('b', data)
        worker.cancel()
        return row
    assert asyncio.run(fail_then_grade())['error'] == ''
    assert queue.pending == 0


def test_page_and_endpoint_say_what_the_kappa_claims(server_url):
    about = httpx.get(server_url + '/api').json()
    assert '95 % CI over images' in about['kappa'] and PATIENTS_UNKNOWN in about['warnings']
    page = httpx.get(server_url).text
    for words in (about['kappa'], OUT_OF_FOLD, PATIENTS_UNKNOWN, 'of images like the training images'):
        assert words in page, words


def test_the_page_loads_nothing_from_other_hosts(server_url):
    reply = httpx.get(server_url)
    assert "default-src 'none'" in reply.headers['content-security-policy']
    assert 'SYNTHETIC' in reply.text and 'Not a medical device' in reply.text
    assert f'{server_url}/api/predict' in reply.text
    others = reply.text.replace(server_url, '').replace('http://www.w3.org', '')
    assert 'http://' not in others and 'https://' not in others


def test_other_host_names_are_refused_and_no_session_is_kept(server_url):
    assert httpx.get(server_url, headers=dict(host='evil.example')).status_code == 400
    reply = httpx.get(server_url + '/api')
    assert reply.json()['columns'][0] == 'file' and 'set-cookie' not in reply.headers
    assert reply.json()['example'].endswith(f'{server_url}/api/predict')
    assert not list(Path('.').glob('.sesskey'))


def test_a_port_in_use_is_an_error(toy):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen()
        command = [sys.executable, str(ROOT / 'run.py'), 'serve', str(toy), '--port', str(s.getsockname()[1])]
        out = subprocess.run(command, capture_output=True, text=True, timeout=120,
                             env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert out.returncode == 1
    assert 'cannot listen (' in out.stderr and 'Choose another port with --port' in out.stderr


def test_a_bad_port_is_an_error(toy, capsys):
    expect_error(capsys, ['serve', toy, '--port', 'x'], '--port', 'x is not')
    expect_error(capsys, ['serve', toy, '--port', '70000'], '--port 70000', '1 to 65535')


@pytest.fixture(scope='module')
def browser():
    chromium = shutil.which('chromium') or shutil.which('google-chrome')
    if not chromium: pytest.skip('no Chromium here')
    playwright = pytest.importorskip('playwright.sync_api')
    with playwright.sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        yield b
        b.close()


@pytest.mark.browser
@pytest.mark.parametrize('width', [1100, 390])
def test_a_person_grades_images(server_url, browser, image_paths, tmp_path, width):
    letter = tmp_path / 'letter.png'
    letter.write_bytes(b'dear doctor')
    page = browser.new_page(viewport=dict(width=width, height=800))
    requests, errors = [], []
    page.on('request', lambda r: requests.append(r.url))
    page.on('pageerror', lambda e: errors.append(str(e)))
    page.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
    page.goto(server_url)
    page.keyboard.press('Tab')
    assert page.evaluate('document.activeElement.id') == 'files'       # the keyboard is enough
    page.set_input_files('#files', [*image_paths[:2], str(letter)])
    page.wait_for_selector('#busy', state='hidden')
    page.wait_for_selector('.result.bad')
    assert page.locator('.result').count() == 3
    assert 'unknown image format' in page.inner_text('.result.bad')
    first = page.locator('.result').first
    image, button = first.locator('img'), first.locator('button')
    assert 'grade' in first.locator('h2').inner_text() and 'Prediction set' in first.inner_text()
    original = image.get_attribute('src')
    button.click()
    assert image.get_attribute('src') != original and button.get_attribute('aria-pressed') == 'true'
    with page.expect_download() as download: page.click('#csv')
    text = Path(download.value.path()).read_text()
    assert text.startswith('file,score,grade') and len(text.splitlines()) == 4 and 'letter.png' in text
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    folder = os.environ.get('SHOTS', str(tmp_path))
    page.screenshot(path=f'{folder}/serve-{width}.png', full_page=True)
    page.click('#clear')
    assert page.locator('.result').count() == 0 and not errors
    assert all(url.startswith((server_url, 'data:', 'blob:')) for url in requests)
    page.close()


def test_images_at_work_are_bounded_before_they_are_graded(toy):
    queue = serve.BatchingQueue(load_grader(toy))
    with contextlib.ExitStack() as requests:
        for _ in range(serve.MAX_PENDING // 20):
            received = requests.enter_context(queue.reserve(1000))
            received(20)
        assert queue.pending == serve.MAX_PENDING
        with pytest.raises(serve.RequestError) as e: requests.enter_context(queue.reserve(1000))
        assert e.value.status == 503
    assert queue.pending == queue.held == 0
    with contextlib.suppress(serve.RequestError), queue.reserve(1000) as received:
        received(serve.MAX_PENDING + 1)
        pytest.fail('too many images in one request')
    assert queue.pending == queue.held == 0
