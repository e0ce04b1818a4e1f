"""``tools/tuf-conformance-client`` by the contract of the public suite, against a real repository over HTTP.

The suite itself is not part of this repository (docs/conformance.md says how to run it); what its runner relies on is
held here: arguments, exit status, the layout of the metadata folder, which requests are made and which are not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata, Root, Targets
from tuf.api.serialization.json import JSONSerializer

from tests.fakes.store import Fault, StoreServer, StoreWorld, serving
from tools.conformance import main

pytestmark = pytest.mark.integration

CLIENT = Path(__file__).parents[2] / "tools" / "tuf-conformance-client"
INDEX = "models/vision/tiny/index.json"
MANIFEST = "models/vision/tiny/1.0.0.json"
ROLES = {"root.json", "timestamp.json", "snapshot.json", "targets.json"}


class Suite:
    """A repository, its server, and the client's two folders."""

    def __init__(self, folder: Path, world: StoreWorld, server: StoreServer) -> None:
        self.world = world
        self.server = server
        self.metadata = folder / "metadata"
        self.artifacts = folder / "artifacts"
        for path in (self.metadata, self.artifacts):
            path.mkdir()

    def init(self) -> int:
        return main(["--metadata-dir", str(self.metadata), "init", str(self.world.anchor)])

    def refresh(self) -> int:
        return main([*self._common(), "refresh"])

    def download(self, *names: str) -> int:
        return main([*self._common(), *self._targets(*names), "download"])

    def arguments(self, *names: str) -> list[str]:
        """Return a whole ``download`` command line."""
        return [*self._common(), *self._targets(*names), "download"]

    def requested(self) -> list[str]:
        """Return the paths asked for since the last call."""
        paths = [path for path, _ in self.server.requests]
        self.server.requests.clear()
        return paths

    def downloaded(self) -> list[bytes]:
        """Return the artifacts in the order of their arrival, as the suite looks at them."""
        return [path.read_bytes() for path in sorted(self.artifacts.iterdir(), key=os.path.getmtime)]

    def roles(self) -> dict[str, int]:
        """Return what the suite takes for metadata: every ``*.json`` at the top."""
        return {
            path.name: Metadata.from_bytes(path.read_bytes()).signed.version for path in self.metadata.glob("*.json")
        }

    def served(self, target: str) -> bytes:
        """Return a target's bytes in the repository."""
        folder, _, name = target.rpartition("/")
        return next((self.world.root / "targets" / folder).glob(f"*.{name}")).read_bytes()

    def _common(self) -> list[str]:
        return ["--metadata-url", f"{self.server.url}/metadata/", "--metadata-dir", str(self.metadata)]

    def _targets(self, *names: str) -> list[str]:
        wanted = [part for name in names for part in ("--target-name", name)]
        return [*wanted, "--target-dir", str(self.artifacts), "--target-base-url", f"{self.server.url}/targets/"]


@pytest.fixture
def suite(memory_path: Path) -> Iterator[Suite]:
    world = StoreWorld(memory_path)
    world.publish()
    with serving(world.root) as server:
        yield Suite(memory_path, world, server)


def test_the_entry_point_is_one_executable_path_without_expected_failures() -> None:
    assert os.access(CLIENT, os.X_OK)
    assert CLIENT.read_bytes().startswith(b"#!/")
    assert " " not in CLIENT.name
    assert CLIENT.with_name("tuf-conformance-client.xfails").read_bytes() == b""


