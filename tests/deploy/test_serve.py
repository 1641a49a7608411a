"The page and the endpoint of `serve`, used by programs and by people."
import asyncio
import base64
import contextlib
import hashlib
import io
import json
import os
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, expect_error, url_of, write_dicom

from aptos_fastai.cli import main
from aptos_fastai.common.io import AptosError
from aptos_fastai.decisions import OperatingPoint
from aptos_fastai.deploy import about, batching, pairing, serve, web
from aptos_fastai.deploy.openapi import openapi_document
from aptos_fastai.deploy.request_log import RequestLog
from aptos_fastai.inference.audit import audit_record
from aptos_fastai.inference.explain import explain_image
from aptos_fastai.inference.grader import COLUMNS, load_grader
from aptos_fastai.inference.patients import COLUMNS as PATIENT_COLUMNS
from aptos_fastai.inference.patients import patient_table
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
    assert row['heatmap'].startswith('data:image/png;base64,')
    assert row['image'].startswith('data:image/jpeg;base64,')


def decoded(uri):
    "The pixels of a data URI, as they are stored"
    data = base64.b64decode(uri.partition(',')[2])
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def test_the_heatmap_is_bright_where_the_overlay_of_explain_differs_from_the_image(server_url, toy, image_paths):
    row = post_images(server_url, image_paths[0], data=dict(heatmap='1')).json()['rows'][0]
    image, heat = decoded(row['image']), decoded(row['heatmap'])
    assert heat.ndim == 2 and max(heat.shape) <= batching.HEATMAP_SIDE
    assert image.shape[0] / image.shape[1] == pytest.approx(heat.shape[0] / heat.shape[1], rel=.02)
    im, overlay, _ = explain_image(load_grader(toy), Path(image_paths[0]).read_bytes())
    change = np.abs(overlay.astype(float) - im).sum(2)
    small = cv2.resize(change, heat.shape[::-1], interpolation=cv2.INTER_AREA)
    assert np.corrcoef(small.ravel(), heat.ravel())[0, 1] > .5
    assert small[heat == 0].mean() < .05 * small[heat >= np.quantile(heat, .99)].mean()


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
    too_many = post_images(server_url, *image_paths[:1] * (about.MAX_IMAGES + 1))
    assert too_many.status_code == 413 and 'Too many files' in too_many.json()['error']
    assert httpx.post(url, content=b'x', headers={'content-type': 'text/plain'}).status_code == 415
    assert post_images(server_url).status_code == 415
    assert httpx.post(url, content=iter([b'x'])).status_code == 411
    assert httpx.post(url, files={'other': b'x'}).json()['error'] == 'no image in the field `files`'
    monkeypatch.setattr(about, 'MAX_MEGABYTES', 1e-5)
    too_large = post_images(server_url, image_paths[0])
    assert too_large.status_code == 413 and 'MB' in too_large.json()['error']


@pytest.mark.parametrize('fields, address, words', [
    (dict(prevalence='0.05'), '', 'not used: prevalence'), (dict(heatmap='banana'), '', 'heatmap: send one of 1, true'),
    (dict(heatmap=['1', '0']), '', 'heatmap: send it once'),
    (dict(files='text'), '', 'not used: files'), ({}, '?heatmap=1', 'parameters in the address are not used')])
def test_what_is_sent_and_not_used_is_refused(server_url, image_paths, fields, address, words):
    url = server_url + '/api/predict' + address
    reply = httpx.post(url, files=[upload(image_paths[0])], data=fields, timeout=60)
    assert reply.status_code == 400 and words in reply.json()['error']
    reply = httpx.post(server_url + '/api/predict', files=[upload(image_paths[0]), ('file', ('b.png', b'x'))])
    assert reply.status_code == 400 and 'not used: file.' in reply.json()['error']


@pytest.mark.parametrize('end, status', [(b'\r\n--B--\r\n', 200), (b'\r\n--B--', 200), (b'\r\n--B', 400), (b'', 400)])
def test_a_form_that_is_cut_off_gives_no_partial_answer(server_url, image_paths, end, status):
    image = Path(image_paths[0]).read_bytes()
    part = b'--B\r\nContent-Disposition: form-data; name="files"; filename="%s.png"\r\n\r\n'
    body = part % b'a' + image + b'\r\n' + part % b'b' + image + end
    reply = httpx.post(server_url + '/api/predict', content=body, timeout=60,
                       headers={'content-type': 'multipart/form-data; boundary=B'})
    assert reply.status_code == status
    if status == 200: assert [o['file'] for o in reply.json()['rows']] == ['a.png', 'b.png']
    else: assert 'the request ends before the form does' in reply.json()['error']


def test_a_decompression_bomb_is_refused(server_url, tmp_path, monkeypatch):
    from PIL import Image
    bomb = tmp_path / 'bomb.tif'
    Image.new('L', (3000, 3000)).save(bomb, compression='tiff_lzw')
    monkeypatch.setattr(batching, 'MAX_PIXELS', 1000)
    assert 'too large' in post_images(server_url, bomb).json()['rows'][0]['error']


def test_a_busy_server_says_so(server_url, image_paths, monkeypatch):
    monkeypatch.setattr(batching, 'MAX_PENDING', 0)
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
    queue, grade = batching.BatchingQueue(grader), grader.grade
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
    for path in ('/', '/api', '/api/predict', '/docs'):
        refused = httpx.get(server_url + path, headers=dict(host='evil.example'))
        assert refused.status_code == 400 and 'evil.example' in refused.json()['error']
    reply = httpx.get(server_url + '/api')
    assert reply.json()['columns'][0] == 'file' and 'set-cookie' not in reply.headers
    assert reply.json()['example'].endswith(f'{server_url}/api/predict')
    assert not list(Path('.').glob('.sesskey'))


def test_a_port_in_use_is_an_error(toy, capsys):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen()
        command = ['serve', toy, '--port', s.getsockname()[1]]
        expect_error(capsys, command, 'cannot listen (', 'Choose another port with --port')
    expect_error(capsys, ['serve', toy, '--host', '192.0.2.1'], 'cannot listen (', 'Choose another address with --host')


def test_a_bad_port_is_an_error(toy, capsys):
    expect_error(capsys, ['serve', toy, '--port', 'x'], '--port', 'x is not')
    expect_error(capsys, ['serve', toy, '--port', '70000'], '--port 70000', '1 to 65535')


WORDS = 'Refer', 'Uncertain: refer', 'Do not refer', 'Not gradable: re-photograph', 'Cannot be read'


# Errors

@pytest.mark.parametrize('method, path, status', [
    ('GET', '/api/unknown', 404), ('GET', '/api/', 404), ('GET', '/nothing', 404), ('GET', '/api/predict', 405),
    ('DELETE', '/api', 405), ('POST', '/api/predict/', 404), ('PUT', '/api/patients', 405)])
def test_every_error_is_json(server_url, method, path, status):
    reply = httpx.request(method, server_url + path)
    assert reply.status_code == status and reply.headers['content-type'] == 'application/json'
    assert list(reply.json()) == ['error'] and reply.json()['error']
    assert "default-src 'none'" in reply.headers['content-security-policy']
    if status == 405: assert reply.headers['allow']


def served(app):
    "A client of an application, without a server"
    from starlette.testclient import TestClient
    return TestClient(app, base_url='http://localhost:8000', raise_server_exceptions=False)


