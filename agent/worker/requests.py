"""From an ``infer`` frame to checked model inputs, and from the model's outputs to the answer.

The four forms of a request, by ``content_type``:

- none: tensors as the wire carries them, or lying in shared memory, straight to the model;
- ``application/vnd.oip+json``: the Open Inference Protocol, JSON or binary (``codecs.py``);
- ``application/vnd.triton.generate+json``: a document of Triton's generate extension, for the bundle's handler;
- any other: raw bytes, which the bundle's handler turns into tensors and back.

Promises: what comes out of ``decode`` fits the signature; whatever a handler raises is a ``HandlerError`` naming it,
or an ``InvalidInputError`` if the handler blames the input (or made more rows of it than the model takes).
Shared memory may change while it is looked at. So sizes and lengths are never read from it, and values that models
use as positions (integers of 32 and 64 bits, truth values) are copied before the runtime checks them.
Leaves out: queueing, running, sending.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

import numpy as np

from agent import tensors
from agent.errors import AgentError, HandlerError, InvalidInputError, OutOfMemoryError, TensorError, WorkerError
from agent.tensors import Array, as_array, dtype_name
from agent.wire import SHARED_ALIGN, Buffer, Tensor, Window, parse_tensors, parse_window
from agent.worker import codecs
from agent.worker.batcher import LEVEL_DEFAULT, LEVEL_FIRST, LEVEL_LAST
from agent.worker.regions import Named, Region
from agent.worker.signature import Signature
from handlers.base import TEXT, Handler, InputError, Prepared, Reply, StreamingHandler

OIP_CONTENT_TYPE: Final = "application/vnd.oip+json"
GENERATE_CONTENT_TYPE: Final = "application/vnd.triton.generate+json"
_JSON: Final = "application/json"
_FOREVER: Final = float("inf")
_LAYOUTS_MAX: Final = 256  # remembered per model
_WINDOWED_BYTES_MIN: Final = 64 * 1024
_POSITIONS: Final = frozenset({"bool", "int32", "uint32", "int64", "uint64"})

Answer = tuple[dict[str, Any], list[Buffer]]  # header fields beside kind and id, and the body


class Place(NamedTuple):
    """Where an input lies in shared memory, if it was not copied from there."""

    region: Region
    offset: int
    nbytes: int


class Request:
    """One ``infer`` frame on its way through the worker; what the batcher reads is set by ``prepare``."""

    __slots__ = (
        "arrived", "body", "deadline", "echo", "form", "header", "id", "inputs", "key", "level", "places", "regions",
        "rows", "state", "window",
    )  # fmt: skip

    def __init__(self, header: dict[str, Any], body: Buffer, form: Form, now: float) -> None:
        self.id: int = header["id"]
        self.header = header
        self.body = body
        self.form = form
        self.arrived = now
        self.deadline = now + _budget_s(header)
        self.level = _level(header)
        self.rows = 0
        self.key: Hashable = None
        self.inputs: Mapping[str, Array] = {}
        self.regions: Named | None = None  # shared memory the request names
        self.window: memoryview | None = None  # where the daemon takes a large answer from
        self.places: Mapping[str, Place] | None = None  # of inputs that are used where they lie
        self.state: Any = None  # whatever the form needs for the answer
        self.echo: Any = None  # the caller's own name of the request, where its form repeats that in the answer

    def prepare(self, signature: Signature) -> None:
        """Decode and check; sets ``inputs``, ``rows`` and ``key``.

        Raises:
            AgentError: the request is refused.
        """
        self.inputs, self.rows, self.state = self.form.decode(self)
        self.key = signature.key(self.inputs, self.id)

    def answer(self, outputs: Mapping[str, Array]) -> Answer:
        """Return the answer for this request's own ``outputs``."""
        return self.form.encode(self, outputs)


class Form(Protocol):
    """One way to carry a request."""

    def decode(self, request: Request) -> tuple[Mapping[str, Array], int, Any]:
        """Return inputs, rows and the state for ``encode``."""
        ...

    def encode(self, request: Request, outputs: Mapping[str, Array]) -> Answer: ...

    def part(self, request: Request, item: Any) -> Answer:
        """Return one item of a handler's stream as a part of the answer."""
        ...


