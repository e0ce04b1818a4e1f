"""What is known of one version's variants: who has fallen and why, what was measured, what follows for the next step.

The state between the pure ladder and the book that keeps it. Leaves out: starting anything (``version.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from agent.config import VariantsConfig
from agent.engine import ladder
from agent.engine.book import VariantBook
from agent.engine.ladder import Fall, Kind, Rung, Try, Verdict
from agent.engine.rows import rows_of
from agent.engine.types import VariantSpec, VersionSpec
from agent.errors import OverloadedError


class Standing:
    """The rungs of one version."""

    def __init__(
        self, spec: VersionSpec, config: VariantsConfig, book: VariantBook, *, now: Callable[[], float]
    ) -> None:
        self._ranked = tuple(Rung(id=one.id, device=_home(one), precision=one.precision) for one in spec.variants)
        self._spec = spec
        self._config = config
        self._book = book
        self._now = now
        known = {rung.id for rung in self._ranked}
        self._verdicts = book.verdicts(spec.digest)
        self._falls = {
            variant: replace(fall, at=now()) for variant, fall in book.falls(spec.digest).items() if variant in known
        }
        self._past: dict[str, Fall] = {}  # of rungs that serve again, until they have served well

    @property
    def fallen(self) -> int:
        """How many variants have failed."""
        return len(self._falls)

    @property
    def skipped(self) -> list[dict[str, str]]:
        """The variants that do not serve because something is wrong, with code and reason."""
        dropped = [{"variant": name, "code": "no_variant", "reason": reason} for name, reason in self._spec.dropped]
        return dropped + [
            {"variant": rung.id, "code": fall.code, "reason": fall.reason}
            for rung in self._ranked
            if (fall := self._falls.get(rung.id)) is not None
        ]

    def fall_of(self, variant: str) -> Fall | None:
        """Return why a variant does not serve, if something is wrong with it."""
        return self._falls.get(variant)

    def pinned_to(self, device: str) -> tuple[str, ...]:
        """Return the variants that run on this device only."""
        return tuple(rung.id for rung in self._ranked if rung.device == device)

    # What follows

    def descent(self) -> tuple[str, ...]:
        """Return the variants to try, in this order, when nothing serves."""
        order = ladder.arrange(self._ranked, self._verdicts)
        return tuple(rung.id for rung in ladder.descent(order, self._falls, self._config, now=self._now()))

    def below(self, current: str) -> str | None:
        """Return the next variant down that may be tried."""
        order = ladder.arrange(self._ranked, self._verdicts)
        rung = ladder.below(order, self._falls, self._config, current=current, now=self._now())
        return rung.id if rung is not None else None

    def next_try(self, current: str | None) -> Try | None:
        """Return what to try next beside ``current``, which serves."""
        return ladder.next_try(
            self._ranked, self._falls, self._verdicts, self._config, current=current, now=self._now()
        )

    # What happened

    def fell(self, variant: str, code: str, reason: str) -> None:
        """A variant failed."""
        before = self._falls.get(variant) or self._past.pop(variant, None)
        fall = ladder.fallen(before, code, reason, now=self._now())
        self._falls[variant] = fall
        self._book.note_fall(self._spec.digest, variant, fall)

    def serves(self, variant: str) -> bool:
        """A variant serves; return whether there are failures to forget once it has served well."""
        if (fall := self._falls.pop(variant, None)) is not None:
            self._past[variant] = fall
        return variant in self._past

    def served_well(self, variant: str) -> None:
        """Forget a variant's failures."""
        self._past.pop(variant, None)
        self._book.forgive(self._spec.digest, variant)

    def measured(self, variant: str, verdict: Verdict) -> None:
        """An approximate variant was compared."""
        self._verdicts[variant] = verdict
        self._book.note_verdict(self._spec.digest, variant, verdict)

    def device_back(self, device: str) -> None:
        """A device that was lost may be used again."""
        for rung in self._ranked:
            fall = self._falls.get(rung.id)
            if fall is not None and fall.kind is Kind.DEVICE and rung.device in (device, device.partition(":")[0]):
                del self._falls[rung.id]

    def forget_shortage(self) -> None:
        """Let what only found no room in memory be tried again."""
        self._falls = {variant: fall for variant, fall in self._falls.items() if fall.code != OverloadedError.code}

    def hurry(self) -> None:
        """Let what is tried again some time be tried now: somebody who may have mended it asks."""
        self._falls = {variant: replace(fall, at=-math.inf) for variant, fall in self._falls.items()}

    def rows(self, current: str | None) -> list[dict[str, Any]]:
        """Return what status tells of each variant; ``current`` serves."""
        return rows_of(
            self._ranked,
            self._falls,
            self._verdicts,
            self._config,
            current=current,
            dropped=self._spec.dropped,
            now=self._now(),
        )


def _home(variant: VariantSpec) -> str:
    """Return the device a variant is bound to; of one that may run on any GPU only the kind."""
    return variant.pinned_device or variant.device.partition(":")[0]
