"""What a file of torch holds, by the names in its archive; nothing in it is unpickled, unpacked or run.

TorchScript and exported programs are zip archives, and so are pickled weights, which torch writes under the same names.
"""

from __future__ import annotations

import io
import zipfile
from typing import Final

from agent.errors import UnsafeBundleError

_MEMBERS_MAX: Final = 100_000
_EXPORTED: Final = frozenset({"archive_format", "serialized_exported_program.json"})
_COMPILED: Final = (".so", ".o", ".cubin", ".ptx")


def check_script(view: memoryview) -> None:
    """Check that the bytes are a TorchScript archive.

    Raises:
        UnsafeBundleError: they are not; pickled weights are named as such.
    """
    members = _members(view)
    if "data.pkl" in members and "constants.pkl" not in members:
        raise UnsafeBundleError("pickled weights without a program, not TorchScript")
    if "constants.pkl" not in members or not any(name.startswith("code/") for name in members):
        raise UnsafeBundleError("not TorchScript")


def check_exported(view: memoryview) -> None:
    """Check that the bytes are a program of ``torch.export`` without compiled code.

    Raises:
        UnsafeBundleError: they are not.
    """
    members = _members(view)
    if not _EXPORTED & members:
        raise UnsafeBundleError("not a program of torch.export")
    compiled = sorted(name for name in members if name.endswith(_COMPILED) or "aotinductor" in name.split("/"))
    if compiled:
        raise UnsafeBundleError(f"{compiled[0][:80]!r} is compiled code, which a program of torch.export has not")


def _members(view: memoryview) -> set[str]:
    """Return the archive's members without their common folder."""
    try:
        with zipfile.ZipFile(_Bytes(view)) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError) as error:
        raise UnsafeBundleError(f"not an archive of torch: {error}") from error
    if not 0 < len(names) <= _MEMBERS_MAX:
        raise UnsafeBundleError(f"an archive of {len(names)} members, 1 to {_MEMBERS_MAX} are allowed")
    if len(set(names)) != len(names):
        raise UnsafeBundleError("an archive that names a member twice")
    for name in names:
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise UnsafeBundleError(f"member {name[:80]!r} leaves its archive")
    folder = names[0].partition("/")[0] + "/"
    whole = all(name.startswith(folder) for name in names)
    return {name[len(folder) :] for name in names} if whole else set(names)


class _Bytes(io.RawIOBase):
    """A mapped file as a stream, so that gigabytes of weights are not read."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + (0, self._at, len(self._view))[whence]
        if at < 0:
            raise OSError("before the beginning")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        end = len(self._view) if size is None or size < 0 else self._at + size
        data = bytes(self._view[self._at : end])
        self._at += len(data)
        return data
