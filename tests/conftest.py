"""Settings for all tests, and what is too dear to be made more than once."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before anything imports ONNX Runtime


@pytest.fixture(scope="session")
def torch_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model files of ``tests/fakes/torch_files.py``."""
    from tests.fakes import torch_models

    return torch_models.write_all(tmp_path_factory.mktemp("torch"))
