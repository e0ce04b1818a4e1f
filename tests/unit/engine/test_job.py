"""What becomes of a request when its job is done."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import Any

import pytest

from agent.engine.job import Job

pytestmark = pytest.mark.unit


@dataclass
class Request:
    """A request whose answer knows the connection it came from."""

    answer: Any
    body: Any = b"body"
    header: Any = None
    regions: Any = ()
    client: str = "uid:1"
    handle: Any = None


class Connection:
    def answered(self, header: dict[str, Any], body: Any) -> None: ...


def test_a_settled_request_keeps_nothing_alive_until_the_collector_runs() -> None:
    gc.disable()
    try:
        connection = Connection()
        gone = weakref.ref(connection)
        request = Request(answer=connection.answered, header={})
        job = request.handle = Job(request, 1, 0.0)
        job.answer({"kind": "result"})
        del connection, request, job
        assert gone() is None
    finally:
        gc.enable()
