"""The asynchronous client: one connection, any number of requests outstanding, reconnecting by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from os import PathLike
from types import TracebackType
from typing import Any, Final, Self, cast

from agent.backoff import Backoff
from agent.client.messages import (
    ANSWER_LIMITS,
    DEFAULT_SOCKET,
    Result,
    call_frame,
    cancel_frame,
    error_of,
    infer_frame,
    predict_frame,
    result_of,
    value_of,
)
from agent.errors import DeadlineError, FrameError, TooLargeError, UnavailableError
from agent.tensors import Array
from agent.wire import Buffer, Decoder, Frame

_READ_BYTES: Final = 64 * 1024
_GRACE_S: Final = 5.0  # beyond a request's deadline: the daemon answers late requests too
_RETRY_FIRST_S: Final = 0.01
_RETRY_CAP_S: Final = 0.25
_JOIN_BYTES_MAX: Final = 64 * 1024


class AsyncClient:
    """A connection to ``inferd`` for one event loop, opened at the first request and again when it broke.

    Cancelling the task that waits for an answer withdraws the request at the daemon.

    A request whose connection breaks before it is answered is sent again, at most ``retries`` times: it may then run
    twice. Set ``retries=0`` for a model where that matters.

    Args:
        socket_path: The daemon's frame socket.
        connect_timeout_s: How long to wait for a daemon that is not there (restarting).
        timeout_s: How long to wait for an answer when the request has no deadline of its own.
        retries: Bound of repeated requests, see above.
    """

    def __init__(
        self,
        socket_path: str | PathLike[str] = DEFAULT_SOCKET,
        *,
        connect_timeout_s: float = 5.0,
        timeout_s: float = 60.0,
        retries: int = 2,
    ) -> None:
        self._path = str(socket_path)
        self._connect_timeout_s = connect_timeout_s
        self._timeout_s = timeout_s
        self._retries = retries
        self._ids = count(1)
        self._line: _Line | None = None
        self._connecting = asyncio.Lock()

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, Array],
        *,
        version: str | None = None,
        deadline_ms: float | None = None,
        outputs: Sequence[str] | None = None,
        priority: int | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> Result:
        """Run ``model`` on tensors; arguments and errors as ``Client.infer``. Leave the arrays alone until then."""

        def build(request_id: int) -> list[Buffer]:
            return infer_frame(
                request_id,
                model,
                inputs,
                version=version,
                deadline_ms=deadline_ms,
                outputs=outputs,
                priority=priority,
                params=params,
            )

        return result_of(await self._ask(build, deadline_ms, self._retries))

    async def predict(
        self,
        model: str,
        body: Buffer,
        content_type: str = "application/octet-stream",
        *,
        version: str | None = None,
        deadline_ms: float | None = None,
        priority: int | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> Result:
        """Let the model's handler decode ``body`` and answer; as ``Client.predict``."""

        def build(request_id: int) -> list[Buffer]:
            return predict_frame(
                request_id,
                model,
                body,
                content_type=content_type,
                version=version,
                deadline_ms=deadline_ms,
                priority=priority,
                params=params,
            )

        return result_of(await self._ask(build, deadline_ms, self._retries))

    async def call(
        self, method: str, args: Mapping[str, Any] | None = None, *, deadline_ms: float | None = None
    ) -> Any:
        """Return the value of a management verb. It is not repeated when the connection breaks."""

        def build(request_id: int) -> list[Buffer]:
            return call_frame(request_id, method, args, deadline_ms)

        return value_of(await self._ask(build, deadline_ms, 0))

    async def status(self) -> Any:
        """Return the daemon's status."""

        def build(request_id: int) -> list[Buffer]:
            return call_frame(request_id, "status", None, None)

        return value_of(await self._ask(build, None, self._retries))

    async def close(self) -> None:
        """Close the connection; waiting requests fail with ``UnavailableError``."""
        if self._line is not None:
            self._line.end(UnavailableError("the client was closed"))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # Inside

    async def _ask(self, build: Callable[[int], list[Buffer]], deadline_ms: float | None, retries: int) -> Frame:
        wait_s = self._timeout_s if deadline_ms is None else deadline_ms / 1000 + _GRACE_S
        request_id = next(self._ids)
        frame = build(request_id)
        broken: _BrokenError | None = None
        for _ in range(retries + 1):
            line = await self._connected()
            try:
                async with asyncio.timeout(wait_s):
                    return await line.ask(request_id, frame)
            except TimeoutError as error:
                raise DeadlineError(f"no answer within {wait_s} s") from error
            except _BrokenError as error:
                broken = error
        raise UnavailableError(f"the connection to {self._path} broke {retries + 1} times: {broken}")

    async def _connected(self) -> _Line:
        async with self._connecting:
            if self._line is None or self._line.broken is not None:
                self._line = await _connect(self._path, self._connect_timeout_s)
            return self._line


