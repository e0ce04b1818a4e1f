"""Whether this machine can try a variant of torch; asked without importing it."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path


def why_not(device_kind: str) -> str:
    """Return why a variant for ``device_kind`` cannot be tried here, empty if it can."""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "torch is not installed (the extra inferd[torch])"
    if device_kind == "cuda" and "+cpu" in version:
        return f"torch {version} has no CUDA"
    if device_kind == "cuda" and not any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/nvhost-gpu")):
        return "there is no CUDA device"
    return ""
