"""What is done with a control group of version 2, on folders that look like one; the kernel's limit itself is tested
in ``tests/integration/test_memory_groups.py``.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.engine.cgroups import Group, Groups


def group(folder: Path, *, delegated: bool) -> Path:
    """Return a folder with the files of a service's group in which two processes run."""
    (folder / "cgroup.controllers").write_text("cpu memory\n")
    (folder / "cgroup.subtree_control").write_text("")
    (folder / "cgroup.procs").write_text("1\n2\n")
    if delegated:
        try:
            os.setxattr(folder, "user.delegate", b"1")
        except OSError as error:
            pytest.skip(f"this file system keeps no extended attributes: {error.strerror}")
    return folder


def test_a_delegated_group_is_emptied_and_divided(tmp_path: Path) -> None:
    path = group(tmp_path, delegated=True)
    (path / "worker-old").mkdir()
    assert Groups("auto", own=lambda: path).reason == ""
    assert (path / "daemon/cgroup.procs").read_text() == "2"  # the kernel takes one process with each write
    assert (path / "cgroup.subtree_control").read_text() == "+memory"
    assert not (path / "worker-old").exists()


def test_a_group_that_is_not_delegated_is_left_alone(tmp_path: Path) -> None:
    path = group(tmp_path, delegated=False)
    groups = Groups("auto", own=lambda: path)
    assert groups.reason == "no control group is delegated to this service"
    assert groups.make(1 << 20) is None
    assert sorted(item.name for item in path.iterdir()) == [
        "cgroup.controllers",
        "cgroup.procs",
        "cgroup.subtree_control",
    ]


def test_a_machine_without_version_2_is_said(tmp_path: Path) -> None:
    assert Groups("auto", own=lambda: None).reason
    assert Groups("never").reason == "switched off"


@pytest.mark.parametrize(
    ("name", "text", "killed"),
    [
        ("memory.events", "low 0\noom 1\noom_kill 1\n", True),
        ("memory.events", "oom 1\noom_kill 0\n", False),
        ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n", True),
        ("other", "", False),
    ],
)
def test_a_kill_at_the_limit_is_read_from_either_version(tmp_path: Path, name: str, text: str, killed: bool) -> None:
    (tmp_path / name).write_text(text)
    assert Group(tmp_path, 1).killed() is killed
