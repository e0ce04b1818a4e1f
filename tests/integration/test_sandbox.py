"""A hostile, signed handler inside a real worker: each attempt is made there and reported in its answer.

The tests may run as root, and so does the worker then: the sandbox must hold all the same.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.worker import landlock
from tests.fakes import hostile as attacks
from tests.fakes import models, torch_models
from tests.fakes.daemon_side import WorkerProcess, ZygoteProcess

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not landlock.abi(), reason="this kernel has no Landlock, so nothing is full"),
]


@pytest.fixture(scope="module")
def zygote() -> Iterator[ZygoteProcess]:
    process = ZygoteProcess()
    yield process
    process.close()


@pytest.fixture(scope="module", params=["onnx", "cuda", pytest.param("torch", marks=torch_models.needs_torch)])
def runtime(request: pytest.FixtureRequest) -> str:
    """Whose worker is hostile; ``cuda``: ONNX Runtime's in the profile for CUDA, which needs no device."""
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def folder(runtime: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp(f"sandbox-{runtime}")


@pytest.fixture(scope="module")
def hostile(runtime: str, folder: Path, request: pytest.FixtureRequest) -> Iterator[WorkerProcess]:
    other = folder / "other" / "bundle"
    other.mkdir(parents=True)
    (other / "secret.txt").write_text("another model's weights")
    (folder / "state.db").write_text("journal")
    if runtime == "torch":
        zygote = ZygoteProcess("torch")
        model = request.getfixturevalue("torch_files") / "linear.pt"
        spec = torch_models.bundle(folder, model, models.LINEAR_SIGNATURE)
    else:
        zygote = request.getfixturevalue("zygote")
        spec = models.bundle(folder, models.linear(), models.LINEAR_SIGNATURE)
    if runtime == "cuda":
        spec["device"] = {"kind": "cuda", "index": 0}
    process = zygote.fork(models.with_handler(spec, attacks.SOURCE, "HostileHandler"))
    assert process.hello()["sandbox"] == {
        "seccomp": True,
        "landlock": min(landlock.abi(), 7),
        "level": "full",
        "detail": "",
        "profile": "cuda" if runtime == "cuda" else "cpu",
    }
    yield process
    assert process.call("ping")["ok"]
    process.close()
    if runtime == "torch":
        zygote.close()


def attempt(worker: WorkerProcess, code: str) -> dict[str, Any]:
    """Run ``code`` in the handler; return how it went."""
    frame = worker.ask(textwrap.dedent(code).encode(), "text/x-python")
    assert frame.header["kind"] == "result", frame.header
    return json.loads(bytes(frame.body))


@pytest.mark.parametrize("name", attacks.REFUSED)
def test_a_handler_cannot(hostile: WorkerProcess, runtime: str, name: str) -> None:
    if runtime == "cuda" and name == "memory beside the limit":
        pytest.skip("the CUDA driver shares memory that way; a control group counts it")
    report = attempt(hostile, attacks.REFUSED[name])
    assert report["refused"], report
    assert report["errno"] in (1, 13, 18, 38), report  # EPERM, EACCES, EXDEV, ENOSYS


def test_a_handler_cannot_read_or_write_another_bundle_or_the_state(hostile: WorkerProcess, folder: Path) -> None:
    for path in (folder / "other" / "bundle" / "secret.txt", folder / "state.db"):
        for mode in ("r", "w", "a"):
            report = attempt(hostile, f"open({str(path)!r}, {mode!r})")
            assert (report["refused"], report["errno"]) == (True, 13), report
    assert attempt(hostile, f"os.listdir({str(folder)!r})")["errno"] == 13
    assert attempt(hostile, f"os.rename('x', {str(folder / 'x')!r})")["refused"]
    assert (folder / "state.db").read_text() == "journal"


def test_its_own_bundle_is_read_only(hostile: WorkerProcess, folder: Path) -> None:
    model = folder / "bundle" / "fp32" / "model.onnx"
    before = model.read_bytes()
    assert attempt(hostile, f"value = len(open({str(model)!r}, 'rb').read())")["value"] == len(before)
    for code in (
        f"open({str(model)!r}, 'ab')",
        f"os.unlink({str(model)!r})",
        f"os.truncate({str(model)!r}, 0)",
        f"open({str(model.parent / 'new')!r}, 'w')",
        f"os.chmod({str(model)!r}, 0o777)",
        f"os.fchmod(os.open({str(model)!r}, os.O_RDONLY), 0o777)",
    ):
        assert attempt(hostile, code)["refused"], code
    assert model.read_bytes() == before


def test_a_link_in_the_scratch_leads_nowhere(hostile: WorkerProcess) -> None:
    report = attempt(hostile, "os.symlink('/etc/passwd', 'link'); open('link')")
    assert (report["refused"], report["errno"]) == (True, 13)


def test_listeners_of_the_box_are_out_of_reach(hostile: WorkerProcess, folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "scratch" / "l.sock"))
        listener.listen()
        code = "import socket; socket.socket(socket.AF_UNIX).connect('l.sock')"
        assert attempt(hostile, code)["errno"] == 1


