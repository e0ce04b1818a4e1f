"""The one frame that applications, the daemon and workers speak. Sans-I/O: bytes in, frames out.

A frame is a fixed little-endian prefix, a MessagePack map (the header), then the body::

    0        4                 8                          16          16+H             16+H+B
    | "IFD1" | u32 H: header   | u64 B: body              | header    | body           |

The header's ``kind`` says what it is. A body holds the tensors' raw bytes back to back in the header's order
(C-contiguous, little-endian), or, when ``content_type`` is given, one raw request or answer.

====== ============================================================================ ==========================
kind   header                                                                        body
====== ============================================================================ ==========================
infer  id, model, version?, deadline_ms?, priority?, params?, content_type?,         tensors or raw request
       tensors? [{name, dtype, shape, nbytes, region?, offset?}], outputs? [name],
       reply? {region, offset, nbytes}, stream? true | "auto"
part   id, seq, tensors? | content_type, params?; of seq 0 also model, version,       tensors or raw bytes
       variant
result id, model, version, variant, tensors? | content_type, params?                 tensors or raw answer
error  id?, code, message, retryable, retry_after_s?                                 –
cancel id                                                                            –
pause  id: no more parts for now                                                     –
resume id                                                                            –
call   id, method, args, deadline_ms?                                                –
reply  id, value                                                                     –
hello  client or server, protocol, limits?                                           –
alive  id: of a worker that works on an answer                                       –
attach id, region, nbytes; one descriptor travels with the frame                     –
detach id, region                                                                    –
lane   id, model; one descriptor travels with the reply                              –
lend   id, lane, region                                                              –
bye    (on a lane: nothing more is taken)                                            –
====== ============================================================================ ==========================

A tensor with a ``region`` lies in shared memory, ``nbytes`` from ``offset``, and takes no part of the body. ``region``
is the number under which the client attached a sealed memfd. ``reply`` is a window for the outputs: what fits is
written there, each at a multiple of 64 bytes, and the result's tensors then say where.

``stream`` asks for the answer in parts, ``auto`` only if the model's handler streams. After the last part comes a
``result`` without a body, or an ``error``; a model that answers whole sends its ``result`` at once. Direct lanes carry
whole answers only.

A peer asks the same thing over and over: its headers differ in ``id`` and ``deadline_ms`` alone. A header that begins
with ``kind`` and then ``id`` as a MessagePack uint 64 (and then, if at all, ``deadline_ms`` as a uint 32) is taken
apart once by a decoder that is told to expect ``repeats``; any other order or width is as good, only slower.

Promises: every length is checked against a limit before it is allocated; bad bytes raise ``FrameError`` naming the
fault and leave the decoder unusable, so the connection must close; large bodies are received in place, not copied.
Leaves out: sockets, descriptors, NumPy (``tensors.py``), and whether a region exists and is large enough.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from mmap import mmap
from typing import Any, Final, NamedTuple

import msgpack

from agent.errors import FrameError, OverloadedError, TensorError, TooLargeError

MAGIC: Final = b"IFD1"
PREFIX: Final = struct.Struct("<4sIQ")
PROTOCOL: Final = 1

# Bytes per element; None = variable: each element is a little-endian u32 length and that many bytes.
DTYPES: Final[Mapping[str, int | None]] = {
    "bool": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "uint32": 4, "int32": 4, "uint64": 8, "int64": 8,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "bytes": None,
}  # fmt: skip

Buffer = bytes | bytearray | memoryview
REGION_NUMBER_MAX: Final = (1 << 31) - 1
PART_BYTES_MAX: Final = 1 << 20  # body of one part of a streamed answer
SHARED_ALIGN: Final = 64  # bytes; where tensors begin that we place in shared memory

# How headers that repeat begin, after the map's marker; the id's eight bytes follow.
INFER_LEAD: Final = b"\xa4kind\xa5infer\xa2id\xcf"
RESULT_LEAD: Final = b"\xa4kind\xa6result\xa2id\xcf"
_DEADLINE_LEAD: Final = b"\xabdeadline_ms\xce"  # the four bytes of its milliseconds follow
DEADLINE_MS_MAX: Final = 3_600_000  # what a client may ask for
FIRST_ID: Final = 1 << 32  # from here on MessagePack itself writes an id as uint 64

_FIXMAP: Final = 0x80
_FIXMAP_MAX: Final = 15
_REPEATED_BYTES_MAX: Final = 1024  # of a header that is kept
_RANK_MAX: Final = 16
_ELEMENTS_MAX: Final = 1 << 40
_OFFSET_MAX: Final = 1 << 63
_EMPTY: Final = memoryview(b"")
_COPIED: Final = 1 << 12  # smaller bodies are cheaper copied than viewed
_PREFIX_BYTES: Final = PREFIX.size
_MARKERS: Final = tuple(bytes((_FIXMAP + count,)) for count in range(_FIXMAP_MAX + 1))
_pack_id: Final = struct.Struct(">Q").pack
_pack_deadline: Final = struct.Struct(">I").pack
_pack_prefix: Final = PREFIX.pack
_unpack_prefix: Final = PREFIX.unpack_from
_big_endian: Final = int.from_bytes
_new_frame: Final = tuple.__new__  # half the time of the class's own constructor
_IN_PLACE: Final = 1 << 18  # bodies above this are received straight into their own buffer
_PLACED: Final = 1 << 16  # the same, where the owner has a place for them
# Larger ones get pages as bytes arrive, so that an announced length alone costs neither memory nor time. Smaller ones
# reuse the heap: a fresh page costs more than the clearing of a warm one (measured: 6 MiB in 3.3 ms against 1.2 ms).
_MAPPED: Final = 1 << 24


class Kind(StrEnum):
    """The frame kinds of protocol 1."""

    INFER = "infer"
    PART = "part"
    RESULT = "result"
    ERROR = "error"
    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    CALL = "call"
    REPLY = "reply"
    HELLO = "hello"
    ALIVE = "alive"
    ATTACH = "attach"
    DETACH = "detach"
    LANE = "lane"
    LEND = "lend"
    BYE = "bye"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one connection, in bytes and counts."""

    header_bytes_max: int = 64 * 1024
    body_bytes_max: int = 64 * 1024 * 1024
    tensors_max: int = 64


