"""Write the little TOML that tools write: texts, numbers, truth values, lists and inline tables."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tools.hub.errors import SourceError

_BARE = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)


def value(item: Any) -> str:
    """Return ``item`` as a TOML value on one line.

    Raises:
        SourceError: something TOML has no word for, such as ``None``.
    """
    if isinstance(item, str):
        return json.dumps(item, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(item, bool):
        return "true" if item else "false"
    if isinstance(item, int):
        return str(item)
    if isinstance(item, float) and math.isfinite(item):
        return repr(item)
    if isinstance(item, Mapping):
        inside = ", ".join(f"{key(name)} = {value(below)}" for name, below in item.items())
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(item, Sequence) and not isinstance(item, bytes):
        return f"[{', '.join(value(below) for below in item)}]"
    raise SourceError(f"{item!r} cannot be written as TOML")


def key(name: str) -> str:
    """Return ``name`` as a key, quoted where it has to be."""
    return name if _BARE.fullmatch(name) else value(name)


def lines(table: Mapping[str, Any]) -> list[str]:
    """Return ``table`` as ``key = value`` lines."""
    return [f"{key(name)} = {value(item)}" for name, item in table.items()]
