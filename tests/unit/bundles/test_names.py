"""What may be a name, a version or a path of a bundle."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.bundles import names
from agent.errors import UnsafeBundleError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("path", ["model.onnx", "fp32/model.onnx", "a/b/c/d/e/f/g/h", "A-b_c.1", "console.txt"])
def test_plain_relative_paths_are_accepted(path: str) -> None:
    assert names.check_path(path) == path


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "../secret",
        "a/../../secret",
        "a/./b",
        "a//b",
        "a/",
        ".hidden",
        "a/.hidden",
        "a\\b",
        "c:evil",
        "a\x00b",
        "a\nb",
        "a b",
        "ä",
        "con",
        "a/NUL.txt",
        "lpt1.onnx",
        "trailing.",
        "x" * 129,
        "a/b/c/d/e/f/g/h/i",
        "manifest.json",
        "VERIFIED.json",
    ],
)
def test_paths_that_could_leave_or_hide_are_refused(path: str) -> None:
    with pytest.raises(UnsafeBundleError):
        names.check_path(path)


@given(st.text(max_size=64))
def test_an_accepted_path_never_leaves_its_folder(path: str) -> None:
    try:
        names.check_path(path)
    except UnsafeBundleError:
        return
    assert not path.startswith("/")
    assert not {"", ".", ".."} & set(path.split("/"))


@pytest.mark.parametrize("paths", [["a", "A"], ["a", "a/b"], ["Dir/x", "dir"], ["x", "x"]])
def test_paths_that_are_one_file_on_some_system_are_refused(paths: list[str]) -> None:
    with pytest.raises(UnsafeBundleError):
        names.check_tree(paths)


def test_files_side_by_side_are_accepted() -> None:
    names.check_tree(["a", "b/a", "b/c", "ab"])


@pytest.mark.parametrize("version", ["0.0.0", "1.4.0", "10.20.30", "1.0.0-rc.1", "1.0.0-alpha-2"])
def test_semantic_versions_are_accepted(version: str) -> None:
    assert names.check_version(version) == version


@pytest.mark.parametrize(
    "version", ["", "1", "1.0", "01.0.0", "1.0.0+build", "1.0.0-", "1.0.0-01", "v1.0.0", "1.0.0\n"]
)
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(UnsafeBundleError):
        names.check_version(version)


def test_versions_sort_by_semantic_precedence() -> None:
    ordered = ["0.9.9", "1.0.0-1", "1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-beta.2", "1.0.0-beta.11", "1.0.0", "1.10.0"]
    shuffled = sorted(ordered)  # as text
    assert shuffled != ordered
    assert sorted(shuffled, key=names.version_key) == ordered


@pytest.mark.parametrize("name", ["", "Vision", "-x", "a/b", "..", "x" * 65, "a\n"])
def test_names_that_could_be_paths_are_refused(name: str) -> None:
    with pytest.raises(UnsafeBundleError):
        names.check_name(name, "team")
