"""Hugging Face safetensors checkpoints by URL: named tensors by byte range, and new checkpoints a layer at a time.

Only safetensors: a pickle can run code when it is opened. Nothing here knows a model's architecture.
"""

import json
import math
import posixpath
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from httpx2 import HTTPError
from huggingface_hub.errors import HfUriError
from torch import Tensor

from calibprune import storage
from calibprune.errors import CorruptionError, StoreUnavailable, UserError
from calibprune.redact import one_line
from calibprune.retry import is_transient

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PIECE_BYTES, WAVE_BYTES = 64 << 20, 512 << 20
"""Bytes of one read, and of all reads at the same time."""
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NOT_READ = (OSError, HTTPError, HfUriError)
_NO_PICKLE = (
    "save it as safetensors first (as model.save_pretrained does), calibprune opens no pickles"
)
_SIDE_FILE = re.compile(r".+\.(json|jinja|txt|model|tiktoken|py)|LICENSE.*|NOTICE.*|USE_POLICY.*")
_NOT_A_SIDE_FILE = re.compile(r".+\.index\.json|pruning\.json")


@dataclass(frozen=True)
class Location:
    """The place of a tensor: bytes [start, stop) of a file."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        return self.stop - self.start


class Checkpoint:
    """Reads the tensors of a checkpoint folder by name.

    Opening reads the headers and compares them with the sizes of the files. Raises UserError when the folder is
    missing, gated, holds no safetensors or lacks a file that its index names, CorruptionError for a damaged file,
    StoreUnavailable when a store's transient errors last too long.
    """

    def __init__(self, path: str, hashes: Mapping[str, str] | None = None) -> None:
        """Opens the folder. A file named in `hashes`, of sha256, is read whole and verified when it is first used."""
        self.url = model_url(path)
        self._unverified = dict(hashes or {})
        self.bytes_read = 0
        try:
            sizes = self._files()
            headers = {file: self._header(file) for file in sizes}
        except EOFError as error:
            raise CorruptionError(str(error)) from None
        except _NOT_READ as error:
            raise _unreadable(path, error) from None
        self.locations: dict[str, Location] = {}
        for file, (header, offset) in headers.items():
            url = storage.join(self.url, file)
            here = {
                name: _location(url, name, entry, offset)
                for name, entry in header.items()
                if name != "__metadata__"
            }
            _check_whole(url, here, offset, sizes[file])
            self.locations |= here
        self._headers = {file: header for file, (header, _) in headers.items()}

    @property
    def bytes(self) -> int:
        return sum(location.bytes for location in self.locations.values())

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Reads tensors into aligned memory of their own, on the CPU, in their stored dtype."""
        tensors = {}
        for name in names:
            location = self.locations[name]
            # torch allocates on 64-byte boundaries; results of products may depend on alignment
            buffer = torch.empty(location.bytes, dtype=torch.uint8)
            tensors[name] = buffer.view(location.dtype).view(location.shape)
        self.read_into(tensors)
        return tensors

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fills contiguous CPU tensors of the stored dtypes and shapes, a few hundred MB at a time."""
        left = {name: self.locations[name] for name in tensors}
        for file in {location.file for location in left.values()} & self._unverified.keys():
            data = self._verified(file)
            for name in [name for name, location in left.items() if location.file == file]:
                location = left.pop(name)
                _fill(tensors[name], 0, data[location.start : location.stop])
        for wave in _waves(left):
            ranges = [
                (storage.join(self.url, self.locations[name].file), start, stop)
                for name, start, stop in wave
            ]
            try:
                chunks = storage.read_ranges(ranges)
            except EOFError as error:
                raise CorruptionError(f"a shard of the model is cut short: {error}") from None
            for (name, start, _), chunk in zip(wave, chunks, strict=True):
                _fill(tensors[name], start - self.locations[name].start, chunk)
                self.bytes_read += len(chunk)

    def identity(self) -> str:
        """Hashes the config, the headers and a sample of every file's weights, which is cheap for any size of model."""
        parts = [storage.read_bytes(storage.join(self.url, "config.json"))]
        for file in sorted(self._headers):
            parts.append(json.dumps([file, self._headers[file]], sort_keys=True).encode())
            here = [location for location in self.locations.values() if location.file == file]
            for location in {here[0], here[len(here) // 2], here[-1]} if here else ():
                middle = (location.start + location.stop) // 2
                start, stop = max(location.start, middle - 2048), min(location.stop, middle + 2048)
                parts.append(storage.read_range(storage.join(self.url, file), start, stop))
        return storage.sha256(b"".join(sorted(storage.sha256(part).encode() for part in parts)))

    def _verified(self, file: str) -> memoryview:
        """Reads a whole file and verifies its hash."""
        expected, data = self._unverified.pop(file), storage.read_bytes(f"{self.url}/{file}")
        self.bytes_read += len(data)
        if storage.sha256(data) != expected:
            raise CorruptionError(
                f"{self.url}/{file} is damaged: its sha256 is not {expected}, which its stage recorded: remove it and "
                f"its record in the stage's folder _done, then `calibprune prune` with the configuration of that run "
                f"makes it again"
            )
        return memoryview(data)

    def _files(self) -> dict[str, int | None]:
        """Lists the files that hold tensors with their sizes, None where the store does not give them."""
        present = storage.sizes(self.url, links=True)
        if INDEX in present:
            files = _indexed(storage.join(self.url, INDEX))
            pickled = [file for file in files if not file.endswith(".safetensors")]
            if pickled:
                raise UserError(f"{self.url}: the index names {pickled[0]}, {_NO_PICKLE}")
            missing = [file for file in files if file not in present]
            if missing:
                raise UserError(f"{self.url}: the index names {missing[0]}, which is not there")
            return {file: present[file] for file in files}
        if SINGLE in present:
            return {SINGLE: present[SINGLE]}
        if any(name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt")) for name in present):
            raise UserError(f"{self.url} holds pickled weights only; {_NO_PICKLE}")
        raise UserError(
            f"{self.url} is no model folder: no {INDEX} and no {SINGLE} in it (links to other folders are not followed)"
        )

    def _header(self, file: str) -> tuple[dict[str, Any], int]:
        url = storage.join(self.url, file)
        length = int.from_bytes(storage.read_range(url, 0, 8), "little")
        if length > 100_000_000:
            raise CorruptionError(f"{url} is not a safetensors file")
        self.bytes_read += 8 + length
        try:
            header = json.loads(storage.read_range(url, 8, 8 + length))
        except (ValueError, RecursionError):
            header = None
        if not isinstance(header, dict):
            raise CorruptionError(f"{url} is not a safetensors file")
        return header, 8 + length


def _fill(tensor: Tensor, start: int, data: bytes | memoryview) -> None:
    """Puts bytes into a contiguous tensor, from its byte `start` on."""
    flat = tensor.view(-1).view(torch.uint8).numpy()
    flat[start : start + len(data)] = np.frombuffer(data, dtype=np.uint8)


def _location(url: str, name: str, entry: Any, offset: int) -> Location:
    """Reads a tensor's place out of a header. Raises CorruptionError for an impossible one, UserError for its dtype."""
    try:
        start, stop = (int(position) for position in entry["data_offsets"])
        shape, named = tuple(map(int, entry["shape"])), str(entry["dtype"])
    except (TypeError, ValueError, KeyError, OverflowError):
        raise CorruptionError(
            f"{url} is damaged: its header does not say where {name} is"
        ) from None
    dtype = _DTYPES.get(named)
    if dtype is None:
        raise UserError(
            f"{url}: tensor {name} has the dtype {named}, which is none of {', '.join(_DTYPES)}"
        )
    if start < 0 or min(shape, default=0) < 0 or stop - start != math.prod(shape) * dtype.itemsize:
        raise CorruptionError(
            f"{url} is damaged: {name} of shape {shape} cannot be bytes {start} to {stop}"
        )
    return Location(posixpath.basename(url), dtype, shape, offset + start, offset + stop)


def _check_whole(
    url: str, locations: Mapping[str, Location], offset: int, size: int | None
) -> None:
    """Raises CorruptionError unless the tensors lie end to end, from the header to the end of the file."""
    end = offset
    for name, location in sorted(locations.items(), key=lambda one: (one[1].start, one[1].stop)):
        if location.start != end:
            raise CorruptionError(
                f"{url} is damaged: {name} begins at byte {location.start}, what lies before it ends at byte {end}"
            )
        end = location.stop
    if size is not None and size != end:
        raise CorruptionError(
            f"{url} is damaged: it has {size:,} bytes, its header describes {end:,}: copy it again from an intact "
            f"source"
        )


def _indexed(url: str) -> list[str]:
    """Lists the files that an index names, sorted. Raises CorruptionError for a file that is no index."""
    try:
        index = storage.read_json(url)
        files = set(index["weight_map"].values())
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        files = set[Any]()
    if not files or not all(isinstance(file, str) for file in files):
        raise CorruptionError(f"{url} is damaged: it does not say which files hold the weights")
    return sorted(files)


def _waves(locations: Mapping[str, Location]) -> Iterator[list[tuple[str, int, int]]]:
    """Groups (name, first byte, last byte + 1) of pieces to read at the same time within bounded memory."""
    pieces = [
        (name, start, min(start + PIECE_BYTES, location.stop))
        for name, location in locations.items()
        for start in range(location.start, location.stop, PIECE_BYTES)
    ]
    wave: list[tuple[str, int, int]] = []
    held = 0
    for piece in pieces:
        size = piece[2] - piece[1]
        if wave and held + size > WAVE_BYTES:
            yield wave
            wave, held = [], 0
        wave.append(piece)
        held += size
    if wave:
        yield wave


def model_url(path: str) -> str:
    """Returns the URL of a model folder: of a local folder, a URL, or a hub id `org/name` as hf://org/name."""
    if "://" in path:
        return path.rstrip("/")
    if Path(path).is_dir():
        return str(Path(path).resolve())
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.startswith((".", "~")):
        return f"hf://{path}"
    raise UserError(
        f"there is no model at {path}: give a folder, a URL or a hub id like org/name, or make the demo's model with "
        f"`calibprune demo-model FOLDER`"
    )


def side_files(url: str) -> list[str]:
    """Lists the small files beside the weights: config, generation config, tokenizer, licence.

    Links that lead elsewhere are left out: see storage.names.
    """
    return [
        name
        for name in storage.names(url, links=True)
        if _SIDE_FILE.fullmatch(name) and not _NOT_A_SIDE_FILE.fullmatch(name)
    ]


@contextmanager
def local_side_files(url: str) -> Iterator[str]:
    """Provides a local folder with the small files of a checkpoint for transformers' own loaders."""
    names = side_files(url)
    if storage.is_local(url):
        yield url
        return
    with tempfile.TemporaryDirectory(prefix="calibprune-") as folder:
        for name in names:
            with storage.full_disk_named(folder):
                Path(folder, name).write_bytes(storage.read_bytes(storage.join(url, name)))
        yield folder


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Writes tensors as a safetensors file; equal tensors give equal bytes."""
    contiguous = {name: tensors[name].contiguous() for name in sorted(tensors)}
    return safetensors.torch.save(contiguous, metadata={"format": "pt"})


def from_bytes(data: bytes) -> dict[str, Tensor]:
    """Reads the tensors of a safetensors file, each into aligned memory of its own."""
    return {name: tensor.clone() for name, tensor in safetensors.torch.load(data).items()}


def index_bytes(weight_map: Mapping[str, str], total_bytes: int) -> bytes:
    return storage.json_bytes(
        {"metadata": {"total_size": total_bytes}, "weight_map": dict(weight_map)}
    )


def check_reachable(path: str, patience_seconds: float) -> None:
    """Lists a model's folder once. Raises StoreUnavailable after `patience_seconds`, UserError for lasting errors."""
    try:
        storage.names(model_url(path), patience_seconds)
    except _NOT_READ as error:
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: Exception) -> Exception:
    kind = StoreUnavailable if is_transient(error) else UserError
    message = f"cannot read the model at {path}: {_reason(error)}"
    if model_url(path) == f"hf://{path}":
        message += f"; there is no folder {path} here, so it was taken for a hub id"
    return kind(message)


def _reason(error: Exception) -> str:
    text = one_line(error)
    if "gated" in text.lower() or "401" in text or "403" in text:
        return f"access denied; for a gated model accept its terms and run `hf auth login` ({text[:200]})"
    return text
