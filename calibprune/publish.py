"""Copies a finished stage to where others look for it: a bucket, a folder, or a repository of the Hugging Face hub.

The committed files are verified and copied with the files beside them, the closing files last: readers take data for
complete when those are there. Plans, done records and the files of attempts that lost a race are left out.
"""

import contextlib
import io
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from calibprune import storage
from calibprune.errors import CorruptionError, UserError
from calibprune.events import note
from calibprune.retry import retrying
from calibprune.stage import Record, Stage

BATCH_FILES, BATCH_BYTES = 50, 1 << 30
"""Maximum number of files, and of their bytes if several, in memory at a time on the way to a folder or bucket."""
COMMIT_FILES = 100
"""Maximum number of files of a commit, as the hub recommends; a full folder then stays within an hour's commits."""
HUB_FOLDER_ENTRIES = 10_000
"""Maximum number of entries that the hub accepts in a folder."""
READ_BYTES = 1 << 20
"""Bytes read ahead of each file on the way from a bucket to the hub."""
_DATA = (".parquet", ".safetensors")
_CARD = b"---\nconfigs:\n- config_name: default\n  data_files: data/*.parquet\n---\n"


@dataclass(frozen=True)
class Item:
    """A file to publish: its URL, its path in the target, its size, and its hash where the stage recorded one."""

    source: str
    path: str
    bytes: int
    sha256: str | None = None
    remedy: str = ""
    """What to do where the file does not have that hash."""


class Outcome(NamedTuple):
    copied: int
    skipped: int
    """Files that were there already."""
    bytes: int


def publish(
    stage_url: str,
    target: str,
    *,
    folder: str = "",
    closing: Sequence[str] = ("manifest.json", "_SUCCESS"),
    recorded: bool = True,
    card: bool = False,
) -> Outcome:
    """Copies a finished stage; may be called again after a crash, and skips what is there already.

    folder:   publishes only the files below this folder of the stage, at the top of the target
    closing:  files that must be there, by paths relative to `folder`; written last, in this order
    recorded: whether the stage has done records to verify its files with; False for a folder of plain files
    card:     whether a repository of the hub without a README.md gets one that names the parquet files in data/

    Raises UserError when the stage is not finished, when the target holds other data, or access is denied;
    CorruptionError for damaged data.
    """
    stage_url, target = stage_url.rstrip("/"), target.rstrip("/")
    body, last = listing(stage_url, folder, closing, recorded)
    if target.startswith("hf://"):
        name = stage_url.rsplit("/", 1)[-1]
        return _to_hub(body, last, target, name, card)
    return _to_folder(body, last, target)


def listing(
    stage_url: str, folder: str, closing: Sequence[str], recorded: bool
) -> tuple[list[Item], list[Item]]:
    """Lists what to publish of a stage: the files in any order, and the closing files in theirs."""
    stage = Stage(stage_url)
    records = stage.records() if recorded else []
    named = {record.file: record for record in records if record.file}
    sizes = storage.tree(stage_url)
    _check_no_links(stage_url, sizes)
    _check_sizes(stage, named, sizes)
    prefix = f"{folder}/" if folder else ""
    lost = _lost_races(named, sizes)
    last = [f"{prefix}{path}" for path in closing]
    if missing := [path for path in last if path not in sizes]:
        name = stage_url.rsplit("/", 1)[-1]
        raise UserError(
            f"{stage_url} is not finished: {missing[0]} is not there; run the stage {name} first"
        )

    def item(path: str) -> Item:
        url, place = storage.join(stage_url, path), path.removeprefix(prefix)
        if path not in named:
            return Item(url, place, sizes[path])
        record = named[path]
        return Item(url, place, sizes[path], record.sha256, stage.how_to_remake(record.unit))

    def hidden(path: str) -> bool:
        return any(part.startswith(("_", ".")) for part in path.split("/"))

    kept = (path for path in sorted(sizes) if path.startswith(prefix) and not hidden(path))
    body = [item(path) for path in kept if path not in lost and path not in last]
    return body, [item(path) for path in last]


