"""Versions side by side in one engine, with real workers: what they share, and what they hold of memory."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agent.engine.types import Keeping
from agent.errors import OverloadedError
from tests.integration.test_engine import bench, run, until
from tests.integration.test_residency import ask, limited, model, serve
from tests.models import scale_version

pytestmark = pytest.mark.integration


def test_slots_that_hold_the_same_version_share_its_workers_until_the_last_lets_go(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as box:
            engine = box.engine
            first, second = (
                scale_version(tmp_path / version, version=version, factors=(factor,))
                for version, factor in (("1.0.0", 2.0), ("2.0.0", 3.0))
            )
            engine.activate(await engine.load(first))
            one, other = await asyncio.gather(engine.restore(second, beside=True), engine.restore(second))
            assert one is other, "asked for at the same time, loaded once"
            engine.activate_beside(one)
            previous = engine.activate(other)
            assert previous is not None
            await engine.retire(previous)
            for version in (None, "2.0.0"):
                answer = await box.ask(version=version)
                assert (answer["y"], answer["version"]) == (3.0, "2.0.0")
            assert [(row["slot"], row["role"]) for row in engine.status()] == [
                ("scale", "default"),
                ("scale@2.0.0", "beside"),
            ]
            workers = {pid for row in engine.status() for pid in row["workers"]}
            # The default moves on, the version beside stays, with the worker it has.
            engine.activate(await engine.load(first))
            await engine.retire(one)
            assert (await box.ask())["y"] == 2.0
            assert (await box.ask(version="2.0.0"))["y"] == 3.0
            assert workers <= {pid for row in engine.status() for pid in row["workers"]}
            # A trial of what is beside already loads nothing, and its failure takes nothing away.
            tried = await engine.load(second)
            assert tried is one
            assert tried.held_by == "on trial"
            await engine.retire(one, beside=True)
            assert tried.held_by == "on trial", "another slot's end does not end the trial"
            assert await engine.restore(second, beside=True) is one
            engine.activate_beside(one)
            await engine.retire(tried)
            assert (tried.held_by, (await box.ask(version="2.0.0"))["y"]) == ("", 3.0)
            await engine.retire(one, beside=True)
            assert (await box.ask(version="2.0.0"))["code"] == "unknown_model"
            await until(lambda: len(engine.processes()) == 2)  # a zygote and one worker
            metrics = {row["version"]: row["value"] for row in box.metrics.snapshot()["inferd_model_default"]}
            assert metrics == {"1.0.0": 1.0}

    run(story)


def test_the_candidate_and_the_version_before_answer_who_names_them(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as box:
            engine = box.engine
            specs = {
                version: scale_version(tmp_path / version, version=version, factors=(factor,))
                for version, factor in (("1.0.0", 2.0), ("2.0.0", 3.0))
            }
            engine.activate(await engine.load(specs["1.0.0"]))
            newer = await engine.load(specs["2.0.0"])
            assert [(await box.ask(version=version))["y"] for version in (None, "1.0.0", "2.0.0")] == [2.0, 2.0, 3.0]
            older = engine.activate(newer)
            assert older is not None
            assert [(await box.ask(version=version))["y"] for version in (None, "1.0.0", "2.0.0")] == [3.0, 2.0, 3.0]
            await engine.retire(older)
            assert (await box.ask(version="1.0.0"))["code"] == "unknown_model"

    run(story)


def test_a_version_beside_takes_nobodys_place_in_memory(tmp_path: Path) -> None:
    """Where memory holds one only, the default stays and the other is told so; a lazy one comes and goes by use."""

    async def story() -> None:
        async with limited(tmp_path, 1, memory_wait_s=0.1) as box:
            pinned = Keeping(pinned=True)
            await serve(box, model(tmp_path, "a", keeping=pinned))
            with pytest.raises(OverloadedError, match=r"a 1\.0\.0 .pinned"):
                await box.engine.load(model(tmp_path, "a", factor=3.0, version="2.0.0", keeping=pinned), beside=True)
            assert (await ask(box, "a"))["version"] == "1.0.0"
        async with limited(tmp_path, 1, memory_wait_s=0.1) as box:
            await serve(box, model(tmp_path, "b"))
            await ask(box, "b")
            with pytest.raises(OverloadedError, match=r"b 1\.0\.0 .the default"):
                await box.engine.load(model(tmp_path, "b", factor=3.0, version="2.0.0"), beside=True)
            assert (await ask(box, "b"))["version"] == "1.0.0"

    run(story)
