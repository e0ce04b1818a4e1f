"""A hostile handler out of a signed bundle, on a whole box: it gets nowhere, and nobody else notices."""

from __future__ import annotations

import json
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from agent.client import Client
from agent.errors import AgentError
from agent.worker import landlock
from tests.box import MODEL, Box
from tests.fakes import hostile
from tests.models import FEATURES

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not landlock.abi(), reason="this kernel has no Landlock, so nothing is full"),
]
ROGUE = "rogue"
WORKER_BYTES = 1 << 30
CONFIG = f"""
[engine]
memory_bytes_max = {WORKER_BYTES}
hang_timeout_s = 5.0
restart_first_s = 0.01
restart_cap_s = 0.1
deaths_max = 100
"""


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A box that serves an ordinary model and a hostile one."""
    with Box(tmp_path_factory.mktemp("hostile") / "box", fresh=True) as box:
        box.make_store()
        box.publish_scale("1.0.0")
        box.publish_scale("1.0.0", name=ROGUE, handler="hostile")
        box.write_config(store_url=box.store.as_uri(), broker_port=None, models=(MODEL, ROGUE), more=CONFIG)
        box.start()
        box.until(lambda: confirmed(box) == {MODEL, ROGUE}, what="both are confirmed", timeout_s=90)
        yield box


def confirmed(box: Box) -> set[str]:
    """Return the models whose deaths do not end a trial any more."""
    return {row["slot"] for row in box.status()["slots"] if row["active"] and not row["trial"]}


def row_of(box: Box, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(row for row in box.status()["models"] if row["model"] == name)
    return found


def attempt(client: Client, code: str) -> dict[str, Any]:
    """Run ``code`` in the hostile worker; return how it went, or the error that came instead."""
    try:
        result = client.predict(ROGUE, textwrap.dedent(code).encode(), "text/x-python")
    except AgentError as error:
        return {"code": error.code}
    report: dict[str, Any] = json.loads(result.body)
    return report


@contextmanager
def unnoticed(box: Box) -> Iterator[None]:
    """While the body runs, the other model answers each request rightly; daemon and worker stay the same."""
    stop, answers = threading.Event(), [0]
    faults: list[str] = []

    def ask() -> None:
        x = np.full((1, FEATURES), 3.0, dtype=np.float32)
        with Client(box.socket, retries=0) as client:
            while not stop.is_set():
                try:
                    found = float(client.infer(MODEL, {"x": x}).outputs["y"][0, 0])
                except AgentError as error:
                    faults.append(str(error))
                else:
                    answers[0] += 1
                    faults.extend([f"answered {found}"] if found != 6.0 else [])

    assert box.daemon is not None
    before = row_of(box, MODEL)
    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
        seen = answers[0]
        box.until(lambda: answers[0] > seen or faults, what="it still answers")
    finally:
        stop.set()
        asking.join()
    assert not faults
    after = row_of(box, MODEL)
    assert (after["workers"], after["deaths"]) == (before["workers"], before["deaths"])
    assert box.daemon.poll() is None


def test_everything_is_refused_and_the_other_model_keeps_answering(box: Box) -> None:
    with unnoticed(box), box.client() as client:
        for name, code in hostile.REFUSED.items():
            report = attempt(client, code)
            assert report.get("refused"), (name, report)
            assert report["errno"] in (1, 13, 18, 38), (name, report)


def test_the_boxs_files_are_out_of_reach(box: Box) -> None:
    other = next((box.state / "versions").glob(f"*/{MODEL}/*/first/model.onnx"))
    places = [other, box.state / "journal.db", box.state / "active" / f"{MODEL}.json", box.config, box.log]
    with unnoticed(box), box.client() as client:
        for path in places:
            for mode in ("rb", "r+b", "ab"):
                report = attempt(client, f"open({str(path)!r}, {mode!r})")
                assert (report.get("refused"), report.get("errno")) == (True, 13), (path, report)
            for call in ("unlink", "readlink", "rmdir"):
                assert attempt(client, f"os.{call}({str(path)!r})")["refused"]
            assert attempt(client, f"os.rename('x', {str(path)!r})")["refused"]
        for folder in (box.state, box.folder, box.socket.parent):
            assert attempt(client, f"os.listdir({str(folder)!r})")["errno"] == 13
            assert attempt(client, f"open({str(folder / 'new')!r}, 'w')")["errno"] == 13
        own = attempt(client, "value = os.getcwd()")["value"]
        assert attempt(client, "open('mine', 'w').write('x')")["refused"] is False
        assert (Path(own) / "mine").exists()
    assert all(path.exists() for path in places)


def test_memory_and_descriptors_end_at_their_limits(box: Box) -> None:
    fill = """
        kept = []
        while True:
            kept.append(np.ones(1 << 23, 'uint8'))
    """
    with unnoticed(box), box.client() as client:
        report = attempt(client, fill)  # or it is killed first, because it takes so long
        assert report.get("error") == "MemoryError" or report["code"] == "worker_died"
        assert attempt(client, "keep = [open('/dev/null') for _ in range(10_000)]").get("errno", 24) == 24
        threads = "import threading\nfor _ in range(100_000): threading.Thread(target=lambda: os.read(1, 0)).start()"
        attempt(client, threads)
        box.until(lambda: attempt(client, "value = 1").get("value") == 1, what="the model is back", timeout_s=90)
    for held in row_of(box, ROGUE)["workers"]:
        assert psutil.Process(held).memory_info().vms <= WORKER_BYTES


@pytest.mark.parametrize(
    "code",
    ["os.kill(os.getpid(), 9)", "os._exit(0)", "ctypes.string_at(0)", "while True: pass", "os.close(3)",
     "os.write(3, b'x' * 100_000)"],
    ids=["killed", "exit", "crash", "hang", "channel closed", "garbage"],
)  # fmt: skip
def test_a_death_is_its_own_models_affair(box: Box, code: str) -> None:
    with unnoticed(box), box.client() as client:
        before = row_of(box, ROGUE)["deaths"]
        assert attempt(client, code).get("code") in ("worker_died", "unavailable")
        box.until(lambda: row_of(box, ROGUE)["deaths"] > before, what="the death is seen", timeout_s=90)
        box.until(lambda: attempt(client, "value = 1").get("value") == 1, what="the model is back", timeout_s=90)


def test_no_process_is_left_but_the_boxs_own(box: Box) -> None:
    assert box.daemon is not None
    names = [child.name() for child in psutil.Process(box.daemon.pid).children(recursive=True)]
    assert sorted(names) == ["inferd-worker", "inferd-worker", "inferd-zygote"]
    assert not Path("/tmp/inferd-escape").exists()
