"""Give a bundle's sources the variants that are worth having: made from its fp32 model, measured, judged, written down.

``quantize`` makes each kind, measures all of them beside fp32 on this machine, judges them by the gate, and keeps
those that pass: models in folders of their own, entries, priorities and golden tolerances in ``variants.toml``.
Promises: a kind that cannot be made or run is reported with its reason and does not stop the others; what a person
wrote is only read; if nothing passes, what an earlier run made is gone too, because it is no longer vouched for.
Leaves out: the choice on a box, which measures for itself, and exporting to ONNX (``torch_export``).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

from tools.hub import agreement, convert
from tools.hub.candidates import Made, make
from tools.hub.convert import Kind
from tools.hub.errors import TrialError
from tools.hub.gate import Figures, judge
from tools.hub.listener import Listener
from tools.hub.measure import Measured, measure
from tools.hub.quantize_job import Job, Wish
from tools.hub.quantize_result import Report, Row, write

_FP32: Final = "fp32"


def quantize(folder: Path, wish: Wish, listener: Listener | None = None) -> Report:
    """Make, measure and judge variants of the sources in ``folder``; keep those that pass.

    Raises:
        SourceError: the sources, the inputs or the calibration data cannot be used.
        TrialError: the fp32 model itself cannot be run on the inputs.
    """
    listener = listener or Listener()
    job = Job(folder, wish)
    with tempfile.TemporaryDirectory(prefix=".quantize-", dir=folder) as scratch:
        made, failed = make(job, Path(scratch), listener)
        measured = measure(
            {_FP32: job.source, **{job.id_of(kind): one.path for kind, one in made.items()}},
            job.feeds.feeds,
            beside=[feed for _, feed, _ in job.goldens],
            providers=job.base.device.providers,
            effort=wish.effort,
            listener=listener,
        )
        reference = measured[_FP32]
        if isinstance(reference, TrialError):
            raise reference
        rows = [_fp32_row(job, reference)]
        for kind in wish.kinds:
            if kind in failed:
                rows.append(Row(id=job.id_of(kind), kind=kind, kept=False, reasons=(failed[kind],)))
            else:
                rows.append(_judged(job, kind, made[kind], reference, measured[job.id_of(kind)]))
        write(job, rows, made)
    return Report(
        folder=folder,
        rows=tuple(rows),
        samples=len(next(iter(reference.outputs.values()))),
        real_inputs=job.feeds.real,
        calibrated_with=len(job.calibration.feeds) if job.calibration else 0,
    )


def _fp32_row(job: Job, reference: Measured) -> Row:
    return Row(
        id=job.base.id, kind=_FP32, kept=False, reasons=(), size_bytes=convert.model_bytes(job.source),
        measured=reference,
    )  # fmt: skip


def _judged(job: Job, kind: Kind, made: Made, reference: Measured, found: Measured | TrialError) -> Row:
    size = convert.model_bytes(made.path)
    if isinstance(found, TrialError):
        return Row(
            id=job.id_of(kind),
            kind=kind,
            kept=False,
            reasons=(f"cannot run: {found}",),
            size_bytes=size,
            note=made.note,
        )
    outputs = tuple(
        agreement.compare(output, reference.outputs[name], found.outputs[name], job.wish.measure_of)
        for name, output in job.outputs.items()
    )
    worst = agreement.overall(outputs)
    largest = [one.max_abs for one in outputs if one.max_abs is not None]
    figures = Figures(
        agreement=worst.value,
        agreement_of=f"{worst.measure} of {worst.output}",
        max_abs=max(largest) if largest and all(one.finite for one in outputs) else None,
        speedup=reference.p50_ms / found.p50_ms if found.p50_ms else 0.0,
        size_ratio=size / convert.model_bytes(job.source),
        memory_ratio=found.peak_bytes / reference.peak_bytes,
    )
    reasons = judge(job.wish.gate, figures)
    return Row(
        id=job.id_of(kind), kind=kind, kept=not reasons, reasons=reasons, size_bytes=size, measured=found,
        figures=figures, agreement=outputs, note=made.note,
    )  # fmt: skip