def _check_no_links(url: str, paths: Iterable[str]) -> None:
    """Raises UserError for a link, which would publish a file from elsewhere on this machine."""
    if storage.is_local(url):
        folder = Path(storage.resolve(url)[1]).resolve()
        for path in paths:
            if (folder / path).resolve() != folder / path:
                raise UserError(
                    f"{url}/{path} is a link: only files that the run itself made are published"
                )


def _check_sizes(stage: Stage, named: Mapping[str, Record], sizes: Mapping[str, int]) -> None:
    for path, record in named.items():
        file, remedy = storage.join(stage.url, path), stage.how_to_remake(record.unit)
        if path not in sizes:
            raise CorruptionError(f"{file} is missing, though it was committed: remove {remedy}")
        if sizes[path] != record.bytes:
            raise CorruptionError(
                f"{file} is damaged: it has {sizes[path]} bytes, not the recorded {record.bytes}: remove it and "
                f"{remedy}"
            )


def _lost_races(recorded: Iterable[str], present: Iterable[str]) -> set[str]:
    """Returns the data files that no record names, beside committed files of the same kind."""
    named = set(recorded)
    kinds = {_kind(path) for path in named}
    return {path for path in present if path not in named and _kind(path) in kinds}


def _kind(path: str) -> tuple[str, str]:
    """Returns folder and extension, since a reader takes files that share both together."""
    return posixpath.dirname(path), posixpath.splitext(path)[1]


def check_nothing_else(items: Iterable[Item], present: Iterable[str], target: str) -> None:
    """Raises UserError where the target has other data of the same kind, since a reader would take both together."""
    ours = {item.path for item in items}
    kinds = {_kind(path) for path in ours}
    for path in present:
        if path not in ours and _kind(path) in kinds and path.endswith(_DATA):
            raise UserError(
                f"{target} holds {path}, which is not part of this stage and would be read with it: choose another "
                f"target, or remove it there"
            )


def check_folders(paths: Iterable[str], most: int = HUB_FOLDER_ENTRIES) -> None:
    """Raises UserError where a folder would hold more entries than the hub accepts."""
    entries: dict[str, set[str]] = {}
    for path in paths:
        parts = path.split("/")
        for depth, part in enumerate(parts):
            entries.setdefault("/".join(parts[:depth]), set()).add(part)
    for folder, found in entries.items():
        if len(found) > most:
            raise UserError(
                f"the folder {folder or 'at the top'} would hold {len(found)} files, the hub accepts {most}: make the "
                f"stage with fewer, larger files (generate.shard_rows), or publish to a bucket"
            )


def batches(items: Sequence[Item], most_files: int, most_bytes: float) -> list[list[Item]]:
    """Cuts a list into batches of at most that many files and bytes; a larger file is a batch of its own."""
    cut: list[list[Item]] = []
    held = 0
    for item in items:
        if not cut or len(cut[-1]) == most_files or held + item.bytes > most_bytes:
            cut.append([])
            held = 0
        cut[-1].append(item)
        held += item.bytes
    return cut


def _check_hash(item: Item, digest: str) -> None:
    if item.sha256 is not None and digest != item.sha256:
        raise CorruptionError(
            f"{item.source} is damaged: its sha256 is not the recorded {item.sha256}: remove it and {item.remedy}"
        )


def _read(batch: Sequence[Item]) -> list[bytes]:
    """Reads and verifies the contents of a batch."""
    contents = storage.read_many([item.source for item in batch])
    for item, data in zip(batch, contents, strict=True):
        _check_hash(item, storage.sha256(data))
    return contents


def _to_folder(body: list[Item], last: list[Item], target: str) -> Outcome:
    present = storage.tree(target)
    check_nothing_else(body, present, target)
    storage.check_writable(target)
    missing = [item for item in body if not _is_there(item, target, present)]
    copied = 0
    with ThreadPoolExecutor(8) as pool:
        for batch in batches(missing, BATCH_FILES, BATCH_BYTES):
            urls = [storage.join(target, item.path) for item in batch]
            list(pool.map(storage.write, urls, _read(batch)))
            copied += len(batch)
            note(f"publish: {copied} of {len(missing)} files")
    arrived = storage.tree(target)
    for item in body:
        if arrived.get(item.path) != item.bytes:
            raise UserError(
                f"{storage.join(target, item.path)} has {arrived.get(item.path)} bytes, not {item.bytes}: another "
                f"process writes there; publish again, or choose another target"
            )
    for item, data in zip(last, _read(last), strict=True):
        storage.write(storage.join(target, item.path), data)
    return _outcome(missing, body, last)


