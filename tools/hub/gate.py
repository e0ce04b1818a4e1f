"""Which variants are worth shipping: the bounds a person set, and the verdict on each measured variant. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from agent.errors import InvalidInputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Bounds; ``None`` leaves a thing unjudged. Ratios are variant : fp32."""

    min_agreement: float | None = 0.99
    max_abs: float | None = None
    min_speedup: float | None = None  # fp32 median : variant median
    max_slowdown: float | None = None  # variant median : fp32 median
    max_size_ratio: float | None = None
    max_memory_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            raise InvalidInputError(f"--min-agreement: 0 to 1, got {self.min_agreement:g}")
        for name in ("max_abs", "min_speedup", "max_slowdown", "max_size_ratio", "max_memory_ratio"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidInputError(f"--{name.replace('_', '-')}: above 0, got {value:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What of a variant is judged. ``agreement_of`` words the measure and the output it was taken at."""

    agreement: float
    agreement_of: str
    max_abs: float | None  # None: not finite, or no numbers
    speedup: float
    size_ratio: float
    memory_ratio: float


def judge(gate: Gate, figures: Figures) -> tuple[str, ...]:
    """Return why the variant does not pass; empty: it does."""
    slowdown = 1 / figures.speedup if figures.speedup else float("inf")
    reasons = []
    if gate.min_agreement is not None and figures.agreement < gate.min_agreement:
        reasons.append(f"agreement {figures.agreement:.4f} ({figures.agreement_of}) is below {gate.min_agreement:g}")
    if gate.max_abs is not None and (figures.max_abs is None or figures.max_abs > gate.max_abs):
        shown = "not a number" if figures.max_abs is None else f"up to {figures.max_abs:.3g}"
        reasons.append(f"values differ by {shown}, allowed is {gate.max_abs:g}")
    if gate.min_speedup is not None and figures.speedup < gate.min_speedup:
        reasons.append(f"{figures.speedup:.2f} times as fast as fp32, wanted is {gate.min_speedup:g}")
    if gate.max_slowdown is not None and slowdown > gate.max_slowdown:
        reasons.append(f"{slowdown:.2f} times as slow as fp32, allowed is {gate.max_slowdown:g}")
    if gate.max_size_ratio is not None and figures.size_ratio > gate.max_size_ratio:
        reasons.append(f"{figures.size_ratio:.2f} times the size of fp32, allowed is {gate.max_size_ratio:g}")
    if gate.max_memory_ratio is not None and figures.memory_ratio > gate.max_memory_ratio:
        reasons.append(f"{figures.memory_ratio:.2f} times the memory of fp32, allowed is {gate.max_memory_ratio:g}")
    return tuple(reasons)
