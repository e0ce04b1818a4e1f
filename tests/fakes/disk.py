"""A disk at every moment at which the power could have gone, made from what processes really did to it.

``record`` runs a command under strace and reads each call that changes a folder: writes, sizes, names, modes and syncs,
of every thread and child. ``Recording.after`` gives the folder as a cut after the first n changes could leave it: what
was synced is there; of the rest any part, in any combination, is there, missing, torn at sectors, or a hole of zeros.
That is more than any one file system does. A name counts as synced with its folder, bytes and size with their file, a
rename with the folder it leads to.

The recording is checked against the folder that the command left behind, so that nothing it did is overlooked. Memory
that is mapped for writing cannot be seen this way; only SQLite's ``-shm`` may be, which a restart never reads.
"""

from __future__ import annotations

import os
import random
import re
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

SECTOR = 512
_CALLS = (
    "open,openat,creat,write,pwrite64,writev,pwritev,pwritev2,lseek,fsync,fdatasync,sync,syncfs,sync_file_range,rename,"
    "renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,mkdir,mkdirat,rmdir,truncate,ftruncate,fallocate,"
    "chmod,fchmod,fchmodat,copy_file_range,sendfile,splice,mmap,mknod,mknodat,ioctl"
)
_LINE = re.compile(r"(\d+) +(.*)")
_CALL = re.compile(r"(\w+)\((.*)\) += (-?\d+|0x[0-9a-f]+)")
_DESCRIPTOR = re.compile(r"(?:\d+|AT_FDCWD)<([^>]*)>(\(deleted\))?")
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>(.*)")
_UNFINISHED = " <unfinished ...>"
_ROOT = 0


class UnseenError(AssertionError):
    """The processes changed the folder in a way the recorder does not follow."""


class Fate(Enum):
    """What a cut made of a change that was not synced."""

    THERE = 0
    MISSING = 1
    TORN = 2
    ZEROS = 3


@dataclass(slots=True)
class Node:
    """A file or folder, whatever names lead to it."""

    folder: bool
    mode: int
    data: bytearray = field(default_factory=bytearray)
    entries: dict[str, int] = field(default_factory=dict)

    def copy(self) -> Node:
        return Node(self.folder, self.mode, bytearray(self.data), dict(self.entries))


class Disk:
    """Nodes by number; 0 is the folder itself."""

    def __init__(self, nodes: dict[int, Node]) -> None:
        self.nodes = nodes

    @classmethod
    def read(cls, folder: Path) -> Disk:
        """Return what is in ``folder``."""
        nodes: dict[int, Node] = {}

        def add(path: Path) -> int:
            number = len(nodes)
            mode = stat.S_IMODE(path.lstat().st_mode)
            nodes[number] = node = Node(path.is_dir(), mode)
            if node.folder:
                for child in sorted(path.iterdir()):
                    node.entries[child.name] = add(child)
            else:
                node.data += path.read_bytes()
            return number

        add(folder)
        return cls(nodes)

    def write(self, folder: Path) -> None:
        """Create ``folder`` with what is on this disk."""

        def put(path: Path, node: Node) -> None:
            if node.folder:
                path.mkdir()
                for name, number in node.entries.items():
                    put(path / name, self.nodes[number])
            else:
                path.write_bytes(node.data)
            path.chmod(node.mode)

        put(folder, self.nodes[_ROOT])

    def copy(self) -> Disk:
        return Disk({number: node.copy() for number, node in self.nodes.items()})

    def digest(self) -> bytes:
        """Return a hash that is the same for equal names, modes and bytes."""
        hasher = sha256()
        for path, node in self.walk():
            hasher.update(f"{path}\0{node.mode}\0{len(node.data)}\0".encode())
            hasher.update(node.data)
        return hasher.digest()

    def walk(self, number: int = _ROOT, prefix: str = "") -> Iterator[tuple[str, Node]]:
        """Yield every path with its node."""
        node = self.nodes[number]
        yield prefix, node
        for name in sorted(node.entries):
            yield from self.walk(node.entries[name], f"{prefix}/{name}")

    def find(self, path: str) -> int | None:
        """Return the number of the node at ``path``, relative with ``/``."""
        number = _ROOT
        for part in path.split("/") if path else ():
            found = self.nodes[number].entries.get(part)
            if found is None:
                return None
            number = found
        return number


@dataclass(frozen=True, slots=True)
class Change:
    """One change. ``owner`` is the node whose sync makes it durable."""

    owner: int
    data_only: ClassVar[bool] = True  # fdatasync is enough
    tearable: ClassVar[bool] = False

    def apply(self, disk: Disk, fate: Fate, rng: random.Random) -> None:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Link(Change):
    """A new name."""

    name: str
    node: int

    def apply(self, disk: Disk, fate: Fate, rng: random.Random) -> None:
        disk.nodes[self.owner].entries[self.name] = self.node


