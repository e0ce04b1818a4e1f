"""Models that come and go, and the ladder of their variants: one account of memory for both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from agent.engine.memory import HOST, Need
from agent.engine.types import VersionSpec
from agent.engine.version import Version
from tests.integration.test_engine import run, until
from tests.integration.test_ladder import EAGER, on_device, variant_row
from tests.integration.test_residency import LAZY, WORKER, ask, limited, model, serve
from tests.models import scale_version

pytestmark = pytest.mark.integration
TURNS = 9000


def two_rungs(folder: Path) -> VersionSpec:
    """Return the model ``a``: ``y = 2 x`` on a GPU that only the test says is there, else ``y = 3 x``."""
    spec = on_device(scale_version(folder / "a", factors=(2.0, 3.0)), "cuda:0", "cpu")
    variants = tuple(replace(variant, need=Need(sizes={HOST: WORKER})) for variant in spec.variants)
    return replace(spec, model="a", variants=variants, keeping=LAZY)


def serving(version: Version) -> str | None:
    return version.pool.spec.id if version.pool is not None and version.ready else None


def test_a_better_variant_unloads_no_other_model_and_comes_when_there_is_room(tmp_path: Path) -> None:
    async def story() -> None:
        async with limited(tmp_path, 2, variants=EAGER) as box:
            version = await serve(box, two_rungs(tmp_path))
            other = await serve(box, model(tmp_path, "b"))
            box.engine.device_lost("cuda:0", "fallen off the bus")
            assert (await ask(box, "a"))["y"] == 3.0
            assert (await ask(box, "b"))["y"] == 2.0
            box.engine.device_back("cuda:0")
            await until(lambda: variant_row(version, "v0")["failures"] > 0, turns=TURNS)
            assert "models may take 128 MiB of memory" in variant_row(version, "v0")["reason"]
            assert (serving(version), other.ready) == ("v1", True)
            await box.engine.unload_now("b")
            await until(lambda: serving(version) == "v0", turns=TURNS)
            assert (await ask(box, "a"))["y"] == 2.0
            assert not version.skipped

    run(story)


def test_a_model_that_sleeps_tries_nothing_and_wakes_with_its_best_variant(tmp_path: Path) -> None:
    async def story() -> None:
        async with limited(tmp_path, 2, variants=EAGER) as box:
            version = await serve(box, two_rungs(tmp_path))
            box.engine.device_lost("cuda:0", "fallen off the bus")
            assert (await ask(box, "a"))["y"] == 3.0
            await box.engine.unload_now("a")
            box.engine.device_back("cuda:0")
            assert (version.asleep, list(version.pools)) == (True, [])
            assert (await ask(box, "a"))["y"] == 2.0

    run(story)


def test_unloading_ends_what_is_tried_beside_and_holds_that_against_nobody(tmp_path: Path) -> None:
    async def story() -> None:
        async with limited(tmp_path, 2, variants=EAGER) as box:
            version = await serve(box, two_rungs(tmp_path))
            for _ in range(3):
                box.engine.device_lost("cuda:0", "fallen off the bus")
                assert (await ask(box, "a"))["y"] == 3.0
                box.engine.device_back("cuda:0")
                await until(lambda: len(list(version.pools)) == 2, turns=TURNS)  # v0 is on its way
                await box.engine.unload_now("a")
                await until(lambda: not list(version.pools), turns=TURNS)
                assert version.asleep
                assert not version.skipped
                assert box.engine.status()[0]["residency"]["held_bytes"] == {}
                assert (await ask(box, "a"))["y"] == 2.0

    run(story)
