"""The daemon's side of pulling stays light: untrusted bytes and their parsers belong to the trust child."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit

HEAVY = ("tuf", "urllib3", "cryptography", "securesystemslib", "numpy", "onnx", "onnxruntime", "zstandard")


@pytest.mark.parametrize("module", ["puller", "versions", "variants"])
def test_the_daemons_side_imports_no_trust_library(module: str) -> None:
    code = f"import sys, agent.bundles.{module}; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not set(HEAVY) & set(loaded)
