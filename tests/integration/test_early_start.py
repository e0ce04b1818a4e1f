"""A zygote that is started before the daemon is imported: used if there is need, collected if there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent import __main__ as entry
from agent.config import Config, DeviceConfig
from agent.engine.spawn import spawn
from agent.engine.zygote import Zygote
from tests.integration.test_engine import run
from tests.shared import until

pytestmark = pytest.mark.integration
LIMIT_S = 60.0


def test_the_engine_uses_a_zygote_that_was_started_early() -> None:
    async def story() -> None:
        early = spawn("onnx")
        zygote = Zygote("onnx", spawned=early)
        await zygote.start()
        assert zygote.pid == early.process.pid
        assert zygote.runtime_version
        early.process.kill()
        early.process.wait(LIMIT_S)
        await until(lambda: zygote.pid is None)
        await zygote.start()
        assert zygote.pid != early.process.pid
        await zygote.stop()

    run(story)


def test_one_that_was_never_needed_leaves() -> None:
    async def story() -> None:
        early = spawn("onnx")
        zygote = Zygote("onnx", spawned=early)
        assert zygote.pid is None
        await zygote.stop()
        assert early.process.poll() is not None

    run(story)


def test_it_is_started_only_if_the_disk_has_something_to_load(tmp_path: Path) -> None:
    config = Config(device=DeviceConfig(state_dir=str(tmp_path)))
    assert entry._start_early(config) == {}
    (tmp_path / "active").mkdir()
    (tmp_path / "active/model.json.copy").write_text("{}")
    assert entry._start_early(config) == {}
    (tmp_path / "active/model.json").write_text("{}")
    (early,) = entry._start_early(config).values()
    early.control.close()
    assert early.process.wait(LIMIT_S) == 0
