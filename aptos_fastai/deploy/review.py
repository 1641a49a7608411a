"Serve a local page on which a reader decides about the labels that a finished run contradicts most."
import asyncio
import re
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from aptos_fastai.common.console import say
from aptos_fastai.common.disclaimer import DISCLAIMER
from aptos_fastai.common.io import AptosError, file_lock
from aptos_fastai.common.privacy import patient_data
from aptos_fastai.data.relabels import SKIPPED, UNDONE
from aptos_fastai.decisions import UNGRADABLE
from aptos_fastai.deploy.web import (
    HEADERS,
    RequestError,
    get_application,
    json_reply,
    read_json,
    require_packages,
    run_server,
    text_of,
    trusted_hosts,
)
from aptos_fastai.metrics import GRADE_NAMES, GRADES
from aptos_fastai.pipeline.review import DUPLICATE, Review, ReviewItem
from aptos_fastai.pipeline.review_images import ReviewImages
from aptos_fastai.pipeline.summary import SYNTHETIC
from aptos_fastai.reports.html import render

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

PACKAGES = 'starlette', 'uvicorn'
MAX_BODY = 10_000                            # bytes of a decision
JPEG_QUALITY = 92
ANSWERS = (*map(str, range(GRADES)), UNGRADABLE, '')
HEATMAP_SEEN = 'heat map seen'               # in the column note
REVIEWER = re.compile(r'[^\W_][^\x00-\x1f\x7f]{0,79}')     # never begins as a formula does
BAD_REVIEWER = 'enter the name of the reviewer: at most 80 characters, a letter or digit first'


class ReviewSession:
    "A review at work: the list, its images, what the reader has looked at, and the way back"
    def __init__(self, review: Review, images: ReviewImages, reviewer: str = ''):
        self.review, self.images, self.reviewer = review, images, reviewer
        self.labels_seen: set[int] = set()             # numbers of images whose label was shown
        self.heatmaps_seen: set[int] = set()
        self.history: list[tuple[int, str | None]] = []          # since the start: image decided, its decision before
        self.worker = ThreadPoolExecutor(1)            # of networks and files: one request at a time

    def item(self, number: int) -> ReviewItem:
        "Return an item by its number from 0. Raises `RequestError`"
        if 0 <= number < len(self.review.items): return self.review.items[number]
        raise RequestError(404, f'no image {number}: the list has {len(self.review.items)}, from 0')

    def next_number(self) -> int | None:
        "Return the number of the first image without a decision; None if all have one"
        return next((i for i, item in enumerate(self.review.items) if item.decision is None), None)

    def state(self) -> dict:
        "Return what the page shows beside the image; nothing in it tells the label of an image to come"
        return dict(**self.review.progress(), next=self.next_number(), can_undo=bool(self.history),
                    reviewer=self.reviewer, file=str(self.review.file))

    def label(self, number: int) -> dict:
        "Return what is hidden until the reader asks: table, id, label, score; remember that it was shown"
        item = self.item(number)
        self.labels_seen.add(number)
        return dict(table=item.table, id_code=item.id_code, label=item.label, label_name=GRADE_NAMES[item.label],
                    original=item.original, score=item.score, reason=item.reason)

    def image(self, number: int, heat: bool) -> tuple[bytes, dict[str, str]]:
        "Return the JPEG of an image, or of its heat map, and headers that say what it shows"
        item = self.item(number)
        try:
            if heat: pixels, original = self.images.heatmap(item), True
            else: pixels, _, original = self.images.shown(item)
        except AptosError as e: raise RequestError(404, f'image {number + 1} cannot be shown: {e}') from None
        if heat: self.heatmaps_seen.add(number)
        return jpeg(pixels), {'X-Shown': 'original' if original else f'prepared square, {len(pixels)} px'}

    def decide(self, number: int, grade: str, reviewer: str) -> dict:
        "Append a decision to relabels.csv; return the state. Raises `RequestError` for an invalid one"
        item = self.item(number)
        if grade not in ANSWERS: raise RequestError(400, f'grade {grade!r}: enter 0 to 4, ungradable, or "" to skip')
        earlier = item.decision
        self._append(item, number, grade, reviewer)
        self.history.append((number, earlier))
        return self.state()

    def undo(self, reviewer: str) -> dict:
        """Take the last decision since the start back, by a row that says so and holds the decision before it.

        Return the state, the image next.
        """
        if not self.history: raise RequestError(409, 'nothing to undo')
        number, earlier = self.history[-1]
        notes = [UNDONE, SKIPPED] if earlier == '' else [UNDONE]
        self._append(self.item(number), number, earlier or '', reviewer, *notes)
        self.history.pop()
        return dict(self.state(), next=number)

    def _append(self, item: ReviewItem, number: int, grade: str, reviewer: str, *notes: str) -> None:
        name = ' '.join(reviewer.split()) or self.reviewer
        if not REVIEWER.fullmatch(name): raise RequestError(400, BAD_REVIEWER)
        self.reviewer = name
        seen = [HEATMAP_SEEN] if number in self.heatmaps_seen else []
        try: self.review.decide(item, grade, name, number in self.labels_seen, [*seen, *notes])
        except AptosError as e: raise RequestError(500, f'the decision was not saved: {e}') from None


