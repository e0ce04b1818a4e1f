"""Which profile fits which machine, and reading machines of every kind from their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from agent import cli
from agent.errors import ConfigError
from agent.probe import cgroup_limits, probe
from agent.profile import Gpu, Hardware, Match, choose, load_profiles, mismatches
from tests.fakes.nvml import FakeDriver

pytestmark = pytest.mark.unit

GIB = 1 << 30
CPU = Hardware(arch="x86_64", cores=8, memory_bytes=16 * GIB, gpu_reason="no NVIDIA driver is loaded")
T4 = Gpu(index=0, name="T4", memory_bytes=16 * GIB, compute="7.5", uuid="GPU-0")


def with_(**changes: Any) -> Hardware:
    return msgspec.structs.replace(CPU, **changes)


@pytest.mark.parametrize(
    ("hardware", "profile", "reason"),
    [
        (CPU, "cpu-large", "no GPU (no NVIDIA driver is loaded), 8 cores, 16384 MiB"),
        (with_(cores=2), "cpu-small", "2 cores"),
        (with_(memory_bytes=4 * GIB), "cpu-small", "4096 MiB"),
        (with_(gpus=(T4,)), "cuda", "GPU T4"),
        (with_(gpus=(T4,), cores=1, memory_bytes=GIB), "cuda", "1 cores"),
        (with_(gpus=(T4,), jetson=True, board="Orin"), "jetson", "Orin"),
        (with_(jetson=True, gpu_reason="no library"), "cpu-large", "no library"),
    ],
)
def test_auto_takes_the_highest_ranked_that_matches_and_says_why(hardware: Hardware, profile: str, reason: str) -> None:
    choice = choose("auto", hardware, load_profiles())
    assert choice.profile.name == profile
    assert reason in choice.reason
    assert {seen.name for seen in choice.considered} == {"cpu-small", "cpu-large", "cuda", "jetson"}


def test_a_named_profile_wins_and_what_it_lacks_is_said() -> None:
    choice = choose("cuda", CPU, load_profiles())
    assert choice.profile.name == "cuda"
    assert "needs a CUDA device: no NVIDIA driver is loaded" in choice.reason
    with pytest.raises(ConfigError, match="not one of auto, cpu-large, cpu-small, cuda, jetson"):
        choose("gpu", CPU, load_profiles())


@pytest.mark.parametrize(
    ("match", "failed"),
    [
        (Match(), ""),
        (Match(device="cpu", cores_min=8, memory_bytes_min=16 * GIB, arch=("aarch64", "x86_64")), ""),
        (Match(device="cuda"), "needs a CUDA device: no NVIDIA"),
        (Match(jetson=True), "this is no Jetson"),
        (Match(cores_min=9), "needs 9 cores, 8 may be used"),
        (Match(memory_bytes_min=17 * GIB), "needs 17408 MiB of memory, 16384 may be used"),
        (Match(arch=("aarch64",)), "needs aarch64, this is x86_64"),
        (Match(gpu_memory_bytes_min=GIB), "needs 1024 MiB of GPU memory, there are 0"),
        (Match(cpu_features_any=("avx512_vnni", "amx_int8")), "needs a CPU with avx512_vnni or amx_int8"),
    ],
)
def test_each_predicate_that_fails_is_named(match: Match, failed: str) -> None:
    found = mismatches(match, CPU)
    assert len(found) == bool(failed)
    assert failed in "".join(found)


def test_the_fingerprint_changes_with_what_measurements_depend_on() -> None:
    changed = [
        with_(gpus=(T4,)), with_(driver="1"), with_(cores=4), with_(cpu_features=("avx2",)), with_(l4t="36.3"),
        with_(cpu_model="other"),
    ]  # fmt: skip
    assert len({CPU.fingerprint(), *(one.fingerprint() for one in changed)}) == 7
    assert with_(gpu_reason="x", container="docker").fingerprint() == CPU.fingerprint()


def write(root: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = "0::/system.slice/inferd.service\n"
SLICE = "sys/fs/cgroup/system.slice"


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ({}, (None, None)),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, (None, None)),
        (
            {
                "proc/self/cgroup": V2,
                f"{SLICE}/inferd.service/memory.max": "2000\n",
                f"{SLICE}/inferd.service/cpu.max": "150000 100000\n",
                f"{SLICE}/memory.max": "1000",
            },
            (1.5, 1000),
        ),
        (
            {
                "proc/self/cgroup": V2,
                f"{SLICE}/inferd.service/memory.high": "900",
                f"{SLICE}/inferd.service/memory.max": "2000",
                f"{SLICE}/cpu.max": "max 100000",
            },
            (None, 900),
        ),
        (  # a container whose groups are not namespaced
            {
                "proc/self/cgroup": "0::/docker/abc\n",
                "sys/fs/cgroup/memory.max": "512",
                "sys/fs/cgroup/cpu.max": "50000 100000",
            },
            (0.5, 512),
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/x\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "4096",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            (2.0, 4096),
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/a/b\n1:cpu:/a\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "77",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000",
            },
            (None, 77),
        ),
        ({"proc/self/cgroup": "garbage\n::\n0::/../../..\n", "sys/fs/cgroup/cpu.max": "x y z"}, (None, None)),
    ],
)
def test_the_tightest_control_group_counts(
    tmp_path: Path, contents: dict[str, str], expected: tuple[float | None, int | None]
) -> None:
    assert cgroup_limits(write(tmp_path, contents)) == expected


@pytest.mark.parametrize(("quota", "cores"), [("50000", 1), ("150000", 1), ("300000", 3), ("1600000", 8)])
def test_a_quota_bounds_the_cores(tmp_path: Path, quota: str, cores: int) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{quota} 100000"})
    hardware = probe(root=tmp_path, cores=8, memory_bytes=16 * GIB)
    assert (hardware.cores, hardware.cpu_quota) == (cores, int(quota) / 100000)


@pytest.mark.parametrize(
    ("cpuinfo", "model", "features", "int8"),
    [
        (
            "model name\t: Xeon\nflags\t\t: fpu avx avx2 avx512f avx512_vnni avx_vnni\n",
            "Xeon",
            {"avx", "avx2", "avx512f", "avx512_vnni", "avx_vnni"},
            {"avx512_vnni", "avx_vnni"},
        ),
        ("model name : Atom\nflags : sse4_2\n", "Atom", set(), set()),
        ("processor : 0\nFeatures : fp asimd asimddp sve\n", "", {"asimd", "asimddp", "sve"}, {"asimddp"}),
        ("", "", set(), set()),
    ],
)
def test_cpu_features_are_read(tmp_path: Path, cpuinfo: str, model: str, features: set[str], int8: set[str]) -> None:
    hardware = probe(root=write(tmp_path, {"proc/cpuinfo": cpuinfo}), cores=2, memory_bytes=GIB)
    assert (hardware.cpu_model, set(hardware.cpu_features), set(hardware.int8)) == (model, features, int8)


JETSON = {
    "etc/nv_tegra_release": "# R36 (release), REVISION: 3.0, GCID: 36191598, BOARD: generic, EABI: aarch64",
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0",
    "dev/nvgpu/igpu0": "",
}


def test_a_jetson_whose_nvml_knows_nothing_is_known_by_its_device_tree(tmp_path: Path) -> None:
    driver = FakeDriver(failing=12)
    hardware = probe(root=write(tmp_path, JETSON), nvml=driver.opened, arch="aarch64", cores=6, memory_bytes=8 * GIB)
    assert (hardware.jetson, hardware.l4t, hardware.board) == (True, "36.3.0", "NVIDIA Jetson Orin Nano Developer Kit")
    (gpu,) = hardware.gpus
    assert (gpu.compute, gpu.integrated, gpu.memory_bytes) == ("8.7", True, 8 * GIB)
    assert choose("auto", hardware, load_profiles()).profile.name == "jetson"


def test_a_jetson_of_an_unknown_chip_claims_no_gpu(tmp_path: Path) -> None:
    contents = JETSON | {"proc/device-tree/compatible": "nvidia,tegra999\0"}
    hardware = probe(root=write(tmp_path, contents), nvml=FakeDriver(failing=12).opened, cores=6, memory_bytes=GIB)
    assert hardware.jetson
    assert not hardware.gpus
    assert "libnvidia-ml" in hardware.gpu_reason


@pytest.mark.parametrize(
    ("contents", "container"),
    [
        ({}, ""),
        ({".dockerenv": ""}, "docker"),
        ({"run/.containerenv": ""}, "podman"),
        ({"run/systemd/container": "systemd-nspawn\n"}, "systemd-nspawn"),
    ],
)
def test_containers_are_recognised(tmp_path: Path, contents: dict[str, str], container: str) -> None:
    assert probe(root=write(tmp_path, contents), cores=1, memory_bytes=GIB).container == container


def test_inferctl_probe_needs_no_daemon() -> None:
    done = CliRunner().invoke(cli.main, ["--socket", "/nonexistent", "probe", "--json"])
    assert done.exit_code == 0, done.output
    value = json.loads(done.output)
    assert value["profile"]["name"] in {seen["name"] for seen in value["profiles"]}
    assert [seen["chosen"] for seen in value["profiles"]].count(True) == 1
    assert value["hardware"]["cores"] >= 1
    text = CliRunner().invoke(cli.main, ["probe", "--profile", "cuda"])
    assert text.exit_code == 0
    assert "cuda: named by [device] profile" in text.output
    wrong = CliRunner().invoke(cli.main, ["probe", "--profile", "nonsense"])
    assert wrong.exit_code == 1
    assert "bad_config" in wrong.output
