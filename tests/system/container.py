"""A Debian 12 with inferd installed by its own installer, booted with a real systemd; it ends by itself.

The root file system is made once by debootstrap and kept; each run works on a copy of it without a network. What is
to be proved runs inside (``proofs.py``) and leaves one JSON line per proof.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tests.box import MODEL, Box
from tools.demo import magika

ROOT: Final = Path(__file__).parents[2]
OPERATOR_UID: Final = 2002
_USERS: Final[Mapping[str, int]] = {
    "app": 2001,
    "technician": OPERATOR_UID,
    "stranger": 2003,
}  # the last one in no group
_PACKAGES: Final = "systemd,systemd-sysv,dbus,python3,python3-venv,mosquitto"
_PYTHON: Final = "3.11"  # Debian 12's
_KEY_PASSWORD: Final = "only-for-the-demo"  # of the keys that the demo's stage makes
_BOOT_TIMEOUT_S: Final = 400.0
_CHECKOUT: Final = ("systemd", "docs", "constraints.txt")  # what the installer needs beside the wheels


def why_not() -> str:
    """Return why no container can be made here, or an empty text; missing Debian packages are installed."""
    if os.environ.get("INFERD_SYSTEM") != "1":
        return "takes minutes: make system"
    if os.geteuid() != 0:
        return "needs root"
    wanted = {"debootstrap": "debootstrap", "systemd-nspawn": "systemd-container"}
    missing = [package for program, package in wanted.items() if shutil.which(program) is None]
    if missing and shutil.which("apt-get") is None:
        return f"needs {' and '.join(missing)}"
    if missing:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], check=False, env=environment)
        command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing]
        if subprocess.run(command, check=False, env=environment, stdout=subprocess.DEVNULL).returncode:
            return f"apt-get install {' '.join(missing)} failed"
    return ""


class Container:
    """The file system, its preparation and its one boot.

    Args:
        cache: Where the root file system and the wheels are kept between runs.
        folder: Where this run's copy is made; the caller removes it.
    """

    def __init__(self, cache: Path, folder: Path) -> None:
        self._cache = cache
        self.root = folder / "root"
        self._folder = folder

    def prepare(self) -> None:
        """Copy the root file system and install inferd, a signed store, users and the proofs into it."""
        subprocess.run(["cp", "-a", "--reflink=auto", self._base(), self.root], check=True)
        for name in _CHECKOUT:
            _copy(ROOT / name, self.root / "opt/inferd" / name)
        shutil.copytree(self._wheels(), self.root / "opt/wheels")
        self.inside("sh", "/opt/inferd/systemd/install.sh", "--offline", "/opt/wheels")
        for user, uid in _USERS.items():
            groups = () if user == "stranger" else ("--groups", "inferd")
            self.inside("useradd", "--uid", str(uid), "--no-create-home", *groups, user)
        self._fill_store()
        (self.root / "etc/inferd/inferd.toml").write_text(_CONFIG)
        (self.root / "etc/mosquitto/conf.d/local.conf").write_text("listener 1883 127.0.0.1\nallow_anonymous true\n")
        shutil.copy(Path(__file__).with_name("proofs.py"), self.root / "opt/proofs.py")
        (self.root / "etc/systemd/system/proofs.service").write_text(_PROOFS_UNIT)
        self.inside("systemctl", "enable", "--quiet", "proofs.service")

    def inside(self, *command: str) -> str:
        """Run a command in the file system while it is not booted, and return what it said."""
        done = subprocess.run(
            [*self._nspawn(), "--pipe", "--", *command],
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout[-2000:]}")
        return done.stdout

    def boot(self) -> dict[str, dict[str, Any]]:
        """Boot, let the proofs run until they power the container off, and return them by name."""
        command = [*self._nspawn(), "--boot", "--system-call-filter=" + " ".join(_LANDLOCK)]
        console = self._folder / "console.log"
        with console.open("wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            try:
                process.wait(_BOOT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.terminate()  # nspawn asks its systemd to power off
                process.wait(60.0)
        report = self.root / "report.jsonl"
        if not report.exists():
            raise RuntimeError(f"no report; the console: {console.read_text(errors='replace')[-3000:]}")
        return {row["proof"]: row for row in map(json.loads, report.read_text().splitlines())}

    def _nspawn(self) -> list[str]:
        command = ["systemd-nspawn", "--quiet", f"--directory={self.root}", "--private-network", "--register=no"]
        if not Path("/run/systemd/system").is_dir():
            command.append("--keep-unit")  # nobody here could give it a unit of its own
        return [*command, f"--machine=inferd-{os.getpid()}"]

    def _base(self) -> Path:
        base, done = self._cache / "rootfs", self._cache / "rootfs.packages"
        if not done.exists() or done.read_text() != _PACKAGES:
            shutil.rmtree(base, ignore_errors=True)
            command = ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", "bookworm", str(base)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            done.write_text(_PACKAGES)
        return base.resolve()

    def _wheels(self) -> Path:
        """Return a folder with wheels of this checkout and all it needs, for the container's Python."""
        wheels = self._folder / "wheels"
        pip = [sys.executable, "-m", "pip", "--quiet", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "wheel", "--no-deps", f"--wheel-dir={wheels}", str(ROOT)], check=True)
        (own,) = wheels.glob("inferd-*.whl")
        platforms = [f"--platform=manylinux_{glibc}_{platform.machine()}" for glibc in ("2_28", "2_17")]
        wanted = ["--only-binary=:all:", f"--python-version={_PYTHON}", "--implementation=cp", *platforms]
        constraint = f"--constraint={ROOT / 'constraints.txt'}"
        subprocess.run([*pip, "download", *wanted, constraint, f"--dest={wheels}", str(own)], check=True)
        return wheels

    def _fill_store(self) -> None:
        with Box(self._folder / "box", fresh=True) as box:
            box.make_store()
            box.publish_scale("1.0.0", factor=2.0)
            box.publish_scale("2.0.0", factor=3.0, channel="")
            shutil.copytree(box.store, self.root / "srv/store")
            shutil.copy(box.anchor, self.root / "usr/share/inferd/anchor/root.json")
            shutil.copy(box.key("operator"), self.root / "opt/operator")
            (self.root / "opt/password").write_text(_KEY_PASSWORD)
        self.inside("chmod", "-R", "go=rX", "/srv/store", "/usr/share/inferd/anchor")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)


_LANDLOCK: Final[Sequence[str]] = ("landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self")
_CONFIG: Final = f"""\
[device]
id = "container"

[store]
urls = ["file:///srv/store"]

[auth]
operate_uids = [{OPERATOR_UID}]

[deploy]
probation_s = 1.0
probation_calls_min = 3

[telemetry]
host = "127.0.0.1"
reconnect_first_s = 0.2
reconnect_cap_s = 1.0

[[models]]
name = "{MODEL}"
team = "{magika.TEAM}"
"""
_PROOFS_UNIT: Final = """\
[Unit]
After=inferd.service

[Service]
Type=exec
ExecStart=/usr/lib/inferd/venv/bin/python /opt/proofs.py
ExecStopPost=/bin/sh -c 'journalctl -b --no-pager > /journal.txt; systemctl --no-block poweroff'
StandardOutput=append:/proofs.log
StandardError=append:/proofs.log
TimeoutStopSec=30
RuntimeMaxSec=360

[Install]
WantedBy=multi-user.target
"""
