"""The one table from error to status, and what errors look like in each dialect."""

from __future__ import annotations

import json

import pytest

from agent import errors
from agent.engine.job import error_of
from agent.errors import AgentError, OverloadedError, RateLimitedError, UnauthenticatedError, UnknownModelError
from agent.serving.replies import Dialect, engine_reply, error_reply, json_reply, status_of

pytestmark = pytest.mark.unit


def every_error(cls: type[AgentError] = AgentError) -> list[type[AgentError]]:
    return [cls, *(found for sub in cls.__subclasses__() for found in every_error(sub))]


@pytest.mark.parametrize("error", every_error(), ids=lambda error: error.__name__)
def test_every_error_has_a_status(error: type[AgentError]) -> None:
    assert 400 <= status_of(error) <= 599


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.InvalidInputError, 400),
        (errors.TensorError, 400),
        (errors.TooLargeError, 413),
        (errors.UnknownModelError, 404),
        (errors.UnauthenticatedError, 401),
        (errors.ForbiddenError, 403),
        (errors.OverloadedError, 503),
        (errors.UnavailableError, 503),
        (errors.DeadlineError, 504),
        (errors.WorkerDiedError, 503),
        (errors.HandlerError, 500),
        (errors.OutOfMemoryError, 507),
        (AgentError, 500),
    ],
)
def test_statuses_are_wire_contract(error: type[AgentError], status: int) -> None:
    assert status_of(error) == status


def test_inference_errors_are_text_and_code() -> None:
    reply = error_reply(UnknownModelError("Request for unknown model: 'x'"))
    assert reply.status == 404
    assert json.loads(reply.body) == {"error": "Request for unknown model: 'x'", "code": "unknown_model"}


def test_torchserve_errors_have_its_fields_and_our_code() -> None:
    reply = error_reply(UnknownModelError("why"), Dialect.TORCHSERVE)
    assert json.loads(reply.body) == {
        "code": 404,
        "type": "UnknownModelError",
        "message": "why",
        "error": "unknown_model",
    }


def test_whom_to_ask_again_later_is_told_when() -> None:
    assert (b"retry-after", b"1") in error_reply(OverloadedError("full")).headers
    assert (b"retry-after", b"8") in error_reply(RateLimitedError("slowly", retry_after_s=7.2)).headers
    told = error_of(RateLimitedError("slowly", retry_after_s=7.2), 1)
    assert (b"retry-after", b"8") in engine_reply(told, b"", Dialect.INFERENCE).headers
    assert (b"www-authenticate", b"Bearer") in error_reply(UnauthenticatedError("who")).headers


def test_a_result_carries_its_version_and_the_length_of_its_json_part() -> None:
    header = {"kind": "result", "version": "2", "variant": "int8", "params": {"oip_header_bytes": 17}}
    reply = engine_reply(header, b"body", Dialect.INFERENCE)
    assert reply.status == 200
    assert dict(reply.headers) == {
        b"content-type": b"application/octet-stream",
        b"content-length": b"4",
        b"x-model-version": b"2",
        b"x-model-variant": b"int8",
        b"inference-header-content-length": b"17",
    }


def test_an_error_of_the_engine_becomes_its_status() -> None:
    reply = engine_reply({"kind": "error", "code": "overloaded", "message": "full"}, b"", Dialect.INFERENCE)
    assert (reply.status, json.loads(reply.body)["code"]) == (503, "overloaded")


def test_text_from_a_worker_cannot_add_headers() -> None:
    header = {"kind": "result", "content_type": "text/plain\r\nSet-Cookie: a=b", "version": "1\n"}
    reply = engine_reply(header, b"", Dialect.INFERENCE)
    assert all(b"\r" not in value and b"\n" not in value for _, value in reply.headers)


def test_json_is_measured_in_bytes() -> None:
    reply = json_reply({"a": "é"})
    assert (b"content-length", b"%d" % len('{"a":"é"}'.encode())) in reply.headers