def test_a_shell_started_by_libc_never_runs(hostile: WorkerProcess, folder: Path) -> None:
    assert attempt(hostile, "value = os.system('touch started')")["value"] != 0
    assert not (folder / "scratch" / "started").exists()


def test_it_can_signal_nobody_but_itself(hostile: WorkerProcess) -> None:
    assert attempt(hostile, "os.kill(os.getpid(), 0)")["refused"] is False
    assert attempt(hostile, f"os.kill({os.getpid()}, 0)")["errno"] == 1


ALLOWED = {
    "scratch": "f = open('mine', 'w'); f.write('x'); f.close(); os.mkdir('d'); os.rename('mine', 'd/mine'); "
    "os.unlink('d/mine'); os.rmdir('d')",
    "temporary files": "import tempfile; tempfile.TemporaryFile().write(b'x'); tempfile.NamedTemporaryFile()",
    "dev null": "open('/dev/null', 'w').write('x')",
    "threads": "import threading; t = threading.Thread(target=list); t.start(); t.join()",
    "thread pool": "from concurrent.futures import ThreadPoolExecutor as T; value = list(T(4).map(abs, [-1, 2]))",
    "cpu facts": "value = [open(p).read(1) for p in ('/proc/cpuinfo', '/proc/meminfo', '/proc/self/status')]; "
    "value.append(os.cpu_count())",
    "random numbers": "value = np.random.default_rng().random(); os.urandom(4); import secrets; secrets.token_hex()",
    "lazy numpy": "value = float(np.linalg.svd(np.eye(3))[1][0]); np.fft.fft(np.ones(8)); np.ma.array([1]); "
    "import numpy.polynomial, numpy.testing",
    "standard library": "import sqlite3, decimal, unicodedata, zoneinfo, csv, xml.etree.ElementTree, ctypes.util, ssl",
    "onnxruntime with threads": """
        import onnxruntime as ort
        options = ort.SessionOptions()
        options.intra_op_num_threads = 2
        bundle = os.path.join(os.path.dirname(os.getcwd()), 'bundle', 'fp32', 'model.onnx')
        session = ort.InferenceSession(bundle, options, providers=['CPUExecutionProvider'])
        value = list(session.run(None, {'x': np.ones((64, 4), 'float32')})[0].shape)
    """,
    "callbacks from C": "f = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 7); value = f()",
    "time and time zone": "import time; value = time.strftime('%Z')",
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_runtimes_and_handlers_need_still_works(hostile: WorkerProcess, name: str) -> None:
    report = attempt(hostile, ALLOWED[name])
    assert report["refused"] is False, report


def test_environment_and_process_are_bare(hostile: WorkerProcess, folder: Path) -> None:
    environment = attempt(hostile, "value = dict(os.environ)")["value"]
    assert environment["TMPDIR"] == environment["HOME"] == str(folder / "scratch")
    assert not [name for name in environment if "SECRET" in name or "PASSWORD" in name]
    status = Path(f"/proc/{hostile.pid}/status").read_text()
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert facts["NoNewPrivs"] == "1"
    assert facts["Seccomp"] == "2"
    assert int(facts["CapEff"], 16) == int(facts["CapPrm"], 16) == 0
    if os.geteuid() == 0:  # dropping the bounding set takes CAP_SETPCAP, which others do not have
        assert int(facts["CapBnd"], 16) == 0
    assert int(Path(f"/proc/{hostile.pid}/oom_score_adj").read_text()) == 500
    limits = Path(f"/proc/{hostile.pid}/limits").read_text()
    assert [line.split()[4:6] for line in limits.splitlines() if line.startswith("Max core")] == [["0", "0"]]


def test_a_call_of_another_architecture_kills(zygote: ZygoteProcess, tmp_path: Path) -> None:
    """The x32 table has other numbers for the same calls: using it is fatal."""
    if os.uname().machine != "x86_64":
        pytest.skip("x32 exists on x86_64 only")
    spec = models.with_handler(
        models.bundle(tmp_path, models.linear(), models.LINEAR_SIGNATURE), attacks.SOURCE, "HostileHandler"
    )
    process = zygote.fork(spec)
    process.hello()
    process.post_raw(b"syscall(0x40000000 + 41, 1, 1, 0)", "text/x-python")
    assert zygote.exit_of(process.pid)["signal"] == 31  # SIGSYS
    process.close()


def test_memory_beyond_the_limit_is_an_error_of_its_request(zygote: ZygoteProcess, tmp_path: Path) -> None:
    spec = models.with_handler(
        models.bundle(tmp_path, models.linear(), models.LINEAR_SIGNATURE), attacks.SOURCE, "HostileHandler"
    )
    process = zygote.fork(spec | {"limits": {"memory_bytes": 2 << 30, "open_files": 32}})
    process.hello()
    report = attempt(process, "value = len(bytes(4 << 30))")
    assert report["error"] == "MemoryError"
    assert attempt(process, "keep = [open('/dev/null') for _ in range(64)]")["errno"] == 24
    assert process.call("ping")["ok"]
    process.close()


def test_import_of_the_bundle_happens_inside(zygote: ZygoteProcess, tmp_path: Path) -> None:
    source = "import socket\nsocket.socket()\n" + attacks.SOURCE
    spec = models.with_handler(
        models.bundle(tmp_path, models.linear(), models.LINEAR_SIGNATURE), source, "HostileHandler"
    )
    process = zygote.fork(spec)
    header = process.receive().header
    assert header["code"] == "load_failed"
    assert "PermissionError" in header["message"]
    process.close()


WITHOUT = """
import sys
from pathlib import Path
from agent.worker import {module}, sandbox
from agent.errors import SandboxError
def broken(*arguments, **named):
    raise OSError(38, "not in this kernel")
{module}.{function} = broken
places = dict(bundle_dir=Path("/proc/self"), scratch_dir=Path("/dev/null"), memory_bytes=0, open_files=64)
try:
    print(sandbox.enter(**places, mode=sys.argv[1], code_level=sys.argv[2]).as_dict())
except SandboxError as error:
    print(error)
"""


@pytest.mark.parametrize(("module", "function"), [("landlock", "restrict"), ("seccomp", "install")])
def test_a_kernel_without_one_half_is_reported_and_refused_under_enforce(module: str, function: str) -> None:
    """In a process of its own: confinement cannot be undone."""
    source = WITHOUT.format(module=module, function=function)

    def outcome(mode: str, code_level: str = "none") -> str:
        command = [sys.executable, "-c", source, mode, code_level]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()

    assert "isolation is partial, policy demands full" in outcome("enforce")
    assert "isolation is partial, policy demands full for code of a bundle" in outcome("best_effort", "full")
    assert "'level': 'partial'" in outcome("best_effort", "partial")
    report = outcome("best_effort")
    assert "'level': 'partial'" in report
    assert f"{module}: not in this kernel" in report
