"""The built-in handlers by the id that manifests use: ``<task>/v<N>``. An id never changes its meaning."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Final

from handlers.base import Handler

BUILT_IN: Final[Mapping[str, tuple[str, str]]] = {
    "tensors/v1": ("handlers.tensors", "TensorsHandler"),
    "windows/v1": ("handlers.windows", "WindowsHandler"),
}


def find(handler_id: str) -> type[Handler]:
    """Return the handler class of ``handler_id``.

    Raises:
        KeyError: no built-in handler has this id; the message lists those there are.
    """
    if handler_id not in BUILT_IN:
        raise KeyError(f"no built-in handler {handler_id!r}; known: {', '.join(BUILT_IN)}")
    module, name = BUILT_IN[handler_id]
    found = getattr(import_module(module), name)
    assert isinstance(found, type)
    assert issubclass(found, Handler)
    return found
