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
import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

import numpy as np

from agent import tensors
from agent.errors import (
    AgentError,
    HandlerError,
    InvalidInputError,
    OutOfMemoryError,
    StreamUnsupportedError,
    TensorError,
    UnknownModelError,
    WorkerError,
)
from agent.tensors import DTYPE_NAMES, NUMPY_DTYPES, Array, as_array, dtype_name
from agent.wire import (
    DEADLINE_MS_MAX,
    DTYPES,
    RESULT_LEAD,
    SHARED_ALIGN,
    Buffer,
    Header,
    Tensor,
    Window,
    lead_frame,
    packed_pairs,
    parse_tensors,
    parse_window,
    tensor_entries,
)
from agent.worker import codecs
from agent.worker.batcher import LEVEL_DEFAULT, LEVEL_FIRST, LEVEL_LAST
from agent.worker.outputs import Outputs
from agent.worker.regions import Named, Region
from agent.worker.signature import Signature
from handlers.base import TEXT, Handler, InputError, Prepared, Reply, StreamingHandler

OIP_CONTENT_TYPE: Final = "application/vnd.oip+json"
GENERATE_CONTENT_TYPE: Final = "application/vnd.triton.generate+json"
_JSON: Final = "application/json"
_LAYOUTS_MAX: Final = 256  # remembered per model
_DOCUMENT_BYTES_MAX: Final = 4096  # of a JSON part that is remembered
_WINDOWED_BYTES_MIN: Final = 64 * 1024
_SMALL_BYTES_MAX: Final = 64 * 1024  # of a batch's outputs
_CONVERTED: Final = frozenset({"bytes", "bfloat16"})  # dtypes whose array is not the bytes as they came
_POSITIONS: Final = frozenset({"bool", "int32", "uint32", "int64", "uint64"})

Answer = tuple[dict[str, Any], list[Buffer]]  # header fields beside kind and id, and the body


class Place(NamedTuple):
    """Where an input lies in shared memory, if it was not copied from there."""

    region: Region
    offset: int
    nbytes: int


class Asked:
    """What all requests with equal headers have in common, worked out once."""

    __slots__ = ("form", "layout", "level", "streamed")

    def __init__(self, form: Form, level: int, *, streamed: bool = False) -> None:
        self.form = form
        self.level = level
        self.streamed = streamed  # a handler's stream answers
        self.layout: Layout | None = None  # of its tensors, once they passed every check and if all of it is plain


class Layout:
    """Where the tensors of a request lie.

    Attributes:
        tensors: In the order of the body.
        rows: Of the request.
        key: What requests must have equal to be stacked; ``None`` may stack with anything.
        plain: Whether the body alone makes the inputs: nothing shared, every tensor of fixed-size elements.
        body_bytes: Length of the body.
    """

    __slots__ = ("body_bytes", "key", "plain", "rows", "tensors")

    def __init__(self, tensors: tuple[Tensor, ...], rows: int, key: Hashable, body_bytes: int) -> None:
        self.tensors = tensors
        self.rows = rows
        self.key = key
        self.body_bytes = body_bytes
        self.plain = all(t.region is None and t.dtype not in _CONVERTED for t in tensors)


