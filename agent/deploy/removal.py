"""Removing slots: what nobody shall want or serve any more.

That a slot is to go is recorded in the journal together with forgetting its wishes, before anything of it ends: a cut
leaves all as it was, or a removal that the next start finishes before it loads anything. Leaves out: ending the slot's
deployment and taking what it serves out of memory (``performer.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from agent.deploy.journal import Journal
from agent.deploy.pointer import Pointer, Pointers
from agent.deploy.slots import model_of, slot_of, version_beside
from agent.errors import CommandError, NotFoundError
from agent.events import EventBus, Stream
from agent.log import get_logger

_log = get_logger("deploy")


class Removals:
    """The slots that are being removed."""

    def __init__(self, journal: Journal, pointers: Pointers, events: EventBus) -> None:
        self._journal = journal
        self._pointers = pointers
        self._events = events
        self._slots: set[str] = set()

    def __contains__(self, slot: str) -> bool:
        return slot in self._slots

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    async def load(self) -> None:
        """Read what a restart interrupted; what it would have served is not loaded again."""
        self._slots |= set(await self._journal.leaving())
        for slot in self._slots:
            self._pointers.remove(slot)

    async def begin(self, slots: Collection[str]) -> None:
        """Record that these slots go, and that nobody wants them."""
        await self._journal.leave(slots)
        self._slots |= set(slots)

    async def finish(self, slot: str, pointer: Pointer | None) -> None:
        """Record that a slot is gone; ``pointer`` is what it served."""
        await self._journal.left(slot)
        self._slots.discard(slot)
        version = pointer.active.version if pointer is not None else version_beside(slot)
        _log.info("removed", slot=slot, version=version)
        self._events.emit(Stream.DEPLOY, "slot.removed", slot=slot, model=model_of(slot), version=version)


def leaving(
    model: str, version: str, *, slots: Collection[str], configured: Collection[str], default: str | None
) -> list[str]:
    """Return the slots to remove; the default's goes last.

    Args:
        model: What to remove.
        version: Only this one, from beside the default; empty: the whole model.
        slots: All there are.
        configured: Those that the configuration file names.
        default: The version that the model's own slot serves.

    Raises:
        NotFoundError: there is no such model or version.
        CommandError: the configuration would bring it back, or it is the default while the model is there.
    """
    ours = sorted((slot for slot in slots if model_of(slot) == model), reverse=True)
    if not ours:
        raise NotFoundError(f"there is no model {model!r} here")
    if version:
        slot = slot_of(model, version)
        if slot not in ours and version == default:
            raise CommandError(
                f"{version} is the default of {model}: make another version that (inferctl default {model} VERSION), "
                f"or remove the whole model (inferctl remove {model})"
            )
        if slot not in ours:
            beside = ", ".join(sorted(filter(None, map(version_beside, ours)))) or "nothing"
            raise NotFoundError(f"{slot} is not kept beside the default of {model}; beside it: {beside}")
        ours = [slot]
    if named := [slot for slot in ours if slot in configured]:
        raise CommandError(
            f"the configuration wants {', '.join(sorted(named))}: take it out of [[models]] there and restart first"
        )
    return ours
