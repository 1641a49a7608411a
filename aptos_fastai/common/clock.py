"The present time as files and replies have it, and a clock that measures durations."
import time
from datetime import UTC, datetime


def now(unit: str = 'seconds') -> str:
    "Return the time as ISO 8601 in UTC, to a `unit`, seconds or milliseconds: '2026-01-31T12:00:00+00:00'"
    return datetime.now(UTC).isoformat(timespec=unit)


def seconds() -> float:
    "Return the seconds of a clock that only goes forward"
    return time.monotonic()
