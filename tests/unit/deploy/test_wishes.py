"""What is wanted, as others see it while the journal is being read."""

from __future__ import annotations

import asyncio

import pytest

from agent.deploy.desired import Desired, Overtaken
from agent.deploy.wishes import Wishes

pytestmark = pytest.mark.unit

FILE = Desired(id="file", slot="magika", team="files")
FLEET = Desired(id="back", slot="magika", team="files", version="1.0.0", source="fleet")


class SlowJournal:
    """Has the fleet's wish already, and takes its time to say what was overtaken."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()

    async def wanted(self) -> list[Desired]:
        return [FLEET]

    async def overtaken(self) -> list[Overtaken]:
        await self.may_answer.wait()
        return []

    async def cancelled(self) -> list[str]:
        return []

    async def get(self, deployment_id: str) -> None:
        return None


def test_a_new_wish_is_never_seen_without_its_strength() -> None:
    async def story() -> None:
        journal = SlowJournal()
        wishes = Wishes(journal, [FILE], lambda: None)  # type: ignore[arg-type]
        wishes.strongest = {"magika": FILE}
        reading = asyncio.ensure_future(wishes.refresh())
        await asyncio.sleep(0)
        assert await wishes.unbegun("magika", staging=False) == [], "the fleet's wish is the stronger one"
        journal.may_answer.set()
        await reading
        assert wishes.strongest["magika"] == FLEET
        assert await wishes.unbegun("magika", staging=False) == []

    asyncio.run(story())
