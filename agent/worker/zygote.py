"""The warm pool: a process that has imported one runtime and forks a worker on request.

``python -m agent.worker.zygote --runtime onnx --control-fd N`` speaks MessagePack maps, one per packet, over the
SOCK_SEQPACKET socket N. Up: ``ready``, ``forked`` (with the child's pidfd), ``fork_failed``, ``exited``, or ``failed``
instead of ``ready``. Down: ``fork`` with two descriptors, the worker's channel and a memfd that holds its spec, and
maybe a third, the ``cgroup.procs`` of the control group that the worker enters first of all.

It imports and nothing else: no session, no operator, no thread, so that every fork is clean. Promises: it leaves when
its control closes; its workers live on with the daemon (hence no PR_SET_PDEATHSIG), but where the daemon has died it
stays for a moment and kills those that hang; each child holds its channel, its standard error and nothing more of ours;
SIGINT and SIGTERM, which a terminal or systemd send to a whole group, are the daemon's to act on and ignored here and
in the children.
Leaves out: why a worker is wanted, and for how long.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any, Final, NoReturn

import msgpack

from agent.errors import LoadError

_PACKET_BYTES_MAX: Final = 64 * 1024
_SPEC_BYTES_MAX: Final = 4 * 1024 * 1024
_CHANNEL_FD: Final = 3
_PR_SET_NAME: Final = 15
_NOTICE_S: Final = 1.0  # a dying daemon's descriptors close before its death is told
_LEAVE_S: Final = 2.0  # for workers of a dead daemon: what they still answer, nobody takes
_ENVIRONMENT_KEPT: Final = frozenset(
    (
        *("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "CUDA_VISIBLE_DEVICES"),
        *("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"),
    )
)
# Read by numeric libraries when they are imported: no thread pools (a session brings its own), and no telemetry of
# theirs. ONNX Runtime's wheels report to their maker by default since 1.29, from a thread started by the import.
_LIBRARIES: Final = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "ORT_DISABLE_TELEMETRY": "1",
}


class Zygote:
    """The loop: orders in, children out, deaths reported."""

    def __init__(self, control: socket.socket, daemon: int) -> None:
        self._control = control
        self._daemon = daemon  # pidfd
        self._children: dict[int, int] = {}  # pidfd: pid
        self._poll = select.epoll()
        self._poll.register(control, select.EPOLLIN)

    def send(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Send one packet; a control that is gone is noticed by ``serve``."""
        with contextlib.suppress(ConnectionError):
            socket.send_fds(self._control, [msgpack.packb(message)], list(descriptors))

    def serve(self) -> None:
        """Obey until the control closes."""
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor in self._children:
                    self._bury(descriptor)
                elif not self._obey():
                    return

    def outlast(self) -> None:
        """After ``serve``: see the workers of a dead daemon out; a living one does that itself."""
        self._poll.unregister(self._control)
        self._poll.register(self._daemon, select.EPOLLIN)
        dead, deadline = False, time.monotonic() + _NOTICE_S
        while self._children and (left_s := deadline - time.monotonic()) > 0:
            for pidfd, _ in self._poll.poll(left_s):
                if pidfd in self._children:
                    self._bury(pidfd)
                else:
                    self._poll.unregister(pidfd)
                    dead, deadline = True, time.monotonic() + _LEAVE_S
        for pidfd in self._children if dead else ():
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    def _obey(self) -> bool:
        try:
            packet, descriptors, _, _ = socket.recv_fds(self._control, _PACKET_BYTES_MAX, 8, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            return False
        if not packet:
            return False
        token = None
        try:
            order = msgpack.unpackb(packet)
            token = order.get("token")
            self._fork(order, descriptors)
        except (OSError, ValueError, AttributeError, msgpack.UnpackException) as error:
            self.send({"op": "fork_failed", "token": token, "message": f"{type(error).__name__}: {error}"})
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _fork(self, order: dict[str, Any], descriptors: Sequence[int]) -> None:
        spec_bytes = order.get("spec_len")
        if order.get("op") != "fork" or type(order.get("token")) is not int:
            raise ValueError("not a fork order")
        if type(spec_bytes) is not int or not 0 < spec_bytes <= _SPEC_BYTES_MAX or len(descriptors) not in (2, 3):
            raise ValueError(f"a fork order needs a channel, a spec and its length up to {_SPEC_BYTES_MAX}")
        channel, spec, *group = descriptors
        pid = os.fork()
        if pid == 0:
            self._become_worker(channel, spec, spec_bytes, group)
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = pid
        self._poll.register(pidfd, select.EPOLLIN)
        self.send({"op": "forked", "token": order["token"], "pid": pid}, [pidfd])

    def _become_worker(self, channel: int, spec: int, spec_bytes: int, group: Sequence[int]) -> NoReturn:
        """Be the child: keep the channel and standard error, then live as a worker and never return."""
        code = 70
        try:
            from agent.worker import main  # imported long ago, by the zygote

            for procs in group:
                os.write(procs, b"0")
            self._poll.close()
            self._control.detach()
            packed = os.pread(spec, spec_bytes, 0)
            _keep_only(channel)
            _set_name("inferd-worker")
            code = main.run(packed, socket.socket(fileno=_CHANNEL_FD))
        except BaseException:  # noqa: BLE001  nothing may unwind into the zygote's own frames
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _bury(self, pidfd: int) -> None:
        pid = self._children.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        ended = os.waitstatus_to_exitcode(status)
        self.send(
            {
                "op": "exited",
                "pid": pid,
                "code": max(ended, 0) if ended >= 0 else None,
                "signal": -ended if ended < 0 else None,
            }
        )


def main() -> int:
    """Run a zygote; return its exit code."""
    arguments = argparse.ArgumentParser(prog="agent.worker.zygote", description="Fork workers of one runtime.")
    arguments.add_argument("--runtime", required=True)
    arguments.add_argument("--control-fd", required=True, type=int)
    options = arguments.parse_args()
    _scrub_environment()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.set_inheritable(options.control_fd, False)
    zygote = Zygote(socket.socket(fileno=options.control_fd), os.pidfd_open(os.getppid()))
    try:
        version = _preload(options.runtime)
    except LoadError as error:
        zygote.send({"op": "failed", "code": error.code, "message": str(error)})
        return 1
    _set_name("inferd-zygote")
    zygote.send({"op": "ready", "runtime": options.runtime, "pid": os.getpid(), "version": version})
    zygote.serve()
    zygote.outlast()
    return 0


def _preload(runtime: str) -> str:
    """Import all that a worker needs; return the runtime's version."""
    os.environ.update(_LIBRARIES)
    from agent.worker import main as _worker_main  # noqa: F401  for the children
    from agent.worker.runtimes import table
    from handlers import registry

    entry = table.by_zygote(runtime)
    table.preload(entry)
    for handler_id in registry.BUILT_IN:
        registry.find(handler_id)
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise LoadError(f"importing {entry.library} started {threads - 1} threads: no fork of it would be safe")
    gc.collect()
    gc.freeze()
    return str(getattr(sys.modules[entry.library], "__version__", ""))


def _scrub_environment() -> None:
    """Start over without what a worker must not see: clearing ``os.environ`` would leave /proc/self/environ full."""
    kept = {name: value for name, value in os.environ.items() if name in _ENVIRONMENT_KEPT}
    if len(kept) < len(os.environ):
        os.set_inheritable(int(sys.argv[sys.argv.index("--control-fd") + 1]), True)
        os.execve(sys.executable, sys.orig_argv, kept)


def _keep_only(channel: int) -> None:
    """Leave standard input empty, output and error on the zygote's error, the channel at 3, and nothing else open."""
    os.dup2(channel, _CHANNEL_FD, inheritable=False)
    os.closerange(_CHANNEL_FD + 1, os.sysconf("SC_OPEN_MAX"))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)


def _set_name(name: str) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
