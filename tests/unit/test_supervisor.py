"""Components of a scope end with it."""

from __future__ import annotations

import asyncio

from agent.supervisor import Supervisor
from tests.fakes.clock import FakeClock


class FailsWhenStopped:
    """One of its tasks does not take its cancellation well; a TaskGroup raises what that one raises, and no more."""

    name = "fails"

    def __init__(self) -> None:
        self.begun = asyncio.Event()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._work())
            await asyncio.Event().wait()

    async def _work(self) -> None:
        try:
            self.begun.set()
            await asyncio.Event().wait()
        finally:
            raise ValueError("while it stopped")


def test_a_component_that_fails_as_it_is_stopped_is_not_restarted() -> None:
    async def main() -> None:
        component, supervisor = FailsWhenStopped(), Supervisor(FakeClock())

        async def live() -> None:
            async with supervisor.running(component):
                await component.begun.wait()

        life = asyncio.create_task(live())
        await asyncio.wait({life}, timeout=90)
        assert life.done()
        assert not supervisor.restarts

    asyncio.run(main())
