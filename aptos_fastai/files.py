"Reading and writing of files: every write is complete or absent."
import hashlib
import json
import os
from pathlib import Path


class AptosError(Exception):
    "A failure that its reader can mend: one line that names the file, key or id and what to do."


def file_hash(path: Path) -> str:
    "SHA-256 of the file at `path`, in hex"
    with open(path, 'rb') as f: return hashlib.file_digest(f, 'sha256').hexdigest()


def digest(o) -> str:
    "SHA-256 of anything that JSON can hold, in hex; the same for equal contents whatever the order of keys"
    return hashlib.sha256(json.dumps(o, sort_keys=True, default=str).encode()).hexdigest()


def write_bytes(path: Path, data: bytes):
    "Writes `data` beside `path`, syncs, and renames: a reader sees the old file or the whole new one"
    path = Path(path)
    tmp = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, 'wb') as f: f.write(data); f.flush(); os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError as e:
        tmp.unlink(missing_ok=True)
        raise AptosError(f'{path}: cannot be written ({e.strerror}); free space or choose another --runs folder') from e


def write_json(path: Path, o): write_bytes(path, (json.dumps(o, indent=1, default=str) + '\n').encode())


def write_csv(path: Path, df): write_bytes(path, df.to_csv(index=False, lineterminator='\n').encode())


def read_json(path: Path):
    "The contents of the JSON file at `path`, or None where there is none"
    path = Path(path)
    if not path.exists(): return None
    try: return json.loads(path.read_text())
    except ValueError as e:
        raise AptosError(f'{path}: is damaged ({e}); delete it and run again, it will be made anew') from e
