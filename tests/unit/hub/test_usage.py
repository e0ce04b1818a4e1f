"""A command line that nobody could carry out ends with exit status 2, before a broker, a store or a key is met."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from tools.inferhub import main

pytestmark = pytest.mark.unit


def refusal(*arguments: str) -> str:
    """Return what is said about a command line that is refused."""
    done = CliRunner().invoke(main, list(arguments))
    assert done.exit_code == 2, done.output
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("deploy m --team t --beside", "which version is to be kept beside the default"),
        ("deploy m@1.0.0 --team t --beside --stage-only", "only staged is beside nothing"),
        ("deploy m@1.0.0 --team t --beside --canary 5", "gets no share of others"),
        ("deploy m@1.0.0 --team t --stage-only --shadow 20", "only staged meets no requests"),
        ("deploy m@1.0.0 --team t --now --force-after 2h", "exclude each other"),
        ("deploy m@1.0.0 --team t --canary 50,5", "canary: "),
        ("deploy m@1.0.0 --team t --agreement 95", "agreement_min: 0..1, got 95"),
        ("deploy m@one --team t", "version 'one': three numbers"),
        ("deploy M --team t", "model 'M': lower-case letters"),
        ("default m one", "version 'one': three numbers"),
        ("remove m@one", "version 'one': three numbers"),
        ("remove @1.0.0", "'model' is missing"),
        ("rollback M", "model 'M': lower-case letters"),
        ("cancel M", "model 'M': lower-case letters"),
        ("cancel m --wait -1", "--wait"),
        ("rollback m --broker mqtt.example", "'mqtt.example' is not HOST:PORT"),
        ("rollback m --broker mqtt.example:99999", "is not HOST:PORT"),
    ],
)
def test_a_command_that_no_box_would_take_is_not_sent(arguments: str, complaint: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as broker:
        broker.setblocking(False)
        address = f"127.0.0.1:{broker.getsockname()[1]}"
        common = ("--device", "box-1", "--key", "no/such/key")
        named = () if "--broker" in arguments else ("--broker", address)
        assert complaint in refusal(*arguments.split(), *common, *named)
        with pytest.raises(BlockingIOError):
            broker.accept()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("rotate-keys --role team --add k.pub", "--role team: one of root, targets, online, operator and team:NAME"),
        ("rotate-keys --role online --threshold 2", "--threshold: only the root has one"),
        ("rotate-keys --role root", "nothing to change"),
        ("rotate-keys --threshold 2", "need --role"),
        ("renew --role online", "what can be renewed is root, targets and team:NAME"),
        ("revoke t/m@1.0.0 --reason bad --to 1.0.0 --team-key k --online-key k", "--to 1.0.0 is the version that goes"),
        ("revoke t/m@1.0.0 --reason bad --to 1.1.0 --drop-channels --team-key k --online-key k", "exclude each other"),
        ("deprecate t/m@1.0.0 --undo --reason bad --team-key k --online-key k", "--undo takes no --reason"),
        ("add-team Audio k.pub --targets-key k --online-key k", "Audio"),
    ],
)
def test_a_change_that_no_store_could_take_opens_none(arguments: str, complaint: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert complaint in refusal(*arguments.split(), "--store", str(store))
    assert not store.exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--root-key k --threshold 2", "--threshold 2 with 1 root keys could never be reached"),
        ("--root-key k --threshold 1 --team vision", "--team vision: write TEAM=KEY.pub"),
        ("--root-key k --threshold 1 --team Vision=k.pub", "Vision"),
    ],
)
def test_a_store_that_makes_no_sense_is_not_begun(arguments: str, complaint: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert complaint in refusal("init", str(store), *arguments.split(), "--targets-key", "k", "--online-key", "k")
    assert not store.exists()


@pytest.mark.parametrize("option", ["--upstream-key", "--upstream-dir"])
def test_whose_signature_is_not_said_without_the_signature(option: str, tmp_path: Path) -> None:
    assert "--upstream-oms" in refusal("pack", str(tmp_path), "--out", str(tmp_path / "out"), option, "x")
