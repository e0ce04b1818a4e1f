"""What the publisher refuses, each with a stable code and a sentence on what to do.

The codes join the agent's (``agent/errors.py``); a refusal that the device would make too raises the agent's class.
"""

from __future__ import annotations

from agent.errors import AgentError


class HubError(AgentError):
    """A publisher's verb was not carried out; ``hint`` says what to do about it."""

    code = "hub_failed"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class SigningKeyError(HubError):
    """A key file is missing, unreadable, of the wrong kind, or its password is wrong."""

    code = "bad_key"


class KeyNotAllowedError(HubError):
    """A key is good and may not sign this role, or too few keys sign it."""

    code = "key_not_allowed"


class StoreStateError(HubError):
    """The store is absent, half-made, already made, or its clock is ahead of ours."""

    code = "store_state"


class ConflictError(HubError):
    """A published version is immutable and differs from what was given."""

    code = "version_conflict"


class SourceError(HubError):
    """The bundle's source folder or its description is wrong."""

    code = "bad_source"


class TrialError(HubError):
    """A variant does not load, or its golden outputs are outside the tolerance."""

    code = "selftest_failed"
