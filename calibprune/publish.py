"""A finished stage copied to where others look for it: a bucket, a folder, or a repository of the Hugging Face hub.

Of generate, curate and evaluate the files that the manifest stands for, then the manifest, then `_SUCCESS`. Of prune
the checkpoint's files only, at the top of the target, the index last: that is a model folder, and who loads one looks
for nothing else. Of report the page and its JSON. Plans, done records and what lost a race stay behind.
"""

import posixpath
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from calibprune import storage
from calibprune.checkpoint import INDEX
from calibprune.errors import CorruptionError, UserError
from calibprune.retry import retrying
from calibprune.stage import Stage

STAGES = ("generate", "curate", "prune", "evaluate", "report")
BATCH_FILES, BATCH_BYTES = 50, 1 << 30
HUB_FOLDER_ENTRIES = 10_000
HUB_COMMITS_AN_HOUR = 128
_DATA = (".parquet", ".safetensors")
_CARD = b"---\nconfigs:\n- config_name: default\n  data_files: data/*.parquet\n---\n"


@dataclass(frozen=True)
class Item:
    """A file to publish: where it is, its path in the target, and its hash where the stage recorded one."""

    source: str
    path: str
    bytes: int
    sha256: str | None = None


class Outcome(NamedTuple):
    copied: int
    skipped: int
    """Files that were there already."""
    bytes: int


def publish(
    run_url: str, stage: str, target: str, tell: Callable[[str], None] = lambda line: None
) -> Outcome:
    """Copies a finished stage of a run; may be called again after a crash: what is there already is passed over.

    Memory is bounded by a batch: 50 files or 1 GiB, or one larger file. Raises UserError when the stage is not
    finished, when the target holds another stage's data, or access is denied; CorruptionError for damaged data.
    """
    body, last = listing(run_url, stage)
    if target.startswith("hf://"):
        return _to_hub(body, last, target.rstrip("/"), stage, tell)
    return _to_folder(body, last, target.rstrip("/"), tell)


def listing(run_url: str, stage_name: str) -> tuple[list[Item], list[Item]]:
    """What is to be published of a stage: the files in any order, then those that must come last, in order."""
    if stage_name not in STAGES:
        raise UserError(f"there is no stage {stage_name}: it is one of {', '.join(STAGES)}")
    url = storage.join(run_url, stage_name)
    sizes = storage.tree(url)
    _check_no_links(url, sizes)
    if stage_name == "report":
        if "report.json" not in sizes:
            raise UserError(f"{url} is not finished: run the stage report first")
        recorded, closing = {}, ["index.html"]
    else:
        records = Stage(url).records()
        recorded = {record.file: record for record in records if record.file}
        closing = ["manifest.json", "_SUCCESS"]
    lost = _lost_races(recorded, sizes)
    folder = ""
    if stage_name == "prune":
        folder, closing = "checkpoint/", [f"checkpoint/{INDEX}"]
    body = []
    for path in sorted(sizes.keys() | recorded.keys()):
        hidden = any(part.startswith(("_", ".")) for part in path.split("/"))
        if path.startswith(folder) and not hidden and path not in lost and path not in closing:
            record = recorded.get(path)
            size, digest = (record.bytes, record.sha256) if record else (sizes[path], None)
            name = path.removeprefix(folder)
            body.append(Item(storage.join(url, path), name, size, digest))
    last = [
        Item(storage.join(url, path), path.removeprefix(folder), sizes[path])
        for path in closing
        if path in sizes
    ]
    return body, last


def _check_no_links(url: str, paths: Iterable[str]) -> None:
    """Raises UserError for a link: it would carry a file from elsewhere on this machine into what others read."""
    if storage.is_local(url):
        folder = Path(storage.resolve(url)[1]).resolve()
        for path in paths:
            if (folder / path).resolve() != folder / path:
                raise UserError(
                    f"{url}/{path} is a link: only what the run itself made is published"
                )


def batches(
    items: Sequence[Item], most_files: int = BATCH_FILES, most_bytes: int = BATCH_BYTES
) -> list[list[Item]]:
    """Cuts a list into runs of at most that many files and bytes; a larger file is a run of its own."""
    cut: list[list[Item]] = []
    held = 0
    for item in items:
        if not cut or len(cut[-1]) == most_files or held + item.bytes > most_bytes:
            cut.append([])
            held = 0
        cut[-1].append(item)
        held += item.bytes
    return cut


def seconds_between_commits(commits: int) -> float:
    """The pause that keeps a long row of commits within what the hub takes an hour; none for a short row."""
    return 0.0 if commits <= HUB_COMMITS_AN_HOUR // 2 else 3600 / HUB_COMMITS_AN_HOUR * 1.1


def check_folders(paths: Iterable[str], most: int = HUB_FOLDER_ENTRIES) -> None:
    """Raises UserError where a folder would hold more entries than the hub takes."""
    entries: dict[str, set[str]] = {}
    for path in paths:
        parts = path.split("/")
        for depth, part in enumerate(parts):
            entries.setdefault("/".join(parts[:depth]), set()).add(part)
    for folder, found in entries.items():
        if len(found) > most:
            raise UserError(
                f"the folder {folder or 'at the top'} would hold {len(found)} files, the hub takes {most}: make the "
                f"stage with fewer, larger files (generate.shard_rows), or publish to a bucket"
            )


