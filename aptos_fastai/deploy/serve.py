"A local web page and JSON endpoint that grade images; nothing of them is kept."
import asyncio
import base64
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePath

import cv2
import numpy as np

from aptos_fastai.common.console import say
from aptos_fastai.common.io import AptosError
from aptos_fastai.inference.explain import explained
from aptos_fastai.inference.grader import COLUMNS, Grader, load_grader
from aptos_fastai.reports.html import render

MEGABYTES, COUNT = 50, 20                    # most of one image, most images of one request
BATCH, WAIT = 16, .02                        # images graded together at most; seconds that the first of them waits for others
CSP = ("default-src 'none'; img-src 'self' data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; form-action 'none'; "
       "base-uri 'none'")
HEADERS = {'Content-Security-Policy': CSP, 'X-Content-Type-Options': 'nosniff', 'Referrer-Policy': 'no-referrer', 'Cache-Control': 'no-store'}


class Refused(Exception):
    "A request that is not answered: its status and why"
    def __init__(self, status: int, why: str): self.status, self.why = status, why


@dataclass
class Job:
    "An image that waits for its grade"
    name: str
    data: bytes
    heat: bool
    done: asyncio.Future


class Desk:
    "Takes images from any number of requests, reads them side by side and grades them together"
    def __init__(self, grader: Grader):
        self.grader, self.jobs, self.pending = grader, asyncio.Queue(), 0
        self.readers, self.networks = ThreadPoolExecutor(), ThreadPoolExecutor(1)        # one batch at a time has the networks

    async def grade(self, name: str, data: bytes, heat: bool = False) -> dict:
        self.pending += 1
        try:
            job = Job(name, data, heat, asyncio.get_running_loop().create_future())
            await self.jobs.put(job)
            return await job.done
        finally: self.pending -= 1

    async def work(self):
        "Runs as long as the server does"
        while True:
            batch, loop = [await self.jobs.get()], asyncio.get_running_loop()
            end = loop.time() + WAIT
            while len(batch) < BATCH and (left := end - loop.time()) > 0:
                try: batch.append(await asyncio.wait_for(self.jobs.get(), left))
                except TimeoutError: break
            try:
                got = await asyncio.gather(*(loop.run_in_executor(self.readers, self.grader.prepared, j.data) for j in batch))
                rows = await loop.run_in_executor(self.networks, self.answers, batch, got)
                for j, r in zip(batch, rows, strict=True): j.done.cancelled() or j.done.set_result(r)
            except Exception as e:   # whatever it is, its askers must not wait for ever and the next must be answered
                for j in batch: j.done.done() or j.done.set_exception(e)

    def answers(self, batch: list[Job], got: list) -> list[dict]:
        df = self.grader.grade([j.name for j in batch], got)
        rows = [{k: (None if v is None or v != v else v) for k, v in r.items()} for r in df.astype(object).where(df.notna(), None).to_dict('records')]
        for j, r in zip(batch, rows, strict=True):
            if j.heat and not r['error']: r['image'], r['heat'] = map(_uri, explained(self.grader, j.data)[:2])
        return rows


def _uri(im: np.ndarray) -> str:
    return 'data:image/jpeg;base64,' + base64.b64encode(cv2.imencode('.jpg', im[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])[1]).decode()


async def read_uploads(req) -> tuple[list[tuple[str, bytes]], bool]:
    "(name, bytes) of the files of a request, and whether heat maps are asked for. Raises `Refused`"
    from starlette.exceptions import HTTPException
    from starlette.formparsers import MultiPartException
    size = req.headers.get('content-length', '')
    if not size.isdigit(): raise Refused(411, 'say how long the request is (Content-Length)')
    if int(size) > MEGABYTES * COUNT * 2 ** 20: raise Refused(413, f'at most {COUNT} images of {MEGABYTES} MB in one request')
    if not req.headers.get('content-type', '').startswith('multipart/form-data'): raise Refused(415, 'send the images as multipart/form-data, field `files`')
    try:
        async with req.form(max_files=COUNT, max_fields=10) as form:
            files = [f for f in form.getlist('files') if hasattr(f, 'filename')]
            if not files: raise Refused(400, 'no image in the field `files`')
            for f in files:
                if f.size > MEGABYTES * 2 ** 20: raise Refused(413, f'{_name(f.filename)} is larger than {MEGABYTES} MB')
            return [(_name(f.filename), await f.read()) for f in files], form.get('heat', '') in ('1', 'true', 'yes', 'on')
    except (HTTPException, MultiPartException) as e: raise Refused(400, getattr(e, 'detail', None) or getattr(e, 'message', str(e))) from None


