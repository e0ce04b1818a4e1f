"""What ``inspect`` prints for people, on the box and at the centre: plain lines made from plain values.

Promises: nothing that came from a model or a manifest is a terminal command, whatever it contains.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

from agent.cli_text import shown

_VALUE_MAX: Final = 160
_OPERATORS_MAX: Final = 12
_MARK: Final = "(none)"
_NEEDS: Final = ("arch", "features_any", "min_compute", "driver", "providers")


def model_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return the facts of one model file (``inspection.ModelFacts`` as plain values)."""
    return list(_model(facts))


def version_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return a version: its manifest, then its models (``summary.summary``)."""
    lines = list(_manifest(summary["manifest"], str(summary["manifest_sha256"])))
    if "verified" in summary:
        at = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(summary["verified"]))
        lines.append(f"verified   {at}, in {shown(summary['path'])}")
    for facts in summary["models"]:
        lines += ["", *_model(facts)]
    lines += [f"warning: {shown(text)}" for text in summary["warnings"]]
    return lines


def _manifest(manifest: Mapping[str, Any], digest: str) -> Iterator[str]:
    yield f"{shown(manifest['team'])}/{shown(manifest['name'])}@{shown(manifest['version'])}  seq {manifest['seq']}"
    if manifest.get("description"):
        yield f"           {_cut(manifest['description'])}"
    yield f"manifest   sha256 {digest}, created {shown(manifest['created'])}"
    licence = manifest.get("license") or {}
    told = [shown(licence[key]) for key in ("spdx", "file", "terms_url", "export_note") if licence.get(key)]
    yield f"licence    {', '.join(told) or _MARK}"
    for key, value in (manifest.get("provenance") or {}).items():
        yield f"provenance {shown(key)}: {_cut(value)}"
    yield from _requires(manifest.get("requires") or {})
    if manifest.get("labels"):
        yield f"labels     {', '.join(f'{shown(k)}={shown(v)}' for k, v in manifest['labels'].items())}"
    handler = manifest["handler"]
    yield f"handler    {shown(handler.get('id') or handler.get('module', ''))}"
    yield from _ports(manifest["signature"], 10)
    for variant in manifest["variants"]:
        yield from _variant(variant)
    goldens = ", ".join(shown(sample["id"]) for sample in manifest.get("golden", ()))
    yield f"golden     {goldens or _MARK}"
    yield f"files      {len(manifest['files'])}, {_size(manifest['total_size'])}"
    for item in manifest["files"]:
        yield f"           {shown(item['path'])}  {shown(item['role'])}  {_size(item['size'])}  {item['sha256'][:12]}"


def _requires(requires: Mapping[str, Any]) -> Iterator[str]:
    told = [f"agent {shown(requires['agent'])}"] if requires.get("agent") else []
    told += [f"{shown(need['name'])} {shown(need.get('spec', ''))}".strip() for need in requires.get("runtimes", ())]
    told += [shown(feature) for feature in requires.get("features", ())]
    told += [shown(system) for system in requires.get("os", ())]
    yield f"requires   {', '.join(told) or 'nothing in particular'}"


def _variant(variant: Mapping[str, Any]) -> Iterator[str]:
    memory, perf, device = variant.get("memory", {}), variant.get("perf", {}), variant["device"]
    yield (
        f"variant    {shown(variant['id'])}: {shown(variant['precision'])} on {shown(device['kind'])}, "
        f"{shown(variant['runtime'])}, priority {variant['priority']}, {memory.get('host_mb', 0)} MiB "
        f"({shown(memory.get('source', 'estimated'))}), p50 {perf.get('p50_ms', 0.0):g} ms"
    )
    needs = [f"{key} {_cut(device[key])}" for key in _NEEDS if device.get(key)]
    if needs:
        yield f"           {', '.join(needs)}"
    for key in ("quant", "metrics"):
        if variant.get(key):
            yield f"           {key}: {', '.join(f'{shown(k)} {_cut(v)}' for k, v in variant[key].items())}"
    if variant.get("trusted_native"):
        yield "           trusted_native: its loader may run code"


def _model(facts: Mapping[str, Any]) -> Iterator[str]:
    yield f"{shown(facts['path'])}  {shown(facts['format'])}  {_size(facts['size'])}"
    yield f"  sha256      {facts['sha256']}"
    yield f"  licence     {_cut(facts['license']) if facts['license'] else _MARK}"
    if facts["parameters"] is not None:
        dtypes = ", ".join(f"{shown(k)} {v:,}" for k, v in facts["about"].get("dtypes", {}).items())
        yield f"  parameters  {facts['parameters']:,}{f' ({dtypes})' if dtypes else ''}"
    yield from (f"  {line}" for line in _ports(facts, 11))
    for key, value in facts["about"].items():
        if key == "dtypes" or value in ("", [], {}):
            continue
        if key == "operators":
            value = dict(list(value.items())[:_OPERATORS_MAX])
        yield f"  {shown(key):<11} {_cut(value)}"
    for item in facts["external"]:
        size = "MISSING" if item["size"] is None else _size(item["size"])
        yield f"  weights in  {shown(item['path'])}  {size}"
    for key, value in facts["metadata"].items():
        yield f"  metadata    {shown(key)}: {_cut(value)}"
    for note in facts["notes"]:
        yield f"  note        {shown(note)}"


def _ports(sides: Mapping[str, Any], width: int) -> Iterator[str]:
    for side in ("inputs", "outputs"):
        for port in sides.get(side, ()):
            name, dtype, shape = (port["name"], port["dtype"], port["shape"]) if isinstance(port, Mapping) else port
            sizes = ", ".join("?" if size is None else shown(size) for size in shape)
            yield f"{side[:-1]:<{width}} {shown(name)}: {shown(dtype) or 'not a tensor'}[{sizes}]"


def _cut(value: object) -> str:
    if isinstance(value, Mapping):
        value = ", ".join(f"{key} {item}" for key, item in value.items())
    elif isinstance(value, list | tuple):
        value = ", ".join(str(item) for item in value)
    text = shown(value)
    return text if len(text) <= _VALUE_MAX else f"{text[:_VALUE_MAX]}…"


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size:,} B"
