"""Everything the agent raises on purpose, with the stable code each carries over the wire.

The tree (code in parentheses; ``*`` = retryable: the same request may succeed later)::

    AgentError (internal)
    ├── InvalidInputError (invalid_input)           the caller's request is wrong
    │   ├── FrameError (bad_frame)                  bytes that are not our wire protocol
    │   ├── TensorError (bad_tensor)                name, dtype or shape differs from the model's signature
    │   ├── TooLargeError (too_large)               over a configured bound
    │   ├── StreamUnsupportedError (stream_unsupported)  parts were asked of a model that answers whole
    │   └── ConfigError (bad_config)                configuration file or value refused
    ├── NotFoundError (not_found)
    │   └── UnknownModelError (unknown_model)
    ├── UnauthenticatedError (unauthenticated)
    ├── ForbiddenError (forbidden)
    ├── OverloadedError* (overloaded)               admission refused; nothing was done
    ├── RateLimitedError* (rate_limited)            this client asked too much; nothing was done
    ├── UnavailableError* (unavailable)             the model exists and cannot serve now
    ├── LaneRefusedError (lane_refused)             no direct lane here: ask through the daemon
    ├── DeadlineError (deadline_exceeded)
    ├── CanceledError (canceled)
    ├── WorkerError (worker_failed)
    │   ├── WorkerDiedError* (worker_died)
    │   ├── LoadError (load_failed)                 a variant could not be loaded
    │   │   └── UnloadableError (unloadable)        nor ever will be: bad format, unsupported operator, missing file
    │   ├── SelfTestError (selftest_failed)         golden outputs differ
    │   ├── SandboxError (sandbox_failed)           the required isolation could not be set up
    │   ├── OutOfMemoryError (out_of_memory)
    │   ├── DeviceLostError* (device_lost)          the GPU answers no more
    │   ├── HandlerError (handler_failed)           the handler raised on this request
    │   ├── InferenceError (inference_failed)       the runtime raised on this request
    │   └── OutputError (output_mismatch)           its outputs are not what the signature declares
    ├── BundleError (bad_bundle)
    │   ├── UntrustedError (untrusted)              a signature, threshold or hash does not hold
    │   ├── RollbackDetectedError (rollback_detected)  older metadata than already trusted
    │   ├── ExpiredError (metadata_expired)
    │   ├── UnsafeBundleError (unsafe_bundle)       path escape, forbidden format, limits
    │   ├── ChunkMismatchError (chunk_mismatch)
    │   ├── NoVariantError (no_variant)             nothing in the bundle can run on this box
    │   ├── TargetNotFoundError (bundle_not_found)
    │   ├── IncompatibleError (incompatible_signature)  callers of what serves would notice the change
    │   └── PolicyError (policy_refused)            this box's policy does not allow it
    ├── StoreError (store_failed)
    │   ├── OfflineError* (offline)                 the store cannot be reached
    │   ├── TransientError* (store_transient)       5xx, cut stream, stall
    │   ├── DiskFullError* (disk_full)
    │   └── BudgetError* (budget_spent)             [store] budget_bytes of this window are used up
    ├── LinkError* (link_failed)                    the MQTT broker cannot be reached, refused us or went away
    ├── CommandError (command_refused)              a fleet or local command that is not carried out
    │   ├── CommandExpiredError (command_expired)
    │   ├── CommandReplayError (command_replayed)
    │   └── DeploymentError (deployment_failed)     a deployment's end that is nobody else's error
    │       ├── CanaryFailedError (canary_failed)   worse than what serves, at its share or in copies
    │       ├── CanaryImpossibleError (canary_impossible)  no room for both
    │       ├── CanaryUndecidedError (canary_undecided)  too little was seen of it
    │       ├── ProbationError (probation_failed)   it did not earn trust
    │       ├── RefusedBeforeError (refused_before)  it failed here before
    │       ├── BootFailedError (boot_failed)       it did not come back after a restart
    │       ├── PointerFailedError (pointer_failed)  the disk did not record what serves
    │       ├── TooManyStepsError (too_many_steps)
    │       └── SupersededError (superseded)        another wish won while it was on trial
    ├── StateError (bad_state)                      a state file or journal cannot be read
    └── IllegalTransitionError (illegal_transition) a broken invariant, never expected

Absent on purpose: HTTP. ``serving/replies.py`` holds the one table from class to status.
"""

