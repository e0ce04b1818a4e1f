"""What ``inferctl`` prints for people, as styled text made from the daemon's plain values.

Promises: nothing that came from a model, a store or a peer is markup or a terminal command, whatever it contains.
No line is cut or wrapped, so that 80 columns are enough and a file gets the same text.
Leaves out: asking the daemon, and JSON.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

Rows = Sequence[dict[str, Any]]
_GAP: Final = 2
_INDENT: Final = "    "
_READINGS: Final = (
    ("memory_used_bytes", 2**20, "MiB in use"),
    ("memory_free_bytes", 2**20, "MiB free"),
    ("temperature_c", 1, "°C"),
    ("power_w", 1, "W"),
    ("utilisation_percent", 1, "% busy"),
)
_CANARY: Final = "canary"
_SEE_DEPLOYMENTS: Final = "see inferctl deployments"


def shown(value: object) -> str:
    """Return ``value`` on one line, with control characters (colours, cursor movements) as visible escapes."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in str(value)
    )


def status_text(value: Mapping[str, Any], failures: Mapping[str, str]) -> Text:
    """Return the whole of ``inferctl status``.

    Args:
        value: What the daemon said.
        failures: Why the last deployment of a model failed, by model.
    """
    agent, device = value["agent"], value["device"]
    gpus = ", ".join(map(shown, device["gpus"])) or f"none ({shown(device['gpu_reason'])})"
    lines = [
        Text.assemble(
            (shown(device["id"]), "bold"),
            f", inferd {shown(agent['version'])}, up {duration(agent['uptime_s'])}, pid {agent['pid']}",
        ),
        Text(
            f"{device['cores']} cores, {device['memory_bytes'] / 2**30:.1f} GiB, "
            f"profile {shown(device['profile'])}, GPU: {gpus}"
        ),
        *_profile_lines(device),
        Text(f"telemetry: {link_text(value['telemetry'])}"),
        *([Text(f"trust: {freshness_text(value['trust'])}")] if value.get("trust") else []),
        *(Text(f"memory of models: {_place_text(*place)}") for place in value.get("memory", {}).items()),
        *_model_lines(value["models"], value.get("slots", []), failures),
        *_waiting_lines(value.get("slots", []), value.get("holds", [])),
        columns(
            ("process", "pid", "PSS"),
            [(row["role"], row["pid"], f"{row['pss_bytes'] / 1e6:.1f} MB") for row in value["processes"]],
        ),
    ]
    return Text("\n").join(lines)


def models_text(rows: Rows) -> Text:
    """Return the table of models; what does not fit a column follows below its row."""
    cells, notes = [], []
    for row in rows:
        metadata = row["metadata"] or {"inputs": [], "outputs": []}
        active = (row["active"] or "-") + (" (on trial)" if row["trial"] else "")
        ready = "yes" if row["ready"] else "no"
        cells.append((row["slot"], ready, active, row["previous"] or "-", row["wanted"] or "-", row["source"] or "-"))
        notes.append(
            ([] if row["ready"] else [f"not ready: {row['reason']}"])
            + ([f"deployment waits: {row['waits']}"] if row.get("waits") else [])
            + unmet_lines(row)
            + ([candidate_text(row["candidate"])] if row.get("candidate") else [])
            + ([f"held by {row['held_by']}"] if row.get("held_by") else [])
            + ([f"prepared: {row['prepared']}"] if row.get("prepared") else [])
            + ([f"memory: {residency_text(row['residency'])}"] if row.get("residency") else [])
            + [_ladder_text(row["variants"])] * bool(row["variants"])
            + [line for one in row["variants"] for line in variant_lines(one)]
            + [f"{side}: {tensors_text(metadata[side])}" for side in ("inputs", "outputs") if metadata[side]]
        )
    return columns(("model", "ready", "active", "previous", "wanted", "source"), cells, notes)


def unmet_lines(slot: Mapping[str, Any]) -> list[str]:
    """Return that a slot does not serve what is wanted of it, why, and what to do, not yet ``shown``."""
    missed = slot.get("unmet")
    if not missed:
        return []
    asked = f"{slot['wanted']} ({slot['source']})"
    tried = f" as {missed['version']}" if missed["version"] not in ("", slot["wanted"]) else ""
    return [f"not as wanted: {asked} was tried{tried}: {missed['state']}: {reason_text(missed)}", missed["advice"]]