class Request:
    """One ``infer`` frame on its way through the worker; what the batcher reads is set by ``prepare`` at the latest."""

    __slots__ = (
        "arrived", "body", "deadline", "echo", "form", "header", "id", "inputs", "key", "layout", "level", "line",
        "places", "regions", "rows", "state", "streamed", "window",
    )  # fmt: skip

    def __init__(
        self,
        header: Header,
        body: Buffer,
        request_id: int,
        deadline_s: float,
        now: float,
        *,
        asked: Asked,
        line: Any,
    ) -> None:
        self.id = request_id
        self.header = header
        self.body = body
        self.form = asked.form
        self.arrived = now
        self.deadline = now + deadline_s
        self.level = asked.level
        self.streamed = asked.streamed
        self.line = line  # whom to answer
        self.inputs: Mapping[str, Array] | None = None  # of a plain layout only when somebody needs them
        self.regions: Named | None = None  # shared memory the request names
        self.window: memoryview | None = None  # where the daemon takes a large answer from
        self.places: Mapping[str, Place] | None = None  # of inputs that are used where they lie
        self.state: Any = None  # whatever the form needs for the answer
        self.echo: Any = None  # the caller's own name of the request, where its form repeats that in the answer
        layout = asked.layout
        if layout is not None and layout.body_bytes == len(body):
            self.layout: Layout | None = layout
            self.rows = layout.rows
            self.key = layout.key
        else:
            self.layout = None
            self.rows = 0
            self.key = None

    def prepare(self, signature: Signature) -> None:
        """Decode and check; sets ``rows`` and ``key``.

        Raises:
            AgentError: the request is refused.
        """
        self.inputs, self.rows, self.state = self.form.decode(self)
        if self.layout is not None:
            self.key = self.layout.key
        else:
            self.key = signature.key({name: array.shape for name, array in self.arrays().items()})

    def arrays(self) -> Mapping[str, Array]:
        """Return the inputs of a prepared request."""
        if self.inputs is None:
            assert self.layout is not None
            body = memoryview(self.body)
            self.inputs = {tensor.name: as_array(tensor, body) for tensor in self.layout.tensors}
        return self.inputs

    def answer(self, outputs: Mapping[str, Array]) -> Answer:
        """Return the answer for this request's own ``outputs``."""
        return self.form.encode(self, outputs)


class Form(Protocol):
    """One way to carry a request."""

    def decode(self, request: Request) -> tuple[Mapping[str, Array] | None, int, Any]:
        """Return inputs, rows and the state for ``encode``; no inputs if it set the request's plain layout."""
        ...

    def encode(self, request: Request, outputs: Mapping[str, Array]) -> Answer: ...

    def part(self, request: Request, item: Any) -> Answer:
        """Return one item of a handler's stream as a part of the answer."""
        ...


class Forms:
    """The forms of one model."""

    def __init__(self, signature: Signature, handler: Handler | None, *, model: str, version: str) -> None:
        self._tensors = TensorForm(signature)
        self.oip = OipForm(signature, model=model, version=version)
        self._raw = RawForm(signature, handler)
        self._generate = GenerateForm(signature, handler, model=model, version=version)
        self._streams = isinstance(handler, StreamingHandler)
        self._model = model
        self._version = version

    def asked(self, header: Header) -> Asked:
        """Return what ``header`` asks for, kept with it.

        Raises:
            InvalidInputError: ``content_type``, ``priority`` or ``stream`` is malformed.
            UnknownModelError: it names another model or version: only the daemon, which leaves both out, finds those.
            StreamUnsupportedError: it demands parts and the handler does not stream.
        """
        if header.get("model", self._model) != self._model or (header.get("version") or self._version) != self._version:
            raise UnknownModelError(f"this is {self._model!r}, version {self._version!r}; ask the daemon for others")
        form = self._form(header.get("content_type"))
        asked = Asked(form, _level(header), streamed=self._streamed(header, form))
        header.digest = asked
        return asked

    def _streamed(self, header: Header, form: Form) -> bool:
        wanted = header.get("stream")
        if not (wanted is None or isinstance(wanted, bool) or wanted == "auto"):
            raise InvalidInputError("'stream' must be true, false or 'auto'")
        if not self._streams:
            if wanted is True:
                raise StreamUnsupportedError("this model's handler does not stream; ask without 'stream'")
            return False
        if wanted and "reply" in header:
            raise InvalidInputError("an answer in parts takes no 'reply' window")
        return bool(wanted) or isinstance(form, RawForm)

    def _form(self, content_type: object) -> Form:
        if content_type is None:
            return self._tensors
        if content_type == OIP_CONTENT_TYPE:
            return self.oip
        if not isinstance(content_type, str):
            raise InvalidInputError("'content_type' must be a text")
        return self._generate if content_type == GENERATE_CONTENT_TYPE else self._raw


