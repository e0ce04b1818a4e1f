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
    ],
)
def test_a_refusal_names_the_key_and_what_was_probably_meant(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(tomllib.loads(text))
    assert expected in str(caught.value)


def test_every_key_has_a_meaning_in_the_reference() -> None:
    assert [line for line in config_reference.render().splitlines() if line.endswith("|  |")] == []
