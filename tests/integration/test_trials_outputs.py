"""A version whose outputs are not what its signed manifest declares does not come to serve, or does not stay."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.box import MODEL, NearBox
from tests.models import FEATURES, write_thinning_model

pytestmark = pytest.mark.integration

FULL = np.ones((1, FEATURES), np.float32)
THIN = np.array([[-1.0, 1.0, 1.0, 1.0]], np.float32)  # of which the model leaves a column out
STAMPS = ("attempts", "boot_id", "clock_quality")


@pytest.fixture
def box(tmp_path: Path) -> Iterator[NearBox]:
    with NearBox(tmp_path / "box", fresh=True) as box:
        box.make_store()
        box.publish_scale("1.0.0", factor=2.0)
        bundle = box.publish_scale("2.0.0", factor=3.0, write_model=write_thinning_model, prepare_only=True)
        manifest = json.loads((bundle / "manifest.json").read_text())
        manifest["signature"]["outputs"][0]["shape"] = ["N", FEATURES + 1]  # its golden sample has FEATURES
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        box.publish(bundle)
        box.publish_scale("3.0.0", factor=4.0, write_model=write_thinning_model, channel="")
        box.configure()
        box.start()
        box.until_serving("1.0.0")
        yield box


def test_undeclared_outputs_end_a_deployment_before_the_cut_over_or_on_trial(box: NearBox) -> None:
    done = box.control("deploy", f"{MODEL}@2.0.0", "--allow-incompatible", "--json")
    end = json.loads(done.stdout.splitlines()[-1])
    assert (end["state"], end["code"]) == ("failed", "selftest_failed"), end
    assert f"the model returned float32[2, {FEATURES}], declared is float32[N, {FEATURES + 1}]" in end["message"]
    assert box.ask() == (2.0, "1.0.0")
    assert (end["attempts"]["loading"], "cutover" in end["attempts"]) == (1, False)
    told = next(event["data"] for event in box.events() if event["type"] == "deployment.failed")
    assert {name: told[name] for name in STAMPS} == {name: end[name] for name in STAMPS}
    assert end["clock_quality"] in ("ntp", "rtc", "floor", "none")
    assert f"last changed in boot {end['boot_id']}" in box.control("deployment", end["id"]).stdout

    begun = json.loads(box.control("deploy", f"{MODEL}@3.0.0", "--no-wait", "--json").stdout)["deployment"]

    def record() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(box.control("deployment", begun, "--json").stdout)
        return found

    versions = set()

    def rolled_back() -> bool:
        with box.client() as client:
            for x in (FULL, THIN):
                result = client.infer(MODEL, {"x": x})
                assert result.outputs["y"].shape == (1, FEATURES), "no caller sees what is not declared"
                versions.add(result.version)
        return bool(record()["state"] == "rolled_back")

    box.until(rolled_back, what="3.0.0 is rolled back", timeout_s=90)
    assert record()["code"] == "probation_failed"
    assert versions <= {"1.0.0", "3.0.0"}
    connection = http.client.HTTPConnection("127.0.0.1", box.http_port, timeout=60)
    connection.request("GET", "/metrics")
    metrics = connection.getresponse().read().decode()
    assert f'inferd_requests_handed_over_total{{code="output_mismatch",model="{MODEL}",version="3.0.0"}}' in metrics
