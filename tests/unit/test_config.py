"""What a wrong configuration file is answered with."""

from __future__ import annotations

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
        ('[[models]]\nname = "m"', "missing required field `team`"),
        ("[engine]\nworkers = 0", "workers: 1..64, or a table such as {min = 1, max = 4}"),
        ("[engine]\nworkers = {min = 3, max = 2}", "[engine.workers] max: min..64, or 0"),
        ("[engine]\nworkers = {maximum = 2}", "unknown field `maximum`; did you mean `max`?"),
        ('[engine]\nworkers = "2"', "[engine.workers] Expected `int | object`, got `str`"),
        ('[[engine.models]]\nname = "m"\nworkers = 65', "[engine.models[0]] workers: 1..64, or a table"),
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


def test_every_key_has_a_meaning_in_the_reference() -> None:
    assert [line for line in config_reference.render().splitlines() if line.endswith("|  |")] == []
