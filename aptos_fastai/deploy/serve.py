"Serve a local web page and a JSON endpoint that grade images and keep none."
import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from aptos_fastai.common.clock import now
from aptos_fastai.common.console import say
from aptos_fastai.common.disclaimer import DISCLAIMER
from aptos_fastai.data.spreadsheet import FORMULA_STARTS
from aptos_fastai.deploy import about, pairing
from aptos_fastai.deploy.batching import MEGABYTE, BatchingQueue
from aptos_fastai.deploy.openapi import NOTHING_KEPT, openapi_document
from aptos_fastai.deploy.request_log import RequestLog
from aptos_fastai.deploy.web import (
    HEADERS,
    RequestError,
    check_names,
    content_length,
    get_application,
    is_unicode,
    json_reply,
    own_url,
    read_json,
    require_packages,
    run_server,
    server_url,
    trusted_hosts,
    with_seen_body,
)
from aptos_fastai.inference.audit import audit_record
from aptos_fastai.inference.grader import Grader, load_grader
from aptos_fastai.inference.model_spec import SYNTHETIC_MODEL
from aptos_fastai.inference.patients import COLUMNS as PATIENT_COLUMNS
from aptos_fastai.reports.colours import GRADES_DARK, GRADES_LIGHT
from aptos_fastai.reports.html import render

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.datastructures import FormData, UploadFile
    from starlette.requests import Request
    from starlette.responses import Response

PACKAGES = 'starlette', 'uvicorn', 'python_multipart'
HEATMAP = {value: i < 4 for i, value in enumerate(('1', 'true', 'yes', 'on', '0', 'false', 'no', 'off', ''))}
END_BYTES = 1_000                            # of a request that are searched for the end of the form
LOG_FAILED = 'the request log cannot be written ({}); the grades are withheld'


def uploads_length(request: 'Request') -> int:
    "Return the size of a request with images in bytes. Raises `RequestError`"
    limit = about.MAX_MEGABYTES * about.MAX_IMAGES
    return content_length(request, limit * MEGABYTE, f'{about.MAX_IMAGES} images of {about.MAX_MEGABYTES} MB')


async def read_uploads(request: 'Request', count: Callable[[int], None]) -> tuple[list[tuple[str, bytes]], bool]:
    """Return (name, bytes) of each file of a request, and whether it asks for heat maps. Raises `RequestError`.

    `count` is called with the number of bytes of each part that arrives.
    """
    from starlette.datastructures import UploadFile
    from starlette.exceptions import HTTPException
    if not request.headers.get('content-type', '').startswith('multipart/form-data'):
        raise RequestError(415, 'send the images as multipart/form-data, field `files`')
    if request.query_params: raise RequestError(400, 'parameters in the address are not used: send fields of the form')
    end = bytearray()

    def see(part: bytes) -> None:
        count(len(part))
        end.extend(part)
        del end[:-END_BYTES]
    try:
        async with with_seen_body(request, see).form(max_files=about.MAX_IMAGES, max_fields=10) as form:
            files = [f for f in form.getlist('files') if isinstance(f, UploadFile)]
            if not files: raise RequestError(400, 'no image in the field `files`')
            check_complete(request.headers['content-type'], bytes(end))
            check_fields(form)
            for f in files:
                if (f.size or 0) > about.MAX_MEGABYTES * MEGABYTE:
                    raise RequestError(413, f'{_file_name(f)} is larger than {about.MAX_MEGABYTES} MB')
            uploads = [(_file_name(f), await f.read()) for f in files]
            return uploads, HEATMAP[str(form.get('heatmap', '')).casefold()]
    except HTTPException as e: raise RequestError(413 if 'Too many' in e.detail else 400, e.detail) from None
    except ValueError: raise RequestError(400, 'the charset of Content-Type does not fit: send UTF-8') from None


def check_complete(content_type: str, end: bytes) -> None:
    "Raise `RequestError` if a body, of which `end` are the last bytes, lacks the boundary that ends the form"
    from python_multipart.multipart import parse_options_header
    boundary = parse_options_header(content_type)[1].get(b'boundary', b'')
    if b'--' + boundary + b'--' not in end: 
        raise RequestError(400, 'the request ends before the form does: send it again')


def check_fields(form: 'FormData') -> None:
    "Raise `RequestError` for fields that are not used, so that nothing that was sent is passed over"
    from starlette.datastructures import UploadFile
    other = sorted({name for name, value in form.multi_items() if name not in ('files', 'heatmap')
                    or isinstance(value, UploadFile) != (name == 'files')})
    if other: raise RequestError(400, f'not used: {", ".join(other)[:200]}. Send the images as `files`, and `heatmap`')
    if len(form.getlist('heatmap')) > 1: raise RequestError(400, 'heatmap: send it once')
    if str(form.get('heatmap', '')).casefold() not in HEATMAP:
        raise RequestError(400, f'heatmap: send one of {", ".join(filter(None, HEATMAP))}')


def _file_name(upload: 'UploadFile') -> str:
    "Return the name of an uploaded file without its folders. Raises `RequestError` if it is no Unicode"
    text = upload.filename or ''
    if not is_unicode(text): raise RequestError(400, 'the name of a file is no Unicode: send UTF-8')
    return PurePath(text.replace('\\', '/')).name[:200] or 'image'


