"""The zygotes this worker can be forked from, one line each, and the runtime in each.

A zygote is started for one line, imports its ``library``, ``preloads`` and ``module`` once, and forks workers of it.
torch has two: reading an exported program takes as much again to import as torch itself, which a box with TorchScript
models only need not pay.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Final, cast

from agent.errors import UnloadableError
from agent.worker.runtimes.base import Load


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One zygote."""

    zygote: str  # its --runtime
    manifest: str  # a variant's "runtime"
    library: str  # what is imported
    module: str  # ours, with load(spec)
    preloads: tuple[str, ...] = ()  # what the library would import at a model's load, once for each worker


ENTRIES: Final = (
    Entry(zygote="onnx", manifest="onnxruntime", library="onnxruntime", module="agent.worker.runtimes.onnx"),
    Entry(zygote="torch", manifest="torch", library="torch", module="agent.worker.runtimes.torch"),
    Entry(
        zygote="torch-export",
        manifest="torch",
        library="torch",
        module="agent.worker.runtimes.torch",
        preloads=("torch.export.pt2_archive", "torch.export._trace", "torch.export.passes"),
    ),
)


def by_zygote(name: str) -> Entry:
    """Return the line of a zygote's name.

    Raises:
        UnloadableError: there is none.
    """
    return _find("zygote", name)


def loader(manifest_name: str) -> Load:
    """Return ``load`` of a manifest's runtime.

    Raises:
        UnloadableError: no such runtime, or it cannot be imported.
    """
    return cast("Load", preload(_find("manifest", manifest_name)).load)


def preload_all(manifest_name: str) -> None:
    """Import what any zygote of a manifest's runtime imports.

    Raises:
        UnloadableError: no such runtime, or it cannot be imported.
    """
    _find("manifest", manifest_name)
    for entry in ENTRIES:
        if entry.manifest == manifest_name:
            preload(entry)


def preload(entry: Entry) -> ModuleType:
    """Import what the entry names; return the module.

    Raises:
        UnloadableError: one of them cannot be imported.
    """
    try:
        for name in (entry.library, *entry.preloads):
            import_module(name)
        return import_module(entry.module)
    except ImportError as error:
        raise UnloadableError(f"runtime {entry.manifest}: {error}") from error


def _find(field: str, value: str) -> Entry:
    for entry in ENTRIES:
        if getattr(entry, field) == value:
            return entry
    known = ", ".join(dict.fromkeys(getattr(entry, field) for entry in ENTRIES))
    raise UnloadableError(f"unknown runtime {value!r}; known: {known}")
