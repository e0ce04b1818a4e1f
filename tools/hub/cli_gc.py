"""The verbs that keep a store in order: store gc."""

from __future__ import annotations

import re
import time

import click

from agent.cli_text import human_bytes
from tools.hub.cli import emit, json_option, open_repository, progress, store_option
from tools.hub.gc import METADATA_DAYS_MIN, collect
from tools.hub.gc import plan as plan_collection


def _days(_ctx: click.Context, _parameter: click.Parameter, value: str) -> int:
    match = re.fullmatch(r"([0-9]{1,5})d?", value)
    if match is None:
        raise click.BadParameter(f"{value!r} is not a number of days such as 90d")
    return int(match[1])


@click.group("store")
def store_group() -> None:
    """Keep a store in order.

    \b
    Example: inferhub store gc --store store --dry-run
    """


@store_group.command("gc")
@store_option
@click.option("--grace", callback=_days, default="90d", show_default=True, metavar="DAYS",
              help=f"So long a blob stays after the last manifest that names it has gone. Signed metadata stays "
              f"{METADATA_DAYS_MIN} days at least, roots for ever.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@json_option
def collect_garbage(store: str, grace: int, dry_run: bool) -> None:
    """Remove blobs that no manifest names, and metadata that was replaced long ago.

    Revoked and deprecated versions stay: their manifests are still in an index.

    \b
    Example: inferhub store gc --store store --grace 90d --dry-run
    """
    objects, repository = open_repository(store)
    with objects.lock(), progress() as bars:
        found = plan_collection(objects, repository.state(), now=time.time(), grace_days=grace, listener=bars)
        if not dry_run:
            collect(objects, found, bars)
    done = "would go" if dry_run else "removed"
    emit(
        {
            "dry_run": dry_run,
            "blobs": len(found.blobs),
            "targets": len(found.targets),
            "metadata": len(found.metadata),
            "cut": len(found.cut),
            "bytes": found.bytes,
            "blobs_kept": found.blobs_kept,
            "bytes_kept": found.bytes_kept,
            "names": [item.name for item in found.all()],
        },
        *(f"  {item.name}  {human_bytes(item.size)}" for item in found.all() if dry_run),
        f"{done}: {len(found.blobs)} blobs, {len(found.targets)} documents, {len(found.metadata)} metadata files, "
        f"{len(found.cut)} left by cuts, {human_bytes(found.bytes)} together",
        f"kept: {found.blobs_kept} blobs, {human_bytes(found.bytes_kept)}",
    )
