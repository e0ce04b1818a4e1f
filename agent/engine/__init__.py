"""Slots, pools and workers: where a request meets a model."""
