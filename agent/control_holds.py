"""The verbs of applications' holds, which last as long as the connection that asked for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from agent.arguments import text_of
from agent.deploy.holds import EVERY_MODEL
from agent.deploy.reconciler import Reconciler
from agent.errors import InvalidInputError, NotFoundError

AtEnd = Callable[[Callable[[], None]], None]
_REASON_CHARS_MAX: Final = 200


class HoldVerbs:
    """Takes and releases holds."""

    def __init__(self, reconciler: Reconciler) -> None:
        self._reconciler = reconciler

    def take(self, args: dict[str, Any], peer: str, at_end: AtEnd | None) -> dict[str, Any]:
        """Hold a model for whoever is at the other end of the connection.

        Args:
            args: ``model``, maybe ``*``, and ``reason``.
            peer: Who asks.
            at_end: Takes what is to be done when the connection ends; ``None``: there is no such connection.

        Raises:
            InvalidInputError: there is no connection that could end.
            NotFoundError: no such model.
            OverloadedError: there are too many holds.
        """
        if at_end is None:
            raise InvalidInputError("a hold lasts as long as its connection: ask for it on the unix socket")
        model, reason = text_of(args, "model"), args.get("reason", "")
        if not isinstance(reason, str) or len(reason) > _REASON_CHARS_MAX:
            raise InvalidInputError(f"'reason' must be a text of at most {_REASON_CHARS_MAX} characters")
        if model != EVERY_MODEL and all(row["model"] != model for row in self._reconciler.slots()):
            raise NotFoundError(f"no model {model!r} is wanted or serves here; {EVERY_MODEL!r} holds all")
        token = self._reconciler.holds.take(model, f"{reason} ({peer})" if reason else peer)
        at_end(lambda: self._reconciler.holds.drop(token))
        return {"hold": token, "model": model, "under_way": self._reconciler.past_gate(model)}

    async def release(self, args: dict[str, Any], _peer: str) -> dict[str, Any]:
        """End a hold before its connection does."""
        return {"model": self._reconciler.holds.release(text_of(args, "hold")).model}
