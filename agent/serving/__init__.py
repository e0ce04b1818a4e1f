"""Edges: the frame socket and HTTP. They turn bytes into engine requests and results into bytes."""
