"""Files by URL through fsspec: read, list, and publish whole files atomically.

Nothing here streams into an open remote file: an exception inside `with fs.open(...)` publishes a truncated
object on local disk, S3 and GCS alike. Bytes are put in one piece; on local disk by write, fsync and rename.
Credentials come from where each store's own library looks for them, never from a setting.
"""

import hashlib
import json
import os
import posixpath
import uuid
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from calibprune.errors import UserError
from calibprune.failpoint import failpoint


def resolve(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL and the path on it. Raises UserError for an unknown scheme."""
    try:
        return fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UserError(f"cannot open {url}: {error}") from None


def join(url: str, *parts: str) -> str:
    return posixpath.join(url, *parts)


def is_local(url: str) -> bool:
    return isinstance(resolve(url)[0], LocalFileSystem)


def exists(url: str) -> bool:
    filesystem, path = resolve(url)
    return filesystem.exists(path)


def names(url: str) -> list[str]:
    """Sorted names of the files directly in a folder; empty where there is no such folder."""
    filesystem, path = resolve(url)
    filesystem.invalidate_cache()
    try:
        entries = filesystem.ls(path, detail=True)
    except FileNotFoundError:
        return []
    found = [posixpath.basename(entry["name"]) for entry in entries if entry["type"] == "file"]
    return sorted(name for name in found if not name.endswith(".tmp"))


def read_bytes(url: str) -> bytes:
    filesystem, path = resolve(url)
    return bytes(filesystem.cat_file(path))  # type: ignore[arg-type]


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file. Raises EOFError when the file is shorter."""
    filesystem, path = resolve(url)
    data = bytes(filesystem.cat_file(path, start=start, end=stop))  # type: ignore[arg-type]
    if len(data) != stop - start:
        raise EOFError(f"{url}: bytes {start} to {stop} were asked for, {len(data)} came")
    return data


def read_json(url: str) -> Any:
    return json.loads(read_bytes(url))


def write(url: str, data: bytes) -> None:
    """Publishes a whole file, replacing an older one; a crash leaves the old file or the new one."""
    filesystem, path = resolve(url)
    if isinstance(filesystem, LocalFileSystem):
        staged = _stage(path, data)
        staged.replace(path)
    else:
        filesystem.pipe_file(path, data)


def create(url: str, data: bytes) -> bool:
    """Publishes a whole file unless there is one already; says whether this call made it.

    Stores without conditional writes may let two racing writers both succeed; callers therefore
    only create files whose content either writer may win.
    """
    filesystem, path = resolve(url)
    if isinstance(filesystem, LocalFileSystem):
        staged = _stage(path, data)
        try:
            os.link(staged, path)
        except FileExistsError:
            return False
        finally:
            staged.unlink()
        return True
    try:
        filesystem.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    return True


def write_json(url: str, value: Any) -> None:
    write(url, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def remove(url: str) -> None:
    filesystem, path = resolve(url)
    filesystem.rm_file(path)


def remove_folder(url: str) -> None:
    """Removes a folder and all in it, if it is there."""
    filesystem, path = resolve(url)
    filesystem.invalidate_cache()
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def check_writable(url: str) -> None:
    """Writes and removes a probe file. Raises UserError when the folder cannot be written."""
    probe = join(url, f".calibprune-{uuid.uuid4().hex[:8]}.tmp")
    try:
        write(probe, b"")
        remove(probe)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write to {url}: {error}") from None


def _stage(path: str, data: bytes) -> Path:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with staged.open("wb") as file:
            middle = len(data) // 2
            file.write(memoryview(data)[:middle])
            failpoint(f"writing-{target.name.rsplit('-', 1)[0]}")
            file.write(memoryview(data)[middle:])
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        staged.unlink(missing_ok=True)
        raise
    return staged
