"""Take a version that was fetched while the store's word was fresh, and is to be activated without asking again.

A power cut between download and activation, or a change planned for the night, must not depend on the network a second
time. The record beside the files says until when that holds. Child process only.
"""

from __future__ import annotations

from typing import Any

from agent.bundles import recheck
from agent.bundles.floor import BUILD_TIME
from agent.bundles.freshness import Origin, judge, obstacle
from agent.bundles.layout import Layout
from agent.bundles.pull import resolved_line
from agent.bundles.recheck import Emit
from agent.bundles.resolve import Resolver
from agent.bundles.variants import Box
from agent.bundles.verify import read_record
from agent.errors import BundleError, PolicyError, StateError


def take(
    resolver: Resolver, wanted: tuple[str, str, str, str], box: Box, layout: Layout, wall: float, emit: Emit
) -> dict[str, Any] | None:
    """Return the ``done`` line for a version that is on this box and approved, ``None`` if there is none.

    Args:
        wanted: Team, name, version and channel, as ``Resolver.version`` takes them.
        wall: The system clock, Unix seconds.

    Raises:
        PolicyError: what this box knows says that the version was revoked.
    """
    try:
        resolved = resolver.local_version(*wanted)
        manifest = resolved.manifest
        path = layout.version(manifest.team, manifest.name, manifest.version, resolved.manifest_sha256)
        record = read_record(path)
    except PolicyError:
        raise
    except (BundleError, StateError):
        return None
    standing = judge(issued=resolved.issued, wall=wall, floor=BUILD_TIME, refused=False)
    if obstacle(Origin.APPROVED, standing, approved=record.approved_until):
        return None
    emit(resolved_line(resolved, manifest.total_size, 0))
    return recheck.check(path, box, emit)
