"""Streams documents from files, folders, URLs and the Hugging Face hub, and joins them to held-out texts.

Knows nothing of tokens: prefixes and windows are cut elsewhere. `datasets` reads the hub but not the files: on those it
is six times slower, loses line numbers, and treats a missing column as empty.
"""

import gzip
import json
import posixpath
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from calibprune import storage
from calibprune.config.evaluate import HeldOutText
from calibprune.errors import StoreUnavailable, UserError
from calibprune.redact import one_line
from calibprune.retry import denied, is_transient, redacted_url, retrying, status

PYTHON_DOCS = "python-docs"
_LINES = (".jsonl", ".json", ".ndjson")
_EXTENSIONS = (".txt", *_LINES, ".parquet")
_CAN_BE_READ = f"{', '.join(_EXTENSIONS)} (or .gz of these)"
_PARQUET_BATCH = 256
"""Number of documents in memory at a time; each may be a book."""
_HUB_ID = re.compile(r"(?:hf://datasets/[\w-][\w.-]*/|(?:[\w-][\w.-]*/)?)[\w-][\w.-]*")
HUB_SECONDS = 5.0
"""Time limit of the first request to the hub, and of its retries."""

Message = dict[str, Any]
"""A chat message: `role`, `content`, and whatever else the chat template uses."""
Row = tuple[Any, str]
"""A value of the column, and its place in words."""
T = TypeVar("T")


def documents(
    path: str, *, name: str | None = None, split: str = "train", column: str = "text"
) -> Iterator[str]:
    """Streams the documents of a text source in a fixed order, leaving blank ones out.

    `path` is a file (.txt: a document per line; .jsonl, .json with an object per line; .parquet;
    also .gz) or a folder of such files, local or at any fsspec URL; or a Hugging Face dataset id
    (with `name` and `split`), also as hf://datasets/org/name; or `python-docs`, the language
    documentation that comes with Python. Raises UserError where there is nothing at `path`, or while
    streaming where there is no such column or no text at all; StoreUnavailable where the hub cannot
    be reached.
    """
    rows = _rows(path, name, split, column)
    return _at_least_one(path, (_text(value, column, where) for value, where in rows))


def prompts(
    path: str, *, name: str | None = None, split: str = "train", column: str = "prompt"
) -> Iterator[str | list[Message]]:
    """Streams prompts as `documents` does documents; each is a text or a list of chat messages."""
    rows = _rows(path, name, split, column)
    return _at_least_one(path, (_text_or_messages(value, column, where) for value, where in rows))


def running_text(text: HeldOutText) -> str:
    """Reads the held-out text in one piece: a .txt file as it is, documents joined by the separator.

    Keeps blank documents, as is usual for measurements on WikiText. Raises as `documents` does.
    """
    rows = _rows(text.path, text.dataset_name, text.split, text.column, whole_files=True)
    joined = text.separator.join(_text(value, text.column, where) for value, where in rows)
    if not joined.strip():
        raise UserError(f"{text.path} holds no text")
    return joined


def _at_least_one(path: str, cells: Iterable[T]) -> Iterator[T]:
    empty = True
    for cell in cells:
        if cell.strip() if isinstance(cell, str) else cell:
            empty = False
            yield cell
    if empty:
        raise UserError(f"{path} holds no text")


def _rows(
    path: str, name: str | None, split: str, column: str, whole_files: bool = False
) -> Iterator[Row]:
    """Yields every row, blank ones too. The kind of source is decided before the first row."""
    if path == PYTHON_DOCS:
        from pydoc_data.topics import topics

        return ((topics[topic], path) for topic in sorted(topics))
    if _is_hub_id(path):
        return _hub_rows(path, name, split, column)
    fs, files = _files(path)
    readers = ((file, partial(_file_rows, fs, file, column, whole_files)) for file in files)
    return (row for file, begin in readers for row in _resumed(fs, file, begin))


def _is_hub_id(path: str) -> bool:
    """Returns whether a path must be a dataset's id: no local file or folder has its name, and no extension fits."""
    if not _HUB_ID.fullmatch(path):
        return False
    first = Path(path.split("/", 1)[0])
    return path.startswith("hf:") or not (_extension(path) or first.exists())


def _extension(path: str) -> str | None:
    return next((e for e in _EXTENSIONS if path.removesuffix(".gz").endswith(e)), None)


def _files(path: str) -> tuple[fsspec.AbstractFileSystem, list[str]]:
    url = str(Path(path).expanduser()) if "://" not in path else path
    fs, root = storage.resolve(url)
    if not storage.exists(url):
        hint = ""
        if _HUB_ID.fullmatch(path) and not _extension(path):
            hint = (
                f", though there is a folder {path.split('/', 1)[0]}: for the Hugging Face hub's dataset of that name "
                f"give hf://datasets/{path}"
            )
        raise UserError(f"no file or folder at {redacted_url(path)}{hint}")
    if storage.is_file(url):
        if not _extension(root):
            raise UserError(
                f"{redacted_url(path)} is of an unknown kind: {_CAN_BE_READ} can be read"
            )
        return fs, [root]
    found = [
        posixpath.join(root, file)
        for file in storage.tree(url)
        if _extension(file) and not posixpath.basename(file).startswith((".", "_"))
    ]
    if not found:
        raise UserError(f"no text in the folder {redacted_url(path)}: {_CAN_BE_READ} can be read")
    return fs, found


