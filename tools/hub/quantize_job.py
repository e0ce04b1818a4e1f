"""What ``quantize`` is asked for, and the sources it works on.

Everything that can be wrong before work begins is found here: no fp32 model, inputs that do not fit, a variant or a
folder of a person's own in the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy.typing as npt
import onnxruntime

from agent.bundles import onnx_facts
from agent.bundles.manifest import Golden
from agent.errors import AgentError
from agent.worker import safetensors
from tools.hub import convert, samples, variants_file
from tools.hub.agreement import Choice, Output
from tools.hub.convert import Int8, Kind
from tools.hub.description import FILE_NAME, Description, load_own
from tools.hub.errors import SourceError
from tools.hub.gate import Gate
from tools.hub.measure import Effort
from tools.hub.onnxfile import described
from tools.hub.samples import Feed, Samples
from tools.hub.variant_source import VariantSource

Array = npt.NDArray[Any]
CALIBRATION_ROWS_MAX: Final = 256
FOLDERS: Final[Mapping[Kind, str]] = {"fp16": "fp16", "dynamic": "int8-dynamic", "static": "int8-static"}


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


class Job:
    """The sources, looked through once.

    Raises:
        SourceError: they, the inputs or the calibration data cannot be used.
    """

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
            place = self.folder / FOLDERS[kind]
            if place.exists() and FOLDERS[kind] not in ours:
                raise SourceError(
                    f"{place}: is in the way of the {kind} variant",
                    hint="Rename it, or remove it if a run that was cut left it behind.",
                )

    def id_of(self, kind: Kind) -> str:
        """Return the id of the variant that ``kind`` becomes."""
        return f"{self.base.device.kind}-{FOLDERS[kind]}"

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
