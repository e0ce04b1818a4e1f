"""Versions of real models to deploy, good ones and bad ones of every kind, and how each deployment must end.

A version is made of a model's release (real weights) and a flavour (what is wrong with it). Each is made anew: its
bytes are like no other's, so that all of it is fetched.
"""

from __future__ import annotations

import itertools
import json
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx

from agent.worker.safetensors import parse
from tests import digits
from tests.fakes.store import StoreWorld
from tools.demo import magika
from tools.hub import safetensors, scaffold
from tools.hub.bundle import Bundle
from tools.hub.chunks import blob_name
from tools.hub.description import load
from tools.hub.pack import pack

TEAM = "vision"
_MAKE = "super().__init__(context)"  # where a handler's fault at load goes
_SERVE = "del content_type  # what the sender believes is not evidence"  # and one at each request
_PICTURES = 64
_KEPT = ("signature", "handler", "golden", "variants", "batching", "warmup", "classes")  # of a packed manifest


class Kind(StrEnum):
    """What a version is like."""

    GOOD = "good"
    CRASHING = "crashing"
    WRONG = "wrong answers"
    SLOW = "slow"
    OVERSIZED = "oversized"
    INCOMPATIBLE = "incompatible"
    TAMPERED = "tampered"


@dataclass(frozen=True, kw_only=True)
class Flavour:
    """One way to be of a kind, how its deployment ends, and a word of the reason it gives."""

    kind: Kind
    what: str
    state: str
    code: str = ""
    says: str = ""
    on_load: str = ""  # what the handler does when it is made
    on_request: str = ""  # and with each request


