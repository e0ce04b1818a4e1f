"""A version told in plain values: what its manifest says and what is found inside its models. For ``inspect``.

Bounded: what a hostile file can make of its own metadata is cut before it becomes an answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import msgspec

from agent.bundles import inspection
from agent.bundles.layout import MANIFEST_FILE, VERIFIED_FILE
from agent.bundles.manifest import Manifest, parse_manifest
from agent.errors import StateError

ANSWER_BYTES_MAX: Final = 512 * 1024


def version_summary(path: Path) -> dict[str, Any]:
    """Return the summary of the version directory ``path``, with when it was verified.

    Raises:
        StateError: there is no version, or its files cannot be read.
        UnsafeBundleError: a file is not what its format allows.
    """
    try:
        data = (path / MANIFEST_FILE).read_bytes()
        verified = json.loads((path / VERIFIED_FILE).read_bytes())["verified"]
    except (OSError, ValueError, KeyError) as error:
        raise StateError(f"{path}: no verified version here: {error}") from error
    manifest = parse_manifest(data)
    facts = inspection.inspect_bundle(path, manifest)
    return summary(manifest, sha256(data).hexdigest(), facts) | {"path": str(path), "verified": verified}


def summary(manifest: Manifest, manifest_sha256: str, facts: Sequence[inspection.ModelFacts]) -> dict[str, Any]:
    """Return the manifest without its chunks, the facts of its models, and where the two disagree."""
    spdx = manifest.license.spdx if manifest.license else ""
    plain = msgspec.to_builtins(manifest)
    for item in plain["files"]:
        item["chunks"] = len(item.get("chunks", ()))
    found = {"manifest": plain, "manifest_sha256": manifest_sha256, "models": [msgspec.to_builtins(f) for f in facts]}
    differing = [
        f"{one.path}: its sha256 is not the manifest's" for one in facts if one.sha256 != manifest.file(one.path).sha256
    ]
    found["warnings"] = [*differing, *inspection.license_conflicts(spdx, list(facts))]
    return _bounded(found)


def _bounded(found: dict[str, Any]) -> dict[str, Any]:
    """Leave out what makes the answer too long: metadata first, then the list of files."""
    if len(json.dumps(found)) > ANSWER_BYTES_MAX:
        for model in found["models"]:
            model["metadata"] = {"…": "too long to show"}
            model["about"].pop("operators", None)
    if len(json.dumps(found)) > ANSWER_BYTES_MAX:
        found["manifest"]["files"] = found["manifest"]["files"][:100]
        found["models"] = found["models"][:20]
        found["warnings"] = [*found["warnings"][:20], "cut: the whole is too long to show"]
    return found
