"""Who may ask how much: rate, quota and outstanding requests per client.

A client is a uid on the unix sockets, a token or an address on TCP. Everything here is integer and float work on two
small records, because it lies on the path of every request. A request that is refused costs nothing else.
Leaves out: a fair part of a crowded queue (``shares.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from agent.config import ClientLimitConfig
from agent.errors import RateLimitedError

_ANYBODY: Final = "*"
_IDLE_CLIENTS_MAX: Final = 4096  # remembered beyond those with requests under way


class Client:
    """What is known of one client. ``outstanding`` counts requests admitted and not settled, over all models."""

    __slots__ = ("at", "limit", "outstanding", "tokens", "used", "window_start")

    def __init__(self, limit: ClientLimitConfig, now: float) -> None:
        self.limit = limit
        self.outstanding = 0
        self.tokens = float(limit.burst)
        self.at = now  # when ``tokens`` was right (seconds)
        self.used = 0  # requests of the present quota window
        self.window_start = now

    def take(self, now: float) -> None:
        """Count one request.

        Raises:
            RateLimitedError: over rate, quota or outstanding requests; ``retry_after_s`` says when it may succeed.
        """
        limit = self.limit
        if limit.outstanding_max and self.outstanding >= limit.outstanding_max:
            raise RateLimitedError(f"{limit.outstanding_max} requests of this client are under way", retry_after_s=1.0)
        if limit.quota_requests:
            self._renew(now)
            if self.used >= limit.quota_requests:
                left_s = self.window_start + limit.quota_window_s - now
                raise RateLimitedError(f"the quota of {limit.quota_requests} requests is used up", retry_after_s=left_s)
        if limit.requests_per_s:
            self.tokens = min(float(limit.burst), self.tokens + (now - self.at) * limit.requests_per_s)
            self.at = now
            if self.tokens < 1.0:
                wait_s = (1.0 - self.tokens) / limit.requests_per_s
                raise RateLimitedError(f"more than {limit.requests_per_s:g} requests a second", retry_after_s=wait_s)
            self.tokens -= 1.0
        self.used += 1
        self.outstanding += 1

    def _renew(self, now: float) -> None:
        if now - self.window_start >= self.limit.quota_window_s:
            self.used, self.window_start = 0, now


class Admission:
    """All clients of this box."""

    def __init__(self, limits: Iterable[ClientLimitConfig]) -> None:
        self._limits = {limit.client: limit for limit in limits}
        self._anybody = self._limits.get(_ANYBODY, ClientLimitConfig(client=_ANYBODY))
        self._clients: dict[str, Client] = {}

    def admit(self, name: str, now: float) -> Client:
        """Count one request of the client called ``name``; give the record to ``settle`` when it is answered.

        Raises:
            RateLimitedError: see ``Client.take``.
        """
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = Client(self._limits.get(name, self._anybody), now)
            self._forget_idle(now)
        client.take(now)
        return client

    def limited(self, name: str) -> bool:
        """Whether rate, quota or outstanding requests of this client are bounded at all."""
        limit = self._limits.get(name, self._anybody)
        return bool(limit.requests_per_s or limit.quota_requests or limit.outstanding_max)

    def _forget_idle(self, now: float) -> None:
        """Drop records that say no more than a new one would."""
        if len(self._clients) <= _IDLE_CLIENTS_MAX:
            return
        for name, client in list(self._clients.items()):
            limit = client.limit
            refilled = not limit.requests_per_s or (now - client.at) * limit.requests_per_s >= limit.burst
            renewed = not limit.quota_requests or now - client.window_start >= limit.quota_window_s
            if not client.outstanding and refilled and renewed:
                del self._clients[name]
