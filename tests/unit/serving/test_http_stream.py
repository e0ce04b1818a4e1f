"""How answers in parts look over HTTP."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.serving.http_stream import PartsReply, Style, accepts_events

pytestmark = pytest.mark.unit

TEXT: dict[str, Any] = {"kind": "part", "content_type": "text/plain; charset=utf-8"}
JSON: dict[str, Any] = {"kind": "part", "content_type": "application/json"}
RESULT: dict[str, Any] = {"kind": "result"}
ERROR: dict[str, Any] = {"kind": "error", "code": "handler_failed", "message": "no\nmore", "retryable": False}


def unchunked(data: bytes) -> list[bytes]:
    """Return the chunks; the last one, of length 0, too."""
    found = []
    while data:
        size, _, rest = data.partition(b"\r\n")
        length = int(size, 16)
        found.append(rest[:length])
        assert rest[length : length + 2] == b"\r\n"
        data = rest[length + 2 :]
    return found


def lines_of_event(event: bytes) -> list[str]:
    """Return the data lines of one event, as a reader of the specification takes them."""
    assert event.endswith(b"\n\n")
    lines = event.decode().removesuffix("\n\n").split("\n")
    assert all(line.startswith("data: ") for line in lines), lines
    return [line.removeprefix("data: ") for line in lines]


def test_a_plain_part_is_a_chunk_and_a_json_part_a_line() -> None:
    reply = PartsReply(Style.PLAIN, chunked=True)
    assert reply.part(TEXT, (b"ab", b"c")) == b"3\r\nabc\r\n"
    assert reply.part(JSON, (b"{}",)) == b"3\r\n{}\n\r\n"
    assert reply.end(RESULT) == (b"0\r\n\r\n", True)
    assert reply.end(ERROR) == (b"", False)


@pytest.mark.parametrize("style", Style)
def test_nothing_but_the_end_writes_the_chunk_that_ends(style: Style) -> None:
    reply = PartsReply(style, chunked=True)
    assert b"" not in unchunked(reply.part(TEXT, ()))
    assert unchunked(reply.end(RESULT).data)[-1] == b""


@pytest.mark.parametrize("style", Style)
def test_without_chunks_parts_are_bare(style: Style) -> None:
    bare, framed = PartsReply(style, chunked=False), PartsReply(style, chunked=True)
    assert [bare.part(TEXT, (b"a\nb",))] == unchunked(framed.part(TEXT, (b"a\nb",)))
    assert b"chunked" not in bare.head(TEXT, request_id=b"r", keep_alive=False)
    assert b"transfer-encoding: chunked\r\n" in framed.head(TEXT, request_id=b"r", keep_alive=True)


def test_heads_name_type_version_and_request() -> None:
    signed = {**JSON, "version": "1.0.0", "variant": "v\r\nx: y"}
    head = PartsReply(Style.PLAIN, chunked=True).head(signed, request_id=b"r1", keep_alive=True)
    assert head.startswith(b"HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\nx-model-version: 1.0.0\r\n")
    assert b"x-model-variant: vx: y\r\n" in head
    assert head.endswith(b"x-request-id: r1\r\n\r\n")
    head = PartsReply(Style.EVENTS, chunked=True).head(JSON, request_id=b"r1", keep_alive=False)
    assert b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n" in head
    assert head.endswith(b"connection: close\r\n\r\n")


def test_errors_and_ends_are_events_of_their_own_or_triton_s() -> None:
    events = PartsReply(Style.EVENTS, chunked=False)
    events.part(TEXT, (b"a",))
    assert events.end(RESULT).data == b'event: end\ndata: {"parts":1}\n\n'
    ending = events.end(ERROR)
    assert ending == (b'event: error\ndata: {"error":"no\\nmore","code":"handler_failed"}\n\n', True)
    generate = PartsReply(Style.GENERATE, chunked=False)
    assert generate.end(RESULT) == (b"", True)
    assert json.loads(lines_of_event(generate.end(ERROR).data)[0])["error"] == "no\nmore"


@given(st.text().filter(lambda text: "\r" not in text))
def test_any_text_comes_out_of_its_event_as_it_went_in(text: str) -> None:
    event = PartsReply(Style.EVENTS, chunked=False).part(TEXT, (text.encode(),))
    assert "\n".join(lines_of_event(event)) == text


@given(st.binary())
def test_any_bytes_come_out_of_their_event(data: bytes) -> None:
    for header in ({"kind": "part"}, {"kind": "part", "content_type": "image/png"}):
        (line,) = lines_of_event(PartsReply(Style.EVENTS, chunked=False).part(header, (data,)))
        assert set(json.loads(line)) == {"content_type", "base64"}


def test_carriage_returns_cannot_forge_an_event() -> None:
    event = PartsReply(Style.EVENTS, chunked=False).part(TEXT, (b"a\r\revent: end\r\n\r\n",))
    assert lines_of_event(event) == ["a", "", "event: end", "", ""]


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        (None, False),
        (b"*/*", False),
        (b"text/event-stream", True),
        (b"Text/Event-Stream; q=1", True),
        (b"text/html, text/event-stream", True),
        (b"text/plain", False),
    ],
)
def test_who_accepts_events(accept: bytes | None, wanted: bool) -> None:
    assert accepts_events(accept) is wanted
