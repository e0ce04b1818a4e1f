"""Whether this task was told to stop, also where that was lost on the way.

A TaskGroup of Python 3.11 that ends with an error raises that error alone, although its task was cancelled meanwhile.
Whoever catches the error and goes on would go on for ever: what asked it to stop, asks once.
"""

from __future__ import annotations

import asyncio


def told_to_stop() -> bool:
    """Whether the running task was cancelled; a loop that outlives errors asks before it goes on."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
