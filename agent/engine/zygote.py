"""The daemon's side of a zygote: a process that has imported one runtime and forks workers from it.

One zygote per runtime, started at the first need. Losing it loses no worker: they leave when their own channel
closes, and the daemon, being child subreaper, collects them. Source of the idea: Android's zygote, Nginx's master.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from dataclasses import dataclass, replace
from typing import Any, Final

import msgpack

from agent.engine.cgroups import Group
from agent.engine.spawn import Spawned, spawn
from agent.errors import LoadError, UnloadableError
from agent.log import get_logger

_log = get_logger("zygote")
_PACKET_BYTES_MAX: Final = 64 * 1024
_CHANNEL_BUFFER_BYTES: Final = 1 << 20
_LEAVE_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """How a worker ended: its exit code or the signal that killed it; both ``None`` when nobody could tell."""

    code: int | None = None
    signal: int | None = None
    over_bytes: int = 0  # it reached this limit of its control group

    def __str__(self) -> str:
        if self.over_bytes:
            return f"killed at {self.over_bytes >> 20} MiB, the limit of its control group"
        if self.signal is not None:
            try:
                return f"killed by {signal.Signals(self.signal).name}"
            except ValueError:
                return f"killed by signal {self.signal}"
        return "ended for an unknown reason" if self.code is None else f"exit code {self.code}"


@dataclass(slots=True, kw_only=True)
class WorkerProcess:
    """A forked worker: the daemon owns both descriptors and closes them."""

    pid: int
    pidfd: int
    channel: socket.socket
    group: Group | None = None

    def kill(self) -> None:
        """SIGKILL without a race on the pid."""
        with contextlib.suppress(ProcessLookupError, OSError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Close both descriptors; a living worker finishes what it holds and leaves."""
        self.channel.close()
        with contextlib.suppress(OSError):
            os.close(self.pidfd)
        if self.group is not None:
            self.group.remove()


