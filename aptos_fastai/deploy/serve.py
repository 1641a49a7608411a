"Serve a local web page and a JSON endpoint that grade images and keep none."
import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import PurePath

import pandas as pd

from aptos_fastai.common.console import say
from aptos_fastai.common.disclaimer import DISCLAIMER
from aptos_fastai.common.io import AptosError
from aptos_fastai.inference.explain import explain_image
from aptos_fastai.inference.grader import COLUMNS, Grader, Prepared, load_grader, reader_threads
from aptos_fastai.inference.model_spec import SYNTHETIC_MODEL, ModelSpec
from aptos_fastai.pipeline.summary import OUT_OF_FOLD
from aptos_fastai.reports.html import data_uri, render

PACKAGES = 'starlette', 'uvicorn', 'python_multipart'
MAX_MEGABYTES = 50                           # of one image
MAX_IMAGES = 20                              # in one request
MEGABYTE = 2 ** 20
MAX_PIXELS = 36_000_000                      # of one image; a single one above this is refused before it is decoded
MAX_PENDING = 200                            # images that wait for their grade; further requests get status 503
UPLOAD_SECONDS = 120                         # for one request to arrive
MAX_HELD = 1024                              # MB of the requests that are being read or graded
BATCH_SIZE = 16                              # images that are graded together, at most
MAX_WAIT = .02                               # seconds that the first image of a batch waits for others
JPEG_QUALITY = 88
BUSY = 'the server is busy; try again in a few seconds'
CSP = ("default-src 'none'; img-src 'self' data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
       "connect-src 'self'; form-action 'none'; base-uri 'none'")
HEADERS = {'Content-Security-Policy': CSP, 'X-Content-Type-Options': 'nosniff', 'Referrer-Policy': 'no-referrer',
           'Cache-Control': 'no-store'}


class RequestError(Exception):
    "A request that cannot be served: HTTP status and reason."
    def __init__(self, status: int, reason: str): self.status, self.reason = status, reason


@dataclass
class Job:
    "An image that waits for its grade"
    name: str
    data: bytes
    heatmap: bool
    row: asyncio.Future


class BatchingQueue:
    "Collect images from all requests, read them in parallel and grade them in batches"
    def __init__(self, grader: Grader):
        self.grader = grader
        self.jobs: asyncio.Queue[Job] = asyncio.Queue()
        self.pending = 0
        self.held = 0                                  # bytes of the requests at work
        self.readers = ThreadPoolExecutor(reader_threads())
        self.networks = ThreadPoolExecutor(1)          # one batch at a time

    async def grade(self, name: str, data: bytes, heatmap: bool = False) -> dict:
        "Return the row (`COLUMNS`) of an image, with `image` and `heatmap` as data URIs if a heat map is asked for"
        job = Job(name, data, heatmap, asyncio.get_running_loop().create_future())
        await self.jobs.put(job)
        return await job.row

    @contextmanager
    def reserve(self, size: int) -> Iterator[Callable[[int], None]]:
        """Count the `size` bytes of a request and its images while it is served: one, until it is read.

        Yields a function to call with their number. Both raise `RequestError` if the server has enough to do.
        """
        images = 0

        def received(n: int) -> None:
            nonlocal images
            if self.pending + n - images > MAX_PENDING: raise RequestError(503, BUSY)
            self.pending += n - images
            images = n
        if self.held + size > MAX_HELD * MEGABYTE: raise RequestError(503, BUSY)
        received(1)
        self.held += size
        try: yield received
        finally:
            self.held -= size
            self.pending -= images

    async def work(self) -> None:
        "Grade batches until the task is cancelled"
        while True: await self._grade_batch(await self._next_batch())

    async def _next_batch(self) -> list[Job]:
        "Wait for an image, then collect others for at most `MAX_WAIT` seconds"
        batch = [await self.jobs.get()]
        loop = asyncio.get_running_loop()
        deadline = loop.time() + MAX_WAIT
        while len(batch) < BATCH_SIZE and loop.time() < deadline:
            try: batch.append(await asyncio.wait_for(self.jobs.get(), deadline - loop.time()))
            except TimeoutError: break
        return batch

    async def _grade_batch(self, batch: list[Job]) -> None:
        "Give each job its row, or the error that stopped the batch"
        loop = asyncio.get_running_loop()
        try:
            images = await asyncio.gather(*(
                loop.run_in_executor(self.readers, self.grader.prepare, job.data, MAX_PIXELS) for job in batch))
            rows = await loop.run_in_executor(self.networks, self._rows, batch, images)
        except Exception as e:               # any error: these requests must end and the next batch must start
            for job in batch:
                if not job.row.done(): job.row.set_exception(e)
            return
        for job, row in zip(batch, rows, strict=True):
            if not job.row.done(): job.row.set_result(row)       # done: its request was cancelled

    def _rows(self, batch: list[Job], images: list[Prepared]) -> list[dict]:
        "Return the rows of a batch as JSON can hold them"
        df = self.grader.grade([job.name for job in batch], images)
        rows = []
        for job, row in zip(batch, df.astype(object).to_dict('records'), strict=True):
            row = {column: None if pd.isna(value) else value for column, value in row.items()}
            if job.heatmap and not row['error']:
                image, overlay, _ = explain_image(self.grader, job.data)
                row |= dict(image=data_uri(image, JPEG_QUALITY), heatmap=data_uri(overlay, JPEG_QUALITY))
            rows.append(row)
        return rows

    def close(self) -> None:
        "Stop the threads"
        self.readers.shutdown(cancel_futures=True)
        self.networks.shutdown(cancel_futures=True)


