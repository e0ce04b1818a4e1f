"""Sockets we bind ourselves: their mode, stale files, and files that are not ours."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from agent.errors import ConfigError
from agent.serving.listeners import bind_tcp, bind_unix

pytestmark = pytest.mark.unit


def test_the_socket_is_for_owner_and_group(tmp_path: Path) -> None:
    with bind_unix(tmp_path / "new" / "a.sock"):
        assert stat.S_IMODE((tmp_path / "new" / "a.sock").stat().st_mode) == 0o660


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    bind_unix(path).close()
    with bind_unix(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_live_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with bind_unix(path), pytest.raises(ConfigError, match="another process"):
        bind_unix(path)
    assert path.exists()


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        bind_unix(path)
    assert path.read_text() == "precious"


def test_a_path_that_is_too_long_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        bind_unix(tmp_path / ("x" * 120))


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError):
        bind_unix(tmp_path / "file" / "a.sock")


def test_a_taken_port_is_told() -> None:
    with bind_tcp("127.0.0.1", 0) as listener, pytest.raises(ConfigError, match="cannot listen"):
        bind_tcp("127.0.0.1", listener.getsockname()[1])


def test_an_unknown_host_is_told() -> None:
    with pytest.raises(ConfigError):
        bind_tcp("256.0.0.1", 0)
