"""Which requests a canary gets, and which are copied to it. Pure.

A request's key (its own, else its client) has a fixed place between 0 and 100 percent for each candidate; a canary gets
the keys below its share. So one key sees one version, a growing share only adds keys, a restart changes nothing, and
the keys that meet one candidate first are not those that meet the next one first.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

_PLACES: Final = 1 << 32
_KEY_CHARS_MAX: Final = 256


def place_of(key: str, candidate: str) -> float:
    """Return the place of a key, at least 0 and below 100.

    Args:
        key: Only its first 256 characters count.
        candidate: What differs from candidate to candidate: the sha256 of its manifest, lower-case hex.
    """
    data = key[:_KEY_CHARS_MAX].encode("utf-8", "surrogatepass")
    digest = blake2b(data, digest_size=4, key=bytes.fromhex(candidate)[:64]).digest()
    return int.from_bytes(digest, "big") * 100 / _PLACES


class Sampler:
    """Chooses an even part of all requests, whoever asks."""

    __slots__ = ("_debt", "_share")

    def __init__(self, percent: float) -> None:
        self._share = percent / 100
        self._debt = 0.0

    def take(self) -> bool:
        """Whether the next one is chosen."""
        self._debt += self._share
        if self._debt < 1.0 - 1e-9:
            return False
        self._debt = max(0.0, self._debt - 1.0)
        return True
