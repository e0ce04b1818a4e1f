"""What may not be answered for long, or ever: a driver or a medium in trouble.

It is asked in a thread of its own: an executor's would be waited for when the process ends.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Question(Generic[T]):
    """A question with one asker at a time.

    While there is no answer the same is not asked again: whoever wants to know waits for that one.
    """

    def __init__(self, ask: Callable[[], T], *, name: str) -> None:
        """``ask`` blocks; the thread that waits for it has this name."""
        self._ask = ask
        self._name = name
        self._asked: Future[T] | None = None
        self._turn = threading.Lock()

    async def answer(self, timeout_s: float) -> T:
        """Return the answer.

        Raises:
            TimeoutError: there is none in time.
        """
        asked = asyncio.wrap_future(self._pending())
        done, _ = await asyncio.wait({asked}, timeout=timeout_s)
        if not done:
            raise TimeoutError
        return asked.result()

    def answer_here(self, timeout_s: float) -> T:
        """Return the answer to a thread that may block; as ``answer``."""
        return self._pending().result(timeout_s)

    def _pending(self) -> Future[T]:
        with self._turn:
            if self._asked is None or self._asked.done():
                self._asked = Future()
                self._asked.set_running_or_notify_cancel()  # whoever gives up does not cancel it for the others
                threading.Thread(target=self._run, args=(self._asked,), name=self._name, daemon=True).start()
            return self._asked

    def _run(self, asked: Future[T]) -> None:
        try:
            asked.set_result(self._ask())
        except Exception as error:  # noqa: BLE001  whoever asked gets it
            asked.set_exception(error)
