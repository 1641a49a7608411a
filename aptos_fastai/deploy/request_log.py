"The request log of `serve --log FILE`: one line of JSON for each request, never an image."
import errno
import json
import os
from http import HTTPStatus
from pathlib import Path

from aptos_fastai.common.clock import now
from aptos_fastai.common.console import say
from aptos_fastai.common.io import AptosError, make_private
from aptos_fastai.common.privacy import patient_data
from aptos_fastai.deploy.web import CLIENT_GONE

LOGGED = 'image_sha256', 'grade', 'decision', 'score', 'ungradable', 'flags', 'error'     # of each image
AUDITED = 'aptos_fastai', 'backend', 'precision', 'prevalence'                            # of each request
DIGITS = 4                                   # of a score


class RequestLog:
    """Append a line for each request of `/api/predict` to a file. Raises `AptosError` if it cannot be written.

    Only its owner may read it, also if it is there already; where that cannot be set, a line says so. A line is written
    at once, so that several servers may share a file. A file that was moved away or deleted is begun again.
    """
    def __init__(self, file: str, names: bool = False):
        self.file, self.names = Path(file), names
        try: self._open()
        except OSError as e:
            raise AptosError(f'--log {file}: cannot write this file ({e.strerror}). Choose another one.') from None

    def _open(self) -> None:
        "Open the file, for its owner alone. Raises `OSError`"
        self._fd = os.open(self.file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        if make_private(self._fd): return
        say(f'warning: --log {self.file}: others may read this file, and that cannot be changed. Choose another one.',
            'yellow')

    def describe(self) -> str:
        "Return the line that says where the log goes and what it holds"
        return f'request log -> {patient_data(self.file, self.contents)}'

    @property
    def contents(self) -> str:
        "What the log holds, in words"
        names = 'file names, ' if self.names else ''
        return f'times and, for each image, {names}SHA-256, grade, decision and score, but no image'

    def write(self, audit: dict, status: int, seconds: float, rows: list[dict]) -> None:
        "Append the line of a request. Raises `OSError`, also if only a part of it fits on the disk"
        if self._was_moved():
            old = self._fd
            self._open()
            os.close(old)
        line = ('\n' * self._is_torn() + json.dumps(self.record(audit, status, seconds, rows)) + '\n').encode()
        if os.write(self._fd, line) < len(line): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _is_torn(self) -> bool:
        "Return whether the last line, of this server or another, has no end"
        size = os.fstat(self._fd).st_size
        return size > 0 and os.pread(self._fd, 1, size - 1) != b'\n'

    def _was_moved(self) -> bool:
        "Return whether another file, or none, has the name of the log"
        try: return not os.path.samestat(os.fstat(self._fd), os.stat(self.file))
        except FileNotFoundError: return True

    def record(self, audit: dict, status: int, seconds: float, rows: list[dict]) -> dict:
        "Return what is logged of a request: `audit` of its grader, HTTP status, duration, its rows"
        failed = {} if status < 400 else dict(error=_phrase(status))
        model = dict(model=audit['digests']['model'], name=audit['model'], **{key: audit[key] for key in AUDITED})
        return dict(time=now('milliseconds'), status=status, **failed, images=len(rows), seconds=round(seconds, 3),
                    **model, results=[self._image(row) for row in rows])

    def _image(self, row: dict) -> dict:
        logged = {key: row[key] for key in LOGGED}
        if logged['score'] is not None: logged['score'] = round(float(logged['score']), DIGITS)
        return dict(file=row['file'], **logged) if self.names else logged

    def close(self) -> None:
        "Close the file"
        os.close(self._fd)


def _phrase(status: int) -> str:
    return 'Client Closed Request' if status == CLIENT_GONE else HTTPStatus(status).phrase