class _BrokenError(Exception):
    """The connection ended and the request had no answer."""


class _Line(asyncio.BufferedProtocol):
    """One connection: who waits for which answer."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._decoder = Decoder(ANSWER_LIMITS)
        self._scratch = memoryview(bytearray(_READ_BYTES))
        self._into_body = False
        self._waiting: dict[int, asyncio.Future[Frame]] = {}
        self._writable = asyncio.Event()
        self._writable.set()
        self.broken: Exception | None = None

    async def ask(self, request_id: int, frame: Sequence[Buffer]) -> Frame:
        """Return the answer to ``request_id``; ``_BrokenError`` if there will be none."""
        await self._writable.wait()
        if self.broken is not None:
            raise self.broken
        future: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = future
        self._write(frame)
        try:
            return await future
        except asyncio.CancelledError:
            if self.broken is None and request_id in self._waiting:
                self._write(cancel_frame(request_id))
            raise
        finally:
            self._waiting.pop(request_id, None)

    def end(self, error: Exception) -> None:
        """Fail all who wait with ``error`` and close."""
        if self.broken is None:
            self.broken = error
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(type(error)(*error.args))  # each waiter raises its own
            self._writable.set()
            self._transport.abort()

    def _write(self, frame: Sequence[Buffer]) -> None:
        if sum(len(part) for part in frame) <= _JOIN_BYTES_MAX:
            self._transport.write(b"".join(frame))
        else:
            self._transport.writelines(frame)

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but its bases

    def connection_lost(self, exc: Exception | None) -> None:
        self.end(_BrokenError(str(exc or "closed by the daemon")))

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def get_buffer(self, sizehint: int) -> memoryview:
        body = self._decoder.body_buffer()
        self._into_body = body is not None
        return self._scratch if body is None else body

    def buffer_updated(self, nbytes: int) -> None:
        try:
            if self._into_body:
                frame = self._decoder.body_filled(nbytes)
                frames: Sequence[Frame] = () if frame is None else (frame,)
            else:
                frames = self._decoder.feed(bytes(self._scratch[:nbytes]))
        except (FrameError, TooLargeError) as error:
            self.end(error)
            return
        for frame in frames:
            self._deliver(frame)

    def _deliver(self, frame: Frame) -> None:
        request_id = frame.header.get("id")
        if request_id is None:
            if frame.header["kind"] == "error":
                self.end(error_of(frame))
            return
        future = self._waiting.get(request_id)
        if future is not None and not future.done():
            future.set_result(frame)


async def _connect(path: str, timeout_s: float) -> _Line:
    """Return a connection, waiting for a daemon that is (re)starting."""
    loop = asyncio.get_running_loop()
    give_up = loop.time() + timeout_s
    backoff = Backoff(first_s=_RETRY_FIRST_S, cap_s=_RETRY_CAP_S)
    while True:
        try:
            _, line = await loop.create_unix_connection(_Line, path)
        except OSError as error:
            gone = isinstance(
                error, FileNotFoundError | ConnectionRefusedError | BlockingIOError | ConnectionResetError
            )
            if not gone or loop.time() >= give_up:
                raise UnavailableError(f"cannot reach inferd at {path}: {error.strerror or error}") from error
        else:
            return line
        await asyncio.sleep(backoff.next())
