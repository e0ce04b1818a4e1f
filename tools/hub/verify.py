"""Look at a store as a device does: from the anchor root, through every signature, to every blob.

Uses python-tuf's own client with the real clock in a throw-away folder, so nothing here shares code with what wrote the
store. Promises: what it reports was reached from the anchor; the first thing that does not hold raises.
Absent on purpose: the device's offline and clock policy (``agent/bundles``).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import msgspec
import urllib3
import zstandard
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from tuf.api.exceptions import DownloadError, DownloadHTTPError, ExpiredMetadataError, RepositoryError
from tuf.ngclient import FetcherInterface, TargetFile, Updater

from agent.bundles.bodies import RefusedError
from agent.bundles.fetcher import Transport
from agent.bundles.manifest import (
    OPERATORS_TARGET,
    Chunk,
    Manifest,
    parse_index,
    parse_manifest,
    parse_operators,
)
from agent.bundles.names import manifest_target
from agent.config import MirrorConfig
from agent.errors import ChunkMismatchError, ExpiredError, OfflineError, TargetNotFoundError, UntrustedError
from tools.hub import oms
from tools.hub.bundle import distinct_chunks
from tools.hub.chunks import blob_name
from tools.hub.listener import Listener

_PIECE: Final = 1 << 20
_TIMEOUT_S: Final = 30.0


@dataclass(slots=True, kw_only=True)
class Verified:
    """What was reached. Versions are those of the metadata files."""

    root: int
    timestamp: int
    expires: str
    expires_by_role: dict[str, str] = field(default_factory=dict)  # RFC 3339
    teams: list[str] = field(default_factory=list)
    operators: int = 0
    models: list[dict[str, Any]] = field(default_factory=list)  # team, name, channels, versions
    manifests: int = 0
    model_signatures: int = 0  # OpenSSF; whose they are takes a key to say, see ``oms_key``
    blobs: int = 0
    bytes: int = 0
    deep: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return all fields."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Part:
    """A model, or with ``version`` one version of it."""

    team: str
    name: str
    version: str = ""


def verify(
    store: str,
    anchor: bytes,
    *,
    deep: bool,
    parts: Collection[Part] = (),
    held: Collection[str] = (),
    oms_key: EllipticCurvePublicKey | None = None,
    listener: Listener | None = None,
    s3: Mapping[str, str] | None = None,
) -> Verified:
    """Check everything that the store offers.

    Args:
        store: A folder, ``file://``, ``http(s)://`` or ``s3://`` URL.
        anchor: The root metadata a device is built with, the first one at best.
        deep: Fetch every blob and check its hashes; otherwise only its size.
        parts: Look at these only, as an exported stick holds them; empty: at all.
        held: Hashes of raw chunks that need not be there.
        oms_key: Also check the OpenSSF model signatures that manifests name; without it, only what they list.
        listener: Told about progress.
        s3: See ``StoreFetcher``.

    Raises:
        OfflineError: the store cannot be reached.
        ExpiredError: a role expired; the message names it.
        UntrustedError: a signature, threshold, version or hash does not hold.
        TargetNotFoundError: a signed document or blob is missing.
        ChunkMismatchError: a blob's size or hash differs.
        UnsafeBundleError: a signed document is refused by the rules every device applies.
    """
    url = store_url(store)
    fetcher = StoreFetcher(s3)
    with tempfile.TemporaryDirectory(prefix="inferhub-verify-") as folder:
        client = _Client(url, anchor, Path(folder), fetcher, parts, oms_key)
        return client.walk(deep=deep, held=held, listener=listener or Listener())


def store_url(store: str) -> str:
    """Return ``store`` as a URL ending in ``/``; a path becomes ``file://``."""
    url = store if "://" in store else Path(store).absolute().as_uri()
    return url.rstrip("/") + "/"