@dataclass(frozen=True, slots=True)
class Unlink(Change):
    """A name less."""

    name: str
    node: int

    def apply(self, disk: Disk, fate: Fate, rng: random.Random) -> None:
        if disk.nodes[self.owner].entries.get(self.name) == self.node:
            del disk.nodes[self.owner].entries[self.name]


@dataclass(frozen=True, slots=True)
class Move(Change):
    """A rename into ``owner``, in one step."""

    name: str
    node: int
    source: int
    source_name: str

    def apply(self, disk: Disk, fate: Fate, rng: random.Random) -> None:
        if disk.nodes[self.source].entries.get(self.source_name) == self.node:
            del disk.nodes[self.source].entries[self.source_name]
        disk.nodes[self.owner].entries[self.name] = self.node


@dataclass(frozen=True, slots=True)
class Swap(Change):
    """Two names exchange their nodes, in one step."""

    name: str
    node: int  # that ``name`` leads to afterwards
    other: int
    other_name: str
    other_node: int

    def apply(self, disk: Disk, fate: Fate, rng: random.Random) -> None:
        disk.nodes[self.owner].entries[self.name] = self.node
        disk.nodes[self.other].entries[self.other_name] = self.other_node


@dataclass(frozen=True, slots=True)
class Write(Change):
    """Bytes at an offset."""

    tearable: ClassVar[bool] = True
    offset: int
    data: bytes

    def apply(self, disk: Disk, fate: Fate, rng: random.Random) -> None:
        target = disk.nodes[self.owner].data
        end = self.offset + len(self.data)
        if fate is Fate.TORN:
            edges = [*range(self.offset - self.offset % SECTOR, end, SECTOR), end]
            for begin, stop in pairwise(edges):
                if rng.random() < 0.5:
                    _put(target, max(begin, self.offset), self.data[max(begin - self.offset, 0) : stop - self.offset])
        else:
            _put(target, self.offset, bytes(len(self.data)) if fate is Fate.ZEROS else self.data)


@dataclass(frozen=True, slots=True)
class Resize(Change):
    """Another size; ``grow`` leaves a longer file as it is."""

    size: int
    grow: bool = False

    def apply(self, disk: Disk, fate: Fate, rng: random.Random) -> None:
        target = disk.nodes[self.owner].data
        if len(target) < self.size:
            target += bytes(self.size - len(target))
        elif not self.grow:
            del target[self.size :]


@dataclass(frozen=True, slots=True)
class Mode(Change):
    """Other permissions."""

    data_only: ClassVar[bool] = False
    mode: int

    def apply(self, disk: Disk, fate: Fate, rng: random.Random) -> None:
        disk.nodes[self.owner].mode = self.mode


class Recording:
    """What a command did to a folder."""

    def __init__(self, base: Disk) -> None:
        self.base = base
        self.changes: list[Change] = []
        self.durable_from: list[float] = []  # number of changes done when it became durable
        self.syncs = 0

    def add(self, change: Change) -> None:
        self.changes.append(change)
        self.durable_from.append(float("inf"))

    def sync(self, node: int, *, covers: int, data_only: bool) -> None:
        """Make the first ``covers`` changes of ``node`` durable from now on."""
        self.syncs += 1
        for number in range(covers):
            change = self.changes[number]
            if change.owner == node and (change.data_only or not data_only):
                self.durable_from[number] = min(self.durable_from[number], len(self.changes))

    def pending(self, count: int) -> list[int]:
        """Return which of the first ``count`` changes a cut may still undo."""
        return [number for number in range(count) if self.durable_from[number] > count]

    def after(self, count: int, fates: Mapping[int, Fate], rng: random.Random) -> Disk:
        """Return the disk after a cut that came when ``count`` changes were made."""
        disk = self.base.copy()
        for number in range(count):
            fate = fates.get(number, Fate.THERE)
            if fate is not Fate.MISSING:
                self.changes[number].apply(disk, fate, rng)
        return disk


def record(folder: Path, command: Sequence[str], *, cwd: Path, log: Path, timeout_s: float = 180.0) -> Recording:
    """Run ``command`` and return what it and its children did to ``folder``.

    Raises:
        UnseenError: it was changed in a way that cannot be replayed.
    """
    base = Disk.read(folder)
    trace = ["strace", "-f", "--seccomp-bpf", "-y", "-xx", "-s", "100000000", "-o", str(log), "-e", f"trace={_CALLS}"]
    outcome = subprocess.run(
        [*trace, *command], cwd=cwd, timeout=timeout_s, check=False, capture_output=True, text=True
    )
    if outcome.returncode:
        raise AssertionError(f"the recorded command ended with {outcome.returncode}: {outcome.stderr[-2000:]}")
    recorder = _Recorder(folder, base)
    with log.open(encoding="ascii") as lines:
        for line in lines:
            recorder.read(line.rstrip("\n"))
    recorder.compare(folder)
    return recorder.recording


