"""A daemon of a few lines that grants lanes: for clients and generators that want one."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.wire import Decoder, encode


@dataclass
class LaneServer:
    """What it was asked, and where the answers came from."""

    path: Path
    grants: bool = True
    silent_for: str = ""  # a model whose wish for a lane gets no answer until the next model's
    revoke_after: int = 0  # answers on a lane before it says ``bye``; 0: never
    answered: dict[str, int] = field(default_factory=lambda: {"frames": 0, "lane": 0})
    lanes: int = 0
    asked_by: dict[str, set[str]] = field(default_factory=dict)  # which models were asked for on whose lane
    unanswered: list[dict[str, Any]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def serve(self, sock: socket.socket, where: str, of: str = "") -> None:
        """Answer one connection until it ends; a lane is that ``of`` a model."""
        decoder, here = Decoder(), 0
        with sock, suppress(OSError):
            while data := sock.recv(1 << 16):
                for frame in decoder.feed(data):
                    header = frame.header
                    if header["kind"] == "lane" and where == "frames":
                        self._lane(sock, header)
                        continue
                    if header["kind"] == "cancel":
                        continue
                    _send(sock, {"kind": "result", "id": header["id"], "model": header["model"], "tensors": []})
                    here += 1
                    with self._lock:
                        self.answered[where] += 1
                        self.asked_by.setdefault(of, set()).add(header["model"])
                    if where == "lane" and here == self.revoke_after:
                        _send(sock, {"kind": "bye"})

    def _lane(self, sock: socket.socket, header: dict[str, Any]) -> None:
        if not self.grants:
            refusal = {"kind": "error", "id": header["id"], "code": "forbidden", "message": "no lanes here"}
            _send(sock, {**refusal, "retryable": False})
            return
        if header["model"] == self.silent_for:
            self.unanswered.append(header)
            return
        late, self.unanswered = self.unanswered, []
        for one in (*late, header):
            self._grant(sock, one)

    def _grant(self, sock: socket.socket, header: dict[str, Any]) -> None:
        ours, theirs = socket.socketpair()
        with self._lock:
            self.lanes += 1
        threading.Thread(target=self.serve, args=(ours, "lane", header["model"]), daemon=True).start()
        reply = {"kind": "reply", "id": header["id"], "value": {"lane": self.lanes}}
        socket.send_fds(sock, [b"".join(bytes(part) for part in encode(reply))], [theirs.fileno()])
        theirs.close()


@contextmanager
def lane_server(path: Path, **options: Any) -> Iterator[LaneServer]:
    """Serve on ``path`` in threads."""
    server = LaneServer(path, **options)

    def accept(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=server.serve, args=(listener.accept()[0], "frames"), daemon=True).start()

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        try:
            yield server
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def _send(sock: socket.socket, header: dict[str, Any]) -> None:
    sock.sendall(b"".join(bytes(part) for part in encode(header)))
