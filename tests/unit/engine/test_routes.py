"""Which version answers what."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from agent.engine.routes import Route
from agent.errors import UnavailableError, UnknownModelError


@dataclass(frozen=True)
class Loaded:
    version: str
    note: str = ""


def route(default: str | None = None, *, beside: tuple[str, ...] = (), kept: tuple[str, ...] = ()) -> Route[Loaded]:
    made: Route[Loaded] = Route("m")
    made.default = Loaded(default) if default is not None else None
    made.beside = {version: Loaded(version) for version in beside}
    made.kept = [Loaded(version) for version in kept]
    return made


@pytest.mark.parametrize("version", [None, "", "1.0.0"])
def test_the_default_answers_what_names_no_version_or_its_own(version: str | None) -> None:
    assert route("1.0.0", beside=("2.0.0",)).choose(version).version == "1.0.0"


@pytest.mark.parametrize("version", ["2.0.0", "3.0.0", "4.0.0"])
def test_a_version_is_found_wherever_it_can_answer(version: str) -> None:
    assert route("1.0.0", beside=("2.0.0",), kept=("3.0.0", "4.0.0")).choose(version).version == version


def test_what_nobody_has_is_unknown_and_told_what_there_is() -> None:
    with pytest.raises(
        UnknownModelError, match=r"'m' version '9.0.0' is not found; there are 1.0.0 \(default\), 2.0.0 \(beside\)$"
    ):
        route("1.0.0", beside=("2.0.0",)).choose("9.0.0")


def test_what_there_is_is_told_with_each_of_its_places() -> None:
    crowded = route("2.0.0", beside=("1.0.0", "2.0.0"), kept=("1.5.0",))
    assert crowded.default is not None
    crowded.beside["2.0.0"] = crowded.default
    crowded.kept.append(crowded.default)
    crowded.expected = {"3.0.0": "it is being loaded"}
    with pytest.raises(UnknownModelError) as told:
        crowded.choose("9.0.0")
    assert str(told.value).endswith(
        "; there are 2.0.0 (default, beside), 1.0.0 (beside), 1.5.0 (of a deployment), 3.0.0 (beside, not there yet)"
    )


def test_a_default_that_is_not_there_yet_is_told_of_too() -> None:
    starting = route(beside=("2.0.0",))
    starting.expected = {"": "it is being loaded"}
    with pytest.raises(
        UnknownModelError, match=r"there are 2\.0\.0 \(beside\); the default is not there yet: it is being loaded$"
    ):
        starting.choose("1.0.0")


def test_what_is_expected_is_unavailable_with_its_reason() -> None:
    expecting = route("1.0.0")
    expecting.expected = {"2.0.0": "it is being loaded"}
    with pytest.raises(UnavailableError, match=r"model 'm' version '2\.0\.0': it is being loaded"):
        expecting.choose("2.0.0")
    assert expecting.versions == ["1.0.0", "2.0.0"]


def test_without_a_default_the_reason_is_told_or_what_can_be_named() -> None:
    expecting = route()
    expecting.expected = {"": "its first version has not arrived yet"}
    with pytest.raises(UnavailableError, match="model 'm': its first version has not arrived yet"):
        expecting.choose(None)
    with pytest.raises(UnavailableError, match=r"it has no default version; there are 2\.0\.0"):
        route(beside=("2.0.0",)).choose(None)


def test_versions_are_told_the_default_first_and_the_others_in_their_order() -> None:
    assert route("3.0.0", beside=("10.0.0", "9.0.0", "9.0.0-rc.1", "3.0.0"), kept=("1.0.0",)).versions == [
        "3.0.0", "1.0.0", "9.0.0", "9.0.0-rc.1", "10.0.0",
    ]  # fmt: skip


def test_one_that_is_the_default_and_beside_counts_once_and_leaves_each_place_for_itself() -> None:
    both = route("1.0.0")
    assert both.default is not None
    both.beside = {"1.0.0": both.default}
    assert len(list(both)) == 1
    assert both.versions == ["1.0.0"]
    both.leave(both.beside["1.0.0"])
    assert both.default is None
    assert both.choose("1.0.0").version == "1.0.0"
    both.leave(both.beside["1.0.0"], beside=True)
    assert both.empty


def test_where_two_have_one_name_the_default_answers_and_the_other_leaves_alone() -> None:
    both = route("1.0.0")
    newer = Loaded("1.0.0", "other bytes")
    both.kept = [newer]
    assert both.choose("1.0.0") is both.default
    both.leave(newer)
    assert both.default is not None
    assert both.kept == []