class Forms:
    """The forms of one model."""

    def __init__(self, signature: Signature, handler: Handler | None, *, model: str, version: str) -> None:
        self._tensors = TensorForm(signature)
        self._oip = OipForm(signature, model=model, version=version)
        self._raw = RawForm(signature, handler)
        self._generate = GenerateForm(signature, handler, model=model, version=version)

    def of(self, header: Mapping[str, Any]) -> Form:
        """Return the form of an ``infer`` header.

        Raises:
            InvalidInputError: ``content_type`` is not a text.
        """
        content_type = header.get("content_type")
        if content_type is None:
            return self._tensors
        if content_type == OIP_CONTENT_TYPE:
            return self._oip
        if not isinstance(content_type, str):
            raise InvalidInputError("'content_type' must be a text")
        return self._generate if content_type == GENERATE_CONTENT_TYPE else self._raw


class TensorForm:
    """Tensors as the wire carries them."""

    def __init__(self, signature: Signature) -> None:
        self._signature = signature
        self._seen: dict[Hashable, tuple[tuple[Tensor, ...], int]] = {}  # layouts that passed every check

    def decode(self, request: Request) -> tuple[Mapping[str, Array], int, Any]:
        """Return views into the body and into shared memory."""
        body = memoryview(request.body)
        wanted = request.header.get("outputs")
        if wanted is not None:
            self._check_outputs(wanted)
        if request.regions is not None:
            return self._decode_shared(request, body, request.regions)
        layout, rows = self._layout(request.header.get("tensors"), len(body))
        return {tensor.name: as_array(tensor, body) for tensor in layout}, rows, wanted

    def _decode_shared(
        self, request: Request, body: memoryview, regions: Named
    ) -> tuple[Mapping[str, Array], int, Any]:
        header = request.header
        layout, rows = self._layout(header.get("tensors"), len(body), shared=True)
        inputs: dict[str, Array] = {}
        places: dict[str, Place] = {}
        for tensor in layout:
            if tensor.region is None:
                inputs[tensor.name] = as_array(tensor, body)
                continue
            region = _region(regions, tensor.region, f"tensor {tensor.name!r}")
            array = as_array(tensor._replace(offset=0), region.part(tensor.offset, tensor.nbytes))
            if tensor.dtype in _POSITIONS:
                array = array.copy()
            elif tensor.dtype != "bfloat16":  # which was widened, so is a copy already
                places[tensor.name] = Place(region, tensor.offset, tensor.nbytes)
            inputs[tensor.name] = array
        request.places = places
        reply = header.get("reply")
        window = _writable(regions, parse_window(reply)) if reply is not None else None
        return inputs, rows, (header.get("outputs"), window)

    def _layout(self, entries: Any, body_bytes: int, *, shared: bool = False) -> tuple[tuple[Tensor, ...], int]:
        """Check names, dtypes, shapes and sizes, once per layout: callers repeat theirs, and checking costs 5 µs."""
        try:
            layout: Any = body_bytes, *[(e["name"], e["dtype"], *e["shape"], e["nbytes"]) for e in entries]
            if shared:
                layout += (*[(e.get("region"), e.get("offset")) for e in entries],)
            seen = self._seen.get(layout)
        except (TypeError, KeyError):  # malformed: let the checks say what is wrong
            seen = layout = None
        if seen is not None:
            return seen
        sizes: dict[str, int] = {}
        found = parse_tensors(entries, body_bytes)
        for tensor in found:
            if tensor.region is not None and not shared:
                raise TensorError(f"tensor {tensor.name!r}: region {tensor.region} is not attached")
            self._signature.check(tensor.name, tensor.dtype, tensor.shape, sizes)
        result = found, self._signature.rows(len(found), sizes)
        if layout is not None and len(self._seen) < _LAYOUTS_MAX:
            self._seen[layout] = result
        return result

    def encode(self, request: Request, outputs: Mapping[str, Array]) -> Answer:
        """Return the outputs asked for, or all; those that fit the request's window lie there."""
        wanted, window = request.state if request.regions is not None else (request.state, None)
        if wanted:
            outputs = {name: outputs[name] for name in wanted}
        entries, buffers = tensors.pack(outputs)
        if window is not None:
            buffers = _place(entries, buffers, *window)
        return {"tensors": entries}, buffers

    def part(self, request: Request, item: Any) -> Answer:
        """Return arrays as tensors, anything else as it is."""
        return self.encode(request, item) if _are_arrays(item) else _packed_part(item)

    def _check_outputs(self, wanted: object) -> None:
        known = self._signature.output_names
        if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):
            raise InvalidInputError("'outputs' must be a list of names")
        for name in wanted:
            if name not in known:
                raise InvalidInputError(f"unknown output {name!r}; the model gives {', '.join(known)}")