FLAVOURS: tuple[Flavour, ...] = (
    Flavour(kind=Kind.GOOD, what="good", state="confirmed"),
    Flavour(
        kind=Kind.CRASHING,
        what="dies on requests",
        state="rolled_back",
        code="probation_failed",
        says="death",
        on_request="import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    ),
    Flavour(kind=Kind.WRONG, what="other weights", state="failed", code="selftest_failed", says="golden"),
    Flavour(kind=Kind.SLOW, what="slow model", state="failed", code="selftest_failed", says="allowed are"),
    Flavour(
        kind=Kind.OVERSIZED,
        what="takes too much",
        state="failed",
        code="out_of_memory",
        says="memory",
        on_load="self.hoard = bytes(1 << 40)",
    ),
    Flavour(kind=Kind.INCOMPATIBLE, what="other inputs", state="rejected", code="incompatible_signature", says="input"),
    Flavour(kind=Kind.TAMPERED, what="chunk", state="rejected", code="chunk_mismatch"),
    Flavour(
        kind=Kind.CRASHING,
        what="dies while it loads",
        state="failed",
        code="load_failed",
        says="died",
        on_load="import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    ),
    Flavour(
        kind=Kind.CRASHING,
        what="raises on requests",
        state="rolled_back",
        code="probation_failed",
        says="failed",
        on_request="raise RuntimeError('broken')",
    ),
    Flavour(
        kind=Kind.CRASHING,
        what="hangs on requests",
        state="rolled_back",
        code="probation_failed",
        says="death",
        on_request="import time; time.sleep(3600)",
    ),
    Flavour(
        kind=Kind.SLOW,
        what="slow on requests",
        state="rolled_back",
        code="probation_failed",
        says="95 %",
        on_request="import time; time.sleep(0.1)",
    ),
    Flavour(kind=Kind.OVERSIZED, what="asks for too much", state="rejected", code="no_variant", says="this box has"),
    Flavour(kind=Kind.INCOMPATIBLE, what="other labels", state="rejected", code="incompatible_signature", says="label"),
    Flavour(kind=Kind.TAMPERED, what="manifest", state="rejected", code="untrusted"),
    Flavour(kind=Kind.TAMPERED, what="timestamp", state="rejected", code="untrusted"),
)


class Family(Protocol):
    """A model in several releases."""

    name: str
    releases: Sequence[str]

    def parts(self, release: str, flavour: Flavour, stamp: str) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Return the files of a version and the fields of its manifest."""

    def bodies(self) -> Sequence[bytes]:
        """Return raw requests."""

    def answers(self, release: str) -> Sequence[Any]:
        """Return what a good version of a release answers to each of them, as ``told`` reads it."""

    def told(self, answer: Any) -> Any:
        """Return the part of an answer that says what was seen."""


def schedule(count: int, families: Sequence[Family]) -> Iterator[tuple[Family, Flavour]]:
    """Yield ``count`` deployments: the kinds in turn, the models in turn by rounds, each kind in all its flavours."""
    turns = {
        (family.name, kind): itertools.cycle([item for item in FLAVOURS if item.kind is kind])
        for family in families
        for kind in Kind
    }
    for number, kind in zip(range(count), itertools.cycle(Kind), strict=False):
        family = families[number // len(Kind) % len(families)]
        yield family, next(turns[family.name, kind])


class DigitsFamily:
    """The digits network, trained twice."""

    name = "digits"
    releases = ("first", "second")

    def __init__(self, data: digits.Digits) -> None:
        pictures, _ = data.held_out
        self.pictures = pictures[:_PICTURES]
        self.networks = {name: digits.train(data, seed=seed) for seed, name in enumerate(self.releases)}

    def parts(self, release: str, flavour: Flavour, stamp: str) -> tuple[dict[str, bytes], dict[str, Any]]:
        network, other = self.networks[release], self.networks[_other(self.releases, release)]
        slow, flat = flavour.what == "slow model", flavour.what == "other inputs"
        images = (self.pictures[:16] / 16).astype(np.float32).reshape((16, 64) if flat else (16, 1, 8, 8))
        wanted = (other if flavour.kind is Kind.WRONG else network).logits(self.pictures[:16])
        labels = [str(number) for number in range(10)]
        if flavour.what == "other labels":
            labels.reverse()
        files = {
            "fp32/model.onnx": network.onnx(stamp=stamp, slow=slow, flat=flat),
            "handler.py": _faulty(digits.HANDLER, flavour),
            "classes.txt": "\n".join(labels).encode() + b"\n",
            "golden/in.safetensors": safetensors.dump({"image": images}),
            "golden/out.safetensors": safetensors.dump({"logits": wanted}),
        }
        changes: dict[str, Any] = {
            "signature": {
                "inputs": [{"name": "image", "dtype": "float32", "shape": ["N", *images.shape[1:]]}],
                "outputs": [{"name": "logits", "dtype": "float32", "shape": ["N", 10]}],
                "dims": {"N": {"min": 1, "max": 16}},
            },
            "batching": {"axis": "N", "max_batch": 16},
            "handler": {"module": "handler.py", "class": "DigitsHandler"},
            "classes": {"file": "classes.txt", "count": 10},
            "golden": [
                {
                    "id": "pictures",
                    "inputs": "golden/in.safetensors",
                    "outputs": "golden/out.safetensors",
                    "compare": [{"output": "logits", "rtol": 1e-3, "atol": 1e-3}],
                    "timeout_ms": 1 if slow else 5000,
                }
            ],
            "variants": [_variant("cpu-fp32", 10, "fp32/model.onnx", flavour)],
        }
        return files, changes

    def bodies(self) -> Sequence[bytes]:
        return [picture.tobytes() for picture in self.pictures]

    def answers(self, release: str) -> Sequence[Any]:
        return [int(row.argmax()) for row in self.networks[release].logits(self.pictures)]

    def told(self, answer: Any) -> Any:
        return answer["digit"]


class MagikaFamily:
    """Two official releases that take each other's place, and an older one that cannot."""

    name = "magika"
    releases = ("1.0.0", "2.0.0")

    def __init__(self, wheels: Path, folder: Path) -> None:
        """Raises ``SourceError`` where the wheels cannot be had."""
        self._bases: dict[str, tuple[dict[str, bytes], dict[str, Any]]] = {}
        for release in self.releases:
            wheel = magika.download_wheel(magika.RELEASES[release].wheel, wheels)
            source = magika.build_sources(wheel, release, folder / release)
            packed = pack(source, load(source / "model.toml"), folder / f"packed-{release}", now=time.time()).bundle
            self._bases[release] = _base(source, packed)
            self._samples = list(magika.open_wheel(wheel).samples.values())
        old = magika.download_wheel("0.5.1", wheels)
        self._old = _only_model(old)
        self._answers = {release: self._answer_all(release, folder / release) for release in self.releases}

    def parts(self, release: str, flavour: Flavour, stamp: str) -> tuple[dict[str, bytes], dict[str, Any]]:
        files, changes = dict(self._bases[release][0]), json.loads(json.dumps(self._bases[release][1]))
        model = onnx.load_model_from_string(files["fp32/model.onnx"])
        model.doc_string = stamp
        files["fp32/model.onnx"] = model.SerializeToString()
        files[magika.HANDLER] = _faulty(files[magika.HANDLER].decode(), flavour)
        if flavour.kind is Kind.WRONG:
            outputs = next(path for path in files if path.endswith(".out.safetensors"))
            recorded = parse(files[outputs])
            files[outputs] = safetensors.dump({name: np.roll(array, 1, axis=0) for name, array in recorded.items()})
        if flavour.what == "slow model":
            changes["golden"][0]["timeout_ms"] = 1
        if flavour.what == "other labels":
            files["classes.txt"] = b"\n".join(reversed(files["classes.txt"].splitlines())) + b"\n"
        if flavour.what == "other inputs":
            files["fp32/model.onnx"] = self._old
            changes["signature"]["inputs"] = [{"name": "bytes", "dtype": "float32", "shape": ["N", 1536]}]
            changes["signature"]["outputs"] = [{"name": "target_label", "dtype": "float32", "shape": ["N", 113]}]
        for variant in changes["variants"]:
            variant.update(_memory(flavour))
        return files, changes

    def bodies(self) -> Sequence[bytes]:
        return self._samples

    def answers(self, release: str) -> Sequence[Any]:
        return self._answers[release]

    def told(self, answer: Any) -> Any:
        return answer["label"]

    def _answer_all(self, release: str, source: Path) -> list[str]:
        handler = magika.handler_of(source, release)
        found = []
        for body in self._samples:
            prepared = handler.preprocess(body, "")
            outputs = scaffold.run(source / "fp32/model.onnx", prepared.tensors)
            found.append(handler.postprocess_with(outputs, 1, prepared.state)["label"])
        return found


def publish(world: StoreWorld, family: Family, release: str, flavour: Flavour, version: str) -> Bundle:
    """Publish a version; no channel points to it."""
    files, changes = family.parts(release, flavour, sha256(version.encode()).hexdigest())
    return world.publish(version, files, channels=(), name=family.name, **changes)


@contextmanager
def tampered(world: StoreWorld, flavour: Flavour, bundle: Bundle) -> Iterator[None]:
    """Flip one byte of what the store holds of ``bundle``, if that is its flavour, as long as the block runs."""
    path = _victim(world.root, flavour, bundle)
    if path is None:
        yield
        return
    sound = path.read_bytes()
    middle = len(sound) // 2
    path.write_bytes(sound[:middle] + bytes([sound[middle] ^ 1]) + sound[middle + 1 :])
    try:
        yield
    finally:
        path.write_bytes(sound)


def _victim(root: Path, flavour: Flavour, bundle: Bundle) -> Path | None:
    if flavour.kind is not Kind.TAMPERED:
        return None
    if flavour.what == "chunk":
        entry = bundle.manifest.file(bundle.manifest.variants[0].entry)
        return root / blob_name(entry.chunks[0].blob)
    if flavour.what == "timestamp":
        return root / "metadata" / "timestamp.json"
    manifest = bundle.manifest
    (found,) = (root / "targets").rglob(f"{manifest.team}/{manifest.name}/*{manifest.version}.json")
    return found


def _faulty(source: str, flavour: Flavour) -> bytes:
    for place, fault in ((_MAKE, flavour.on_load), (_SERVE, flavour.on_request)):
        if place not in source:
            raise ValueError(f"the handler has no line {place!r}")
        if fault:
            source = source.replace(place, f"{place}\n        {fault}", 1)
    return source.encode()


def _variant(name: str, priority: int, entry: str, flavour: Flavour) -> dict[str, Any]:
    return {
        "id": name,
        "priority": priority,
        "runtime": "onnxruntime",
        "entry": entry,
        "files": [entry],
        "precision": "fp32",
        "device": {"kind": "cpu", "providers": ["CPUExecutionProvider"]},
        **_memory(flavour),
    }


def _memory(flavour: Flavour) -> dict[str, Any]:
    if flavour.what == "asks for too much":
        return {"memory": {"host_mb": 1 << 24, "source": "measured"}}
    return {}


def _base(source: Path, packed: Bundle) -> tuple[dict[str, bytes], dict[str, Any]]:
    manifest = json.loads((packed.folder / "manifest.json").read_bytes())
    files = {item["path"]: (source / item["path"]).read_bytes() for item in manifest["files"]}
    return files, {name: manifest[name] for name in _KEPT if name in manifest}


def _only_model(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (item for item in archive.namelist() if item.endswith("/model.onnx"))
        return archive.read(name)


def _other(releases: Sequence[str], release: str) -> str:
    return next(item for item in releases if item != release)
