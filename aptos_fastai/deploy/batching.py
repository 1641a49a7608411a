"Grade the images of several requests together: a queue with limits in front of one grader."
import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import cv2
import numpy as np
import pandas as pd

from aptos_fastai.data.dicom import DicomTags, read_tags
from aptos_fastai.data.groups import UNKNOWN
from aptos_fastai.deploy.web import RequestError
from aptos_fastai.inference.explain import locate_heatmap, spread_heatmap
from aptos_fastai.inference.grader import Grader, Prepared, reader_threads
from aptos_fastai.reports.html import data_uri, png_uri

MEGABYTE = 2 ** 20
MAX_PIXELS = 36_000_000                      # of one image; a single one above this is refused before it is decoded
MAX_PENDING = 200                            # images that wait for their grade; further requests get status 503
MAX_HELD = 1024                              # MB that have arrived of requests that are read or graded
BATCH_SIZE = 16                              # images that are graded together, at most
MAX_WAIT = .02                               # seconds that the first image of a batch waits for others
JPEG_QUALITY = 88
HEATMAP_SIDE = 224                           # longest side of a heat map that is sent, pixels
BUSY = 'the server is busy; try again in a few seconds'


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
        self.held = 0                                  # bytes that have arrived of the requests at work
        self.readers = ThreadPoolExecutor(reader_threads())
        self.networks = ThreadPoolExecutor(1)          # one batch at a time

    async def grade(self, name: str, data: bytes, heatmap: bool = False) -> dict:
        """Return the row of an image: `COLUMNS` and those of `person_of`.

        It has `image` and `heatmap` as data URIs if a heat map is asked for.
        """
        job = Job(name, data, heatmap, asyncio.get_running_loop().create_future())
        await self.jobs.put(job)
        return await job.row

    @contextmanager
    def admit(self, size: int) -> Iterator['Admission']:
        """Yield what counts a request of `size` bytes while it is served. Raises `RequestError` if there is no room.

        Bytes count when they arrive, so that an upload which stops takes no room from others.
        """
        if self.held + size > MAX_HELD * MEGABYTE: raise RequestError(503, BUSY)
        admission = Admission(self)
        try:
            admission.count_images(1)        # until it is read
            yield admission
        finally: admission.end()

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
        rows = as_json(self.grader.grade([job.name for job in batch], images))
        for job, row, (squares, info) in zip(batch, rows, images, strict=True):
            row |= person_of(read_tags(job.data))
            if not job.heatmap or squares is None: continue
            im, hot, box = locate_heatmap(self.grader, job.data, squares, info)
            heat = spread_heatmap(hot, box, im.shape[:2], row['score'])
            row |= dict(image=data_uri(im, JPEG_QUALITY), heatmap=png_uri(small_grey(heat)))
        return rows

    def close(self) -> None:
        "Stop the threads"
        self.readers.shutdown(cancel_futures=True)
        self.networks.shutdown(cancel_futures=True)


class Admission:
    "The bytes and images of a request that a queue counts. Its methods raise `RequestError` if there is no room"
    def __init__(self, queue: BatchingQueue): self.queue, self.bytes, self.images = queue, 0, 0

    def add_bytes(self, n: int) -> None:
        "Count `n` more bytes"
        if self.queue.held + n > MAX_HELD * MEGABYTE: raise RequestError(503, BUSY)
        self.queue.held += n
        self.bytes += n

    def count_images(self, n: int) -> None:
        "Count `n` images instead of those before"
        if self.queue.pending + n - self.images > MAX_PENDING: raise RequestError(503, BUSY)
        self.queue.pending += n - self.images
        self.images = n

    def end(self) -> None:
        "Count it no more"
        self.queue.held -= self.bytes
        self.queue.pending -= self.images


def person_of(tags: DicomTags | None) -> dict[str, str | None]:
    "Return patient, issuer of the patient's key, and eye as DICOM tags name them; None where they name none"
    tags = tags or DicomTags()
    patient = '' if tags.patient.casefold() in UNKNOWN else tags.patient
    return dict(patient=patient or None, issuer=(patient and tags.issuer) or None, eye=tags.eye or None)


def as_json(df: pd.DataFrame) -> list[dict]:
    "Return the rows of a table as dicts that JSON can hold: None for a missing value"
    return [{column: None if pd.isna(value) else value for column, value in row.items()}
            for row in df.astype(object).to_dict('records')]


def small_grey(heat: np.ndarray) -> np.ndarray:
    "Return a heat map (float, 0-1) as a grey uint8 image, its longest side at most `HEATMAP_SIDE`"
    shrink = min(1., HEATMAP_SIDE / max(heat.shape))
    small = cv2.resize(heat, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
    return (255 * small.clip(0, 1)).round().astype(np.uint8)
