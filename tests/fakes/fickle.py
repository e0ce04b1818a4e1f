"""A bundle's handler under which a model goes wrong after it has passed the self-test of its load.

It is told by files in its bundle, each for one variant: ``drift-v0`` makes its outputs wrong, ``freeze-v0`` lets it
never answer again, ``crash-v0`` ends the worker; the file's text is a number of runs that are still good.
"""

from __future__ import annotations

from typing import Final

SOURCE: Final = '''
import os
import signal
import sys
import time

import numpy as np

from agent.worker.runtimes import onnx
from handlers.base import Handler


def variant():
    """Find out which variant this worker is to serve: nobody tells a handler."""
    frame = sys._getframe()
    while not hasattr(frame.f_locals.get("spec"), "variant"):
        frame = frame.f_back
    return frame.f_locals["spec"].variant


class FickleHandler(Handler):
    """Spoils the runtime of its own worker."""

    def __init__(self, context):
        super().__init__(context)
        name, honest, runs = variant(), onnx.OnnxRuntime.run, 0

        def told(kind):
            path = context.path(f"{kind}-{name}")
            return path.exists() and runs > int(path.read_text() or 0)

        def run(runtime, inputs):
            nonlocal runs
            runs += 1
            if told("crash"):
                os.kill(os.getpid(), signal.SIGKILL)
            while told("freeze"):
                time.sleep(3600)
            outputs = honest(runtime, inputs)
            return {key: value + 1 for key, value in outputs.items()} if told("drift") else outputs

        onnx.OnnxRuntime.run = run

    def preprocess(self, body, content_type):
        return {"x": np.ones((1, 4), dtype=np.float32)}

    def postprocess(self, outputs, rows):
        return {"y": outputs["y"].tolist()}
'''
