"""A repository of the Hugging Face hub on loopback, with the part of the protocol that the library's uploads need."""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock
from urllib.parse import urlsplit

LARGE = (".parquet", ".safetensors")


@dataclass
class Hub:
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, list[str]]] = field(default_factory=list)
    """Title and paths of each commit."""
    uploads: dict[str, bytes] = field(default_factory=dict)
    """Large files by their sha256, committed or not."""
    failures: dict[str, int] = field(default_factory=dict)
    """Number of the next requests to answer with 503, by the end of their path."""


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    """Serves this repository for every one that this process asks the hub for."""
    state = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            path, data = urlsplit(self.path).path, self._body()
            failing = [end for end, times in state.failures.items() if times and path.endswith(end)]
            for end in failing:
                state.failures[end] -= 1
            for part, answer in self.routes.items():
                if part in path and not failing:
                    return self._answer(200, answer(self, path, data))
            return self._answer(503 if failing else 404, {})

        do_GET = do_POST = do_PUT = handle_any

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)

        def _tree(self, path: str, data: bytes) -> list[dict]:
            return [_entry(*item) for item in state.files.items()]

        def _upload(self, path: str, data: bytes) -> dict:
            digest = hashlib.sha256(data).hexdigest()
            assert digest == path.rsplit("/", 1)[1], "these are not the bytes that were named"
            state.uploads[digest] = data
            return {}

        def _batch(self, path: str, data: bytes) -> dict:
            return {"objects": [self._wanted(one) for one in json.loads(data)["objects"]]}

        def _preupload(self, path: str, data: bytes) -> dict:
            return {"files": [_mode(file) for file in json.loads(data)["files"]]}

        def _wanted(self, found: dict) -> dict:
            href = f"http://{self.headers['Host']}/upload/{found['oid']}"
            there = found["oid"] in state.uploads
            return found | ({} if there else {"actions": {"upload": {"href": href}}})

        def _commit(self, path: str, data: bytes) -> dict:
            header, *files = [json.loads(line) for line in data.splitlines()]
            for line in files:
                value = line["value"]
                large = line["key"] == "lfsFile"
                content = None if large else base64.b64decode(value["content"])
                state.files[value["path"]] = state.uploads[value["oid"]] if large else content
            state.commits.append(
                (header["value"]["summary"], [line["value"]["path"] for line in files])
            )
            url = f"http://{self.headers['Host']}/org/name/commit/0"
            return {"commitUrl": url, "commitOid": "0"}

        routes = {  # noqa: RUF012
            "/tree/": _tree,
            "/upload/": _upload,
            "/objects/batch": _batch,
            "/preupload/": _preupload,
            "/commit/": _commit,
            "/validate-yaml": lambda self, path, data: {},
        }

        def _answer(self, status: int, content: object) -> None:
            body = json.dumps(content).encode()
            self.send_response_only(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {
        "ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }
    try:
        with mock.patch.multiple("huggingface_hub.constants", **settings):
            yield state
    finally:
        server.shutdown()
        server.server_close()


def _mode(file: dict) -> dict:
    mode = "lfs" if file["path"].endswith(LARGE) else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}


def _entry(path: str, data: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(data), "oid": "0" * 40}
    if path.endswith(LARGE):
        digest = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
    return entry
