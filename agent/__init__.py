"""The inferd agent: daemon, command line and client library."""