class StoreFetcher(FetcherInterface):
    """Bytes of ``file://``, ``http(s)://`` and ``s3://`` URLs, for python-tuf and for blobs.

    Args:
        s3: Fields of ``MirrorConfig`` for buckets: endpoint, region, credentials_file.
    """

    def __init__(self, s3: Mapping[str, str] | None = None) -> None:
        self._pool = urllib3.PoolManager(timeout=_TIMEOUT_S, retries=2)
        self._s3 = dict(s3 or {})

    def _fetch(self, url: str) -> Iterator[bytes]:
        if url.startswith("file://"):
            yield from _read_file(url)
            return
        if url.startswith("s3://"):
            yield from self._read_bucket(url)
            return
        response = self._pool.request("GET", url, preload_content=False)
        try:
            if response.status != 200:
                raise DownloadHTTPError(f"{url}: HTTP status {response.status}", response.status)
            yield from response.stream(_PIECE)
        finally:
            response.release_conn()

    def read(self, url: str, *, size_bytes_max: int) -> bytes:
        """Return a whole file.

        Raises:
            OfflineError, TargetNotFoundError, UntrustedError: unreachable, missing, longer than ``size_bytes_max``.
        """
        with _translated(url):
            return self.download_bytes(url, size_bytes_max)

    def size(self, url: str) -> int | None:
        """Return the size of what ``url`` names, ``None`` if it is missing. No store has to know HEAD."""
        if url.startswith("file://"):
            path = _path(url)
            return path.stat().st_size if path.is_file() else None
        if url.startswith("s3://"):
            try:
                return sum(map(len, self._read_bucket(url)))
            except DownloadHTTPError:
                return None
        response = self._pool.request("GET", url, preload_content=False, headers={"Accept-Encoding": "identity"})
        try:
            stated = response.headers.get("Content-Length", "")
            if response.status != 200:
                return None
            return int(stated) if stated.isdigit() else sum(map(len, response.stream(_PIECE)))
        finally:
            response.close()

    def _read_bucket(self, url: str) -> Iterator[bytes]:
        """Yield an object of a bucket as a box reads it."""
        bucket = msgspec.convert({"url": "/".join(url.split("/")[:3]), **self._s3}, MirrorConfig)
        transport = Transport([bucket], stall_timeout_s=_TIMEOUT_S)
        try:
            with closing(transport.open(url)) as body:
                while data := body.read():
                    yield data
        except RefusedError as error:
            raise DownloadHTTPError(f"{url}: {error}", error.status) from error


