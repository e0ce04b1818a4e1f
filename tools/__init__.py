"""Programs for the centre and the bench: inferhub, loadgen, the demo."""

import os

# ONNX Runtime reports usage by default and starts a thread for it at import; none of our programs wants that. It has
# to be said before the first import, hence here and not where the runtime is used.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