def _is_there(item: Item, target: str, present: Mapping[str, int]) -> bool:
    """Returns whether the target has the file, by size and hash: the hash in its name, or that of a local file."""
    if present.get(item.path) != item.bytes:
        return False
    if item.sha256 and f"-{item.sha256[:8]}." in item.path:
        return True
    if not storage.is_local(target):
        return False
    expected = item.sha256 or storage.sha256(storage.read_bytes(item.source))
    return storage.sha256(storage.read_bytes(storage.join(target, item.path))) == expected


def _to_hub(body: list[Item], last: list[Item], target: str, stage: str, card: bool) -> Outcome:
    """Publishes to the hub in a few commits. The closing files are all in the last one, which appears as a whole."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfUriError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import parse_hf_uri

    try:
        repository = parse_hf_uri(target)
    except HfUriError as error:
        raise UserError(f"{target} is no repository of the hub: {error.msg}") from None
    if repository.type not in ("model", "dataset"):
        raise UserError(
            f"{target} is a {repository.type}: publish to a model or dataset repository"
        )
    api, folder = HfApi(), repository.path_in_repo
    where: dict[str, Any] = {
        "repo_id": repository.id,
        "repo_type": repository.type,
        "revision": repository.revision,
    }

    def query() -> dict[str, RepoFile]:
        entries = api.list_repo_tree(**where, recursive=True)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    try:
        present = retrying(target, "list", query)
    except RepositoryNotFoundError:
        raise UserError(
            f"there is no repository for {target}, or this account may not see it: make it with "
            f"`hf repos create {repository.id} --type {repository.type}`"
        ) from None
    except OfflineModeIsEnabled:
        raise UserError(f"cannot reach {target}: HF_HUB_OFFLINE is set") from None
    except EntryNotFoundError:
        present = {}

    inside = {posixpath.relpath(path, folder or ".") for path in present if path.startswith(folder)}
    check_nothing_else(body, inside, target)
    check_folders(present.keys() | {posixpath.join(folder, item.path) for item in (*body, *last)})

    def is_there(item: Item) -> bool:
        entry = present.get(posixpath.join(folder, item.path))
        stored = entry.lfs.sha256 if entry and entry.lfs else None
        return stored is not None and stored == item.sha256

    def commit(items: Sequence[Item], title: str, more: Sequence[CommitOperationAdd] = ()) -> None:
        def send() -> None:
            with contextlib.ExitStack() as files:
                added = [
                    CommitOperationAdd(posixpath.join(folder, item.path), _content(item, files))
                    for item in items
                ]
                api.preupload_lfs_files(**where, additions=added)  # hashes large files on the way
                for item, operation in zip(items, added, strict=True):
                    _check_hash(item, operation.upload_info.sha256.hex())
                api.create_commit(**where, operations=[*added, *more], commit_message=title)

        retrying(target, "write", send)

    missing = [item for item in body if not is_there(item)]
    cut = batches(missing, COMMIT_FILES, float("inf"))
    for number, batch in enumerate(cut, 1):
        commit(batch, f"calibprune: {stage}, part {number} of {len(cut)}")
        note(f"publish: commit {number} of {len(cut) + 1}")
    readme = card and not folder and "README.md" not in present
    cards = [CommitOperationAdd("README.md", _CARD)] if readme else []
    commit(last, f"calibprune: {stage}, complete", cards)
    return _outcome(missing, body, last)


def _content(item: Item, files: contextlib.ExitStack) -> str | io.BufferedReader:
    """Returns what the hub's library can read a file from in pieces: a local path, or an opened remote file."""
    filesystem, path = storage.resolve(item.source)
    if storage.is_local(item.source):
        return path
    opened: Any = filesystem.open(path, "rb", block_size=READ_BYTES)
    return files.enter_context(io.BufferedReader(opened))


def _outcome(copied: Sequence[Item], body: Sequence[Item], last: Sequence[Item]) -> Outcome:
    total = sum(item.bytes for item in (*copied, *last))
    return Outcome(len(copied) + len(last), len(body) - len(copied), total)
