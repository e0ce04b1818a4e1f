"""What ``bench_pull`` pulls from: a signed store with one large bundle, and a small server that gets out of the way.

``python -m tools.bench_pull_store FOLDER`` serves the folder on loopback, prints its address, and sends files from the
kernel (``sendfile``), so that Python is not what is measured. ``/_served`` tells requests, those for chunks among them,
and bytes so far.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import msgspec
from onnx import TensorProto, helper
from securesystemslib.signer import CryptoSigner

from agent.bundles.manifest import MANIFEST_SCHEMA
from agent.config import MIB
from tools.hub.bundle import MANIFEST, Bundle, open_bundle
from tools.hub.chunks import blob_name, cut
from tools.hub.objects import Folder
from tools.hub.publish import Publisher
from tools.hub.repository import Repository

TEAM: Final = "bench"
NAME: Final = "large"
PLAIN: Final = "plain.bin"  # the weights in one file, for curl
SERVED: Final = "/_served"
_RANGE: Final = re.compile(r"bytes=(\d+)-")
_SEND_BYTES: Final = 1 << 30


class LargeStore:
    """A store in ``folder/store`` whose one model has as many megabytes of random weights as asked for."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "store"
        self.anchor = folder / "anchor.json"
        self._folder = folder
        self._objects = Folder(self.root)
        self._repository = Repository(self._objects, time.time)
        self._online = CryptoSigner.generate_ed25519()
        self._team = CryptoSigner.generate_ed25519()
        root = CryptoSigner.generate_ed25519()
        self.anchor.write_bytes(
            self._repository.initialise(
                root_keys=[root.public_key],
                root_signers=[root],
                threshold=1,
                targets_signer=CryptoSigner.generate_ed25519(),
                online_signer=self._online,
                teams={TEAM: self._team.public_key},
                top_targets={},
            )
        )

    def publish_random(self, megabytes: int, advance: Callable[[int], None]) -> Bundle:
        """Publish version 1.0.0; the same weights are also ``PLAIN``."""
        plain = self.root / PLAIN
        with plain.open("wb") as file:
            for _ in range(megabytes):
                file.write(os.urandom(MIB))
                advance(MIB)
        return self._publish("1.0.0", plain)

    def publish_with_insertion(self, size: int) -> Bundle:
        """Publish version 1.1.0: the same weights with ``size`` bytes inserted in the middle."""
        plain, changed = self.root / PLAIN, self._folder / "changed.bin"
        half = plain.stat().st_size // 2
        with plain.open("rb") as source, changed.open("wb") as target:
            os.copy_file_range(source.fileno(), target.fileno(), half)
            target.seek(half)
            target.write(os.urandom(size))
            target.flush()
            source.seek(half)
            while data := source.read(MIB):
                target.write(data)
        bundle = self._publish("1.1.0", changed)
        changed.unlink()
        return bundle

    def _publish(self, version: str, weights: Path) -> Bundle:
        out = self._folder / f"packed-{version}"
        out.mkdir()
        model = out / "model.onnx"
        model.write_bytes(_model())
        files = [_file(out, model, "model", "onnx"), _file(out, weights, "weights", "onnx-data")]
        (out / MANIFEST).write_bytes(msgspec.json.encode(_document(version, files)))
        bundle = open_bundle(out)
        Publisher(self._objects, self._repository, time.time).publish(
            bundle, team_signer=self._team, online_signer=self._online, channels=("stable",)
        )
        return bundle


def _file(out: Path, path: Path, role: str, file_format: str) -> dict[str, Any]:
    hasher, chunks, size = sha256(), [], 0
    for chunk, stored in cut(path, compress=False):
        blob = out / blob_name(chunk.stored_sha256)
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(stored)
        hasher.update(stored)
        size += len(stored)
        chunks.append([chunk.raw_sha256, chunk.raw_size])
    name = path.name if role == "model" else "weights.bin"
    return {"path": name, "size": size, "sha256": hasher.hexdigest(), "role": role, "format": file_format,
            "chunks": chunks}  # fmt: skip


def _model() -> bytes:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"])],
    )
    data: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString()
    return data


def _document(version: str, files: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "schema": MANIFEST_SCHEMA,
        "team": TEAM,
        "name": NAME,
        "version": version,
        "seq": int(version.replace(".", "")),
        "created": "2026-11-01T00:00:00Z",
        "total_size": sum(file["size"] for file in files),
        "files": files,
        "variants": [
            {
                "id": "cpu",
                "priority": 10,
                "runtime": "onnxruntime",
                "entry": "model.onnx",
                "files": [file["path"] for file in files],
                "precision": "fp32",
                "device": {"kind": "cpu", "providers": ["CPUExecutionProvider"]},
            }
        ],
        "signature": {
            "inputs": [{"name": "x", "dtype": "float32", "shape": ["N"]}],
            "outputs": [{"name": "y", "dtype": "float32", "shape": ["N"]}],
        },
        "handler": {"id": "tensors/v1"},
    }


class _Served:
    """Counts of one server."""

    def __init__(self) -> None:
        self.counts = {"requests": 0, "chunks": 0, "bytes": 0}
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    folder: Path
    served: _Served

    def handle(self) -> None:
        with suppress(ConnectionResetError):  # a puller that was killed
            super().handle()

    def do_GET(self) -> None:
        if self.path == SERVED:
            return self._answer(json.dumps(self.served.counts).encode())
        with self.served.lock:
            self.served.counts["requests"] += 1
            self.served.counts["chunks"] += "/blobs/" in self.path
        try:
            with (self.folder / self.path.lstrip("/")).open("rb", buffering=0) as file:
                self._send(file.fileno())
        except (FileNotFoundError, IsADirectoryError):
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        return None

    def _send(self, descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        self.send_response(206 if match else 200)
        if match:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        self.wfile.flush()
        while start < size:
            sent = os.sendfile(self.connection.fileno(), descriptor, start, min(_SEND_BYTES, size - start))
            start += sent
            with self.served.lock:
                self.served.counts["bytes"] += sent

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


def serve(folder: Path) -> None:
    """Serve ``folder`` until standard input ends."""
    served = _Served()
    handler = type("Handler", (_Handler,), {"folder": folder, "served": served})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