class TensorForm:
    """Tensors as the wire carries them."""

    def __init__(self, signature: Signature) -> None:
        self._signature = signature
        self._outputs = Outputs(signature)
        self._seen: dict[Hashable, Layout] = {}  # layouts that passed every check

    def decode(self, request: Request) -> tuple[Mapping[str, Array], int, Any]:
        """Return views into the body and into shared memory."""
        body = memoryview(request.body)
        wanted = request.header.get("outputs")
        if wanted is not None:
            self._check_outputs(wanted)
        if request.regions is not None:
            return self._decode_shared(request, body, request.regions)
        layout = self._layout(request.header.get("tensors"), len(body))
        if layout.plain and wanted is None:
            request.header.digest.layout = request.layout = layout
        return {tensor.name: as_array(tensor, body) for tensor in layout.tensors}, layout.rows, wanted

    def _decode_shared(
        self, request: Request, body: memoryview, regions: Named
    ) -> tuple[Mapping[str, Array], int, Any]:
        header = request.header
        layout = self._layout(header.get("tensors"), len(body), shared=True)
        inputs: dict[str, Array] = {}
        places: dict[str, Place] = {}
        for tensor in layout.tensors:
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
        return inputs, layout.rows, (header.get("outputs"), window)

    def _layout(self, entries: Any, body_bytes: int, *, shared: bool = False) -> Layout:
        """Check names, dtypes, shapes and sizes, once per layout: callers repeat theirs, and checking costs 5 µs."""
        try:
            key: Any = body_bytes, *[(e["name"], e["dtype"], *e["shape"], e["nbytes"]) for e in entries]
            if shared:
                key += (*[(e.get("region"), e.get("offset")) for e in entries],)
            seen = self._seen.get(key)
        except (TypeError, KeyError):  # malformed: let the checks say what is wrong
            seen = key = None
        if seen is not None:
            return seen
        sizes: dict[str, int] = {}
        found = parse_tensors(entries, body_bytes)
        for tensor in found:
            if tensor.region is not None and not shared:
                raise TensorError(f"tensor {tensor.name!r}: region {tensor.region} is not attached")
            self._signature.check(tensor.name, tensor.dtype, tensor.shape, sizes)
        signature = self._signature
        shapes = {tensor.name: tensor.shape for tensor in found}
        layout = Layout(found, signature.rows(len(found), sizes), signature.key(shapes), body_bytes)
        if key is not None and len(self._seen) < _LAYOUTS_MAX:
            self._seen[key] = layout
        return layout

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
        """Return arrays, which must be declared outputs, as tensors; anything else as it is."""
        if not _are_arrays(item):
            return _packed_part(item)
        self._outputs.check_part(item)
        return self.encode(request, item)

    def _check_outputs(self, wanted: object) -> None:
        known = self._signature.output_names
        if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):
            raise InvalidInputError("'outputs' must be a list of names")
        for name in wanted:
            if name not in known:
                raise InvalidInputError(f"unknown output {name!r}; the model gives {', '.join(known)}")


class OipPlan:
    """What an Open Inference Protocol request of binary tensors alone asks for, whatever its tensors hold."""

    __slots__ = ("heads", "layout", "request")

    def __init__(self, request: codecs.OipRequest, layout: Layout) -> None:
        self.request = request
        self.request.inputs = {}  # they are the first request's
        self.layout = layout
        self.heads: dict[Hashable, tuple[tuple[int, bytes], bytes]] = {}  # of answers: the frame's items and the JSON


