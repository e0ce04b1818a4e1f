"""Which variants run on a box, in which order, and why the others do not."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from agent.bundles.manifest import Device, Handler, Manifest, Memory, Requires, RuntimeNeed, Variant
from agent.bundles.variants import Box, Runtime, files_needed, select
from agent.config import PolicyConfig
from agent.errors import NoVariantError, PolicyError, UnsafeBundleError
from agent.profile import Gpu, Hardware
from tests.fakes import bundles
from tests.fakes.device import box

pytestmark = pytest.mark.unit

GPU_BOX = {
    "hardware": Hardware(
        arch="x86_64",
        cores=8,
        memory_bytes=16 << 30,
        gpus=(Gpu(index=0, name="Small", memory_bytes=4 << 30, compute="8.6"),),
        driver="550.54",
    ),
    "devices": ("cuda", "cpu"),
    "precisions": ("fp16", "fp32", "int8"),
    "runtimes": {"onnxruntime": Runtime(version="1.20.0", cuda=True)},
}


def variant(variant_id: str, kind: str = "cpu", *, priority: int = 10, **changes: Any) -> Variant:
    device = Device(kind=kind, **changes.pop("device", {}))  # type: ignore[arg-type]
    values: dict[str, Any] = {
        "id": variant_id,
        "priority": priority,
        "runtime": "onnxruntime",
        "entry": "int8/model.onnx",
        "files": ("int8/model.onnx",),
        "precision": "fp32",
        "device": device,
    }
    return Variant(**(values | changes))


def manifest(*variants: Variant, **changes: Any) -> Manifest:
    return msgspec.structs.replace(bundles.manifest(), variants=variants, **changes)


def ranked(selected: Box, *variants: Variant) -> list[str]:
    return [item.id for item in select(manifest(*variants), selected).usable]


def test_the_profiles_device_order_comes_first() -> None:
    variants = variant("cpu", priority=1), variant("gpu", "cuda", priority=9)
    assert ranked(box(**GPU_BOX), *variants) == ["gpu", "cpu"]


def test_a_lower_priority_number_is_preferred() -> None:
    assert ranked(box(), variant("b", priority=20), variant("a", priority=30), variant("c", priority=5)) == [
        "c",
        "b",
        "a",
    ]


def test_the_profiles_precision_order_breaks_ties() -> None:
    variants = variant("x", precision="fp32"), variant("y", precision="int8"), variant("z", precision="bf16")
    assert ranked(box(), *variants) == ["y", "x", "z"]


@pytest.mark.parametrize(
    ("item", "settings", "reason"),
    [
        (variant("v", "cuda"), {}, "the profile has cpu"),
        (variant("v", "cuda"), {"devices": ("cuda", "cpu")}, "no CUDA|needs onnxruntime with CUDA"),
        (
            variant("v", "cuda"),
            {"devices": ("cuda",), "runtimes": GPU_BOX["runtimes"]},
            "needs a CUDA device: no driver",
        ),
        (variant("v", "cuda", device={"min_compute": "8.7"}), GPU_BOX, "compute capability 8.7, Small has 8.6"),
        (variant("v", "cuda", device={"driver": ">=560"}), GPU_BOX, "needs driver >=560"),
        (variant("v", "cuda", memory=Memory(device_mb=5000)), GPU_BOX, "5000 MiB of GPU memory"),
        (variant("v", memory=Memory(host_mb=9000)), {}, "9000 MiB of memory"),
        (variant("v", device={"arch": ("aarch64",)}), {}, "needs aarch64, this is x86_64"),
        (variant("v", device={"features_any": ("avx512f", "amx_int8")}), {}, "avx512f or amx_int8"),
        (variant("v", runtime="tensorflow"), {}, "tensorflow, which is not installed"),
        (variant("v", trusted_native=True), {}, "native_formats is 'never'"),
        (variant("v", "cuda"), GPU_BOX | {"policy": PolicyConfig(fallback="cpu")}, "CPU variants only"),
    ],
)
def test_what_cannot_run_is_dropped_with_its_reason(item: Variant, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(NoVariantError, match=f"v: .*({reason})"):
        select(manifest(item), box(**settings))


def test_the_rest_of_the_bundle_is_still_usable() -> None:
    selection = select(manifest(variant("v", runtime="torch"), variant("other")), box())
    assert [item.id for item in selection.usable] == ["other"]
    assert selection.dropped == (("v", "needs the runtime torch, which is not installed"),)


def test_the_error_lists_every_reason() -> None:
    with pytest.raises(NoVariantError) as caught:
        select(manifest(variant("a", "cuda"), variant("b", runtime="torch")), box())
    assert "a: " in str(caught.value)
    assert "b: needs the runtime torch" in str(caught.value)


@pytest.mark.parametrize(
    ("requires", "reason"),
    [
        (Requires(agent=">=9"), "needs agent >=9"),
        (Requires(features=("teleport.v1",)), "teleport.v1"),
        (Requires(os=("windows",)), "needs windows"),
        (Requires(runtimes=(RuntimeNeed(name="onnxruntime", spec=">=2"),)), "1.20.0 is installed"),
    ],
)
def test_requirements_of_the_whole_bundle_drop_every_variant(requires: Requires, reason: str) -> None:
    with pytest.raises(NoVariantError, match=reason):
        select(manifest(variant("a"), requires=requires), box())


def test_policy_require_keeps_the_best_variant_only() -> None:
    selection = select(manifest(variant("a", priority=1), variant("b")), box(policy=PolicyConfig(fallback="require")))
    assert [item.id for item in selection.usable] == ["a"]
    assert selection.dropped[0][0] == "b"


REQUIRE = {"policy": PolicyConfig(fallback="require")}
LOST_GPU = {"hardware": Hardware(arch="x86_64", cores=8, memory_bytes=16 << 30, gpu_reason="driver mismatch")}


@pytest.mark.parametrize(
    ("settings", "variants", "kept"),
    [
        (GPU_BOX, (variant("gpu", "cuda"), variant("cpu")), ["gpu"]),
        (GPU_BOX, (variant("cpu"),), ["cpu"]),  # the bundle has nothing better
        ({}, (variant("gpu", "cuda"), variant("cpu")), ["cpu"]),  # the profile is a CPU box's
        ({}, (variant("int8", priority=1, precision="int8"), variant("fp32"), variant("other")), ["int8", "fp32"]),
        ({}, (variant("fp32", priority=1), variant("int8", precision="int8")), ["fp32"]),
        (GPU_BOX, (variant("int8", "cuda", precision="int8"), variant("cpu")), ["int8"]),
    ],
)
def test_require_means_the_best_kind_of_device(
    settings: dict[str, Any], variants: tuple[Variant, ...], kept: list[str]
) -> None:
    assert ranked(box(**settings, **REQUIRE), *variants) == kept


def test_require_refuses_to_become_a_cpu_box() -> None:
    with pytest.raises(NoVariantError, match=r"gpu: .*driver mismatch; cpu: .*'require': only cuda"):
        select(manifest(variant("gpu", "cuda"), variant("cpu")), box(**GPU_BOX | LOST_GPU, **REQUIRE))


def test_handler_code_can_be_refused() -> None:
    handler = Handler(module="handler.py", class_name="H")
    with pytest.raises(PolicyError):
        select(manifest(variant("a"), handler=handler), box(policy=PolicyConfig(handler_code="never")))


def test_packed_chunks_need_their_codec() -> None:
    with pytest.raises(NoVariantError, match="zstd"):
        select(_packed(), box(codecs=()))
    assert select(_packed(), box()).usable


def test_only_files_of_usable_variants_and_shared_ones_are_needed() -> None:
    whole = bundles.manifest()
    assert files_needed(whole, [whole.variant("cpu-int8")]) == (
        "int8/model.onnx",
        "classes.txt",
        "golden/g1.in.safetensors",
        "golden/g1.out.safetensors",
    )
    assert set(files_needed(whole, whole.variants)) == {file.path for file in whole.files}


def test_an_unreadable_version_range_is_refused() -> None:
    with pytest.raises(UnsafeBundleError):
        select(manifest(variant("a"), requires=Requires(agent="~=1")), box())


def _packed() -> Manifest:
    whole = manifest(variant("a"))
    files = tuple(
        msgspec.structs.replace(
            item,
            chunks=tuple(
                msgspec.structs.replace(chunk, codec="zstd", stored_sha256="a" * 64, stored_size=1)
                for chunk in item.chunks
            ),
        )
        for item in whole.files
    )
    return msgspec.structs.replace(whole, files=files)
