"""Tiny real models of torch, as TorchScript and as exported programs, for the bundle folders of ``models.py``.

Made in a process of its own that may run operators; importing this module needs no torch.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import models

MISSING = "" if importlib.util.find_spec("torch") else "the torch extra is not installed: make test-torch installs it"
needs_torch = [pytest.mark.torch, pytest.mark.skipif(bool(MISSING), reason=MISSING)]

_SOURCE = Path(__file__).with_name("torch_files.py")


def write_all(folder: Path) -> Path:
    """Write every model file of ``torch_files.py`` into ``folder``; return it."""
    done = subprocess.run([sys.executable, str(_SOURCE), str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def bundle(folder: Path, model: Path, signature: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Put the file ``model`` into a bundle directory below ``folder`` and return the worker's spec."""
    folder.mkdir(exist_ok=True)
    spec = models.bundle(folder, models.linear(), signature)
    entry = f"torch/{model.name}"
    target = Path(spec["bundle_dir"]) / entry
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(model, target)
    return spec | {"runtime": "torch", "providers": [], "entry": entry} | changes
