"""Who waits for news waits no longer than the daemon lives."""

from __future__ import annotations

import asyncio

import pytest

from agent.waits import Waits

pytestmark = pytest.mark.unit
LONG_S = 3600.0


async def wait(waits: Waits, event: asyncio.Event, limit_s: float = LONG_S) -> str:
    try:
        async with waits.up_to(limit_s):
            await event.wait()
    except TimeoutError:
        return "over"
    return "news"


def test_news_come_first_and_the_end_ends_all_who_still_wait() -> None:
    async def main() -> None:
        waits, news, never = Waits(), asyncio.Event(), asyncio.Event()
        early, late = asyncio.create_task(wait(waits, news)), asyncio.create_task(wait(waits, never))
        await asyncio.sleep(0)
        news.set()
        assert await early == "news"
        waits.end()
        waits.end()
        await asyncio.wait({late}, timeout=90)
        assert late.result() == "over"
        assert await wait(waits, never) == "over"

    asyncio.run(main())


def test_a_wait_ends_by_itself() -> None:
    async def main() -> None:
        waits = Waits()
        assert await wait(waits, asyncio.Event(), 0.01) == "over"
        waits.end()

    asyncio.run(main())
