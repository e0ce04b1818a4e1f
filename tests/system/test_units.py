"""The unit files as systemd's own tools judge them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

UNITS: Final = Path(__file__).parents[2] / "systemd"
PROGRAM: Final = "/usr/lib/inferd/venv/bin/inferd"
SCORE_MAX_TENTHS: Final = 20

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(
        shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing: apt-get install systemd"
    ),
]


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """A copy of all units whose program exists on this machine."""
    for path in [*UNITS.glob("*.service"), *UNITS.glob("*.socket")]:
        (tmp_path / path.name).write_text(path.read_text().replace(PROGRAM, "/bin/true"))
    return tmp_path


def analyze(*arguments: object) -> tuple[int, str]:
    done = subprocess.run(
        ["systemd-analyze", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def verify(folder: Path) -> tuple[int, str]:
    names = sorted(folder.glob("*.service")) + sorted(folder.glob("*.socket"))
    assert len(names) == 4
    return analyze("verify", "--man=no", *names)


def security(unit: Path) -> tuple[int, str]:
    return analyze("security", "--offline=true", f"--threshold={SCORE_MAX_TENTHS}", unit)


def test_the_service_runs_the_installed_program() -> None:
    assert f"ExecStart={PROGRAM} " in (UNITS / "inferd.service").read_text()


def test_units_are_valid_to_the_last_key(units: Path) -> None:
    assert verify(units) == (0, "")


def test_the_gpu_drop_in_is_valid(units: Path) -> None:
    folder = units / "inferd.service.d"
    folder.mkdir()
    shutil.copy(UNITS / "inferd.service.d/gpu.conf.example", folder / "gpu.conf")
    assert verify(units) == (0, "")


def test_the_service_is_exposed_below_two_of_ten(units: Path) -> None:
    code, said = security(units / "inferd.service")
    assert code == 0, said.splitlines()[-1]


def test_an_open_service_would_not_pass(tmp_path: Path) -> None:
    unit = tmp_path / "open.service"
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    assert security(unit)[0] != 0