class _Recorder:
    """Follows the calls of a trace in the order in which they ended."""

    def __init__(self, folder: Path, base: Disk) -> None:
        self.recording = Recording(base)
        self._root = str(folder)
        self._now = base.copy()
        self._next = len(base.nodes)
        self._unfinished: dict[str, tuple[str, int]] = {}
        self._position: dict[int, int] = {}
        self._rng = random.Random(0)
        self._readers: dict[str, Callable[[list[str], int, int], None]] = {
            **dict.fromkeys(("open", "openat", "creat"), self._open),
            **dict.fromkeys(("write", "pwrite64"), self._write),
            **dict.fromkeys(("fsync", "fdatasync"), lambda args, result, covers: None),
            **dict.fromkeys(("rename", "renameat", "renameat2"), self._rename),
            **dict.fromkeys(("unlink", "unlinkat", "rmdir"), self._unlink),
            **dict.fromkeys(("mkdir", "mkdirat"), self._mkdir),
            **dict.fromkeys(("truncate", "ftruncate"), self._truncate),
            **dict.fromkeys(("chmod", "fchmod", "fchmodat"), self._chmod),
            "fallocate": self._allocate,
            "copy_file_range": self._copy,
            "lseek": self._seek,
            "mmap": self._map,
        }

    def read(self, line: str) -> None:
        match = _LINE.fullmatch(line)
        if match is None:
            return
        thread, text = match.groups()
        covers = len(self.recording.changes)
        if text.endswith(_UNFINISHED):
            self._unfinished[thread] = text.removesuffix(_UNFINISHED), covers
            return
        if resumed := _RESUMED.fullmatch(text):
            begun, covers = self._unfinished.pop(thread)
            text = begun + resumed.group(1)
        call = _CALL.match(text)
        if call is None or call.group(3).startswith("-"):
            return
        name, arguments, result = call.group(1), call.group(2).split(", "), int(call.group(3), 0)
        if name in ("fsync", "fdatasync"):
            node = self._node_of(arguments[0])
            if node is not None:
                self.recording.sync(node, covers=covers, data_only=name == "fdatasync")
        elif name in self._readers:
            self._readers[name](arguments, result, covers)
        elif name != "ioctl" or "FICLONE" in call.group(2):
            self._refuse(name, arguments)

    def compare(self, folder: Path) -> None:
        """Check that following the calls led to what is really there."""
        seen = {path: (node.mode, bytes(node.data)) for path, node in self._now.walk()}
        real = {path: (node.mode, bytes(node.data)) for path, node in Disk.read(folder).walk()}
        wrong = sorted(path for path in seen.keys() | real.keys() if seen.get(path) != real.get(path))
        if wrong:
            raise UnseenError(f"the recording does not lead to what is on disk: {wrong[:5]}")

    def _do(self, change: Change) -> None:
        self.recording.add(change)
        change.apply(self._now, Fate.THERE, self._rng)

    def _open(self, arguments: list[str], result: int, covers: int) -> None:
        if "<" in arguments[0]:
            path, flags = self._path(arguments[0], arguments[1]), arguments[2:]
        else:
            path, flags = self._path("", arguments[0]), arguments[1:]
        if path is None or not flags or "O_DIRECTORY" in flags[0]:
            return
        number = self._now.find(path)
        if number is None:
            number = self._create(path, folder=False, mode=int(flags[1], 8) if len(flags) > 1 else 0o600)
        elif "O_TRUNC" in flags[0] and self._now.nodes[number].data:
            self._do(Resize(number, 0))
        self._position[number] = len(self._now.nodes[number].data) if "O_APPEND" in flags[0] else 0

    def _create(self, path: str, *, folder: bool, mode: int) -> int:
        number, self._next = self._next, self._next + 1
        node = Node(folder, mode & ~0o022)
        for disk in (self._now, self.recording.base):
            disk.nodes[number] = node.copy()
        parent, name = self._parent(path)
        self._do(Link(parent, name, number))
        return number

    def _write(self, arguments: list[str], result: int, covers: int) -> None:
        node = self._node_of(arguments[0])
        if node is None or result == 0:
            return
        data = _text(arguments[1])[:result]
        if len(arguments) > 3:
            offset = int(arguments[3])
        else:
            offset = self._position.get(node, 0)
            self._position[node] = offset + result
        self._do(Write(node, offset, data))

    def _copy(self, arguments: list[str], result: int, covers: int) -> None:
        source, target = self._node_of(arguments[0]), self._node_of(arguments[2])
        if target is None or result == 0:
            return
        if source is None or "NULL" in (arguments[1], arguments[3]):
            raise UnseenError(f"copy_file_range from {arguments[:2]}")
        begin, offset = (int(arguments[number].strip("[]").split()[0]) for number in (1, 3))
        self._do(Write(target, offset, bytes(self._now.nodes[source].data[begin : begin + result])))

    def _seek(self, arguments: list[str], result: int, covers: int) -> None:
        node = self._node_of(arguments[0])
        if node is not None:
            self._position[node] = result

    def _rename(self, arguments: list[str], result: int, covers: int) -> None:
        if "<" in arguments[0]:
            paths = self._path(arguments[0], arguments[1]), self._path(arguments[2], arguments[3])
        else:
            paths = self._path("", arguments[0]), self._path("", arguments[1])
        if paths == (None, None):
            return
        if paths[0] is None or paths[1] is None:
            raise UnseenError(f"a rename into or out of the folder: {arguments}")
        (source, old), (target, new) = self._parent(paths[0]), self._parent(paths[1])
        node = self._now.nodes[source].entries[old]
        if arguments[-1] == "RENAME_EXCHANGE":
            self._do(Swap(target, new, node, source, old, self._now.nodes[target].entries[new]))
        else:
            self._do(Move(target, new, node, source, old))

    def _unlink(self, arguments: list[str], result: int, covers: int) -> None:
        path = self._path(*arguments[:2]) if "<" in arguments[0] else self._path("", arguments[0])
        if path is not None:
            parent, name = self._parent(path)
            self._do(Unlink(parent, name, self._now.nodes[parent].entries[name]))

    def _mkdir(self, arguments: list[str], result: int, covers: int) -> None:
        path = self._path(*arguments[:2]) if "<" in arguments[0] else self._path("", arguments[0])
        if path is not None:
            self._create(path, folder=True, mode=int(arguments[-1], 8))

    def _truncate(self, arguments: list[str], result: int, covers: int) -> None:
        node = self._node_of(arguments[0])
        if node is not None:
            self._do(Resize(node, int(arguments[1])))

    def _allocate(self, arguments: list[str], result: int, covers: int) -> None:
        node = self._node_of(arguments[0])
        if node is not None:
            if arguments[1] != "0":
                raise UnseenError(f"fallocate with mode {arguments[1]}")
            self._do(Resize(node, int(arguments[2]) + int(arguments[3]), grow=True))

    def _chmod(self, arguments: list[str], result: int, covers: int) -> None:
        if len(arguments) > 2:
            path = self._path(arguments[0], arguments[1])
            node = None if path is None else self._now.find(path)
        else:
            node = self._node_of(arguments[0])
        if node is not None:
            self._do(Mode(node, int(next(part for part in arguments[1:] if part.isdigit()), 8)))

    def _map(self, arguments: list[str], result: int, covers: int) -> None:
        if "PROT_WRITE" in arguments[2] and "MAP_SHARED" in arguments[3] and "<" in arguments[4]:
            path = self._inside(_DESCRIPTOR.match(arguments[4]))
            if path is not None and not path.endswith("-shm"):
                raise UnseenError(f"{path} is mapped for writing")

    def _refuse(self, name: str, arguments: list[str]) -> None:
        for argument in arguments:
            match = _DESCRIPTOR.match(argument)
            found = self._inside(match) if match else self._path("", argument) if argument.startswith('"') else None
            if found is not None:
                raise UnseenError(f"{name} on {found!r} is not followed")

    def _node_of(self, argument: str) -> int | None:
        """Return the node of a descriptor or a path; ``None`` outside the folder or without a name left."""
        match = _DESCRIPTOR.match(argument)
        if match is not None and match.group(2):
            return None
        path = self._inside(match) if match else self._path("", argument)
        return None if path is None else self._now.find(path)

    def _inside(self, match: re.Match[str] | None) -> str | None:
        return None if match is None else self._relative(_text(match.group(1)).decode())

    def _path(self, folder: str, argument: str) -> str | None:
        path = _text(argument).decode()
        match = _DESCRIPTOR.match(folder)
        if match is not None:
            path = os.path.join(_text(match.group(1)).decode(), path)
        return self._relative(path)

    def _relative(self, path: str) -> str | None:
        path = os.path.normpath(path)
        if path == self._root:
            return ""
        return path.removeprefix(f"{self._root}/") if path.startswith(f"{self._root}/") else None

    def _parent(self, path: str) -> tuple[int, str]:
        folder, _, name = path.rpartition("/")
        number = self._now.find(folder)
        assert number is not None, path
        return number, name


def _text(argument: str) -> bytes:
    return bytes.fromhex(argument.strip('"').replace("\\x", ""))


def _put(target: bytearray, offset: int, data: bytes) -> None:
    if len(target) < offset:
        target += bytes(offset - len(target))
    target[offset : offset + len(data)] = data