def test_an_internal_error_is_json_and_tells_nothing_of_the_image(toy, image_paths, tmp_path):
    grader = load_grader(toy)
    grader.grade = lambda *args: 1 / 0
    log = RequestLog(str(tmp_path / 'log.jsonl'), names=True)
    with served(serve.get_app(grader, ['localhost'], log)) as client:
        reply = client.post('/api/predict', files=[upload(image_paths[0], 'secret.png')])
    assert reply.status_code == 500 and 'ZeroDivisionError' in reply.json()['error'] and 'secret' not in reply.text
    record = json.loads((tmp_path / 'log.jsonl').read_text())
    assert record['status'] == 500 and record['results'] == [] and record['error'] == 'Internal Server Error'


@pytest.mark.parametrize('header, name', [
    ('localhost:8000', 'localhost'), ('[::1]:8000', '::1'), ('[::1]', '::1'), ('a.b', 'a.b'), ('[::1', ''), ('', ''),
    ('LOCALHOST', 'localhost'), ('me@localhost', ''), ('localhost/a', ''), ('localhost?a', ''), ('localhost#a', ''),
    ('localhost"', ''), ("localhost'", ''), ('localhost:', ''), ('localhost:80a', ''), ('a:b@localhost:80', ''),
    ('localhost, localhost', ''), ('localhost\n', ''), ('::1', ''), ('löcalhost', '')])
def test_host_names_are_read_without_their_port(header, name):
    assert web.host_name(header) == name


@pytest.mark.parametrize('host', ['x@localhost', 'localhost:8000/x', 'a"><b', "a'b", 'localhost:x'])
def test_a_malformed_host_is_refused_even_where_every_name_is_served(toy, host):
    for hosts in (['localhost'], ['localhost', web.ADDRESSES]):
        with served(serve.get_app(load_grader(toy), hosts)) as client:
            reply = client.get('/api', headers=dict(host=host))
            assert reply.status_code == 400 and 'not served here' in reply.json()['error'], hosts


def test_a_page_for_every_network_serves_addresses_and_the_names_of_this_machine_only(toy):
    with served(serve.get_app(load_grader(toy), web.trusted_hosts('0.0.0.0'))) as client:
        def status(host): return client.get('/health', headers=dict(host=host, origin=f'http://{host}')).status_code
        own = '127.0.0.1:8000', '192.0.2.7:8000', '[2001:db8::1]:8000', 'localhost:8000', socket.gethostname()
        assert [status(host) for host in own] == [200] * 5
        foreign = 'evil.example:8000', '127.0.0.1.evil.example', '192.0.2', '127.1', '0x7f.1', '*'
        assert [status(host) for host in foreign] == [400] * 6


def test_a_proxy_may_pass_on_or_rewrite_the_host(toy):
    proxies = 'grader.clinic.org', 'other.clinic.org:8443'
    with served(serve.get_app(load_grader(toy), web.trusted_hosts('127.0.0.1'), proxies=proxies)) as client:
        def status(host, origin):
            return client.post('/api/patients', json=dict(rows=[]), headers=dict(host=host, origin=origin)).status_code
        for host in ('grader.clinic.org', 'GRADER.clinic.org', '127.0.0.1:8000', 'localhost'):
            for name in proxies: assert status(host, f'https://{name}') == 200, (host, name)
            foreign = ('https://evil.example', 'https://grader.clinic.org:8443', 'https://other.clinic.org', 'null',
                       'https://grader.clinic.org.evil.example')
            for origin in foreign: assert status(host, origin) == 403, (host, origin)
        assert status('www.clinic.org', 'https://grader.clinic.org') == 400


@pytest.mark.parametrize('name', ['https://grader.clinic.org', '*', 'a b', 'grader/x', ''])
def test_a_bad_allowed_host_is_an_error(toy, capsys, name):
    expect_error(capsys, ['serve', toy, '--allow-host', 'a.b', '--allow-host', name], f'--allow-host {name}'.strip(),
                 'such as grader.clinic.org')


def test_allowed_hosts_of_the_command_reach_the_application(toy, monkeypatch):
    apps = []
    monkeypatch.setattr(serve, 'run_server', lambda app, *_: apps.append(app))
    main(['serve', str(toy), '--allow-host', 'grader.clinic.org', '--allow-host', 'b.c'])
    with served(apps[0]) as client:
        for host in ('grader.clinic.org', 'b.c', 'localhost:8000'):
            assert client.get('/health', headers=dict(host=host)).status_code == 200


@pytest.mark.parametrize('origin, host, own', [
    ('http://localhost:8000', 'localhost:8000', True), ('http://LocalHost:8000', 'localhost:8000', True),
    ('http://[::1]:8000', '[::1]:8000', True), ('http://[::1]', '[::1]:80', True),
    ('http://clinic.example', 'clinic.example', True), ('https://clinic.example', 'clinic.example', True),
    ('https://clinic.example', 'clinic.example:443', True),
    ('https://clinic.example:8443', 'clinic.example:8443', True),
    ('http://localhost:8001', 'localhost:8000', False), ('http://localhost', 'localhost:8000', False),
    ('https://localhost', 'localhost:80', False), ('http://127.0.0.1:8000', 'localhost:8000', False),
    ('http://[::2]:8000', '[::1]:8000', False), ('http://evil.example', 'clinic.example', False),
    ('http://clinic.example.evil.example', 'clinic.example', False),
    ('http://x@clinic.example', 'clinic.example', False),
    ('http://clinic.example/', 'clinic.example', False), ('clinic.example', 'clinic.example', False),
    ('file://', 'localhost', False), ('ftp://localhost', 'localhost', False), ('null', 'null', False),
    ('null', 'localhost', False), ('', 'localhost', False), ('http://', '', False)])
def test_the_own_origin_has_host_and_port_of_the_request(origin, host, own):
    assert web.is_own_origin(origin, host) is own


def test_images_of_other_web_sites_are_not_graded(toy, image_paths, tmp_path):
    file = tmp_path / 'log.jsonl'
    with served(serve.get_app(load_grader(toy), ['localhost'], RequestLog(str(file)))) as client:
        def status(**headers):
            return client.post('/api/predict', files=[upload(image_paths[0])], headers=headers).status_code
        foreign = [{'Origin': 'https://evil.example'}, {'Origin': 'null'}, {'Origin': 'http://localhost:8001'},
                   {'Sec-Fetch-Site': 'cross-site'}]
        assert [status(**headers) for headers in foreign] == [403] * 4
        assert not file.exists() or not file.read_text()
        assert status(Origin='http://localhost:8000') == status() == 200
        link = {'Sec-Fetch-Site': 'cross-site', 'Sec-Fetch-Mode': 'navigate'}
        assert client.get('/', headers=link).status_code == 200        # a link on another page
        assert client.get('/api', headers=link).status_code == 403


def test_halves_of_surrogate_pairs_are_refused(toy):
    bodies = b'{"rows": [{"patient": "%s"}]}', b'{"rows": [{"%s": 1}]}', b'{"rows": [], "missing_eye": "%s"}'
    with served(serve.get_app(load_grader(toy), ['localhost'])) as client:
        def post(body): return client.post('/api/patients', content=body, headers={'content-type': 'application/json'})
        for text in (rb'\ud800', b'\xed\xa0\x80', rb'a\udc00b'):
            for body in bodies:
                reply = post(body % text)
                assert reply.status_code == 400 and 'Unicode' in reply.json()['error'], (text, body)
        assert post(b'{"rows": ' + b'[' * 100_000 + b']' * 100_000 + b'}').status_code == 400


@pytest.mark.parametrize('charset, name, words', [
    ('unicode_escape', rb'\ud800.png', 'no Unicode'), ('a\0b', b'a.png', 'charset')])