class OipForm:
    """An Open Inference Protocol body."""

    def __init__(self, signature: Signature, *, model: str, version: str) -> None:
        self._signature = signature
        self._model = model
        self._version = version

    def decode(self, request: Request) -> tuple[Mapping[str, Array], int, Any]:
        """Return the decoded inputs; the request's own ``timeout`` only shortens its deadline."""
        params = request.header.get("params")
        json_bytes = params.get("oip_header_bytes") if isinstance(params, dict) else None
        decoded = codecs.decode(request.body, json_bytes, self._signature)
        if request.header.get("stream") is True:  # parts are events of text
            decoded = codecs.as_json(decoded)
        sizes: dict[str, int] = {}
        for name, (dtype, array) in decoded.inputs.items():
            self._signature.check(name, dtype, array.shape, sizes)
        if decoded.timeout_s is not None:
            request.deadline = min(request.deadline, request.arrived + decoded.timeout_s)
        inputs = {name: array for name, (_, array) in decoded.inputs.items()}
        return inputs, self._signature.rows(len(inputs), sizes), decoded

    def encode(self, request: Request, outputs: Mapping[str, Array]) -> Answer:
        """Return an OIP answer, binary where asked for."""
        json_bytes, buffers = codecs.encode(request.state, outputs, model=self._model, version=self._version)
        if json_bytes is None:
            return {"content_type": "application/json"}, buffers
        return {"content_type": "application/octet-stream", "params": {"oip_header_bytes": json_bytes}}, buffers

    def part(self, request: Request, item: Any) -> Answer:
        """Return arrays as an OIP answer, anything else as it is."""
        return self.encode(request, item) if _are_arrays(item) else _packed_part(item)


