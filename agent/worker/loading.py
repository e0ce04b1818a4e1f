"""From a spec to a model that may serve: sandbox, handler, runtime, warm-up, golden tests, in this order.

Promises: nothing of the bundle is opened before the sandbox closed, none of its code runs outside; a model is
returned only if it ran and every golden test passed; the hello says what was measured.
Leaves out: talking to the daemon (``main.py``).
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from agent.errors import AgentError, LoadError, OutOfMemoryError, OutputError, SelfTestError, UnloadableError
from agent.log import get_logger
from agent.tensors import Array
from agent.worker import golden, sandbox, signature
from agent.worker.golden import Golden
from agent.worker.outputs import Outputs, Run
from agent.worker.requests import Forms
from agent.worker.runtimes import table
from agent.worker.runtimes.base import Runtime
from agent.worker.signature import Signature
from agent.worker.spec import Spec, inside
from handlers import registry
from handlers.base import Context, Handler, StreamingHandler

_log = get_logger("worker")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model that passed its tests."""

    spec: Spec
    signature: Signature
    runtime: Runtime
    forms: Forms
    handler: Handler | None
    goldens: Sequence[Golden]
    hello: dict[str, Any]


def load(spec: Spec) -> Loaded:
    """Confine this process, then load, warm up and test the model.

    Raises:
        SandboxError: policy demands more isolation than there is.
        UnloadableError, UnsafeBundleError: the bundle's files or its handler cannot be used, now or later.
        LoadError, OutOfMemoryError: not now.
        SelfTestError: a golden test failed, or the model's outputs are not what is declared.
    """
    began = time.perf_counter()
    _bind(spec.cores)
    _settle(spec)
    _show_device(spec)
    confined = sandbox.enter(
        bundle_dir=spec.bundle_dir,
        scratch_dir=spec.scratch_dir,
        memory_bytes=spec.memory_bytes,
        open_files=spec.open_files,
        mode=spec.sandbox,
        code_level=spec.code_sandbox,
        device=spec.device_kind,
    )
    handler = _handler(spec)
    declared = signature.parse(spec.signature, batch_axis=spec.batch_axis, rows_max=spec.batch_rows_max)
    signature.check_outputs(declared.outputs)
    runtime = table.loader(spec.runtime)(spec, declared)
    signature.check_model(declared.inputs, runtime.inputs, "inputs")
    signature.check_model(declared.outputs, runtime.outputs, "outputs")
    goldens = golden.load(spec.golden, spec.bundle_dir)
    run = Outputs(declared).checked_run(runtime.run)
    loaded = time.perf_counter()
    _warm_up(spec, declared, run, goldens)
    warm = time.perf_counter()
    reports = golden.verify(goldens, run)
    hello = {
        "kind": "hello",
        "worker": True,
        "pid": os.getpid(),
        "variant": spec.variant,
        "runtime": spec.runtime,
        "precision": spec.precision,
        "device": spec.device_name,
        "provider": runtime.provider,
        "placement": dict(runtime.placement),
        "sandbox": confined.as_dict(),
        "signature": declared.as_dict(),
        "load_ms": round((loaded - began) * 1000, 3),
        "warmup_ms": round((warm - loaded) * 1000, 3),
        "golden": reports,
        "memory": _memory(runtime),
        "max_batch": declared.rows_max,
        "idempotent": handler.idempotent if handler is not None else True,
        "streams": isinstance(handler, StreamingHandler),
        "cores": sorted(os.sched_getaffinity(0)) if spec.cores else [],
    }
    forms = Forms(declared, handler, model=spec.model, version=spec.version)
    return Loaded(
        spec=spec, signature=declared, runtime=runtime, forms=forms, handler=handler, goldens=goldens, hello=hello
    )


def _bind(cores: Sequence[int]) -> None:
    """Run on ``cores`` only, as will the runtime's threads. A core that has gone is no reason not to serve."""
    if cores:
        try:
            os.sched_setaffinity(0, cores)
        except OSError as error:
            _log.warning("the worker is not bound to its cores", cores=list(cores), reason=error.strerror)


def _settle(spec: Spec) -> None:
    """Make the scratch directory the only place that temporary files and relative paths lead to."""
    try:
        os.chdir(spec.scratch_dir)
    except OSError as error:
        raise LoadError(f"scratch_dir: {error.strerror}") from error
    os.environ["TMPDIR"] = os.environ["HOME"] = str(spec.scratch_dir)
    tempfile.tempdir = str(spec.scratch_dir)
    sys.dont_write_bytecode = True


