"""What came of quantizing: a row for each kind, and the files that a person or ``pack`` goes on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from agent.bundles.manifest import Compare
from tools.hub import agreement, variants_file
from tools.hub.agreement import Agreement
from tools.hub.candidates import Made
from tools.hub.convert import Int8, Kind
from tools.hub.gate import Figures
from tools.hub.measure import Measured
from tools.hub.quantize_job import FOLDERS, Array, Job
from tools.hub.variant_source import VariantSource
from tools.hub.variants_file import MadeVariants

_FASTER: Final = 1.05  # a variant goes before fp32 only if it is clearly faster


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


def write(job: Job, rows: Sequence[Row], made: Mapping[Kind, Made]) -> None:
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
            one.path.parent.rename(job.folder / FOLDERS[kind])
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


def _entry(job: Job, kind: Kind, how: Int8, row: Row, kept: Sequence[Row]) -> VariantSource:
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
        entry=f"{FOLDERS[kind]}/model.onnx",
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


def _rules(job: Job, number: int, recorded: Mapping[str, Array], row: Row) -> tuple[Compare, ...]:
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
