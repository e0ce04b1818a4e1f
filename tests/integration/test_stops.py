"""SIGTERM at random moments of a real daemon's life: it ends well, leaves nothing, and the next one serves.

``INFERD_STOPS`` says how often (``make stops N=300``), ``INFERD_SEED`` repeats a run.
"""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path

import pytest

from tests.storm import Moment, Storm

pytestmark = pytest.mark.integration

STOPS = int(os.environ.get("INFERD_STOPS") or 2)


def test_a_daemon_that_is_stopped_at_any_moment_ends_well_and_leaves_nothing(tmp_path: Path) -> None:
    seed = int(os.environ.get("INFERD_SEED") or 1)
    print(f"seed {seed}")
    rng = random.Random(seed)
    moments = [Moment.DEPLOYMENT, Moment.BROKER]
    if len(moments) < STOPS:
        moments = rng.sample(list(itertools.islice(itertools.cycle(Moment), STOPS)), STOPS)
    with Storm(tmp_path, rng) as storm:
        for number, moment in enumerate(moments[:STOPS], 1):
            print(f"{number:3} {storm.round(moment)}", flush=True)
        storm.ends_serving()
    print(f"exit statuses {dict(storm.exits)}; the slowest stops took {sorted(storm.took_s)[-5:]} s")