def _show_device(spec: Spec) -> None:
    """Let CUDA, which is initialised by the runtime's load, see this worker's GPU and no other."""
    if spec.device_kind == "cuda":
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # as NVML, and so everybody else on this box, numbers them
        os.environ["CUDA_CACHE_PATH"] = str(spec.scratch_dir)
        if uuid := spec.device.get("uuid"):
            os.environ["CUDA_VISIBLE_DEVICES"] = str(uuid)


def _handler(spec: Spec) -> Handler | None:
    if not spec.handler:
        return None
    params = spec.handler.get("params") or {}
    if not isinstance(params, dict):
        raise UnloadableError("handler.params must be a map")
    context = Context(
        bundle_dir=spec.bundle_dir, params=params, classes=_classes(spec), signature=_plain(spec.signature)
    )
    try:
        return _handler_class(spec)(context)
    except (AgentError, MemoryError):
        raise
    except Exception as error:  # foreign code: anything may come out of it
        raise LoadError(f"handler cannot be made: {type(error).__name__}: {str(error)[:300]}") from error


def _handler_class(spec: Spec) -> type[Handler]:
    built_in, module_file, class_name = (spec.handler.get(key) for key in ("id", "module", "class"))
    if built_in is not None:
        try:
            return registry.find(str(built_in))
        except KeyError as error:
            raise UnloadableError(str(error.args[0])) from error
    if not isinstance(module_file, str) or not isinstance(class_name, str):
        raise UnloadableError("handler needs an id, or a module and a class")
    path = inside(spec.bundle_dir, module_file)
    importable = importlib.util.spec_from_file_location("inferd_bundle_handler", path)
    if importable is None or importable.loader is None:
        raise UnloadableError(f"handler module {module_file!r} is not a Python file")
    module = importlib.util.module_from_spec(importable)
    sys.modules[importable.name] = module
    try:
        importable.loader.exec_module(module)
    except (SyntaxError, ImportError, FileNotFoundError) as error:
        raise UnloadableError(f"handler module {module_file!r}: {type(error).__name__}: {error}") from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type) or not issubclass(found, Handler):
        raise UnloadableError(f"{module_file!r} has no class {class_name!r} derived from handlers.base.Handler")
    return found


def _classes(spec: Spec) -> list[str] | None:
    if spec.classes_file is None:
        return None
    try:
        return inside(spec.bundle_dir, spec.classes_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UnloadableError(f"classes file {spec.classes_file!r}: {error}") from error


def _plain(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {"inputs": list(raw.get("inputs") or []), "outputs": list(raw.get("outputs") or [])}


def _warm_up(spec: Spec, declared: Signature, run: Run, goldens: Sequence[Golden]) -> None:
    """Run the model before it counts: lazy allocations and kernels happen here."""
    chosen = [goldens[0].inputs if goldens else _zeros(declared)]
    chosen += [_zeros(declared, shapes) for shapes in spec.warmup_shapes]
    until = time.perf_counter() + spec.warmup_ms_max / 1000
    for _ in range(int(spec.warmup_runs)):
        for inputs in chosen:
            try:
                run(inputs)
            except OutOfMemoryError:
                raise
            except OutputError as error:
                raise SelfTestError(f"warm-up: {error}") from error
            except AgentError as error:
                raise LoadError(f"warm-up failed: {error}") from error
            if time.perf_counter() >= until:
                return


def _zeros(declared: Signature, shapes: Mapping[str, Sequence[int]] = MappingProxyType({})) -> dict[str, Array]:
    """Return inputs of the named shapes; of others the smallest that the signature allows, no dimension below 1."""
    inputs = {}
    for spec in declared.inputs:
        shape = [
            size if isinstance(size, int) else max(1, declared.bounds.get(size or "", (1, 1))[0]) for size in spec.shape
        ]
        shape = list(shapes.get(spec.name, shape))
        dtype = "float32" if spec.dtype == "bfloat16" else spec.dtype  # as the wire hands it over
        inputs[spec.name] = np.full(shape, "", dtype=object) if dtype == "bytes" else np.zeros(shape, dtype)
    return inputs


def _memory(runtime: Runtime) -> dict[str, int]:
    """Return this process' memory (bytes): resident now and at its highest, shared pages included, and of its GPU."""
    status = Path("/proc/self/status").read_text()
    kib = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.startswith("Vm")}
    memory = {"rss_bytes": int(kib["VmRSS"]) * 1024, "peak_bytes": int(kib["VmHWM"]) * 1024}
    device_bytes = runtime.device_peak_bytes()
    return memory if device_bytes is None else memory | {"device_peak_bytes": device_bytes}
