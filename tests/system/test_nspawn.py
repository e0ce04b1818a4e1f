"""inferd under a real systemd: installed into a Debian 12 container by its installer, booted, proved, powered off."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Final

import pytest

from tests.system.container import ROOT, Container, why_not
from tests.system.proofs import PROOFS

pytestmark = pytest.mark.system
_STATE: Final = Path(os.environ.get("STATE") or ROOT / ".state").absolute()


@pytest.fixture(scope="module")
def report() -> dict[str, dict[str, Any]]:
    """What the proofs said, by name; the container is kept only when its preparation failed."""
    if reason := why_not():
        pytest.skip(reason)
    folder = _STATE / "container"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    container = Container(_STATE, folder)
    container.prepare()
    rows = container.boot()
    for name in ("journal.txt", "proofs.log", "report.jsonl"):
        if (container.root / name).exists():
            shutil.copy(container.root / name, _STATE / f"container-{name}")
    shutil.rmtree(folder)
    return rows


@pytest.mark.parametrize("name", [proof.__name__ for proof in PROOFS])
def test_under_systemd(report: dict[str, dict[str, Any]], name: str) -> None:
    assert name in report, f"the container stopped before it: {list(report)}"
    row = report[name]
    print(row["said"])
    assert row["ok"], row["trace"]
