"""A whole box for tests: a real signed store with small models, and the daemon as its own process.

The publisher's library makes keys and store once per test session (``store_once``); each test gets a copy.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner

from agent.cli import main as inferctl_main
from tests.models import FEATURES, HANDLERS, write_scale_model
from tools.demo import magika
from tools.demo.stage import PASSWORD, Stage
from tools.hub import safetensors
from tools.inferhub import main as inferhub

MODEL = "scale"


class Box(Stage):
    """The demo's stage with the scale model: ``y = factor * x`` in two variants."""

    def publish_scale(
        self,
        version: str,
        *,
        name: str = MODEL,
        factor: float = 2.0,
        handler: str | None = None,
        channel: str = "stable",
        extra_variant: str = "",
        prepare_only: bool = False,
        write_model: Callable[..., None] = write_scale_model,
    ) -> Path:
        """Pack a version of the scale model, publish it unless ``prepare_only``, and return the bundle."""
        source, bundle = self.folder / "sources" / name / version, self.folder / "bundles" / name / version
        for variant in ("first", "second"):
            write_model(source / variant / "model.onnx", factor=factor)
        x = np.arange(2 * FEATURES, dtype=np.float32).reshape(2, FEATURES)
        (source / "golden").mkdir()
        (source / "golden/in.safetensors").write_bytes(safetensors.dump({"x": x}))
        (source / "golden/out.safetensors").write_bytes(safetensors.dump({"y": x * np.float32(factor)}))
        spec = 'id = "tensors/v1"'
        if handler is not None:
            (source / "handler.py").write_text(HANDLERS[handler])
            spec = f'module = "handler.py", class = "{handler.title()}Handler"'
        (source / "model.toml").write_text(
            f"""\
team = "{magika.TEAM}"
name = "{name}"
version = "{version}"
handler = {{ {spec} }}
batching = {{ axis = "N", max_batch = 8 }}

[signature]
inputs = [{{ name = "x", dtype = "float32", shape = ["N", {FEATURES}] }}]
outputs = [{{ name = "y", dtype = "float32", shape = ["N", {FEATURES}] }}]
dims = {{ N = {{ min = 1, max = 8 }} }}

[[variants]]
id = "first"
entry = "first/model.onnx"
precision = "fp32"
priority = 10

[[variants]]
id = "second"
entry = "second/model.onnx"
precision = "fp32"
priority = 20
{extra_variant}
[[golden]]
id = "g"
inputs = "golden/in.safetensors"
outputs = "golden/out.safetensors"
compare = [{{ output = "y", metric = "allclose", rtol = 1e-5, atol = 1e-6 }}]
"""
        )
        untried = ("--untried", "gpu") if extra_variant else ()
        number = time.time_ns() // 1_000_000  # two versions may be packed in one second
        self.hub("pack", source, "--out", bundle, "--seq", number, *untried)
        if not prepare_only:
            self.publish(bundle, *(("--channel", channel) if channel else ()))
        return bundle

    def configure(self, *, broker_port: int | None = None, more: str = "") -> None:
        """Write a configuration that follows the stable channel from the store's folder."""
        self.write_config(store_url=self.store.as_uri(), broker_port=broker_port, models=(MODEL,), more=more)

    def start(self, *, environment: Mapping[str, str] | None = None, pass_fds: tuple[int, ...] = ()) -> None:
        """Start the daemon with more environment and inherited descriptors."""
        with self.log.open("ab") as log:
            self.daemon = subprocess.Popen(
                [sys.executable, "-m", "agent", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=pass_fds,
                env={**os.environ, **(environment or {})},
            )

    def until_serving(self, version: str | None = None) -> None:
        """Wait until the model answers, with ``version`` if given, and its deployment has ended well."""

        def serves() -> bool:
            row = next(row for row in self.status()["slots"] if row["slot"] == MODEL)
            return bool(row["active"]) and not row["trial"] and version in (None, row["active"])

        self.until(serves, what=f"{MODEL} {version or ''} is confirmed")

    def ask(self, value: float = 1.0) -> tuple[float, str]:
        """Return the model's first output for ``value``, and the version that answered."""
        with self.client() as client:
            result = client.infer(MODEL, {"x": np.full((1, FEATURES), value, dtype=np.float32)})
        return float(result.outputs["y"][0, 0]), result.version

    def control(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run ``inferctl``."""
        command = [sys.executable, "-m", "agent.cli", "--socket", str(self.socket), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def events(self) -> list[dict[str, Any]]:
        """Return what happened since the daemon started."""
        with self.client() as client:
            rows: list[dict[str, Any]] = client.call("events")
        return rows


class NearBox(Box):
    """A box whose publisher and ``inferctl`` run in this process: no interpreter starts for each command."""

    def control(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = CliRunner().invoke(inferctl_main, ["--socket", str(self.socket), *arguments])
        return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)

    def hub(self, *arguments: object) -> dict[str, Any]:
        done = CliRunner().invoke(inferhub, [*map(str, arguments), "--json"], env={"INFERHUB_KEY_PASSWORD": PASSWORD})
        lines = [line for line in done.output.splitlines() if line.startswith("{")]
        assert done.exit_code == 0, done.output
        answer: dict[str, Any] = json.loads(lines[-1])
        return answer


def copy_box(template: Path, folder: Path) -> Box:
    """Return a box over a copy of a prepared store."""
    shutil.copytree(template, folder, symlinks=True, ignore=shutil.ignore_patterns("*.sock"))
    return Box(folder, fresh=False)