def candidate_text(candidate: Mapping[str, Any]) -> str:
    """Return what is tried beside what serves, not yet ``shown``: ``candidate 2.0.0: canary 25 %``."""
    return f"candidate {candidate['version']}: canary{share_text(candidate['percent'])}"


def share_text(percent: float) -> str:
    """Return the share of the requests that a candidate answers, to stand after the word canary."""
    return f" {percent:g} %" if percent else ", copies only"


def state_text(record: Mapping[str, Any]) -> str:
    """Return where a deployment stands, a canary with its share, not yet ``shown``."""
    return str(record["state"]) + (share_text(record["percent"]) if record["state"] == _CANARY else "")


def residency_text(residency: Mapping[str, Any]) -> str:
    """Return whether a model is in memory and what it takes, not yet ``shown``: ``17 MB measured, lazy``."""
    loaded = residency["loaded"]
    sizes = residency["held_bytes"] if loaded else residency["worker_bytes"]
    parts = [
        f"{size / 1e6:.0f} MB" if place == "host" else f"{place} {size / 1e6:.0f} MB" for place, size in sizes.items()
    ]
    takes = f"{' + '.join(parts)} {residency['source']}" if parts else "unknown"
    marks = [residency["load"], *(["pinned"] if residency["pinned"] else [])]
    return ", ".join([takes if loaded else f"not loaded ({takes})", *marks])


def deployments_text(rows: Rows) -> Text:
    """Return the table of deployments; why one ended as it did follows below its row."""
    cells, notes = [], []
    for row in rows:
        when = time.strftime("%m-%d %H:%M:%S", time.localtime(row["updated"]))
        version = row["version"] or row["wanted"] or f"({row['channel']})"
        cells.append((when, row["slot"], version, row["previous"] or "-", state_text(row), row["source"]))
        notes.append([": ".join(filter(None, (row["id"], reason_text(row))))])
    return columns(("when", "model", "version", "from", "state", "source"), cells, notes, note_title="id: reason")


def reason_text(record: Mapping[str, Any]) -> str:
    """Return why a deployment stands where it does, not yet ``shown``."""
    return f"{record['code']}: {record['message']}" if record["code"] else str(record["message"])


def variant_lines(row: Mapping[str, Any]) -> list[str]:
    """Return when a variant is tried again and what was measured of it, not yet ``shown``."""
    lines = []
    if row["state"] == "failed":
        again = (
            f"tried again in {duration(row['retry_s'])}" if row["retry_s"] is not None else "not tried again by itself"
        )
        lines.append(f"{row['variant']}: failed {row['failures']} times ({row['kind']}), {again}")
    if row.get("measured"):
        lines.append(f"{row['variant']}: {row['measured']['reason']}")
    return lines


def link_text(link: Mapping[str, Any]) -> str:
    """Return the state of the telemetry link in one line."""
    if not link.get("configured", True):
        return "no broker configured"
    waiting, reason = link.get("outbox_rows", 0), link.get("reason")
    if not link.get("connected"):
        return f"offline ({shown(reason or 'not connected yet')}), {waiting} rows wait in the outbox"
    if not waiting:
        return "connected, nothing waits"
    why = shown(reason) if reason else "for their turn, or until somebody subscribes to their topics"
    return f"connected, {waiting} rows wait ({why})"


def freshness_text(standing: Mapping[str, Any]) -> str:
    """Return how far the box may trust what it last heard of its store, in one line."""
    freshness = standing["freshness"]
    heard = "no store was ever verified" if freshness == "unknown" else f"signed {age(standing['age_s'])} ago"
    clock = "" if standing["clock_trusted"] else "; the clock is wrong: it is before that signature"
    return f"{shown(freshness).replace('_', ' ')}, {heard}{clock}"


def age(seconds: float) -> str:
    """Return ``seconds`` as a person tells an age: days once there are two."""
    return f"{int(seconds // 86_400)} days" if seconds >= 2 * 86_400 else duration(seconds)


def human_bytes(count: float) -> str:
    """Return a number of bytes for a person: ``3.2 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def event_text(row: Mapping[str, Any]) -> str:
    """Return one event as one line; lists of things with fields, such as a canary's evidence, are left to JSON."""
    when = time.strftime("%H:%M:%S", time.localtime(row["wall_s"]))
    data = {name: value for name, value in row["data"].items() if not _is_table(value)}
    fields = " ".join(f"{shown(name)}={shown(value)}" for name, value in data.items())
    return f"{when} {shown(row['severity']):7} {shown(row['type']):28} {fields}".rstrip()


