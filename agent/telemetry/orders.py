"""What makes a message on a command topic an order for this device: pure rules over its verified content.

Read-only commands may come unsigned, as plain JSON; everything else must be a signed envelope. The signature was
checked elsewhere (the trust child); here the claims it covers are compared with this device, its clock and the topic.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec

from agent.errors import CommandError, CommandExpiredError
from agent.telemetry.payloads import TimeQuality

SCHEMA: Final = "inferd-command/1"
READ_ONLY: Final = frozenset({"ping", "rebirth", "report"})
CHANGING: Final = frozenset({"cancel", "default", "deploy", "remove", "rollback"})
PAYLOAD_BYTES_MAX: Final = 64 * 1024
UNACKNOWLEDGED_MAX: Final = 8  # messages the broker may have at us before the oldest is dealt with
_ARGS_BYTES_MAX: Final = 16 * 1024

CommandId = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._:-]+$")]


class Order(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The signed payload."""

    schema: str
    id: CommandId
    name: str
    tenant: str
    device: str  # "*": every device of the tenant
    issued: float
    not_after: float  # Unix seconds
    gen: int  # grows with every command of this tenant
    args: dict[str, Any] = {}


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An unsigned read-only command."""

    id: CommandId
    args: dict[str, Any] = {}


def parse_request(name: str, payload: bytes) -> Request | None:
    """Return the unsigned command in ``payload``; ``None`` if ``name`` needs a signature or this is no such thing."""
    if name not in READ_ONLY or len(payload) > PAYLOAD_BYTES_MAX:
        return None
    try:
        return msgspec.json.decode(payload, type=Request)
    except (msgspec.DecodeError, RecursionError):
        return None


def judge(
    payload: Any,
    *,
    name: str,
    tenant: str,
    device: str,
    now_s: float | None,
    quality: TimeQuality,
    expiry_left_s: float | None,
) -> Order:
    """Return the order if it is for this device, now.

    Args:
        payload: The verified content, as decoded JSON.
        name: The command named by the topic.
        tenant, device: Who we are.
        now_s: Unix seconds; ``None`` if the clock knows nothing.
        quality: How good ``now_s`` is. ``floor`` is a lower bound: it can prove an order old, never young.
        expiry_left_s: What the broker says is left of the message's expiry, minus our own waiting.

    Raises:
        CommandExpiredError: too old, or its age cannot be told by clock or broker.
        CommandError: malformed, for somebody else, or sent on another command's topic.
    """
    try:
        order = msgspec.convert(payload, Order)
    except (msgspec.ValidationError, RecursionError) as error:
        raise CommandError(f"not a command: {error}") from error
    if order.schema != SCHEMA:
        raise CommandError(f"schema {order.schema!r} is not {SCHEMA!r}")
    if order.name != name:
        raise CommandError(f"signed as {order.name!r} and sent as {name!r}")
    if order.tenant != tenant or order.device not in (device, "*"):
        raise CommandError(f"addressed to {order.tenant}/{order.device}, this is {tenant}/{device}")
    if len(msgspec.json.encode(order.args)) > _ARGS_BYTES_MAX:
        raise CommandError(f"args of more than {_ARGS_BYTES_MAX} bytes")
    if now_s is not None and now_s > order.not_after:
        raise CommandExpiredError(f"not to be carried out any more for {now_s - order.not_after:.0f} s")
    if quality in ("floor", "none") and (expiry_left_s is None or expiry_left_s <= 0):
        raise CommandExpiredError("the clock is not set and the message has no expiry, so its age cannot be told")
    return order
