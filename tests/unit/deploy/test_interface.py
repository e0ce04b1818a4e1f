"""What callers of a version count on, and which changes they would notice."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.deploy.interface import CODE, Extent, Interface, Labels, Port, differences

pytestmark = pytest.mark.unit

ROWS = Extent(low=1, high=8, name="N")
IMAGE = Port(dtype="float32", shape=(ROWS, Extent(low=3, high=3), Extent(low=16, high=64, name="side")), layout="NCH")
SCORES = Port(dtype="float32", shape=(ROWS, Extent(low=10, high=10)))
SERVING = Interface(
    inputs={"image": IMAGE}, outputs={"scores": SCORES}, handler="tensors/v1", labels=Labels(count=10, digest="a" * 64)
)


def shaped(port: Port, **axes: Extent) -> Port:
    """Return ``port`` with other extents by axis (``axis_1=…``)."""
    return replace(port, shape=tuple(axes.get(f"axis_{number}", extent) for number, extent in enumerate(port.shape)))


@pytest.mark.parametrize(
    "candidate",
    [
        SERVING,
        replace(SERVING, outputs={"scores": SCORES, "embedding": SCORES}),
        replace(SERVING, inputs={"image": shaped(IMAGE, axis_2=Extent(low=1, high=128, name="side"))}),
        replace(SERVING, inputs={"image": shaped(IMAGE, axis_2=Extent())}),
        replace(SERVING, inputs={"image": replace(IMAGE, layout="")}),
        # More rows are taken, and as many given as were sent.
        Interface(
            inputs={"image": shaped(IMAGE, axis_0=Extent(low=1, high=32, name="batch"))},
            outputs={"scores": shaped(SCORES, axis_0=Extent(low=1, high=32, name="batch"))},
            handler="tensors/v1",
            labels=SERVING.labels,
        ),
    ],
    ids=["the same", "more outputs", "wider bounds", "any size", "layout not declared", "more rows"],
)
def test_a_version_that_takes_and_gives_at_least_as_much_is_compatible(candidate: Interface) -> None:
    assert differences(SERVING, candidate) == ()


@pytest.mark.parametrize(
    ("candidate", "told"),
    [
        (replace(SERVING, inputs={}), "input 'image' is gone"),
        (replace(SERVING, inputs={"image": IMAGE, "mask": IMAGE}), "input 'mask' is new"),
        (
            replace(SERVING, inputs={"image": replace(IMAGE, dtype="uint8")}),
            "input 'image' is uint8[N=1..8, 3, side=16..64] NCH, was float32[N=1..8, 3, side=16..64] NCH",
        ),
        (
            replace(SERVING, inputs={"image": shaped(IMAGE, axis_0=Extent(low=1, high=4, name="N"))}),
            "input 'image' is float32[N=1..4, 3, side=16..64] NCH, was float32[N=1..8, 3, side=16..64] NCH",
        ),
        (
            replace(SERVING, inputs={"image": shaped(IMAGE, axis_1=Extent(low=1, high=1))}),
            "input 'image' is float32[N=1..8, 1, side=16..64] NCH, was float32[N=1..8, 3, side=16..64] NCH",
        ),
        (
            replace(SERVING, inputs={"image": replace(IMAGE, layout="NHC")}),
            "input 'image' is float32[N=1..8, 3, side=16..64] NHC, was float32[N=1..8, 3, side=16..64] NCH",
        ),
        (
            replace(SERVING, inputs={"image": replace(IMAGE, shape=IMAGE.shape[:2])}),
            "input 'image' is float32[N=1..8, 3] NCH, was float32[N=1..8, 3, side=16..64] NCH",
        ),
        (replace(SERVING, outputs={"logits": SCORES}), "output 'scores' is gone"),
        (
            replace(SERVING, outputs={"scores": shaped(SCORES, axis_1=Extent(low=12, high=12))}),
            "output 'scores' is float32[N=1..8, 12], was float32[N=1..8, 10]",
        ),
        (
            replace(SERVING, outputs={"scores": shaped(SCORES, axis_0=Extent(name="boxes"))}),
            "output 'scores' is float32[boxes=*, 10], was float32[N=1..8, 10]",
        ),
        (replace(SERVING, labels=None), "class labels are gone"),
        (replace(SERVING, labels=Labels(count=12, digest="b" * 64)), "12 class labels, were 10"),
        (replace(SERVING, labels=Labels(count=10, digest="b" * 64)), "other class labels, or in another order"),
        (replace(SERVING, handler=CODE), "handler code of its own, was tensors/v1"),
    ],
)
def test_each_thing_that_callers_would_notice_is_told(candidate: Interface, told: str) -> None:
    assert differences(SERVING, candidate) == (told,)


def test_all_differences_are_told_at_once() -> None:
    candidate = Interface(inputs={}, outputs={}, handler=CODE)
    assert len(differences(SERVING, candidate)) == 4


def test_labels_may_come_where_none_were() -> None:
    assert differences(replace(SERVING, labels=None), SERVING) == ()


@pytest.mark.parametrize(
    ("extent", "text"),
    [
        (Extent(), "*"),
        (Extent(low=4, high=4), "4"),
        (Extent(low=2), "2.."),
        (Extent(low=1, name="N"), "N=*"),
        (Extent(low=0, high=9), "0..9"),
    ],
)
def test_extents_are_told_as_bounds(extent: Extent, text: str) -> None:
    assert str(extent) == text
