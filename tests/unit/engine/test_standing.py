"""What is known of a version's variants, by a clock that the test turns."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from agent.config import VariantsConfig
from agent.engine.book import VariantBook
from agent.engine.standing import Standing
from agent.engine.types import VariantSpec, VersionSpec

pytestmark = pytest.mark.unit

DIGEST = "d" * 64
SPEC = VersionSpec(
    model="m",
    version="1.0.0",
    digest=DIGEST,
    variants=tuple(
        VariantSpec(id=name, runtime="onnx", precision="fp32", device=device, worker={})
        for name, device in (("gpu", "cuda:0"), ("cpu", "cpu"))
    ),
    dropped=(("npu", "needs npu, the profile has cuda, cpu"),),
)


@dataclass
class World:
    """A box whose time the test turns; ``begin`` is a start of the daemon."""

    path: Path
    now: float = 1000.0
    config: VariantsConfig = field(default_factory=VariantsConfig)

    def begin(self, spec: VersionSpec = SPEC) -> Standing:
        return Standing(spec, self.config, VariantBook(self.path, "box"), now=lambda: self.now)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "variants.json")


def row(standing: Standing, name: str, current: str | None) -> dict[str, Any]:
    return next(row for row in standing.rows(current) if row["variant"] == name)


def test_a_crash_that_comes_again_waits_twice_as_long_also_after_a_restart(world: World) -> None:
    standing = world.begin()
    standing.fell("gpu", "worker_died", "5 deaths")
    assert row(standing, "gpu", "cpu")["retry_s"] == 60.0
    assert standing.serves("gpu")  # tried again, and it serves
    assert not standing.skipped[1:]
    standing.fell("gpu", "worker_died", "5 deaths")
    assert row(standing, "gpu", "cpu")["retry_s"] == 120.0
    world.now += 1e6
    again = world.begin()
    assert again.descent() == ("cpu", "gpu")
    assert (row(again, "gpu", "cpu")["failures"], row(again, "gpu", "cpu")["retry_s"]) == (2, 120.0)


def test_service_without_trouble_is_a_new_beginning(world: World) -> None:
    standing = world.begin()
    standing.fell("gpu", "worker_died", "5 deaths")
    standing.serves("gpu")
    standing.served_well("gpu")
    assert world.begin().descent() == ("gpu", "cpu")
    standing.fell("gpu", "worker_died", "5 deaths")
    assert row(standing, "gpu", "cpu")["failures"] == 1


def test_a_variant_pinned_to_a_lost_device_waits_for_its_return_and_no_other(world: World) -> None:
    pinned = tuple(replace(one, pinned_device="cuda:0") if one.id == "gpu" else one for one in SPEC.variants)
    standing = world.begin(replace(SPEC, variants=pinned))
    assert standing.pinned_to("cuda:0") == ("gpu",)
    standing.fell("gpu", "device_lost", "GPU is lost")
    assert standing.descent() == ("cpu",)
    assert row(standing, "gpu", "cpu")["retry_s"] is None
    standing.device_back("cuda:1")
    assert standing.fallen == 1
    standing.device_back("cuda:0")
    assert standing.descent() == ("gpu", "cpu")
    step = standing.next_try("cpu")
    assert step is not None
    assert (step.rung.id, step.at) == ("gpu", world.now)


def test_a_variant_without_a_pin_comes_back_with_any_device_of_its_kind(world: World) -> None:
    standing = world.begin()
    assert standing.pinned_to("cuda:0") == ()
    assert row(standing, "gpu", "cpu")["device"] == "cuda"
    standing.fell("gpu", "device_lost", "cuda:0 is lost")
    standing.device_back("cuda:1")
    assert not standing.fallen


def test_status_names_every_variant(world: World) -> None:
    standing = world.begin()
    standing.fell("gpu", "unloadable", "no model")
    states = {one["variant"]: (one["state"], one["kind"], one["reason"]) for one in standing.rows("cpu")}
    assert states == {
        "gpu": ("failed", "permanent", "no model"),
        "cpu": ("serving", None, ""),
        "npu": ("dropped", None, "needs npu, the profile has cuda, cpu"),
    }
    assert [skip["code"] for skip in standing.skipped] == ["no_variant", "unloadable"]
    assert standing.below("gpu") == "cpu"
    assert standing.below("cpu") is None


def test_who_may_have_mended_it_need_not_wait_but_what_never_loads_is_not_tried(world: World) -> None:
    standing = world.begin()
    standing.fell("gpu", "unloadable", "no model")
    standing.fell("cpu", "load_failed", "out of luck")
    assert standing.descent() == ()
    standing.hurry()
    assert standing.descent() == ("cpu",)
    assert row(standing, "cpu", None)["retry_s"] == 0.0


def test_a_shortage_of_memory_is_forgotten_when_the_model_is_asked_again(world: World) -> None:
    standing = world.begin()
    standing.fell("gpu", "overloaded", "models may take 1 MiB")
    standing.fell("cpu", "load_failed", "out of luck")
    standing.forget_shortage()
    assert [skip["variant"] for skip in standing.skipped] == ["npu", "cpu"]