def tensors_text(tensors: Rows) -> str:
    """Return a model's inputs or outputs in one line, not yet ``shown``."""
    return ", ".join(f"{tensor['name']} {tensor['datatype']}{tensor['shape']}" for tensor in tensors) or "-"


def duration(seconds: float) -> str:
    """Return ``seconds`` for a person: ``3 h 20 min``."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else (f"{minutes} min {seconds} s" if minutes else f"{seconds} s")


def columns(
    titles: Sequence[str],
    rows: Sequence[Sequence[object]],
    notes: Sequence[Sequence[str]] = (),
    *,
    note_title: str = "",
) -> Text:
    """Return aligned columns below bold titles.

    Args:
        titles: One per column.
        rows: Cells, one per column.
        notes: Per row, lines to print indented below it.
        note_title: What the lines below are, if they are worth a title.
    """
    table = [[shown(cell) for cell in row] for row in (titles, *rows)]
    widths = [max(cell_len(row[column]) for row in table) for column in range(len(titles))]
    head = _aligned(table[0], widths) + (f" / {note_title}" if note_title else "")
    lines = [Text(head, style="bold")]
    for number, row in enumerate(table[1:]):
        lines.append(Text(_aligned(row, widths)))
        lines += [Text(_INDENT + shown(note), style="dim") for note in (notes[number] if notes else ())]
    return Text("\n").join(lines)


def print_text(text: Text, *, console: Console | None = None) -> None:
    """Print without wrapping or guessing at colours."""
    (console or Console(highlight=False, soft_wrap=True)).print(text, soft_wrap=True, highlight=False)


def _is_table(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _ladder_text(rows: Rows) -> str:
    """Return a model's variants best first, each with its state."""
    return "variants: " + ", ".join(f"{row['variant']} ({row['state']})" for row in rows)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cell + " " * (width + _GAP - cell_len(cell)) for cell, width in zip(cells, widths, strict=True)]
    return "".join(padded).rstrip()


def _profile_lines(device: Mapping[str, Any]) -> list[Text]:
    """Return why the profile was chosen, and how each GPU is doing."""
    lines = [Text(f"  profile {shown(device['profile'])}: {shown(device['profile_reason'])}")]
    for gpu in device["gpu_readings"]:
        reading = gpu["reading"] or {}
        words = [
            f"{reading[field] / scale:.0f} {unit}" for field, scale, unit in _READINGS if reading.get(field) is not None
        ]
        lines.append(Text(f"  GPU {gpu['index']}: {shown(gpu['fault']) or ', '.join(words) or 'no reading yet'}"))
    return lines


def _model_lines(rows: Rows, slots: Rows, failures: Mapping[str, str]) -> list[Text]:
    lines: list[Text] = []
    missed = {slot["slot"]: [Text(f"  {shown(line)}") for line in unmet_lines(slot)] for slot in slots}
    for row in rows:
        lines += _serving_lines(row) if "version" in row else _absent_lines(row["slot"], row["reason"])
        failure = [] if row["ready"] else [_last_failure(failures.get(row["slot"]))]
        lines += missed.get(row["slot"]) or failure
    known = {row["slot"] for row in rows}
    for slot in slots:
        if slot["slot"] not in known and slot["wanted"]:
            lines += _absent_lines(slot["slot"], f"{slot['wanted']} is wanted ({slot['source']}), nothing serves yet")
            lines += missed[slot["slot"]] or [_last_failure(failures.get(slot["slot"]))]
    return lines


def _waiting_lines(slots: Rows, holds: Rows) -> list[Text]:
    """Return which deployments wait, and which applications hold models."""
    lines = [
        Text(f"{shown(row['slot'])}: deployment waits: {shown(row['waits'])}") for row in slots if row.get("waits")
    ]
    for hold in holds:
        limit = "" if hold["counts"] else ", too long to count"
        lines.append(
            Text(f"{shown(hold['model'])} is held by {shown(hold['holder'])} for {duration(hold['held_s'])}{limit}")
        )
    return lines


