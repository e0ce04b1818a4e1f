"""Give a bundle's sources the variants that are worth having: made from its fp32 model, measured, judged, written down.

``quantize`` makes each kind, measures all of them beside fp32 on this machine, judges them by the gate, and keeps
those that pass: models in folders of their own, entries, priorities and golden tolerances in ``variants.toml``.
Promises: a kind that cannot be made or run is reported with its reason and does not stop the others; what a person
wrote is only read; if nothing passes, what an earlier run made is gone too, because it is no longer vouched for.
Leaves out: the choice on a box, which measures for itself, and exporting to ONNX (``torch_export``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import onnxruntime

from agent.bundles import onnx_facts
from agent.bundles.manifest import Golden
from agent.errors import AgentError
from agent.worker import safetensors
from tools.hub import agreement, convert, samples, variants_file
from tools.hub.agreement import Agreement, Choice, Output
from tools.hub.convert import Int8, Kind
from tools.hub.description import FILE_NAME, Description, load_own
from tools.hub.errors import SourceError, TrialError
from tools.hub.gate import Figures, Gate, judge
from tools.hub.listener import Listener
from tools.hub.measure import Effort, Measured, measure
from tools.hub.onnxfile import described
from tools.hub.samples import Feed, Samples
from tools.hub.variant_source import VariantSource
from tools.hub.variants_file import MadeVariants

Array = npt.NDArray[Any]
CALIBRATION_ROWS_MAX: Final = 256
_FP32: Final = "fp32"
_FASTER: Final = 1.05  # a variant goes before fp32 only if it is clearly faster
_FOLDERS: Final[Mapping[Kind, str]] = {"fp16": "fp16", "dynamic": "int8-dynamic", "static": "int8-static"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is asked for.

    Attributes:
        kinds: What to make.
        how: How int8 is made; its ``exclude`` holds for fp16 too.
        gate: What a variant must reach.
        measure_of: The agreement's measure.
        base: The fp32 variant to begin from; empty: the first. Its providers are measured with.
        inputs: Samples to measure with; ``None``: the bundle's golden inputs.
        made_up: The golden inputs are made up.
        calibration: Samples for static int8; ``None``: it is not made.
        rows: How many samples are run at most.
        effort: How long is measured.
    """

    kinds: Sequence[Kind] = convert.KINDS
    how: Int8 = field(default_factory=Int8)
    gate: Gate = field(default_factory=Gate)
    measure_of: Choice = "auto"
    base: str = ""
    inputs: Path | None = None
    made_up: bool = False
    calibration: Path | None = None
    rows: int = 256
    effort: Effort = field(default_factory=Effort)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table. ``reasons``: why it was left out; empty and ``kept`` false for fp32 itself."""

    id: str
    kind: str
    kept: bool
    reasons: tuple[str, ...]
    note: str = ""
    size_bytes: int = 0
    measured: Measured | None = None
    figures: Figures | None = None
    agreement: tuple[Agreement, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What came of it. The first row is fp32."""

    folder: Path
    rows: tuple[Row, ...]
    samples: int
    real_inputs: bool
    calibrated_with: int

    @property
    def kept(self) -> tuple[Row, ...]:
        """The variants that were added."""
        return tuple(row for row in self.rows if row.kept)


def quantize(folder: Path, wish: Wish, listener: Listener | None = None) -> Report:
    """Make, measure and judge variants of the sources in ``folder``; keep those that pass.

    Raises:
        SourceError: the sources, the inputs or the calibration data cannot be used.
        TrialError: the fp32 model itself cannot be run on the inputs.
    """
    listener = listener or Listener()
    job = _Job(folder, wish)
    with tempfile.TemporaryDirectory(prefix=".quantize-", dir=folder) as scratch:
        made, failed = _make(job, Path(scratch), listener)
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
        _write(job, rows, made)
    return Report(
        folder=folder,
        rows=tuple(rows),
        samples=len(job.feeds.feeds),
        real_inputs=job.feeds.real,
        calibrated_with=len(job.calibration.feeds) if job.calibration else 0,
    )