def _resumed(
    fs: fsspec.AbstractFileSystem, file: str, begin: Callable[[], Iterator[Row]]
) -> Iterator[Row]:
    """Yields what `begin()` does; after transient errors of a store reopens the file and skips what was yielded.

    Raises UserError where access is denied, OSError for lasting errors, which those of a local disk are.
    """
    local = isinstance(fs, LocalFileSystem)
    url = file if local else fs.unstrip_protocol(file)
    yielded, rows = 0, begin()

    def reopen() -> list[Row]:
        nonlocal rows
        rows = islice(begin(), yielded, None)
        return list(islice(rows, 1))

    while True:
        try:
            row = list(islice(rows, 1))
        except Exception as error:
            if not is_transient(error) and not denied(error):
                raise
            row = retrying(url, "read", reopen, 0.0 if local else None)
        if not row:
            return
        yielded += 1
        yield row[0]


def _file_rows(
    fs: fsspec.AbstractFileSystem, file: str, column: str, whole_files: bool
) -> Iterator[Row]:
    compression = "gzip" if file.endswith(".gz") else None
    with cast(BinaryIO, fs.open(file, "rb", compression=compression)) as stream:
        try:
            if _extension(file) == ".parquet":
                yield from _parquet_rows(stream, file, column)
            elif _extension(file) in _LINES:
                yield from _json_rows(stream, file, column)
            elif whole_files:
                yield _decoded(stream.read(), file), file
            else:
                for line in stream:
                    yield _decoded(line, file).rstrip("\r\n"), file
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{file} is not a complete gzip file: {one_line(error)}") from None


def _decoded(raw: bytes, file: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error}") from None


def _json_rows(stream: Iterable[bytes], file: str, column: str) -> Iterator[Row]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        where = f"line {number} of {file}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{where} is not a JSON object: every line must be one")
        if b"\\u" in line:
            _check_characters(row.get(column), where)
        yield _cell(row, column, where)


def _check_characters(value: Any, where: str) -> None:
    """Raises UserError for half of a surrogate pair, which JSON can express but no text may contain."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise UserError(f"{where} is not text: {half} is half of a character") from None


def _parquet_rows(stream: BinaryIO, file: str, column: str) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        parquet = ParquetFile(stream)
        names = parquet.schema_arrow.names
        if column not in names:
            raise _no_column(column, file, names)
        for batch in parquet.iter_batches(_PARQUET_BATCH, columns=[column]):
            for value in batch.column(0).to_pylist():
                yield value, file
    except (ArrowException, OSError, ValueError) as error:
        if is_transient(error) or denied(error):
            raise
        raise UserError(f"{file} is not a parquet file, or damaged: {one_line(error)}") from None


def _hub_rows(path: str, name: str | None, split: str, column: str) -> Iterator[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as formats
    from huggingface_hub.errors import OfflineModeIsEnabled

    if path in formats:  # these would read whatever is in the working directory, pickles included
        raise UserError(
            f"no text at {path}: that is a format of the datasets library, not a dataset"
        )
    nowhere = f"no text at {path}: no such file or folder here, and "
    try:
        _ask_hub(path.removeprefix("hf://datasets/"))
        rows = load_dataset(path, name, split=split, streaming=True)
    except DatasetNotFoundError:
        raise UserError(
            f"{nowhere}no such dataset on the Hugging Face hub (or no access to it)"
        ) from None
    except (ConnectionError, OfflineModeIsEnabled, StoreUnavailable) as error:
        kind = StoreUnavailable if isinstance(error, StoreUnavailable) else UserError
        raise kind(
            f"{nowhere}the Hugging Face hub cannot be reached for a dataset of that name"
        ) from None
    except ValueError as error:  # no such configuration or split
        raise UserError(f"dataset {path}: {one_line(error)}") from None
    return (_cell(row, column, f"dataset {path}") for row in rows)


def _ask_hub(dataset: str) -> None:
    """Asks the hub for a dataset before `datasets` does, since that retries for half a minute and logs every attempt.

    Raises DatasetNotFoundError, and StoreUnavailable after seconds without an answer.
    """
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    def ask() -> None:
        try:
            HfApi().dataset_info(dataset, timeout=HUB_SECONDS)
        except OfflineModeIsEnabled:
            return  # it may still be in the cache
        except HfHubHTTPError as error:
            if status(error) in (
                401,
                404,
            ):  # without a token the hub answers 401 for datasets that do not exist
                raise DatasetNotFoundError from None
            raise

    retrying(f"hf://datasets/{dataset}", "read", ask, HUB_SECONDS)


def _cell(row: dict[str, Any], column: str, where: str) -> Row:
    if column not in row:
        raise _no_column(column, where, row)
    return row[column], where


def _text(value: Any, column: str, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f'column "{column}" of {where} holds {type(value).__name__}, not text')
    return value


def _text_or_messages(value: Any, column: str, where: str) -> str | list[Message]:
    if not isinstance(value, list):
        return _text(value, column, where)
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(
                f'column "{column}" of {where} holds a list, but not of messages with role and content'
            )
    # a parquet file stores every key in every message, most of them empty
    return [{key: part for key, part in message.items() if part is not None} for message in value]


def _no_column(column: str, where: str, names: Iterable[str]) -> UserError:
    return UserError(f'no column "{column}" in {where}: it has {", ".join(names) or "none"}')
