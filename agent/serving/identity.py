"""Who is calling and what they may do: one policy for every listener.

A unix peer is known by its kernel credentials, a TCP client by the bearer token it presents. Roles are ``infer``,
``read``, ``operate`` and ``admin``; ``operate`` includes ``read``, ``admin`` everything. The process id and systemd
unit are for people to read: they can be reused or change, so no decision rests on them.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from agent.config import AuthConfig
from agent.errors import ForbiddenError, UnauthenticatedError

ROLES: Final = frozenset({"infer", "read", "operate", "admin"})
_INCLUDED: Final = {"admin": ROLES, "operate": frozenset({"operate", "read"})}
_UCRED: Final = struct.Struct("3i")
_SO_PEERGROUPS: Final = 59  # linux/socket.h; Python has no name for it
_GROUPS_BYTES_MAX: Final = 4096
_PORT: Final = re.compile(r":\d*$")
_UNIT: Final = re.compile(r"[^/]+\.(?:service|scope|slice)(?=/|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """One authenticated, or knowingly anonymous, client."""

    key: str  # "uid:1000", "token:ci", "tcp:127.0.0.1": whom quotas and fairness go by
    roles: frozenset[str]
    detail: str  # for the audit trail: the key, and for a unix peer its pid and systemd unit
    anonymous: bool = False  # gave no credentials and could give some


class PeerCredentials(NamedTuple):
    """What the kernel says of the process that connected."""

    pid: int
    uid: int
    gids: frozenset[int]  # primary and supplementary


def peer_credentials(sock: Any) -> PeerCredentials:
    """Return the credentials behind a connected unix socket (anything with ``getsockopt``)."""
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    try:
        packed: bytes = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES_MAX)
    except OSError:  # more groups than fit: the primary one still counts
        packed = b""
    return PeerCredentials(pid, uid, frozenset({gid, *struct.unpack(f"{len(packed) // 4}I", packed)}))


def systemd_unit(pid: int, *, proc: Path = Path("/proc")) -> str:
    """Return the systemd unit that ``pid`` runs in, or an empty text; best effort."""
    try:
        path = (proc / str(pid) / "cgroup").read_text().rpartition(":")[2]
    except OSError:
        return ""
    units = _UNIT.findall(path.strip())
    return next((unit for unit in reversed(units) if not unit.endswith(".slice")), "")


def require(caller: Caller, *roles: str) -> None:
    """Return if ``caller`` holds one of ``roles``.

    Raises:
        UnauthenticatedError: it does not, and gave no credentials.
        ForbiddenError: it does not.
    """
    if caller.roles.isdisjoint(roles):
        text = f"{caller.key} lacks the role {' or '.join(roles)}"
        raise UnauthenticatedError(text) if caller.anonymous else ForbiddenError(text)


class AccessPolicy:
    """The configured roles of every kind of client.

    Args:
        config: The ``[auth]`` section.
        own_uid: The daemon's uid; it and root hold every role.
        worker_uids: Uids that models run as; they never hold a role, not even by default.
    """

    def __init__(self, config: AuthConfig, *, own_uid: int, worker_uids: Iterable[int] = ()) -> None:
        self._admin_uids = frozenset({0, own_uid})
        self._worker_uids = frozenset(worker_uids) - self._admin_uids
        self._operate_uids = frozenset(config.operate_uids)
        self._operate_gids = frozenset(config.operate_gids)
        self._unix_roles = _expand(config.unix_default_roles)
        self._anonymous_roles = _expand(config.tcp_anonymous_roles)
        self._tokens = tuple((token.name, token.sha256, _expand(token.roles)) for token in config.tokens)

    def unix_caller(self, peer: PeerCredentials) -> Caller:
        """Return the caller behind a unix socket."""
        key = f"uid:{peer.uid}"
        unit = systemd_unit(peer.pid)
        detail = f"{key} pid:{peer.pid}" + (f" unit:{unit}" if unit else "")
        return Caller(key=key, roles=self._unix_peer_roles(peer), detail=detail)

    def tcp_caller(self, host: str, authorization: str | None, *, asked_host: str | None = None) -> Caller:
        """Return the caller behind a TCP request.

        Args:
            host: The peer's address, without port.
            authorization: The header's value, if it was sent.
            asked_host: The Host header's value, if it was sent.

        Raises:
            UnauthenticatedError: the header is not a bearer token, or the token is unknown.
        """
        if authorization is None:
            trusted = _is_loopback(host) and _is_ours(asked_host or "")
            roles = self._anonymous_roles if trusted else frozenset[str]()
            return Caller(key=f"tcp:{host}", roles=roles, detail=f"tcp:{host}", anonymous=True)
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise UnauthenticatedError("only bearer tokens are accepted")
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).hexdigest()
        found: tuple[str, frozenset[str]] | None = None
        for name, expected, token_roles in self._tokens:  # all of them: the time tells nothing
            if hmac.compare_digest(digest, expected):
                found = (name, token_roles)
        if found is None:
            raise UnauthenticatedError("unknown token")
        return Caller(key=f"token:{found[0]}", roles=found[1], detail=f"token:{found[0]} tcp:{host}")

    def _unix_peer_roles(self, peer: PeerCredentials) -> frozenset[str]:
        if peer.uid in self._admin_uids:
            return ROLES
        if peer.uid in self._worker_uids:
            return frozenset()
        if peer.uid in self._operate_uids or not self._operate_gids.isdisjoint(peer.gids):
            return self._unix_roles | _INCLUDED["operate"]
        return self._unix_roles


def _expand(roles: Iterable[str]) -> frozenset[str]:
    return frozenset().union(*(_INCLUDED.get(role, frozenset({role})) for role in roles))


def _is_ours(asked_host: str) -> bool:
    """Whether a Host header can mean this box: an address, or a name that no public DNS resolves.

    A web page may point its own name at 127.0.0.1 (DNS rebinding) and so ask from loopback; the browser names it here.
    """
    name = _PORT.sub("", asked_host).strip("[]").lower()
    if "." not in name or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