class RawForm:
    """Raw bytes through the bundle's handler."""

    def __init__(self, signature: Signature, handler: Handler | None) -> None:
        self._signature = signature
        self._handler = handler

    def decode(self, request: Request) -> tuple[Mapping[str, Array], int, Any]:
        """Return what the handler's ``preprocess`` makes of the body."""
        handler = self._handler
        if handler is None:
            raise InvalidInputError("this model has no handler for raw requests: send tensors")
        try:
            made = handler.preprocess(bytes(request.body), request.header["content_type"])
        except BaseException as error:  # foreign code: anything may come out of it
            raise blamed(handler, "preprocess", error) from error
        prepared = made if isinstance(made, Prepared) else None
        given = made.tensors if isinstance(made, Prepared) else made
        if not isinstance(given, Mapping):
            raise HandlerError(
                f"{type(handler).__name__}.preprocess returned {type(made).__name__}, not tensors by name"
            )
        inputs = {name: np.asarray(array) for name, array in given.items()}
        sizes: dict[str, int] = {}
        try:
            for name, array in inputs.items():
                self._signature.check(name, dtype_name(array), array.shape, sizes)
        except TensorError as error:
            raise HandlerError(f"{type(handler).__name__}.preprocess: {error}") from error
        return inputs, self._signature.rows(len(inputs), sizes), prepared

    def encode(self, request: Request, outputs: Mapping[str, Array]) -> Answer:
        """Return what the handler's ``postprocess`` makes of the outputs."""
        handler = self._handler
        assert handler is not None
        try:
            return self.pack(request, self._post(handler, request, outputs, request.rows))
        except BaseException as error:  # as above
            raise blamed(handler, "postprocess", error) from error

    def part(self, request: Request, item: Any) -> Answer:
        """Return what ``postprocess`` makes of arrays, anything else as it is."""
        return self.pack(request, self.made_of(request, item), part=True)

    def made_of(self, request: Request, item: Any) -> Any:
        """Return an item of a stream as it is answered: arrays go through ``postprocess``."""
        if not _are_arrays(item):
            return item
        handler = self._handler
        assert handler is not None
        first = next(iter(item.values()))
        try:
            return self._post(handler, request, item, len(first) if first.ndim else 1)
        except BaseException as error:  # as above
            raise blamed(handler, "postprocess", error) from error

    def joined(self, request: Request, items: list[Any]) -> Answer:
        """Return the whole answer of a stream whose caller did not ask for parts."""
        handler = self._handler
        assert isinstance(handler, StreamingHandler)
        try:
            return self.pack(request, handler.joined(items))
        except BaseException as error:  # as above
            raise blamed(handler, "joined", error) from error

    def pack(self, request: Request, made: Any, *, part: bool = False) -> Answer:
        """Return what a handler made, as content; raises whatever is wrong with it."""
        del request
        return _packed_part(made) if part else _packed(made)

    @staticmethod
    def _post(handler: Handler, request: Request, outputs: Mapping[str, Array], rows: int) -> Any:
        prepared = request.state
        if prepared is None:
            return handler.postprocess(outputs, rows)
        return handler.postprocess_with(outputs, rows, prepared.state)


class GenerateForm(RawForm):
    """A document of Triton's generate extension, which the handler gets as JSON, and answers in its shape."""

    def __init__(self, signature: Signature, handler: Handler | None, *, model: str, version: str) -> None:
        super().__init__(signature, handler)
        self._about = {"model_name": model, "model_version": version}

    def decode(self, request: Request) -> tuple[Mapping[str, Array], int, Any]:
        """Return what ``preprocess`` makes of the document; its ``id`` is repeated in the answer."""
        try:
            document = json.loads(bytes(request.body))
        except (ValueError, RecursionError) as error:
            raise InvalidInputError(f"not JSON: {str(error)[:200]}") from error
        if not isinstance(document, dict):
            raise InvalidInputError("the request must be a JSON object")
        request.echo = document.get("id")
        request.header["content_type"] = _JSON
        return super().decode(request)

    def pack(self, request: Request, made: Any, *, part: bool = False) -> Answer:
        """Return an object: a text as ``text_output``, an object's own members, anything else as ``output``."""
        if isinstance(made, Reply) and made.content_type.startswith("text/"):
            made = _bytes(made.body).decode()
        if isinstance(made, Reply):
            raise TypeError(f"a reply of {made.content_type} does not fit into a JSON object")
        own = made if isinstance(made, dict) else {"text_output" if isinstance(made, str) else "output": made}
        about = self._about if request.echo is None else {"id": request.echo, **self._about}
        return _packed({**about, **own})


def checked(signature: Signature, given: Mapping[str, Any]) -> tuple[dict[str, Array], int]:
    """Return arrays that fit the signature, and their rows.

    Raises:
        TensorError: they do not.
    """
    inputs = {name: np.asarray(array) for name, array in given.items()}
    sizes: dict[str, int] = {}
    for name, array in inputs.items():
        signature.check(name, dtype_name(array), array.shape, sizes)
    return inputs, signature.rows(len(inputs), sizes)


def stacked(part: Sequence[Request], name: str, rows: int) -> Array:
    """Return one input of several requests as a batch of ``rows``; without a copy if they lie back to back."""
    arrays = [request.inputs[name] for request in part]
    first = part[0].places.get(name) if part[0].places else None
    if first is None:
        return np.concatenate(arrays)
    end = first.offset
    for request in part:
        place = request.places.get(name) if request.places else None
        if place is None or place.region is not first.region or place.offset != end:
            return np.concatenate(arrays)
        end += place.nbytes
    return np.ndarray((rows, *arrays[0].shape[1:]), arrays[0].dtype, first.region.view, first.offset)


