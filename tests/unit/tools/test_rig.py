"""What soak and fuzz call a fault: answers that are not one, or not one's own, and a daemon that kept something."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agent.tensors import pack
from tools.rig import models
from tools.rig.ledger import Ledger
from tools.rig.line import values
from tools.rig.models import write
from tools.rig.watch import ARENA_IDLE_BYTES_MAX, DESCRIPTORS_GROWTH_MAX, PSS_GROWTH_MAX, Holding, not_settled

pytestmark = pytest.mark.unit


def answered(ledger: Ledger, request_id: int, y: np.ndarray, version: str = "1.0.0") -> None:
    entries, parts = pack({"y": y})
    body = b"".join(bytes(part) for part in parts)
    ledger.frame({"kind": "result", "id": request_id, "version": version, "tensors": entries}, body)


def test_one_answer_each_and_its_own_is_no_fault() -> None:
    ledger = Ledger(name="x")
    for number, (version, factor) in enumerate((("1.0.0", 2), ("2.0.0", 3))):
        ledger.ask(number, values(number, 5))
        answered(ledger, number, values(number, 5) * np.float32(factor), version)
    ledger.ask(9, values(9, 5), hurried=True)
    ledger.frame({"kind": "error", "id": 9, "code": "deadline_exceeded", "message": ""}, b"")
    ledger.close("the end")
    assert ledger.faults == []
    assert (ledger.asked, dict(ledger.outcomes)) == (3, {"result": 2, "deadline_exceeded": 1})


@pytest.mark.parametrize(
    ("header", "text"),
    [
        ({"kind": "result", "id": 2, "version": "1.0.0"}, "never asked"),
        ({"kind": "error", "id": 2, "code": "overloaded"}, "never asked"),
        ({"kind": "error", "code": "bad_frame", "message": "m"}, "answer to nobody"),
        ({"kind": "reply", "id": 1, "value": 1}, "'reply'"),
        ({"kind": "result", "id": 1, "version": "3.0.0"}, "3.0.0"),
        ({"kind": "result", "id": 1, "version": "1.0.0"}, "not its own"),
        ({"kind": "error", "id": 1, "code": "internal", "message": "m"}, "internal"),
        ({"kind": "error", "id": 1, "code": "deadline_exceeded"}, "deadline_exceeded"),  # it had half a minute
    ],
)
def test_anything_else_is_a_fault(header: dict[str, object], text: str) -> None:
    ledger = Ledger(name="x")
    ledger.ask(1, values(1, 2))
    ledger.frame(header, b"")
    (fault,) = ledger.faults
    assert text in fault


def test_anothers_answer_a_second_answer_and_none_are_faults() -> None:
    ledger = Ledger(name="x")
    for number in (1, 2, 3):
        ledger.ask(number, values(number, 5))
    answered(ledger, 1, values(2, 5) * np.float32(2))
    answered(ledger, 2, values(2, 5) * np.float32(2))
    answered(ledger, 2, values(2, 5) * np.float32(2))
    ledger.close("the end")
    assert [fault.split(": ", 2)[-1] for fault in ledger.faults] == [
        "the answer is not its own",
        "result, though it is answered already or was never asked",
        "the end",
    ]


QUIET = Holding(
    pid=7,
    started=1.0,
    pss_bytes=40_000_000,
    own_bytes=20_000_000,
    descriptors=20,
    arena_bytes=0,
    children=2,
    workers=1,
    gauges={
        "inferd_queue_requests": 0.0,
        "inferd_shared_regions": 0.0,
        "inferd_shared_bytes": 0.0,
        "inferd_frame_connections": 1.0,
    },
)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"pid": 8}, "restarted"),
        ({"started": 2.0}, "restarted"),
        ({"descriptors": 20 + DESCRIPTORS_GROWTH_MAX + 1}, "descriptors"),
        ({"own_bytes": 20_000_000 + PSS_GROWTH_MAX + 1}, "PSS"),
        ({"arena_bytes": ARENA_IDLE_BYTES_MAX + 1}, "arena"),
        ({"children": 3}, "processes"),
        ({"workers": 0}, "workers"),
        ({"gauges": {**QUIET.gauges, "inferd_shared_regions": 1.0}}, "inferd_shared_regions is 1"),
        ({"gauges": {**QUIET.gauges, "inferd_queue_requests": 2.0}}, "inferd_queue_requests is 2"),
        ({"gauges": {**QUIET.gauges, "inferd_frame_connections": 2.0}}, "connections"),
    ],
)
def test_what_the_daemon_kept_is_named(change: dict[str, object], text: str) -> None:
    assert not_settled(QUIET, QUIET) == []
    (fault,) = not_settled(QUIET, replace(QUIET, **change))  # type: ignore[arg-type]
    assert text in fault


def test_no_two_requests_have_the_same_values() -> None:
    rows = [values(number, 5).tobytes() for number in range(1000)]
    assert len(set(rows)) == 1000


@pytest.mark.parametrize("model", [models.tiny(), models.frame(), models.heavy(), models.times(3.0)])
def test_a_model_is_written_as_sources_that_pack_takes(tmp_path: Path, model: models.Model) -> None:
    file = write(model, tmp_path / "m")
    assert file.exists()
    assert {path.name for path in file.parent.iterdir()} == {
        "model.onnx",
        "model.toml",
        "in.safetensors",
        "out.safetensors",
    }


def test_the_cnn_has_the_size_of_a_resnet_18() -> None:
    _, weights = models.resnet18().build(np.random.default_rng(0))
    assert 11.6e6 < sum(weight.size for weight in weights.values()) < 11.8e6
