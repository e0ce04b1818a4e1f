"""Frames and regions that are nearly right, against a running daemon."""