def into_window(window: memoryview, fields: dict[str, Any], body: list[Buffer]) -> list[Buffer]:
    """Write a large answer into the daemon's window if it fits, and note that; return what is left to send."""
    size = sum(map(len, body))
    if not _WINDOWED_BYTES_MIN < size <= len(window):
        return body
    end = 0
    for part in body:
        window[end : end + len(part)] = part
        end += len(part)
    fields["window_bytes"] = size
    return []


def _region(regions: Named, number: int, what: str) -> Region:
    region = regions.get(number)
    if region is None:
        raise TensorError(f"{what}: region {number} is not attached")
    return region


def _writable(regions: Named, window: Window) -> tuple[memoryview, Window]:
    """Return the window's bytes and place."""
    region = _region(regions, window.region, "reply")
    if not region.writable:
        raise TensorError(f"reply: region {window.region} cannot be written")
    return region.part(window.offset, window.nbytes), window


def _place(entries: list[dict[str, Any]], buffers: list[Buffer], memory: memoryview, window: Window) -> list[Buffer]:
    """Write outputs into the window, in order, and say so in their entries; return what is left for the body.

    If they do not all fit, none is written.
    """
    offsets: list[int | None] = []
    end = window.offset
    for entry, data in zip(entries, buffers, strict=True):
        if entry["dtype"] == "bytes":
            offsets.append(None)
            continue
        start = -(-end // SHARED_ALIGN) * SHARED_ALIGN
        offsets.append(start)
        end = start + len(data)
    if end > window.offset + window.nbytes:
        return buffers
    left: list[Buffer] = []
    for entry, data, offset in zip(entries, buffers, offsets, strict=True):
        if offset is None:
            left.append(data)
            continue
        memory[offset - window.offset : offset - window.offset + len(data)] = data
        entry["region"], entry["offset"] = window.region, offset
    return left


def _are_arrays(item: object) -> bool:
    return isinstance(item, dict) and bool(item) and all(isinstance(value, np.ndarray) for value in item.values())


def _packed(made: Any) -> Answer:
    if isinstance(made, Reply):
        return {"content_type": _text(made.content_type)}, [_bytes(made.body)]
    return {"content_type": _JSON}, [json.dumps(made, separators=(",", ":"), allow_nan=False).encode()]


def _packed_part(made: Any) -> Answer:
    return ({"content_type": TEXT}, [made.encode()]) if isinstance(made, str) else _packed(made)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a Reply's content_type must be a text, not {type(value).__name__}")
    return value


def _bytes(value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, bytearray | memoryview):
        return memoryview(value).tobytes()
    raise TypeError(f"a Reply's body must be bytes, not {type(value).__name__}")


def blamed(handler: Handler, step: str, error: BaseException) -> AgentError:
    """Return what a handler's exception means; what the worker itself raised inside one stays as it is."""
    if isinstance(error, WorkerError):
        return error
    if isinstance(error, InputError):
        return InvalidInputError(str(error)[:500])
    if isinstance(error, MemoryError):
        return OutOfMemoryError(f"{type(handler).__name__}.{step}: memory did not suffice")
    return HandlerError(f"{type(handler).__name__}.{step} raised {type(error).__name__}: {str(error)[:300]}")


def _budget_s(header: Mapping[str, Any]) -> float:
    budget = header.get("deadline_ms")
    if budget is None:
        return _FOREVER
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not budget == budget:
        raise InvalidInputError("'deadline_ms' must be a number of milliseconds")
    return float(budget) / 1000


def _level(header: Mapping[str, Any]) -> int:
    """Return the queue level of ``priority``: 1 is first, 15 last, 0 or absent the middle."""
    priority = header.get("priority")
    if not priority:
        return LEVEL_DEFAULT
    if type(priority) is not int or not LEVEL_FIRST <= priority <= LEVEL_LAST:
        raise InvalidInputError(f"'priority' must be an integer from {LEVEL_FIRST} to {LEVEL_LAST}, or 0")
    return priority
