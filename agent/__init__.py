"""The inferd agent: daemon, command line and client library."""

__version__ = "0.1.0"