class _Client:
    def __init__(
        self,
        url: str,
        anchor: bytes,
        folder: Path,
        fetcher: StoreFetcher,
        parts: Collection[Part],
        oms_key: EllipticCurvePublicKey | None,
    ) -> None:
        self._url = url
        self._fetcher = fetcher
        self._parts = parts
        self._oms_key = oms_key
        self._metadata = folder / "metadata"
        targets = folder / "targets"
        self._metadata.mkdir()
        targets.mkdir()
        with _translated(url):
            self._updater = Updater(
                str(self._metadata),
                url + "metadata/",
                str(targets),
                url + "targets/",
                fetcher=fetcher,
                bootstrap=anchor,
            )

    def walk(self, *, deep: bool, held: Collection[str], listener: Listener) -> Verified:
        with _translated(self._url):
            self._updater.refresh()
            timestamp = self._signed("timestamp")
            seen = Verified(
                root=self._signed("root")["version"],
                timestamp=timestamp["version"],
                expires=timestamp["expires"],
                deep=deep,
            )
            operators = self._updater.get_targetinfo(OPERATORS_TARGET)
            if operators is not None:
                seen.operators = len(parse_operators(self._download(operators)).keys)
            blobs: dict[str, Chunk] = {}
            for team in self._teams():
                seen.teams.append(team)
                self._walk_team(team, seen, blobs)
        self._require_parts(seen)
        roles = ("root", "timestamp", "snapshot", "targets", *(f"team-{team}" for team in seen.teams))
        seen.expires_by_role = {role: self._signed(role)["expires"] for role in roles}
        blobs = {blob: chunk for blob, chunk in blobs.items() if chunk.sha256 not in held}
        listener.stage("verify blobs", sum(chunk.blob_size for chunk in blobs.values()), "bytes")
        for chunk in blobs.values():
            self._check_blob(chunk, deep=deep)
            seen.blobs += 1
            seen.bytes += chunk.blob_size
            listener.advance(chunk.blob_size)
        return seen

    def _teams(self) -> list[str]:
        published = self._signed("snapshot")["meta"]
        roles = (self._signed("targets").get("delegations") or {}).get("roles", [])
        teams = [role["name"].removeprefix("team-") for role in roles if f"{role['name']}.json" in published]
        return [team for team in teams if not self._parts or any(part.team == team for part in self._parts)]

    def _wants(self, team: str, name: str, version: str = "") -> bool:
        return not self._parts or any(
            (part.team, part.name) == (team, name) and (not version or part.version in ("", version))
            for part in self._parts
        )

    def _require_parts(self, seen: Verified) -> None:
        there = {(model["team"], model["name"]): model["versions"] for model in seen.models}
        for part in self._parts:
            versions = there.get((part.team, part.name))
            if versions is None or (part.version and part.version not in versions):
                wanted = f"{part.team}/{part.name}" + (f"@{part.version}" if part.version else "")
                raise TargetNotFoundError(f"{self._url}: nothing signed here is {wanted}")

    def _walk_team(self, team: str, seen: Verified, blobs: dict[str, Chunk]) -> None:
        self._updater.get_targetinfo(f"models/{team}/-/-")  # makes the client load and check the role
        for path in sorted(self._signed(f"team-{team}")["targets"]):
            if not path.endswith("/index.json") or not self._wants(team, path.split("/")[2]):
                continue
            index = parse_index(self._target(path))
            if path != f"models/{team}/{index.name}/index.json" or index.team != team:
                raise UntrustedError(f"{path} is the index of {index.team}/{index.name}")
            entries = [entry for entry in index.versions if self._wants(team, index.name, entry.version)]
            for entry in entries:
                manifest = self._manifest(team, index.name, entry.version, entry.manifest_sha256)
                seen.model_signatures += self._check_model_signature(manifest)
                blobs |= {chunk.blob: chunk for chunk in distinct_chunks(manifest)}
                seen.manifests += 1
            seen.models.append(
                {
                    "team": team,
                    "name": index.name,
                    "channels": dict(index.channels),
                    "versions": [entry.version for entry in entries],
                }
            )

    def _manifest(self, team: str, name: str, version: str, digest: str) -> Manifest:
        path = manifest_target(team, name, version)
        data = self._target(path)
        if sha256(data).hexdigest() != digest:
            raise UntrustedError(f"{path} is not the manifest that the index names")
        manifest = parse_manifest(data)
        if (manifest.team, manifest.name, manifest.version) != (team, name, version):
            raise UntrustedError(f"{path} describes {manifest.team}/{manifest.name}@{manifest.version}")
        return manifest

    def _check_model_signature(self, manifest: Manifest) -> bool:
        path = manifest.provenance.oms.get("target", "")
        if not path:
            return False
        data = self._target(path)
        files = oms.verify(data, self._oms_key) if self._oms_key else oms.signed_files(data)
        if files != {file.path: file.sha256 for file in manifest.files}:
            raise UntrustedError(f"{path}: signs other files than the manifest lists")
        return True

    def _target(self, path: str) -> bytes:
        info = self._updater.get_targetinfo(path)
        if info is None:
            raise TargetNotFoundError(f"{path}: no role signs it")
        return self._download(info)

    def _download(self, info: TargetFile) -> bytes:
        return Path(self._updater.download_target(info)).read_bytes()

    def _signed(self, role: str) -> dict[str, Any]:
        """Return the signed part of metadata that the updater has verified and stored."""
        signed: dict[str, Any] = json.loads((self._metadata / f"{role}.json").read_bytes())["signed"]
        return signed

    def _check_blob(self, chunk: Chunk, *, deep: bool) -> None:
        url = self._url + blob_name(chunk.blob)
        if not deep:
            with _translated(url):
                size = self._fetcher.size(url)
            if size is None:
                raise TargetNotFoundError(f"{url}: the blob is missing")
            if size != chunk.blob_size:
                raise ChunkMismatchError(f"{url}: {size} bytes, signed are {chunk.blob_size}")
            return
        try:
            data = self._fetcher.read(url, size_bytes_max=chunk.blob_size)
        except UntrustedError as error:
            raise ChunkMismatchError(f"{url}: longer than signed") from error
        if len(data) != chunk.blob_size or sha256(data).hexdigest() != chunk.blob:
            raise ChunkMismatchError(f"{url}: differs from the signed hash")
        if chunk.codec and sha256(_decompress(data, chunk, url)).hexdigest() != chunk.sha256:
            raise ChunkMismatchError(f"{url}: decompresses to other bytes than signed")


class _translated:  # noqa: N801  a context manager that reads as a word
    """Turn python-tuf's and urllib3's exceptions into ours."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        match error:
            case ExpiredMetadataError():
                raise ExpiredError(f"{self._where}: {error}") from error
            case DownloadHTTPError(status_code=403 | 404):
                raise TargetNotFoundError(f"{self._where}: missing: {error}") from error
            case RepositoryError():
                raise UntrustedError(f"{self._where}: {error}") from error
            case DownloadError() if "length" in type(error).__name__.lower():
                raise UntrustedError(f"{self._where}: {error}") from error
            case DownloadError() | urllib3.exceptions.HTTPError() | OSError():
                raise OfflineError(f"{self._where}: {error}") from error
            case _:
                return


def _decompress(data: bytes, chunk: Chunk, url: str) -> bytes:
    try:
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=chunk.size)
    except zstandard.ZstdError as error:
        raise ChunkMismatchError(f"{url}: not a zstd frame of {chunk.size} bytes: {error}") from error


def _path(url: str) -> Path:
    return Path(unquote(urlsplit(url).path))


def _read_file(url: str) -> Iterator[bytes]:
    try:
        file = _path(url).open("rb")
    except FileNotFoundError as error:
        raise DownloadHTTPError(f"{url}: no such file", 404) from error
    with file:
        while piece := file.read(_PIECE):
            yield piece
