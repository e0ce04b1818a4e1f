"""The publisher, piece by piece."""
