"The present time as files and replies have it."
from datetime import UTC, datetime


def now() -> str:
    "Return the time as ISO 8601 in UTC, in seconds: '2026-01-31T12:00:00+00:00'"
    return datetime.now(UTC).isoformat(timespec='seconds')
