"""A publisher in memory and on a temporary folder: keys, a store, sources of a tiny model, a disk that fails on cue."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from securesystemslib.signer import CryptoSigner
from tuf.ngclient import Updater

from agent.bundles.manifest import OPERATORS_TARGET, Index, parse_index
from tests.fakes.models import WEIGHTS, linear
from tools.hub import safetensors
from tools.hub.bundle import Bundle
from tools.hub.description import Description, load
from tools.hub.export import Exported, Exporter, Wanted
from tools.hub.objects import Folder
from tools.hub.publish import Marked, Published, Publisher, operators_document
from tools.hub.repository import Repository
from tools.hub.verify import StoreFetcher

X = np.arange(8, dtype=np.float32).reshape(2, 4) / 8

MODEL_TOML = """
team = "vision"
name = "linear"
version = "1.0.0"
seq = 1
handler = { id = "tensors/v1" }
batching = { axis = "N", max_batch = 8 }

[[variants]]
id = "cpu-fp32"
entry = "fp32/model.onnx"
precision = "fp32"
priority = 10

[[golden]]
id = "g1"
inputs = "golden/g1.in.safetensors"
outputs = "golden/g1.out.safetensors"
compare = [{ output = "y", metric = "allclose", rtol = 1e-4, atol = 1e-5 }]
"""


class Clock:
    """Unix seconds that only a test moves. Near the real time, since python-tuf's client reads that one."""

    def __init__(self, start: float) -> None:
        self.seconds = start

    def __call__(self) -> float:
        return self.seconds


class PowerCutError(Exception):
    """The machine stopped here."""


class Cut:
    """A power cut at the write number ``left``, in whatever folder that is."""

    def __init__(self, left: int) -> None:
        self.left = left

    def step(self) -> None:
        """Count one write, or stop at it."""
        if self.left == 0:
            raise PowerCutError
        self.left -= 1


class FailingFolder(Folder):
    """Stops at the write number ``left``; everything before it is on disk. Folders may share a ``Cut``."""

    def __init__(self, root: Path, left: int | Cut) -> None:
        super().__init__(root)
        self._cut = Cut(left) if isinstance(left, int) else left

    def _step(self) -> None:
        self._cut.step()

    def put(self, name: str, data: bytes) -> bool:
        self._step()
        return super().put(name, data)

    def put_file(self, name: str, source: Path) -> bool:
        self._step()
        return super().put_file(name, source)

    def replace(self, name: str, data: bytes) -> None:
        self._step()
        super().replace(name, data)

    def remove(self, name: str) -> None:
        self._step()
        super().remove(name)


class Centre:
    """A store with fresh keys: root 2 of 3, one team."""

    def __init__(self, folder: Path, clock: Clock, *, team: str = "vision") -> None:
        self.root = folder
        self.clock = clock
        self.team = team
        self.root_signers = [CryptoSigner.generate_ed25519() for _ in range(3)]
        self.targets, self.online, self.team_signer, self.operator = (CryptoSigner.generate_ed25519() for _ in range(4))
        self.anchor = b""

    def repository(self, objects: Folder | None = None) -> Repository:
        """Return the repository, over ``objects`` if the test has its own."""
        return Repository(objects or Folder(self.root), self.clock)

    def initialise(self, objects: Folder | None = None, *, signers: int = 3, threshold: int = 2) -> bytes:
        """Create the store with so many of the three root keys signing."""
        self.anchor = self.repository(objects).initialise(
            root_keys=[signer.public_key for signer in self.root_signers],
            root_signers=self.root_signers[:signers],
            threshold=threshold,
            targets_signer=self.targets,
            online_signer=self.online,
            teams={self.team: self.team_signer.public_key},
            top_targets={OPERATORS_TARGET: operators_document("default", [self.operator.public_key])},
        )
        return self.anchor

    def publish(self, bundle: Bundle, *channels: str, objects: Folder | None = None, **signers: Any) -> Published:
        """Publish ``bundle``; ``team_signer`` and ``online_signer`` may be replaced."""
        keys = {"team_signer": self.team_signer, "online_signer": self.online} | signers
        return self.publisher(objects).publish(bundle, channels=channels, **keys)

    def publisher(self, objects: Folder | None = None) -> Publisher:
        """Return a publisher over ``objects`` if the test has its own."""
        objects = objects or Folder(self.root)
        return Publisher(objects, self.repository(objects), self.clock)

    def revoke(self, version: str, *, objects: Folder | None = None, **more: Any) -> Marked:
        """Revoke a version of ``vision/tiny``."""
        signers = {"team_signer": self.team_signer, "online_signer": self.online}
        return self.publisher(objects).revoke(
            self.team, "tiny", version, **({"reason": "wrong labels"} | more), **signers
        )

    def export(self, stick: Folder, *versions: str, objects: Folder | None = None, **more: Any) -> Exported:
        """Export versions of ``vision/tiny``, without any that its channel ``stable`` points to."""
        objects = objects or Folder(self.root)
        wanted = [Wanted(team=self.team, name="tiny", version=version) for version in versions or ("",)]
        exporter = Exporter(objects, self.repository(objects), stick, self.clock)
        return exporter.export(wanted, online_signer=self.online, **more)


class Reader:
    """A device's view: python-tuf's own client, which remembers what it has seen and takes nothing older."""

    def __init__(self, anchor: bytes, folder: Path) -> None:
        self._anchor = anchor
        self.folder = folder
        folder.mkdir(parents=True)

    def copy(self, folder: Path) -> Reader:
        """Return a device that has seen the same."""
        twin = Reader(self._anchor, folder)
        shutil.copytree(self.folder, folder, dirs_exist_ok=True, symlinks=True)
        return twin

    def look(self, root: Path) -> Index:
        """Refresh from ``root``; return the index of ``vision/tiny``."""
        client = self._refreshed(root)
        info = client.get_targetinfo("models/vision/tiny/index.json")
        assert info is not None
        return parse_index(Path(client.download_target(info)).read_bytes())

    def root_version(self, root: Path) -> int:
        """Refresh from ``root``; return the version of its newest root."""
        self._refreshed(root)
        version: int = json.loads((self.folder / "root.json").read_bytes())["signed"]["version"]
        return version

    def _refreshed(self, root: Path) -> Updater:
        url = root.absolute().as_uri()
        targets = self.folder / "targets"
        targets.mkdir(exist_ok=True)
        client = Updater(
            str(self.folder), f"{url}/metadata/", str(targets), f"{url}/targets/",
            fetcher=StoreFetcher(), bootstrap=self._anchor,
        )  # fmt: skip
        client.refresh()
        return client


def make_source(folder: Path, *, text: str = MODEL_TOML) -> Path:
    """Write the sources of ``y = x @ WEIGHTS`` to ``folder``."""
    (folder / "fp32").mkdir(parents=True)
    (folder / "golden").mkdir()
    onnx.save(linear(), folder / "fp32/model.onnx")
    (folder / "golden/g1.in.safetensors").write_bytes(safetensors.dump({"x": X}))
    (folder / "golden/g1.out.safetensors").write_bytes(safetensors.dump({"y": X @ WEIGHTS}))
    (folder / "model.toml").write_text(text)
    return folder


def description(source: Path, old: str = "", new: str = "") -> Description:
    """Return the description in ``source`` after replacing the text ``old`` by ``new``."""
    path = source / "model.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new) if old else text)
    return load(path)