class OipForm:
    """An Open Inference Protocol body."""

    def __init__(self, signature: Signature, *, model: str, version: str) -> None:
        self._signature = signature
        self._outputs = Outputs(signature)
        self._model = model
        self._version = version
        self._plans: dict[bytes, OipPlan] = {}  # by the JSON part, which clients repeat

    def decode(self, request: Request) -> tuple[Mapping[str, Array] | None, int, Any]:
        """Return the decoded inputs; the request's own ``timeout`` only shortens its deadline."""
        params, body = request.header.get("params"), request.body
        json_bytes = params.get("oip_header_bytes") if isinstance(params, dict) else None
        streamed = request.header.get("stream") is True
        document = b""
        if type(json_bytes) is int and 0 < json_bytes <= _DOCUMENT_BYTES_MAX and not streamed:
            document = bytes(body[:json_bytes])
        plan = self._plans.get(document)
        if plan is not None and plan.layout.body_bytes == len(body):
            request.layout = plan.layout
            return None, plan.layout.rows, plan
        decoded = codecs.decode(body, json_bytes, self._signature)
        if streamed:  # parts are events of text
            decoded = codecs.as_json(decoded)
        sizes: dict[str, int] = {}
        for name, (dtype, array) in decoded.inputs.items():
            self._signature.check(name, dtype, array.shape, sizes)
        if decoded.timeout_s is not None:
            request.deadline = min(request.deadline, request.arrived + decoded.timeout_s)
        inputs = {name: array for name, (_, array) in decoded.inputs.items()}
        rows = self._signature.rows(len(inputs), sizes)
        if document and _repeats(decoded, len(body) - len(document)):
            self._keep(document, decoded, rows, len(body))
        return inputs, rows, decoded

    def _keep(self, document: bytes, decoded: codecs.OipRequest, rows: int, body_bytes: int) -> None:
        tensors, offset = [], len(document)
        for name, (dtype, array) in decoded.inputs.items():
            tensors.append(Tensor(name, dtype, array.shape, offset, array.nbytes))
            offset += array.nbytes
        key = self._signature.key({tensor.name: tensor.shape for tensor in tensors})
        if len(self._plans) >= _LAYOUTS_MAX:
            self._plans.clear()
        self._plans[document] = OipPlan(decoded, Layout(tuple(tensors), rows, key, body_bytes))

    def encode(self, request: Request, outputs: Mapping[str, Array]) -> Answer:
        """Return an OIP answer, binary where asked for."""
        state = request.state.request if isinstance(request.state, OipPlan) else request.state
        return self.packed(state, outputs)

    def packed(self, asked: codecs.OipRequest, outputs: Mapping[str, Array]) -> Answer:
        """Return the answer to a decoded request."""
        json_bytes, buffers = codecs.encode(asked, outputs, model=self._model, version=self._version)
        if json_bytes is None:
            return {"content_type": "application/json"}, buffers
        return {"content_type": "application/octet-stream", "params": {"oip_header_bytes": json_bytes}}, buffers

    def part(self, request: Request, item: Any) -> Answer:
        """Return arrays, which must be declared outputs, as an OIP answer; anything else as it is."""
        if not _are_arrays(item):
            return _packed_part(item)
        self._outputs.check_part(item)
        return self.encode(request, item)


class RawForm:
    """Raw bytes through the bundle's handler."""

    def __init__(self, signature: Signature, handler: Handler | None) -> None:
        self._signature = signature
        self._handler = handler

    def decode(self, request: Request) -> tuple[Mapping[str, Array], int, Any]:
        """Return what the handler's ``preprocess`` makes of the body."""
        return self._preprocessed(request, request.header["content_type"])

    def _preprocessed(self, request: Request, content_type: str) -> tuple[Mapping[str, Array], int, Any]:
        handler = self._handler
        if handler is None:
            raise InvalidInputError("this model has no handler for raw requests: send tensors")
        try:
            made = handler.preprocess(bytes(request.body), content_type)
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
        return self._preprocessed(request, _JSON)

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


def stacked(part: Sequence[Request], rows: int) -> dict[str, Array]:
    """Return the inputs of several requests as one batch of ``rows``; nothing is copied twice.

    Requests that lie back to back in shared memory are not copied at all.
    """
    first = part[0]
    layout = first.layout
    if layout is not None and len(layout.tensors) == 1 and all(request.layout is not None for request in part):
        (tensor,) = layout.tensors
        joined = b"".join([_only_tensor(request) for request in part])
        return {tensor.name: np.ndarray((rows, *tensor.shape[1:]), NUMPY_DTYPES[tensor.dtype], joined)}
    return {name: _stacked(part, name, rows) for name in first.arrays()}


def _only_tensor(request: Request) -> Buffer:
    """Return the bytes of the one tensor of a plain request."""
    layout, body = request.layout, request.body
    assert layout is not None
    tensor = layout.tensors[0]
    return body if tensor.nbytes == len(body) else memoryview(body)[tensor.offset :]


def _stacked(part: Sequence[Request], name: str, rows: int) -> Array:
    arrays = [request.arrays()[name] for request in part]
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