def test_names_of_files_in_odd_character_sets_are_refused(toy, charset, name, words):
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="' + name + b'"\r\n\r\nimage\r\n--x--\r\n'
    headers = {'content-type': f'multipart/form-data; boundary=x; charset={charset}'}
    with served(serve.get_app(load_grader(toy), ['localhost'])) as client:
        reply = client.post('/api/predict', content=body, headers=headers)
    assert reply.status_code == 400 and words in reply.json()['error']


# What the API says of itself

def test_the_example_names_the_address_that_was_asked(toy):
    with served(serve.get_app(load_grader(toy), [web.ADDRESSES], proxies=['clinic.example'])) as client:
        for url in ('https://clinic.example:8443', 'http://192.0.2.7:9000'):
            client.base_url = url
            assert client.get('/api').json()['example'].endswith(f' {url}/api/predict')
            assert f'{url}/api/predict' in client.get('/').text and f'{url}/api/predict' in client.get('/docs').text
            assert client.get('/openapi.json').json()['servers'] == [dict(url=url)]
        behind = {'X-Forwarded-Prefix': '/dr/'}
        assert client.get('/openapi.json', headers=behind).json()['servers'] == [dict(url=f'{url}/dr')]
        assert client.get('/api', headers=behind).json()['docs'] == f'{url}/dr/docs'
        assert f'{url}/dr/api/predict' in client.get('/', headers=behind).text
        assert client.get('/api', headers={'X-Forwarded-Prefix': 'x; rm'}).json()['docs'] == f'{url}/docs'
    assert web.server_url('::1', 8000) == 'http://[::1]:8000'
    assert web.server_url('0.0.0.0', 8000) == f'http://{socket.gethostname()}:8000'


def check(value, schema, schemas, where='answer'):
    "Compare a value with its schema: types, enums, limits, and exactly the documented properties"
    if '$ref' in schema: return check(value, schemas[schema['$ref'].rpartition('/')[2]], schemas, where)
    if 'anyOf' in schema:
        for part in schema['anyOf']:
            with contextlib.suppress(AssertionError): return check(value, part, schemas, where)
        raise AssertionError(f'{where}: fits none')
    types = [schema['type']] if isinstance(schema['type'], str) else schema['type']
    known = dict(string=str, number=(int, float), integer=int, boolean=bool, object=dict, array=list, null=type(None))
    assert any(isinstance(value, known[t]) for t in types), f'{where}: {value!r} is no {types}'
    if 'enum' in schema: assert value in schema['enum'], f'{where}: {value!r}'
    if value is not None and 'maximum' in schema: assert schema['minimum'] <= value <= schema['maximum'], where
    if isinstance(value, dict) and 'maxProperties' in schema: assert len(value) <= schema['maxProperties'], where
    if isinstance(value, dict) and 'properties' in schema:
        assert set(schema['required']) <= set(value), where
        if schema.get('additionalProperties') is False: assert set(value) <= set(schema['properties']), where
        for name, part in schema['properties'].items():
            if name in value: check(value[name], part, schemas, f'{where}.{name}')
    if isinstance(value, list) and 'items' in schema:
        for i, part in enumerate(value): check(part, schema['items'], schemas, f'{where}[{i}]')


def test_the_openapi_document_describes_the_answers_that_are_given(server_url, image_paths, tmp_path):
    document = httpx.get(server_url + '/openapi.json').json()
    schemas = document['components']['schemas']
    assert document['openapi'] == '3.1.0' and document['info']['version']
    assert document['servers'] == [dict(url=server_url)]
    bad = tmp_path / 'bad.png'
    bad.write_bytes(b'no image')
    graded = post_images(server_url, *image_paths[:2], bad, data=dict(heatmap='1'))
    rows = [dict(row, patient='a', eye='left') for row in graded.json()['rows']]
    paired = httpx.post(server_url + '/api/patients', json=dict(rows=rows))
    gets = {path: httpx.get(server_url + path) for path, o in document['paths'].items() if 'get' in o}
    answers = {'/api/predict': graded, '/api/patients': paired, **gets}
    assert set(answers) == set(document['paths'])
    for path, reply in answers.items():
        operation, = document['paths'][path].values()
        assert reply.status_code == 200 and operation['summary'] and operation['operationId']
        check(reply.json(), operation['responses']['200']['content']['application/json']['schema'], schemas)
    check(dict(rows=rows), schemas['PatientsRequest'], schemas)
    assert list(schemas['Image']['properties'])[:len(COLUMNS)] == COLUMNS
    assert set(schemas['Image']['properties']) == set(graded.json()['rows'][0])
    refused = httpx.get(server_url + '/api/predict')
    check(refused.json(), document['paths']['/api/predict']['post']['responses']['405']['content']['application/json'][
        'schema'], schemas)


def test_every_reference_of_the_document_leads_to_a_schema_and_every_field_has_a_meaning(toy):
    document = openapi_document(about.describe_model(load_grader(toy), 'http://localhost/'), 'http://localhost/')
    schemas, names = document['components']['schemas'], []

    def walk(o):
        if isinstance(o, list): [walk(part) for part in o]
        if not isinstance(o, dict): return
        if '$ref' in o: names.append(o['$ref'].removeprefix('#/components/schemas/'))
        [walk(part) for part in o.values()]
    walk(document)
    assert set(names) == set(schemas)
    for schema in schemas.values():
        for name, field in schema['properties'].items(): assert '$ref' in field or field['description'], name
    upload_schema = document['paths']['/api/predict']['post']['requestBody']['content']['multipart/form-data']['schema']
    assert upload_schema['required'] == ['files'] and upload_schema['properties']['files']['type'] == 'array'


def test_the_documentation_page_shows_every_path_and_field_and_loads_nothing(server_url):
    text, document = httpx.get(server_url + '/docs').text, httpx.get(server_url + '/openapi.json').json()
    for path in document['paths']: assert f'<code>{path}</code>' in text
    for schema in document['components']['schemas'].values():
        for name in schema['properties']: assert f'<code>{name}</code>' in text
    others = text.replace(server_url, '')
    assert 'http://' not in others and 'https://' not in others and '<script' not in text


def test_api_describes_operating_points_and_what_made_the_grades(server_url, toy, image_paths):
    described, model = httpx.get(server_url + '/api').json(), load_grader(toy).model
    assert described['digests'] == model.digests and described['key'] == model.key
    assert (described['backend'], described['precision'], described['prevalence']) == ('torch', 'f32', None)
    assert [o['threshold'] for o in described['operating_points']] == [o.threshold for o in model.decision.points]
    reply = post_images(server_url, image_paths[0]).json()
    assert reply['audit']['digests'] == model.digests and reply['audit']['precision'] == 'f32'
    assert datetime.fromisoformat(reply['audit']['time']).utcoffset().total_seconds() == 0
    sha256 = hashlib.sha256(Path(image_paths[0]).read_bytes()).hexdigest()
    assert reply['rows'][0]['image_sha256'] == sha256


def test_an_operating_point_as_a_sentence():
    figure = dict(value=.9123, interval=[.87, .94], images=180, reason='')
    nothing = dict(value=None, interval=None, images=0, reason='no images')
    point = OperatingPoint(2, 'sensitivity', .9, 1.534, 'scores of 480 images', figure, nothing)
    assert about.point_text(point) == (
        'referable (grade 2 or above) from score 1.53, chosen for sensitivity 0.90 on scores of 480 images. '
        'Cross-fitted (each image by a threshold that was chosen on other images): '
        'sensitivity 0.912 (0.87–0.94) on 180 images; specificity unknown (no images)')
    assert about.point_text(OperatingPoint(3, 'threshold', 2.5, 2.5)) == (
        'sight-threatening (grade 3 or above) from score 2.50')


