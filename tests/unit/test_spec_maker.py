"""What a worker is told of a bundle: its zygote, its isolation, its device, its memory."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from agent.adapters import BundleStore, SpecMaker
from agent.bundles.puller import StoredBundle
from agent.config import MIB, EngineConfig, ModelEngineConfig, PolicyConfig, ServingConfig
from agent.deploy.ports import Bundle
from agent.deploy.rollout import Rollout
from agent.engine.types import VariantSpec
from agent.profile import Profile
from tests.fakes import bundles
from tests.fakes.deploy import INTERFACE

HANDLER = {"handler": {"module": "handler.py", "class": "H"}}


def made(
    variant: dict[str, Any], *, policy: PolicyConfig | None = None, engine: EngineConfig | None = None, **more: Any
) -> VariantSpec:
    """Return the spec of a bundle's only variant, whose own keys are ``variant``'s."""
    files = bundles.plain_files() | {"handler.py": b"class H: ...", str(variant.get("entry", "x.pt")): b"program"}
    entry = variant.get("entry", "fp32/model.onnx")
    base = bundles.describe(files)["variants"][0] | {"files": [entry], "entry": entry} | variant
    manifest = bundles.manifest(files, variants=[base], **more)
    maker = SpecMaker(
        engine=engine or EngineConfig(),
        policy=policy or PolicyConfig(),
        serving=ServingConfig(),
        profile=Profile(name="p", description="", intra_op_threads=3),
    )
    stored = StoredBundle(
        path=Path("/b"), manifest=manifest, manifest_sha256="0" * 64, variants=manifest.variants, dropped=()
    )
    bundle = Bundle(
        team="t", name="tiny", version="1", digest="0" * 64, path=Path("/b"), interface=INTERFACE, content=stored
    )
    (spec,) = maker.version_spec(bundle).variants
    return spec


TORCH = {"runtime": "torch", "device": {"kind": "cpu"}, "trusted_native": True}


@pytest.mark.parametrize(
    ("variant", "zygote"),
    [({}, "onnx"), (TORCH | {"entry": "m/a.pt"}, "torch"), (TORCH | {"entry": "m/a.pt2"}, "torch-export")],
)
def test_the_zygote_follows_from_runtime_and_format(variant: dict[str, Any], zygote: str) -> None:
    assert made(variant).runtime == zygote


def test_threads_are_the_profiles_unless_the_variant_says() -> None:
    assert made({}).worker["threads"] == {"intra": 3, "inter": 1}
    assert made({"threads": {"intra": 2}}).worker["threads"]["intra"] == 2


@pytest.mark.parametrize(
    ("variant", "more", "level"),
    [({}, {}, "none"), ({}, HANDLER, "partial"), (TORCH | {"entry": "m/a.pt"}, {}, "partial"),
     ({"trusted_native": True}, {}, "partial")],
    ids=["weights alone", "handler module", "native format", "native by its own word"],
)  # fmt: skip
def test_code_of_a_bundle_needs_the_level_that_policy_names(
    variant: dict[str, Any], more: dict[str, Any], level: str
) -> None:
    policy = PolicyConfig(sandbox="best_effort", code_sandbox="partial")
    worker = made(variant, policy=policy, **more).worker
    assert (worker["sandbox"], worker["code_sandbox"]) == ("best_effort", level)


def test_the_default_is_the_whole_sandbox_for_code_whatever_else_is_allowed() -> None:
    worker = made({}, policy=PolicyConfig(sandbox="best_effort"), **HANDLER).worker
    assert worker["code_sandbox"] == "full"


def test_a_pinned_model_keeps_its_gpu_and_a_cpu_variant_needs_none() -> None:
    engine = EngineConfig(models=(ModelEngineConfig(name="tiny", device="cuda:2"),))
    gpu = {"device": {"kind": "cuda", "providers": ["CUDAExecutionProvider"]}, "memory": {"device_mb": 300}}
    spec = made(gpu, engine=engine)
    assert (spec.device, spec.pinned_device) == ("cuda:2", "cuda:2")
    assert spec.need.sizes["cuda:2"] == (300 + 512) * MIB  # what CUDA itself takes
    assert spec.worker["device"] == {"kind": "cuda", "index": 2}
    assert spec.bounds.least == 1
    assert made(gpu).need.sizes["cuda"] == (300 + 512) * MIB
    assert made({}, engine=engine).pinned_device == ""


def test_memory_really_used_has_head_room_over_what_was_measured() -> None:
    assert made({"memory": {"host_mb": 100}}).resident_bytes_max == (512 + 400) * MIB
    assert made({}, engine=EngineConfig(resident_bytes_max=64 * MIB)).resident_bytes_max == 64 * MIB


def test_a_variant_is_tested_by_its_own_comparisons_within_the_publishers_time_or_the_boxs_if_that_is_less() -> None:
    own = [{"output": "y", "metric": "topk", "k": 3}]
    files = {"inputs": "golden/g1.in.safetensors", "outputs": "golden/g1.out.safetensors", "compare": [{"output": "y"}]}
    golden = [{"id": "g1", **files}, {"id": "g2", **files, "timeout_ms": 70, "per_variant": {"cpu-fp32": own}}]
    first, second = made({}, golden=golden).worker["golden"]
    assert (list(first["compare"]), list(second["compare"])) == ([{"output": "y"}], own)
    assert (first["timeout_ms"], second["timeout_ms"]) == (5000, 70)
    for box_ms, expected in ((60.0, (60, 60)), (100.0, (100, 70)), (9000.0, (5000, 70))):
        engine = EngineConfig(models=(ModelEngineConfig(name="tiny", selftest_ms_max=box_ms),))
        told = made({}, engine=engine, golden=golden).worker["golden"]
        assert tuple(one["timeout_ms"] for one in told) == expected


def test_what_the_manifest_says_of_warming_up_is_passed_on() -> None:
    warmup = made({}, warmup={"runs": 2, "shapes": [{"x": [3, 1024]}]}).worker["warmup"]
    assert (warmup["runs"], list(warmup["shapes"])) == (2, [{"x": (3, 1024)}])


def test_what_the_publisher_asks_of_a_rollout_reaches_deployment(tmp_path: Path) -> None:
    asked = {"canary": [5, 25], "shadow": 20, "step_s": 600, "min_agreement": 0.99}
    assert _rollout_of(asked, tmp_path) == Rollout(canary=(5.0, 25.0), shadow=20, step_s=600, agreement_min=0.99)
    assert _rollout_of({"soak_s": 60}, tmp_path) == Rollout(), "what it does not say is left to the box"
    assert _rollout_of(None, tmp_path) is None


def _rollout_of(asked: dict[str, Any] | None, folder: Path) -> Rollout | None:
    manifest = bundles.manifest(bundles.plain_files(), **({"rollout": asked} if asked is not None else {}))
    stored = StoredBundle(
        path=folder, manifest=manifest, manifest_sha256="0" * 64, variants=manifest.variants, dropped=()
    )

    class OneBundle:
        async def check(self, path: Path) -> StoredBundle:
            return stored

    store = BundleStore(OneBundle(), folder, keep_versions=2)  # type: ignore[arg-type]
    return asyncio.run(store.check(folder)).rollout