class _Job:
    """The sources, looked through once: everything that can be wrong before work begins is found here."""

    def __init__(self, folder: Path, wish: Wish) -> None:
        self.wish = wish
        self.folder = folder
        self.description: Description = load_own(folder / FILE_NAME)
        self.base = _fp32_variant(self.description, wish.base)
        self.source = folder / self.base.entry
        found = described(self.source)
        self.ports = found.inputs
        self.outputs = _outputs(folder, self.description, found.outputs)
        self.goldens = [_golden(folder, sample) for sample in self.description.golden]
        self.feeds = self._samples()
        self.calibration = self._calibration()
        self.before = variants_file.read(folder)
        self._check_room()

    def _check_room(self) -> None:
        """Refuse to touch anything that an earlier run did not make."""
        taken = {variant.id for variant in self.description.variants}
        ours = {variant.entry.partition("/")[0] for variant in self.before.variants}
        for kind in self.wish.kinds:
            if self.id_of(kind) in taken:
                raise SourceError(
                    f"{self.folder / FILE_NAME}: has a variant {self.id_of(kind)!r} of its own",
                    hint="Rename it, or leave the kind out: --kinds",
                )
            place = self.folder / _FOLDERS[kind]
            if place.exists() and _FOLDERS[kind] not in ours:
                raise SourceError(
                    f"{place}: is in the way of the {kind} variant",
                    hint="Rename it, or remove it if a run that was cut left it behind.",
                )

    def id_of(self, kind: Kind) -> str:
        """Return the id of the variant that ``kind`` becomes."""
        return f"{self.base.device.kind}-{_FOLDERS[kind]}"

    def _samples(self) -> Samples:
        if self.wish.inputs is not None:
            return samples.load(self.wish.inputs, self.ports, rows_max=self.wish.rows)
        feeds = [
            feed
            for name, golden, _ in self.goldens
            for feed in samples.of_arrays(golden, self.ports, where=f"golden {name}")
        ]
        return Samples(feeds=tuple(feeds[: self.wish.rows]), real=not self.wish.made_up)

    def _calibration(self) -> Samples | None:
        if "static" not in self.wish.kinds or self.wish.calibration is None:
            return None
        return samples.load(self.wish.calibration, self.ports, rows_max=CALIBRATION_ROWS_MAX)


def _fp32_variant(description: Description, wanted: str) -> VariantSource:
    fitting = [
        variant
        for variant in description.variants
        if variant.precision == "fp32" and variant.runtime == "onnxruntime" and variant.entry.endswith(".onnx")
    ]
    for variant in fitting:
        if wanted in ("", variant.id):
            break
    else:
        what = f"fp32 ONNX variant {wanted!r}" if wanted else "fp32 ONNX variant to begin from"
        names = ", ".join(variant.id for variant in fitting) or "none of fp32"
        raise SourceError(f"{description.name}: has no {what}", hint=f"It has {names}.")
    available = onnxruntime.get_available_providers()
    if missing := [provider for provider in variant.device.providers if provider not in available]:
        raise SourceError(
            f"variant {variant.id}: this ONNX Runtime has no {missing[0]}",
            hint="Quantize on a machine that has it, or begin from another variant: --base",
        )
    return variant


def _outputs(folder: Path, description: Description, ports: Sequence[onnx_facts.Port]) -> dict[str, Output]:
    declared = description.signature.outputs if description.signature else ()
    semantics = {tensor.name: tensor.semantic for tensor in declared}
    classes = 0
    if description.classes:
        try:
            classes = len((folder / description.classes).read_text().splitlines())
        except OSError as error:
            raise SourceError(f"{description.classes}: {error.strerror}") from error
    return {port.name: Output(name=port.name, semantic=semantics.get(port.name, ""), classes=classes) for port in ports}


