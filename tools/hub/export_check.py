"""What an exported model must keep of its manifest's word, told before any runtime is started. Pure.

Inputs and outputs are the signature's, and every ONNX Runtime that ``requires`` allows loads the file's opsets and IR
version. ``pack`` then loads it too, in a worker; this check knows the versions that are not installed here, and says
what to do in the exporter's words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from agent.bundles.inspection import ModelFacts
from agent.bundles.manifest import Manifest, Tensor, Variant
from agent.bundles.onnx_facts import Port
from tools.hub import onnx_versions
from tools.hub.errors import SourceError

_RUNTIME = "onnxruntime"


def check(manifest: Manifest, facts: Mapping[str, ModelFacts]) -> None:
    """Check each variant's ONNX entry; ``facts`` are by path.

    Raises:
        SourceError: the first fault, with the variant and what to do.
    """
    for variant in manifest.variants:
        found = facts.get(variant.entry)
        if found is not None and found.format == "onnx":
            _check_ports(manifest.signature.inputs, found.inputs, variant, "input")
            _check_ports(manifest.signature.outputs, found.outputs, variant, "output")
            _check_versions(manifest, found, variant)


def _check_ports(declared: Sequence[Tensor], found: Sequence[Port], variant: Variant, side: str) -> None:
    where = f"variant {variant.id}: {variant.entry}"
    hint = "Export the model to this signature, or correct [signature]."
    ports = {port.name: port for port in found}
    if missing := [tensor.name for tensor in declared if tensor.name not in ports]:
        raise SourceError(f"{where}: has no {side} {missing[0]!r}; it has {', '.join(ports) or 'none'}", hint=hint)
    if extra := sorted(set(ports) - {tensor.name for tensor in declared}):
        raise SourceError(f"{where}: the {side} {extra[0]!r} is not in the signature", hint=hint)
    for tensor in declared:
        port = ports[tensor.name]
        if port.dtype != tensor.dtype:
            raise SourceError(
                f"{where}: {side} {tensor.name!r} is {port.dtype or 'no tensor'}, the signature says {tensor.dtype}",
                hint=hint,
            )
        if not _fits(tensor.shape, port.shape) and (port.shape or side == "input"):
            raise SourceError(
                f"{where}: {side} {tensor.name!r} has shape {_shown(port.shape)}, the signature says "
                f"{_shown(tensor.shape)}",
                hint=hint,
            )


def _fits(declared: Sequence[int | str | None], found: Sequence[int | str | None]) -> bool:
    if len(declared) != len(found):
        return False
    pairs = zip(declared, found, strict=True)
    return all(one == other for one, other in pairs if isinstance(one, int) and isinstance(other, int))


def _check_versions(manifest: Manifest, found: ModelFacts, variant: Variant) -> None:
    for need in manifest.requires.runtimes:
        if need.name != _RUNTIME:
            continue
        opsets, ir_version = found.about.get("opsets", {}), int(found.about.get("ir_version", 0))
        if why := onnx_versions.obstacle(opsets, ir_version, need.spec):
            raise SourceError(
                f"variant {variant.id}: {variant.entry}: requires allows {need.name} {need.spec}, but {why}",
                hint=f"Export with a lower opset, or require {onnx_versions.spec_for(opsets, ir_version)!r}.",
            )


def _shown(shape: Sequence[int | str | None]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"