class Answers:
    """The frames of many small answers at once: what they have in common is packed once.

    Args:
        names: Items that each answer carries beside its tensors: the model's name and so on.
    """

    def __init__(self, names: Mapping[str, Any], forms: Forms) -> None:
        self._names = dict(names)
        self._forms = forms
        self._known: dict[Hashable, tuple[int, bytes]] = {}

    def frames(self, part: Sequence[Request], outputs: Mapping[str, Array]) -> list[bytes] | None:
        """Return one whole frame for each request, in order; ``None`` if they are not all plain and small.

        Args:
            part: Requests that ran together.
            outputs: Each ``[sum of their rows, ...]``, or of a single request whatever the model returned.
        """
        single = len(part) == 1
        cuts: dict[str, tuple[bytes, int]] = {}  # an output's bytes, and how many of them a row takes
        kinds: list[Hashable] = []
        total = 0
        for name, array in outputs.items():
            dtype = DTYPE_NAMES.get(array.dtype)
            if dtype is None or not array.ndim:
                return None
            total += array.nbytes
            cuts[name] = array.tobytes(), array.nbytes if single else array.nbytes // max(1, len(array))
            kinds.append((name, dtype, array.shape if single else array.shape[1:]))
        if total > _SMALL_BYTES_MAX:
            return None
        found: list[bytes] = []
        row = 0
        for request in part:
            layout = request.layout
            if layout is None or request.window is not None:
                return None
            rows = 1 if single else layout.rows
            kind = (rows, single, *kinds)
            head = b""
            chosen: Collection[tuple[bytes, int]] = cuts.values()
            if type(request.state) is OipPlan:
                plan = request.state
                pairs, head = plan.heads.get(kind) or self._pack_oip(plan, kind)
                if plan.request.outputs is not None:
                    chosen = [cuts[name] for name, _ in plan.request.outputs]
            else:
                pairs = self._known.get(kind) or self._pack(kind)
            parts = [data[row * width : (row + rows) * width] for data, width in chosen]
            row += rows
            body = parts[0] if len(parts) == 1 and not head else b"".join((head, *parts))
            found.append(lead_frame(RESULT_LEAD, request.id, pairs, len(body)) + body)
        return found

    def _pack(self, kind: tuple[Any, ...]) -> tuple[int, bytes]:
        entries = tensor_entries((n, d, shape, (DTYPES[d] or 0) * math.prod(shape)) for n, d, shape in _shapes(kind))
        pairs = packed_pairs({"tensors": entries, **self._names})
        if len(self._known) < _LAYOUTS_MAX:
            self._known[kind] = pairs
        return pairs

    def _pack_oip(self, plan: OipPlan, kind: tuple[Any, ...]) -> tuple[tuple[int, bytes], bytes]:
        likewise = {name: np.zeros(shape, NUMPY_DTYPES[dtype]) for name, dtype, shape in _shapes(kind)}
        fields, buffers = self._forms.oip.packed(plan.request, likewise)
        found = packed_pairs({**fields, **self._names}), bytes(buffers[0])
        if len(plan.heads) < _LAYOUTS_MAX:
            plan.heads[kind] = found
        return found


def _shapes(kind: tuple[Any, ...]) -> list[tuple[str, str, list[int]]]:
    """Return name, dtype and shape of each output of one request of that kind."""
    rows, single, *outputs = kind
    return [(name, dtype, list(shape) if single else [rows, *shape]) for name, dtype, shape in outputs]


def _repeats(decoded: codecs.OipRequest, binary_bytes: int) -> bool:
    """Whether requests with the same JSON part differ in their binary tensors alone, and are answered in binary."""
    inputs = decoded.inputs.values()
    return (
        decoded.id is None
        and decoded.timeout_s is None
        and sum(array.nbytes for _, array in inputs) == binary_bytes
        and not any(dtype in _CONVERTED for dtype, _ in inputs)
        and (decoded.binary if decoded.outputs is None else all(binary for _, binary in decoded.outputs))
    )


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


def budget_s(deadline_ms: Any, default_s: float = float("inf")) -> float:
    """Return a request's time in seconds.

    Raises:
        InvalidInputError: not a number, or out of range.
    """
    if deadline_ms is None:
        return default_s
    if type(deadline_ms) not in (int, float) or not 0 < deadline_ms <= DEADLINE_MS_MAX:
        raise InvalidInputError(f"'deadline_ms' must be a number above 0, at most {DEADLINE_MS_MAX}")
    return float(deadline_ms) / 1000


def _level(header: Mapping[str, Any]) -> int:
    """Return the queue level of ``priority``: 1 is first, 15 last, 0 or absent the middle."""
    priority = header.get("priority")
    if not priority:
        return LEVEL_DEFAULT
    if type(priority) is not int or not LEVEL_FIRST <= priority <= LEVEL_LAST:
        raise InvalidInputError(f"'priority' must be an integer from {LEVEL_FIRST} to {LEVEL_LAST}, or 0")
    return priority
