"""What a wrong configuration file is answered with."""

from __future__ import annotations

import math
import tomllib

import pytest

from agent.config import parse
from agent.errors import ConfigError
from tools import config_reference

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[policy]\nsandbox = "off"', "[policy.sandbox] Invalid enum value 'off'; one of 'enforce', 'best_effort'"),
        ('[auth]\nunix_default_roles = ["root"]', "'root'; one of 'infer', 'read', 'operate', 'admin'"),
        (
            '[[auth.tokens]]\nname = "a"\nsha256 = "%s"\nroles = ["infer", "root"]' % ("0" * 64),
            "'root'; one of 'infer', 'read', 'operate', 'admin'",
        ),
        ("[serving]\nhttp_prot = 1", "[serving] Object contains unknown field `http_prot`; did you mean `http_port`?"),
        ("[telemetry.outbox]\nsize_max = 1", "[telemetry.outbox] Object contains unknown field `size_max`; "),
        ("[modles]", "did you mean `models`?"),
        ("[log]\nzzz = 1", "; there are level, style"),
        ("[serving]\nhttp_port = 70000", "http_port: 0..65535"),
        ('[[models]]\nname = "m"\nteam = "t"\nbeside = ["1"]', "beside: '1' is no exact version"),
        ('[[models]]\nname = "m"\nteam = "t"\nbeside = ["1.0.0", "1.0.0"]', "beside: a version is named twice"),
        ('[[models]]\nname = "m"', "missing required field `team`"),
        ("[engine]\nworkers = 0", "workers: 1..64, or a table such as {min = 1, max = 4}"),
        ("[engine]\nworkers = {min = 3, max = 2}", "[engine.workers] max: min..64, or 0"),
        ("[engine]\nworkers = {maximum = 2}", "unknown field `maximum`; did you mean `max`?"),
        ('[engine]\nworkers = "2"', "[engine.workers] Expected `int | object`, got `str`"),
        ('[[engine.models]]\nname = "m"\nworkers = 65', "[engine.models[0]] workers: 1..64, or a table"),
        ('[engine]\nload = "later"', "[engine.load] Invalid enum value 'later'; one of 'eager', 'lazy'"),
        ('[engine]\nkeep_alive_s = "ever"', "Invalid enum value 'ever'; one of 'auto', 'never'"),
        ("[engine]\nkeep_alive_s = -1", 'keep_alive_s: 0..31622400, "auto" or "never"'),
        ("[engine]\nmemory_share = 80", "memory_share: 0..1"),
        ('[[engine.models]]\nname = "m"\nkeep_alive_s = -1', "[engine.models[0]] keep_alive_s: 0..31622400"),
        ('[[engine.models]]\nname = "m"\npinned = true', "unknown field `pinned`; did you mean `pin`?"),
        ('[[engine.models]]\nname = "m"\nworkers = {min = 0}', "[engine.models[0].workers] min: 1..64"),
    ],
)
def test_a_refusal_names_the_key_and_what_was_probably_meant(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(tomllib.loads(text))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        ("", 1, 0),
        ("workers = 2", 2, 2),
        ("workers = {max = 3}", 1, 3),
        ('workers = 2\nmodels = [{name = "m", workers = {min = 3}}]', 3, 0),
        ('workers = 2\nmodels = [{name = "other", workers = 4}]', 2, 2),
    ],
)
def test_a_model_has_the_workers_of_its_own_entry_or_of_all(text: str, least: int, most: int) -> None:
    workers = parse(tomllib.loads(f"[engine]\n{text}")).engine.workers_of("m")
    assert (workers.min, workers.max) == (least, most)


@pytest.mark.parametrize(
    ("text", "lazy", "keep_alive_s"),
    [
        ("", False, math.inf),
        ('load = "lazy"', True, 300.0),
        ('load = "lazy"\nkeep_alive_s = "never"', True, math.inf),
        ("keep_alive_s = 7", False, 7.0),
        ('models = [{name = "m", load = "lazy"}]', True, 300.0),
        ('load = "lazy"\nmodels = [{name = "m", load = "eager"}]', False, math.inf),
        ('keep_alive_s = 7\nmodels = [{name = "m", keep_alive_s = 0}]', False, 0.0),
        ('keep_alive_s = 7\nmodels = [{name = "other", load = "lazy", keep_alive_s = 0}]', False, 7.0),
    ],
)
def test_a_model_comes_and_goes_as_its_own_entry_says_or_as_all(text: str, lazy: bool, keep_alive_s: float) -> None:
    engine = parse(tomllib.loads(f"[engine]\n{text}")).engine
    assert (engine.lazy("m"), engine.keep_alive_of("m")) == (lazy, keep_alive_s)


def test_every_key_has_a_meaning_in_the_reference() -> None:
    assert [line for line in config_reference.render().splitlines() if line.endswith("|  |")] == []
