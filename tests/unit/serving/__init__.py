"""Edges, piece by piece."""