def _golden(folder: Path, sample: Golden) -> tuple[str, Feed, dict[str, Array]]:
    """Return a golden sample: its id, its inputs and the outputs that were recorded."""
    try:
        return sample.id, safetensors.read(folder / sample.inputs), safetensors.read(folder / sample.outputs)
    except AgentError as error:
        raise SourceError(f"golden {sample.id}: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """A converted model, and how it was made in the end."""

    path: Path
    how: Int8
    note: str = ""


def _make(job: _Job, scratch: Path, listener: Listener) -> tuple[dict[Kind, _Made], dict[Kind, str]]:
    """Convert; return the models that came out, and the reasons of those that did not."""
    made: dict[Kind, _Made] = {}
    failed: dict[Kind, str] = {}
    for kind in job.wish.kinds:
        if kind == "static" and job.calibration is None:
            failed[kind] = "no calibration data: give --calibration"
            continue
        try:
            made[kind] = _convert(job, kind, scratch / _FOLDERS[kind] / "model.onnx", listener)
        except SourceError as error:
            failed[kind] = str(error)
    return made, failed


def _convert(job: _Job, kind: Kind, out: Path, listener: Listener) -> _Made:
    """Make one kind. Scales per channel are given up where the quantizer cannot make them for this model."""
    how = job.wish.how
    if kind == "fp16":
        listener.stage("make fp16", 1, "steps")
        wide = convert.fp16(job.source, out, exclude=how.exclude, feeds=job.feeds.feeds)
        listener.advance(1)
        note = f"{len(wide)} nodes stay fp32, since half precision cannot hold their values" if wide else ""
        return _Made(path=out, how=replace(how, exclude=(*how.exclude, *wide)), note=note)
    try:
        _int8(job, kind, out, how, listener)
        return _Made(path=out, how=how)
    except SourceError as error:
        if not how.per_channel:
            raise
        per_tensor = replace(how, per_channel=False)
        _int8(job, kind, out, per_tensor, listener)
        return _Made(path=out, how=per_tensor, note=f"made per tensor, since per channel failed: {error}")


def _int8(job: _Job, kind: Kind, out: Path, how: Int8, listener: Listener) -> None:
    if kind == "dynamic":
        listener.stage("make int8 dynamic", 1, "steps")
        convert.dynamic_int8(job.source, out, how)
        listener.advance(1)
        return
    assert job.calibration is not None
    listener.stage("calibrate int8", len(job.calibration.feeds), "steps")
    convert.static_int8(job.source, out, how, job.calibration.feeds, advance=listener.advance)


def _fp32_row(job: _Job, reference: Measured) -> Row:
    return Row(
        id=job.base.id, kind=_FP32, kept=False, reasons=(), size_bytes=convert.model_bytes(job.source),
        measured=reference,
    )  # fmt: skip


def _judged(job: _Job, kind: Kind, made: _Made, reference: Measured, found: Measured | TrialError) -> Row:
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


def _write(job: _Job, rows: Sequence[Row], made: Mapping[Kind, _Made]) -> None:
    """Put the variants that passed in place of what an earlier run made.

    The entries go first: between the two steps the sources name no model that is not there.
    """
    kept = {row.id: row for row in rows if row.kept}
    variants_file.write(job.folder, MadeVariants())
    for variant in job.before.variants:
        _remove(job.folder / variant.entry)
    variants = []
    for kind, one in made.items():
        if row := kept.get(job.id_of(kind)):
            one.path.parent.rename(job.folder / _FOLDERS[kind])
            variants.append(_entry(job, kind, one.how, row, list(kept.values())))
    golden = {
        name: {row.id: rules for row in kept.values() if (rules := _rules(job, number, recorded, row))}
        for number, (name, _, recorded) in enumerate(job.goldens)
    }
    variants_file.write(job.folder, MadeVariants(variants=tuple(variants), golden=golden))


def _remove(entry: Path) -> None:
    """Delete a model that an earlier run made, with its weights, and its folder if that is empty then."""
    for path in entry.parent.glob(f"{entry.name}*"):
        path.unlink()
    if entry.parent.is_dir() and not any(entry.parent.iterdir()):
        entry.parent.rmdir()


def _entry(job: _Job, kind: Kind, how: Int8, row: Row, kept: Sequence[Row]) -> VariantSource:
    assert row.figures is not None
    if kind == "fp16":
        quant = {"scheme": "fp16"} | ({"exclude": ",".join(how.exclude)} if how.exclude else {})
    else:
        quant = how.recipe("dynamic" if kind == "dynamic" else "qdq")
    if kind == "static" and job.calibration is not None:
        quant |= {"calibration": f"sha256:{job.calibration.digest}", "method": how.calibration}
    metrics = {"agreement": round(row.figures.agreement, 6), "speedup": round(row.figures.speedup, 3)}
    if row.figures.max_abs is not None:
        metrics["max_abs"] = float(f"{row.figures.max_abs:.4g}")
    return msgspec.structs.replace(
        job.base,
        id=row.id,
        entry=f"{_FOLDERS[kind]}/model.onnx",
        precision="fp16" if kind == "fp16" else "int8",
        priority=_priority(job.base.priority, row, kept),
        files=tuple(path for path in job.base.files if not path.endswith((".onnx", ".onnx.data"))),
        quant=quant,
        metrics=metrics,
    )


def _priority(base: int, row: Row, kept: Sequence[Row]) -> int:
    """Return the rank: clearly faster variants before fp32, the fastest first; the others behind it."""
    ordered = sorted(kept, key=lambda one: (-one.figures.speedup if one.figures else 0.0, one.id))
    faster = [one.id for one in ordered if one.figures and one.figures.speedup >= _FASTER]
    if row.id in faster:
        return max(0, base - len(faster) + faster.index(row.id))
    return base + 1 + [one.id for one in ordered if one.id not in faster].index(row.id)


def _rules(job: _Job, number: int, recorded: Mapping[str, Array], row: Row) -> tuple[Any, ...]:
    """Return the tolerance of one variant for one golden sample: by the recorded outputs, as the box will judge."""
    assert row.measured is not None
    found = row.measured.beside[number]
    tested = [rule.output for rule in job.description.golden[number].compare]
    on_golden = {
        name: agreement.compare(job.outputs[name], [recorded[name]], [found[name]], job.wish.measure_of)
        for name in dict.fromkeys(tested)
        if name in job.outputs and np.issubdtype(recorded[name].dtype, np.number)
    }
    return agreement.tolerances({one.output: one for one in row.agreement}, on_golden)
