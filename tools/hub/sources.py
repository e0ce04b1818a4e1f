"""The files of a bundle as they will be packed: those of the source folder, and models written anew beside it.

``prepared`` moves the weights of large ONNX files into a file of their own. A box maps such weights instead of copying
them, and an edit of the graph leaves the weights' bytes, and so their chunks, as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import onnx

from tools.hub.contents import Contents, format_of
from tools.hub.convert import EXTERNAL_BYTES_MIN
from tools.hub.errors import SourceError
from tools.hub.listener import Listener

ExternalData = Literal["auto", "keep"]


@dataclass(frozen=True, slots=True)
class Sources:
    """Where each file of the bundle is read from."""

    root: Path
    rewritten: Mapping[str, Path] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        """Return the file that holds the bundle's ``name``."""
        return self.rewritten.get(name, self.root / name)


def prepared(root: Path, contents: Contents, work: Path, *, external_data: ExternalData, listener: Listener) -> Sources:
    """Return the files to pack; what is rewritten goes to ``work``, and into ``contents``.

    Args:
        root: The source folder.
        contents: Gets the new files of weights.
        work: A folder that outlives the packing.
        external_data: ``auto`` moves the weights of models above 16 MiB out; ``keep`` takes all files as they are.
        listener: Told about progress.

    Raises:
        SourceError: a model cannot be written anew, or its weights' file is taken.
    """
    large = list(_inline_and_large(root, contents)) if external_data == "auto" else []
    if not large:
        return Sources(root)
    listener.stage("move weights out", len(large), "steps")
    rewritten: dict[str, Path] = {}
    for entry in large:
        data = f"{entry}.data"
        if (root / data).exists():
            raise SourceError(
                f"{data}: is in the way of {entry}'s weights", hint="Rename it, or pack with --external-data keep."
            )
        rewritten[entry], rewritten[data] = work / entry, work / data
        _write(root / entry, work / entry, data.rpartition("/")[2])
        contents.roles[data] = "weights"
        contents.external[entry] = [data]
        listener.advance(1)
    return Sources(root, rewritten)


def _inline_and_large(root: Path, contents: Contents) -> Iterable[str]:
    for entry, named in contents.external.items():
        if format_of(entry) == "onnx" and not named and (root / entry).stat().st_size > EXTERNAL_BYTES_MIN:
            yield entry


def _write(source: Path, target: Path, location: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        onnx.save(
            onnx.load(str(source)), str(target), save_as_external_data=True, all_tensors_to_one_file=True,
            location=location,
        )  # fmt: skip
    except Exception as error:  # protobuf's and onnx's errors have no common root
        raise SourceError(
            f"{source.name}: its weights cannot be moved out: {error}", hint="Pack with --external-data keep."
        ) from error
