"""Self-tests of a whole box: real daemon, real signed store, ``inferctl``, and a service manager that watches."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.box import MODEL, Box

pytestmark = pytest.mark.integration
CONFIG = """[engine]
selftest_interval_s = 0.2
selftest_share_max = 1.0
hang_timeout_s = 1.0
start_timeout_s = 60

[engine.variants]
idle_s = 0
retry_first_s = 3000
restart_first_s = 1
"""


def told(box: Box) -> list[dict[str, Any]]:
    return [event["data"] for event in box.events() if event["type"] == "selftest.failed"]


def test_a_model_that_hangs_in_its_tests_is_replaced_left_and_comes_back_and_the_daemon_is_well(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, Box(tmp_path / "box", fresh=True) as box:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        box.make_store()
        box.publish_scale("1.0.0", handler="fickle")
        box.configure(more=CONFIG)
        box.start(environment={"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1000000"})
        box.until_serving("1.0.0")

        done = box.control("selftest", MODEL)
        assert done.returncode == 0, done.stderr
        first, golden, check = done.stdout.splitlines()
        assert first == "scale 1.0.0 (first): ok"
        assert golden.startswith("  g: ok, ")
        assert golden.endswith(" ms (at most 5000)")
        assert check == "    y allclose: 0 (rtol 1e-05, atol 1e-06)"
        (value,) = json.loads(box.control("selftest", "--all", "--json").stdout)
        assert (value["model"], value["ok"], value["golden"][0]["checks"][0]["metric"]) == (MODEL, True, "allclose")
        assert box.control("selftest").returncode == 2
        assert "unknown_model" in box.control("selftest", "nothing").stderr
        box.until(lambda: box.status()["models"][0]["selftest"]["ok"], what="it is tested while it is idle")
        assert not told(box)

        (bundle,) = (path.parent for path in (box.state / "versions").rglob("handler.py"))
        bundle.chmod(0o755)
        for variant in ("first", "second"):
            (bundle / f"freeze-{variant}").write_text("2")  # after its load
        box.until(lambda: len(told(box)) >= 4, what="both variants are left", timeout_s=90)
        assert [(one["variant"], one["act"]) for one in told(box)[:4]] == [
            ("first", "restart"),
            ("first", "leave"),
            ("second", "restart"),
            ("second", "leave"),
        ]
        heard: list[bytes] = []

        def fed() -> int:
            try:
                while True:
                    heard.append(manager.recv(4096))
            except BlockingIOError:
                return heard.count(b"WATCHDOG=1")

        before = fed()
        box.until(lambda: fed() >= before + 3, what="the watchdog is fed", timeout_s=90)
        assert not [event for event in box.events() if event["type"] == "component.restarted"]

        for variant in ("first", "second"):
            (bundle / f"drift-{variant}").write_text("0")  # not even the load passes any more

        def reason() -> str:
            return str(box.status()["models"][0]["reason"])

        words = ("no variant loads", "golden 'g', output 'y', allclose: differs by up to 1", "tried again")
        box.until(lambda: all(word in reason() for word in words), what="it says that nothing is left", timeout_s=90)
        done = box.control("selftest", "--all")
        assert (done.returncode, "FAILED" in done.stdout) == (1, True), done.stdout
        for path in (*bundle.glob("freeze-*"), *bundle.glob("drift-*")):
            path.unlink()
        box.until(lambda: box.status()["models"][0]["ready"], what="it comes back by itself", timeout_s=90)
        assert box.ask()[1] == "1.0.0"
        assert box.control("selftest", MODEL).returncode == 0