class Header(dict[str, Any]):
    """A header that may be shared by many frames, so never changed: what is derived from it is derived once.

    Attributes:
        deadline_ms: The header's own, which is not among its items.
        digest: Whatever its receiver made of it.
        pairs: Its items as MessagePack, if somebody needed them (``packed_pairs``).
    """

    __slots__ = ("deadline_ms", "digest", "pairs")

    def __init__(self, items: Mapping[str, Any], deadline_ms: Any = None) -> None:
        super().__init__(items)
        self.deadline_ms = deadline_ms
        self.digest: Any = None
        self.pairs: tuple[int, bytes] | None = None


class Frame(NamedTuple):
    """One decoded frame. ``body`` may be a view into a receive buffer: copy what must outlive the next feed.

    From a decoder with ``repeats`` the header is without ``id`` and ``deadline_ms``: they are here.
    """

    header: Header
    body: Buffer
    id: int | None = None
    deadline_ms: Any = None  # as received, unchecked


class Tensor(NamedTuple):
    """One tensor's place, ``nbytes`` bytes from ``offset``: in the body, or in a shared-memory region."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    region: int | None = None


class Window(NamedTuple):
    """Some bytes of a shared-memory region."""

    region: int
    offset: int
    nbytes: int


def encode_head(header: Mapping[str, Any], body_bytes: int = 0) -> bytes:
    """Return prefix and header of a frame whose body of ``body_bytes`` follows.

    Raises:
        FrameError: the header holds a value MessagePack cannot carry.
    """
    try:
        packed: bytes = msgpack.packb(header)
    except (TypeError, ValueError, OverflowError) as error:
        raise FrameError(f"header cannot be encoded: {error}") from error
    return PREFIX.pack(MAGIC, len(packed), body_bytes) + packed


def packed_pairs(header: Mapping[str, Any], names: Iterable[str] | None = None) -> tuple[int, bytes]:
    """Return how many items and their MessagePack, to be written after a lead; all items but kind and id by default.

    Raises:
        FrameError: a value MessagePack cannot carry, or more items than ``lead_frame`` takes.
    """
    wanted = (name for name in header if name not in ("kind", "id")) if names is None else names
    items = {name: header[name] for name in wanted if header.get(name) is not None}
    if len(items) > _FIXMAP_MAX - 3:
        raise FrameError(f"a header of {len(items)} items cannot be written after a lead")
    return len(items), encode_head(items)[PREFIX.size + 1 :]


def lead_frame(
    lead: bytes, request_id: int, pairs: tuple[int, bytes], body_bytes: int, deadline_ms: int | None = None
) -> bytes:
    """Return what ``encode_head`` would for a header that repeats, in a fifth of the time.

    Args:
        lead: ``INFER_LEAD`` or ``RESULT_LEAD``.
        request_id: From 0 below 2**63.
        pairs: From ``packed_pairs``.
        body_bytes: Length of the body that follows.
        deadline_ms: At most ``DEADLINE_MS_MAX``.
    """
    count, packed = pairs
    if deadline_ms is None:
        head = _MARKERS[count + 2] + lead + _pack_id(request_id) + packed
    else:
        head = _MARKERS[count + 3] + lead + _pack_id(request_id) + _DEADLINE_LEAD + _pack_deadline(deadline_ms) + packed
    return _pack_prefix(MAGIC, len(head), body_bytes) + head


def encode(header: Mapping[str, Any], body: Sequence[Buffer] = ()) -> list[Buffer]:
    """Return a frame as buffers for one ``sendmsg``; the body's buffers are not copied."""
    return [encode_head(header, sum(len(memoryview(part).cast("B")) for part in body)), *body]


