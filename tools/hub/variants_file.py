"""``variants.toml``: the variants that ``inferhub quantize`` made and measured, beside a person's ``model.toml``.

Two files, so that no tool edits what a person wrote: this one is made anew by each run, ``description.load`` joins
them. It holds ``[[variants]]`` as ``model.toml`` does, and ``[golden.ID]`` with the tolerance of each such variant.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Final

import msgspec

from agent.bundles.manifest import Compare
from agent.durable import write_file
from tools.hub import toml
from tools.hub.errors import SourceError
from tools.hub.variant_source import VariantSource

FILE_NAME: Final = "variants.toml"
_HEAD: Final = (
    "# Made by: inferhub quantize. The next run replaces this file; what a person decides belongs into model.toml."
)
_HINT: Final = "Make it anew with: inferhub quantize SRC"


class MadeVariants(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file. ``golden``: by golden sample, then by variant."""

    variants: tuple[VariantSource, ...] = ()
    golden: dict[str, dict[str, tuple[Compare, ...]]] = {}


def read(folder: Path) -> MadeVariants:
    """Return what the file in ``folder`` holds; nothing, if there is none.

    Raises:
        SourceError: unreadable or malformed.
    """
    path = folder / FILE_NAME
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), MadeVariants)
    except FileNotFoundError:
        return MadeVariants()
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise SourceError(f"{path}: {error}", hint=_HINT) from error


def write(folder: Path, made: MadeVariants) -> None:
    """Put ``made`` in place of the file in ``folder``, whole; without variants there is no file."""
    path = folder / FILE_NAME
    if not made.variants:
        path.unlink(missing_ok=True)
        return
    text = [_HEAD]
    for variant in made.variants:
        text += ["", "[[variants]]", *toml.lines(_told(variant))]
    for sample, by_variant in made.golden.items():
        text += ["", f"[golden.{toml.key(sample)}]"]
        for variant_id, rules in by_variant.items():
            text += [f"{toml.key(variant_id)} = [", *(f"  {toml.value(msgspec.to_builtins(r))}," for r in rules), "]"]
    write_file(path, "\n".join([*text, ""]).encode(), mode=0o644)


def _told(variant: VariantSource) -> dict[str, object]:
    """Return the keys that differ from what an absent key means."""
    plain = VariantSource(id=variant.id, entry=variant.entry, precision=variant.precision, priority=variant.priority)
    absent = msgspec.to_builtins(plain)
    always = ("id", "entry", "precision", "priority")
    return {
        name: item
        for name, item in msgspec.to_builtins(variant).items()
        if name in always or item != absent[name]
    }  # fmt: skip
