"""A box that gets one version after another, good and bad, while clients ask: what proofs of deployments need."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agent.client import Client
from agent.errors import NotFoundError
from tests import load
from tests.fakes.store import StoreWorld
from tests.load import Answer, Load, Way
from tests.releases import FLAVOURS, TEAM, DigitsFamily, Family, Flavour, Kind, publish, tampered
from tools.demo.stage import Stage

GOOD = FLAVOURS[0]
_ENDED_S = 90.0
_ENGINE = "[engine]\nhang_timeout_s = 3.0\n"
_ON_TRIAL = ("cutover", "probation", "rolling_back")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One deployment. ``trial_s``: from its cut-over to its end, 0 if it had none."""

    model: str
    flavour: Flavour
    version: str
    state: str
    code: str
    message: str
    total_s: float
    trial_s: float

    @property
    def wrong(self) -> str:
        """What is wrong with its end, empty if nothing."""
        wanted = self.flavour
        right = (self.state, self.code) == (wanted.state, wanted.code) and wanted.says in self.message
        if right:
            return ""
        return (
            f"{self.model} {self.version} ({wanted.kind}, {wanted.what}): {self.state} {self.code}: {self.message!r}, "
            f"wanted {wanted.state} {wanted.code} {wanted.says!r}"
        )

    @property
    def ended_by_itself(self) -> bool:
        """Whether it ended as it must although its daemon was killed meanwhile: a trial may have ended with it."""
        return not self.wrong or (self.state == "rolled_back" and self.code in ("boot_failed", "load_failed"))


class Campaign(Stage):
    """A store of ``families`` and a box that serves their first releases.

    ``serving`` is the version of each model that was confirmed last, ``released`` the release of each version.
    """

    def __init__(self, folder: Path, families: Sequence[Family]) -> None:
        super().__init__(folder, fresh=True)
        self.families = families
        self.world = StoreWorld(self.folder)
        self.anchor = self.world.anchor
        self.serving: dict[str, str] = {}
        self.released: dict[tuple[str, str], str] = {}
        self._number = 0
        for family in families:
            self.serving[family.name] = self.publish(family, GOOD)
        self.write_config(
            store_url=self.world.url,
            broker_port=None,
            models=(),
            more=_ENGINE + "".join(
                f'[[models]]\nname = "{name}"\nteam = "{TEAM}"\nversion = "{version}"\n'
                for name, version in self.serving.items()
            ),
        )  # fmt: skip
        # The gate for latency as boxes have it, not as the demo does.
        self.config.write_text(self.config.read_text().replace("latency_slack_ms = 1000.0", "latency_slack_ms = 20.0"))

    def publish(self, family: Family, flavour: Flavour) -> str:
        """Publish a new version and return its name; good ones bring the model's releases in turn."""
        self._number += 1
        version = f"{self._number}.0.0"
        earlier = self.released.get((family.name, self.serving.get(family.name, "")))
        release = next(name for name in family.releases if name != earlier)
        self.released[family.name, version] = release
        self._bundle = publish(self.world, family, release, flavour, version)
        return version

    def until_serving(self) -> None:
        """Wait until every model serves the version that was confirmed last, and none is on trial."""
        self.until(lambda: self.slots() == self.serving, what=f"{self.serving} serve", timeout_s=_ENDED_S)

    def slots(self) -> dict[str, str]:
        """Return the confirmed version of each model."""
        return {row["slot"]: row["active"] for row in self.status()["slots"] if not row["trial"]}

    def deploy(self, family: Family, flavour: Flavour) -> Outcome:
        """Publish a version, deploy it, and follow it to its end."""
        version = self.publish(family, flavour)
        with self.tampered(flavour):
            began = time.monotonic()
            return self.end(family, flavour, version, self.ask_for(family, version), began)

    def tampered(self, flavour: Flavour) -> AbstractContextManager[None]:
        """Damage the version published last, if that is its flavour, as long as the block runs."""
        return tampered(self.world, flavour, self._bundle)

    def ask_for(self, family: Family, version: str) -> str:
        """Ask the daemon for a version and return the deployment's id."""
        args = {"model": family.name, "version": version, "team": TEAM}
        with self.client() as client:
            return str(client.call("deploy", args)["deployment"])

    def end(self, family: Family, flavour: Flavour, version: str, deployment: str, began: float) -> Outcome:
        """Follow a deployment to its end."""
        with self.client() as client:
            record, on_trial = follow(client, deployment)
        ended = time.monotonic()
        if record["state"] == "confirmed":
            self.serving[family.name] = version
        return Outcome(
            model=family.name,
            flavour=flavour,
            version=version,
            state=record["state"],
            code=record["code"],
            message=record["message"],
            total_s=ended - began,
            trial_s=ended - on_trial if on_trial is not None else 0.0,
        )

    def state_of(self, deployment: str) -> str:
        """Return where a deployment stands now."""
        with self.client() as client:
            try:
                return str(client.call("deployment", {"id": deployment})["state"])
            except NotFoundError:
                return "wished for"

    def kill_daemon(self) -> None:
        """End the daemon as a crash does."""
        daemon, self.daemon = self.daemon, None
        assert daemon is not None
        daemon.kill()
        daemon.wait()

    @contextmanager
    def without_store(self) -> Iterator[None]:
        """Keep the store out of reach as long as the block runs."""
        hidden = self.world.root.with_name("hidden")
        self.world.root.rename(hidden)
        try:
            yield
        finally:
            hidden.rename(self.world.root)

    def serves_after(self, began: float) -> dict[str, tuple[float, str]]:
        """Wait for a right answer of each model; return seconds since ``began`` (monotonic), and who gave it."""
        found: dict[str, tuple[float, str]] = {}
        for family in self.families:
            with Client(self.socket, retries=0, connect_timeout_s=_ENDED_S) as client:
                result = self.until(
                    lambda family=family, client=client: client.predict(family.name, family.bodies()[0]),
                    what=f"{family.name} answers",
                    timeout_s=_ENDED_S,
                )
            found[family.name] = time.monotonic() - began, result.version
            said = family.told(result.json())
            release = self.released[family.name, result.version]
            assert said == family.answers(release)[0], f"{family.name} {result.version} says {said!r}"
        return found

    def ways(self) -> list[Way]:
        """Return every door of every model."""
        ways = []
        for family in self.families:
            ways.append(load.by_frames(self.socket, family.name, family.bodies(), family.told))
            ways.append(load.by_http(self.http_port, family.name, family.bodies(), family.told))
            if isinstance(family, DigitsFamily):
                images = [(picture / 16).astype(np.float32).reshape(1, 1, 8, 8) for picture in family.pictures]
                ways.append(
                    load.by_tensors(self.socket, family.name, [{"image": image} for image in images], _seen_in_arrays)
                )
                ways.append(load.by_http(self.http_port, family.name, list(map(_oip, images)), _seen_in_json, oip=True))
        return ways

    def load(self) -> Load:
        """Return clients at every door."""
        answers: Mapping[str, Mapping[str, Sequence[Any]]] = {
            family.name: {release: family.answers(release) for release in family.releases} for family in self.families
        }

        def judge(way: Way, number: int, answer: Answer) -> str:
            release = self.released.get((way.model, answer.version))
            if release is None:
                return f"answered by version {answer.version!r}, which does not exist"
            wanted = answers[way.model][release][number]
            return "" if answer.said == wanted else f"request {number}: {answer.said!r}, wanted {wanted!r}"

        return Load(self.ways(), judge)


