"""The copy of the journal's wishes is never half of one and half of another."""

import asyncio
from pathlib import Path

from agent.deploy.desired import Desired, Overtaken
from agent.deploy.journal import Journal
from agent.deploy.wishes import Wishes

FILE = Desired(id="file:files/magika:stable", slot="magika", team="files")
PIN = Desired(id="pin", slot="magika", team="files", version="1.0.0", source="pin")


class WatchedJournal(Journal):
    """Lets somebody look while a refresh is half done."""

    wishes: Wishes
    seen: list[Overtaken]

    async def cancelled(self) -> frozenset[str]:
        self.seen += await self.wishes.unbegun("magika", staging=False)
        return await super().cancelled()


def test_a_pin_is_never_taken_for_the_weaker_wish_while_it_becomes_known(tmp_path: Path) -> None:
    async def main() -> None:
        journal = WatchedJournal(tmp_path / "journal.db")
        await journal.open()
        wishes = journal.wishes = Wishes(journal, [FILE], lambda: None)
        journal.seen = []
        await wishes.refresh()
        assert wishes.strongest == {"magika": FILE}
        await wishes.want(PIN)
        assert wishes.strongest == {"magika": PIN}
        assert journal.seen == []
        await journal.close()

    asyncio.run(main())
