"""Every HTTP path except inference: health, Open Inference Protocol metadata, metrics, management.

========================================================== ============ =========================================
path                                                       role         answer
========================================================== ============ =========================================
GET /v2/health/live, /healthz                              –            200 while the loop turns
GET /v2/health/ready, /ping                                –            200 if there are models and all are ready
GET /v2/models/{model}[/versions/{version}]/ready          –            200 or 400
GET /v2                                                    –            name, version, extensions
GET /v2/models/{model}[/versions/{version}][/config]       infer, read  metadata; Triton's model configuration
POST /v2/repository/index                                  read         all versions of all models, with state, reason
POST …/models/{model}[/versions/{version}]/load, …/unload  operate      below /v2/repository; ``control.call``
GET /metrics                                               read         Prometheus text
GET /v1/{verb}                                             read         ``control.call``, with no more than ``read``
POST /v1/{verb}                                            by the verb  ``control.call`` with a JSON body of arguments
========================================================== ============ =========================================

Query strings are ignored. A verb's roles are checked by the control it goes to.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agent.errors import (
    AgentError,
    ForbiddenError,
    InvalidInputError,
    NotFoundError,
    TooLargeError,
    UnauthenticatedError,
    UnavailableError,
)
from agent.metrics import Metrics
from agent.serving.identity import Caller, require
from agent.serving.ports import Control, Engine
from agent.serving.replies import Dialect, Reply, error_reply, json_reply

EXTENSIONS: Final = ("binary_tensor_data", "generate", "model_configuration", "model_repository")
_READ_ONLY: Final = frozenset({"read"})
_ARGUMENTS_BYTES_MAX: Final = 64 * 1024  # parsed JSON takes 25 times its size

Endpoint = Callable[[Request], Awaitable[Response]]


class Routes:
    """The endpoints. ``app()`` is what ``HttpServer`` passes other paths to.

    Args:
        engine: Asked for models and their state.
        control: Asked for management verbs.
        metrics: Rendered at ``/metrics``.
        version: Of this program, as ``/v2`` reports it.
    """

    def __init__(self, *, engine: Engine, control: Control, metrics: Metrics, version: str) -> None:
        self._engine = engine
        self._control = control
        self._metrics = metrics
        self._version = version

    def app(self) -> Starlette:
        """Return the application."""
        model = "/v2/models/{model}"
        routes = [
            Route("/healthz", self._healthz),
            Route("/ping", self._ping),
            Route("/metrics", self._render_metrics),
            Route("/v2", self._server),
            Route("/v2/health/live", self._live),
            Route("/v2/health/ready", self._ready),
            Route("/v2/repository/index", self._index, methods=["POST"]),
            Route("/v1/{verb}", self._read_verb, methods=["GET"]),
            Route("/v1/{verb}", self._verb, methods=["POST"]),
        ]
        for prefix in (model, model + "/versions/{version}"):
            moves = prefix.replace("/v2", "/v2/repository", 1) + "/{verb:str}"
            routes += [
                Route(moves, self._move, methods=["POST"]),
                Route(prefix, self._metadata),
                Route(prefix + "/ready", self._model_ready),
                Route(prefix + "/config", self._model_config),
            ]
        app = Starlette(
            routes=routes,
            exception_handlers={AgentError: _on_error, HTTPException: _on_http_error, Exception: _on_fault},
        )
        app.router.redirect_slashes = False
        return app

    async def _healthz(self, _request: Request) -> Response:
        models = {name: self._engine.model_state(name) for name in self._engine.models()}
        states = {name: {"ready": state.ready, "reason": state.reason} for name, state in models.items()}
        return _response(json_reply({"status": "ok", "models": states}))

    async def _live(self, _request: Request) -> Response:
        return _response(json_reply({"live": True}))

    async def _ready(self, _request: Request) -> Response:
        reason = self._why_not_ready()
        if reason:
            return _response(error_reply(UnavailableError(reason), status=400))
        return _response(json_reply({"ready": True}))

    async def _ping(self, _request: Request) -> Response:
        healthy = not self._why_not_ready()
        return _response(json_reply({"status": "Healthy" if healthy else "Unhealthy"}, status=200 if healthy else 500))

    async def _server(self, _request: Request) -> Response:
        return _response(json_reply({"name": "inferd", "version": self._version, "extensions": EXTENSIONS}))

    async def _model_ready(self, request: Request) -> Response:
        name, version = _model_of(request)
        state = self._engine.model_state(name, version)
        if not state.ready:
            return _response(error_reply(UnavailableError(state.reason), status=400))
        return _response(json_reply({"name": name, "ready": True}))

    async def _metadata(self, request: Request) -> Response:
        require(_caller(request), "infer", "read")
        return _response(json_reply(self._engine.describe(*_model_of(request))))

    async def _model_config(self, request: Request) -> Response:
        require(_caller(request), "infer", "read")
        return _response(json_reply(triton_config(self._engine.describe(*_model_of(request)))))

    async def _index(self, request: Request) -> Response:
        require(_caller(request), "read")
        asked = _arguments(await request.body())
        rows = []
        for name in self._engine.models():
            versions: Sequence[str | None] = self._engine.versions(name) or (None,)
            for version in versions:
                state = self._engine.model_state(name, version)
                if state.ready or not asked.get("ready"):
                    known = {"version": version} if version is not None else {}
                    rows.append({"name": name, **known, **_triton_state(state.ready, state.reason)})
        return _response(json_reply(rows))

    async def _move(self, request: Request) -> Response:
        """Load or unload a model as the Open Inference Protocol has it; parameters of the body say nothing here."""
        verb = request.path_params["verb"]
        if verb not in ("load", "unload"):
            raise NotFoundError(f"there is nothing at {request.url.path}")
        caller = _caller(request)
        model, version = _model_of(request)
        await self._call(request, caller, caller.roles, {"model": model, "version": version})
        return _response(json_reply({}))

    async def _render_metrics(self, request: Request) -> Response:
        require(_caller(request), "read")
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def _read_verb(self, request: Request) -> Response:
        caller = _caller(request)
        require(caller, "read")
        return await self._call(request, caller, _READ_ONLY, {})

    async def _verb(self, request: Request) -> Response:
        caller = _caller(request)
        return await self._call(request, caller, caller.roles, _arguments(await request.body()))

    async def _call(self, request: Request, caller: Caller, roles: frozenset[str], args: dict[str, Any]) -> Response:
        try:
            value = await self._control.call(request.path_params["verb"], args, roles, caller.detail)
        except ForbiddenError as error:
            if caller.anonymous:
                raise UnauthenticatedError(str(error)) from error
            raise
        return _response(json_reply(value))

    def _why_not_ready(self) -> str:
        names = self._engine.models()
        if not names:
            return "there is no model"
        states = {name: self._engine.model_state(name) for name in names}
        return "; ".join(f"{name}: {state.reason or 'not ready'}" for name, state in states.items() if not state.ready)


def triton_config(described: Mapping[str, Any]) -> dict[str, Any]:
    """Return Triton's model configuration of a model's metadata.

    There a batch dimension is not part of ``dims``: it is cut when the model batches and the first dimension is open.
    """
    batch = int(described.get("max_batch") or 0)

    def tensor(entry: Mapping[str, Any]) -> dict[str, Any]:
        shape = list(entry["shape"])
        dims = shape[1:] if batch and shape[:1] == [-1] else shape
        kind = "STRING" if entry["datatype"] == "BYTES" else entry["datatype"]
        return {"name": entry["name"], "data_type": f"TYPE_{kind}", "dims": dims}

    return {
        "name": described["name"],
        "platform": described.get("platform", ""),
        "max_batch_size": batch,
        "input": [tensor(entry) for entry in described.get("inputs", ())],
        "output": [tensor(entry) for entry in described.get("outputs", ())],
        "model_transaction_policy": {"decoupled": bool(described.get("streams"))},
    }


def _triton_state(ready: bool, reason: str) -> dict[str, str]:
    return {"state": "READY" if ready else "UNAVAILABLE", "reason": reason}


def _caller(request: Request) -> Caller:
    given = {name: value for name, value in request.headers.raw if name in (b"authorization", b"host")}
    caller: Caller = request.state.connection.caller(given.get(b"authorization"), given.get(b"host"))
    return caller


def _model_of(request: Request) -> tuple[str, str | None]:
    return request.path_params["model"], request.path_params.get("version")


def _arguments(body: bytes) -> dict[str, Any]:
    if len(body) > _ARGUMENTS_BYTES_MAX:
        raise TooLargeError(f"arguments of {len(body)} bytes; the limit is {_ARGUMENTS_BYTES_MAX}")
    if not body.strip():
        return {}
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInputError(f"the body must be a JSON object: {error}") from error


def _response(reply: Reply) -> Response:
    response = Response(reply.body, status_code=reply.status)
    response.raw_headers = reply.headers
    return response


def _dialect(request: Request) -> Dialect:
    torchserve = request.url.path.startswith(("/predictions", "/ping", "/models"))
    return Dialect.TORCHSERVE if torchserve else Dialect.INFERENCE


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, AgentError)
    return _response(error_reply(error, _dialect(request)))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        failure: AgentError = NotFoundError(f"there is nothing at {request.url.path}")
    else:
        failure = InvalidInputError(f"{request.method}: {error.detail}")
    reply = error_reply(failure, _dialect(request), status=error.status_code)
    reply.headers.extend((name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items())
    return _response(reply)


async def _on_fault(request: Request, _error: Exception) -> Response:
    """A bug of ours; the server logs it with its traceback."""
    return _response(error_reply(AgentError("internal error; the daemon's log has the cause"), _dialect(request)))
