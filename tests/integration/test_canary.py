"""A candidate beside what serves, with real workers: its share, copies of requests, and who answers when it fails."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.adapters import LoadedVersion
from agent.config import DeployConfig
from agent.deploy.probation import Verdict, judge_share
from agent.deploy.rollout import Course
from agent.engine.split import place_of
from agent.engine.version import Version
from agent.errors import LaneRefusedError
from agent.tensors import pack
from tests.integration.test_engine import Bench, bench, run, until
from tests.models import scale_version

pytestmark = pytest.mark.integration

KEYS = [f"user-{number}" for number in range(60)]


async def pair(it: Bench, folder: Path, *, factor: float = 2.0, handler: str | None = None) -> Version:
    """Let 1.0.0 serve and return 2.0.0 loaded beside it."""
    it.engine.activate(await it.engine.load(scale_version(folder / "one", handler=handler)))
    serving = it.engine.active("scale")
    assert serving is not None
    it.engine.confirm(serving)
    spec = scale_version(folder / "two", version="2.0.0", factors=(factor,), handler=handler)
    return await it.engine.load(spec)


async def ask(it: Bench, key: str = "", *, version: str | None = None, text: str = "") -> dict[str, Any]:
    params = {"params": {"routing_key": key}} if key else {}
    if text:
        header: dict[str, Any] = {"content_type": "text/plain"}
        body = text.encode()
    else:
        entries, buffers = pack({"x": np.array([[1, 2, 3, 4]], dtype=np.float32)})
        header, body = {"tensors": entries}, b"".join(bytes(buffer) for buffer in buffers)
    _, answer = it.request(body, {**header, **params}, deadline_s=60.0, version=version)
    head: dict[str, Any] = (await answer)[0]
    return head


def test_a_share_of_the_keys_meets_the_candidate_and_stays_with_it(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as it:
            candidate = await pair(it, tmp_path)
            places = {key: place_of(key, candidate.digest) for key in KEYS}
            for percent in (20.0, 60.0):
                it.engine.try_out(candidate, canary_percent=percent, shadow_percent=0)
                for _ in range(2):
                    answers = {key: (await ask(it, key))["version"] for key in KEYS}
                    assert answers == {key: "2.0.0" if place < percent else "1.0.0" for key, place in places.items()}
            assert (await ask(it, version="1.0.0"))["version"] == "1.0.0"
            assert (await ask(it, version="2.0.0"))["version"] == "2.0.0"
            found = next(row for row in it.engine.status() if row["model"] == "scale")["canary"]
            assert (found["version"], found["canary_percent"]) == ("2.0.0", 60.0)
            assert found["requests"] == 2 * sum(place < 20 for place in places.values()) + 2 * sum(
                place < 60 for place in places.values()
            )
            it.engine.end_try(candidate)
            assert {(await ask(it, key))["version"] for key in KEYS} == {"1.0.0"}

    run(story)


def test_without_a_key_a_client_stays_with_one_version(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as it:
            candidate = await pair(it, tmp_path)
            place = place_of("test", candidate.digest)  # the bench's client
            it.engine.try_out(candidate, canary_percent=place + 0.1, shadow_percent=0)
            assert {(await ask(it))["version"] for _ in range(5)} == {"2.0.0"}
            it.engine.try_out(candidate, canary_percent=place - 0.1, shadow_percent=0)
            assert {(await ask(it))["version"] for _ in range(5)} == {"1.0.0"}

    run(story)


def test_copies_are_compared_and_no_client_sees_them(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as it:
            candidate = await pair(it, tmp_path, factor=3.0)
            it.engine.try_out(candidate, canary_percent=0, shadow_percent=50)
            asked = 0

            async def more() -> None:
                nonlocal asked
                asked += 1
                assert (await ask(it))["version"] == "1.0.0"
                await asyncio.sleep(0.012)  # copies are paced

            while it.engine.tried(candidate).compared < 10:
                await more()
            tally = it.engine.tried(candidate)
            assert tally.compared <= asked // 2
            assert tally.failed == 0
            assert tally.durations.total == tally.originals.total == tally.compared
            text = it.metrics.render().decode()
            assert 'inferd_requests_total{code="ok",model="scale",version="1.0.0"}' in text
            assert 'inferd_requests_total{code="ok",model="scale",version="2.0.0"}' not in text, (
                "copies are no requests"
            )
            assert 'inferd_shadow_requests_total{model="scale",outcome="agreed",version="2.0.0"}' in text
            assert candidate.spread.counts().total == 0

    run(story)


def test_copies_that_differ_are_told(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as it:
            candidate = await pair(it, tmp_path, factor=-1.0)
            it.engine.try_out(candidate, canary_percent=0, shadow_percent=100)
            while it.engine.tried(candidate).compared < 3:
                await ask(it)
                await asyncio.sleep(0.012)
            tally = it.engine.tried(candidate)
            assert tally.agreed == 0.0
            assert tally.difference.startswith("y: ")

    run(story)


def test_a_candidate_that_fails_costs_no_client_its_answer(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, deaths_max=100) as it:
            candidate = await pair(it, tmp_path, handler="odd")
            it.engine.try_out(candidate, canary_percent=100, shadow_percent=0)
            assert (await ask(it, text="[1, 2, 3, 4]"))["version"] == "2.0.0"
            assert (await ask(it, text="refuse"))["code"] == "invalid_input", "the caller's own fault stays his"
            assert candidate.faults == 0
            failed = await ask(it, text="raise")
            assert failed["code"] == "handler_failed", "both fail at it, so the client is told by the one that serves"
            assert candidate.faults == 1
            text = it.metrics.render().decode()
            assert 'inferd_requests_handed_over_total{code="handler_failed",model="scale",version="2.0.0"} 1.0' in text
            assert 'inferd_requests_total{code="handler_failed",model="scale",version="1.0.0"} 1.0' in text

    run(story)


def test_while_a_candidate_has_no_worker_the_version_that_serves_answers(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as it:
            candidate = await pair(it, tmp_path)
            it.engine.try_out(candidate, canary_percent=100, shadow_percent=0)
            assert (await ask(it))["version"] == "2.0.0"
            assert candidate.pool is not None
            await candidate.pool.close(timeout_s=0)
            assert (await ask(it))["version"] == "1.0.0"
            canary = it.engine.canary("scale")
            assert canary is not None
            assert canary["diverted"] == 1

    run(story)


def test_what_a_candidate_held_when_it_died_does_not_wait_for_its_restart(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, restart_first_s=3600.0, restart_cap_s=3600.0, deaths_max=100) as it:
            candidate = await pair(it, tmp_path)
            it.engine.try_out(candidate, canary_percent=100, shadow_percent=0)
            assert candidate.pool is not None
            (link,) = candidate.pool.links
            os.kill(link.process.pid, signal.SIGSTOP)
            asked = [asyncio.ensure_future(ask(it)) for _ in range(5)]
            await until(lambda: candidate.pool is not None and candidate.pool.outstanding == 5)
            os.kill(link.process.pid, signal.SIGKILL)
            async with asyncio.timeout(90):
                answers = await asyncio.gather(*asked)
            assert [answer["kind"] for answer in answers] == ["result"] * 5
            assert candidate.deaths == 1

    run(story)


def test_after_the_cut_over_the_version_before_stands_in_until_the_new_one_is_confirmed(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as it:
            newer = await pair(it, tmp_path)
            assert it.engine.activate(newer) is not None
            assert (await ask(it))["version"] == "2.0.0"
            assert newer.pool is not None
            await newer.pool.close(timeout_s=0)
            assert (await ask(it))["version"] == "1.0.0"
            it.engine.confirm(newer)
            assert newer.stand_in is None

    run(story)


def test_a_version_that_hangs_leaves_as_soon_as_the_one_before_has_taken_its_requests(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, deaths_max=100, restart_first_s=3000.0, restart_cap_s=3000.0) as it:
            candidate = await pair(it, tmp_path)
            serving = it.engine.activate(candidate)
            assert serving is not None
            assert candidate.pool is not None
            (pid,) = candidate.pool.pids
            os.kill(pid, signal.SIGSTOP)
            asked = [asyncio.ensure_future(ask(it)) for _ in range(5)]
            while candidate.pool.outstanding < len(asked):
                await asyncio.sleep(0)
            it.engine.activate(serving)
            left = asyncio.ensure_future(it.engine.retire(candidate, timeout_s=3000.0))
            await asyncio.sleep(0)
            os.kill(pid, signal.SIGKILL)
            assert {answer["version"] for answer in await asyncio.gather(*asked)} == {"1.0.0"}
            async with asyncio.timeout(60):
                await left

    run(story)


def test_a_candidate_that_is_kept_beside_as_well_is_on_trial_until_its_own_is_over(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, deaths_max=100) as it:
            candidate = await pair(it, tmp_path, handler="odd")
            it.engine.try_out(candidate, canary_percent=100, shadow_percent=0)
            serving = candidate.stand_in
            assert serving is not None
            assert await it.engine.load(candidate.spec, beside=True) is candidate
            it.engine.activate_beside(candidate)
            it.engine.confirm(candidate, beside=True)
            assert (candidate.stand_in, candidate.held_by) == (serving, "on trial")
            assert (await ask(it, text="raise"))["code"] == "handler_failed"
            text = it.metrics.render().decode()
            assert 'inferd_requests_total{code="handler_failed",model="scale",version="1.0.0"} 1.0' in text
            await it.engine.retire(candidate, beside=True)
            assert (candidate.stand_in, candidate.held_by) == (serving, "on trial")
            assert (await ask(it, text="[1, 2, 3, 4]", version="2.0.0"))["version"] == "2.0.0"
            assert (await ask(it, text="[1, 2, 3, 4]"))["version"] == "2.0.0"
            # The one before, which is kept for a rollback, stays for it whatever else it is kept as.
            it.engine.activate(candidate)
            assert await it.engine.load(serving.spec, beside=True) is serving
            it.engine.activate_beside(serving)
            it.engine.confirm(serving, beside=True)
            assert serving.held_by == "kept for a rollback"
            it.engine.confirm(candidate)
            assert (candidate.stand_in, candidate.held_by) == (None, "")

    run(story)


def test_a_model_with_a_candidate_gives_no_lanes(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as it:
            candidate = await pair(it, tmp_path)
            lane = it.engine.open_lane("scale", client="c", deadline_ms=1000)
            ended = asyncio.Event()
            lane.on_end = lambda _: ended.set()
            it.engine.try_out(candidate, canary_percent=5, shadow_percent=0)
            async with asyncio.timeout(60):
                await ended.wait()
            lane.socket.close()
            with pytest.raises(LaneRefusedError, match="candidate"):
                it.engine.open_lane("scale", client="c", deadline_ms=1000)
            it.engine.end_try(candidate)
            it.engine.open_lane("scale", client="c", deadline_ms=1000).socket.close()

    run(story)


def test_under_load_copies_are_the_first_thing_left_out(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as it:
            candidate = await pair(it, tmp_path)
            it.engine.try_out(candidate, canary_percent=0, shadow_percent=100)
            async with asyncio.TaskGroup() as group:
                for _ in range(200):
                    group.create_task(ask(it))
            tally = it.engine.tried(candidate)
            assert tally.skipped["load"] > 0
            assert tally.compared < 100
            assert sum(tally.skipped.values()) + tally.compared <= 200

    run(story)


def test_a_candidate_that_is_retired_leaves_no_copy_behind(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as it:
            candidate = await pair(it, tmp_path)
            it.engine.try_out(candidate, canary_percent=50, shadow_percent=100)
            async with asyncio.TaskGroup() as group:
                for key in KEYS:
                    group.create_task(ask(it, key))
                await it.engine.retire(candidate)
            assert it.engine.canary("scale") is None
            assert (await ask(it, KEYS[0]))["version"] == "1.0.0"

    run(story)


def test_a_candidate_that_answers_late_shows_in_the_evidence(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as it:
            it.engine.activate(await it.engine.load(scale_version(tmp_path / "one", handler="slow")))
            serving = it.engine.active("scale")
            assert serving is not None
            candidate = await it.engine.load(scale_version(tmp_path / "two", version="2.0.0", handler="late"))
            ours = LoadedVersion(it.engine, candidate, beside=False, anew=True)
            theirs = LoadedVersion(it.engine, serving, beside=False)
            it.engine.try_out(candidate, canary_percent=50, shadow_percent=0)
            first, before = ours.evidence(), theirs.evidence()
            for key in KEYS[:30]:
                assert (await ask(it, key, text="0.001"))["kind"] == "result"
            shown, usual = ours.evidence().since(first), theirs.evidence().since(before)
            assert shown.good + usual.good == 30
            course = Course(shares=(50.0,), step_s=600, calls_min=5, limit_s=600)
            gates = DeployConfig(latency_factor_max=1.0, latency_slack_ms=0.0)  # the machine may be busy
            judgement = judge_share(shown, 1.0, 50.0, course, gates, before=usual)
            assert judgement.verdict is Verdict.ROLL_BACK
            assert judgement.reason.startswith("95 % of the answers")

    run(story)