# Patients

def image_row(file, decision, patient='', eye='', grade=None, p=None, ungradable=''):
    answers = dict.fromkeys(('referable', 'sight_threatening'), 'no' if decision == 'do not refer' else '')
    if decision == 'refer': answers = dict(referable='yes', sight_threatening='no')
    return dict(file=file, decision=decision, patient=patient, eye=eye, grade=grade, p_referable=p,
                ungradable=ungradable, **answers)


ROWS = [
    image_row('a1', 'do not refer', 'a', 'OD', 0, .1), image_row('b1', 'do not refer', 'b', 'left', 1, .2),
    image_row('a2', 'refer', 'a', 'os', 3, .9), image_row('c1', 'do not refer', 'c', 'L', 0, .1),
    image_row('c2', 'not gradable', 'c', 'R', None, None, 'blurred'), image_row('x', 'refer', grade=2, p=.7),
    image_row('y', 'do not refer', grade=0, p=.05)]


def test_patients_get_the_result_of_the_worse_eye(server_url):
    reply = httpx.post(server_url + '/api/patients', json=dict(rows=ROWS)).json()
    assert [(p['patient'], p['decision'], p['rows']) for p in reply['patients']] == [
        ('a', 'refer', [0, 2]), ('b', 'not gradable', [1]), ('c', 'not gradable', [3, 4]), ('image x', 'refer', [5]),
        ('image y', 'do not refer', [6])]
    a, b, c = reply['patients'][:3]
    assert (a['right_grade'], a['left_grade'], a['grade'], a['p_referable']) == (0, 3, 3, .9)
    assert b['missing'] == 'right' and c['ungradable'] == 'right: blurred'
    assert reply['counts'] == {
        'patients': 5, 'refer': 2, 'uncertain: refer': 0, 'do not refer': 1, 'not gradable': 2}
    other = httpx.post(server_url + '/api/patients', json=dict(rows=ROWS, missing_eye='ignore')).json()
    decisions = [p['decision'] for p in other['patients']]
    assert decisions == ['refer', 'do not refer', 'do not refer', 'refer', 'do not refer']
    assert httpx.post(server_url + '/api/patients', json=dict(rows=[])).json()['counts']['patients'] == 0


def test_patients_of_the_endpoint_are_those_of_predict(toy, server_url, image_paths):
    paths = image_paths[:6]
    df = load_grader(toy).predict(paths)
    df = df.assign(patient=['p', 'p', 'q', 'q', 'r', ''], eye=['left', 'right', 'left', 'left', '', ''])
    expected = patient_table(df)
    rows = post_images(server_url, *paths).json()['rows']
    rows = [dict(row, patient=p, eye=e, file=f) for row, p, e, f in zip(rows, df.patient, df.eye, df.file, strict=True)]
    found = pd.DataFrame(httpx.post(server_url + '/api/patients', json=dict(rows=rows)).json()['patients'])
    for column in ('patient', 'images', 'decision', 'referable', 'missing', 'ungradable'):
        assert found[column].tolist() == expected[column].tolist(), column


@pytest.mark.parametrize('body, status, words', [
    ([], 400, 'rows'), (dict(rows=[1]), 400, 'rows[0]'), (dict(rows=[dict(eye='up')]), 400, 'rows[0].eye'),
    (dict(rows=[dict(decision='maybe')]), 400, 'rows[0].decision'), (dict(rows=[dict(grade=5)]), 400, 'rows[0].grade'),
    (dict(rows=[dict(grade=1.5)]), 400, 'rows[0].grade'), (dict(rows=[dict(p_referable='x')]), 400, 'p_referable'),
    (dict(rows=[dict(file=3)]), 400, 'rows[0].file'), (dict(rows=[], missing_eye='no'), 400, 'missing_eye'),
    (dict(rows=[{}] * (pairing.MAX_ROWS + 1)), 413, 'rows')])
def test_what_cannot_be_paired_is_named(server_url, body, status, words):
    reply = httpx.post(server_url + '/api/patients', json=body)
    assert reply.status_code == status and words in reply.json()['error']


def test_patients_are_asked_for_in_json(server_url):
    url = server_url + '/api/patients'
    assert httpx.post(url, content=b'{"rows": []}', headers={'content-type': 'text/plain'}).status_code == 415
    broken = httpx.post(url, content=b'{"rows"', headers={'content-type': 'application/json'})
    assert broken.status_code == 400 and 'JSON' in broken.json()['error']


# The request log

def logged_requests(toy, file, image_paths, **options):
    "The records of a log after a request with an image and a text, and one that fails"
    with served(serve.get_app(load_grader(toy), ['localhost'], RequestLog(str(file), **options))) as client:
        letter = 'files', ('letter.png', b'dear doctor')
        client.post('/api/predict', files=[upload(image_paths[0], 'anna.png'), letter])
        client.post('/api/predict', content=b'x', headers={'content-type': 'text/plain'})
        client.get('/api')
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_log_has_a_line_for_each_request_without_images_and_names(toy, image_paths, tmp_path):
    first, second = logged_requests(toy, tmp_path / 'log.jsonl', image_paths)
    row = load_grader(toy).predict(image_paths[0]).iloc[0]
    image, letter = first['results']
    assert image['image_sha256'] == hashlib.sha256(Path(image_paths[0]).read_bytes()).hexdigest()
    assert (image['grade'], image['decision']) == (row.grade, row.decision)
    assert image['score'] == pytest.approx(row.score, abs=1e-3)
    assert 'unknown image format' in letter['error'] and letter['grade'] is None
    assert first['status'] == 200 and first['images'] == 2 and 0 < first['seconds'] < 60
    assert first['model'] == load_grader(toy).model.key and first['precision'] == 'f32'
    assert datetime.fromisoformat(first['time']).utcoffset().total_seconds() == 0
    assert second['status'] == 415 and second['error'] == 'Unsupported Media Type' and second['images'] == 0
    text = (tmp_path / 'log.jsonl').read_text()
    assert 'anna' not in text and 'letter.png' not in text and 'base64' not in text
    assert stat.S_IMODE((tmp_path / 'log.jsonl').stat().st_mode) == 0o600


def test_a_log_that_others_could_read_becomes_private_or_a_line_says_that_it_cannot(tmp_path, monkeypatch, capsys):
    file = tmp_path / 'log.jsonl'
    file.write_text('{}\n')
    file.chmod(0o644)
    with monkeypatch.context() as patch:
        def refuse(*args): raise PermissionError(1, 'Operation not permitted')     # a file of another owner
        patch.setattr(os, 'fchmod', refuse)
        RequestLog(str(file)).close()
    assert 'others may read this file' in ' '.join(capsys.readouterr().out.split())
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    RequestLog(str(file)).close()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and file.read_text() == '{}\n'
    mode = os.stat(os.devnull).st_mode
    RequestLog(os.devnull).close()                             # no file: it stays as it is
    assert os.stat(os.devnull).st_mode == mode and capsys.readouterr().out == ''


def test_the_log_names_files_if_asked_and_is_appended_to(toy, image_paths, tmp_path):
    logged_requests(toy, tmp_path / 'log.jsonl', image_paths)
    records = logged_requests(toy, tmp_path / 'log.jsonl', image_paths, names=True)
    assert len(records) == 4 and [r['file'] for r in records[2]['results']] == ['anna.png', 'letter.png']
    assert 'file names' in RequestLog(str(tmp_path / 'log.jsonl'), names=True).describe()