def error_header(request_id: int | None, code: str, message: str, *, retryable: bool = False) -> dict[str, Any]:
    """Return the header of an error frame."""
    header: dict[str, Any] = {"kind": Kind.ERROR.value, "code": code, "message": message, "retryable": retryable}
    if request_id is not None:
        header["id"] = request_id
    return header


class Decoder:
    """Turn a byte stream into frames.

    Feed what was received. When ``body_buffer()`` returns a view, a large body is under way: receive straight into
    that view and tell ``body_filled(n)``; feeding also stays correct.

    Args:
        limits: Bounds of lengths.
        place: Asked where to receive a large body, by header and length; ``None`` from it: into memory of our own.
        repeats: The lead of the headers that will come again and again; see ``Header``.
        repeats_max: How many of them are kept.
    """

    __slots__ = (
        "_body", "_broken", "_filled", "_frame", "_in_place", "_known", "_lead", "_limits", "_needed", "_pending",
        "_place", "_repeats_max",
    )  # fmt: skip

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        place: Callable[[Mapping[str, Any], int], memoryview | None] | None = None,
        repeats: bytes = b"",
        repeats_max: int = 32,
    ) -> None:
        self._limits = limits or Limits()
        self._lead = repeats
        self._known: dict[bytes, Header] = {}
        self._repeats_max = repeats_max
        self._place = place
        self._in_place = _IN_PLACE if place is None else _PLACED
        self._pending = bytearray()  # start of a frame whose rest has not arrived
        self._needed = 0  # length of ``_pending`` below which looking at it again is in vain (bytes)
        self._frame: Frame | None = None  # whose large body is under way
        self._body = _EMPTY
        self._filled = 0
        self._broken = False

    @property
    def mid_frame(self) -> bool:
        """Whether a frame has begun and is not complete."""
        return bool(self._pending) or self._frame is not None

    def feed(self, data: bytes) -> list[Frame]:
        """Return the frames completed by ``data``.

        Raises:
            FrameError: bad magic, malformed header. Close the connection.
            TooLargeError: a length above its limit. Close the connection.
            OverloadedError: there is no memory for a body. Close the connection.
        """
        if self._broken:
            raise FrameError("the stream already broke the protocol")
        try:
            return self._feed(data)
        except (FrameError, TooLargeError, OverloadedError):
            self._broken = True
            raise

    def body_buffer(self) -> memoryview | None:
        """Return the unfilled rest of a large body, or ``None``."""
        return self._body[self._filled :] if self._frame is not None else None

    def body_filled(self, count: int) -> Frame | None:
        """Record ``count`` bytes received into ``body_buffer()``; return the frame if that completed it."""
        frame = self._frame
        if frame is None or not 0 <= count <= len(self._body) - self._filled:
            raise FrameError("no body of that size is under way")
        self._filled += count
        if self._filled < len(self._body):
            return None
        frame = frame._replace(body=self._body)
        self._frame, self._body, self._filled = None, _EMPTY, 0
        return frame

    def drop(self) -> None:
        """Let go of a body under way; nothing can be fed any more."""
        self._frame, self._body, self._place, self._broken = None, _EMPTY, None, True

    def _feed(self, data: bytes) -> list[Frame]:
        frames: list[Frame] = []
        if self._frame is not None:
            taken = min(len(data), len(self._body) - self._filled)
            self._body[self._filled : self._filled + taken] = data[:taken]
            done = self.body_filled(taken)
            if done is None:
                return frames
            frames.append(done)
            data = data[taken:]
        if self._pending:
            self._pending += data
            if len(self._pending) < self._needed:
                return frames
            data = bytes(self._pending)
            self._pending = bytearray()
        offset, size, needed = 0, len(data), PREFIX.size
        header_bytes_max, body_bytes_max = self._limits.header_bytes_max, self._limits.body_bytes_max
        take = self._take
        while size - offset >= _PREFIX_BYTES:
            magic, header_bytes, body_bytes = _unpack_prefix(data, offset)
            if magic != MAGIC or not 0 < header_bytes <= header_bytes_max or body_bytes > body_bytes_max:
                self._refuse(magic, header_bytes, body_bytes)
            start = offset + _PREFIX_BYTES
            body_start = start + header_bytes
            if size < body_start:
                needed = _PREFIX_BYTES + header_bytes
                break
            end = body_start + body_bytes
            if end > size:
                if body_bytes > self._in_place:
                    self._begin_body(self._take(data, start, body_start, b""), body_bytes, data[body_start:])
                    return frames
                needed = end - offset
                break
            body: Buffer = data[body_start:end] if body_bytes <= _COPIED else memoryview(data)[body_start:end]
            frames.append(take(data, start, body_start, body))
            offset = end
        if offset < size:
            self._pending = bytearray(data[offset:])
            self._needed = needed if size - offset >= PREFIX.size else 0  # a bad magic is told at once
            if self._pending[:4] != MAGIC[: len(self._pending)]:
                raise FrameError("bad magic: not an inferd frame")
        return frames

    def _begin_body(self, frame: Frame, body_bytes: int, first: bytes) -> None:
        self._frame = frame
        place = self._place(frame.header, body_bytes) if self._place is not None else None
        if place is None:
            try:
                place = memoryview(bytearray(body_bytes) if body_bytes <= _MAPPED else mmap(-1, body_bytes))
            except (MemoryError, OSError) as error:
                raise OverloadedError(f"no memory for a body of {body_bytes} bytes") from error
        self._body = place
        self._body[: len(first)] = first
        self._filled = len(first)

    def _refuse(self, magic: bytes, header_bytes: int, body_bytes: int) -> None:
        if magic != MAGIC:
            raise FrameError("bad magic: not an inferd frame")
        if not 1 <= header_bytes <= self._limits.header_bytes_max:
            raise TooLargeError(f"header of {header_bytes} bytes; the limit is {self._limits.header_bytes_max}")
        raise TooLargeError(f"body of {body_bytes} bytes; the limit is {self._limits.body_bytes_max}")

    def _take(self, data: bytes, start: int, end: int, body: Buffer) -> Frame:
        """Return the frame whose header is ``data[start:end]``."""
        lead = self._lead
        if not lead:
            header = Header(_unpack(data[start:end]))
            return Frame(header, body, header.get("id"), header.get("deadline_ms"))
        if not data.startswith(lead, start + 1) or end - start > _REPEATED_BYTES_MAX:
            return _apart(_unpack(data[start:end]), body)
        at = start + 1 + len(lead)
        rest = at + 8
        request_id, deadline_ms = _big_endian(data[at:rest], "big"), None
        if data.startswith(_DEADLINE_LEAD, rest):
            rest += len(_DEADLINE_LEAD) + 4
            deadline_ms = _big_endian(data[rest - 4 : rest], "big")
        key = data[start : start + 1] + data[rest:end]
        known = self._known.get(key)
        if known is None or request_id >> 63:
            frame = _apart(_unpack(data[start:end]), body)
            if frame.id == request_id and (deadline_ms is None or deadline_ms == frame.deadline_ms):
                self._keep(key, frame.header)
            return frame
        return _new_frame(Frame, (known, body, request_id, known.deadline_ms if deadline_ms is None else deadline_ms))

    def _keep(self, key: bytes, header: Header) -> None:
        """Keep a header for the next time. A peer that never repeats itself only makes us start over."""
        if len(self._known) >= self._repeats_max:
            self._known.clear()
        self._known[key] = header


