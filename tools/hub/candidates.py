"""Make the kinds of variants that a job asks for; one that cannot be made does not stop the others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tools.hub import convert
from tools.hub.convert import Int8, Kind
from tools.hub.errors import SourceError
from tools.hub.listener import Listener
from tools.hub.quantize_job import FOLDERS, Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A converted model, and how it was made in the end."""

    path: Path
    how: Int8
    note: str = ""


def make(job: Job, scratch: Path, listener: Listener) -> tuple[dict[Kind, Made], dict[Kind, str]]:
    """Convert; return the models that came out, and the reasons of those that did not."""
    made: dict[Kind, Made] = {}
    failed: dict[Kind, str] = {}
    for kind in job.wish.kinds:
        if kind == "static" and job.calibration is None:
            failed[kind] = "no calibration data: give --calibration"
            continue
        try:
            made[kind] = _convert(job, kind, scratch / FOLDERS[kind] / "model.onnx", listener)
        except SourceError as error:
            failed[kind] = str(error)
    return made, failed


def _convert(job: Job, kind: Kind, out: Path, listener: Listener) -> Made:
    """Make one kind. Scales per channel are given up where the quantizer cannot make them for this model."""
    how = job.wish.how
    if kind == "fp16":
        listener.stage("make fp16", 1, "steps")
        wide = convert.fp16(job.source, out, exclude=how.exclude, feeds=job.feeds.feeds)
        listener.advance(1)
        note = f"{len(wide)} nodes stay fp32, since half precision cannot hold their values" if wide else ""
        return Made(path=out, how=replace(how, exclude=(*how.exclude, *wide)), note=note)
    try:
        _int8(job, kind, out, how, listener)
        return Made(path=out, how=how)
    except SourceError as error:
        if not how.per_channel:
            raise
        per_tensor = replace(how, per_channel=False)
        _int8(job, kind, out, per_tensor, listener)
        return Made(path=out, how=per_tensor, note=f"made per tensor, since per channel failed: {error}")


def _int8(job: Job, kind: Kind, out: Path, how: Int8, listener: Listener) -> None:
    if kind == "dynamic":
        listener.stage("make int8 dynamic", 1, "steps")
        convert.dynamic_int8(job.source, out, how)
        listener.advance(1)
        return
    assert job.calibration is not None
    listener.stage("calibrate int8", len(job.calibration.feeds), "steps")
    convert.static_int8(job.source, out, how, job.calibration.feeds, advance=listener.advance)