def content_length(request) -> int:
    "Return the size of a request's body in bytes. Raises `RequestError` if it is unknown or too large"
    length = request.headers.get('content-length', '')
    if not length.isdigit(): raise RequestError(411, 'header Content-Length is missing')
    if int(length) > MAX_MEGABYTES * MAX_IMAGES * MEGABYTE:
        raise RequestError(413, f'at most {MAX_IMAGES} images of {MAX_MEGABYTES} MB in one request')
    return int(length)


async def read_uploads(request) -> tuple[list[tuple[str, bytes]], bool]:
    "Return (name, bytes) of each file of a request, and whether it asks for heat maps. Raises `RequestError`"
    from starlette.exceptions import HTTPException
    if not request.headers.get('content-type', '').startswith('multipart/form-data'):
        raise RequestError(415, 'send the images as multipart/form-data, field `files`')
    try:
        async with request.form(max_files=MAX_IMAGES, max_fields=10) as form:
            files = [f for f in form.getlist('files') if hasattr(f, 'filename')]
            if not files: raise RequestError(400, 'no image in the field `files`')
            for f in files:
                if f.size > MAX_MEGABYTES * MEGABYTE:
                    raise RequestError(413, f'{_file_name(f.filename)} is larger than {MAX_MEGABYTES} MB')
            uploads = [(_file_name(f.filename), await f.read()) for f in files]
            return uploads, form.get('heatmap', '') in ('1', 'true', 'yes', 'on')
    except HTTPException as e: raise RequestError(400, e.detail) from None


def _file_name(text: str) -> str:
    "Return the name of an uploaded file without its folders"
    return PurePath(text.replace('\\', '/')).name[:200] or 'image'


def describe_model(model: ModelSpec, url: str) -> dict:
    "Return what the page and `/api` say about the model; `url` is that of the server"
    return dict(
        model=model.name, key=model.key, synthetic=model.synthetic, disclaimer=DISCLAIMER, gate=asdict(model.gate),
        thresholds=list(model.thresholds),
        coverage=model.coverage, kappa=model.kappa, figures=OUT_OF_FOLD, warnings=list(model.warnings),
        networks=len(model.members), columns=COLUMNS, max_megabytes=MAX_MEGABYTES,
        max_images=MAX_IMAGES, example=f'curl -F files=@eye.jpg -F heatmap=0 {url}api/predict')


def get_app(grader: Grader, hosts: list[str]):
    """Return the ASGI application: `/` the page, `/api/predict` (POST, multipart), `/api` its description, `/health`.

    It accepts only requests to `hosts`, so that no other web site can reach it through a host name of its own.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse
    from starlette.routing import Route
    queue, model = BatchingQueue(grader), grader.model

    @asynccontextmanager
    async def lifespan(app):
        worker = asyncio.create_task(queue.work())
        yield
        worker.cancel()
        queue.close()

    async def page(request):
        html = render('serve.html', title='Diabetic retinopathy grading', note='',
                      warning=SYNTHETIC_MODEL if model.synthetic else '',
                      about=describe_model(model, str(request.base_url)))
        return HTMLResponse(html, headers=HEADERS)

    async def describe(request): return JSONResponse(describe_model(model, str(request.base_url)), headers=HEADERS)

    async def health(request):
        return JSONResponse(dict(status='ok', model=model.name, pending=queue.pending), headers=HEADERS)

    async def predict(request):
        try:
            with queue.reserve(content_length(request)) as received:
                async with asyncio.timeout(UPLOAD_SECONDS): uploads, heatmap = await read_uploads(request)
                received(len(uploads))
                rows = await asyncio.gather(*(queue.grade(name, data, heatmap) for name, data in uploads))
        except TimeoutError:
            return JSONResponse(dict(error=f'the upload took more than {UPLOAD_SECONDS} s'), 408, headers=HEADERS)
        except RequestError as e:
            retry = {'Retry-After': '5'} if e.status == 503 else {}
            return JSONResponse(dict(error=e.reason), e.status, headers=HEADERS | retry)
        reply = dict(model=model.name, synthetic=model.synthetic, disclaimer=DISCLAIMER, rows=rows)
        return JSONResponse(reply, headers=HEADERS)

    routes = [Route('/', page), Route('/api', describe), Route('/health', health),
              Route('/api/predict', predict, methods=['POST'])]
    return Starlette(routes=routes, lifespan=lifespan,
                     middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)])


def serve(model: str, host: str, port: int) -> None:
    "`serve MODEL`: serve the page until it is stopped"
    if not all(find_spec(package) for package in PACKAGES):
        raise AptosError('serve needs the extra serve. Run `pip install starlette uvicorn python-multipart`.')
    import uvicorn
    grader = load_grader(model)
    public = host in ('0.0.0.0', '::')
    hosts = ['*'] if public else ['127.0.0.1', 'localhost', '[::1]', host]
    if public: say(f'{host}: everyone who can reach this machine can use the page; it asks for no password', 'yellow')
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    try: sock = socket.create_server((host, port), family=family, backlog=256)
    except OSError as e:
        raise AptosError(f'{host}:{port}: cannot listen ({e.strerror}). Choose another port with --port.') from None
    config = uvicorn.Config(get_app(grader, hosts), host=host, port=port, log_level='warning', server_header=False)
    server = uvicorn.Server(config)
    threading.Thread(target=_announce, args=(server, f'http://{host}:{port}'), daemon=True).start()
    with sock: server.run(sockets=[sock])


def _announce(server, url: str) -> None:
    "Say the page's address once the server has started"
    while not server.started and not server.should_exit: time.sleep(.05)
    if server.started: say(f'serving {url} (stop with Ctrl-C); images are not kept')