class Zygote:
    """One runtime's zygote process."""

    def __init__(
        self,
        runtime: str,
        *,
        start_timeout_s: float = 60.0,
        fork_timeout_s: float = 20.0,
        spawned: Spawned | None = None,
    ) -> None:
        """``spawned`` is its process, if that was started already."""
        self.runtime = runtime
        self._spawned = spawned
        self.runtime_version = ""
        self._start_timeout_s = start_timeout_s
        self._fork_timeout_s = fork_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._ready: asyncio.Future[None] | None = None
        self._forks: dict[int, asyncio.Future[tuple[int, int]]] = {}
        self._token = 0
        self._exits: dict[int, Exit] = {}
        self._exit_waiters: dict[int, asyncio.Future[Exit]] = {}
        self._starting = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """The process id, or ``None`` while it is not running."""
        return self._process.pid if self._process is not None and self._control is not None else None

    async def fork(self, spec: dict[str, Any], group: Group | None = None) -> WorkerProcess:
        """Fork a worker that receives ``spec`` and lives in ``group``; starts the zygote if need be.

        Raises:
            LoadError: the zygote could not be started or could not fork.
        """
        await self.start()
        control = self._control
        if control is None:
            raise LoadError(f"zygote {self.runtime} was lost")
        self._token += 1
        token = self._token
        answer: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()
        self._forks[token] = answer
        with contextlib.ExitStack() as ours_on_failure, contextlib.ExitStack() as theirs_always:
            try:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
                ours_on_failure.callback(ours.close)
                theirs_always.callback(theirs.close)
                packed = msgpack.packb(spec)
                spec_file = _memory_file(packed)
                theirs_always.callback(os.close, spec_file)
                for side in (ours, theirs):
                    side.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CHANNEL_BUFFER_BYTES)
                ours.setblocking(False)
                order = msgpack.packb({"op": "fork", "token": token, "spec_len": len(packed)})
                descriptors = [theirs.fileno(), spec_file]
                if group is not None:
                    descriptors.append(group.procs())
                    theirs_always.callback(os.close, descriptors[-1])
                socket.send_fds(control, [order], descriptors)
                ours_on_failure.callback(_end_unused, answer)
                async with asyncio.timeout(self._fork_timeout_s):
                    pid, pidfd = await answer
            except (OSError, TimeoutError) as error:
                if isinstance(error, TimeoutError) and self._process is not None:
                    self._process.kill()  # a fork takes milliseconds: it is stuck, and the next one starts another
                raise LoadError(f"zygote {self.runtime} cannot fork: {error or 'no answer'}") from error
            finally:
                self._forks.pop(token, None)
            ours_on_failure.pop_all()
        return WorkerProcess(pid=pid, pidfd=pidfd, channel=ours, group=group)

    async def exit_of(self, worker: WorkerProcess, *, timeout_s: float = 1.0) -> Exit:
        """Return how a worker whose pidfd became readable ended; the zygote reaps it, or we do after its loss."""
        ended = await self._end_of(worker, timeout_s)
        over = worker.group is not None and ended.signal == signal.SIGKILL and worker.group.killed()
        return replace(ended, over_bytes=worker.group.limit_bytes) if worker.group is not None and over else ended

    async def _end_of(self, worker: WorkerProcess, timeout_s: float) -> Exit:
        known = _reap(worker.pidfd) or self._exits.pop(worker.pid, None)
        if known is not None:
            return known
        waiter: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self._exit_waiters[worker.pid] = waiter
        try:
            async with asyncio.timeout(timeout_s):
                return await waiter
        except TimeoutError:
            return Exit()
        finally:
            self._exit_waiters.pop(worker.pid, None)

    async def stop(self) -> None:
        """Close our direction of the control channel, upon which the zygote leaves, and collect it.

        What it forks until then, because somebody had asked for it, is ended.
        """
        process, self._process = self._process, None
        if self._spawned is not None:  # never needed
            process, control = self._spawned
            control.close()
        stopped = LoadError(f"zygote {self.runtime} was stopped")
        for waiting in self._forks.values():
            if not waiting.done():
                waiting.set_exception(stopped)
        if self._control is not None:
            with contextlib.suppress(OSError):
                self._control.shutdown(socket.SHUT_WR)
        if process is not None:
            await _collect(process)
        while self._on_packet():  # what it said last
            pass
        self._lose(stopped)

    async def start(self) -> None:
        """Start the process unless it runs.

        Raises:
            LoadError: it did not become ready; the message says why.
        """
        async with self._starting:
            if self._control is not None:
                return
            if self._process is not None:
                await _collect(self._process)
            loop = asyncio.get_running_loop()
            self._ready = loop.create_future()
            try:
                self._process, self._control = self._spawned or spawn(self.runtime)
            except OSError as error:
                raise LoadError(f"zygote {self.runtime} cannot start: {error}") from error
            self._spawned = None
            loop.add_reader(self._control.fileno(), self._on_packet)
            try:
                async with asyncio.timeout(self._start_timeout_s):
                    await self._ready
            except TimeoutError as error:
                self._process.kill()
                self._lose(LoadError(f"zygote {self.runtime}: start timed out"))
                raise LoadError(f"zygote {self.runtime} was not ready within {self._start_timeout_s} s") from error
            _log.info("zygote ready", runtime=self.runtime, version=self.runtime_version, pid=self._process.pid)

    def _on_packet(self) -> bool:
        """Take one packet; ``False``: there was none."""
        control = self._control
        if control is None:
            return False
        try:
            packet, descriptors, _, _ = socket.recv_fds(control, _PACKET_BYTES_MAX, 4)
        except BlockingIOError:
            return False
        except OSError:
            packet, descriptors = b"", []
        if not packet:
            self._lose(LoadError(f"zygote {self.runtime} died"))
            return False
        self._handle(msgpack.unpackb(packet), descriptors)
        return True

    def _handle(self, message: dict[str, Any], descriptors: list[int]) -> None:
        op = message.get("op")
        if op == "ready":
            self.runtime_version = str(message.get("version", ""))
            if self._ready is not None and not self._ready.done():
                self._ready.set_result(None)
        elif op == "failed":
            kind = UnloadableError if message.get("code") == UnloadableError.code else LoadError
            self._fail_start(kind(f"zygote {self.runtime}: {message.get('message', 'could not start')}"))
        elif op == "exited":
            self._note_exit(int(message["pid"]), Exit(code=message.get("code"), signal=message.get("signal")))
        else:
            waiting = self._forks.get(message.get("token", 0))
            if waiting is None or waiting.done():
                for descriptor in descriptors:
                    _end(descriptor)
            elif op == "forked" and descriptors:
                waiting.set_result((int(message["pid"]), descriptors[0]))
            else:
                waiting.set_exception(LoadError(f"zygote {self.runtime}: {message.get('message', 'fork failed')}"))

    def _note_exit(self, pid: int, ended: Exit) -> None:
        waiter = self._exit_waiters.get(pid)
        if waiter is not None and not waiter.done():
            waiter.set_result(ended)
            return
        self._exits[pid] = ended
        while len(self._exits) > 256:
            self._exits.pop(next(iter(self._exits)))

    def _fail_start(self, error: LoadError) -> None:
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(error)

    def _lose(self, error: LoadError) -> None:
        control, self._control = self._control, None
        if control is not None:
            asyncio.get_running_loop().remove_reader(control.fileno())
            control.close()
        for waiting in (self._ready, *self._forks.values()):
            if waiting is not None and not waiting.done():
                waiting.set_exception(error)
        if self._process is not None:
            _log.warning("zygote lost; the next fork starts another", runtime=self.runtime)


def _memory_file(data: bytes) -> int:
    """Return a descriptor of an anonymous file that holds ``data``, at its start."""
    descriptor = os.memfd_create("inferd-spec", os.MFD_CLOEXEC)
    os.pwrite(descriptor, data, 0)
    return descriptor


def _end_unused(answer: asyncio.Future[tuple[int, int]]) -> None:
    """End the worker that came in the moment its caller gave up."""
    if answer.done() and not answer.cancelled() and answer.exception() is None:
        _end(answer.result()[1])


def _end(pidfd: int) -> None:
    """Kill a worker that nobody waits for: its closed channel would end it only once it has loaded."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)


def _reap(pidfd: int) -> Exit | None:
    """Collect an ended process that is our own child: a worker inherited from a lost zygote."""
    try:
        status = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except OSError:
        return None  # the living zygote's child, not ours
    if status is None:
        return None
    killed = status.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
    return Exit(signal=status.si_status) if killed else Exit(code=status.si_status)


async def _collect(process: subprocess.Popen[bytes]) -> None:
    """Wait for the process without a thread; kill it when it does not leave, and give it up when that does not help."""
    killed = False
    deadline = asyncio.get_running_loop().time() + _LEAVE_TIMEOUT_S
    while process.poll() is None:
        if asyncio.get_running_loop().time() > deadline:
            if killed:
                _log.error("zygote cannot be killed; it is left to the kernel", pid=process.pid)
                return
            process.kill()
            killed, deadline = True, deadline + _LEAVE_TIMEOUT_S
        await asyncio.sleep(0.01)


def become_subreaper() -> None:
    """Adopt workers whose zygote is lost, so that they are collected. Linux only (PR_SET_CHILD_SUBREAPER)."""
    import ctypes  # only the daemon needs it, once

    ctypes.CDLL(None, use_errno=True).prctl(36, 1, 0, 0, 0)
