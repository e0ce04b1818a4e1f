"""Rules that matter are checks: imports, generated documents, what a package may say and hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from agent.deploy.state import mermaid
from agent.errors import AgentError
from tools import config_reference

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PACKAGES = ("agent", "handlers", "tools")


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def test_import_contracts_hold(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_configuration_reference_is_current() -> None:
    page = ROOT / "docs/config.md"
    assert page.read_text() == config_reference.render(), "python -m tools.config_reference > docs/config.md"


def test_the_state_diagram_is_current() -> None:
    assert mermaid() in (ROOT / "docs/deployment.md").read_text()


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), "a module docstring is missing"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_left_unfinished(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"\bTODO\b|\bFIXME\b|\bXXX\b|NotImplementedError", text)
    assert not re.search(r"^\s*import pickle|^\s*from pickle", text, re.MULTILINE), "no pickle"


def test_error_codes_are_unique_and_documented() -> None:
    def walk(cls: type[AgentError]) -> list[type[AgentError]]:
        return [cls, *(found for sub in cls.__subclasses__() for found in walk(sub))]

    classes = [cls for cls in walk(AgentError) if cls.__module__ == "agent.errors"]
    codes = [cls.code for cls in classes]
    assert len(set(codes)) == len(codes)
    tree = ast.get_docstring(ast.parse((ROOT / "agent/errors.py").read_text())) or ""
    for cls in classes:
        assert f"{cls.__name__}" in tree
        assert f"({cls.code})" in tree


def test_the_daemon_process_loads_no_runtime_no_numpy_and_no_trust_library() -> None:
    script = (
        "import sys, agent.daemon; "
        "bad = {'numpy', 'onnxruntime', 'torch', 'tuf', 'cryptography', 'securesystemslib', 'urllib3', 'handlers'}; "
        "print(sorted(bad & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_blocking_client_loads_numpy_and_msgpack_only() -> None:
    script = (
        "import sys; before = set(sys.modules); from agent.client import Client; "
        "cython = {name for name in sys.modules if 'cython' in name}; "  # NumPy's own
        "tops = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "known = {'agent', 'numpy', 'msgpack', *cython, *sys.stdlib_module_names}; "
        "print(sorted(tops - known), 'asyncio' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[] False"