def check_nothing_else(items: Iterable[Item], present: Iterable[str], target: str) -> None:
    """Raises UserError where data of something else lies beside what is published: a reader would take both."""
    ours = {item.path for item in items}
    kinds = {(posixpath.dirname(path), posixpath.splitext(path)[1]) for path in ours}
    for path in present:
        kind = (posixpath.dirname(path), posixpath.splitext(path)[1])
        if path not in ours and kind in kinds and kind[1] in _DATA:
            raise UserError(
                f"{target} holds {path}, which is not of this stage, and would be read with it: choose another "
                f"target, or remove it there"
            )


def _lost_races(recorded: Iterable[str], present: Iterable[str]) -> set[str]:
    """Data files beside committed ones of the same kind that no record names."""
    named = set(recorded)
    kinds = {(posixpath.dirname(path), posixpath.splitext(path)[1]) for path in named}
    return {
        path
        for path in present
        if path not in named and (posixpath.dirname(path), posixpath.splitext(path)[1]) in kinds
    }


def _read(batch: Sequence[Item]) -> list[bytes]:
    """The verified contents of a batch."""
    try:
        contents = storage.read_many([item.source for item in batch])
    except FileNotFoundError as error:
        raise CorruptionError(f"{error}, though it was committed") from None
    for item, data in zip(batch, contents, strict=True):
        if item.sha256 is not None and storage.sha256(data) != item.sha256:
            raise CorruptionError(
                f"{item.source} is damaged: its sha256 is not the recorded {item.sha256}"
            )
    return contents


def _to_folder(
    body: list[Item], last: list[Item], target: str, tell: Callable[[str], None]
) -> Outcome:
    present = storage.tree(target)
    check_nothing_else(body, present, target)
    storage.check_writable(target)
    missing = [item for item in body if not _is_there(item, target, present)]
    copied = 0
    with ThreadPoolExecutor(8) as pool:
        for batch in batches(missing):
            urls = [storage.join(target, item.path) for item in batch]
            list(pool.map(storage.write, urls, _read(batch)))
            copied += len(batch)
            tell(f"{copied} of {len(missing)} files")
    arrived = storage.tree(target)
    for item in body:
        if arrived.get(item.path) != item.bytes:
            raise UserError(
                f"{storage.join(target, item.path)} has {arrived.get(item.path)} bytes, not {item.bytes}: somebody "
                f"else writes there; publish again, or choose another target"
            )
    for item, data in zip(last, _read(last), strict=True):
        storage.write(storage.join(target, item.path), data)
    return _outcome(missing, body, last)


def _is_there(item: Item, target: str, present: Mapping[str, int]) -> bool:
    """By size and hash: a name that holds the hash vouches for it, a local file is read."""
    if present.get(item.path) != item.bytes:
        return False
    if item.sha256 and f"-{item.sha256[:8]}." in item.path:
        return True
    if not storage.is_local(target):
        return False
    expected = item.sha256 or storage.sha256(storage.read_bytes(item.source))
    return storage.sha256(storage.read_bytes(storage.join(target, item.path))) == expected


def _to_hub(
    body: list[Item], last: list[Item], target: str, stage: str, tell: Callable[[str], None]
) -> Outcome:
    """A few commits, the closing files in the last one, since a commit appears as a whole."""
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
    where = {
        "repo_id": repository.id,
        "repo_type": repository.type,
        "revision": repository.revision,
    }

    def look() -> dict[str, RepoFile]:
        entries = api.list_repo_tree(**where, recursive=True)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    try:
        present = retrying(target, "list", look)
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

    def commit(files: Mapping[str, bytes], title: str) -> None:
        def send() -> None:
            added = [
                CommitOperationAdd(posixpath.join(folder, path), data)
                for path, data in files.items()
            ]
            api.create_commit(**where, operations=added, commit_message=title)

        retrying(target, "write", send)

    missing = [item for item in body if not is_there(item)]
    cut = batches(missing)
    pause = seconds_between_commits(len(cut) + 1)
    for number, batch in enumerate(cut):
        files = dict(zip((item.path for item in batch), _read(batch), strict=True))
        commit(files, f"calibprune: {stage}, part {number + 1} of {len(cut)}")
        tell(f"commit {number + 1} of {len(cut) + 1}")
        time.sleep(pause)
    closing = dict(zip((item.path for item in last), _read(last), strict=True))
    if stage in ("generate", "curate") and not folder and "README.md" not in present:
        closing["README.md"] = _CARD  # else the hub's loaders would guess among parquet and JSON
    commit(closing, f"calibprune: {stage}, complete")
    return _outcome(missing, body, last)


def _outcome(copied: Sequence[Item], body: Sequence[Item], last: Sequence[Item]) -> Outcome:
    total = sum(item.bytes for item in (*copied, *last))
    return Outcome(len(copied) + len(last), len(body) - len(copied), total)
