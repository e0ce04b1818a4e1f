"""Write ``docs/config.md`` from ``agent/config.py``, so that the reference cannot fall behind the code.

usage: python -m tools.config_reference > docs/config.md
"""

from __future__ import annotations

import ast
import inspect
import re
from typing import Any, Final, Literal, get_args, get_origin

import msgspec

from agent import config

_HEAD: Final = """# Configuration

One TOML file, `/etc/inferd/inferd.toml` unless `inferd --config PATH` names another, read once at start. Unknown keys
and values out of bounds are refused with the key's name; `inferd --config PATH --check` only checks. Every key has a
default: an empty file is valid and serves nothing.

```toml
[device]
id = "till-7"

[store]
urls = ["https://models.example.com/store", "file:///mnt/usb/store"]

[telemetry]
host = "broker.example.com"
port = 8883
tls_ca_file = "/etc/inferd/ca.pem"

[[models]]
name = "magika"
team = "demo"         # who signs it; version "" follows the channel
channel = "stable"
```

This page is generated from `agent/config.py` by `python -m tools.config_reference`.
"""


def render() -> str:
    """Return the whole page."""
    comments = _comments()
    parts = [_HEAD]
    for name, section, many in _sections():
        heading = f"[[{name}]]" if many else f"[{name}]"
        parts.append(
            f"\n## `{heading}`\n\n{inspect.getdoc(section)}\n\n| key | default | meaning |\n| --- | --- | --- |"
        )
        for field in msgspec.structs.fields(section):
            if many or not _is_section(field.type):
                meaning = "; ".join(filter(None, (comments[section.__name__, field.name], _choices(field.type))))
                parts.append(f"| `{field.name}` | {_default(field)} | {meaning} |")
    return "\n".join(parts) + "\n"


def _sections() -> list[tuple[str, Any, bool]]:
    found: list[tuple[str, Any, bool]] = []
    for field in msgspec.structs.fields(config.Config):
        if _is_section(field.type):
            found.append((field.name, config.section_of(field.type), False))
            for inner in msgspec.structs.fields(field.type):
                if _is_section(inner.type):
                    found.append((f"{field.name}.{inner.name}", config.section_of(inner.type), False))
                elif item := _item_section(inner.type):
                    found.append((f"{field.name}.{inner.name}", item, True))
        elif item := _item_section(field.type):
            found.append((field.name, item, True))
    return found


def _is_section(kind: Any) -> bool:
    return config.section_of(kind) is not None


def _item_section(kind: Any) -> Any:
    return next((item for item in get_args(kind) if _is_section(item)), None)


def _choices(kind: Any) -> str:
    """Return the allowed values of a field that has a few only, also of the items of a list."""
    kinds = (kind, *get_args(kind)) if get_origin(kind) is tuple else (kind,)
    found = next((item for item in kinds if get_origin(item) is Literal), None)
    return "" if found is None else "one of " + ", ".join(f'`"{value}"`' for value in get_args(found))


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    if isinstance(field.default, msgspec._core.NODEFAULT.__class__):
        return "–"
    value = field.default
    if value is None:
        return "–"
    if isinstance(value, int) and not isinstance(value, bool) and value >= config.MIB and value % config.MIB == 0:
        return f"`{value}` ({value // config.MIB} MiB)"
    if isinstance(value, tuple):
        return f"`{list(value)}`".replace("'", '"')
    return f"`{value!r}`".replace("'", '"').replace("True", "true").replace("False", "false")


def _comments() -> dict[tuple[str, str], str]:
    """Return the trailing comment of each field, by class and field name."""
    source = inspect.getsource(config)
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    match = re.search(r"  # (.+)$", lines[(item.end_lineno or item.lineno) - 1])
                    found[node.name, item.target.id] = match[1].replace("|", "\\|") if match else ""
    return found


if __name__ == "__main__":
    print(render(), end="")
