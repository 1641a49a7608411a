"The page and the endpoints of `review`."
import os
import shutil
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import expect_error

from aptos_fastai.data.relabels import read_decisions
from aptos_fastai.deploy import review as page
from aptos_fastai.pipeline.review import Review
from aptos_fastai.pipeline.review_images import ReviewImages

httpx = pytest.importorskip('httpx')
uvicorn = pytest.importorskip('uvicorn')
pytest.importorskip('starlette')


@pytest.fixture
def session(toy_copy):
    "A review of a copy of the toy run: half of its validated images"
    found = Review(toy_copy, .5)
    return page.ReviewSession(found, ReviewImages(found))


@pytest.fixture
def client(session):
    from starlette.testclient import TestClient
    with TestClient(page.get_app(session, ['testserver']), raise_server_exceptions=False) as c: yield c


def decide(client, image, grade, reviewer='A. Reader'):
    return client.post('/api/decision', json=dict(image=image, grade=grade, reviewer=reviewer))


def decisions(session): return read_decisions(session.review.file)


def test_decisions_are_saved_at_once_with_who_and_what_was_seen(client, session):
    first, second, third = session.review.items[:3]
    state = decide(client, 0, str((first.original + 1) % 5)).json()
    assert (state['reviewed'], state['changed'], state['next']) == (1, 1, 1)
    assert client.get('/api/label/1').json()['label'] == second.label
    assert client.get('/api/heatmap/1').status_code == 200
    assert decide(client, 1, 'ungradable').json()['ungradable'] == 1
    assert decide(client, 2, '', '').json()['skipped'] == 1        # the name is asked once
    df = decisions(session)
    assert df.id_code.tolist() == [first.id_code, second.id_code, third.id_code]
    assert df.shown_label.tolist() == ['no', 'yes', 'no'] and set(df.reviewer) == {'A. Reader'}
    assert df.note.tolist() == ['disagreement', 'disagreement; heat map seen', 'disagreement']
    assert df.original.tolist() == [str(o.original) for o in (first, second, third)]


def test_undo_takes_decisions_back_one_by_one_and_loses_nothing(client, session):
    decide(client, 0, '1')
    decide(client, 1, '2')
    state = client.post('/api/undo', json={}).json()
    assert state['next'] == 1 and state['reviewed'] == 1
    state = client.post('/api/undo', json={}).json()
    assert state['next'] == 0 and state['reviewed'] == 0 and not state['can_undo']
    assert client.post('/api/undo', json={}).status_code == 409
    assert decisions(session).grade.tolist() == ['1', '2', '', '']
    assert decide(client, 0, '3').json()['next'] == 1


def test_a_new_session_resumes_where_the_last_one_was_left(client, session):
    for n in (0, 1): decide(client, n, '0')
    again = page.ReviewSession(Review(session.review.root, .5), session.images)
    assert again.state()['next'] == 2 and again.state()['reviewed'] == 2


def test_nothing_before_a_question_tells_label_score_or_name(client, session):
    texts = client.get('/').text + client.get('/api/state').text
    for item in session.review.items:
        assert item.id_code not in texts and str(item.score) not in texts
    reply = client.get('/api/image/0')
    assert reply.headers['content-type'] == 'image/jpeg' and reply.headers['x-shown'] == 'original'
    assert not session.labels_seen
    assert session.review.items[0].id_code == client.get('/api/label/0').json()['id_code']
    assert session.labels_seen == {0}


def test_a_heat_map_does_not_depend_on_the_score(session):
    item = session.review.items[0]
    hot = session.images.heatmap(item)
    item.score = -3.
    np.testing.assert_array_equal(session.images.heatmap(item), hot)


BAD_REQUESTS = {
    'grade': (dict(image=0, grade='5', reviewer='me'), 400, "grade '5'"),
    'grade as a number': (dict(image=0, grade=3, reviewer='me'), 400, 'grade: send a text'),
    'image': (dict(image=999, grade='1', reviewer='me'), 404, 'no image 999'),
    'image before the first': (dict(image=-1, grade='1', reviewer='me'), 404, 'no image -1'),
    'image is true': (dict(image=True, grade='1', reviewer='me'), 400, 'image: send its number'),
    'no reviewer': (dict(image=0, grade='1'), 400, 'name of the reviewer'),
    'a formula as reviewer': (dict(image=0, grade='1', reviewer='=cmd()'), 400, 'name of the reviewer'),
    'a long reviewer': (dict(image=0, grade='1', reviewer='a' * 81), 400, 'name of the reviewer'),
    'a list': ([1], 400, 'JSON object'),
}


@pytest.mark.parametrize('name', BAD_REQUESTS)
def test_bad_decisions_are_json_errors_and_save_nothing(client, session, name):
    body, status, words = BAD_REQUESTS[name]
    reply = client.post('/api/decision', json=body)
    assert reply.status_code == status and words in reply.json()['error']
    assert not session.review.file.exists()