class Pages:
    "What each path of the server answers"
    def __init__(self, grader: Grader, log: RequestLog | None = None):
        self.grader, self.log = grader, log
        self.queue = BatchingQueue(grader)
        self.audit = audit_record(grader)
        self.logged = f'Its log keeps {log.contents}.' if log else ''

    def about(self, request: 'Request') -> dict:
        "Describe the model; addresses begin as the one that the client entered"
        return about.describe_model(self.grader, own_url(request))

    def openapi(self, request: 'Request') -> dict:
        "Return the OpenAPI document"
        kept = f'Images are not kept on the server. {self.logged}' if self.log else NOTHING_KEPT
        return openapi_document(self.about(request), own_url(request), kept)

    async def page(self, request: 'Request') -> 'Response':
        "`/`: the page"
        warning = SYNTHETIC_MODEL if self.grader.model.synthetic else ''
        return _html('serve.html', title='Diabetic retinopathy grading', note='', warning=warning,
                     about=self.about(request), logged=self.logged, patient_columns=PATIENT_COLUMNS,
                     formula_starts=list(FORMULA_STARTS),
                     grade_colours=list(zip(GRADES_LIGHT, GRADES_DARK, strict=True)))

    async def docs(self, request: 'Request') -> 'Response':
        "`/docs`: the documentation of the API"
        return _html('api.html', title='API', note='', warning='', document=self.openapi(request))

    async def describe(self, request: 'Request') -> 'Response':
        "`/api`: the model"
        return json_reply(self.about(request))

    async def document(self, request: 'Request') -> 'Response':
        "`/openapi.json`: the OpenAPI document"
        return json_reply(self.openapi(request))

    async def health(self, request: 'Request') -> 'Response':
        "`/health`: whether the server works"
        return json_reply(dict(status='ok', model=self.grader.model.name, pending=self.queue.pending))

    async def patients(self, request: 'Request') -> 'Response':
        "`/api/patients`: pair graded images of patients"
        body = await read_json(request, pairing.MAX_BODY, f'{pairing.MAX_BODY // 1_000_000} MB of JSON')
        return json_reply(await asyncio.to_thread(pairing.patients_of, body))

    async def predict(self, request: 'Request') -> 'Response':
        "`/api/predict`: grade images, and log the request"
        started, status = time.monotonic(), 500
        rows: list[dict] = []
        try:
            rows = await self.graded_rows(request)
            status = 200
        except RequestError as e:
            status = e.status
            raise
        finally: self.log_request(status, time.monotonic() - started, rows)
        audit = dict(self.audit, time=now())
        return json_reply(dict(model=self.grader.model.name, synthetic=self.grader.model.synthetic,
                               disclaimer=DISCLAIMER, audit=audit, rows=rows))

    async def graded_rows(self, request: 'Request') -> list[dict]:
        "Return the rows of the images of a request. Raises `RequestError`"
        with self.queue.admit(uploads_length(request)) as admission:
            uploads, heatmap = await read_uploads(request, admission.add_bytes)
            admission.count_images(len(uploads))
            return await asyncio.gather(*(self.queue.grade(name, data, heatmap) for name, data in uploads))

    def log_request(self, status: int, seconds: float, rows: list[dict]) -> None:
        "Append a request to the log. Raises `RequestError` if that fails: no grade leaves without its line"
        if not self.log: return
        try: self.log.write(self.audit, status, seconds, rows)
        except OSError as e:
            reason = LOG_FAILED.format(e.strerror)
            say(f'{self.log.file}: {reason}', 'red')
            raise RequestError(500, reason) from None

    @asynccontextmanager
    async def lifespan(self, app: 'Starlette') -> AsyncIterator[None]:
        "Grade while the server runs"
        worker = asyncio.create_task(self.queue.work())
        yield
        worker.cancel()
        self.queue.close()


def _html(template: str, **values: Any) -> 'Response':
    "Return a page"
    from starlette.responses import HTMLResponse
    return HTMLResponse(render(template, **values), headers=HEADERS)


def get_app(grader: Grader, hosts: list[str], log: RequestLog | None = None,
            proxies: Sequence[str] = ()) -> 'Starlette':
    """Return the ASGI application: `/` the page; `/api` the model; `/api/predict` (POST, multipart) and `/api/patients`
    (POST, JSON); `/openapi.json` and `/docs` their documentation; `/health`.

    Every error is JSON. It accepts only requests to `hosts` and through `proxies`, so that no other web site can reach
    it through a host name of its own.
    """
    from starlette.routing import Route
    pages = Pages(grader, log)
    routes = [Route('/', pages.page), Route('/docs', pages.docs), Route('/openapi.json', pages.document),
              Route('/health', pages.health), Route('/api', pages.describe),
              Route('/api/predict', pages.predict, methods=['POST']),
              Route('/api/patients', pages.patients, methods=['POST'])]
    return get_application(routes, hosts, pages.lifespan, proxies)


def serve(model: str, host: str, port: int, *, allow_host: Sequence[str] = (), log: str = '', log_names: bool = False,
          backend: str = 'torch', precision: str = 'f32', prevalence: float | None = None) -> None:
    "`serve MODEL`: serve the page until it is stopped"
    require_packages('serve', PACKAGES)
    check_names('--allow-host', allow_host)
    grader = load_grader(model, backend, precision, prevalence)
    request_log = RequestLog(log, log_names) if log else None
    app = get_app(grader, trusted_hosts(host), request_log, allow_host)
    notes = ['images are not kept', f'example: {about.example(server_url(host, port) + "/")}']
    if request_log: notes.append(request_log.describe())
    try: run_server(app, host, port, *notes)
    finally:
        if request_log: request_log.close()