def test_no_grade_leaves_without_its_line_in_the_log(toy, image_paths, tmp_path, monkeypatch):
    log = RequestLog(str(tmp_path / 'log.jsonl'))

    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(log, 'write', full)
    with served(serve.get_app(load_grader(toy), ['localhost'], log)) as client:
        reply = client.post('/api/predict', files=[upload(image_paths[0])])
    assert reply.status_code == 500 and 'No space left' in reply.json()['error'] and 'rows' not in reply.json()


def write_line(log, toy): log.write(audit_record(load_grader(toy)), 200, 1., [])


def test_a_log_that_was_moved_away_is_begun_again(toy, tmp_path):
    file = tmp_path / 'log.jsonl'
    log = RequestLog(str(file))
    write_line(log, toy)
    file.rename(tmp_path / 'log.1')
    write_line(log, toy)
    file.unlink()
    for _ in range(2): write_line(log, toy)
    assert len((tmp_path / 'log.1').read_text().splitlines()) == 1
    assert len(file.read_text().splitlines()) == 2 and stat.S_IMODE(file.stat().st_mode) == 0o600
    file.unlink()
    file.mkdir()
    with pytest.raises(OSError): write_line(log, toy)
    file.rmdir()
    write_line(log, toy)
    assert len(file.read_text().splitlines()) == 1


def test_a_line_of_which_a_part_fits_on_the_disk_is_an_error_and_the_next_one_is_whole(toy, tmp_path, monkeypatch):
    file, write = tmp_path / 'log.jsonl', os.write
    log = RequestLog(str(file))
    with monkeypatch.context() as patch:
        patch.setattr(os, 'write', lambda fd, data: write(fd, data[:20]))
        with pytest.raises(OSError, match='No space left'): write_line(log, toy)
    write_line(log, toy)
    torn, whole = file.read_text().splitlines()
    assert len(torn) == 20 and json.loads(whole)['status'] == 200
    with file.open('a') as f: f.write('{"time"')                            # of another server, or before a restart
    write_line(log, toy)
    write_line(RequestLog(str(file)), toy)
    assert [json.loads(line)['status'] for line in file.read_text().splitlines()[3:]] == [200, 200]


def test_a_log_that_cannot_be_written_stops_the_server_at_its_start(toy, tmp_path, capsys):
    with pytest.raises(AptosError, match='--log .*cannot write this file'): RequestLog(str(tmp_path))
    expect_error(capsys, ['serve', toy, '--log', tmp_path / 'none' / 'log.jsonl'], '--log', 'Choose another one')
    expect_error(capsys, ['serve', toy, '--log-names'], '--log-names', '--log FILE')
    expect_error(capsys, ['serve', toy, '--prevalence', '2'], 'prevalence 2')


@pytest.fixture
def clinic(server_url, browser):
    "A function that opens the page in a window of a width; no error and no other host is allowed"
    requests, errors, pages = [], [], []

    def open_page(width=1100):
        page = browser.new_page(viewport=dict(width=width, height=800))
        page.on('request', lambda r: requests.append(r.url))
        page.on('pageerror', lambda e: errors.append(str(e)))
        page.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
        page.goto(server_url)
        pages.append(page)
        return page
    yield open_page
    for page in pages: page.close()
    assert not errors
    assert all(url.startswith((server_url, 'data:', 'blob:')) for url in requests)


def grade_on(page, *files):
    "Choose files on the page and wait until all are graded and shown"
    before = page.locator('.result').count()
    page.set_input_files('#files', [str(f) for f in files])
    page.wait_for_selector('#busy', state='hidden')
    page.locator('.result').nth(before + len(files) - 1).wait_for()
    page.wait_for_timeout(400)                                         # the list is drawn soon after the last answer


def download(page, button):
    "The text of a file that a button saves"
    with page.expect_download() as saved: page.click(button)
    return Path(saved.value.path()).read_text()


@pytest.fixture
def pair_of_eyes(image_paths, tmp_path):
    "Files: both eyes of patient 12, one of 13, an image without a patient, a letter and an image without a retina"
    names = ['12_left.png', '12_right.png', '13_OD.png', 'other.png']
    for name, path in zip(names, image_paths, strict=False): shutil.copy(path, tmp_path / name)
    (tmp_path / 'letter.png').write_bytes(b'dear doctor')
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'noise.png'), noise)
    return [tmp_path / name for name in (*names, 'letter.png', 'noise.png')]


@pytest.mark.browser
@pytest.mark.parametrize('width', [1100, 390])
def test_a_person_grades_images(clinic, image_paths, tmp_path, width):
    letter = tmp_path / 'letter.png'
    letter.write_bytes(b'dear doctor')
    page = clinic(width)
    page.keyboard.press('Tab')
    assert page.evaluate('document.activeElement.id') == 'files'       # the keyboard is enough
    grade_on(page, *image_paths[:2], letter)
    assert 'unknown image format' in page.inner_text('.result.error')
    first = page.locator('.result').first
    assert first.locator('h3').inner_text() in WORDS[:-1]
    text = download(page, '#csv')
    assert text.splitlines()[0] == ','.join(COLUMNS) and len(text.splitlines()) == 4 and 'letter.png' in text
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    folder = os.environ.get('SHOTS', str(tmp_path))
    page.screenshot(path=f'{folder}/serve-{width}.png', full_page=True)
    page.click('#clear')
    assert page.locator('.result').count() == 0


@pytest.mark.browser
def test_the_saved_csv_holds_the_rows_of_predict(clinic, image_paths, toy, tmp_path):
    page = clinic()
    grade_on(page, *image_paths[:4])
    (tmp_path / 'page.csv').write_text(download(page, '#csv'))
    load_grader(toy).predict(image_paths[:4]).to_csv(tmp_path / 'predict.csv', index=False, float_format='%.4f')
    saved, expected = pd.read_csv(tmp_path / 'page.csv'), pd.read_csv(tmp_path / 'predict.csv')
    assert list(saved) == list(expected)
    for column in COLUMNS:
        if column == 'file': continue
        if pd.api.types.is_float_dtype(expected[column]):
            assert np.allclose(saved[column], expected[column], atol=2e-3, equal_nan=True), column
        else: assert saved[column].fillna('').tolist() == expected[column].fillna('').tolist(), column
    record = json.loads(download(page, '#json'))
    assert [row['image_sha256'] for row in record['rows']] == saved.image_sha256.tolist()
    assert record['rows'][0]['audit']['digests'] == load_grader(toy).model.digests


def graded_row(page, **values):
    "The texts of a card that the page draws for a row with these values"
    row = dict(file='a.png', score=1.2, grade=1, grade_name='mild', decision='do not refer', referable='no',
               sight_threatening='no', referable_high_specificity='', p_referable=.1, p_sight_threatening=.01, p_0=.4,
               p_1=.5, p_2=.09, p_3=.005, p_4=.005, ungradable='', score_sd=.1, grade_low=1, grade_high=1, flags='',
               image_sha256='0', error='') | values
    return page.evaluate('''row => {
        const card = createCard({ id: 99, row });
        document.body.append(card);
        const text = card.innerText + ' ' + card.querySelector('.score')?.ariaLabel;
        card.remove();
        return text; }''', row)


