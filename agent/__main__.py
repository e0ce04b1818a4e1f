"""``inferd``, also ``python -m agent``: read the configuration, start what takes longest, then become the daemon.

If there is a model on the disk, its zygote is started before the daemon is imported: with two cores the two imports,
each a third of a second, happen side by side.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from agent import __version__
from agent.config import EXIT_BAD_CONFIG, Config, load
from agent.engine.spawn import Spawned, spawn
from agent.errors import ConfigError

CONFIG: Final = Path("/etc/inferd/inferd.toml")
_RUNTIME: Final = "onnx"  # the one that the models of a box most likely need


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon; return the process's exit status."""
    parser = argparse.ArgumentParser(prog="inferd", description="Edge inference daemon.")
    parser.add_argument("--config", type=Path, default=CONFIG, help=f"TOML file (default: {CONFIG})")
    parser.add_argument("--check", action="store_true", help="check the configuration and exit")
    parser.add_argument("--version", action="version", version=f"inferd {__version__}")
    arguments = parser.parse_args(argv)
    try:
        config = load(arguments.config)
        early = {} if arguments.check else _start_early(config)
        from agent import daemon  # a quarter of a second: the zygote is on its way meanwhile

        daemon.check(config)
    except ConfigError as error:
        print(f"inferd: {error.code}: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    if arguments.check:
        print(f"{arguments.config}: ok")
        return 0
    return daemon.run(config, early)


def _start_early(config: Config) -> dict[str, Spawned]:
    """Start the zygote if the disk has something for it to load; a failure shows when the engine wants one."""
    slots = Path(config.device.state_dir) / "active"
    try:
        if any(path.suffix == ".json" for path in slots.iterdir()):
            return {_RUNTIME: spawn(_RUNTIME)}
    except OSError:
        pass  # nothing there yet, or no process to be had
    return {}


if __name__ == "__main__":
    sys.exit(main())
