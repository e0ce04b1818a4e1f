"""Follow a deployment to its end: a bar with rate and time left for people, JSON lines for programs."""

from __future__ import annotations

import json
from typing import Any, Final

import click
from rich.console import Console, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from agent.cli_text import duration, shown, state_text
from agent.client import Client

POLL_S: Final = 20.0
_WAITING: Final = ("queued", "fetch_wait", "waiting_window")
_FETCHING: Final = "fetching"


def follow(client: Client, deployment_id: str, *, as_json: bool, quiet: bool = False) -> dict[str, Any]:
    """Return the final record; on the way show a bar on a terminal, else a line for each step, or JSON, or nothing."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold")),
        _WhileFetching(BarColumn()),
        _WhileFetching(DownloadColumn()),
        TextColumn("{task.fields[pace]}", markup=False),
    )
    console = Console(stderr=True)
    told = ""
    as_lines = not (as_json or quiet or console.is_terminal)
    with Progress(
        *columns, console=console, disable=as_json or quiet or not console.is_terminal, transient=True
    ) as progress:
        task = progress.add_task("begun", total=None, pace="", fetching=False)
        args: dict[str, Any] = {"id": deployment_id, "wait_s": POLL_S}
        while True:
            record: dict[str, Any] = client.call("deployment", args)
            progress.update(
                task,
                description=step_text(record),
                completed=record["bytes_done"],
                total=record["bytes_total"] or None,
                pace=pace_text(record),
                fetching=record["state"] == _FETCHING,
            )
            if as_json:
                click.echo(json.dumps(record))
            if as_lines and not record["final"] and step_text(record) != told:
                told = step_text(record)
                click.echo(told, err=True)
            if record["final"]:
                return record
            args |= {"after_step": record["step"], "after_bytes": record["bytes_done"]}


def step_text(record: dict[str, Any]) -> str:
    """Return what is being done, and why nothing is while something is waited for."""
    version = record["version"] or record["wanted"] or f"({record['channel']})"
    text = f"{record['slot']} {version}: {state_text(record)}"
    if record["state"] in _WAITING and record["message"]:
        text += f" ({record['message']})"
    return shown(text)


def pace_text(record: dict[str, Any]) -> str:
    """Return rate and time left of a download, empty where there is none."""
    rate = record.get("rate_bps") or 0
    if not rate:
        return ""
    left = record.get("eta_s")
    return f"{rate / 1e6:.1f} MB/s" + (f", {duration(left)} left" if left is not None else "")


class _WhileFetching(ProgressColumn):
    """Another column, as long as bytes come: afterwards the line belongs to what is waited for."""

    def __init__(self, column: BarColumn | DownloadColumn) -> None:
        super().__init__()
        self._column = column

    def render(self, task: Task) -> RenderableType:
        return self._column(task) if task.fields["fetching"] else Text("")