def test_the_executable_does_the_whole_round(suite: Suite, tmp_path: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(*arguments: str) -> int:
        return subprocess.run([CLIENT, *arguments], env=environment, cwd=tmp_path, timeout=90, check=False).returncode

    assert run("--metadata-dir", str(suite.metadata), "init", str(suite.world.anchor)) == 0
    assert run(*suite.arguments(MANIFEST)) == 0
    assert suite.downloaded() == [suite.served(MANIFEST)]
    assert run(*suite.arguments("models/audio/nothing/1.0.0.json")) == 1


def test_init_makes_no_request(suite: Suite) -> None:
    assert suite.init() == 0
    assert suite.requested() == []
    assert suite.roles() == {"root.json": 1}


def test_refresh_keeps_the_metadata_as_it_was_served(suite: Suite) -> None:
    suite.init()
    assert suite.refresh() == 0
    assert set(suite.roles()) == ROLES
    versions = {name.removesuffix(".json"): version for name, version in suite.roles().items()}
    for role, version in versions.items():
        name = f"{role}.json" if role == "timestamp" else f"{version}.{role}.json"
        assert (suite.metadata / f"{role}.json").read_bytes() == (suite.world.root / "metadata" / name).read_bytes()
    assert suite.downloaded() == []


def test_a_refresh_asks_for_each_file_once_and_then_for_two(suite: Suite) -> None:
    suite.init()
    suite.refresh()
    roles = suite.roles()
    assert suite.requested() == [
        "/metadata/2.root.json",
        "/metadata/timestamp.json",
        f"/metadata/{roles['snapshot.json']}.snapshot.json",
        f"/metadata/{roles['targets.json']}.targets.json",
    ]
    suite.refresh()
    assert suite.requested() == ["/metadata/2.root.json", "/metadata/timestamp.json"]


def test_several_targets_go_through_one_client_and_are_not_fetched_again(suite: Suite) -> None:
    suite.init()
    assert suite.download(MANIFEST, INDEX, MANIFEST) == 0
    requested = suite.requested()
    assert requested.count("/metadata/timestamp.json") == 1
    assert sum(path.startswith("/targets/") for path in requested) == 2
    assert suite.downloaded() == [suite.served(MANIFEST), suite.served(INDEX)]
    assert set(suite.roles()) == ROLES | {"team-vision.json"}

    assert suite.download(MANIFEST, INDEX) == 0
    assert suite.requested() == ["/metadata/2.root.json", "/metadata/timestamp.json"]


def test_a_changed_artifact_replaces_the_old_one(suite: Suite) -> None:
    suite.init()
    suite.download(INDEX)
    suite.world.publish("1.1.0")
    assert suite.download(INDEX) == 0
    (now,) = suite.downloaded()
    assert json.loads(now)["channels"] == {"stable": "1.1.0"}


def test_the_first_failure_ends_a_download(suite: Suite) -> None:
    suite.init()
    assert suite.download(MANIFEST, "models/vision/tiny/9.9.9.json", INDEX) == 1
    assert suite.downloaded() == [suite.served(MANIFEST)]


@pytest.mark.parametrize("kind", ["flip", "endless", "cut", "status"])
def test_a_bad_artifact_is_neither_kept_nor_tried_again(suite: Suite, kind: str) -> None:
    suite.init()
    suite.server.faults = [Fault(part="/targets/", kind=kind, value=404 if kind == "status" else 10)]
    assert suite.download(MANIFEST) == 1
    assert suite.downloaded() == []
    assert sum(path.startswith("/targets/") for path in suite.requested()) == 1


def test_a_failed_refresh_leaves_what_was_trusted(suite: Suite) -> None:
    suite.init()
    suite.refresh()
    before = {path: path.read_bytes() for path in suite.metadata.glob("*.json")}
    suite.world.publish("1.1.0")
    for kind in ("flip", "endless", "cut"):
        suite.server.faults = [Fault(part="timestamp", kind=kind, value=10)]
        assert suite.refresh() == 1
    suite.server.faults = []
    suite.world.stamp(version=1)
    assert suite.refresh() == 1
    assert {path: path.read_bytes() for path in suite.metadata.glob("*.json")} == before


def test_a_refresh_without_an_anchor_fails(suite: Suite) -> None:
    assert suite.refresh() == 1
    assert suite.requested() == []


def test_a_clock_of_the_past_is_believed_here_only(suite: Suite) -> None:
    """The suite replays repositories of years ago under a faked clock: only the floor of the build is off."""
    past = datetime(2025, 2, 9, tzinfo=UTC)
    suite.init()
    suite.world.stamp(version=1, valid_s=0)
    script = f"import sys, time\ntime.time = lambda: {past.timestamp()}\nfrom tools.conformance import main\n"
    expires = past + timedelta(days=1)
    _date_timestamp(suite.world, expires)
    outcome = subprocess.run(
        [sys.executable, "-c", f"{script}sys.exit(main(sys.argv[1:]))", *suite.arguments(MANIFEST)],
        cwd=CLIENT.parents[1],
        timeout=90,
        check=False,
    )
    assert outcome.returncode == 0
    assert suite.refresh() == 1


def test_names_are_quoted_and_plain_repositories_are_served(tmp_path: Path) -> None:
    """Without consistent snapshots, and with a role and a target that are no plain file names."""
    store = _plain_repository(tmp_path / "plain", role="../team?", target="a dir/b?#.txt", data=b"bytes")
    with serving(tmp_path / "plain") as server:
        metadata, artifacts = tmp_path / "metadata", tmp_path / "artifacts"
        for folder in (metadata, artifacts):
            folder.mkdir()
        assert main(["--metadata-dir", str(metadata), "init", str(store)]) == 0
        arguments = ["--metadata-url", f"{server.url}/metadata/", "--metadata-dir", str(metadata)]
        arguments += ["--target-name", "a dir/b?#.txt", "--target-dir", str(artifacts)]
        assert main([*arguments, "--target-base-url", f"{server.url}/targets/", "download"]) == 0
        assert [path for path, _ in server.requests][-2:] == [
            "/metadata/..%2Fteam%3F.json",
            "/targets/a%20dir/b%3F%23.txt",
        ]
    assert [path.read_bytes() for path in artifacts.iterdir()] == [b"bytes"]
    assert len(list(metadata.glob("*.json"))) == 5


def _date_timestamp(world: StoreWorld, expires: datetime) -> None:
    path = world.root / "metadata" / "timestamp.json"
    metadata = Metadata.from_bytes(path.read_bytes())
    metadata.signed.expires = expires
    metadata.sign(world.online)
    path.write_bytes(metadata.to_bytes(JSONSerializer()))


def _plain_repository(folder: Path, *, role: str, target: str, data: bytes) -> Path:
    from securesystemslib.signer import CryptoSigner
    from tuf.api.metadata import DelegatedRole, Delegations, MetaFile, Snapshot, TargetFile, Timestamp

    signer = CryptoSigner.generate_ed25519()
    expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=7)
    root = Root(expires=expires, consistent_snapshot=False)
    for name in ("root", "timestamp", "snapshot", "targets"):
        root.add_key(signer.public_key, name)
    info = TargetFile.from_data(target, data)
    delegated = Targets(expires=expires, targets={target: info})
    top = Targets(expires=expires)
    top.delegations = Delegations({}, {role: DelegatedRole(role, [], 1, False, ["*/*"])})
    top.add_key(signer.public_key, role)
    snapshot = Snapshot(expires=expires, meta={"targets.json": MetaFile(), f"{role}.json": MetaFile()})
    names = {"1.root": root, "timestamp": Timestamp(expires=expires), "snapshot": snapshot, "targets": top}
    for name, signed in (names | {"..%2Fteam%3F": delegated}).items():
        metadata: Metadata = Metadata(signed)
        metadata.sign(signer)
        path = folder / "metadata" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(metadata.to_bytes(JSONSerializer()))
    path = folder / "targets" / "a%20dir" / "b%3F%23.txt"  # the test server takes paths as they come
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return folder / "metadata" / "1.root.json"
