"""What ``inferctl`` prints: strings of strangers stay strings, and headers stand above their cells."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.text import Text

from agent import cli_store, cli_text
from agent.cli import main
from agent.wire import Buffer, Decoder, Limits, encode

pytestmark = pytest.mark.unit

HOSTILE = (
    "[/x]",
    "[policy] handler_code",
    "[bold red]x[/]",
    "a\nb",
    "\x1b[2J",
    "\x9b31m",
    "[link=http://x]y",
    "\\[",
    "",
)


def deployment(text: str) -> dict[str, Any]:
    return {
        "id": text, "slot": text, "team": text, "wanted": text, "version": text, "channel": text, "previous": text,
        "state": text, "source": text, "code": text, "message": text, "updated": 0.0, "step": 1, "bytes_done": 0,
        "bytes_total": 0, "final": True,
    }  # fmt: skip


def variant(text: str, state: str) -> dict[str, Any]:
    return {
        "variant": text, "state": state, "kind": text, "reason": text, "failures": 2, "retry_s": 61.0,
        "measured": {"reason": text},
    }  # fmt: skip


def residency(text: str, *, loaded: bool, pinned: bool = True) -> dict[str, Any]:
    return {
        "loaded": loaded, "load": text, "pinned": pinned, "keep_alive_s": None, "held_by": text, "source": text,
        "worker_bytes": {"host": 12_000_000, text: 1e9}, "held_bytes": {"host": 24_000_000},
    }  # fmt: skip


def model(text: str, *, ready: bool = False) -> dict[str, Any]:
    tensor = {"name": text, "datatype": text, "shape": [-1, 3]}
    return {
        "variants": [variant(text, "failed"), variant(text, "serving")],
        "slot": text, "ready": ready, "reason": text, "active": text, "trial": True, "previous": text, "wanted": text,
        "source": text, "metadata": {"inputs": [tensor], "outputs": [tensor]},
        "residency": residency(text, loaded=ready), "candidate": {"version": text, "percent": 5.0},
        "unmet": unmet(text),
    }  # fmt: skip


def unmet(text: str) -> dict[str, Any]:
    return {"deployment": text, "version": text, "state": text, "code": text, "message": text, "advice": text}


def status(text: str) -> dict[str, Any]:
    serving = {
        "model": text, "slot": text, "role": "default",
        "version": text, "ready": False, "reason": text, "variant": text, "device": text,
        "sandbox": {"level": text, "detail": text}, "resident_bytes_max": 600 << 20, "placement": {text: 3, "x": 1},
        "answers": {"good": 1, "faults": 0}, "latency_s": {"p50": 0.001, "p99": 0.002},
        "fallbacks": [{"variant": text, "reason": text}], "variants": [variant(text, "failed")], "workers": [7, 8],
        "scaling": {"min": 1, "max": 4, "held": text, "cores": [[0, 1], [2, 3]]},
        "canary": {"version": text, "canary_percent": 25.0, "requests": 3, "compared": 20, "agreement": 0.95},
    }  # fmt: skip
    return {
        "agent": {"version": text, "uptime_s": 61, "pid": 7},
        "device": {
            "id": text,
            "profile": text,
            "cores": 2,
            "memory_bytes": 2**31,
            "gpus": [],
            "gpu_reason": text,
            "profile_reason": text,
            "gpu_readings": [
                {"index": 0, "reading": None, "fault": text},
                {"index": 1, "reading": {"temperature_c": 41, "power_w": 70.5}, "fault": ""},
            ],
        },
        "telemetry": {"configured": True, "connected": False, "reason": text, "outbox_rows": 3},
        "memory": {
            "host": {"held_bytes": 5e6, "budget_bytes": 9e6, "available_bytes": 7e6},
            text: {"held_bytes": 5e6, "budget_bytes": 0, "available_bytes": 7e6},
        },
        "models": [
            serving,
            {**serving, "residency": residency(text, loaded=False)},
            {"model": text + "2", "slot": text + "2", "ready": False, "reason": text},
        ],
        "slots": [
            {"slot": text + "3", "wanted": text + "x", "source": text},
            {"slot": text + "4", "wanted": text, "source": text, "unmet": unmet(text)},
        ],
        "processes": [{"role": text, "pid": 7, "pss_bytes": 1e6}],
    }


def trust(text: str) -> dict[str, Any]:
    return {
        "freshness": text, "age_s": 3 * 86_400, "clock_trusted": False, "clock": 0.0, "trusted_time": 1e9,
        "last_refresh": {"at": 1, "source": text, "code": text, "message": text},
        "policy": {"on_long_offline": text, "on_revoked": text},
        "root": {"version": 3, "expires": 1, "keys": {text: {"threshold": 2, "keys": [text, text]}}},
        "roles": [{"role": text, "version": 1, "expires": 1}], "floors": {text: 1},
        "operators": {"tenant": text, "keys": [text]}, "problems": [text],
    }  # fmt: skip


def store(text: str) -> dict[str, Any]:
    named = {"team": text, "name": text, "version": text, "size_bytes": 5_000_000, "roles": [text], "reason": text}
    return {
        "free_bytes": 1, "used_share": 0.5, "versions": [named], "revoked": [named],
        "staging": [{"digest": text, "size_bytes": 1, "in_progress": False, "idle_s": 60}],
        "quarantined": [{"slot": text, "version": text, "digest": text, "reason": text}],
    }  # fmt: skip


def refreshed(text: str) -> dict[str, Any]:
    row = {
        "team": text, "name": text, "serving": text, "newest": text, "channels": {text: text}, "status": "revoked",
        "reason": text,
    }  # fmt: skip
    return {
        "freshness": "fresh", "age_s": 1, "clock_trusted": True, "models": [row], "missing": {text: text},
        "newly_revoked": [text],
    }  # fmt: skip


def sideloaded(text: str) -> dict[str, Any]:
    rows = [
        {"slot": text, "deployment": "", "code": text, "message": text},
        {"slot": text, "deployment": text, "code": "", "message": ""},
        {"slot": text, "deployment": text, "record": deployment(text)},
    ]
    return {"path": text, "origin": "stick", "issued": 1, "slots": rows}


PRINTERS: dict[str, Callable[[str], Text | str]] = {
    "status": lambda text: cli_text.status_text(status(text), {text: text}),
    "models": lambda text: cli_text.models_text([model(text), model(text, ready=True)]),
    "deployments": lambda text: cli_text.deployments_text([deployment(text)]),
    "event": lambda text: cli_text.event_text(
        {"wall_s": 0.0, "severity": text, "type": text, "data": {text: text, "nested": {"x": text}}}
    ),
    "trust": lambda text: cli_store.trust_text(trust(text)),
    "store": lambda text: cli_store.store_text(store(text)),
    "refresh": lambda text: cli_store.refresh_text(refreshed(text)),
    "sideload": lambda text: cli_store.sideload_text(sideloaded(text)),
    "link": lambda text: cli_text.link_text({"connected": True, "outbox_rows": 1, "reason": text}),
}


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("printer", PRINTERS)
def test_strings_of_strangers_are_printed_as_they_are(printer: str, hostile: str, capsys: Any) -> None:
    text = PRINTERS[printer](hostile)
    cli_text.print_text(text if isinstance(text, Text) else Text(text))
    printed = capsys.readouterr().out
    assert cli_text.shown(hostile) in printed
    assert "\x1b" not in printed
    assert "\x9b" not in printed


@pytest.mark.parametrize(
    ("value", "expected"), [("a\tb", "a\\tb"), ("\x1b", "\\x1b"), ("\ud800", "\\ud800"), ("é 日 [x]", "é 日 [x]")]
)
def test_control_characters_become_visible(value: str, expected: str) -> None:
    assert cli_text.shown(value) == expected


def test_headers_stand_above_their_cells() -> None:
    row = deployment("") | {
        "id": "pin-1", "slot": "magika", "version": "2.0.0", "previous": "1.0.0", "state": "rolled_back",
        "source": "fleet", "code": "probation_failed", "message": "too many errors",
    }  # fmt: skip
    head, cells, note = cli_text.deployments_text([row]).plain.split("\n")
    for title, cell in (
        ("model", "magika"), ("version", "2.0.0"), ("from", "1.0.0"), ("state", "rolled_back"), ("source", "fleet"),
    ):  # fmt: skip
        assert cells[head.index(title) :].startswith(cell)
    assert note == "    pin-1: probation_failed: too many errors"
    assert len(head) <= 80
    assert len(cells) <= 80


@pytest.mark.parametrize(
    ("wanted", "tried", "expected"),
    [
        ("2.0.0", "2.0.0", "not as wanted: 2.0.0 (pin) was tried: rolled_back: probation_failed: it died"),
        ("channel stable", "2.0.0", "channel stable (pin) was tried as 2.0.0: rolled_back: probation_failed: it died"),
        ("channel stable", "", "channel stable (pin) was tried: rolled_back: probation_failed: it died"),
    ],
)
def test_what_is_wanted_and_does_not_serve_is_told_with_reason_and_remedy(
    wanted: str, tried: str, expected: str
) -> None:
    missed = {"deployment": "pin-1", "version": tried, "state": "rolled_back", "code": "probation_failed",
              "message": "it died", "advice": "inferctl unpin m gives it back"}  # fmt: skip
    slot = {"slot": "m", "wanted": wanted, "source": "pin", "unmet": missed}
    assert f"{expected}\n    inferctl unpin m gives it back\n" in cli_text.models_text([model("m") | slot]).plain
    value = status("m") | {"slots": [slot]}
    value["models"] = [value["models"][0] | {"ready": True}]
    assert f"{expected}\n  inferctl unpin m gives it back\n" in cli_text.status_text(value, {}).plain


@pytest.mark.parametrize(
    ("state", "percent", "expected"),
    [("canary", 12.5, "canary 12.5 %"), ("canary", 0.0, "canary, copies only"), ("probation", 50.0, "probation")],
)
def test_a_canary_is_listed_with_its_share(state: str, percent: float, expected: str) -> None:
    row = deployment("m") | {"state": state, "percent": percent}
    head, cells, _ = cli_text.deployments_text([row]).plain.split("\n")
    assert cells[head.index("state") : head.index("source")].rstrip() == expected


def test_a_model_says_what_is_tried_beside_what_serves() -> None:
    candidate = {"deployment": "pin-1", "version": "2.0.0", "percent": 25.0}
    text = cli_text.models_text([model("m") | {"candidate": candidate}]).plain
    assert "\n    candidate 2.0.0: canary 25 %\n" in text


def test_an_event_leaves_evidence_to_json() -> None:
    data = {"slot": "m", "evidence": [{"percent": 5.0}], "models": ["m"]}
    text = cli_text.event_text({"wall_s": 0.0, "severity": "info", "type": "deployment.canary", "data": data})
    assert text.endswith("slot=m models=['m']")


def test_wide_characters_keep_columns_aligned() -> None:
    lines = cli_text.columns(("a", "b"), [("日本", "x"), ("abcd", "y")]).plain.split("\n")
    assert lines[1:] == ["日本  x", "abcd  y"]


def test_a_model_that_is_not_ready_says_how_its_last_deployment_ended() -> None:
    value = status("m")
    text = cli_text.status_text(value, {"m": "2.0.0: failed: x"}).plain
    assert "last deployment: 2.0.0: failed: x (see inferctl deployments)" in text
    assert "m3: not ready: mx is wanted (m), nothing serves yet\n  see inferctl deployments" in text


@pytest.mark.parametrize(
    ("loaded", "pinned", "expected"),
    [
        (True, False, "24 MB measured, lazy"),
        (True, True, "24 MB measured, lazy, pinned"),
        (False, False, "not loaded (12 MB + cuda:0 1000 MB measured), lazy"),
    ],
)
def test_a_model_says_what_it_takes_of_memory(loaded: bool, pinned: bool, expected: str) -> None:
    value = residency("cuda:0", loaded=loaded, pinned=pinned) | {"load": "lazy", "source": "measured"}
    assert cli_text.residency_text(value) == expected


def test_status_says_what_models_hold_and_which_are_not_loaded() -> None:
    value = status("m")
    value["models"][1] |= {"ready": True, "reason": "not loaded, loads on demand"}
    text = cli_text.status_text(value, {}).plain
    assert "\nmemory of models: 5 of 9 MB, 7 MB free\n" in text
    assert "m m ready\n  not loaded, loads on demand (12 MB + m 1000 MB m), m, pinned\n" in text


def test_status_says_how_many_workers_there_are_and_may_be() -> None:
    text = cli_text.status_text(status("m"), {}).plain
    assert "\n  workers: 2 (1 to 4), on cores 0,1 | 2,3\n  no further worker: m\n" in text


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ({"configured": False}, "no broker configured"),
        ({"connected": True, "outbox_rows": 0}, "connected, nothing waits"),
        ({"connected": True, "outbox_rows": 2}, "until somebody subscribes"),
        ({"connected": False, "outbox_rows": 2}, "not connected yet"),
    ],
)
def test_the_telemetry_line_says_why_rows_wait(link: dict[str, Any], expected: str) -> None:
    assert expected in cli_text.link_text(link)


# The verbs, against a daemon of canned answers.

Answer = Callable[[dict[str, Any]], list[Buffer]]


@contextmanager
def daemon(path: Path, answer: Answer) -> Iterator[None]:
    """Answer each frame of each connection."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve(connection: socket.socket) -> None:
        decoder = Decoder(Limits())
        with connection:
            while data := connection.recv(65536):
                for frame in decoder.feed(data):
                    connection.sendall(b"".join(bytes(part) for part in answer(frame.header)))

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def result(body: bytes, content_type: str) -> Answer:
    return lambda header: encode(
        {"kind": "result", "id": header["id"], "model": "[/m]", "version": "1", "variant": "v",
         "content_type": content_type}, (body,),
    )  # fmt: skip


