"""Archives of torch by their members: programs, and what is none."""

from __future__ import annotations

import io
import zipfile

import pytest

from agent.bundles import torch_file
from agent.errors import UnsafeBundleError

SCRIPT = ("m/constants.pkl", "m/data.pkl", "m/code/__torch__.py", "m/data/0")
EXPORTED = ("m/archive_format", "m/models/model.json", "m/data/weights/weight_0")


def archive(*names: str) -> memoryview:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for name in names:
            made.writestr(name, b"x")
    return memoryview(buffer.getvalue())


def test_programs_are_accepted() -> None:
    torch_file.check_script(archive(*SCRIPT))
    torch_file.check_exported(archive(*EXPORTED))
    torch_file.check_exported(archive("serialized_exported_program.json", "version"))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("w/data.pkl", "w/data/0", "w/version"), "pickled weights"),
        (EXPORTED, "not TorchScript"),
        (("m/constants.pkl", "m/data.pkl"), "not TorchScript"),
        ((*SCRIPT, "m/../../x"), "leaves its archive"),
        ((*SCRIPT, "/etc/x"), "leaves its archive"),
        ((), "0 members"),
    ],
)
def test_what_is_no_torchscript_is_refused(names: tuple[str, ...], words: str) -> None:
    with pytest.raises(UnsafeBundleError, match=words):
        torch_file.check_script(archive(*names))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (SCRIPT, "not a program"),
        ((*EXPORTED, "m/data/aotinductor/model/wrapper.cpp"), "compiled code"),
        ((*EXPORTED, "m/data/kernel.so"), "compiled code"),
    ],
)
def test_what_is_no_exported_program_is_refused(names: tuple[str, ...], words: str) -> None:
    with pytest.raises(UnsafeBundleError, match=words):
        torch_file.check_exported(archive(*names))


def test_a_member_named_twice_is_refused() -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        view = archive(*SCRIPT, SCRIPT[0])
    with pytest.raises(UnsafeBundleError, match="twice"):
        torch_file.check_script(view)


@pytest.mark.parametrize("data", [b"", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(100)])
def test_what_is_no_archive_is_refused(data: bytes) -> None:
    with pytest.raises(UnsafeBundleError, match="not an archive"):
        torch_file.check_script(memoryview(data))