def _unpack(packed: bytes) -> dict[str, Any]:
    try:
        header = msgpack.unpackb(packed)
    except Exception as error:  # msgpack raises half a dozen unrelated types on bad bytes
        raise FrameError(f"header is not MessagePack: {type(error).__name__}") from error
    if not isinstance(header, dict) or not isinstance(header.get("kind"), str):
        raise FrameError("header is not a map with a 'kind'")
    request_id = header.get("id")
    if request_id is not None and (type(request_id) is not int or not 0 <= request_id < 1 << 63):
        raise FrameError("'id' must be an integer from 0 below 2**63")
    return header


def _apart(items: dict[str, Any], body: Buffer) -> Frame:
    """Return a frame whose header is without id and deadline."""
    request_id, deadline_ms = items.pop("id", None), items.pop("deadline_ms", None)
    return Frame(Header(items, deadline_ms), body, request_id, deadline_ms)


def parse_tensors(entries: object, body_bytes: int, *, tensors_max: int = 64) -> tuple[Tensor, ...]:
    """Check the header's ``tensors`` against the body and return each tensor's place.

    Those with a ``region`` take nothing of the body; whether they fit their region is the caller's to check.

    Args:
        entries: The header's value, as received.
        body_bytes: Length of the body (bytes).

    Raises:
        TensorError: malformed entry, unknown dtype, size that differs from dtype x shape, sizes that do not add
            up to the body, or a ``bytes`` tensor in a region.
    """
    if not isinstance(entries, list) or len(entries) > tensors_max:
        raise TensorError(f"'tensors' must be a list of at most {tensors_max}")
    tensors, offset = [], 0
    for entry in entries:
        tensor = _parse_tensor(entry, offset)
        tensors.append(tensor)
        if tensor.region is not None:
            continue
        offset += tensor.nbytes
        if offset > body_bytes:
            raise TensorError(f"tensor {tensor.name!r} runs past the body of {body_bytes} bytes")
    if offset != body_bytes:
        raise TensorError(f"tensors hold {offset} bytes, the body {body_bytes}")
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise TensorError("two tensors have the same name")
    return tuple(tensors)


