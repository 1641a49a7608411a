"Reading and writing of files: every write is complete or absent, every record carries its own hash."
import hashlib
import json
import os
import socket
import time
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


class AptosError(Exception):
    "A failure that its reader can mend: one line that names the file, key or id and what to do."


def file_hash(path: Path) -> str:
    "SHA-256 of the file at `path`, in hex"
    with open(path, 'rb') as f: return hashlib.file_digest(f, 'sha256').hexdigest()


def digest(o) -> str:
    "SHA-256 of anything that JSON can hold, in hex; the same for equal contents whatever the order of keys"
    return hashlib.sha256(json.dumps(o, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def atomic_write(path: Path):
    """A temporary path beside `path` to write to; synced and renamed when the block ends well, else removed: a reader, and a machine whose power
    failed, sees the old file or the whole new one. Raises `AptosError` where it cannot be written"""
    path = Path(path)
    tmp = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        with open(tmp, 'rb') as f: os.fsync(f.fileno())
        os.replace(tmp, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as e:     # PyTorch says RuntimeError where the disk is full
        why = getattr(e, 'strerror', None) or str(e).splitlines()[0]
        raise AptosError(f'{path}: cannot be written ({why}); free space, or choose another folder (--runs, -o)') from e
    finally:
        try: tmp.unlink(missing_ok=True)
        except OSError: pass                 # on a disk that has just become read-only


def _sync_folder(folder: Path):
    "The rename itself is on disk, too"
    if os.name == 'nt': return               # folders cannot be synced there
    fd = os.open(folder, os.O_RDONLY)
    try: os.fsync(fd)
    finally: os.close(fd)


@contextmanager
def run_lock(folder: Path):
    """No other process works in `folder` while the block runs. The lock is the system's and goes with its process, however that ends.
    Raises `AptosError`, which names who is there"""
    folder = Path(folder)
    lock, note = FileLock(folder / '.lock'), folder / 'running.json'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        o = read_record(note) or dict(pid='?', host='?', since='?')
        raise AptosError(f'{folder}: process {o["pid"]} on {o["host"]} has been at work here since {o["since"]}; wait for it, stop it, '
                         'or give another folder with --runs') from None
    except (OSError, NotImplementedError) as e:
        raise AptosError(f'{folder}: cannot be written ({getattr(e, "strerror", None) or e}); give another folder with --runs') from None
    try:
        write_record(note, dict(pid=os.getpid(), host=socket.gethostname(), since=time.strftime('%Y-%m-%d %H:%M:%S')))
        yield
    finally:
        try: note.unlink(missing_ok=True)
        except OSError: pass
        lock.release()


def remove_stale_temp_files(folder: Path, hours: float = 1.):
    "Removes what killed writers left in `folder` and below, `hours` old or older"
    for f in Path(folder).rglob('.*.tmp'):
        try:
            if f.is_file() and time.time() - f.stat().st_mtime >= hours * 3600: f.unlink()
        except OSError: pass                 # another sweep was first


def write_bytes(path: Path, data: bytes):
    "`data` as the file at `path`, whole or not at all"
    with atomic_write(path) as tmp: tmp.write_bytes(data)


def write_json(path: Path, o):
    "JSON, whole or not at all"
    write_bytes(path, (json.dumps(o, indent=1, default=str) + '\n').encode())


def write_csv(path: Path, df):
    "A frame as CSV without its index, whole or not at all"
    write_bytes(path, df.to_csv(index=False, lineterminator='\n').encode())


def write_record(path: Path, o: dict):
    "JSON that `read_record` believes: with the digest of everything else in it"
    o = json.loads(json.dumps(o, default=str))
    write_json(path, dict(o, seal=digest(o)))


def read_record(path: Path) -> dict | None:
    "What `write_record` wrote at `path`, or None where there is nothing. Raises `AptosError` where it is anything else"
    try: o = json.loads(Path(path).read_text(encoding='utf-8'))
    except FileNotFoundError: return None
    except OSError as e: raise AptosError(f'{path}: cannot be read ({e.strerror})') from None
    except ValueError as e: raise AptosError(f'{path}: is damaged ({e}); delete it and run again, it will be made anew') from None
    if not isinstance(o, dict) or o.pop('seal', None) != digest(o):
        raise AptosError(f'{path}: is not what a run wrote (its hash differs); restore it, or delete it and run again')
    return o


TRUSTED: set[Path] = set()                   # what `--trust FILE` named: pickles of others that may be loaded


def trust(files):
    "From now on these files may be unpickled, whoever wrote them; those named before may not. Raises `AptosError` for what is no file"
    for f in files:
        if not Path(f).is_file(): raise AptosError(f'--trust {f}: no such file')
    TRUSTED.clear()
    TRUSTED.update(Path(f).resolve() for f in files)


def is_trusted(path: Path) -> bool:
    "Whether `--trust` named this file"
    return Path(path).resolve() in TRUSTED
