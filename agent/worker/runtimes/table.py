"""The runtimes this worker can be built around: one line each.

A zygote is started for one line, imports its ``library`` and its ``module`` once, and forks workers of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Final, cast

from agent.errors import LoadError
from agent.worker.runtimes.base import Load


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One runtime."""

    zygote: str  # the zygote's --runtime
    manifest: str  # a variant's "runtime"
    library: str  # what the zygote imports
    module: str  # ours, with load(spec)


ENTRIES: Final = (
    Entry(zygote="onnx", manifest="onnxruntime", library="onnxruntime", module="agent.worker.runtimes.onnx"),
)


def by_zygote(name: str) -> Entry:
    """Return the line of a zygote's name.

    Raises:
        LoadError: there is none.
    """
    return _find("zygote", name)


def loader(manifest_name: str) -> Load:
    """Return ``load`` of a manifest's runtime.

    Raises:
        LoadError: no such runtime, or it cannot be imported.
    """
    return cast("Load", preload(_find("manifest", manifest_name)).load)


def preload(entry: Entry) -> ModuleType:
    """Import the entry's library and module; return the module.

    Raises:
        LoadError: one of them cannot be imported.
    """
    try:
        import_module(entry.library)
        return import_module(entry.module)
    except ImportError as error:
        raise LoadError(f"runtime {entry.manifest}: {error}") from error


def _find(field: str, value: str) -> Entry:
    for entry in ENTRIES:
        if getattr(entry, field) == value:
            return entry
    known = ", ".join(getattr(entry, field) for entry in ENTRIES)
    raise LoadError(f"unknown runtime {value!r}; known: {known}")