def _serving_lines(row: Mapping[str, Any]) -> list[Text]:
    answers, sandbox = row["answers"], (row["sandbox"] or {}).get("level", "unknown")
    ready = ("ready", "green") if row["ready"] else (f"not ready: {shown(row['reason'])}", "red")
    residency = row.get("residency")
    name = f"{shown(row['model'])} {shown(row['version'])}" + " beside" * (row.get("role") == "beside")
    if residency is not None and not residency["loaded"]:
        takes = residency_text(residency).removeprefix("not loaded ")
        note = [f"  {shown(row['reason'])} {shown(takes)}"] if row["ready"] else []
        return [Text.assemble((name, "bold"), " ", ready), *map(Text, note)]
    facts = f"{answers['good']} good answers, {answers['faults']} faults{_latency(row['latency_s'])}"
    return [
        Text.assemble(
            (name, "bold"),
            " ",
            ready,
            f", {shown(row['variant'])} on {shown(row['device'])}, sandbox {shown(sandbox)}",
        ),
        Text(f"  {facts}"),
        *_confinement_lines(row),
        *_worker_lines(row),
        *_test_lines(row.get("selftest")),
        *_canary_lines(row.get("canary")),
        *(Text(f"  not {shown(skip['variant'])}: {shown(skip['reason'])}") for skip in row["fallbacks"]),
        *(Text(f"  {shown(line)}") for one in row.get("variants", ()) for line in variant_lines(one)),
    ]


def _canary_lines(canary: Mapping[str, Any] | None) -> list[Text]:
    """Return what is tried beside what serves."""
    if canary is None:
        return []
    share = f"{canary['canary_percent']:g} % of the keys" if canary["canary_percent"] else "no share yet"
    copies = f", {canary['agreement']:.1%} of {canary['compared']} copies agree" if canary["compared"] else ""
    return [Text(f"  candidate {shown(canary['version'])}: {share}, {canary['requests']} requests{copies}")]


def _test_lines(test: Mapping[str, Any] | None) -> list[Text]:
    """Return why the last self-test of what serves was not passed."""
    if test is None or test["ok"]:
        return []
    return [
        Text(f"  self-test of {shown(test['variant'])} failed {duration(test['age_s'])} ago: {shown(test['message'])}")
    ]


def _confinement_lines(row: Mapping[str, Any]) -> list[Text]:
    """Return what the sandbox lacks, how much memory a worker may use, and which operators run where."""
    lines = []
    if detail := (row["sandbox"] or {}).get("detail"):
        lines.append(Text(f"  sandbox lacks {shown(detail)}"))
    if limit_bytes := row.get("resident_bytes_max"):
        lines.append(Text(f"  killed above {limit_bytes >> 20} MiB"))
    if len(placement := row.get("placement") or {}) > 1:
        counts = ", ".join(f"{count} on {shown(name)}" for name, count in placement.items())
        lines.append(Text(f"  operators: {counts}"))
    return lines


def _worker_lines(row: Mapping[str, Any]) -> list[Text]:
    """Return how many workers there are, where their number can change, and which cores they are bound to."""
    scaling = row.get("scaling")
    if scaling is None:
        return []
    count, least, most = len(row["workers"]), scaling["min"], scaling["max"]
    bound = " | ".join(",".join(map(shown, cores)) for cores in scaling["cores"] if cores)
    parts = [f"  workers: {count}"] + ([f" ({least} to {most})"] if most > least else [])
    parts += [f", on cores {bound}"] if bound else []
    lines = [Text("".join(parts))] if most > 1 or bound else []
    return lines + ([Text(f"  no further worker: {shown(scaling['held'])}")] if scaling["held"] else [])


def _place_text(place: str, sizes: Mapping[str, Any]) -> str:
    where = "" if place == "host" else f"{shown(place)}: "
    budget = f"{sizes['budget_bytes'] / 1e6:.0f} MB" if sizes["budget_bytes"] else "unbounded"
    return f"{where}{sizes['held_bytes'] / 1e6:.0f} of {budget}, {sizes['available_bytes'] / 1e6:.0f} MB free"


def _absent_lines(model: str, reason: str) -> list[Text]:
    return [Text.assemble((shown(model), "bold"), ": ", (f"not ready: {shown(reason)}", "red"))]


def _last_failure(failure: str | None) -> Text:
    if failure is None:
        return Text(f"  {_SEE_DEPLOYMENTS}")
    return Text(f"  last deployment: {shown(failure)} ({_SEE_DEPLOYMENTS})")


def _latency(latency: Mapping[str, float]) -> str:
    if not latency["p50"]:
        return ""
    return f"; p50 ≤ {latency['p50'] * 1e3:g} ms, p99 ≤ {latency['p99'] * 1e3:g} ms"
