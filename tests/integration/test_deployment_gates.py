"""Windows, holds, staging and cancelling on a whole box, with a real store and ``inferctl``."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from agent.client import AsyncClient
from agent.config import DAYS
from agent.errors import InvalidInputError, NotFoundError
from tests.box import MODEL
from tests.integration.test_store_daemon import NearBox
from tools.demo import magika
from tools.demo.broker import Mosquitto, find_mosquitto
from tools.demo.stage import DEVICE, PASSWORD
from tools.inferhub import main as inferhub

pytestmark = pytest.mark.integration

ANOTHER_DAY = DAYS[(datetime.now(UTC) + timedelta(days=3)).weekday()]
CLOSED = f'[[deploy.windows]]\ndays = ["{ANOTHER_DAY}"]\ntimezone = "UTC"\n'


class GatedBox(NearBox):
    """A box whose deployments are looked at while they wait, and whose trials are short."""

    def configure(self, *, broker_port: int | None = None, more: str = "") -> None:
        super().configure(broker_port=broker_port, more=more)
        text = self.config.read_text().replace("probation_s = 1.0", "probation_s = 0.1")
        self.config.write_text(text.replace("probation_calls_min = 10", "probation_calls_min = 2"))

    def json(self, *arguments: str, status: int = 0) -> Any:
        """Return the last line of a verb's JSON."""
        done = self.control(*arguments, "--json")
        assert done.returncode == status, done.stdout + done.stderr
        return json.loads(done.stdout if done.stdout.startswith(("{\n", "[")) else done.stdout.splitlines()[-1])

    def reach(self, deployment: str, *states: str) -> dict[str, Any]:
        """Wait until a deployment is in one of these states."""
        found: dict[str, Any] = {}

        def look() -> bool:
            with self.client() as client:
                rows = [row for row in client.call("deployments") if row["id"] == deployment]
            found.update(rows[0] if rows else {})
            return found.get("state") in states

        self.until(look, what=f"{deployment} is {' or '.join(states)}")
        return found

    def slot(self) -> dict[str, Any]:
        return next(row for row in self.status()["slots"] if row["slot"] == MODEL)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "box"
    with GatedBox(folder, fresh=True) as box:
        box.make_store()
        box.publish_scale("1.0.0", factor=2.0)
        box.publish_scale("2.0.0", factor=3.0, channel="")
    return folder


@pytest.fixture
def box(template: Path, tmp_path: Path) -> Iterator[GatedBox]:
    shutil.copytree(template, tmp_path / "box", symlinks=True)
    with GatedBox(tmp_path / "box", fresh=False) as box:
        box.configure()
        yield box


def test_windows_keep_a_version_waiting_over_a_restart_without_network(box: GatedBox) -> None:
    box.configure(more=CLOSED)
    box.start()
    box.until_serving("1.0.0")  # a first version waits for no window
    begun = box.json("deploy", f"{MODEL}@2.0.0", "--no-wait")["deployment"]
    waiting = box.reach(begun, "waiting_window")
    assert waiting["message"].startswith("the next maintenance window opens ")
    assert f"{MODEL}: deployment waits: the next maintenance window" in box.control("status").stdout
    box.stop_daemon()
    box.store.rename(box.store.with_name("hidden"))
    box.start()
    box.until_serving("1.0.0")
    again = box.reach(begun, "waiting_window")
    assert again["step"] == waiting["step"]
    ended = box.json("cancel", MODEL)
    assert (ended["id"], ended["state"], ended["code"]) == (begun, "canceled", "canceled")
    # What is on disk and approved needs no store; --now waits for no window.
    last = box.json("deploy", f"{MODEL}@2.0.0", "--now")
    assert (last["state"], last["plan"]) == ("confirmed", {"ignore_window": True})
    assert box.ask() == (3.0, "2.0.0")
    # A rollback waits for nothing.
    assert box.json("rollback", MODEL)["state"] == "confirmed"
    assert box.ask() == (2.0, "1.0.0")
    forced = box.json("deploy", f"{MODEL}@2.0.0", "--force-after", "1s")
    assert forced["state"] == "confirmed"
    late = box.json("deploy", f"{MODEL}@1.0.0", "--not-after", "2020-01-01T00:00", status=1)
    assert (late["state"], late["code"]) == ("expired", "command_expired")
    assert box.ask() == (3.0, "2.0.0")