def tensor_entries(tensors: Iterable[tuple[str, str, Sequence[int], int]]) -> list[dict[str, Any]]:
    """Return header entries for ``(name, dtype, shape, nbytes)``."""
    return [
        {"name": name, "dtype": dtype, "shape": list(shape), "nbytes": nbytes} for name, dtype, shape, nbytes in tensors
    ]


def parse_window(value: object) -> Window:
    """Return a header's ``{region, offset, nbytes}``.

    Raises:
        TensorError: malformed, or a number out of range.
    """
    if not isinstance(value, dict):
        raise TensorError("a window must be a map of region, offset and nbytes")
    nbytes = value.get("nbytes")
    if type(nbytes) is not int or not 0 <= nbytes < _OFFSET_MAX:
        raise TensorError("a window's nbytes must be an integer from 0")
    return Window(parse_region(value.get("region")), _parse_offset(value.get("offset")), nbytes)


def parse_region(value: object) -> int:
    """Return a region's number; ``TensorError`` unless it is an integer from 0 below 2**31."""
    if type(value) is not int or not 0 <= value <= REGION_NUMBER_MAX:
        raise TensorError("'region' must be an integer from 0 below 2**31")
    return value


def _parse_offset(value: object) -> int:
    if type(value) is not int or not 0 <= value < _OFFSET_MAX:
        raise TensorError("'offset' must be an integer from 0 below 2**63")
    return value


def _parse_tensor(entry: object, offset: int) -> Tensor:
    if not isinstance(entry, dict):
        raise TensorError("a tensor entry must be a map")
    name, dtype, shape, nbytes = entry.get("name"), entry.get("dtype"), entry.get("shape"), entry.get("nbytes")
    if not isinstance(name, str) or not 0 < len(name) <= 256:
        raise TensorError("a tensor's name must be a text of 1..256 characters")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise TensorError(f"tensor {name!r}: unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > _RANK_MAX or not all(type(n) is int and n >= 0 for n in shape):
        raise TensorError(f"tensor {name!r}: shape must be a list of at most {_RANK_MAX} integers from 0")
    if type(nbytes) is not int or nbytes < 0:
        raise TensorError(f"tensor {name!r}: nbytes must be an integer from 0")
    elements = prod(shape)
    if elements > _ELEMENTS_MAX or (not elements and prod(filter(None, shape)) > _ELEMENTS_MAX):  # NumPy's bound too
        raise TensorError(f"tensor {name!r}: shape {shape} is too large")
    width = DTYPES[dtype]
    if width is not None and elements * width != nbytes:
        raise TensorError(f"tensor {name!r}: {dtype}{shape} takes {elements * width} bytes, not {nbytes}")
    if "region" not in entry:
        return Tensor(name, dtype, tuple(shape), offset, nbytes)
    if width is None:  # its lengths are parsed, and shared memory may change meanwhile
        raise TensorError(f"tensor {name!r}: a bytes tensor cannot lie in shared memory")
    return Tensor(name, dtype, tuple(shape), _parse_offset(entry.get("offset")), nbytes, parse_region(entry["region"]))
