"""``model.toml``: what a person writes about a model; everything that can be measured or derived is left to ``pack``.

Its keys are the manifest's where a key means the same. Derived, and therefore absent here: files with their hashes,
sizes and chunks, memory and latency, ``created``, and (unless given) ``seq``, ``signature`` and the class count.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Final

import msgspec

from agent.bundles.manifest import (
    Batching,
    Device,
    FileRole,
    Golden,
    Handler,
    License,
    Precision,
    Provenance,
    Requires,
    Rollout,
    Signature,
    Threads,
    Warmup,
)
from tools.hub.errors import SourceError

FILE_NAME: Final = "model.toml"
_HINT: Final = "The keys are listed by: inferhub pack --help"


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the file's tables: no unknown keys."""


class VariantSource(Section, frozen=True):
    """One ``[[variants]]``. ``files`` names what this variant reads beside its entry and the shared files."""

    id: str
    entry: str
    precision: Precision
    priority: int  # lower is preferred
    device: Device = msgspec.field(default_factory=lambda: Device(kind="cpu"))
    runtime: str = "onnxruntime"
    files: tuple[str, ...] = ()
    quant: dict[str, str] = {}
    threads: Threads = msgspec.field(default_factory=Threads)
    session: dict[str, Any] = {}
    metrics: dict[str, float] = {}
    trusted_native: bool = False


class Description(Section, frozen=True):
    """The whole file. Paths are relative to it."""

    team: str
    name: str
    version: str
    variants: tuple[VariantSource, ...]
    handler: Handler
    golden: tuple[Golden, ...]
    seq: int = 0  # 0: the time of packing, in Unix seconds
    description: str = ""
    labels: dict[str, str] = {}
    license: License | None = None
    provenance: Provenance = msgspec.field(default_factory=Provenance)
    requires: Requires = msgspec.field(default_factory=Requires)
    signature: Signature | None = None  # None: read from the first variant's model
    classes: str = ""  # a text file, one label per line
    shared: tuple[str, ...] = ()  # files that every variant reads beside handler, classes and golden
    roles: dict[str, FileRole] = {}  # where a file's role does not follow from its use
    ignore: tuple[str, ...] = ()  # glob patterns of files that stay behind
    warmup: Warmup = msgspec.field(default_factory=Warmup)
    batching: Batching = msgspec.field(default_factory=Batching)
    drift: dict[str, Any] = {}
    rollout: Rollout | None = None
    ext: dict[str, Any] = {}


def load(path: Path) -> Description:
    """Return the description in the TOML file ``path``.

    Raises:
        SourceError: unreadable, not TOML, an unknown or missing key, a wrong type; the message names the key.
    """
    try:
        raw = tomllib.loads(path.read_text())
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}", hint=f"Write one; {_HINT[0].lower()}{_HINT[1:]}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: not TOML: {error}") from error
    try:
        description = msgspec.convert(raw, Description)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$")
        key = where.rstrip("`").lstrip(".")
        raise SourceError(f"{path}: [{key}] {message}" if key else f"{path}: {message}", hint=_HINT) from error
    if not description.variants:
        raise SourceError(f"{path}: [variants] at least one", hint=_HINT)
    if not description.golden:
        raise SourceError(
            f"{path}: [golden] at least one recorded input with its outputs",
            hint="A box activates a model only after its golden test; record one real input and the model's answer.",
        )
    return description
