"""Slots and their names: one for each model's default, one for each version kept beside it. Pure.

A slot is what has a wish, a pointer, deployments and something in memory. The default's is called as its model; a
version beside it has a slot of its own, ``model@version``, which never serves another version.
"""

from __future__ import annotations


def slot_of(model: str, version: str = "") -> str:
    """Return the name of a model's slot, or of the one of a version beside it."""
    return f"{model}@{version}" if version else model


def model_of(slot: str) -> str:
    """Return the model whose slot it is."""
    return slot.partition("@")[0]


def version_beside(slot: str) -> str:
    """Return the version of a slot beside the default, an empty text for the default's."""
    return slot.partition("@")[2]