from __future__ import annotations

from typing import ClassVar


class AgentError(Exception):
    """Root of all we raise on purpose; ``code`` is wire contract and never renamed."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False
    retry_after_s: float = 0.0  # after which the same request may succeed, where that is known; 0: it is not


class InvalidInputError(AgentError):
    """The request is wrong and will stay wrong."""

    code = "invalid_input"


class FrameError(InvalidInputError):
    """Bytes that do not follow the wire protocol; the connection closes after the answer."""

    code = "bad_frame"


class TensorError(InvalidInputError):
    """A tensor's name, dtype, shape or size does not fit the model's signature."""

    code = "bad_tensor"


class TooLargeError(InvalidInputError):
    """A header, body or file exceeds its configured bound."""

    code = "too_large"


class StreamUnsupportedError(InvalidInputError):
    """The request demands its answer in parts, and the model's handler does not stream."""

    code = "stream_unsupported"


class ConfigError(InvalidInputError):
    """The configuration is refused; the message names the key."""

    code = "bad_config"


class NotFoundError(AgentError):
    """The thing named does not exist here."""

    code = "not_found"


class UnknownModelError(NotFoundError):
    """No slot of that name, or no such version in it."""

    code = "unknown_model"


class UnauthenticatedError(AgentError):
    """No acceptable credentials were given."""

    code = "unauthenticated"


class ForbiddenError(AgentError):
    """The caller is known and lacks the role."""

    code = "forbidden"


class OverloadedError(AgentError):
    """Admission refused the request: the queue was full. Nothing was done."""

    code = "overloaded"
    retryable = True


class RateLimitedError(AgentError):
    """This client is over its rate, quota or outstanding requests. Nothing was done.

    ``retry_after_s``: seconds after which the same request may be admitted.
    """

    code = "rate_limited"
    retryable = True

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnavailableError(AgentError):
    """The model is known and no worker of it can serve now."""

    code = "unavailable"
    retryable = True


class LaneRefusedError(AgentError):
    """This caller gets no direct lane to this model; the message says why. Requests go through the daemon."""

    code = "lane_refused"


class DeadlineError(AgentError):
    """The request's deadline passed, queue time included."""

    code = "deadline_exceeded"


class CanceledError(AgentError):
    """The caller withdrew the request."""

    code = "canceled"


class WorkerError(AgentError):
    """A model's process failed."""

    code = "worker_failed"


class WorkerDiedError(WorkerError):
    """The worker died with this request and the retry was used up or not allowed."""

    code = "worker_died"
    retryable = True


class LoadError(WorkerError):
    """A variant could not be loaded."""

    code = "load_failed"


class UnloadableError(LoadError):
    """A variant fails to load the same way each time: bad format, unsupported operator, missing file, wrong handler."""

    code = "unloadable"


class SelfTestError(WorkerError):
    """A golden output is outside its tolerance."""

    code = "selftest_failed"


class SandboxError(WorkerError):
    """The isolation that policy demands could not be set up."""

    code = "sandbox_failed"


class OutOfMemoryError(WorkerError):
    """Host or device memory did not suffice."""

    code = "out_of_memory"


class DeviceLostError(WorkerError):
    """A GPU has fallen off the bus or needs a reset, or a worker lost its hold on it; what it held moves on."""

    code = "device_lost"
    retryable = True


class HandlerError(WorkerError):
    """The handler raised on this request; other requests are not affected."""

    code = "handler_failed"


class InferenceError(WorkerError):
    """The runtime raised on this request; other requests are not affected."""

    code = "inference_failed"


class OutputError(WorkerError):
    """The model, or a handler's stream, gave other outputs than the manifest's signature declares."""

    code = "output_mismatch"


class BundleError(AgentError):
    """A bundle is refused."""

    code = "bad_bundle"


class UntrustedError(BundleError):
    """A signature, threshold or hash does not hold."""

    code = "untrusted"


class RollbackDetectedError(BundleError):
    """Metadata older than what is already trusted was offered."""

    code = "rollback_detected"