@pytest.mark.browser
def test_a_card_says_what_the_decision_rests_on(clinic):
    page = clinic()
    point = page.evaluate("about.operating_points.find(o => o.name == 'referable').threshold")
    plain = graded_row(page)
    assert plain.startswith('Do not refer') and 'Mild (grade 1)' in plain and '10\u00a0%' in plain
    assert f'refer from {point:.2f}' in plain and 'score 1.20' in plain and 'aution' not in plain
    assert 'Uncertain: prediction set reaches grade 2.' in graded_row(page, grade_high=2, p_referable=.3)
    assert 'below the operating point: the decision counts' in graded_row(page, grade=2, grade_name='moderate')
    referred = graded_row(page, decision='refer', referable='yes')
    assert referred.startswith('Refer') and 'has reached the operating point: the decision counts' in referred
    uncertain = graded_row(page, decision='uncertain: refer', referable='yes', grade_high=3)
    assert uncertain.startswith('Uncertain: refer') and 'prediction set: grades 1 to 3' in uncertain
    assert 'At high specificity: do not refer.' in graded_row(page, referable_high_specificity='no')
    assert 'robability' not in graded_row(page, p_referable=None, p_sight_threatening=None, p_0=None)
    ungradable = graded_row(page, decision='not gradable', ungradable='blurred', grade=None, grade_low=None)
    assert ungradable.startswith('Not gradable: re-photograph') and 'No grade: blurred.' in ungradable


@pytest.mark.browser
def test_eyes_are_paired_sorted_and_filtered(clinic, pair_of_eyes):
    page = clinic()
    grade_on(page, *pair_of_eyes)
    assert page.is_checked('#pair')
    headings = page.locator('.patient header h2').all_inner_texts()
    assert headings == ['Patient 12', 'Patient 13']
    pair = page.locator('.patient').first
    assert pair.locator('.file').all_inner_texts() == ['12_right.png', '12_left.png']      # as if facing the patient
    assert 'missing: left eye' in page.locator('.patient').nth(1).locator('header').inner_text()
    assert page.locator('#summary button').first.inner_text().split() == ['4', 'All', 'patients']
    assert '6 images' in page.inner_text('#summary')
    rows = download(page, '#patients_csv').splitlines()
    assert rows[0] == ','.join(PATIENT_COLUMNS) and len(rows) == 5
    page.uncheck('#pair')
    page.wait_for_selector('.patient', state='detached')
    assert page.locator('#summary button').first.inner_text().split() == ['6', 'All', 'images']
    page.select_option('#sort', 'file')
    page.wait_for_timeout(300)
    files = page.locator('.file').all_inner_texts()
    assert files == ['12_left.png', '12_right.png', '13_OD.png', 'letter.png', 'noise.png', 'other.png']
    page.select_option('#sort', 'decision')
    page.wait_for_timeout(300)
    places = [WORDS.index(text) for text in page.locator('.result h3').all_inner_texts()]
    assert places == sorted(places)
    page.get_by_role('button', name='Errors').click()
    page.wait_for_timeout(300)
    assert page.locator('.file').all_inner_texts() == ['letter.png']
    page.get_by_role('button', name='All').click()
    page.fill('#search', '12_')
    page.wait_for_timeout(300)
    assert page.locator('.result').count() == 2


def chips(page):
    "The counts above the results: words -> number"
    texts = page.locator('#summary button').all_inner_texts()
    return {' '.join(words): int(n) for n, *words in (text.split() for text in texts)}


@pytest.mark.browser
def test_the_saved_patients_are_those_of_patient_table(clinic, pair_of_eyes, toy):
    page = clinic()
    grade_on(page, *pair_of_eyes)
    saved = pd.read_csv(io.StringIO(download(page, '#patients_csv')))
    df = load_grader(toy).predict([str(file) for file in pair_of_eyes if file.name != 'letter.png'])
    df = df.assign(file=df.file.map(lambda file: Path(file).name), patient=['12', '12', '13', '', ''],
                   eye=['left', 'right', 'right', '', ''])
    expected = pd.read_csv(io.StringIO(patient_table(df).to_csv(index=False)))
    assert list(saved) == PATIENT_COLUMNS and saved.images.tolist() == [2, 1, 1, 1]
    close = saved.pop('p_referable'), expected.pop('p_referable')
    assert np.allclose(*close, atol=2e-3, equal_nan=True)
    pd.testing.assert_frame_equal(saved, expected)


@pytest.mark.browser
def test_chips_name_their_unit_and_a_text_is_no_patient(clinic, pair_of_eyes):
    page = clinic()
    grade_on(page, *pair_of_eyes)
    paired = chips(page)
    assert list(paired) == ['All patients', 'Refer', 'Do not refer', 'Not gradable or incomplete', 'Errors (files)']
    decided = [n for words, n in paired.items() if words not in ('All patients', 'Errors (files)')]
    assert paired['All patients'] == sum(decided) == 4 and paired['Errors (files)'] == 1
    assert 'letter.png' not in download(page, '#patients_csv')
    assert 'letter.png' in page.locator('.file').all_inner_texts()     # it is still shown
    page.uncheck('#pair')
    page.wait_for_selector('.patient', state='detached')
    single = chips(page)
    assert single['All images'] == 6 and sum(single.values()) == 12


@pytest.mark.browser
def test_a_patient_without_an_image_of_an_eye_is_incomplete(clinic):
    expected = {                             # decision, missing, ungradable: words
        ('not gradable', 'right', ''): 'Incomplete: photograph the right eye',
        ('not gradable', 'left', ''): 'Incomplete: photograph the left eye',
        ('not gradable', 'left right', ''): 'Incomplete: photograph both eyes',
        ('not gradable', 'left', 'right: blurred'): 'Not gradable: photograph both eyes',
        ('not gradable', '', 'right: blurred'): 'Not gradable: re-photograph',
        ('refer', 'right', ''): 'Refer'}
    page = clinic()
    found = {key: page.evaluate('patientWords', dict(zip(('decision', 'missing', 'ungradable'), key, strict=True)))
             for key in expected}
    assert found == expected


@pytest.mark.browser
def test_a_doubtful_do_not_refer_asks_for_a_look(clinic):
    cases = [
        (dict(p_referable=.43), 'Probability of referable retinopathy 43\u00a0%: look at the image.'),
        (dict(p_referable=.2), 'Probability of referable retinopathy 20\u00a0%: look at the image.'),
        (dict(p_referable=.19), ''), (dict(p_referable=.9, decision='refer'), ''), (dict(p_referable=None), ''),
        (dict(p_referable=.05, grade_high=3),
         'Probability of referable retinopathy 5\u00a0%, but the prediction set reaches grade 3: look at the image.')]
    page = clinic()
    for values, text in cases:
        row = dict(decision='do not refer', grade_high=1) | values
        assert page.evaluate("row => lookCaution(row)?.textContent ?? ''", row) == text, values


@pytest.mark.browser
@pytest.mark.parametrize('width', [1100, 390])
def test_all_grades_are_named_where_no_line_crosses(clinic, image_paths, width):
    page = clinic(width)
    grade_on(page, image_paths[0])
    boxes = page.evaluate("""() => {
        const box = node => { const { left, right, top, bottom } = node.getBoundingClientRect();
          return [left, right, top, bottom]; };
        const all = selector => [...document.querySelector('.score').querySelectorAll(selector)];
        return { texts: all('.names span, .numbers span').map(box), lines: all('.point, .needle, .marker').map(box),
          names: all('.names span').map(node => node.innerText),
          numbers: all('.numbers span').map(node => node.innerText) }; }""")
    assert boxes['names'] == ['0 no DR', '1 mild', '2 moderate', '3 severe', '4 proliferative']
    assert boxes['numbers'] == ['0', '1', '2', '3', '4'] and len(boxes['lines']) >= 2
    for left, right, top, bottom in boxes['texts']:
        assert 0 <= left < right <= width and top < bottom
        for x0, x1, y0, y1 in boxes['lines']: assert x1 <= left or right <= x0 or y1 <= top + 1 or bottom - 1 <= y0


