"""The client library: ``from agent.client import Client, AsyncClient, Part, Region, Result``.

Needs NumPy and msgpack only. The names are loaded when first asked for, so that a program using ``Client`` never
imports asyncio.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent.client.aio import AsyncClient
    from agent.client.blocking import Client
    from agent.client.messages import Part, Result
    from agent.client.regions import Region

__all__ = ["AsyncClient", "Client", "Part", "Region", "Result"]

_HOMES = {"AsyncClient": "aio", "Client": "blocking", "Part": "messages", "Region": "regions", "Result": "messages"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
