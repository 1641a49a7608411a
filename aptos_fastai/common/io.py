"Read and write files: every write is atomic, every record carries its own SHA-256."
import hashlib
import json
import os
import socket
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

if TYPE_CHECKING:                            # `--help` must not import pandas
    from pandas import DataFrame

RECORD_HASH = 'record_sha256'                # key of a record's own hash; older versions wrote `seal`


class AptosError(Exception):
    "An error that the user can correct: one line that names the file, key or id and says what to do."


def file_hash(path: str | Path) -> str:
    "Return the SHA-256 of the file at `path`, in hex"
    with open(path, 'rb') as f: return hashlib.file_digest(f, 'sha256').hexdigest()


def file_state(path: Path) -> dict:
    "Return what a record holds of a file: its SHA-256 and its size in bytes"
    return dict(sha256=file_hash(path), bytes=path.stat().st_size)


def digest(o: Any) -> str:
    "Return the SHA-256 of anything that JSON can hold, in hex; the order of keys does not matter"
    return hashlib.sha256(json.dumps(o, sort_keys=True, default=str).encode()).hexdigest()


def verify_file(path: str | Path, sha256: str, what_to_do: str) -> Path:
    """Return `path` if the file has the recorded `sha256`. Raises `AptosError` if it is missing or differs.

    `what_to_do` ends the message: a sentence such as 'Train again.'
    """
    path = Path(path)
    if not path.is_file(): raise AptosError(f'{path}: no such file. {what_to_do}')
    if file_hash(path) != sha256: raise AptosError(changed_message(path, what_to_do))
    return path


