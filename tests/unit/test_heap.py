"""Memory of large bodies goes back to the system when they are gone."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.unit

# In a process of its own, whose heap nothing else has shaped.
SCRIPT = textwrap.dedent("""
    import asyncio, re, sys, time
    from agent.clock import SystemClock
    from agent.heap import HeapTrimmer

    def held():
        with open("/proc/self/smaps_rollup") as file:
            return int(re.search(r"Pss_Anon: +([0-9]+)", file.read()).group(1)) * 1024

    before = held()
    for _ in range(3):
        body = bytearray(16 << 20)
        del body
    if held() < before + (12 << 20):
        sys.exit("this C library keeps nothing")

    async def main():
        task = asyncio.ensure_future(HeapTrimmer(SystemClock(), interval_s=0.01).run())
        async with asyncio.timeout(90):
            while held() > before + (6 << 20):
                await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(main())
    print("given back")
""")


def test_the_heap_of_large_bodies_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    if "keeps nothing" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.stdout.strip() == "given back", done.stderr
