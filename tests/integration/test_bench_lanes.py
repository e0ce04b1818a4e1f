"""Direct lanes as the bench sees them: measured where granted, otherwise the reason, never the proxied path."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.fakes.lanes import lane_server
from tools.bench_lanes import LaneError, open_sockets, refusal, require_lanes
from tools.bench_native import build, over_lane
from tools.bench_ways import Work

pytestmark = pytest.mark.integration

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
WORK = Work(model="echo", inputs={"x": np.zeros((1, 4), dtype=np.float32)})


def test_a_refusal_gives_its_reason_and_a_grant_leaves_nothing_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with lane_server(tmp_path / "yes") as granting, lane_server(tmp_path / "no", grants=False) as refusing:
        assert refusal(granting.path, "echo") == ""
        assert refusal(refusing.path, "echo") == "lane not granted: forbidden: no lanes here"
        assert granting.lanes == 1
    assert len(os.listdir("/proc/self/fd")) <= len(before) + 4  # threads of the servers may still close theirs


@needs_compiler
def test_the_generator_in_c_asks_on_lanes_only(tmp_path: Path) -> None:
    program = build(tmp_path / "build")
    with lane_server(tmp_path / "s") as server:
        sample = over_lane(program, server.path, WORK).closed(callers=4, connections=2, seconds=0.05)
        assert not sample.errors
        assert sample.answers > 0
        assert (server.answered["frames"], server.answered["lane"], server.lanes) == (0, sample.asked, 2)


@needs_compiler
def test_the_generator_in_c_says_why_there_is_no_lane(tmp_path: Path) -> None:
    program = build(tmp_path / "build")
    with lane_server(tmp_path / "s", grants=False) as server:
        with pytest.raises(LaneError, match="lane not granted: forbidden: no lanes here"):
            over_lane(program, server.path, WORK).closed(callers=4, connections=2, seconds=0.05)
        assert server.answered == {"frames": 0, "lane": 0}


@needs_compiler
def test_a_revoked_lane_is_counted_as_an_error(tmp_path: Path) -> None:
    program = build(tmp_path / "build")
    with lane_server(tmp_path / "s", revoke_after=3) as server:
        sample = over_lane(program, server.path, WORK).closed(callers=1, connections=1, seconds=0.05)
    assert sample.errors["the lane was revoked"] == 1


def test_a_client_with_too_few_sockets_had_no_lane() -> None:
    require_lanes(4, clients=2)
    with pytest.raises(LaneError, match="2 clients ended with 1 lanes"):
        require_lanes(3, clients=2)
    assert open_sockets() >= 0
