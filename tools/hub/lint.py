"""What a publisher should look at before signing, though a box would take it. Pure."""

from __future__ import annotations

from collections.abc import Collection

from agent.bundles.inspection import ModelFacts, license_conflicts
from agent.bundles.manifest import Manifest
from agent.config import MIB

_LARGE_BYTES = 16 * MIB


def warnings(manifest: Manifest, facts: Collection[ModelFacts]) -> tuple[str, ...]:
    """Return one sentence per finding."""
    spdx = manifest.license.spdx if manifest.license else ""
    found = license_conflicts(spdx, list(facts))
    if not spdx and not found:
        found.append("the manifest names no licence: say [license] spdx = … in model.toml")
    used = {variant.runtime for variant in manifest.variants}
    named = {need.name for need in manifest.requires.runtimes if need.spec}
    found += [
        f"requires.runtimes does not say which versions of {runtime} load this model"
        for runtime in sorted(used - named)
    ]
    found += [
        f"{one.path}: {one.size // MIB} MiB with its weights inside: an edit of the graph moves them, and boxes fetch "
        "more; pack with --external-data auto"
        for one in facts
        if one.format == "onnx" and not one.external and one.size > _LARGE_BYTES
    ]
    return tuple(found)
