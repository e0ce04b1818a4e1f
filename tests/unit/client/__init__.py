"""The client library, piece by piece."""
