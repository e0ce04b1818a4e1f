"""Which variant is loaded, tried again, measured and preferred: tables over pure decisions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.config import VariantsConfig
from agent.engine.ladder import (
    Fall,
    Kind,
    Measured,
    Purpose,
    Rung,
    Verdict,
    arrange,
    below,
    descent,
    due_at,
    fallen,
    judge,
    kind_of,
    next_try,
)

pytestmark = pytest.mark.unit

CONFIG = VariantsConfig(restart_first_s=5, retry_first_s=60, retry_cap_s=3600, retries_max=3)
NOW = 1000.0


def rung(name: str) -> Rung:
    """``gpu-fp16`` is a rung of that precision on ``cuda:0``."""
    device, _, precision = name.partition("-")
    return Rung(id=name, device={"gpu": "cuda:0", "gpu1": "cuda:1", "cpu": "cpu"}[device], precision=precision)


def rungs(names: str) -> tuple[Rung, ...]:
    return tuple(rung(name) for name in names.split())


def names(found: Sequence[Rung]) -> str:
    return " ".join(one.id for one in found)


def verdict(*, preferred: bool) -> Verdict:
    measured = Measured(p50_ms=1.0, cosine=1.0)
    return Verdict(preferred=preferred, reason="measured", own=measured, rival=measured, rival_id="cpu-fp32")


def fall(code: str = "load_failed", *, times: int = 1, at: float = NOW, remembered: bool = False) -> Fall:
    return Fall(kind=kind_of(code), code=code, reason=code, times=times, at=at, remembered=remembered)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("unloadable", Kind.PERMANENT),
        ("sandbox_failed", Kind.PERMANENT),
        ("worker_died", Kind.CRASH),
        ("out_of_memory", Kind.MEMORY),
        ("selftest_failed", Kind.TEST),
        ("device_lost", Kind.DEVICE),
        ("load_failed", Kind.LOAD),
        ("anything else", Kind.LOAD),
    ],
)
def test_the_code_says_what_kind_of_failure_it_was(code: str, kind: Kind) -> None:
    assert kind_of(code) is kind


@pytest.mark.parametrize(
    ("ranked", "preferred", "expected"),
    [
        ("cpu-int8 cpu-fp32", None, "cpu-fp32 cpu-int8"),
        ("cpu-int8 cpu-fp32", True, "cpu-int8 cpu-fp32"),
        ("cpu-int8 cpu-fp32", False, "cpu-fp32 cpu-int8"),
        ("cpu-fp32 cpu-int8", True, "cpu-fp32 cpu-int8"),  # the publisher ranked the exact one first
        ("cpu-int8", None, "cpu-int8"),
        ("gpu-int8 cpu-fp32", None, "gpu-int8 cpu-fp32"),  # no rival on its device
        ("gpu-int8 gpu1-fp16 cpu-int8 cpu-fp32", None, "gpu1-fp16 gpu-int8 cpu-fp32 cpu-int8"),
        ("gpu-fp16 gpu-fp32 cpu-int8 cpu-fp32", None, "gpu-fp16 gpu-fp32 cpu-fp32 cpu-int8"),
        ("cpu-int8 cpu-int4 cpu-fp32", None, "cpu-fp32 cpu-int8 cpu-int4"),
        ("cpu-int8 cpu-fp16 cpu-fp32", None, "cpu-fp16 cpu-fp32 cpu-int8"),
        ("", None, ""),
    ],
)
def test_an_approximate_variant_comes_first_only_once_it_has_proven_itself(
    ranked: str, preferred: bool | None, expected: str
) -> None:
    verdicts = {} if preferred is None else {"cpu-int8": verdict(preferred=preferred)}
    assert names(arrange(rungs(ranked), verdicts)) == expected


@pytest.mark.parametrize(
    ("kind", "times", "serving", "wait_s"),
    [
        ("load_failed", 1, True, 60),
        ("worker_died", 2, True, 120),
        ("selftest_failed", 3, True, 240),
        ("out_of_memory", 4, True, math.inf),  # tried often enough
        ("load_failed", 1, False, 5),
        ("load_failed", 4, False, 40),
        ("worker_died", 40, False, 3600),  # with nothing to serve it is never given up
        ("unloadable", 1, True, math.inf),
        ("unloadable", 1, False, math.inf),
        ("device_lost", 1, False, math.inf),
    ],
)
def test_waits_double_up_to_a_cap(kind: str, times: int, serving: bool, wait_s: float) -> None:
    assert due_at(fall(kind, times=times), CONFIG, serving=serving) - NOW == wait_s


def test_failures_are_counted_on() -> None:
    first = fallen(None, "worker_died", "a", now=1.0)
    second = fallen(first, "out_of_memory", "b", now=2.0)
    assert (first.times, second.times, second.kind, second.reason) == (1, 2, Kind.MEMORY, "b")


@pytest.mark.parametrize(
    ("falls", "now", "expected"),
    [
        ({}, NOW, "gpu-fp16 cpu-fp32"),
        ({"gpu-fp16": fall()}, NOW, "cpu-fp32"),
        ({"gpu-fp16": fall()}, NOW + 5, "gpu-fp16 cpu-fp32"),
        ({"gpu-fp16": fall("unloadable")}, NOW + 1e9, "cpu-fp32"),
        ({"gpu-fp16": fall("device_lost")}, NOW + 1e9, "cpu-fp32"),
        ({"gpu-fp16": fall("worker_died", remembered=True)}, NOW, "cpu-fp32 gpu-fp16"),
        ({"gpu-fp16": fall("unloadable", remembered=True), "cpu-fp32": fall("unloadable")}, NOW, "gpu-fp16"),
        ({"gpu-fp16": fall("unloadable"), "cpu-fp32": fall("unloadable")}, NOW, ""),
    ],
)
def test_what_failed_before_the_start_is_the_last_resort(falls: dict[str, Fall], now: float, expected: str) -> None:
    assert names(descent(rungs("gpu-fp16 cpu-fp32"), falls, CONFIG, now=now)) == expected


@pytest.mark.parametrize(
    ("falls", "current", "expected"),
    [
        ({}, "gpu-fp16", "gpu-fp32"),
        ({"gpu-fp32": fall()}, "gpu-fp16", "cpu-fp32"),
        ({"gpu-fp32": fall("unloadable"), "cpu-fp32": fall("device_lost")}, "gpu-fp16", None),
        ({}, "cpu-fp32", None),
    ],
)
def test_one_steps_down_to_the_next_that_may_be_tried(
    falls: dict[str, Fall], current: str, expected: str | None
) -> None:
    found = below(rungs("gpu-fp16 gpu-fp32 cpu-fp32"), falls, CONFIG, current=current, now=NOW)
    assert (found.id if found else None) == expected


LADDER = "gpu-fp16 cpu-int8 cpu-fp32"


@pytest.mark.parametrize(
    ("falls", "verdicts", "current", "expected"),
    [
        # the best one serves
        ({}, {}, "gpu-fp16", None),
        ({}, {"cpu-int8": verdict(preferred=True)}, "gpu-fp16", None),
        # a better one failed
        ({"gpu-fp16": fall()}, {"cpu-int8": verdict(preferred=False)}, "cpu-fp32", ("gpu-fp16", Purpose.RETRY, 60)),
        ({"gpu-fp16": fall("unloadable")}, {"cpu-int8": verdict(preferred=False)}, "cpu-fp32", None),
        ({"gpu-fp16": fall("device_lost")}, {"cpu-int8": verdict(preferred=True)}, "cpu-int8", None),
        # its device is back
        ({}, {"cpu-int8": verdict(preferred=True)}, "cpu-int8", ("gpu-fp16", Purpose.RETRY, 0)),
        # nothing is measured
        ({"gpu-fp16": fall("device_lost")}, {}, "cpu-fp32", ("cpu-int8", Purpose.COMPARE, 0)),
        ({"gpu-fp16": fall()}, {}, "cpu-fp32", ("cpu-int8", Purpose.COMPARE, 0)),
        (
            {"gpu-fp16": fall(times=3), "cpu-int8": fall(times=2)},
            {},
            "cpu-fp32",
            ("cpu-int8", Purpose.COMPARE, 120),
        ),
        # the approximate one serves because the exact one failed: there is nothing to compare it with yet
        ({"gpu-fp16": fall("unloadable"), "cpu-fp32": fall()}, {}, "cpu-int8", ("cpu-fp32", Purpose.RETRY, 60)),
        # nothing serves
        (
            {"gpu-fp16": fall(times=2), "cpu-int8": fall("unloadable"), "cpu-fp32": fall()},
            {},
            None,
            ("cpu-fp32", Purpose.RETRY, 5),
        ),
        ({name: fall("unloadable") for name in LADDER.split()}, {}, None, None),
        ({name: fall("device_lost") for name in LADDER.split()}, {}, None, None),
    ],
)
def test_what_is_tried_next(
    falls: dict[str, Fall], verdicts: dict[str, Verdict], current: str | None, expected: tuple | None
) -> None:
    found = next_try(rungs(LADDER), falls, verdicts, CONFIG, current=current, now=NOW)
    assert (found and (found.rung.id, found.purpose, found.at - NOW)) == expected


def test_without_a_budget_nothing_is_measured() -> None:
    config = VariantsConfig(measure_ms=0)
    assert next_try(rungs("cpu-int8 cpu-fp32"), {}, {}, config, current="cpu-fp32", now=NOW) is None


@pytest.mark.parametrize(
    ("own", "rival", "preferred", "reason"),
    [
        ((5.0, 1.0, 1.0), (10.0, 1.0, 1.0), True, "faster and agrees here: 5 ms against 10 ms of cpu-fp32"),
        ((9.5, 1.0, 1.0), (10.0, 1.0, 1.0), False, "not faster here"),
        ((27.0, 1.0, 1.0), (10.0, 1.0, 1.0), False, "not faster here: 27 ms against 10 ms"),
        ((5.0, 0.98, 1.0), (10.0, 1.0, 1.0), False, "disagrees: cosine 0.9800, required is 0.99"),
        ((5.0, math.nan, 1.0), (10.0, 1.0, 1.0), False, "disagrees"),
        ((5.0, 1.0, 0.9), (10.0, 1.0, 1.0), False, "best class right in 90.0%, cpu-fp32 in 100.0%"),
        ((5.0, 1.0, 0.9), (10.0, 1.0, 0.9), True, "agrees"),  # both know the recorded classes equally well
        ((5.0, 1.0, None), (10.0, 1.0, None), True, "agrees"),
        ((0.0, 1.0, None), (10.0, 1.0, None), False, "not faster"),  # no measurement
    ],
)
def test_faster_and_in_agreement_or_not_at_all(own: tuple, rival: tuple, preferred: bool, reason: str) -> None:
    def measured(values: tuple) -> Measured:
        return Measured(p50_ms=values[0], cosine=values[1], top1=values[2])

    found = judge(measured(own), measured(rival), "cpu-fp32", VariantsConfig())
    assert found.preferred is preferred
    assert reason in found.reason


CODES = st.sampled_from(["unloadable", "worker_died", "out_of_memory", "device_lost", "load_failed"])
FALLS = st.dictionaries(
    st.sampled_from(LADDER.split()),
    st.builds(fall, CODES, times=st.integers(1, 50), at=st.floats(0, NOW), remembered=st.booleans()),
)


@given(FALLS, st.sampled_from([*LADDER.split(), None]), st.booleans())
def test_nothing_permanent_or_gone_is_ever_tried_and_nothing_worse(
    falls: dict[str, Fall], current: str | None, proven: bool
) -> None:
    verdicts = {"cpu-int8": verdict(preferred=proven)}
    found = next_try(rungs(LADDER), falls, verdicts, CONFIG, current=current, now=NOW)
    order = names(arrange(rungs(LADDER), verdicts)).split()
    if found is not None:
        assert found.rung.id not in falls or falls[found.rung.id].kind not in (Kind.PERMANENT, Kind.DEVICE)
        assert current is None or order.index(found.rung.id) < order.index(current)


@given(FALLS)
def test_a_variant_that_nothing_speaks_against_is_always_reached(falls: dict[str, Fall]) -> None:
    tried = names(descent(rungs(LADDER), falls, CONFIG, now=NOW)).split()
    assert set(LADDER.split()) - set(falls) <= set(tried)
    assert len(set(tried)) == len(tried)
