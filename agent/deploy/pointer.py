"""Which version a slot serves: one small file per slot, replaced atomically.

Active, previous and trial change together in one rename, so that no power cut can leave them disagreeing
(docs/adr/0003). At boot this file alone decides what is loaded; a copy beside it serves when it is damaged, because
without it a box could load nothing of what it has on disk until it reaches its store.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from agent.deploy.ports import Bundle, Kept
from agent.durable import read_json, set_aside, write_json
from agent.errors import StateError, StoreError

_FILE: Final = ".json"
_COPY: Final = ".copy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A version on disk. ``path`` is relative to the state folder."""

    team: str
    name: str
    version: str
    digest: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pointer:
    """What a slot serves, what it served before, and whether the active version is still on trial."""

    slot: str
    active: Target
    previous: Target | None = None
    trial: bool = False
    starts_in_trial: int = 0  # that followed an end nobody ordered
    running: bool = False  # on trial and loaded, by a process whose orderly end is not recorded

    @property
    def confirmed(self) -> Target | None:
        """The last version that earned trust."""
        return self.previous if self.trial else self.active


class Pointers:
    """The pointer files of one box."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def all(self) -> tuple[list[Pointer], list[str]]:
        """Return the readable pointers, and what was wrong with each that had to be set aside."""
        self._folder.mkdir(parents=True, exist_ok=True)
        pointers, broken = [], []
        slots = {path.name.removesuffix(_FILE) for path in self._folder.glob(f"*{_FILE}")}
        slots |= {path.name.removesuffix(_FILE + _COPY) for path in self._folder.glob(f"*{_FILE}{_COPY}")}
        for slot in sorted(slots):
            for path in (self._path(slot), self._copy(slot)):
                try:
                    raw = read_json(path)
                    if raw is not None:
                        pointers.append(_parse(raw, slot))
                        break
                except StateError as error:
                    set_aside(path)
                    broken.append(str(error))
        return pointers, broken

    def read(self, slot: str) -> Pointer | None:
        """Return the slot's pointer, ``None`` if it has none.

        Raises:
            StateError: the file cannot be read.
        """
        raw = read_json(self._path(slot))
        return None if raw is None else _parse(raw, slot)

    def write(self, pointer: Pointer) -> None:
        """Replace the slot's pointer durably, then its copy: a cut in between leaves the older one there."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._path(pointer.slot), asdict(pointer))
        try:
            write_json(self._copy(pointer.slot), asdict(pointer))
        except (StoreError, OSError):  # the pointer itself is written, and an old copy is worse than none
            with suppress(OSError):
                self._copy(pointer.slot).unlink(missing_ok=True)

    def remove(self, slot: str) -> None:
        """Forget the slot."""
        self._copy(slot).unlink(missing_ok=True)
        self._path(slot).unlink(missing_ok=True)

    def _path(self, slot: str) -> Path:
        return self._folder / f"{slot}{_FILE}"

    def _copy(self, slot: str) -> Path:
        return self._folder / f"{slot}{_FILE}{_COPY}"


def target_of(item: Bundle | Kept, state_dir: Path) -> Target:
    """Return what a pointer would say of a version on disk."""
    path = item.path.relative_to(state_dir)
    return Target(team=item.team, name=item.name, version=item.version, digest=item.digest, path=str(path))


def _parse(raw: Any, slot: str) -> Pointer:
    try:
        pointer = msgspec.convert(raw, Pointer)
    except msgspec.ValidationError as error:
        raise StateError(f"pointer file of {slot} is malformed: {error}") from error
    if pointer.slot != slot:
        raise StateError(f"pointer file of {slot} is another slot's: {pointer.slot!r}")
    return pointer
