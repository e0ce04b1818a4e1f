"""A real signed store with all its keys in the test's hands: what its publisher, or a thief, could make of it.

``StoreWorld`` publishes through the product's own publisher and can then lie in every way signatures allow.
``StoreServer`` serves a folder over HTTP and fails as told.
"""

from __future__ import annotations

import json
import re
import shutil
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root, Timestamp
from tuf.api.serialization.json import JSONSerializer

from agent.bundles.commands import PAYLOAD_TYPE
from agent.bundles.manifest import OPERATORS_TARGET, Index, IndexEntry
from agent.bundles.names import index_target
from tests.fakes import bundles
from tools.hub.bundle import Bundle
from tools.hub.objects import Folder
from tools.hub.publish import Publisher, operators_document, read_index
from tools.hub.repository import Repository


class StoreWorld:
    """A store in ``folder/store`` with teams ``vision`` and ``audio``; ``anchor`` is its first root."""

    def __init__(self, folder: Path, *, now: Callable[[], float] = time.time) -> None:
        self.root = folder / "store"
        self.anchor = folder / "anchor.json"
        self._folder = folder
        self.now = now
        self._objects = Folder(self.root)
        self._repository = Repository(self._objects, now)
        self.root_signers = [CryptoSigner.generate_ed25519() for _ in range(3)]
        self.targets = CryptoSigner.generate_ed25519()
        self.online = CryptoSigner.generate_ed25519()
        self.operator = CryptoSigner.generate_ed25519()
        self.teams = {team: CryptoSigner.generate_ed25519() for team in ("vision", "audio")}
        root = self._repository.initialise(
            root_keys=[signer.public_key for signer in self.root_signers],
            root_signers=self.root_signers[:2],
            threshold=2,
            targets_signer=self.targets,
            online_signer=self.online,
            teams={team: signer.public_key for team, signer in self.teams.items()},
            top_targets={OPERATORS_TARGET: operators_document("default", [self.operator.public_key])},
        )
        self.anchor.write_bytes(root)

    @property
    def url(self) -> str:
        """The store as ``file://``."""
        return f"file://{self.root}"

    def publish(
        self,
        version: str = "1.0.0",
        files: Mapping[str, bytes] | None = None,
        *,
        channels: tuple[str, ...] = ("stable",),
        zstd: bool = False,
        **changes: Any,
    ) -> Bundle:
        """Pack and publish a version of ``vision/tiny`` (or what ``changes`` says)."""
        bundle = self.pack(version, files, zstd=zstd, **changes)
        Publisher(self._objects, self._repository, self.now).publish(
            bundle,
            team_signer=self.teams[bundle.manifest.team],
            online_signer=self.online,
            channels=channels,
        )
        return bundle

    def pack(
        self, version: str, files: Mapping[str, bytes] | None = None, *, zstd: bool = False, **changes: Any
    ) -> Bundle:
        """Pack a version without publishing it."""
        folder = self._folder / "packed" / f"{changes.get('name', 'tiny')}-{version}"
        files = bundles.plain_files() if files is None else files
        return bundles.pack(folder, files, zstd=zstd, **({"version": version, "seq": _seq(version)} | changes))

    def publish_unchecked(self, manifest: dict[str, Any], *, name: str = "tiny", version: str = "2.0.0") -> None:
        """Sign a manifest that no publisher would, its bytes as they are, as that of ``vision/<name>``."""
        data = msgspec.json.encode(manifest)
        team = "vision"
        state = self._repository.state()
        index = read_index(self._repository, state, team, name) or Index(
            schema="edge-model-index/1", team=team, name=name, generated=""
        )
        entry = IndexEntry(
            version=version, seq=manifest["seq"], manifest_sha256=_sha256(data), bytes=len(data), created=""
        )
        index = msgspec.structs.replace(
            index, versions=(*index.versions, entry), channels=index.channels | {"stable": version}
        )
        edition = self._repository.edition(state)
        edition.add_team_target(team, f"models/{team}/{name}/{version}.json", data)
        self._sign_index(edition, index)

    def revoke(self, version: str, reason: str) -> None:
        """Mark a version of ``vision/tiny`` revoked."""
        state = self._repository.state()
        index = read_index(self._repository, state, "vision", "tiny")
        assert index is not None
        versions = tuple(
            msgspec.structs.replace(entry, status="revoked", reason=reason) if entry.version == version else entry
            for entry in index.versions
        )
        self._sign_index(self._repository.edition(state), msgspec.structs.replace(index, versions=versions))

    def stamp(self, *, version: int | None = None, age_s: float = 0.0, valid_s: float = 7 * 86_400) -> None:
        """Sign the timestamp anew, dated ``age_s`` ago or as ``version``, valid for ``valid_s`` from that date."""
        path = self.root / "metadata" / "timestamp.json"
        metadata = Metadata[Timestamp].from_bytes(path.read_bytes())
        date = self.now() - age_s
        metadata.signed.version = int(date) if version is None else version
        metadata.signed.expires = datetime.fromtimestamp(int(date + valid_s), UTC)
        metadata.sign(self.online)
        path.write_bytes(metadata.to_bytes(JSONSerializer()))

    def rotate_online_key(self) -> None:
        """Publish a root that replaces the key of timestamp and snapshot, and sign both with the new one."""
        stolen, self.online = self.online, CryptoSigner.generate_ed25519()

        def change(root: Root) -> None:
            for role in ("timestamp", "snapshot"):
                root.revoke_key(stolen.public_key.keyid, role)
                root.add_key(self.online.public_key, role)

        self._publish_root(change, self.root_signers[:2])
        self._resign_snapshot()

    def rotate_root_key(self) -> CryptoSigner:
        """Replace the first root key; old and new keys sign. Return the key that may sign no more."""
        old, new = self.root_signers[0], CryptoSigner.generate_ed25519()

        def change(root: Root) -> None:
            root.revoke_key(old.public_key.keyid, "root")
            root.add_key(new.public_key, "root")

        self._publish_root(change, [old, new, self.root_signers[1]])
        self.root_signers[0] = new
        return old

    def maintain(self) -> None:
        """Sign every role anew, as its people do before it expires."""
        self._publish_root(lambda root: None, self.root_signers[:2])
        edition = self._repository.edition(self._repository.state())
        edition.add_top_target(OPERATORS_TARGET, operators_document("default", [self.operator.public_key]))
        edition.sign_top(self.targets)
        for team, signer in self.teams.items():
            edition.sign_team(team, signer)
        edition.seal(self.online)
        edition.write()

    def fast_forward(self, version: int) -> None:
        """What a thief of the online key does: snapshot and timestamp so far ahead that nothing may follow."""
        self._resign_snapshot(version=1_000_000_000, stamp=version)

    def _publish_root(self, change: Callable[[Root], None], signers: Sequence[CryptoSigner]) -> None:
        path = max((self.root / "metadata").glob("*.root.json"), key=lambda item: int(item.name.split(".")[0]))
        metadata = Metadata[Root].from_bytes(path.read_bytes())
        change(metadata.signed)
        metadata.signed.version += 1
        metadata.signed.expires = self._in_days(365)
        metadata.signatures.clear()
        for signer in signers:
            metadata.sign(signer, append=True)
        (path.parent / f"{metadata.signed.version}.root.json").write_bytes(metadata.to_bytes(JSONSerializer()))

    def _in_days(self, days: int) -> datetime:
        return datetime.fromtimestamp(int(self.now()) + days * 86_400, UTC)

    def command(self, payload: dict[str, Any], *, signer: CryptoSigner | None = None) -> bytes:
        """Return ``payload`` in a signed envelope."""
        envelope = Envelope(json.dumps(payload).encode(), PAYLOAD_TYPE, {})
        envelope.sign(signer or self.operator)
        return json.dumps(envelope.to_dict()).encode()

    def blobs(self) -> list[Path]:
        """Return the stored chunks, the largest first."""
        found = [path for path in (self.root / "blobs").rglob("*") if path.is_file()]
        return sorted(found, key=lambda path: (-path.stat().st_size, path.name))

    def copy(self, name: str) -> Path:
        """Return a copy of the store as it is now."""
        return Path(shutil.copytree(self.root, self._folder / name))

    def _sign_index(self, edition: Any, index: Index) -> None:
        edition.add_team_target(index.team, index_target(index.team, index.name), msgspec.json.encode(index))
        edition.sign_team(index.team, self.teams[index.team])
        edition.seal(self.online)
        edition.write()

    def _resign_snapshot(self, *, version: int = 0, stamp: int = 0) -> None:
        timestamp = Metadata[Timestamp].from_bytes((self.root / "metadata" / "timestamp.json").read_bytes())
        old = timestamp.signed.snapshot_meta.version
        snapshot: Metadata[Any] = Metadata.from_bytes((self.root / "metadata" / f"{old}.snapshot.json").read_bytes())
        version = version or old + 1
        snapshot.signed.version = version
        snapshot.signed.expires = self._in_days(90)
        snapshot.sign(self.online)
        data = snapshot.to_bytes(JSONSerializer())
        (self.root / "metadata" / f"{version}.snapshot.json").write_bytes(data)
        meta = timestamp.signed.snapshot_meta
        meta.version, meta.length, meta.hashes = version, len(data), {"sha256": _sha256(data)}
        timestamp.signed.version = stamp or int(self.now())
        timestamp.signed.expires = datetime.fromtimestamp(timestamp.signed.version + 7 * 86_400, UTC)
        timestamp.sign(self.online)
        (self.root / "metadata" / "timestamp.json").write_bytes(timestamp.to_bytes(JSONSerializer()))


