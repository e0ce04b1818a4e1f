"""Settings for all tests, and what is too dear to be made more than once."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before anything imports ONNX Runtime
_MEMORY = Path("/dev/shm")


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """A temporary folder in memory, where there is one: for tests that sync often and are not about a disk's pace."""
    with tempfile.TemporaryDirectory(prefix="inferd-", dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def torch_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model files of ``tests/fakes/torch_files.py``."""
    from tests.fakes import torch_models

    return torch_models.write_all(tmp_path_factory.mktemp("torch"))
