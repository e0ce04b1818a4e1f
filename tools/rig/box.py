"""A box that serves models of ``models.py`` by the real path: packed, signed, published, pulled, confirmed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tools.demo.stage import Stage, StepFailedError
from tools.rig import models
from tools.rig.models import Model

_READY_TIMEOUT_S: Final = 120.0
_SWAP_TIMEOUT_S: Final = 90.0


class Rig(Stage):
    """The demo's stage, for models that are made rather than downloaded."""

    def publish_model(self, model: Model, *, channel: str = "stable") -> Path:
        """Pack and publish ``model``, unless this folder has it already; return its ONNX file."""
        name = f"{model.name}-{model.version}"
        source, bundle = self.folder / "sources" / name, self.folder / "bundles" / name
        if not source.exists():
            models.write(model, source)
            self.hub("pack", source, "--out", bundle)
            self.publish(bundle, *(("--channel", channel) if channel else ()))
        return source / "model.onnx"

    def configure(self, *names: str, state: str = "state", broker_port: int | None = None, more: str = "") -> None:
        """Write a configuration that serves models from the store's folder; ``state`` names the box's own folder."""
        self.state = self.folder / state
        self.write_config(store_url=self.store.as_uri(), broker_port=broker_port, models=names, more=more)

    def start_serving(self) -> None:
        """Start the daemon; return once every model of its configuration serves and is past its trial."""
        self.start_daemon()
        self.until(self._all_confirmed, what="every model is confirmed", timeout_s=_READY_TIMEOUT_S)

    def swap(self, model: str, version: str, *, force: bool = False) -> dict[str, Any]:
        """Deploy ``version``, with ``force`` also one that failed before, and return the deployment's record.

        Raises:
            StepFailedError: it did not end as ``confirmed``.
        """
        with self.client() as client:
            deployment = client.call("deploy", {"model": model, "version": version, "force": force})["deployment"]
            record: dict[str, Any] = self.until(
                lambda: _ended(client.call("deployment", {"id": deployment, "wait_s": 1.0})),
                what=f"{model} {version} is confirmed",
                timeout_s=_SWAP_TIMEOUT_S,
            )
        if record["state"] != "confirmed":
            raise StepFailedError(f"{model} {version}: {record['state']}: {record.get('message', '')}")
        return record

    @property
    def daemon_pid(self) -> int:
        """The running daemon's."""
        if self.daemon is None:
            raise StepFailedError("the daemon does not run")
        return self.daemon.pid

    def workers(self, model: str) -> list[int]:
        """Return the pids of a model's workers."""
        rows: Sequence[dict[str, Any]] = self.status()["models"]
        return [int(pid) for row in rows if row["model"] == model for pid in row.get("workers", [])]

    def _all_confirmed(self) -> bool:
        status = self.status()
        slots = status["slots"]
        serving = {row["model"] for row in status["models"] if row["ready"]}
        return bool(slots) and all(row["active"] and not row["trial"] and row["slot"] in serving for row in slots)


def _ended(record: dict[str, Any]) -> dict[str, Any] | None:
    return record if record["final"] else None