@pytest.mark.browser
def test_a_heat_map_that_shows_nothing_says_so(clinic, image_paths):
    page = clinic()
    grade_on(page, image_paths[0])
    show = """colour => {
        const canvas = element('canvas', { width: 8, height: 8 });
        const context = canvas.getContext('2d');
        context.fillStyle = colour;
        context.fillRect(0, 0, 8, 8);
        const result = [...results.values()][0];
        Object.assign(result, { heatmap: canvas.toDataURL(), canvas: null });
        Object.assign(result.row, { ungradable: '', error: '' });
        const card = createCard(result);
        document.body.append(card);
        return showHeat(card, true).then(() => card.querySelector('.legend').innerText); }"""
    def words(colour): return page.evaluate(show, colour)
    assert words('#000') == 'No region raised the score.'
    assert 'raises the score more' in words('#fff')


def tagged(file, pixels, patient, side, **tags):
    "Write a DICOM file of a patient's eye"
    return write_dicom(file, cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), PatientID=patient, ImageLaterality=side, **tags)


@pytest.fixture
def tagged_images(image_paths, tmp_path):
    "DICOM files: both eyes of P7, named as if of others, and one of P8"
    pixels = [cv2.imread(str(path)) for path in image_paths[:3]]
    return [tagged(tmp_path / name, im, *who) for name, im, who in zip(
        ('1_left.dcm', '2_left.dcm', 'c.dcm'), pixels, (('P7', 'R'), ('P7', 'L'), ('P8', 'L')), strict=True)]


def test_dicom_uploads_carry_patient_and_eye_and_no_name(server_url, tagged_images, image_paths, tmp_path):
    other = tagged(tmp_path / 'd.dcm', cv2.imread(str(image_paths[0])), 'P8', 'L', IssuerOfPatientID='clinic A')
    bare = write_dicom(tmp_path / 'e.dcm', cv2.imread(str(image_paths[0])), PatientID='unknown')
    reply = post_images(server_url, *tagged_images, other, bare, image_paths[0])
    found = [(row['patient'], row['issuer'], row['eye']) for row in reply.json()['rows']]
    assert found == [('P7', None, 'right'), ('P7', None, 'left'), ('P8', None, 'left'), ('P8', 'clinic A', 'left'),
                     (None, None, None), (None, None, None)]
    assert 'JANE' not in reply.text and 'DOE' not in reply.text and '19500131' not in reply.text
    rows = reply.json()['rows'][2:3]                                   # as they are: one eye makes no patient
    patient, = httpx.post(server_url + '/api/patients', json=dict(rows=rows)).json()['patients']
    assert patient['patient'] == 'P8' and patient['missing'] == 'right' and patient['decision'] != 'do not refer'
    schemas = httpx.get(server_url + '/openapi.json').json()['components']['schemas']
    for row in reply.json()['rows']: check(row, schemas['Image'], schemas)
    check(dict(rows=reply.json()['rows']), schemas['PatientsRequest'], schemas)


@pytest.mark.browser
def test_the_page_pairs_dicom_images_by_their_tags(clinic, tagged_images, image_paths, tmp_path):
    other = tagged(tmp_path / 'd.dcm', cv2.imread(str(image_paths[0])), 'P8', 'R', IssuerOfPatientID='clinic A')
    page = clinic()
    grade_on(page, *tagged_images)
    assert page.is_checked('#pair')
    assert page.locator('.patient header h2').all_inner_texts() == ['Patient P7', 'Patient P8']
    first, second = page.locator('.patient').all()
    assert first.locator('.file').all_inner_texts() == ['1_left.dcm', '2_left.dcm']         # right eye, left eye
    header = second.locator('header').inner_text()
    assert 'missing: right eye' in header
    if 'Refer' not in header: assert 'Incomplete: photograph the right eye' in header
    page.reload()
    page.wait_for_selector('.patient header h2')
    assert page.locator('.patient header h2').all_inner_texts() == ['Patient P7', 'Patient P8']
    assert page.inner_text('#status') == '3 results from before the reload.'
    grade_on(page, other)                                              # of another issuer: another patient
    titles = page.locator('.patient header h2').all_inner_texts()
    assert titles == ['Patient P7', 'Patient P8', 'Patient P8 (clinic A)']


@pytest.mark.parametrize('names', [None, False, True])
def test_page_and_documentation_say_what_the_log_keeps(toy, tmp_path, names):
    log = None if names is None else RequestLog(str(tmp_path / 'log.jsonl'), names)
    with served(serve.get_app(load_grader(toy), ['localhost'], log)) as client:
        page, docs, described = client.get('/').text, client.get('/docs').text, client.get('/openapi.json').json()
    text = described['paths']['/api/predict']['post']['description']
    assert text in docs
    assert (text == 'Nothing is kept on the server.') == (log is None)
    for told in (page, text):
        assert ('SHA-256, grade, decision and score, but no image' in told) == (log is not None)
        assert ('file names, SHA-256' in told) == bool(names)


def test_figures_of_operating_points_are_called_cross_fitted_everywhere(server_url):
    for path in ('/', '/docs', '/openapi.json', '/api'):
        assert 'held-out' not in httpx.get(server_url + path).text, path
    assert 'cross-fitted (each image by a threshold' in httpx.get(server_url + '/docs').text


@pytest.mark.browser
def test_results_survive_a_reload_until_they_are_cleared(clinic, pair_of_eyes):
    page = clinic()
    grade_on(page, *pair_of_eyes)
    texts, csv = page.locator('.result h3').all_inner_texts(), download(page, '#csv')
    page.reload()
    page.wait_for_selector('.result')
    assert page.locator('.result h3').all_inner_texts() == texts and download(page, '#csv') == csv
    assert page.locator('.result img').count() == 5                    # all but the letter
    page.click('#clear')
    page.reload()
    page.wait_for_timeout(300)
    assert page.locator('.result').count() == 0
    assert page.evaluate("Object.keys(sessionStorage).filter(key => /result|image|model/.test(key))") == []


@pytest.mark.browser
def test_results_of_another_model_are_not_mixed_with_new_ones(clinic, pair_of_eyes):
    page = clinic()
    grade_on(page, pair_of_eyes[0])
    page.evaluate('''const kept = JSON.parse(sessionStorage.getItem('model')); kept.digests.model = 'other';
        sessionStorage.setItem('model', JSON.stringify(kept))''')
    page.reload()
    page.wait_for_selector('.result')
    assert 'another model' in page.inner_text('#notice') and page.is_disabled('#files')
    page.click('#clear')
    assert not page.is_visible('#notice') and page.is_enabled('#files')


@pytest.mark.browser
def test_the_queue_stops_after_the_image_at_work(clinic, image_paths):
    page = clinic()
    page.route('**/api/predict', lambda route: (page.wait_for_timeout(150), route.continue_()))
    page.set_input_files('#files', image_paths[:8])
    page.wait_for_selector('.result')
    page.click('#cancel')
    page.wait_for_selector('#busy', state='hidden')
    page.wait_for_timeout(400)
    n = page.locator('.result').count()
    assert 1 <= n < 8 and f'{8 - n} images of 8 not graded' in page.inner_text('#status')
    page.unroute('**/api/predict')
    grade_on(page, image_paths[0])
    assert page.locator('.result').count() == n + 1


