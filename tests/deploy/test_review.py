"The page and the endpoints of `review`."
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import expect_error, open_toy_run, url_of

from aptos_fastai.common.io import AptosError
from aptos_fastai.data.relabels import read_decisions
from aptos_fastai.data.store import read_square
from aptos_fastai.deploy import review as page
from aptos_fastai.pipeline import review_images
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


@pytest.mark.parametrize('earlier', ['3', 'ungradable', ''])
def test_undo_brings_the_earlier_decision_back_then_steps_further(client, session, earlier):
    item = session.review.items[0]
    decide(client, 0, earlier)
    decide(client, 0, '0')
    state = client.post('/api/undo', json={}).json()
    assert (state['next'], state['reviewed'], state['can_undo']) == (0, 1, True) and item.decision == earlier
    assert Review(session.review.root, .5).items[0].decision == earlier            # and in the file
    assert decisions(session).grade.tolist() == [earlier, '0', earlier]
    state = client.post('/api/undo', json={}).json()
    assert (state['next'], state['reviewed'], state['can_undo']) == (0, 0, False) and item.decision is None
    assert Review(session.review.root, .5).items[0].decision is None
    assert decisions(session).grade.tolist() == [earlier, '0', earlier, '']


def test_undo_brings_the_decision_of_an_earlier_session_back(client, session):
    decide(client, 0, '3')
    again = page.ReviewSession(Review(session.review.root, .5), session.images, 'B. Reader')
    again.decide(0, '1', '')
    again.undo('')
    assert again.review.items[0].decision == '3' and not again.history
    assert decisions(session)[['grade', 'reviewer']].values.tolist() == [
        ['3', 'A. Reader'], ['1', 'B. Reader'], ['3', 'B. Reader']]


def test_a_file_that_excel_saved_is_extended(client, session):
    decide(client, 0, '3')
    file = session.review.file
    file.write_bytes(file.read_text().replace(',', ';').replace('\n', '\r\n').encode('utf-16'))
    decide(client, 1, '0')
    assert [item.decision for item in Review(session.review.root, .5).items[:3]] == ['3', '0', None]


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


def test_heat_maps_of_members_of_two_sizes_are_of_their_own_squares(toy_copy, monkeypatch):
    review = Review(toy_copy, .5)
    review.members = dict(finetune_256=.5, retrain_512=.5)
    images, seen = ReviewImages(review), {}
    item = next(o for o in review.items if o.table == 'aptos_train')
    monkeypatch.setattr(review_images, 'heatmap', lambda grader, squares: seen.update(squares) or np.zeros((1, 8, 8)))
    images.heatmap(item)
    run = open_toy_run(toy_copy)
    small, large = (run.recipe.stages[name].size for name in review.members)
    assert set(seen) == {small, large} and small < large
    for size in (small, large):
        prep = replace(run.prep, size=size)
        file, = (toy_copy.parent / 'prepared' / prep.name).glob(f'aptos_train-*/{item.id_code}.*.jpg')
        assert np.array_equal(seen[size][0], read_square(file, prep, size))
    file, = (toy_copy.parent / 'prepared' / replace(prep, size=small).name).glob(f'*/{item.id_code}.*.jpg')
    file.unlink()
    with pytest.raises(AptosError, match=f'its prepared square of {small} px is not in the store'):
        ReviewImages(review).heatmap(item)


BAD_REQUESTS = {
    'grade': (dict(image=0, grade='5', reviewer='me'), 400, "grade '5'"),
    'grade as a number': (dict(image=0, grade=3, reviewer='me'), 400, 'grade: send a text'),
    'image': (dict(image=999, grade='1', reviewer='me'), 404, 'no image 999'),
    'image before the first': (dict(image=-1, grade='1', reviewer='me'), 404, 'no image -1'),
    'image is true': (dict(image=True, grade='1', reviewer='me'), 400, 'image: send its number'),
    'no reviewer': (dict(image=0, grade='1'), 400, 'name of the reviewer'),
    'a formula as reviewer': (dict(image=0, grade='1', reviewer='=cmd()'), 400, 'name of the reviewer'),
    'a long reviewer': (dict(image=0, grade='1', reviewer='a' * 81), 400, 'name of the reviewer'),
    'no grade': (dict(image=0, reviewer='me'), 400, 'grade: send a text'),
    'null as a grade': (dict(image=0, grade=None, reviewer='me'), 400, 'grade: send a text'),
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


@pytest.mark.parametrize('headers', [
    {'Sec-Fetch-Site': 'cross-site'}, {'Sec-Fetch-Site': 'same-site'}, dict(Origin='https://evil.example'),
    dict(Origin='null'), {'Origin': 'http://testserver', 'Sec-Fetch-Site': 'cross-site'}])
def test_requests_of_other_web_sites_change_nothing(client, session, headers):
    replies = [client.get(f'/api/{path}', headers=headers) for path in ('label/0', 'heatmap/0', 'image/0', 'state')]
    replies.append(client.post('/api/decision', json=dict(image=0, grade='1', reviewer='me'), headers=headers))
    replies.append(client.post('/api/undo', json={}, headers=headers))
    for reply in replies:
        assert reply.status_code == 403 and 'other web sites' in reply.json()['error']
        assert "default-src 'none'" in reply.headers['content-security-policy']
    assert not session.labels_seen and not session.heatmaps_seen and not session.review.file.exists()


@pytest.mark.parametrize('headers', [{}, {'Sec-Fetch-Site': 'none'}, {
    'Sec-Fetch-Site': 'same-origin', 'Origin': 'http://testserver'}])
def test_requests_of_the_page_and_of_programs_are_served(client, headers):
    for path in ('/', '/api/label/0'): assert client.get(path, headers=headers).status_code == 200
    decision = dict(image=0, grade='1', reviewer='me')
    assert client.post('/api/decision', json=decision, headers=headers).json()['reviewed'] == 1


def test_half_a_surrogate_pair_is_refused(client, session):
    json = dict(headers={'content-type': 'application/json'})
    for name in (rb'A\ud800', b'A\xed\xa0\x80'):
        body = b'{"image": 0, "grade": "1", "reviewer": "' + name + b'"}'
        reply = client.post('/api/decision', content=body, **json)
        assert reply.status_code == 400 and 'Unicode' in reply.json()['error']
    assert not session.review.file.exists()
    whole = rb'{"image": 0, "grade": "1", "reviewer": "A\ud83d\ude00"}'
    assert client.post('/api/decision', content=whole, **json).json()['reviewer'] == 'A\U0001f600'


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
    "The URL of a server of the review"
    with url_of(page.get_app(session, ['127.0.0.1'])) as url: yield url


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
