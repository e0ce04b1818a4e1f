"""A store in a bucket of a real S3 server: published by inferhub, verified, pulled by the trust child."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent.bundles.bodies import RefusedError
from agent.bundles.fetcher import Transport
from agent.config import MirrorConfig
from agent.errors import ConfigError, NotFoundError, OfflineError
from tests.fakes import bundles
from tests.fakes.device import DeviceWorld
from tests.fakes.store import StoreWorld
from tools import inferhub
from tools.hub.errors import ConflictError, StoreStateError

pytest.importorskip("obstore", reason="the extra s3 is not installed")
moto_server = pytest.importorskip("moto.server", reason="moto's server is not installed")

from tools.hub.bucket import Bucket  # noqa: E402 - needs the extra

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def credentials(tmp_path: Path) -> Path:
    path = tmp_path / "credentials"
    path.write_text("[default]\naws_access_key_id = box\naws_secret_access_key = very-secret\n[other]\n")
    return path


@pytest.fixture
def mirror(endpoint: str, credentials: Path, tmp_path: Path) -> MirrorConfig:
    bucket = f"models-{abs(hash(str(tmp_path))) % 10**9}"
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{bucket}", method="PUT")).close()
    return MirrorConfig(
        url=f"s3://{bucket}/edge/store", endpoint=endpoint, region="us-east-1", credentials_file=str(credentials)
    )


def upload(world: StoreWorld, mirror: MirrorConfig) -> None:
    bucket = Bucket(mirror)
    for path in sorted(world.root.rglob("*")):
        if path.is_file():
            bucket.replace(path.relative_to(world.root).as_posix(), path.read_bytes())


def test_a_box_pulls_from_a_bucket_through_its_trust_child(tmp_path: Path, mirror: MirrorConfig) -> None:
    world = StoreWorld(tmp_path)
    packed = world.publish()
    upload(world, mirror)
    device = DeviceWorld(tmp_path / "state", world, urls=("file:///nowhere",), mirrors=(mirror,))
    stored = device.fetch()
    assert stored.bytes_fetched == packed.manifest.total_size
    assert (stored.path / "fp32/model.onnx.data").read_bytes() == bundles.plain_files()["fp32/model.onnx.data"]


def test_an_object_is_read_from_an_offset_as_long_as_it_is_the_same(mirror: MirrorConfig) -> None:
    Bucket(mirror).put("blobs/one", bytes(range(200)))
    transport = Transport([mirror], stall_timeout_s=10.0)
    url = f"{mirror.url}/blobs/one"
    whole = transport.open(url)
    assert whole.read(50) == bytes(range(50))
    rest = transport.open(url, offset=150, validator=whole.validator)
    assert (rest.offset, rest.read(), rest.read()) == (150, bytes(range(150, 200)), b"")
    with pytest.raises(RefusedError, match="changed") as failure:
        transport.open(url, offset=150, validator='"another"')
    assert failure.value.status == 412


def test_what_is_missing_and_what_cannot_be_reached_are_told_apart(mirror: MirrorConfig, credentials: Path) -> None:
    with pytest.raises(RefusedError) as failure:
        Transport([mirror], stall_timeout_s=10.0).open(f"{mirror.url}/nothing")
    assert failure.value.status == 404
    away = MirrorConfig(
        url="s3://bucket/x", endpoint="http://127.0.0.1:9", region="us-east-1", credentials_file=str(credentials)
    )
    with pytest.raises(OfflineError, match="cannot be reached") as offline:
        Transport([away], stall_timeout_s=5.0).open("s3://bucket/x/y")
    assert "very-secret" not in str(offline.value)
    assert "\n" not in str(offline.value)


@pytest.mark.parametrize(("content", "complaint"), [("[default", "not a credentials file"), ("[x]\n", "no section")])
def test_a_credentials_file_that_cannot_be_used_is_named_and_not_quoted(
    tmp_path: Path, content: str, complaint: str
) -> None:
    path = tmp_path / "broken"
    path.write_text(content + "\nsecret = 1")
    with pytest.raises(ConfigError, match=complaint) as failure:
        Bucket(MirrorConfig(url="s3://bucket/x", credentials_file=str(path)))
    assert "secret" not in str(failure.value)


def test_what_is_published_never_changes(mirror: MirrorConfig, tmp_path: Path) -> None:
    bucket = Bucket(mirror)
    assert bucket.put("metadata/1.root.json", b"one")
    assert not bucket.put("metadata/1.root.json", b"one")
    with pytest.raises(ConflictError):
        bucket.put("metadata/1.root.json", b"two")
    blob = tmp_path / "blob"
    blob.write_bytes(b"chunk")
    assert bucket.put_file("blobs/chunk", blob)
    assert not bucket.put_file("blobs/chunk", blob)
    assert sorted((item.name, item.size) for item in bucket.stored("blobs")) == [("blobs/chunk", 5)]
    bucket.remove("blobs/chunk")
    bucket.remove("blobs/chunk")
    assert bucket.size("blobs/chunk") is None
    with pytest.raises(NotFoundError):
        bucket.read("blobs/chunk")


def test_one_publisher_works_at_a_time(mirror: MirrorConfig) -> None:
    with Bucket(mirror).lock(), pytest.raises(StoreStateError, match="another publisher") as failure:
        with Bucket(mirror).lock():
            pass
    assert "publisher.lock" in failure.value.hint
    with Bucket(mirror).lock():
        pass


def test_inferhub_makes_fills_and_verifies_a_store_in_a_bucket(
    tmp_path: Path, mirror: MirrorConfig, credentials: Path
) -> None:
    environment = {
        "INFERHUB_S3_ENDPOINT": mirror.endpoint,
        "INFERHUB_S3_REGION": mirror.region,
        "INFERHUB_S3_CREDENTIALS_FILE": str(credentials),
    }

    def hub(*arguments: object) -> dict[str, object]:
        done = CliRunner().invoke(inferhub.main, [*map(str, arguments), "--json"], env=environment)
        assert done.exit_code == 0, done.output
        answer: dict[str, object] = json.loads(done.stdout)
        return answer

    for role in ("root", "targets", "online", "team"):
        hub("keygen", "--role", role, "--out", tmp_path / role, "--unencrypted")
    signing = ("--targets-key", tmp_path / "targets", "--online-key", tmp_path / "online")
    hub("init", mirror.url, "--root-key", tmp_path / "root", "--threshold", 1, *signing, "--anchor",
        tmp_path / "anchor.json", "--team", f"vision={tmp_path / 'team.pub'}")  # fmt: skip
    bundles.pack(tmp_path / "packed", bundles.plain_files())
    publish = ("publish", tmp_path / "packed", "--store", mirror.url, "--team-key", tmp_path / "team", "--online-key",
               tmp_path / "online", "--channel", "stable")  # fmt: skip
    assert hub(*publish)["changed"]
    assert not hub(*publish)["changed"]
    hub("refresh-timestamp", "--store", mirror.url, "--online-key", tmp_path / "online")
    found = hub("verify", "--store", mirror.url, "--anchor", tmp_path / "anchor.json", "--deep")
    assert found["manifests"] == 1
    assert Bucket(mirror).size("publisher.lock") is None


@pytest.mark.parametrize("verb", ["publish", "refresh-timestamp"])
def test_publishing_to_a_web_server_says_what_to_do_instead(tmp_path: Path, verb: str) -> None:
    bundles.pack(tmp_path / "packed", bundles.plain_files())
    keys = ("--team-key", tmp_path / "team") if verb == "publish" else ()
    subject = (tmp_path / "packed",) if verb == "publish" else ()
    arguments = [verb, *subject, "--store", "https://models.example.com/x", *keys, "--online-key", tmp_path / "online"]
    done = CliRunner().invoke(inferhub.main, [*map(str, arguments), "--json"])
    error = json.loads(done.stdout)["error"]
    assert done.exit_code == 1
    assert error["code"] == "store_state"
    assert "timestamp.json last" in error["hint"]


@pytest.mark.parametrize("key", ["AKID\u00e9", "AKID\x01"])
def test_credentials_that_cannot_be_sent_are_a_plain_error(tmp_path: Path, key: str) -> None:
    file = tmp_path / "credentials"
    file.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = hidden\n")
    mirror = MirrorConfig(url="s3://bucket/x", region="us-east-1", credentials_file=str(file))
    with pytest.raises(ConfigError, match="access_key_id: only printable ASCII") as failure:
        Transport([mirror], stall_timeout_s=5.0).open("s3://bucket/x/y")
    assert "hidden" not in str(failure.value)