def test_other_requests_out_of_bounds_are_json_errors(client, session, monkeypatch):
    form = dict(content='{"image": 0, "grade": "1"}', headers={'content-type': 'text/plain'})
    assert client.post('/api/decision', **form).status_code == 415          # what a form of another web site sends
    headers = {'content-type': 'application/json'}
    assert client.post('/api/decision', content='{', headers=headers).json()['error'] == 'no valid JSON'
    assert client.post('/api/decision', content='x' * 20_000, headers=headers).status_code == 413
    assert client.get('/api/decision').status_code == 405 and client.get('/api/decision').json()['error']
    assert client.get('/api/nothing').status_code == 404 and client.get('/api/nothing').json()['error']
    assert client.get('/api/image/999').json()['error'].startswith('no image 999')
    monkeypatch.setattr(session.images, 'records', {})
    assert 'image 1 cannot be shown: its prepared image' in client.get('/api/image/0').json()['error']
    monkeypatch.setattr(session, 'state', lambda: 1 / 0)
    reply = client.get('/api/state')
    assert reply.status_code == 500 and 'ZeroDivisionError' in reply.json()['error']


def test_a_decision_that_cannot_be_saved_says_so(client, session):
    session.review.file.mkdir()
    reply = decide(client, 0, '1')
    assert reply.status_code == 500 and 'the decision was not saved' in reply.json()['error']
    assert session.review.items[0].decision is None


def test_other_hosts_are_refused_and_the_page_loads_nothing(client):
    assert client.get('/', headers=dict(host='evil.example')).status_code == 400
    reply = client.get('/')
    assert "default-src 'none'" in reply.headers['content-security-policy'] and 'SYNTHETIC' in reply.text
    assert 'http://' not in reply.text and 'https://' not in reply.text


def test_bad_options_are_errors(toy, tmp_path, capsys):
    expect_error(capsys, ['review', tmp_path], 'not a finished run')
    expect_error(capsys, ['review', toy, '--share', '0'], '--share 0', 'above 0')
    expect_error(capsys, ['review', toy, '--reviewer', '=a'], '--reviewer =a')
    expect_error(capsys, ['review', toy, '--port', '0'], '1 to 65535')


def test_only_one_review_of_a_run_is_open(toy_copy, capsys):
    from aptos_fastai.common.io import file_lock
    with file_lock(toy_copy / 'relabels.csv', ''):
        expect_error(capsys, ['review', toy_copy], 'another process is writing this file', 'Only one review')


def test_a_stage_is_reviewed_by_its_own_scores(toy_copy):
    of_stage = Review(toy_copy / 'finetune_256', .5)
    assert of_stage.node == 'finetune_256' and of_stage.file == toy_copy / 'relabels.csv'
    assert of_stage.members == {'finetune_256': 1.}


def test_what_is_not_ranked_and_not_found_is_said(session, capsys):
    page.say_what_is_listed(session.review)
    out = ' '.join(capsys.readouterr().out.split())
    assert '6 of 12 images with an out-of-fold score are listed' in out and '1 of 5 folds are trained' in out
    page.say_what_is_shown(session.images)
    assert not capsys.readouterr().out
    images = ReviewImages(session.review)
    images.data = None
    page.say_what_is_shown(images)
    assert '6 of 6 originals not found' in ' '.join(capsys.readouterr().out.split())


# In a browser

@pytest.fixture
def review_url(session):
    "The URL of a server of the review, in a thread"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    app = page.get_app(session, ['127.0.0.1'])
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level='warning'))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started: time.sleep(.05)
    yield f'http://127.0.0.1:{port}'
    server.should_exit = True
    thread.join(10)


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
@pytest.mark.parametrize('width', [1200, 390])
def test_a_reader_reviews_the_list_with_the_keyboard(review_url, session, browser, tmp_path, width):
    view = browser.new_page(viewport=dict(width=width, height=820))
    errors = []
    view.on('pageerror', lambda e: errors.append(str(e)))
    view.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
    n = len(session.review.items)

    def shows(text): view.wait_for_selector(f'#count:has-text("{text}")')

    def loaded():
        view.wait_for_selector('#image[src]')
        view.evaluate('document.getElementById("image").decode()')
    view.goto(review_url)
    view.keyboard.type('3 Readers')                        # digits are no grades in the field of the name
    view.keyboard.press('Enter')
    loaded()
    assert not decided(session) and view.is_hidden('#label')
    original = view.get_attribute('#image', 'src')
    view.keyboard.press('h')
    view.wait_for_selector('#heat[aria-pressed=true]')
    assert view.get_attribute('#image', 'src') != original
    view.keyboard.press('l')
    view.wait_for_selector('#label')
    assert session.review.items[0].id_code in view.inner_text('#label')
    view.keyboard.press('z')
    assert view.get_attribute('#zoom', 'aria-pressed') == 'true'
    assert view.evaluate('document.getElementById("view").scrollWidth > document.getElementById("view").clientWidth')
    folder = os.environ.get('SHOTS', str(tmp_path))
    view.screenshot(path=f'{folder}/review-{width}.png', full_page=True)
    view.keyboard.press('2')
    shows(f'1 of {n}')
    loaded()
    assert view.is_hidden('#label') and view.get_attribute('#heat', 'aria-pressed') == 'false'
    view.keyboard.press('u')
    shows(f'2 of {n}')
    view.keyboard.press('ArrowLeft')
    shows(f'1 of {n}')
    for k in range(1, n):
        loaded()
        view.keyboard.press('s')
        shows(f'{k + 1} of {n}')
    view.wait_for_selector('#done')
    assert 'relabels = ' in view.inner_text('#done') and f'{n - 1} skipped' in view.inner_text('#done')
    assert view.evaluate('document.documentElement.scrollWidth') <= width and not errors
    assert decided(session) == ['2', 'ungradable', '', *[''] * (n - 1)]
    view.reload()
    view.wait_for_selector('#done')
    view.close()


def decided(session): return decisions(session).grade.tolist() if Path(session.review.file).exists() else []
