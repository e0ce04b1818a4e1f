"""Which ONNX Runtime releases load which models: opset, ml opset and IR version. Pure.

A release refuses a model that is stamped with a later opset or IR version than it knows, whatever operators it uses.
The table was measured: each release was given empty models of rising versions. A release behind the last row knows at
least what that row says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from agent.bundles.requirements import satisfies


@dataclass(frozen=True, slots=True)
class Release:
    """The newest versions that an ONNX Runtime release loads."""

    version: str
    opset: int
    ml_opset: int
    ir_version: int


RELEASES: Final = (
    Release("1.20", 21, 5, 10),
    Release("1.21", 22, 5, 10),
    Release("1.22", 22, 5, 10),
    Release("1.23", 23, 5, 11),
    Release("1.24", 25, 5, 13),
    Release("1.25", 26, 5, 13),
    Release("1.31", 26, 5, 13),
)


def obstacle(opsets: Mapping[str, int], ir_version: int, spec: str) -> str:
    """Return why a release that ``spec`` allows refuses the model, ``""`` if all load it.

    Args:
        opsets: By domain; the default one is ``ai.onnx``.
        ir_version: Of the model.
        spec: A version range such as ``>=1.20,<2``; empty allows every release, and is not judged.
    """
    if not spec:
        return ""
    for release in RELEASES:
        if satisfies(release.version, spec) and (why := _lacks(release, opsets, ir_version)):
            return why
    return ""


def spec_for(opsets: Mapping[str, int], ir_version: int) -> str:
    """Return the range of releases that load the model, from the first that does."""
    for release in RELEASES:
        if not _lacks(release, opsets, ir_version):
            return f">={release.version},<2"
    return f">={RELEASES[-1].version},<2"


def _lacks(release: Release, opsets: Mapping[str, int], ir_version: int) -> str:
    where = f"onnxruntime {release.version}"
    if opsets.get("ai.onnx", 0) > release.opset:
        return f"{where} loads opset {release.opset} at most, the model has {opsets['ai.onnx']}"
    if opsets.get("ai.onnx.ml", 0) > release.ml_opset:
        return f"{where} loads ai.onnx.ml {release.ml_opset} at most, the model has {opsets['ai.onnx.ml']}"
    if ir_version > release.ir_version:
        return f"{where} loads IR version {release.ir_version} at most, the model has {ir_version}"
    return ""