class ExpiredError(BundleError):
    """Metadata expired: nothing new is accepted, what serves goes on."""

    code = "metadata_expired"


class UnsafeBundleError(BundleError):
    """A path, format, size or structure that is never accepted."""

    code = "unsafe_bundle"


class ChunkMismatchError(BundleError):
    """Stored bytes differ from the signed hash after all tries."""

    code = "chunk_mismatch"


class NoVariantError(BundleError):
    """No variant of the bundle can run on this box; the message lists each reason."""

    code = "no_variant"


class TargetNotFoundError(BundleError):
    """The store has no such model or version, or the team may not sign it."""

    code = "bundle_not_found"


class IncompatibleError(BundleError):
    """A version takes, gives or means something else than the one that serves; the message says what."""

    code = "incompatible_signature"


class PolicyError(BundleError):
    """This box's policy does not allow what the bundle asks for."""

    code = "policy_refused"


class StoreError(AgentError):
    """The store or the local disk failed."""

    code = "store_failed"


class OfflineError(StoreError):
    """The store cannot be reached."""

    code = "offline"
    retryable = True


class TransientError(StoreError):
    """The store answered badly for now: 5xx, a cut stream, a stall."""

    code = "store_transient"
    retryable = True


class DiskFullError(StoreError):
    """Not enough space; nothing that serves was touched."""

    code = "disk_full"
    retryable = True


class BudgetError(StoreError):
    """The bytes that metered mirrors may bring in this window are used up; what was fetched stays.

    ``retry_after_s``: seconds after which there are more.
    """

    code = "budget_spent"
    retryable = True

    def __init__(self, message: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class LinkError(AgentError):
    """The MQTT broker cannot be reached, refused the connection or went away; telemetry waits in the outbox."""

    code = "link_failed"
    retryable = True


class CommandError(AgentError):
    """A command is not carried out; the message says why."""

    code = "command_refused"


class CommandExpiredError(CommandError):
    """The command's ``not_after`` has passed."""

    code = "command_expired"


class CommandReplayError(CommandError):
    """The command's id was seen before with other content, or its generation is old."""

    code = "command_replayed"


class DeploymentError(CommandError):
    """A deployment did not end well, for a reason of its own; the message says which."""

    code = "deployment_failed"


class CanaryFailedError(DeploymentError):
    """The version answered worse than the one that serves while it had a share of the requests, or copies."""

    code = "canary_failed"


class CanaryImpossibleError(DeploymentError):
    """A share was asked for, and what serves cannot stay in memory beside the version."""

    code = "canary_impossible"


class CanaryUndecidedError(DeploymentError):
    """Too little was seen of the version at its share; it may be tried again."""

    code = "canary_undecided"


class ProbationError(DeploymentError):
    """The version did not earn trust after it took over."""

    code = "probation_failed"


class RefusedBeforeError(DeploymentError):
    """The version failed on this box before."""

    code = "refused_before"


class BootFailedError(DeploymentError):
    """The version on trial did not come back after a restart."""

    code = "boot_failed"


class PointerFailedError(DeploymentError):
    """The disk denied to record which version serves."""

    code = "pointer_failed"


class TooManyStepsError(DeploymentError):
    """The deployment went in circles."""

    code = "too_many_steps"


class SupersededError(DeploymentError):
    """Another wish won while the version was on trial."""

    code = "superseded"


class StateError(AgentError):
    """A state file or journal cannot be read; it is set aside, never guessed at."""

    code = "bad_state"


class IllegalTransitionError(AgentError):
    """A state machine was given an event it has no edge for: a bug, not an input."""

    code = "illegal_transition"


def by_code(code: str, message: str, retry_after_s: object = None) -> AgentError:
    """Return the exception for a wire ``code``; an unknown code becomes a plain ``AgentError``."""
    error = _BY_CODE.get(code, AgentError)(message)
    if isinstance(retry_after_s, int | float) and retry_after_s > 0:
        error.retry_after_s = float(retry_after_s)
    return error


def _walk(cls: type[AgentError]) -> dict[str, type[AgentError]]:
    found = {cls.code: cls}
    for sub in cls.__subclasses__():
        found |= _walk(sub)
    return found


_BY_CODE = _walk(AgentError)