def follow(client: Client, deployment: str) -> tuple[dict[str, Any], float | None]:
    """Return the final record, and the monotonic time at which requests began to go to the version, if they did."""
    on_trial = None
    args: dict[str, Any] = {"id": deployment, "wait_s": 1.0}
    deadline = time.monotonic() + _ENDED_S
    while time.monotonic() < deadline:
        record: dict[str, Any] = client.call("deployment", args)
        if record["state"] in _ON_TRIAL and on_trial is None:
            on_trial = time.monotonic()
        if record["final"]:
            return record, on_trial
        args |= {"after_step": record["step"], "after_bytes": record["bytes_done"]}
    raise AssertionError(f"{deployment} does not end: {record}")


def table(outcomes: Sequence[Outcome]) -> str:
    """Return one line for each flavour and one for all that were rolled back."""
    lines = [
        f"{'kind':14} {'what':20} {'number':>6} {'end':12} {'code':24} {'to the end':>20} {'on trial':>20}",
        f"{'':14} {'':20} {'':>6} {'':12} {'':24} {'median p95 max (s)':>20} {'median p95 max (s)':>20}",
    ]
    for flavour in FLAVOURS:
        found = [outcome for outcome in outcomes if outcome.flavour == flavour]
        if found:
            lines.append(
                f"{flavour.kind:14} {flavour.what:20} {len(found):6} {flavour.state:12} {flavour.code:24} "
                f"{spread([one.total_s for one in found]):>20} {spread([one.trial_s for one in found]):>20}"
            )
    back = [outcome.trial_s for outcome in outcomes if outcome.state == "rolled_back"]
    bad = [outcome.total_s for outcome in outcomes if outcome.flavour.kind is not Kind.GOOD]
    lines.append(f"time to rollback, from the first request to a bad version: {spread(back)} s in {len(back)}")
    lines.append(f"from the wish for a bad version to its end:                {spread(bad)} s in {len(bad)}")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Return median, 95th percentile and maximum."""
    known = sorted(value for value in values if value)
    if not known:
        return "-"
    return f"{statistics.median(known):.2f} {known[math.ceil(0.95 * len(known)) - 1]:.2f} {known[-1]:.2f}"


def _oip(image: Any) -> bytes:
    tensor = {"name": "image", "datatype": "FP32", "shape": list(image.shape), "data": image.reshape(-1).tolist()}
    return json.dumps({"inputs": [tensor]}).encode()


def _seen_in_arrays(outputs: Mapping[str, Any]) -> int:
    return int(outputs["logits"][0].argmax())


def _seen_in_json(answer: Any) -> int:
    (output,) = answer["outputs"]
    return int(np.argmax(output["data"]))
