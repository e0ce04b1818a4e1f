"""Versions of real models on a real daemon, good ones and bad ones of every kind, and the daemon killed in between.

``INFERD_DEPLOYMENTS`` and ``INFERD_DEPLOYMENT_KILLS`` say how many (``make deployments N=100``, ``make deployment-kills
N=100``). A short run is of the digits alone, a long one of Magika, too.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import digits
from tests.campaign import Campaign, Outcome, spread, table
from tests.releases import DigitsFamily, Family, Kind, MagikaFamily, schedule
from tools.hub.errors import SourceError

pytestmark = pytest.mark.integration

DEPLOYMENTS = int(os.environ.get("INFERD_DEPLOYMENTS", len(Kind)))
KILLS = int(os.environ.get("INFERD_DEPLOYMENT_KILLS", 2))
LONG = bool({"INFERD_DEPLOYMENTS", "INFERD_DEPLOYMENT_KILLS"} & os.environ.keys())
WHEELS = Path(os.environ.get("INFERD_WHEELS") or Path(__file__).parents[2] / ".state/wheels")


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    folder = tmp_path_factory.mktemp("campaign")
    data = digits.read(WHEELS)
    if data is None:
        pytest.skip("the digits cannot be had")
    families: list[Family] = [DigitsFamily(data)]
    if LONG:
        try:
            families.append(MagikaFamily(WHEELS, folder / "magika"))
        except SourceError as error:
            pytest.skip(str(error))
    with Campaign(folder / "box", families) as campaign:
        yield campaign


def test_bad_versions_come_and_go_and_no_request_fails(campaign: Campaign) -> None:
    campaign.start_daemon()
    campaign.until_serving()
    outcomes = []
    with campaign.load() as load:
        for number, (family, flavour) in enumerate(schedule(DEPLOYMENTS, campaign.families), 1):
            outcome = campaign.deploy(family, flavour)
            outcomes.append(outcome)
            print(f"{number:3} {told(outcome)}; {sum(load.asked.values())} requests, {load.failed} failed")
            assert campaign.slots() == campaign.serving, outcome
    print(table(outcomes))
    print(f"requests: {dict(load.asked)}, failed {load.failed}, the slowest took {load.slowest_s:.2f} s")
    assert not load.failures, "\n".join(load.failures)
    assert all(load.asked[way.name] for way in campaign.ways())
    assert not [outcome.wrong for outcome in outcomes if outcome.wrong]
    assert campaign.stop_daemon() == 0


def test_a_daemon_killed_in_a_deployment_serves_again_without_its_store_and_ends_it(campaign: Campaign) -> None:
    seed = int(os.environ.get("INFERD_SEED") or 1)
    print(f"seed {seed}")
    rng = random.Random(seed)
    campaign.start_daemon()
    campaign.until_serving()
    killed_in: Counter[str] = Counter()
    first_answers: list[float] = []
    typical_s: dict[Kind, float] = {}  # how long a deployment takes without a kill, about; learned from those before
    for number, (family, flavour) in enumerate(schedule(KILLS, campaign.families), 1):
        trusted = dict(campaign.serving)
        version = campaign.publish(family, flavour)
        began = time.monotonic()
        with campaign.tampered(flavour):
            deployment = campaign.ask_for(family, version)
            with campaign.load():  # what it loses is lost with the daemon
                time.sleep(rng.uniform(0, typical_s.get(flavour.kind, 1.5)))
                state = campaign.state_of(deployment)
                campaign.kill_daemon()
            with campaign.without_store():
                started = time.monotonic()
                campaign.start_daemon()
                answered = campaign.serves_after(started)
                for model, (_, by) in answered.items():
                    on_trial = version if model == family.name else ""
                    assert by in (trusted[model], on_trial), f"{model} is answered by {by}, {trusted} were trusted"
            with campaign.load() as load:
                outcome = campaign.end(family, flavour, version, deployment, began)
            assert not load.failures, "\n".join(load.failures)
        killed_in[state] += 1
        first_answers += [seconds for seconds, _ in answered.values()]
        took = " ".join(f"{model} {seconds:.2f} s" for model, (seconds, _) in answered.items())
        print(f"{number:3} killed while {state}; {took}; {told(outcome)}")
        assert outcome.ended_by_itself, outcome
        campaign.until_serving()
        lived_s = outcome.total_s - first_answers[-1]
        typical_s[flavour.kind] = 0.5 * (typical_s.get(flavour.kind, 1.5) + min(3.0, 0.7 * lived_s))
    print(f"killed while {dict(killed_in.most_common())}")
    late = sum(seconds > 2.0 for seconds in first_answers)
    print(f"from the start to a right answer: median p95 max {spread(first_answers)} s, {late} above 2 s")
    assert campaign.stop_daemon() == 0


def told(outcome: Outcome) -> str:
    flavour = outcome.flavour
    end = f"{outcome.state} {outcome.code}".strip()
    return f"{outcome.model} {outcome.version} {flavour.kind}, {flavour.what}: {end} {outcome.total_s:.2f} s"