def jpeg(pixels: np.ndarray) -> bytes:
    "Return uint8 RGB as the bytes of a JPEG"
    return cv2.imencode('.jpg', pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()


# Requests

async def read_decision(request: 'Request') -> dict[str, Any]:
    "Return the JSON object of a request. Raises `RequestError`"
    body = await read_json(request, MAX_BODY, f'{MAX_BODY} bytes of JSON')
    if not isinstance(body, dict): raise RequestError(400, 'send a JSON object')
    return body


def grade_of(body: dict) -> str:
    "Return the grade of a decision. Raises `RequestError`, also if it is missing: only '' skips an image"
    if body.get('grade') is None: raise RequestError(400, 'grade: send a text; "" skips the image')
    return text_of(body, 'grade')


def image_of(body: dict) -> int:
    "Return the number of the image that a decision is about. Raises `RequestError`"
    number = body.get('image')
    if isinstance(number, int) and not isinstance(number, bool): return number
    raise RequestError(400, 'image: send its number, from 0')


class Pages:
    "What each path of the server replies"
    def __init__(self, session: ReviewSession): self.session = session

    async def _reply(self, function: Callable[..., dict], *args: Any) -> 'Response':
        "Return the JSON of what `function` returns; it runs in the session's thread"
        result = await asyncio.get_running_loop().run_in_executor(self.session.worker, function, *args)
        return json_reply(result)

    async def page(self, request: 'Request') -> 'Response':
        "`/`"
        from starlette.responses import HTMLResponse
        warning = SYNTHETIC if self.session.review.summary['synthetic'] else ''
        html = render('review.html', title='Review of labels', note='', about=about(self.session), warning=warning)
        return HTMLResponse(html, headers=HEADERS)

    async def state(self, request: 'Request') -> 'Response':
        "`/api/state`"
        return await self._reply(self.session.state)

    async def label(self, request: 'Request') -> 'Response':
        "`/api/label/N`"
        return await self._reply(self.session.label, request.path_params['n'])

    async def image(self, request: 'Request') -> 'Response':
        "`/api/image/N`"
        return await self._image(request, False)

    async def heatmap(self, request: 'Request') -> 'Response':
        "`/api/heatmap/N`"
        return await self._image(request, True)

    async def _image(self, request: 'Request', heat: bool) -> 'Response':
        from starlette.responses import Response
        loop, session = asyncio.get_running_loop(), self.session
        data, shown = await loop.run_in_executor(session.worker, session.image, request.path_params['n'], heat)
        return Response(data, media_type='image/jpeg', headers=HEADERS | shown)

    async def decide(self, request: 'Request') -> 'Response':
        "POST `/api/decision`"
        body = await read_decision(request)
        args = image_of(body), grade_of(body), text_of(body, 'reviewer')
        return await self._reply(self.session.decide, *args)

    async def undo(self, request: 'Request') -> 'Response':
        "POST `/api/undo`"
        body = await read_decision(request)
        return await self._reply(self.session.undo, text_of(body, 'reviewer'))

    @asynccontextmanager
    async def lifespan(self, app: 'Starlette') -> AsyncIterator[None]:
        "Stop the session's thread at the end"
        yield
        self.session.worker.shutdown(cancel_futures=True)


def get_app(session: ReviewSession, hosts: list[str]) -> 'Starlette':
    """Return the ASGI application: `/` the page; `/api/state`, `/api/image/N`, `/api/heatmap/N`, `/api/label/N`; by
    POST `/api/decision` (image, grade, reviewer) and `/api/undo`.

    Every error is JSON with the key `error`. Only requests to `hosts` are accepted.
    """
    from starlette.routing import Route
    pages = Pages(session)
    routes = [Route('/', pages.page), Route('/api/state', pages.state), Route('/api/image/{n:int}', pages.image),
              Route('/api/heatmap/{n:int}', pages.heatmap), Route('/api/label/{n:int}', pages.label),
              Route('/api/decision', pages.decide, methods=['POST']), Route('/api/undo', pages.undo, methods=['POST'])]
    return get_application(routes, hosts, pages.lifespan)


def about(session: ReviewSession) -> dict:
    "Return what the page is made from"
    return dict(state=session.state(), disclaimer=DISCLAIMER, grades=list(GRADE_NAMES),
                run=f'{session.review.root.name}/{session.review.node}')


def review(run: str, host: str, port: int, share: float, reviewer: str) -> None:
    "`review RUN`: serve the page until it is stopped; no second one of this run can be served meanwhile"
    require_packages('review', PACKAGES)
    if not 0 < share <= 1: raise AptosError(f'--share {share:g}: choose a fraction above 0, at most 1')
    if reviewer and not REVIEWER.fullmatch(reviewer): raise AptosError(f'--reviewer {reviewer}: {BAD_REVIEWER}')
    found = Review(run, share)
    with file_lock(found.file, 'Only one review of a run can be open. Close the other one first.'):
        say_what_is_listed(found)
        images = ReviewImages(found)
        say_what_is_shown(images)
        app = get_app(ReviewSession(found, images, reviewer), trusted_hosts(host))
        run_server(app, host, port, f'decisions -> {found.file}',
                   patient_data(found.file, 'holds ids and the name of the reviewer'))


def say_what_is_listed(found: Review) -> None:
    "Say which images are in the list, and which have no out-of-fold score"
    o = found.progress()
    duplicates = sum(DUPLICATE in item.reason for item in found.items)
    say(f'{found.root.name}/{found.node}: {o["images"]} of {len(found.validated)} images with an out-of-fold score are '
        f'listed, {duplicates} of them duplicates with unequal grades; {o["reviewed"]} reviewed already')
    folds, splits = found.validated.fold.nunique(), len(set(found.folds.values()))
    if folds < splits:
        say(f'{folds} of {splits} folds are trained: the other images have no out-of-fold score and are not ranked. To '
            f'rank all, set folds = {splits} in [stage] and run `all`.', 'yellow')


def say_what_is_shown(images: ReviewImages) -> None:
    "Say how many images are shown as prepared squares, because their originals are not found"
    lost = sum(not images.candidates(record) for record in images.records.values())
    if not lost: return
    where = f'below {images.data}' if images.data else '(the data folder is not there)'
    say(f'{lost} of {len(images.records)} originals not found {where}: the page shows their prepared squares of '
        f'{images.prep.size} px, in which small lesions may be invisible', 'yellow')
