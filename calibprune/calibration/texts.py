"""Documents from files, folders, URLs and the Hugging Face hub, streamed, and the held-out texts made of them.

Knows nothing of tokens: cutting prefixes and windows happens elsewhere.
"""

import json
import posixpath
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from calibprune import storage
from calibprune.config.evaluate import HeldOutText
from calibprune.errors import UserError
from calibprune.redact import one_line
from calibprune.retry import denied, passes, retrying, shown

PYTHON_DOCS = "python-docs"
_TEXT = (".txt",)
_LINES = (".jsonl", ".json", ".ndjson")
_PARQUET = (".parquet",)
_PARQUET_BATCH = 256
"""Documents held at a time; they may be books."""
_EXTENSIONS = (*_TEXT, *_LINES, *_PARQUET)

Message = dict[str, Any]
"""A chat message: `role`, `content`, and what else the chat template knows."""
Cell = TypeVar("Cell", str, str | list[Message])
_Take = Callable[[Any, str, str], Cell]
"""(value, column, where) -> the value, checked."""


def documents(
    path: str, *, name: str | None = None, split: str = "train", column: str = "text"
) -> Iterator[str]:
    """Streams the documents of a text source in a fixed order, leaving blank ones out.

    `path` is a file (.txt: a document per line; .jsonl, .json with an object per line; .parquet;
    also .gz) or a folder of such files, local or at any fsspec URL; or a Hugging Face dataset id
    (with `name` and `split`); or `python-docs`, the language documentation that Python carries.
    Raises UserError where there is nothing at `path`, or while streaming where there is no such
    column or no text at all.
    """
    return _at_least_one(path, _rows(path, name, split, column, _text))


def prompts(
    path: str, *, name: str | None = None, split: str = "train", column: str = "prompt"
) -> Iterator[str | list[Message]]:
    """Streams prompts as `documents` does documents; each is a text or a list of chat messages."""
    return _at_least_one(path, _rows(path, name, split, column, _text_or_messages))


def running_text(text: HeldOutText, *, characters: int | None = None) -> str:
    """The held-out text in one piece: a .txt file as it is, documents joined by the separator.

    Blank documents stay in, as in the usual way to measure on WikiText. With `characters`, reading
    stops as soon as that many are there. Raises UserError as `documents` does.
    """
    pieces: list[str] = []
    length = 0
    rows = _rows(text.path, text.dataset_name, text.split, text.column, _text, whole_files=True)
    for row in rows:
        pieces.append(row)
        length += len(row) + len(text.separator)
        if characters is not None and length >= characters:
            break
    joined = text.separator.join(pieces)
    if not joined.strip():
        raise UserError(f"{text.path} holds no text")
    return joined


def _at_least_one(path: str, rows: Iterable[Cell]) -> Iterator[Cell]:
    empty = True
    for row in rows:
        if row.strip() if isinstance(row, str) else row:
            empty = False
            yield row
    if empty:
        raise UserError(f"{path} holds no text")


def _rows(
    path: str,
    name: str | None,
    split: str,
    column: str,
    take: _Take[Cell],
    whole_files: bool = False,
) -> Iterator[Cell]:
    """Every row, blank ones too. What `path` is gets settled at once, before the first row."""
    if path == PYTHON_DOCS:
        return (take(text, column, path) for text in _python_docs())
    if _looks_like_hub_id(path):
        return _hub_rows(path, name, split, column, take)
    return _file_rows(*_files(path), column, take, whole_files)


def _python_docs() -> Iterator[str]:
    from pydoc_data.topics import topics

    return (topics[topic] for topic in sorted(topics))


def _looks_like_hub_id(path: str) -> bool:
    if "://" in path or path.startswith(("/", ".", "~")) or path.count("/") > 1:
        return False
    return not _extension(path) and not Path(path).exists()


def _extension(path: str) -> str | None:
    return next((e for e in _EXTENSIONS if path.removesuffix(".gz").endswith(e)), None)


def _files(path: str) -> tuple[fsspec.AbstractFileSystem, list[str]]:
    url = str(Path(path).expanduser()) if "://" not in path else path
    fs, root = storage.resolve(url)
    if not storage.exists(url):
        raise UserError(f"no file or folder at {shown(path)}")
    if storage.is_file(url):
        if not _extension(root):
            raise UserError(
                f"{shown(path)} is of an unknown kind: {_known_extensions()} can be read"
            )
        return fs, [root]
    found = [
        posixpath.join(root, file)
        for file in storage.tree(url)
        if _extension(file) and not posixpath.basename(file).startswith((".", "_"))
    ]
    if not found:
        raise UserError(
            f"no text in the folder {shown(path)}: {_known_extensions()} files are looked for"
        )
    return fs, found