def replies(**values: Any) -> Answer:
    return lambda header: encode({"kind": "reply", "id": header["id"], "value": values[header["method"]]})


@pytest.mark.parametrize(
    ("body", "content_type", "printed", "as_json"),
    [
        (b'{"label": "[/x]"}', "application/json", b'"label": "[/x]"', {"answer": {"label": "[/x]"}}),
        (b"[/x] no JSON", "text/plain", b"[/x] no JSON", {"text": "[/x] no JSON", "content_type": "text/plain"}),
        (b"\x89PNG\xff", "image/png", b"\x89PNG\xff", {"base64": "iVBOR/8=", "content_type": "image/png"}),
    ],
)
def test_infer_prints_json_text_and_bytes(
    tmp_path: Path, body: bytes, content_type: str, printed: bytes, as_json: dict[str, Any]
) -> None:
    path = tmp_path / "s"
    with daemon(path, result(body, content_type)):
        for form in ([], ["--json"]):
            done = CliRunner().invoke(main, ["--socket", str(path), "infer", "m", "-", *form], input=b"x")
            assert done.exit_code == 0, done.output
            if form:
                value = json.loads(done.stdout)
                assert value == {"model": "[/m]", "version": "1", "variant": "v", **as_json}
            else:
                assert printed in done.stdout_bytes


