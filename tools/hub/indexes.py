"""What a model's index says next: pure decisions over an index, signed and stored by ``publish.py``.

Promises: no channel ever points to a revoked version, a revoked version never comes back, and the version that a
decision names exists; the last is checked here, so that a wrong word is refused before a key is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from agent.bundles.manifest import Index, IndexEntry
from agent.bundles.names import check_name, version_key
from agent.errors import InvalidInputError, TargetNotFoundError
from tools.hub.errors import ConflictError

REASON_CHARS_MAX: Final = 300


def entry_of(index: Index, version: str) -> IndexEntry:
    """Return the entry of a published version; ``TargetNotFoundError`` lists those there are."""
    for entry in index.versions:
        if entry.version == version:
            return entry
    offered = ", ".join(entry.version for entry in index.versions) or "none"
    raise TargetNotFoundError(f"{title(index)} has no version {version}; published are: {offered}")


def channels_of(index: Index, version: str) -> tuple[str, ...]:
    """Return the channels that point to ``version``, sorted."""
    return tuple(sorted(channel for channel, target in index.channels.items() if target == version))


def title(index: Index, version: str = "") -> str:
    """Return ``team/name`` or ``team/name@version``."""
    return f"{index.team}/{index.name}" + (f"@{version}" if version else "")


def added(index: Index, entry: IndexEntry) -> Index:
    """Return the index with one version more, in the order of versions."""
    entries = sorted((*index.versions, entry), key=lambda item: version_key(item.version))
    return msgspec.structs.replace(index, versions=tuple(entries))


def pointed(index: Index, channels: Iterable[str], version: str) -> Index:
    """Return the index with ``channels`` pointing to ``version``.

    Raises:
        TargetNotFoundError: there is no such version.
        ConflictError: it is revoked.
        UnsafeBundleError: a channel's name is refused.
    """
    channels = [check_name(channel, "channel") for channel in channels]
    if not channels:
        return index
    entry = entry_of(index, version)
    if entry.status == "revoked":
        raise ConflictError(
            f"{title(index, version)} is revoked: {entry.reason}", hint="No channel can point to it: name another."
        )
    return msgspec.structs.replace(index, channels=index.channels | dict.fromkeys(channels, version))


def deprecated(index: Index, version: str, reason: str) -> Index:
    """Return the index with ``version`` marked as one not to choose any more; an empty ``reason`` is allowed.

    Raises:
        TargetNotFoundError, InvalidInputError: no such version, or the reason is no short line.
        ConflictError: it is revoked, which is more.
    """
    _require_not_revoked(index, version)
    return _marked(index, version, "deprecated", _checked_reason(reason))


def reinstated(index: Index, version: str) -> Index:
    """Return the index with ``version`` active again; raises as ``deprecated``."""
    _require_not_revoked(index, version)
    return _marked(index, version, "active", "")


def revoked(index: Index, version: str, reason: str, *, replacement: str = "", drop_channels: bool = False) -> Index:
    """Return the index with ``version`` revoked for good.

    Args:
        replacement: The version that its channels point to from now on.
        drop_channels: Remove its channels instead.

    Raises:
        TargetNotFoundError: there is no such version or replacement.
        InvalidInputError: the reason is empty or no short line.
        ConflictError: channels point to it and nothing says where to, or the replacement is revoked itself.
    """
    entry_of(index, version)
    if not reason.strip():
        raise InvalidInputError("a revocation needs a reason: boxes show it to the people who ask why a model stopped")
    if replacement == version:
        raise ConflictError(f"{title(index, version)} cannot be replaced by itself")
    channels = channels_of(index, version)
    if replacement:
        entry_of(index, replacement)
        index = pointed(index, channels, replacement)
    elif channels and not drop_channels:
        raise ConflictError(
            f"{', '.join(channels)} of {title(index)} points to {version}",
            hint="Say where to with --to VERSION, or remove these channels with --drop-channels.",
        )
    else:
        kept = {channel: target for channel, target in index.channels.items() if target != version}
        index = msgspec.structs.replace(index, channels=kept)
    return _marked(index, version, "revoked", _checked_reason(reason))


def _marked(index: Index, version: str, status: str, reason: str) -> Index:
    entry_of(index, version)
    entries = (
        msgspec.structs.replace(entry, status=status, reason=reason) if entry.version == version else entry
        for entry in index.versions
    )
    return msgspec.structs.replace(index, versions=tuple(entries))


def _require_not_revoked(index: Index, version: str) -> None:
    entry = entry_of(index, version)
    if entry.status == "revoked":
        raise ConflictError(
            f"{title(index, version)} is revoked: {entry.reason}",
            hint="A revocation is final: boxes have removed the version. Publish a new one.",
        )


def _checked_reason(reason: str) -> str:
    reason = reason.strip()
    if len(reason) > REASON_CHARS_MAX or not all(letter.isprintable() for letter in reason):
        raise InvalidInputError(f"a reason is one line of at most {REASON_CHARS_MAX} characters")
    return reason