def _known_extensions() -> str:
    return ", ".join(_EXTENSIONS) + " (or .gz of these)"


def _file_rows(
    fs: fsspec.AbstractFileSystem,
    files: list[str],
    column: str,
    take: _Take[Cell],
    whole_files: bool,
) -> Iterator[Cell]:
    for file in files:
        yield from _resumed(fs, file, partial(_rows_of, fs, file, column, take, whole_files))


def _resumed(
    fs: fsspec.AbstractFileSystem, file: str, begin: Callable[[], Iterator[Cell]]
) -> Iterator[Cell]:
    """What `begin()` yields; where a store fails in passing the file is opened again, and what came is passed over.

    Raises UserError where access is denied, OSError for trouble that does not pass: a local disk's never does.
    """
    local = isinstance(fs, LocalFileSystem)
    url = file if local else fs.unstrip_protocol(file)
    given, rows = 0, begin()

    def again() -> list[Cell]:
        nonlocal rows
        rows = islice(begin(), given, None)
        return list(islice(rows, 1))

    while True:
        try:
            row = list(islice(rows, 1))
        except Exception as error:
            if not passes(error) and not denied(error):
                raise
            row = retrying(url, "read", again, 0.0 if local else None)
        if not row:
            return
        given += 1
        yield row[0]


def _rows_of(
    fs: fsspec.AbstractFileSystem, file: str, column: str, take: _Take[Cell], whole_files: bool
) -> Iterator[Cell]:
    extension = _extension(file)
    compression = "gzip" if file.endswith(".gz") else None
    with cast(BinaryIO, fs.open(file, "rb", compression=compression)) as stream:
        if extension in _PARQUET:
            yield from _parquet_rows(stream, file, column, take)
        elif extension in _LINES:
            yield from _json_rows(stream, file, column, take)
        elif whole_files:
            yield take(_decoded(stream.read(), file), column, file)
        else:
            for line in stream:
                yield take(_decoded(line, file).rstrip("\r\n"), column, file)


def _decoded(raw: bytes, file: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error}") from None


def _json_rows(
    stream: Iterable[bytes], file: str, column: str, take: _Take[Cell]
) -> Iterator[Cell]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        where = f"line {number} of {file}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{where} is not a JSON object: one object per line is read")
        yield _cell(row, column, where, take)


def _parquet_rows(stream: BinaryIO, file: str, column: str, take: _Take[Cell]) -> Iterator[Cell]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        parquet = ParquetFile(stream)
    except (ArrowException, OSError, ValueError) as error:
        if passes(error) or denied(error):
            raise
        raise UserError(f"{file} is not a parquet file: {one_line(error)}") from None
    names = parquet.schema_arrow.names
    if column not in names:
        raise _no_column(column, file, names)
    for batch in parquet.iter_batches(_PARQUET_BATCH, columns=[column]):
        for value in batch.column(0).to_pylist():
            yield take(value, column, file)


def _hub_rows(
    path: str, name: str | None, split: str, column: str, take: _Take[Cell]
) -> Iterator[Cell]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as formats
    from huggingface_hub.errors import OfflineModeIsEnabled

    if path in formats:  # which would read whatever lies in the working directory, pickles among it
        raise UserError(f"no text at {path}: that is a format of the datasets library, no dataset")
    try:
        rows = load_dataset(path, name, split=split, streaming=True)
    except DatasetNotFoundError:
        raise UserError(
            f"no text at {path}: no such file or folder here, and no such dataset on the "
            "Hugging Face hub (or no access to it)"
        ) from None
    except (ConnectionError, OfflineModeIsEnabled):
        raise UserError(
            f"no text at {path}: no such file or folder here, "
            "and the Hugging Face hub cannot be reached for a dataset of that name"
        ) from None
    except ValueError as error:  # no such configuration or split
        raise UserError(f"dataset {path}: {one_line(error)}") from None
    return (_cell(row, column, f"dataset {path}", take) for row in rows)


def _cell(row: dict[str, Any], column: str, where: str, take: _Take[Cell]) -> Cell:
    if column not in row:
        raise _no_column(column, where, row)
    return take(row[column], column, where)


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
    # a parquet file has every key in every message, most of them empty
    return [{key: part for key, part in message.items() if part is not None} for message in value]


def _no_column(column: str, where: str, names: Iterable[str]) -> UserError:
    return UserError(f'no column "{column}" in {where}: it has {", ".join(names) or "none"}')
