"""What systemd's watchdog depends on: the loop, the engine and the journal. That no model is a part of it, see
``test_selftests_daemon.py``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from agent.deploy.journal import Journal
from agent.errors import StateError, UnavailableError
from agent.watchdog import Watchdog
from tests.integration.test_engine import bench, run
from tests.models import scale_version

pytestmark = pytest.mark.integration
PATIENCE_S = 0.2


def watchdog(fed: list[str], **parts: Callable[[], Awaitable[object]]) -> Watchdog:
    return Watchdog(parts, feed=lambda: fed.append("fed"), interval_s=0.01, patience_s=PATIENCE_S)


async def never() -> None:
    await asyncio.Event().wait()


async def refused() -> None:
    raise StateError("the disk is full")


def test_it_is_fed_while_engine_and_journal_make_progress(tmp_path: Path) -> None:
    async def story() -> None:
        journal, fed = Journal(tmp_path / "journal.db"), list[str]()
        async with bench(tmp_path) as box:
            await box.engine.load(scale_version(tmp_path / "b"))
            parts = {"engine": box.engine.progress, "journal": journal.wanted, "refusing": refused}
            dog = Watchdog(parts, feed=lambda: fed.append("fed"), interval_s=0, patience_s=90)
            task = asyncio.ensure_future(dog.run())
            while len(fed) < 20 and not task.done():
                await asyncio.sleep(0.01)
            assert not task.done()
            task.cancel()
        await journal.close()

    run(story)


def test_it_is_not_fed_once_the_sweeper_has_stopped(tmp_path: Path) -> None:
    async def story() -> None:
        fed: list[str] = []
        async with bench(tmp_path) as box:
            box.sweeper.cancel()
            with pytest.raises(UnavailableError, match=r"the engine has made no progress for 0\.2 s"):
                await watchdog(fed, engine=box.engine.progress).run()
        assert not fed

    run(story)


def test_it_is_not_fed_while_the_journal_gives_no_answer() -> None:
    fed: list[str] = []
    with pytest.raises(UnavailableError, match="the journal has made no progress"):
        run(watchdog(fed, journal=never).run)
    assert not fed