def changed_message(path: str | Path, what_to_do: str) -> str:
    "Return the message for a file whose SHA-256 is not the recorded one"
    return f'{path}: content changed since it was written (SHA-256 differs). {what_to_do}'


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block succeeds, sync the file and rename it to `path`.

    A reader sees the old file or the complete new one, even after a power failure.
    If the block fails, the temporary file is removed.
    Raises `AptosError` if the file cannot be written.
    """
    path = Path(path)
    temp = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temp
        with open(temp, 'r+b' if os.name == 'nt' else 'rb') as f: os.fsync(f.fileno())   # Windows: only if writable
        os.replace(temp, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as e:     # PyTorch raises RuntimeError when the disk is full
        reason = getattr(e, 'strerror', None) or str(e).splitlines()[0]
        wrong_place = isinstance(e, FileExistsError | NotADirectoryError | PermissionError)
        advice = 'Choose' if wrong_place else 'Free disk space or choose'
        raise AptosError(f'{path}: cannot write this file ({reason}). {advice} another folder (--runs, -o).') from e
    finally:
        try: temp.unlink(missing_ok=True)
        except OSError: pass                 # the disk may have become read-only


def check_output_folder(folder: str | Path, option: str = '-o') -> None:
    """Raise `AptosError` if no file can be written to `folder`, which need not exist; leaves nothing behind.

    Call it before a long computation. `option` names the folder on the command line.
    """
    folder = Path(folder)
    there = next(o for o in (folder, *folder.absolute().parents) if os.path.lexists(o))       # or the lowest above it
    try:
        with tempfile.TemporaryFile(dir=there): pass
    except OSError as e:
        reason = 'this is a file' if there.is_file() else e.strerror
        raise AptosError(f'{there}: cannot write to this folder ({reason}). Choose another with {option}.') from None


def check_output_file(file: str | Path, option: str = '-o') -> None:
    "Raise `AptosError` if `file` cannot be written, as `check_output_folder` does"
    if Path(file).is_dir(): raise AptosError(f'{file}: is a folder. Name a file in it with {option}.')
    check_output_folder(Path(file).parent, option)


def _sync_folder(folder: Path) -> None:
    "Sync a folder, so that a rename in it survives a power failure"
    if os.name == 'nt': return               # Windows cannot sync folders
    descriptor = os.open(folder, os.O_RDONLY)
    try: os.fsync(descriptor)
    finally: os.close(descriptor)


def _acquire(lock: FileLock, folder: Path, what_to_do: str) -> None:
    "Make `folder` and take a lock in it. Raises `Timeout` if another process holds it, `AptosError` if that fails"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout: raise
    except (OSError, NotImplementedError) as e:
        reason = getattr(e, 'strerror', None) or e
        raise AptosError(f'{folder}: cannot write to this folder ({reason}). {what_to_do}') from None


@contextmanager
def file_lock(file: Path, what_to_do: str) -> Iterator[None]:
    "Keep every other process from writing `file` while the block runs. Raises `AptosError` if one is writing it"
    lock = FileLock(file.with_name(f'.{file.name}.lock'))
    try: _acquire(lock, file.parent, what_to_do)
    except Timeout: raise AptosError(f'{file}: another process is writing this file. {what_to_do}') from None
    try: yield
    finally: _remove_lock(lock)


def _remove_lock(lock: FileLock) -> None:
    "Release a lock and remove its file: before the release, after which it may be another process's; Windows cannot"
    file = Path(lock.lock_file)
    if os.name != 'nt': file.unlink(missing_ok=True)
    lock.release()
    if os.name == 'nt':
        with suppress(PermissionError): file.unlink(missing_ok=True)     # another process has opened it


@contextmanager
def run_lock(folder: str | Path) -> Iterator[None]:
    """Keep every other process out of `folder` while the block runs.

    The operating system releases the lock when the process ends, however it ends.
    The file running.json says which process holds it.
    Raises `AptosError`, which names that process, if another one holds the lock.
    """
    folder = Path(folder)
    lock = FileLock(folder / '.lock')
    owner_file = folder / 'running.json'
    try: _acquire(lock, folder, 'Choose another with --runs.')
    except Timeout:
        owner = read_record(owner_file) or dict(pid='?', host='?', since='?')
        raise AptosError(f'{folder}: in use by process {owner["pid"]} on {owner["host"]} since {owner["since"]}. '
                         'Wait for it, stop it, or choose another folder with --runs.') from None
    try:
        since = time.strftime('%Y-%m-%d %H:%M:%S')
        write_record(owner_file, dict(pid=os.getpid(), host=socket.gethostname(), since=since))
        yield
    finally:
        try: owner_file.unlink(missing_ok=True)
        except OSError: pass
        lock.release()


def remove_stale_temp_files(folder: str | Path, hours: float = 1.) -> None:
    "Remove temporary files that killed processes left in `folder` and below, if they are at least `hours` old"
    for f in Path(folder).rglob('.*.tmp'):
        try:
            if f.is_file() and time.time() - f.stat().st_mtime >= hours * 3600: f.unlink()
        except OSError: pass                 # another process removed it first


def make_private(descriptor: int) -> bool:
    """Let only its owner read an open file. Return whether that is so; a device or a pipe stays as it is.

    It fails for a file of another owner, and where the file system or Windows knows no such permission.
    """
    if not stat.S_ISREG(os.fstat(descriptor).st_mode): return True
    try: os.fchmod(descriptor, 0o600)
    except (OSError, AttributeError): pass   # Windows has no fchmod
    return not stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o077


def write_bytes(path: str | Path, data: bytes | memoryview) -> None:
    "Write `data` to `path` atomically"
    with atomic_write(path) as temp: temp.write_bytes(data)


def write_json(path: str | Path, o: Any) -> None:
    "Write `o` as JSON atomically"
    write_bytes(path, (json.dumps(o, indent=1, default=str) + '\n').encode())


def write_csv(path: str | Path, df: 'DataFrame') -> None:
    "Write a data frame as CSV without its index, atomically"
    write_bytes(path, df.to_csv(index=False, lineterminator='\n').encode())


def write_record(path: str | Path, o: dict) -> None:
    "Write `o` as JSON with its own SHA-256, which `read_record` checks"
    o = json.loads(json.dumps(o, default=str))
    write_json(path, {**o, RECORD_HASH: digest(o)})


def read_record(path: str | Path) -> dict | None:
    """Return the dict that `write_record` wrote to `path`, or None if there is no file.

    Raises `AptosError` if the file is unreadable, damaged, changed or written by an older version.
    """
    try: o = json.loads(Path(path).read_text(encoding='utf-8'))
    except (FileNotFoundError, NotADirectoryError): return None
    except OSError as e:
        raise AptosError(f'{path}: cannot read this file ({e.strerror}). Check its permissions.') from None
    except ValueError as e: raise AptosError(f'{path}: damaged JSON ({e}). Delete it and run again.') from None
    if isinstance(o, dict) and 'seal' in o and RECORD_HASH not in o:
        raise AptosError(f'{path}: written by an older version. Run again into a new --runs folder.')
    if not isinstance(o, dict) or o.pop(RECORD_HASH, None) != digest(o):
        raise AptosError(changed_message(path, 'Restore it, or delete it and run again.'))
    return o


TRUSTED: set[Path] = set()                   # files named by `--trust`: pickles from elsewhere that may be loaded


def trust(files: Iterable[str | Path]) -> None:
    "Allow these files, and no others from elsewhere, to be unpickled. Raises `AptosError` if one does not exist"
    files = list(files)
    for f in files:
        if not Path(f).is_file(): raise AptosError(f'--trust {f}: no such file. Check the path.')
    TRUSTED.clear()
    TRUSTED.update(Path(f).resolve() for f in files)


def is_trusted(path: str | Path) -> bool:
    "Return whether `--trust` named this file"
    return Path(path).resolve() in TRUSTED