@pytest.mark.browser
def test_the_keyboard_moves_shows_heat_maps_and_enlarges(clinic, image_paths):
    page = clinic()
    grade_on(page, *image_paths[:3])
    def focused(): return page.evaluate("document.activeElement.querySelector('.file')?.textContent")
    names = [Path(p).name for p in image_paths[:3]]
    page.keyboard.press('j')
    assert focused() == names[0]
    page.keyboard.press('j')
    page.keyboard.press('ArrowDown')
    assert focused() == names[2]
    page.keyboard.press('k')
    assert focused() == names[1]
    card = page.locator('.result').nth(1)
    if card.locator('.heatmap').count():
        page.keyboard.press('h')
        card.locator('canvas').wait_for()
        assert 'raises the score more' in card.inner_text()
        card.locator('.strength').fill('20')
        assert card.locator('canvas').evaluate('node => getComputedStyle(node).opacity') == '0.2'
        card.focus()
    page.keyboard.press('z')
    page.wait_for_selector('#zoom[open]')
    assert names[1] in page.inner_text('#zoom_title') and page.inner_text('#zoom_factor') == '100 %'
    page.keyboard.press('+')
    assert page.inner_text('#zoom_factor') == '140 %'
    page.keyboard.press('0')
    page.mouse.move(500, 400)
    page.mouse.wheel(0, -400)
    page.wait_for_timeout(100)
    assert int(page.inner_text('#zoom_factor').split()[0]) > 200
    before = page.evaluate('view.x')
    page.mouse.down()
    page.mouse.move(560, 400)
    page.mouse.up()
    assert page.evaluate('view.x') == pytest.approx(before + 60, abs=2)
    page.keyboard.press('Escape')
    page.wait_for_selector('#zoom', state='hidden')
    assert focused() == names[1]
    page.keyboard.press('?')
    assert page.is_visible('#help')
    page.keyboard.press('Escape')
    page.locator('.frame').first.click()
    page.wait_for_selector('#zoom[open]')


@pytest.mark.browser
def test_patients_and_eyes_in_file_names(clinic):
    expected = {
        '12_left.jpeg': ('12', 'left'), 'P003-OD.png': ('P003', 'OD'), '1234R.jpg': ('1234', 'R'),
        'a b right-2.png': ('a b', 'right'), 'IMG_l': ('IMG', 'l'), 'smoker.jpg': ('', ''), 'doctor.png': ('', ''),
        '00cb6555d108.png': ('', '')}
    page = clinic()
    parsed = {name: page.evaluate('name => parse(PATTERNS[0], name)', name) for name in expected}
    assert parsed == {name: dict(patient=patient, eye=eye) for name, (patient, eye) in expected.items()}


def test_images_and_bytes_at_work_are_bounded_before_they_are_graded(toy, monkeypatch):
    queue = batching.BatchingQueue(load_grader(toy))
    with contextlib.ExitStack() as requests:
        for _ in range(batching.MAX_PENDING // 20): requests.enter_context(queue.admit(1000)).count_images(20)
        assert queue.pending == batching.MAX_PENDING
        with pytest.raises(web.RequestError) as e: requests.enter_context(queue.admit(1000))
        assert e.value.status == 503
    assert queue.pending == queue.held == 0
    with contextlib.suppress(web.RequestError), queue.admit(1000) as admission:
        admission.count_images(batching.MAX_PENDING + 1)
        pytest.fail('too many images in one request')
    assert queue.pending == queue.held == 0
    monkeypatch.setattr(batching, 'MAX_HELD', 1)
    with queue.admit(batching.MEGABYTE), queue.admit(batching.MEGABYTE) as other:          # neither has arrived
        other.add_bytes(batching.MEGABYTE)
        with pytest.raises(web.RequestError, match='503'), queue.admit(1): pytest.fail('no room for it')
        with pytest.raises(web.RequestError, match='503'): other.add_bytes(1)
    assert queue.pending == queue.held == 0


# Uploads that stop

def start_upload(server_url, length, path=b'/api/predict'):
    "A connection that declares a body of `length` bytes and sends the first of them"
    content_type = b'application/json' if path == b'/api/patients' else b'multipart/form-data; boundary=x'
    s = socket.create_connection(('127.0.0.1', httpx.URL(server_url).port), timeout=30)
    s.sendall(b'POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n--x\r\n'
              % (path, content_type, length))
    return s


def wait_for_pending(server_url, n):
    "Wait until so many images are at work"
    deadline = time.monotonic() + 10
    while httpx.get(server_url + '/health').json()['pending'] != n:
        assert time.monotonic() < deadline
        time.sleep(.02)


def test_uploads_that_stop_take_no_room_and_end(server_url, image_paths, monkeypatch):
    monkeypatch.setattr(web, 'IDLE_SECONDS', 4)
    with contextlib.ExitStack() as stack:
        stopped = [stack.enter_context(start_upload(server_url, n)) for n in (1_048_576_000, 25_000_000, 120_000)]
        wait_for_pending(server_url, 3)
        assert post_images(server_url, image_paths[0]).status_code == 200
        for s in stopped:
            reply = b''.join(iter(lambda s=s: s.recv(4096), b''))      # until the server closes the connection
            assert reply.startswith(b'HTTP/1.1 408') and b'no byte of the request came for 4 s' in reply
    assert httpx.get(server_url + '/health').json()['pending'] == 0


def test_an_upload_that_drips_ends(server_url, monkeypatch):
    "Each byte comes in time, the last one never does"
    monkeypatch.setattr(web, 'UPLOAD_SECONDS', 2)
    for path in (b'/api/predict', b'/api/patients'):
        with start_upload(server_url, 1000, path) as s:
            with contextlib.suppress(OSError):         # the server closes the connection
                for _ in range(100):
                    s.sendall(b'-')
                    time.sleep(.1)
                    if select.select([s], [], [], 0)[0]: break
                else: pytest.fail('the upload goes on')
            assert b'the upload took more than 2 s' in s.recv(4096)
    wait_for_pending(server_url, 0)


def test_a_client_that_goes_is_a_line_and_no_traceback(toy, tmp_path, capfd):
    file = tmp_path / 'log.jsonl'
    with url_of(serve.get_app(load_grader(toy), ['127.0.0.1'], RequestLog(str(file)))) as url:
        with start_upload(url, 1000): wait_for_pending(url, 1)
        wait_for_pending(url, 0)
    record = json.loads(file.read_text())
    assert record['status'] == 499 and record['error'] == 'Client Closed Request' and record['images'] == 0
    printed = ''.join(capfd.readouterr())
    assert 'POST /api/predict: the client has closed the connection' in printed and 'Traceback' not in printed


@contextlib.contextmanager
def serve_process(*options):
    "Start `run.py serve`; yield the process, whose output is a pipe, and its URL once it answers"
    with socket.create_server(('127.0.0.1', 0)) as s: port = s.getsockname()[1]
    command = [sys.executable, ROOT / 'run.py', 'serve', *options, '--port', str(port)]
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            while process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    httpx.get(f'http://127.0.0.1:{port}/health')
                    break
                time.sleep(.1)
            yield process, f'http://127.0.0.1:{port}'
        finally: process.kill()


@pytest.mark.parametrize('signals, status', [
    ([signal.SIGTERM], 143), pytest.param([signal.SIGINT], 130, marks=pytest.mark.slow),
    pytest.param([signal.SIGINT, signal.SIGINT], 130, marks=pytest.mark.slow)])
def test_an_upload_that_stops_does_not_keep_the_server_from_stopping(toy, signals, status):
    with serve_process(str(toy)) as (process, url), start_upload(url, 1000):
        wait_for_pending(url, 1)
        for s in signals:
            process.send_signal(s)
            time.sleep(.5)
        printed, _ = process.communicate(timeout=web.STOP_SECONDS + 10)
    assert process.returncode == status and 'Traceback' not in printed and printed.endswith('error: stopped.\n')