def test_an_application_holds_a_model_as_long_as_its_connection(box: GatedBox, tmp_path: Path) -> None:
    box.start()
    box.until_serving("1.0.0")
    box.until(lambda: box.json("deployments")[0]["final"], what="nothing is under way")
    with box.client() as client, client.hold(MODEL, reason="line 3 is running") as held:
        assert held.lasts()
        assert held.under_way == []
        begun = box.json("deploy", f"{MODEL}@2.0.0", "--no-wait")["deployment"]
        waiting = box.reach(begun, "waiting_window")
        assert waiting["message"].startswith("held by line 3 is running (")
        assert box.slot()["held_by"].startswith("line 3 is running (")
        assert f"{MODEL} is held by line 3 is running" in box.control("status").stdout
        assert box.ask() == (2.0, "1.0.0")
    assert box.reach(begun, "confirmed")
    assert box.ask() == (3.0, "2.0.0")
    assert box.status()["holds"] == []

    # The asynchronous client, and a holder that dies.
    async def deploy_while_held() -> str:
        async with AsyncClient(box.socket) as client, client.hold("*") as held:
            assert held.lasts()
            return str((await client.call("deploy", {"model": MODEL, "version": "1.0.0"}))["deployment"])

    box.reach(asyncio.run(deploy_while_held()), "confirmed")
    marker = tmp_path / "held"
    script = f"echo $$ > {marker}; exec sleep 600"
    command = [sys.executable, "-m", "agent.cli", "--socket", str(box.socket), "hold", MODEL, "--", "sh", "-c", script]
    with subprocess.Popen(command) as holder:
        box.until(lambda: marker.exists() and marker.read_text(), what="the command runs while the model is held")
        begun = box.json("deploy", f"{MODEL}@2.0.0", "--no-wait")["deployment"]
        box.reach(begun, "waiting_window")
        holder.kill()
    os.kill(int(marker.read_text()), signal.SIGKILL)
    box.reach(begun, "confirmed")
    assert box.control("hold", MODEL, "--", "sh", "-c", "exit 7").returncode == 7
    with box.client() as client:
        with pytest.raises(NotFoundError, match="no model 'nothing'"), client.hold("nothing"):
            pass
        value = client.call("hold", {"model": MODEL})
        assert client.call("release", {"hold": value["hold"]}) == {"model": MODEL}
        with pytest.raises(NotFoundError):
            client.call("release", {"hold": value["hold"]})
        with pytest.raises(InvalidInputError, match="force_after_s"):
            client.call("deploy", {"model": MODEL, "version": "1.0.0", "force_after_s": "soon"})


def test_a_staged_version_disturbs_nothing_and_is_deployed_offline(box: GatedBox) -> None:
    box.start()
    box.until_serving("1.0.0")
    staged = box.json("deploy", f"{MODEL}@2.0.0", "--stage-only")
    assert (staged["state"], staged["message"]) == ("prepared", f"on disk; deploy {MODEL}@2.0.0 to load it")
    row = box.slot()
    assert (row["active"], row["source"], row["prepared"]) == ("1.0.0", "file", "2.0.0")
    box.stop_daemon()
    box.store.rename(box.store.with_name("hidden"))
    box.start()
    box.until_serving("1.0.0")
    box.until(lambda: box.slot()["prepared"] == "2.0.0", what="it is known again")
    assert box.json("gc", "--room")["removed"] == []
    assert box.json("deploy", f"{MODEL}@2.0.0")["state"] == "confirmed"
    assert box.ask() == (3.0, "2.0.0")
    box.until(lambda: box.slot()["prepared"] is None, what="it is no longer kept apart")
    # Staging waits for a store like any deployment, and can be given up.
    begun = box.json("deploy", f"{MODEL}@3.0.0", "--stage-only", "--no-wait")["deployment"]
    box.reach(begun, "fetch_wait")
    assert box.json("cancel", MODEL)["state"] == "canceled"
    assert box.ask() == (3.0, "2.0.0")


@pytest.mark.skipif(find_mosquitto() is None, reason="needs mosquitto")
def test_the_fleet_stages_and_cancels_and_hears_of_every_end(box: GatedBox) -> None:
    with Mosquitto(box.folder / "broker") as broker:
        box.configure(broker_port=broker.port, more=CLOSED)
        box.start()
        box.until_serving("1.0.0")
        common = ("--device", DEVICE, "--broker", f"{broker.host}:{broker.port}", "--key", box.key("operator"))
        target = (f"{MODEL}@2.0.0", "--team", magika.TEAM)
        reply = box.hub("deploy", *target, "--stage-only", *common)
        assert (reply["status"], reply["result"]["state"]) == ("done", "prepared")
        sent = box.hub("deploy", *target, "--wait", 0, *common)
        box.reach(sent["id"], "waiting_window")
        # A pin on the box is not the fleet's to cancel; it overtakes the fleet's wish, which ends.
        pinned = box.json("deploy", f"{MODEL}@2.0.0", "--no-wait")["deployment"]
        box.reach(pinned, "waiting_window")
        assert box.reach(sent["id"], "superseded")
        done = CliRunner().invoke(
            inferhub, ["cancel", MODEL, *map(str, common)], env={"INFERHUB_KEY_PASSWORD": PASSWORD}
        )
        assert done.exit_code == 1
        assert "cancel it there" in done.output
        box.json("cancel", MODEL)
        box.reach(sent["id"], "waiting_window")  # and comes back
        reply = box.hub("cancel", MODEL, *common)
        assert (reply["status"], reply["result"]["id"], reply["result"]["state"]) == ("done", sent["id"], "canceled")
        assert box.ask() == (2.0, "1.0.0")
