"""Who gets which role."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import pytest

from agent.config import AuthConfig, TokenConfig
from agent.errors import ForbiddenError, UnauthenticatedError
from agent.serving.identity import ROLES, AccessPolicy, PeerCredentials, peer_credentials, require, systemd_unit

pytestmark = pytest.mark.unit

CONFIG = AuthConfig(
    operate_uids=(1001,),
    operate_gids=(2001,),
    tokens=(
        TokenConfig(name="ci", sha256=hashlib.sha256(b"s3cret").hexdigest(), roles=("infer",)),
        TokenConfig(name="ops", sha256=hashlib.sha256(b"0ther").hexdigest(), roles=("admin",)),
    ),
)
POLICY = AccessPolicy(CONFIG, own_uid=990, worker_uids=(991, 990))


def peer(uid: int, *gids: int) -> PeerCredentials:
    return PeerCredentials(os.getpid(), uid, frozenset(gids))


@pytest.mark.parametrize(
    ("who", "roles"),
    [
        (peer(0), ROLES),
        (peer(990), ROLES),
        (peer(1000, 1000), {"infer", "read"}),
        (peer(1001), {"infer", "read", "operate"}),
        (peer(1000, 1000, 2001), {"infer", "read", "operate"}),
        (peer(991), set()),
        (peer(991, 2001), set()),
    ],
)
def test_a_unix_peer_holds_the_roles_of_its_uid_and_groups(who: PeerCredentials, roles: set[str]) -> None:
    assert POLICY.unix_caller(who).roles == roles


def test_a_unix_caller_is_keyed_by_uid_and_described_with_its_pid() -> None:
    caller = POLICY.unix_caller(peer(1000))
    assert caller.key == "uid:1000"
    assert f"pid:{os.getpid()}" in caller.detail


def test_no_default_roles_means_none() -> None:
    policy = AccessPolicy(AuthConfig(unix_default_roles=()), own_uid=990)
    assert policy.unix_caller(peer(1000)).roles == frozenset()


@pytest.mark.parametrize(
    ("host", "roles"), [("127.0.0.1", {"infer", "read"}), ("::1", {"infer", "read"}), ("192.0.2.7", set()), ("", set())]
)
def test_only_loopback_clients_may_stay_anonymous(host: str, roles: set[str]) -> None:
    caller = POLICY.tcp_caller(host, None)
    assert caller.roles == roles
    assert caller.anonymous


@pytest.mark.parametrize("header", ["Bearer s3cret", "bearer s3cret", "Bearer   s3cret "])
def test_a_known_token_gives_its_roles_from_anywhere(header: str) -> None:
    caller = POLICY.tcp_caller("192.0.2.7", header)
    assert (caller.key, caller.roles, caller.anonymous) == ("token:ci", {"infer"}, False)


def test_the_admin_token_holds_every_role() -> None:
    assert POLICY.tcp_caller("127.0.0.1", "Bearer 0ther").roles == ROLES


@pytest.mark.parametrize("header", ["Bearer wrong", "Bearer ", "Bearer", "Basic s3cret", "s3cret", "", "Bearer \udce9"])
def test_wrong_credentials_are_worse_than_none(header: str) -> None:
    with pytest.raises(UnauthenticatedError):
        POLICY.tcp_caller("127.0.0.1", header)


def test_missing_roles_are_forbidden_to_the_known_and_ask_the_anonymous_for_credentials() -> None:
    with pytest.raises(ForbiddenError, match="operate"):
        require(POLICY.unix_caller(peer(1000)), "operate")
    with pytest.raises(UnauthenticatedError):
        require(POLICY.tcp_caller("127.0.0.1", None), "operate")
    require(POLICY.unix_caller(peer(1000)), "operate", "read")


def test_the_kernel_tells_who_connected() -> None:
    left, right = socket.socketpair()
    with left, right:
        found = peer_credentials(left)
    assert (found.pid, found.uid) == (os.getpid(), os.getuid())
    assert {os.getgid(), *os.getgroups()} <= found.gids


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("0::/system.slice/camera.service\n", "camera.service"),
        ("0::/system.slice/camera.service/worker\n", "camera.service"),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/run-7.scope\n", "run-7.scope"),
        ("12:cpu:/x\n0::/\n", ""),
        ("", ""),
    ],
)
def test_the_systemd_unit_is_read_from_the_cgroup(tmp_path: Path, cgroup: str, unit: str) -> None:
    (tmp_path / "77").mkdir()
    (tmp_path / "77" / "cgroup").write_text(cgroup)
    assert systemd_unit(77, proc=tmp_path) == unit


def test_a_process_that_is_gone_has_no_unit(tmp_path: Path) -> None:
    assert systemd_unit(78, proc=tmp_path) == ""