def _name(text: str) -> str: return PurePath(text.replace('\\', '/')).name[:200] or 'image'


def get_app(grader: Grader, hosts: list[str]):
    "The ASGI application: `/` the page, `/api/predict` (POST, multipart), `/api` its description, `/health`"
    from fasthtml.core import FastHTML
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse
    from starlette.routing import Route
    desk = Desk(grader)

    async def lifespan(app):
        worker = asyncio.create_task(desk.work())
        yield
        worker.cancel()
        desk.readers.shutdown(cancel_futures=True), desk.networks.shutdown(cancel_futures=True)

    app = FastHTML(default_hdrs=False, sess_cls=None, secret_key='none', lifespan=lifespan, htmx=False, surreal=False,
                   middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)])   # no other site may reach it through a name of its own
    m = grader.model
    about = dict(model=m.name, key=m.key, synthetic=m.synthetic, thresholds=list(m.thresholds), coverage=m.coverage, networks=len(m.members), columns=COLUMNS,
                 most_megabytes=MEGABYTES, most_images=COUNT, example="curl -F files=@eye.jpg -F heat=0 http://127.0.0.1:8000/api/predict")

    @app.get('/')
    def page(): return HTMLResponse(render('serve.html', title='Diabetic retinopathy, graded', note='', about=about,
                                           warning='Trained on SYNTHETIC images: its grades say nothing about eyes.' if m.synthetic else ''), headers=HEADERS)

    @app.get('/api')
    def describe(): return JSONResponse(about, headers=HEADERS)

    @app.get('/health')
    def health(): return JSONResponse(dict(status='ok', model=m.name, pending=desk.pending), headers=HEADERS)

    async def predict(req):
        try: files, heat = await read_uploads(req)
        except Refused as e: return JSONResponse(dict(error=e.why), e.status, headers=HEADERS)
        rows = await asyncio.gather(*(desk.grade(n, d, heat) for n, d in files))
        return JSONResponse(dict(model=m.name, synthetic=m.synthetic, rows=rows), headers=HEADERS)
    app.router.routes.append(Route('/api/predict', predict, methods=['POST']))     # FastHTML's own would read a form of any size first
    return app


def serve(model: str, host: str, port: int):
    "`serve MODEL`: until it is stopped"
    try:
        import uvicorn
        from fasthtml.core import FastHTML  # noqa: F401
    except ImportError: raise AptosError('the page needs the extra serve: pip install python-fasthtml uvicorn') from None
    grader = load_grader(model)
    hosts = ['127.0.0.1', 'localhost', '[::1]', host] if host not in ('0.0.0.0', '::') else ['*']
    if '*' in hosts: say(f'{host}: whoever reaches this machine reaches this page; it asks for no password', 'yellow')
    try: sock = socket.create_server((host, port), family=socket.AF_INET6 if ':' in host else socket.AF_INET, backlog=256)
    except OSError as e: raise AptosError(f'{host}:{port}: cannot be listened on ({e.strerror}); choose another with --port') from None
    server = uvicorn.Server(uvicorn.Config(get_app(grader, hosts), host=host, port=port, log_level='warning', server_header=False))
    threading.Thread(target=_announce, args=(server, f'http://{host}:{port}'), daemon=True).start()
    with sock: server.run(sockets=[sock])


def _announce(server, url: str):
    while not server.started and not server.should_exit: time.sleep(.05)
    if server.started: say(f'grading at {url} (Ctrl-C stops); nothing is kept')
