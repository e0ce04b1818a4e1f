"""Stores that need more than an address: tokens, certificates, proxies; and mirrors that are down, slow or lie."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from agent.bundles.bodies import RefusedError
from agent.bundles.child import clock_believed
from agent.bundles.fetcher import Transport
from agent.bundles.floor import BUILD_TIME, Floor, FloorFile
from agent.config import MirrorConfig
from agent.errors import AgentError, ConfigError, OfflineError, TransientError
from tests.fakes.device import DeviceWorld
from tests.fakes.proxy import proxying
from tests.fakes.store import Fault, StoreWorld, serving
from tests.fakes.tls import Authority, Pair

pytestmark = pytest.mark.integration
TOKEN = "s3cret-t0ken"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "object").write_bytes(b"bytes")
    return tmp_path / "store"


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\nanything below is not read\n")
    return path


def read(mirror: MirrorConfig, *, name: str = "object", timeout_s: float = 20.0, **changes: Any) -> bytes:
    transport = Transport([mirror], **({"stall_timeout_s": 10.0} | changes))
    return transport.read_all(f"{mirror.url}/{name}", size_bytes_max=1000, timeout_s=timeout_s)


def server_tls(pair: Pair, *, clients: Authority | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    if clients is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(clients.file)
    return context


def test_a_token_is_sent_as_the_bearer(folder: Path, token_file: Path) -> None:
    with serving(folder, token=TOKEN) as server:
        assert read(MirrorConfig(url=server.url, token_file=str(token_file))) == b"bytes"


def test_a_refused_token_is_explained_and_never_shown(folder: Path, token_file: Path) -> None:
    with serving(folder, token="another") as server, pytest.raises(RefusedError) as failure:
        read(MirrorConfig(url=server.url, token_file=str(token_file)))
    assert failure.value.status == 401
    assert "token_file" in str(failure.value)
    assert TOKEN not in repr(failure.value)


@pytest.mark.parametrize("content", [None, b"", b"two words\n", b"\xff\xfe\n"])
def test_a_token_file_that_cannot_be_used_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"token_file .*/token") as failure:
        read(MirrorConfig(url="http://127.0.0.1:9", token_file=str(path)))
    assert "two words" not in str(failure.value)


def test_a_redirect_does_not_take_the_token_along(folder: Path, token_file: Path) -> None:
    with serving(folder) as other, serving(folder, token=TOKEN) as server:
        server.redirect_to = other.url.replace("127.0.0.1", "localhost")
        assert read(MirrorConfig(url=server.url, token_file=str(token_file))) == b"bytes"
        assert "Authorization" not in other.headers[0]


def test_a_store_with_an_authority_of_its_own(folder: Path, authority: Authority) -> None:
    with serving(folder, tls=server_tls(authority.issue("good"))) as server:
        assert read(MirrorConfig(url=server.url, tls_ca_file=str(authority.file))) == b"bytes"
        with pytest.raises(OfflineError, match="certificate verify failed"):
            read(MirrorConfig(url=server.url))


def test_a_store_that_asks_for_a_client_certificate(folder: Path, authority: Authority) -> None:
    own = authority.issue("box")
    with serving(folder, tls=server_tls(authority.issue("server"), clients=authority)) as server:
        mirror = MirrorConfig(
            url=server.url,
            tls_ca_file=str(authority.file),
            tls_certificate_file=str(own.certificate),
            tls_key_file=str(own.key),
        )
        assert read(mirror) == b"bytes"
        with pytest.raises((OfflineError, TransientError)):
            read(MirrorConfig(url=server.url, tls_ca_file=str(authority.file)))


@pytest.mark.parametrize("key", ["tls_ca_file", "tls_certificate_file"])
def test_a_certificate_file_that_cannot_be_used_is_named(tmp_path: Path, key: str) -> None:
    (tmp_path / "junk.pem").write_text("junk")
    with pytest.raises(ConfigError, match=rf"{key} .*junk\.pem"):
        read(MirrorConfig(url="https://127.0.0.1:9", **{key: str(tmp_path / "junk.pem")}))


def test_without_a_clock_only_the_dates_of_certificates_are_not_judged(folder: Path, authority: Authority) -> None:
    expired = server_tls(authority.issue("expired", expired=True))
    with serving(folder, tls=expired) as server:
        mirror = MirrorConfig(url=server.url, tls_ca_file=str(authority.file))
        with pytest.raises(OfflineError, match="expired"):
            read(mirror)
        assert read(mirror, certificate_dates=False) == b"bytes"
        with pytest.raises(OfflineError, match="certificate verify failed"):
            read(MirrorConfig(url=server.url), certificate_dates=False)
    other_name = server_tls(authority.issue("elsewhere", host="models.example.com", expired=True))
    with serving(folder, tls=other_name) as server, pytest.raises(OfflineError, match="not valid for"):
        read(MirrorConfig(url=server.url, tls_ca_file=str(authority.file)), certificate_dates=False)


def test_a_clock_before_the_newest_signature_is_not_believed(tmp_path: Path) -> None:
    device = DeviceWorld(tmp_path / "state", StoreWorld(tmp_path))
    now = time.time()
    assert clock_believed(device.layout, now)
    assert not clock_believed(device.layout, 0.0)
    assert not clock_believed(device.layout, BUILD_TIME - 1)
    FloorFile(device.layout.floors).write(Floor(keys="k", roles={"timestamp": int(now) + 60}))
    assert not clock_believed(device.layout, now)


def test_a_box_without_a_clock_pulls_from_a_server_whose_certificate_expired(
    tmp_path: Path, authority: Authority
) -> None:
    world = StoreWorld(tmp_path)
    world.publish()
    with serving(world.root, tls=server_tls(authority.issue("old", expired=True))) as server:
        mirror = MirrorConfig(url=server.url, tls_ca_file=str(authority.file))
        device = DeviceWorld(tmp_path / "state", world, urls=("file:///nowhere",), mirrors=(mirror,))
        with pytest.raises(OfflineError):
            device.fetch()
        floor = Floor(keys="those of an earlier root", roles={"timestamp": int(time.time()) + 86_400})
        FloorFile(device.layout.floors).write(floor)
        assert device.fetch().manifest.version == "1.0.0"


@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
def test_a_proxy_with_a_password(folder: Path, authority: Authority, secure: bool) -> None:
    tls = server_tls(authority.issue("behind")) if secure else None
    with proxying(authorization="Basic Ym94OmE6Yg==") as proxy, serving(folder, tls=tls) as server:
        address = proxy.url.replace("://", "://box:a%3Ab@")
        ca = {"tls_ca_file": str(authority.file)} if secure else {}
        assert read(MirrorConfig(url=server.url, proxy=address, **ca)) == b"bytes"
        assert proxy.requests[0].startswith("CONNECT" if secure else "GET")
        with pytest.raises(AgentError) as failure:
            read(MirrorConfig(url=server.url, proxy=proxy.url.replace("://", "://box:wrong@"), **ca))
        assert "wrong" not in str(failure.value)


def test_headers_that_drip_are_cut_off(folder: Path) -> None:
    with serving(folder) as server:
        server.faults = [Fault(part="object", kind="slow_headers")]
        with pytest.raises(TransientError, match="silent"):
            read(MirrorConfig(url=server.url), stall_timeout_s=0.5)


@contextmanager
def babbling(head: bytes, rest: bytes, pause_s: float) -> Iterator[str]:
    """Answer the first request with ``head`` and then ``rest`` again and again, until the block ends."""
    over = threading.Event()

    def answer() -> None:
        with suppress(OSError), listener.accept()[0] as connection:
            connection.recv(65_536)
            connection.sendall(head)
            while not over.wait(pause_s):
                connection.sendall(rest)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            over.set()
            thread.join()


@pytest.mark.parametrize(
    ("framed", "rest", "pause_s"),
    [(b"3\r\nabc\r\n0\r\n", b"A: b\r\n" * 1000, 0.0), (b"3\r\nabc\r\n0\r\n", b"A", 0.05), (b"", b"0", 0.05)],
    ids=["endless trailers", "a trailer that drips", "a chunk's size that drips"],
)
def test_the_frame_of_a_chunked_body_is_cut_off(framed: bytes, rest: bytes, pause_s: float) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    with babbling(head + framed, rest, pause_s) as url, pytest.raises(TransientError):
        read(MirrorConfig(url=url), stall_timeout_s=0.5)


@pytest.mark.parametrize("pause_s", [0.0, 0.05], ids=["endless", "dripping"])
def test_the_body_of_a_redirect_is_not_read(folder: Path, pause_s: float) -> None:
    with serving(folder) as server:
        head = f"HTTP/1.1 302 Found\r\nLocation: {server.url}/object\r\n\r\n".encode()
        with babbling(head, b"x" * 4096, pause_s) as url:
            assert read(MirrorConfig(url=url)) == b"bytes"


def test_redirects_end_and_lead_to_web_servers_only(folder: Path) -> None:
    with serving(folder) as server:
        server.redirect_to = server.url
        with pytest.raises(RefusedError, match="more than 3 redirects"):
            read(MirrorConfig(url=server.url))
        server.redirect_to = "file://localhost"
        with pytest.raises(TransientError, match="scheme"):
            read(MirrorConfig(url=server.url))


def test_a_metadata_file_has_a_deadline_as_a_whole(folder: Path) -> None:
    (folder / "object").write_bytes(b"x" * 900)
    with serving(folder) as server:
        server.faults = [Fault(part="object", kind="drip", value=1)]
        with pytest.raises(TransientError):
            read(MirrorConfig(url=server.url), timeout_s=0.5)


def test_a_whole_pull_with_token_and_limits(tmp_path: Path, token_file: Path) -> None:
    world = StoreWorld(tmp_path)
    world.publish()
    with serving(world.root, token=TOKEN) as server:
        mirror = MirrorConfig(url=server.url, token_file=str(token_file), rate_bytes_per_s_max=40_000_000)
        device = DeviceWorld(
            tmp_path / "state", world, urls=("file:///nowhere",), mirrors=(mirror,), rate_bytes_per_s_max=50_000_000
        )
        stored = device.fetch()
    assert stored.bytes_fetched == stored.manifest.total_size
    assert TOKEN not in str(device.lines)


def test_a_mirror_that_lies_about_chunks_is_asked_last_from_then_on(tmp_path: Path) -> None:
    world = StoreWorld(tmp_path)
    world.publish()
    with serving(world.root) as liar, serving(world.root) as honest:
        liar.faults = [Fault(part="/blobs/", kind="flip")]
        device = DeviceWorld(tmp_path / "state", world, urls=(liar.url, honest.url), tries=1, connections=1)
        stored = device.fetch()
        assert liar.blobs_served() == 1
        assert honest.blobs_served() == sum(len(file.chunks) for file in stored.manifest.files)


def test_a_mirror_that_cannot_be_configured_does_not_stop_the_others(tmp_path: Path) -> None:
    world = StoreWorld(tmp_path)
    world.publish()
    broken = MirrorConfig(url="http://127.0.0.1:9", token_file=str(tmp_path / "missing"))
    device = DeviceWorld(
        tmp_path / "state", world, urls=("file:///nowhere",), mirrors=(broken, MirrorConfig(url=world.url))
    )
    assert device.here("fetch", team="vision", name="tiny")["version"] == "1.0.0"
