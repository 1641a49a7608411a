"The page and its endpoint, asked as programs and as people ask them."
import asyncio
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, fails

from aptos_fastai.deploy import serve
from aptos_fastai.inference.grader import load_grader

httpx = pytest.importorskip('httpx')
uvicorn = pytest.importorskip('uvicorn')




def ask(address, *files, **kw):
    return httpx.post(address + '/api/predict', files=[('files', (Path(f).name, Path(f).read_bytes())) for f in files], timeout=60, **kw)


def test_the_endpoint_says_what_the_grader_says(address, toy, photos):
    o, want = ask(address, *photos[:5]).json(), load_grader(toy).predict(photos[:5])
    assert [r['file'] for r in o['rows']] == [Path(p).name for p in photos[:5]] and o['synthetic']
    for r, w in zip(o['rows'], want.itertuples(), strict=True):
        assert r['score'] == pytest.approx(w.score, abs=1e-4) and r['grade'] == w.grade and r['error'] == '' and 'heat' not in r
    hot = ask(address, photos[0], data=dict(heat='1')).json()['rows'][0]
    assert hot['heat'].startswith('data:image/jpeg;base64,') and hot['heat'] != hot['image']


def test_bad_files_are_answered_each_by_itself(address, photos, tmp_path):
    (tmp_path / 'a.png').write_bytes(b'no image')
    (tmp_path / 'b.png').write_bytes(Path(photos[0]).read_bytes()[:-50])
    rows = ask(address, tmp_path / 'a.png', photos[0], tmp_path / 'b.png').json()['rows']
    assert 'no image of a known kind' in rows[0]['error'] and rows[1]['error'] == '' and 'cut short' in rows[2]['error'] and rows[0]['grade'] is None


def test_what_is_too_much_is_refused(address, photos, tmp_path, monkeypatch):
    assert 'Too many files' in ask(address, *photos[:1] * (serve.COUNT + 1)).json()['error']
    assert httpx.post(address + '/api/predict', content=b'x', headers={'content-type': 'text/plain'}).status_code == 415
    assert ask(address).status_code in (400, 411, 415)
    assert httpx.post(address + '/api/predict', files={'other': b'x'}).json()['error'] == 'no image in the field `files`'
    monkeypatch.setattr(serve, 'MEGABYTES', 1e-5)
    got = ask(address, photos[0])
    assert got.status_code == 413 and 'MB' in got.json()['error']
    assert httpx.get(address + '/nothing').status_code == 404 and httpx.get(address + '/api/predict').status_code == 405


def test_a_bomb_is_refused(address, tmp_path, monkeypatch):
    from PIL import Image
    Image.new('L', (3000, 3000)).save(tmp_path / 'bomb.tif', compression='tiff_lzw')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    assert 'DecompressionBomb' in ask(address, tmp_path / 'bomb.tif').json()['rows'][0]['error']


def test_fifty_at_once_none_lost(address, toy, photos):
    want = load_grader(toy).predict(photos).score.tolist()

    async def all_of_them():
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=50)) as c:
            def post(i): return c.post(address + '/api/predict', files=[('files', (f'{i}.png', Path(photos[i % 20]).read_bytes()))])
            return await asyncio.gather(*map(post, range(50)))
    got = [r.json()['rows'][0] for r in asyncio.run(all_of_them())]
    assert [r['file'] for r in got] == [f'{i}.png' for i in range(50)]
    assert all(r['score'] == pytest.approx(want[i % 20], abs=1e-4) for i, r in enumerate(got))
    assert httpx.get(address + '/health').json()['pending'] == 0


def test_a_fault_in_a_batch_is_told_and_the_next_is_answered(toy, photos, monkeypatch):
    grader = load_grader(toy)
    desk = serve.Desk(grader)

    async def twice():
        worker = asyncio.create_task(desk.work())
        real, grader.grade = grader.grade, lambda *a: 1 / 0
        with pytest.raises(ZeroDivisionError): await desk.grade('a', Path(photos[0]).read_bytes())
        grader.grade = real
        row = await desk.grade('b', Path(photos[0]).read_bytes())
        worker.cancel()
        return row
    assert asyncio.run(twice())['error'] == '' and desk.pending == 0


def test_the_page_asks_no_other_host(address):
    got = httpx.get(address)
    text = got.text.replace('http://127.0.0.1:8000', '').replace('http://www.w3.org', '')
    assert "default-src 'none'" in got.headers['content-security-policy'] and 'http://' not in text
    assert 'https://' not in got.text and 'SYNTHETIC' in got.text and 'No medical device' in got.text
    assert httpx.get(address, headers=dict(host='evil.example')).status_code == 400
    assert not list(Path('.').glob('.sesskey')) and httpx.get(address + '/api').json()['columns'][0] == 'file'


def test_a_port_in_use_and_a_bad_one_are_told(toy, capsys):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)); s.listen()
        out = subprocess.run([sys.executable, str(ROOT / 'run.py'), 'serve', str(toy), '--port', str(s.getsockname()[1])], capture_output=True, text=True,
                             timeout=120, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert out.returncode == 1 and 'cannot be listened on (' in out.stderr and 'choose another with --port' in out.stderr
    fails(capsys, ['serve', toy, '--port', 'x'], '--port x: a number from 1 to 65535')


@pytest.fixture(scope='module')
def browser():
    chromium = shutil.which('chromium') or shutil.which('google-chrome')
    if not chromium: pytest.skip('no Chromium here')
    play = pytest.importorskip('playwright.sync_api')
    with play.sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        yield b
        b.close()


@pytest.mark.browser
@pytest.mark.parametrize('width', [1100, 390])
def test_a_person_grades_images(address, browser, photos, tmp_path, width):
    (tmp_path / 'letter.png').write_bytes(b'dear doctor')
    page = browser.new_page(viewport=dict(width=width, height=800))
    asked, faults = [], []
    page.on('request', lambda r: asked.append(r.url)); page.on('pageerror', lambda e: faults.append(str(e)))
    page.on('console', lambda m: faults.append(m.text) if m.type == 'error' else None)
    page.goto(address)
    page.keyboard.press('Tab')
    assert page.evaluate('document.activeElement.id') == 'files'                         # usable by keyboard alone
    page.set_input_files('#files', [*photos[:2], str(tmp_path / 'letter.png')])
    page.wait_for_selector('#busy', state='hidden'); page.wait_for_selector('.result.bad')
    assert page.locator('.result').count() == 3 and 'no image of a known kind' in page.inner_text('.result.bad')
    first = page.locator('.result').first
    assert 'grade' in first.locator('h2').inner_text() and 'the true grade is one of' in first.inner_text()
    before = first.locator('img').get_attribute('src')
    first.locator('button').click()
    assert first.locator('img').get_attribute('src') != before and first.locator('button').get_attribute('aria-pressed') == 'true'
    with page.expect_download() as d: page.click('#csv')
    text = Path(d.value.path()).read_text()
    assert text.startswith('file,score,grade') and len(text.splitlines()) == 4 and 'letter.png' in text
    assert page.evaluate('document.documentElement.scrollWidth') <= width                # nothing sticks out
    page.screenshot(path=os.environ.get('SHOTS', str(tmp_path)) + f'/serve-{width}.png', full_page=True)
    page.click('#clear')
    assert page.locator('.result').count() == 0 and not faults
    assert all(u.startswith((address, 'data:', 'blob:')) for u in asked)
    page.close()