def test_deploy_of_a_channel_names_the_version_it_stood_for(tmp_path: Path) -> None:
    record = deployment("") | {"slot": "m", "version": "2.0.0", "channel": "stable", "state": "confirmed"}
    with daemon(tmp_path / "s", replies(deploy={"deployment": "pin-1"}, deployment=record)):
        done = CliRunner().invoke(main, ["--socket", str(tmp_path / "s"), "deploy", "m"])
    assert (done.exit_code, done.stdout) == (0, "m serves 2.0.0, the newest of channel stable (confirmed)\n")
    assert done.stderr == ""  # a terminal would see a bar


def test_a_failed_deployment_ends_with_one_and_says_why(tmp_path: Path) -> None:
    record = deployment("[/x]") | {"state": "rejected"}
    with daemon(tmp_path / "s", replies(deploy={"deployment": "pin-1"}, deployment=record)):
        done = CliRunner().invoke(main, ["--socket", str(tmp_path / "s"), "deploy", "m@1"])
    assert done.exit_code == 1
    assert done.stderr == "[/x] [/x]: rejected: [/x]: [/x]\n"


def test_following_events_ends_quietly_at_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: object, method: str, args: object) -> None:
        raise KeyboardInterrupt

    with daemon(tmp_path / "s", replies()):
        monkeypatch.setattr("agent.client.blocking.Client.call", interrupted)
        done = CliRunner().invoke(main, ["--socket", str(tmp_path / "s"), "events", "--follow"])
    assert (done.exit_code, done.output) == (0, "")


def test_a_refused_socket_names_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(socket.socket):
        def connect(self, address: Any) -> None:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("agent.cli_session.socket.socket", Refusing)
    done = CliRunner().invoke(main, ["--socket", str(tmp_path / "s"), "status"])
    assert done.exit_code == 3
    assert "group inferd" in done.stderr


def test_status_says_what_confines_a_model_and_where_it_runs() -> None:
    said = str(cli_text.status_text(status("m"), {}))
    for line in ("sandbox lacks m", "killed above 600 MiB", "operators: 3 on m, 1 on x"):
        assert line in said
