"""Verify a signed fleet command against the operator keys that the store's top-level signers name.

A command is a DSSE envelope. Verified here: the envelope's form, one signature by a current operator key, and that the
command is for the tenant those keys belong to. Left to the receiver: addressee, expiry, repetition and generation,
which need its journal. Child process only: imports securesystemslib.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import Key

from agent.bundles import strictjson
from agent.bundles.manifest import Operators
from agent.errors import CommandError, UnsafeBundleError

PAYLOAD_TYPE: Final = "application/vnd.inferd.command+json"
ENVELOPE_BYTES_MAX: Final = 64 * 1024
SIGNATURES_MAX: Final = 8


class UnknownSignerError(CommandError):
    """No operator key known here signed it; newer keys might."""


def parse_envelope(data: bytes) -> Envelope:
    """Return the DSSE envelope in ``data``, unverified.

    Raises:
        CommandError: malformed, too large, or of another payload type.
    """
    try:
        raw = strictjson.loads(data, what="envelope", size_bytes_max=ENVELOPE_BYTES_MAX)
        if len(raw["signatures"]) > SIGNATURES_MAX:
            raise CommandError(f"more than {SIGNATURES_MAX} signatures")
        envelope = Envelope.from_dict(raw)
    except (UnsafeBundleError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CommandError(f"not a DSSE envelope: {error}") from error
    if envelope.payload_type != PAYLOAD_TYPE:
        raise CommandError(f"the envelope carries {str(envelope.payload_type)[:80]!r}, not a command")
    return envelope


def verify_envelope(envelope: Envelope, operators: Operators) -> tuple[dict[str, Any], str]:
    """Return the command's payload and the id of the key that signed it.

    Raises:
        UnknownSignerError: not signed by one of ``operators``.
        CommandError: signed, and still no command of this tenant.
    """
    try:
        signers = envelope.verify(_keys(operators), 1)
    except (VerificationError, ValueError) as error:
        raise UnknownSignerError("not signed by a current operator key") from error
    try:
        payload = strictjson.loads(envelope.payload, what="command", size_bytes_max=ENVELOPE_BYTES_MAX)
    except UnsafeBundleError as error:
        raise CommandError(str(error)) from error
    if not isinstance(payload, dict):
        raise CommandError("the command is not a JSON object")
    if payload.get("tenant") != operators.tenant:
        raise CommandError(f"the command is for another tenant than {operators.tenant!r}")
    return payload, next(iter(signers))


def _keys(operators: Operators) -> list[Key]:
    keys = []
    for operator in operators.keys:
        raw = msgspec.to_builtins(operator)
        keyid = raw.pop("keyid")
        try:
            keys.append(Key.from_dict(keyid, raw))
        except (KeyError, ValueError) as error:
            raise CommandError(f"operator key {keyid[:12]}: {error}") from error
    return keys
