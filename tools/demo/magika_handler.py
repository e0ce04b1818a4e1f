"""The handler inside the Magika bundle: any file's bytes in, its content type out.

Follows the official package: the first and last block of the file, stripped of white space, cut or padded to the
model's 2 x 1024 tokens; then the per-label thresholds and overrides of the model's own configuration. Files too small
for the model are answered without it (the row that is run for them is ignored).

This file is copied into the bundle as it is: it may import ``handlers.base``, NumPy and the standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from handlers.base import Array, Context, Handler, Prepared

EMPTY, TEXT, UNKNOWN, UNDEFINED = "empty", "txt", "unknown", "undefined"


class MagikaHandler(Handler):
    """Content type of a file.

    Parameters (``handler.params``):
        config: The model's ``config.min.json`` in the bundle.
        content_types: The knowledge base ``content_types_kb.min.json`` in the bundle.
        model_bytes_min: The smallest file that is given to the model.
        reason_if_same: Whether a low score is named as the reason even when the label stays what the model said.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        params = context.params
        config = json.loads(context.path(params["config"]).read_bytes())
        if config["mid_size"] or config["use_inputs_at_offsets"]:
            raise ValueError("this handler knows models of the first and last block only")
        self._head: int = config["beg_size"]
        self._tail: int = config["end_size"]
        self._block: int = config["block_size"]
        self._padding: int = config["padding_token"]
        self._meaningful: int = config["min_file_size_for_dl"]
        self._threshold: float = config["medium_confidence_threshold"]
        self._thresholds: Mapping[str, float] = config["thresholds"]
        self._overrides: Mapping[str, str] = config["overwrite_map"]
        self._labels: list[str] = context.classes or config["target_labels_space"]
        self._types: Mapping[str, Any] = json.loads(context.path(params["content_types"]).read_bytes())
        self._model_bytes_min: int = params["model_bytes_min"]
        self._reason_if_same: bool = params["reason_if_same"]

    def preprocess(self, body: bytes, content_type: str) -> Prepared:
        """Return ``bytes``: int32[1, head + tail]; the state is the label of a file that needs no model, else None."""
        del content_type  # what the sender believes is not evidence
        head = np.frombuffer(bytes(body[: self._block]).lstrip()[: self._head], np.uint8)
        tail = np.frombuffer(bytes(body[-self._block :]).rstrip()[-self._tail :], np.uint8)
        row = np.full((1, self._head + self._tail), self._padding, np.int32)
        row[0, : head.size] = head
        if tail.size:
            row[0, -tail.size :] = tail
        label = None
        if not body:
            label = EMPTY
        elif len(body) < self._model_bytes_min or head.size < self._meaningful:
            label = _text_or_not(bytes(body[: self._block]))
        return Prepared({"bytes": row}, label)

    def postprocess(self, outputs: Mapping[str, Array], rows: int) -> dict[str, Any]:
        """Answer for the model's scores ``target_label``: float32[1, labels]."""
        del rows
        scores = outputs["target_label"][0]
        best = int(np.argmax(scores))
        return self._judge(self._labels[best], float(scores[best]))

    def postprocess_with(self, outputs: Mapping[str, Array], rows: int, state: str | None) -> dict[str, Any]:
        """As ``postprocess``, unless ``state`` is the answer already."""
        if state is not None:
            return self._answer(state, 1.0, UNDEFINED, "none")
        return self.postprocess(outputs, rows)

    def _judge(self, found: str, score: float) -> dict[str, Any]:
        label = self._overrides.get(found, found)
        reason = "none" if label == found else "overwrite_map"
        if score < self._thresholds.get(found, self._threshold):
            label = TEXT if self._types[label]["is_text"] else UNKNOWN
            reason = "low_confidence" if label != found or self._reason_if_same else "none"
        return self._answer(label, score, found, reason)

    def _answer(self, label: str, score: float, found: str, reason: str) -> dict[str, Any]:
        facts = self._types[label]
        is_text = bool(facts["is_text"])
        return {
            "label": label,
            "score": score,
            "is_text": is_text,
            "mime_type": facts["mime_type"] or ("text/plain" if is_text else "application/octet-stream"),
            "group": facts["group"] or UNKNOWN,
            "description": facts["description"] or label,
            "extensions": list(facts["extensions"]),
            "model_label": found,
            "overwrite_reason": reason,
        }


def _text_or_not(content: bytes) -> str:
    try:
        content.decode()
    except UnicodeDecodeError:
        return UNKNOWN
    return TEXT
