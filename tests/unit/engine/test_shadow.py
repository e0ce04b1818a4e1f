"""What is copied to a candidate, and what is left out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from agent.engine.job import Job
from agent.engine.shadow import COPIES_MAX, Copy, Shadow
from agent.errors import OverloadedError
from agent.metrics import Metrics
from agent.serving.ports import InferRequest
from agent.wire import Header

pytestmark = pytest.mark.unit

RESULT = Header({"kind": "result", "content_type": "text/plain"})


class World:
    """A shadow whose candidate and default are the test."""

    def __init__(self) -> None:
        self.now = 100.0
        self.sent: list[Copy] = []
        self.canceled: list[Job] = []
        self.full = False
        self.metrics = Metrics()
        self.pool = SimpleNamespace(waiting=[], outstanding=0, links=[object()])
        spec = SimpleNamespace(variants=())
        self.candidate = SimpleNamespace(spec=spec, model="m", version="2.0.0", ready=True, cancel=self.canceled.append)
        labels = ("model", "version")
        self.shadow = Shadow(
            self.candidate,  # type: ignore[arg-type]
            SimpleNamespace(pool=self.pool),  # type: ignore[arg-type]
            100,
            submit=self._submit,
            outcomes=self.metrics.counter("copies", "", (*labels, "outcome")),
            durations=self.metrics.histogram("durations", "", labels).series(("m", "2.0.0")),
            now=lambda: self.now,
        )

    def _submit(self, copy: Copy) -> Job:
        if self.full:
            raise OverloadedError("full")
        self.sent.append(copy)
        return Job(copy, len(self.sent), copy.arrived)

    async def ask(
        self,
        body: bytes = b"x",
        answer: Header = RESULT,
        *,
        header: dict[str, Any] | None = None,
        streamed: bool = False,
    ) -> None:
        """Let one request be answered, and the copy begin."""
        request = InferRequest(
            model="m", version=None, header=Header({"kind": "infer", **(header or {})}), body=body,
            deadline=self.now + 5, client="c", answer=lambda head, buffers: None,
        )  # fmt: skip
        copy = self.shadow.choose(request, self.now)
        if copy is not None:
            copy.original_answered(answer, (b"yes",), streamed=streamed)
        await asyncio.sleep(0)

    def skipped(self) -> dict[str, int]:
        return self.shadow.tally().skipped


def run(story: Callable[[World], Awaitable[None]]) -> None:
    async def begin() -> None:
        await story(World())

    asyncio.run(begin())


def test_a_copy_is_compared_with_the_answer_of_its_original() -> None:
    async def story(world: World) -> None:
        await world.ask(header={"content_type": "text/plain", "stream": "auto", "params": {"a": 1}})
        (copy,) = world.sent
        assert copy.header == {"kind": "infer", "model": "m", "content_type": "text/plain", "params": {"a": 1}}
        assert copy.part is None
        world.now += 0.25
        copy.answer(RESULT, (b"yes",))
        tally = world.shadow.tally()
        assert (tally.compared, tally.agreed, tally.failed) == (1, 1.0, 0)
        assert tally.durations.quantile_s(0.5) == pytest.approx(0.25, rel=0.03)
        world.now += 1
        await world.ask()
        world.sent[1].answer(Header({"kind": "error", "code": "handler_failed"}), ())
        tally = world.shadow.tally()
        assert (tally.compared, tally.agreed, tally.failed) == (2, 1.0, 1)
        assert tally.difference == "error handler_failed"

    run(story)


@pytest.mark.parametrize(
    ("reason", "more"),
    [
        ("shared_memory", {"header": {"reply": {"region": 1, "offset": 0, "nbytes": 9}}}),
        ("stream", {"header": {"stream": True}}),
        ("stream", {"header": {"stream": "auto"}, "streamed": True}),
        ("failed", {"answer": Header({"kind": "error", "code": "invalid_input"})}),
        ("bound", {"body": b"x" * (17 << 20)}),
    ],
)
def test_what_cannot_be_copied_cheaply_is_counted(reason: str, more: dict[str, Any]) -> None:
    async def story(world: World) -> None:
        await world.ask(**more)
        assert not world.sent
        assert world.skipped() == {reason: 1}

    run(story)


def test_load_a_candidate_that_is_not_ready_and_a_full_queue_leave_copies_out() -> None:
    async def story(world: World) -> None:
        world.pool.outstanding = 9
        await world.ask()
        world.pool.outstanding, world.pool.waiting = 0, [object()]
        await world.ask()
        assert world.skipped() == {"load": 2}
        world.pool.waiting = []
        world.candidate.ready = False
        await world.ask()
        world.candidate.ready, world.full = True, True
        await world.ask()
        assert world.skipped() == {"load": 2, "not_ready": 1, "bound": 1}
        assert not world.sent

    run(story)


def test_copies_are_bounded_in_number_and_pace() -> None:
    async def story(world: World) -> None:
        await world.ask()
        await world.ask()
        assert len(world.sent) == 1, "two at the same time"
        for _ in range(10):
            world.now += 0.02
            await world.ask()
        assert len(world.sent) == COPIES_MAX
        world.sent[0].answer(RESULT, (b"yes",))
        world.now += 0.02
        await world.ask()
        assert len(world.sent) == COPIES_MAX + 1

    run(story)


def test_the_end_withdraws_what_is_under_way() -> None:
    async def story(world: World) -> None:
        await world.ask()
        world.shadow.end()
        assert len(world.canceled) == 1
        world.sent[0].answer(RESULT, (b"yes",))
        world.now += 1
        await world.ask()
        assert world.shadow.tally().compared == 0
        assert len(world.sent) == 1

    run(story)
