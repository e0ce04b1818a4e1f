"""The verb that fills a stick for boxes without a network: export."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from agent.cli_text import human_bytes
from agent.errors import InvalidInputError
from tools.hub.cli import (
    Passwords,
    emit,
    json_option,
    key_option,
    open_repository,
    password_option,
    progress,
    store_option,
)
from tools.hub.cli_store import parse_model
from tools.hub.edition import metadata_object
from tools.hub.export import VALID_DAYS, VALID_DAYS_MAX, Exporter, Wanted, held_chunks
from tools.hub.objects import Folder
from tools.hub.publish import rfc3339
from tools.hub.verify import Part, verify


@click.command()
@click.argument("models", metavar="TEAM/NAME[@VERSION]...", nargs=-1, required=True)
@store_option
@click.option("--to", "target", required=True, metavar="DIR", type=click.Path(path_type=Path, file_okay=False),
              help="Folder on the stick; may hold an earlier export of the same store.")  # fmt: skip
@click.option("--channel", default="stable", show_default=True, help="Names the version where none is given.")
@click.option("--valid-days", type=click.IntRange(1, VALID_DAYS_MAX), default=VALID_DAYS, show_default=True,
              help="So long boxes accept the stick.")  # fmt: skip
@click.option("--have", "held", multiple=True, metavar="PATH", type=click.Path(path_type=Path),
              help="What the boxes hold: a copy of a version folder, or its manifest.json alone. Its blobs are left "
              "out. Repeat for each.")  # fmt: skip
@key_option("--online-key", "Signs the stick's timestamp, and the store's anew.")
@password_option
@json_option
def export(
    models: tuple[str, ...],
    store: str,
    target: Path,
    channel: str,
    valid_days: int,
    held: tuple[Path, ...],
    online_key: str,
    passwords: Passwords,
) -> None:
    """Copy versions to a stick as a small complete store, for inferctl sideload.

    Safe to repeat after a cut. Afterwards the stick is checked as a box would do it.

    \b
    Example: inferhub export vision/yolo@1.4.0 --to /media/usb --store store --online-key keys/online
             inferhub export vision/yolo --have yolo-1.3.0/manifest.json --to /media/usb --store store \\
                 --online-key keys/online
    """
    wanted = [Wanted(team=team, name=name, version=version, channel=channel)
              for team, name, version in map(parse_model, models)]  # fmt: skip
    chunks = frozenset[str]().union(*map(held_chunks, held))
    objects, repository = open_repository(store)
    stick = Folder(target.absolute())
    if isinstance(objects, Folder) and stick.root.resolve() == objects.root.resolve():
        raise InvalidInputError(f"--to {target}: this is the store itself")
    with objects.lock(), stick.lock(create=True), progress() as bars:
        done = Exporter(objects, repository, stick, time.time).export(
            wanted,
            online_signer=passwords.signer(online_key),
            valid_days=valid_days,
            held=chunks,
            listener=bars,
        )
        parts = [Part(item["team"], item["name"], item["version"]) for item in done.models]
        anchor = objects.read(metadata_object("root", 1))
        verify(str(stick.root), anchor, deep=False, parts=parts, held=chunks, listener=bars)
    early = done.expires + timedelta(hours=1) < datetime.now(UTC) + timedelta(days=valid_days)
    emit(
        asdict(done) | {"to": str(stick.root), "expires": f"{done.expires:%Y-%m-%dT%H:%M:%SZ}"},
        *(f"{item['team']}/{item['name']}@{item['version']}  manifest {item['manifest_sha256'][:12]}"
          for item in done.models),
        f"{target}: {done.blobs_new} of {done.blobs} blobs written ({human_bytes(done.bytes_new)} of "
        f"{human_bytes(done.bytes)}), {done.blobs_left_out} left out because the boxes hold them",
        f"signed {rfc3339(done.issued)}, accepted until {done.expires:%Y-%m-%d}; the store is signed a second later",
        *([f"attention: {done.expires_role} expires before the {valid_days} days are over; renew it and export again"]
          if early else []),
    )  # fmt: skip
