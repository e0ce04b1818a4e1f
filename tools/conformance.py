"""What ``tools/tuf-conformance-client`` does: the box's TUF client as the public conformance suite drives it.

``init`` keeps an anchor, ``refresh`` brings metadata up to date, ``download`` fetches targets by name. All trust is
``agent.bundles.trust``, the code a pull runs; two things differ on purpose. The suite fakes clocks of the past, so the
floor of the build time is off (the floors that signatures raise stay on), and it reads every ``*.json`` at the top of
its metadata folder as metadata, so anchor and floors stand in folders below.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from urllib.parse import quote

from tuf.api.exceptions import LengthOrHashMismatchError
from tuf.api.metadata import TargetFile

from agent.bundles.fetcher import Transport
from agent.bundles.layout import Layout
from agent.bundles.trust import TrustedStore
from agent.durable import write_file
from agent.errors import AgentError, UntrustedError

_TIMEOUT_S: Final = 30.0


class SuiteLayout(Layout):
    """The suite's metadata folder as ``root``: metadata at its top, ours below."""

    __slots__ = ()

    @property
    def metadata(self) -> Path:
        return self.root

    @property
    def floors(self) -> tuple[Path, Path]:
        return self.root / "floors" / "a.json", self.root / "floors" / "b.json"

    @property
    def anchor(self) -> Path:
        return self.root / "anchor" / "root.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out one command; 0 is success, 1 any failure, whose code and reason go to standard error."""
    options = _parser().parse_args(arguments)
    layout = SuiteLayout(options.metadata_dir.absolute())
    try:
        match options.command:
            case "init":
                initialise(layout, options.root.read_bytes())
            case "refresh":
                _trusted(layout, options.metadata_url)
            case _:
                trusted = _trusted(layout, options.metadata_url)
                for name in options.target_name:
                    download(trusted, name, options.target_base_url, options.target_dir)
    except AgentError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def initialise(layout: SuiteLayout, anchor: bytes) -> None:
    """Keep ``anchor`` as what this client was built with; no request is made."""
    layout.anchor.parent.mkdir(parents=True, exist_ok=True)
    write_file(layout.anchor, anchor)
    write_file(layout.metadata / "root.json", anchor)


def download(trusted: TrustedStore, name: str, base_url: str, folder: Path) -> Path:
    """Bring the target ``name`` into ``folder``, unless it is there already; return its path.

    Raises:
        TargetNotFoundError: nobody who may sign ``name`` lists it.
        UntrustedError: the bytes are not what was signed.
        StoreError: it cannot be fetched.
    """
    info = trusted.target_info(name)
    path = folder / quote(name, "")
    if not _is_current(path, info):
        url = f"{base_url.rstrip('/')}/{quote(_object_name(trusted, info))}"
        data = _transport().read_all(url, size_bytes_max=info.length, timeout_s=_TIMEOUT_S)
        _verify(info, data)
        write_file(path, data)
        now = time.time_ns()
        os.utime(path, ns=(now, now))  # the suite orders by time, and a file system's own clock is coarse
    return path


def _trusted(layout: SuiteLayout, metadata_url: str) -> TrustedStore:
    trusted = TrustedStore(
        layout,
        layout.anchor.read_bytes(),
        url=metadata_url.rstrip("/").removesuffix("/metadata"),
        transport=_transport(),
        wall=time.time(),
        build_time=0,
    )
    trusted.refresh()
    return trusted


def _transport() -> Transport:
    return Transport(stall_timeout_s=_TIMEOUT_S)


def _object_name(trusted: TrustedStore, info: TargetFile) -> str:
    if not trusted.consistent_snapshot:
        return info.path
    folder, slash, name = info.path.rpartition("/")
    return f"{folder}{slash}{info.hashes['sha256']}.{name}"


def _is_current(path: Path, info: TargetFile) -> bool:
    try:
        info.verify_length_and_hashes(path.read_bytes())
    except (FileNotFoundError, LengthOrHashMismatchError):
        return False
    return True


def _verify(info: TargetFile, data: bytes) -> None:
    try:
        info.verify_length_and_hashes(data)
    except LengthOrHashMismatchError as error:
        raise UntrustedError(f"{info.path}: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tuf-conformance-client", description="The box's TUF client, for the suite.")
    parser.add_argument("--metadata-dir", type=Path, required=True)
    parser.add_argument("--metadata-url", default="")
    parser.add_argument("--target-name", action="append", default=[])
    parser.add_argument("--target-dir", type=Path)
    parser.add_argument("--target-base-url", default="")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init", help="keep ROOT as the anchor").add_argument("root", type=Path)
    commands.add_parser("refresh", help="bring the metadata up to date")
    commands.add_parser("download", help="fetch each --target-name into --target-dir")
    return parser
