"""Reads, lists and atomically publishes whole files by URL, through fsspec.

Nothing here streams into an open remote file: an exception inside `with fs.open(...)` publishes a truncated
object on local disk, S3 and GCS alike. Bytes are put in one piece; on local disk by write, fsync and rename.
Every remote call is retried after transient errors (`calibprune.retry`), and none trusts a cached listing.
Each store's own library finds its credentials; no setting holds any.
"""

import contextlib
import datetime
import errno
import hashlib
import json
import logging
import os
import posixpath
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import fsspec.config
from fsspec.implementations.local import LocalFileSystem

from calibprune.errors import StoreUnavailable, UserError
from calibprune.failpoint import failpoint
from calibprune.redact import one_line
from calibprune.retry import is_transient, redacted_url, retrying, status

READS_AT_ONCE = 64
T = TypeVar("T")


def resolve(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Returns the file system of a URL and the path on it. Raises UserError for an unknown scheme."""
    scheme = url.split("://", 1)[0]
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **_options(scheme))
    except (ValueError, ImportError) as error:
        raise UserError(f"cannot open {redacted_url(url)}: {one_line(error)}") from None
    if scheme in ("s3", "s3a"):
        filesystem.retries = 2  # type: ignore[attr-defined]
    if scheme in ("gs", "gcs"):  # it logs every error that it raises, with a traceback
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return filesystem, path


def join(url: str, *parts: str) -> str:
    return posixpath.join(url, *parts)


def is_local(url: str) -> bool:
    return isinstance(resolve(url)[0], LocalFileSystem)


def exists(url: str) -> bool:
    """Reports whether there is a file or a folder."""
    filesystem, path = resolve(url)

    def query() -> bool:
        filesystem.invalidate_cache()
        if url.startswith(("http://", "https://")):  # its info() takes any error for "not found"
            return filesystem.exists(path, strict=True)
        filesystem.info(path)
        return True

    try:
        return _patiently(filesystem, url, "read", query)
    except (FileNotFoundError, NotADirectoryError):
        return False


def is_file(url: str) -> bool:
    """Reports whether the URL leads to a file, not a folder. Raises FileNotFoundError where there is nothing."""
    filesystem, path = resolve(url)
    return _patiently(filesystem, url, "read", lambda: filesystem.info(path))["type"] == "file"


def names(url: str, patience_seconds: float | None = None, links: bool = False) -> list[str]:
    """Lists the files directly in a folder, sorted; none where there is no such folder.

    Links are left out, since one could carry a file of this machine into a result. With `links`, those are listed too
    that lead into the folder itself, or into the `blobs` two levels up, as in the cache of the Hugging Face hub.
    """
    return list(_listed(url, patience_seconds, links))


def sizes(url: str, links: bool = False) -> dict[str, int | None]:
    """Returns the bytes of each file that `names` lists; None where a store does not give them."""
    return {name: entry.get("size") for name, entry in _listed(url, links=links).items()}


def _listed(
    url: str, patience_seconds: float | None = None, links: bool = False, temporary: bool = False
) -> dict[str, dict[str, Any]]:
    """Returns the store's entries for the files directly in a folder, by name, sorted; temporary ones only if asked."""
    filesystem, path = resolve(url)

    def query() -> list[dict[str, Any]]:
        filesystem.invalidate_cache()
        return filesystem.ls(path, detail=True)

    try:
        entries = _patiently(filesystem, url, "list", query, patience_seconds)
    except FileNotFoundError:
        return {}
    found = {
        posixpath.basename(entry["name"]): entry
        for entry in entries
        if entry["type"] == "file" or (links and entry.get("islink") and _stays(entry["name"]))
    }
    return {name: found[name] for name in sorted(found) if temporary or not name.endswith(".tmp")}


def _stays(link: str) -> bool:
    path = Path(link)
    try:
        target, folder = path.resolve(), path.parent.resolve()
    except (OSError, RuntimeError):  # a loop of links
        return False
    return target.is_file() and target.parent in (folder, folder.parent.parent / "blobs")


def times(url: str) -> dict[str, float | None]:
    """Returns when each file directly in a folder was written: seconds since the epoch, by the store's own clock.

    A time is None where a store does not give it; there are none where there is no such folder.
    """
    return {name: _written_at(entry) for name, entry in _listed(url).items()}


def written_at(url: str) -> float | None:
    """Returns when a file was written, as in `times`. Raises FileNotFoundError."""
    filesystem, path = resolve(url)

    def query() -> dict[str, Any]:
        filesystem.invalidate_cache()
        return filesystem.info(path)

    return _written_at(_patiently(filesystem, url, "read", query))


def _written_at(entry: dict[str, Any]) -> float | None:
    for key in ("mtime", "LastModified", "updated", "last_modified", "last_commit", "created"):
        value = entry.get(key)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = datetime.datetime.fromisoformat(value)
        if isinstance(value, datetime.datetime):
            aware = value if value.tzinfo else value.replace(tzinfo=datetime.UTC)
            return aware.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return None


def tree(url: str) -> dict[str, int]:
    """Returns the bytes of every file in a folder and below, by relative path, sorted; none if there is no folder."""
    filesystem, path = resolve(url)

    def query() -> dict[str, dict[str, Any]]:
        filesystem.invalidate_cache()
        return filesystem.find(path, detail=True)  # type: ignore[return-value]

    try:
        found = _patiently(filesystem, url, "list", query)
    except FileNotFoundError:
        return {}
    sizes = {posixpath.relpath(name, path): entry["size"] for name, entry in sorted(found.items())}
    return {name: size for name, size in sizes.items() if not name.endswith(".tmp")}


def read_bytes(url: str, patience_seconds: float | None = None) -> bytes:
    filesystem, path = resolve(url)
    read = partial(filesystem.cat_file, path)
    return bytes(_patiently(filesystem, url, "read", read, patience_seconds))  # type: ignore[arg-type]


def read_range(url: str, start: int, stop: int, patience_seconds: float | None = None) -> bytes:
    """Reads bytes [start, stop) of a file. Raises EOFError when the file is shorter."""
    return read_ranges([(url, start, stop)], patience_seconds)[0]


def read_ranges(
    ranges: Sequence[tuple[str, int, int]], patience_seconds: float | None = None
) -> list[bytes]:
    """Reads bytes [start, stop) of files, given as (URL, start, stop), at the same time where the store can.

    All URLs must be on one store. Raises EOFError naming a file that is shorter.
    """
    pieces = _read_together(ranges, patience_seconds)
    for (url, start, stop), data in zip(ranges, pieces, strict=True):
        if len(data) != stop - start:
            raise EOFError(f"{url}: bytes {start} to {stop} were asked for, {len(data)} came")
    return pieces


def read_many(urls: Sequence[str]) -> list[bytes]:
    """Reads many small files of one store, in the order given, 64 requests at a time.

    Raises FileNotFoundError naming one that is missing.
    """
    return _read_together([(url, None, None) for url in urls])


def read_json(url: str) -> Any:
    return json.loads(read_bytes(url))


def write(url: str, data: bytes, patience_seconds: float | None = None) -> None:
    """Publishes a whole file, replacing an older one; a crash leaves the old file or the new one."""
    filesystem, path = resolve(url)
    if isinstance(filesystem, LocalFileSystem):
        with full_disk_named(path):
            _stage(path, data).replace(path)
    else:
        retrying(url, "write", partial(filesystem.pipe_file, path, data), patience_seconds)


def create(url: str, data: bytes, patience_seconds: float | None = None) -> bool:
    """Publishes a whole file unless there is one already; returns whether this call made it.

    On a remote store an equal file counts as made by this call: the answer may have been lost and the store's own
    library may have repeated the put. A caller that must know makes its data unique.
    Stores without conditional writes may let two racing writers both succeed; callers therefore
    only create files whose content either writer may win.
    """
    filesystem, path = resolve(url)
    if isinstance(filesystem, LocalFileSystem):
        with full_disk_named(path):
            staged = _stage(path, data)
            try:
                os.link(staged, path)
            except FileExistsError:
                return False
            finally:
                staged.unlink()
        return True

    def put() -> bool:
        try:
            filesystem.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            if status(error) == 412:
                return False
            raise
        return True

    if retrying(url, "write", put, patience_seconds):
        return True
    try:
        return read_bytes(url, patience_seconds) == data
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def full_disk_named(path: str) -> Iterator[None]:
    """Raises UserError where the block finds a disk or a quota full, since a retry elsewhere would not help."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"cannot write {path}: no space left on its disk; make room, or choose another folder, and run the same "
            f"command again"
        ) from None


def write_json(url: str, value: Any) -> None:
    write(url, json_bytes(value))


def json_bytes(value: Any, *, compact: bool = False) -> bytes:
    return (json.dumps(value, indent=None if compact else 1, sort_keys=True) + "\n").encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def remove(url: str, patience_seconds: float | None = None) -> None:
    """Removes a file, if it is there."""
    filesystem, path = resolve(url)
    with contextlib.suppress(FileNotFoundError):
        _patiently(filesystem, url, "remove", partial(filesystem.rm_file, path), patience_seconds)


def remove_folder(url: str) -> None:
    """Removes a folder and all in it, if it is there."""
    filesystem, path = resolve(url)

    def clear() -> None:
        filesystem.invalidate_cache()
        filesystem.rm(path, recursive=True)

    with contextlib.suppress(FileNotFoundError):
        _patiently(filesystem, url, "remove", clear)


def check_writable(url: str) -> None:
    """Writes and removes a probe file.

    Raises UserError when the folder cannot hold a run, StoreUnavailable while the store cannot answer.
    """
    if url.startswith("hf://"):
        raise UserError(
            f"{url}: a run cannot live on the Hugging Face hub, where every file would be a commit: choose a local "
            f"folder or a bucket as output, then `calibprune publish RUN_URL STAGE {url}`"
        )
    probe = probe_url(url, uuid.uuid4().hex[:8])
    try:
        write(probe, b"")
        remove(probe)
    except StoreUnavailable:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write to {redacted_url(url)}: {one_line(error)}") from None


def probe_url(url: str, name: str) -> str:
    """Returns the URL of a file to probe a folder with."""
    return join(url, f".calibprune-{name}.tmp")


def remove_probes(url: str) -> None:
    """Removes the probe files of processes that were killed while they probed the folder."""
    for name in _listed(url, temporary=True):
        if re.fullmatch(r"\.calibprune-\w+\.tmp", name):
            remove(join(url, name))


def _options(scheme: str) -> dict[str, Any]:
    """Turns listing caches off, since other processes write; the libraries' retries last seconds, ours minutes."""
    if scheme in ("gs", "gcs"):
        return {"use_listings_cache": False}
    if scheme in ("s3", "s3a"):
        ours = {
            "retries": {"mode": "standard", "total_max_attempts": 3},
            "max_pool_connections": READS_AT_ONCE,
        }
        theirs = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        return {"use_listings_cache": False, "config_kwargs": {**ours, **theirs}}
    return {}


def _patiently(
    filesystem: fsspec.AbstractFileSystem,
    url: str,
    verb: str,
    operation: Callable[[], T],
    patience_seconds: float | None = None,
) -> T:
    """Calls an operation; retries it on a remote store only, since errors of a local disk are not transient."""
    if isinstance(filesystem, LocalFileSystem):
        return operation()
    return retrying(url, verb, operation, patience_seconds)


def _read_together(
    wanted: Sequence[tuple[str, int | None, int | None]], patience_seconds: float | None = None
) -> list[bytes]:
    """Reads contents or ranges of files of one store, in order; a retry reads only those that are missing."""
    if not wanted:
        return []
    filesystem = resolve(wanted[0][0])[0]
    paths = [resolve(url)[1] for url, _, _ in wanted]
    contents: list[Any] = [None] * len(wanted)
    more: dict[str, Any] = {}
    if filesystem.async_impl:
        more["batch_size"] = READS_AT_ONCE
    if wanted[0][0].startswith(("s3://", "s3a://")):
        more["max_concurrency"] = 1  # otherwise every read of a whole file asks for its size first

    def read(part: range) -> None:
        missing = [k for k in part if not isinstance(contents[k], bytes)]
        found = filesystem.cat_ranges(
            [paths[k] for k in missing],
            [wanted[k][1] for k in missing],
            [wanted[k][2] for k in missing],
            on_error="return",
            **more,
        )
        for k, data in zip(missing, found, strict=True):
            contents[k] = data if isinstance(data, Exception) else bytes(data)
        for k in missing:
            if isinstance(contents[k], Exception):
                raise _named(contents[k], *wanted[k])

    for first in range(0, len(wanted), READS_AT_ONCE * 8):
        part = range(first, min(first + READS_AT_ONCE * 8, len(wanted)))
        _patiently(filesystem, wanted[first][0], "read", partial(read, part), patience_seconds)
    return contents


def _named(error: Exception, url: str, start: int | None, stop: int | None) -> Exception:
    """Returns the error of one file among many, with the file's URL where the store's own error lacks it."""
    if is_transient(error):
        return error
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{url} is not there")
    if status(error) == 416:
        return EOFError(f"{url}: bytes {start} to {stop} were asked for, none came")
    return error


def _stage(path: str, data: bytes) -> Path:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with staged.open("xb") as file:
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
