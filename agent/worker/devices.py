"""What a worker on a CUDA device must reach besides the files every worker needs: the driver's nodes and its facts.

Its library is a client of the kernel's driver through these nodes, which are the one part of the kernel that such a
worker reaches and others do not. Paths of machines that do not exist here are skipped by Landlock's rules.
Leaves out: keeping GPUs from each other; a worker sees its own by ``CUDA_VISIBLE_DEVICES`` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from glob import iglob
from typing import Final

from agent.worker import landlock
from agent.worker.landlock import Right, Rule

_NODES: Final = (
    "/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidia[0-9]*", "/dev/nvidia-caps",
    "/dev/nvmap", "/dev/nvhost-*", "/dev/nvgpu", "/dev/host1x-fence", "/dev/dri/renderD*",  # Jetson
)  # fmt: skip
_FACTS: Final = (
    "/proc/driver/nvidia", "/proc/devices", "/proc/modules", "/sys/module/nvidia*", "/sys/bus/pci", "/sys/devices/pci*",
    "/sys/devices/system/node", "/usr/share/nvidia", "/etc/nvidia",
    "/sys/devices/soc0", "/sys/devices/platform", "/sys/firmware/devicetree", "/etc/nv_tegra_release",  # Jetson
)  # fmt: skip
_LIBRARIES: Final = ("/usr/local/cuda*",)
_NODE_RIGHTS: Final = landlock.READ | Right.WRITE_FILE | Right.IOCTL_DEV


def cuda_rules() -> Iterator[Rule]:
    """Return the rules for the CUDA driver and its libraries."""
    for patterns, rights in (
        (_NODES, _NODE_RIGHTS),
        (_FACTS, landlock.READ),
        (_LIBRARIES, landlock.READ_EXECUTE),
    ):
        for pattern in patterns:
            for path in iglob(pattern):
                yield Rule(path, rights)