@dataclass(kw_only=True)
class Fault:
    """What happens to the next ``times`` requests whose path contains ``part``."""

    part: str
    kind: str  # status, cut, flip, stall, drip, endless, slow_headers
    value: int = 0  # the status, or the byte after which it happens
    times: int = 1_000_000


@dataclass
class StoreServer:
    """A folder over HTTP/1.1 on loopback. ``requests`` lists path and Range header of each request."""

    folder: Path
    ranges: bool = True
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)
    gate: threading.Event | None = None  # set: blobs wait for it once ``gate_after`` blobs were served
    gate_after: int = 0
    token: str = ""
    redirect_to: str = ""  # a store that has what is asked for
    headers: list[dict[str, str]] = field(default_factory=list)  # of each request
    _lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    def next_fault(self, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.part in path and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def blobs_served(self) -> int:
        """Return how many requests for chunks have come in."""
        return sum("/blobs/" in path for path, _ in self.requests)


@contextmanager
def serving(
    folder: Path, *, ranges: bool = True, token: str = "", tls: ssl.SSLContext | None = None
) -> Iterator[StoreServer]:
    """Serve ``folder`` until the block ends; with ``token`` to its bearer only."""
    state = StoreServer(folder, ranges=ranges, token=token)

    class Handler(_Handler):
        store = state

    server = _Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    state.url = f"{'https' if tls is not None else 'http'}://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        state.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: StoreServer

    def do_GET(self) -> None:
        store = self.store
        wanted = self.headers.get("Range", "")
        store.requests.append((self.path, wanted))
        store.headers.append(dict(self.headers))
        if store.gate is not None and "/blobs/" in self.path and store.blobs_served() > store.gate_after:
            store.gate.wait(30)
        fault = store.next_fault(self.path)
        try:
            self._answer(wanted, fault)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _answer(self, wanted: str, fault: Fault | None) -> None:
        path = self.store.folder / self.path.lstrip("/")
        if fault is not None and fault.kind == "status":
            return self._plain(fault.value)
        if self.store.token and self.headers.get("Authorization") != f"Bearer {self.store.token}":
            return self._plain(401)
        if self.store.redirect_to:
            return self._plain(302, Location=self.store.redirect_to + self.path)
        if fault is not None and fault.kind == "slow_headers":
            return self._drip_headers()
        if not path.is_file():
            return self._plain(404)
        data = path.read_bytes()
        etag = f'"{_sha256(data)[:16]}"'
        if fault is not None and fault.kind == "flip":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault is not None and fault.kind == "endless":
            data += b" " * (1 << 20)
        start = 0
        if self.store.ranges and (match := re.fullmatch(r"bytes=(\d+)-", wanted)):
            start = int(match.group(1))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        body = data[start:]
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", etag)
        self.end_headers()
        self._send(body, fault)
        return None

    def _send(self, body: bytes, fault: Fault | None) -> None:
        if fault is None or fault.kind in ("flip", "endless"):
            self.wfile.write(body)
            return
        self.wfile.write(body[: fault.value])
        self.wfile.flush()
        if fault.kind == "stall":
            self.store.closing.wait(30)
        elif fault.kind == "drip":
            for byte in body[fault.value :]:
                if self.store.closing.wait(0.02):
                    break
                self.wfile.write(bytes([byte]))
        self.close_connection = True

    def _drip_headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not self.store.closing.wait(0.05):
            self.wfile.write(b"a")

    def _plain(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Say nothing."""


def _sha256(data: bytes) -> str:
    from hashlib import sha256

    return sha256(data).hexdigest()


def _seq(version: str) -> int:
    major, minor, patch = (int(part) for part in version.split("-")[0].split("."))
    return major * 1_000_000 + minor * 1_000 + patch
