"""Workers in control groups of their own: a real kernel limit, and who notices."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from agent.engine.cgroups import Groups
from agent.errors import ConfigError, OutOfMemoryError
from tests.integration.test_engine import bench, run, until
from tests.models import scale_version

pytestmark = pytest.mark.integration
LIMIT = 96 << 20


@pytest.fixture
def handed(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A memory control group made for us, of whichever version this machine has."""
    for root in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        path = root / f"inferd-test-{os.getpid()}"
        with suppress(OSError):
            path.mkdir()
            if (path / "memory.limit_in_bytes").exists() or "memory" in (path / "cgroup.controllers").read_text():
                break
            path.rmdir()
    else:
        pytest.skip("no memory control group can be made here (root, and version 1 or a delegated version 2)")
    yield path
    path.rmdir()


def eat(mebibytes: int) -> str:
    return f"value = sum(len(part) for part in [np.ones(1 << 20, 'uint8') for _ in range({mebibytes})])"


def test_a_worker_that_uses_more_than_its_group_allows_dies_and_says_of_what(tmp_path: Path, handed: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, memory_cgroup=str(handed)) as box:
            spec = scale_version(tmp_path / "bundle", handler="hostile")
            limited = replace(spec.variants[0], resident_bytes_max=LIMIT)
            version = await box.engine.load(replace(spec, variants=(limited,)))
            box.engine.activate(version)
            causes: list[str] = []
            with box.events.subscribed(lambda event: causes.append(str(event.data.get("cause", "")))):
                assert version.status()["resident_bytes_max"] == LIMIT
                (link,) = version.pool.links if version.pool is not None else ()
                assert handed.name in Path(f"/proc/{link.process.pid}/cgroup").read_text()
                assert (await box.say(eat(8)))["value"]["value"] == 8 << 20
                assert (await box.say(eat(256)))["code"] == "worker_died"
                await until(lambda: any("limit of its control group" in cause for cause in causes))
                for _ in range(3000):
                    if (await box.ask()).get("y") == 2.0:
                        break
                    await asyncio.sleep(0.01)
                assert (await box.ask())["y"] == 2.0
        assert not list(handed.glob("worker-*"))

    run(story)


def test_a_model_that_does_not_fit_while_it_loads_is_out_of_memory(tmp_path: Path, handed: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, memory_cgroup=str(handed)) as box:
            spec = scale_version(tmp_path / "bundle", handler="hostile")
            handler = tmp_path / "bundle/handler.py"
            handler.write_text(handler.read_text() + "\nkept = [np.ones(1 << 20, 'uint8') for _ in range(256)]\n")
            limited = replace(spec.variants[0], resident_bytes_max=LIMIT)
            with pytest.raises(OutOfMemoryError, match="killed at 96 MiB, the limit of its control group"):
                await box.engine.load(replace(spec, variants=(limited,)))
        assert not list(handed.glob("worker-*"))

    run(story)


def test_what_was_not_handed_to_us_is_refused_or_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no control group for memory"):
        Groups(str(tmp_path))
    for where in ("auto", "never"):
        groups = Groups(where)
        if groups.reason:  # else a service manager runs these tests in a group that it delegated
            assert groups.make(LIMIT) is None
