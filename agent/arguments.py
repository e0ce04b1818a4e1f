"""The arguments of verbs, checked where they enter: ``InvalidInputError`` names what is wrong."""

from __future__ import annotations

import re
from typing import Any, Final

from agent.deploy.desired import Desired
from agent.deploy.plan import Plan
from agent.deploy.rollout import rollout_of
from agent.deploy.slots import slot_of
from agent.errors import InvalidInputError

_WAIT_S_MAX: Final = 60.0
_SECONDS_MAX: Final = 1e11  # as Unix seconds: in the year 5138
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION: Final = re.compile(r"\d{1,9}\.\d{1,9}\.\d{1,9}(-[0-9A-Za-z.-]{1,32})?")


def wish_of(wish_id: str, args: dict[str, Any], source: str, *, medium: str = "") -> Desired:
    """Return the wish of a deploy; checked here, because what is stored stays in force.

    ``medium``: a folder to take it from.

    Raises:
        InvalidInputError: a name or version that no store can hold, or a rollout that makes no sense.
    """
    channel = args.get("channel") or "stable"
    if not args.get("team"):
        raise InvalidInputError(f"{args.get('model')!r} is new on this box: name its team (--team TEAM)")
    names = {"model": text_of(args, "model"), "team": text_of(args, "team"), "channel": channel}
    for what, value in names.items():
        _check_name(what, value)
    version, beside = version_of(args), flag_of(args, "beside")
    if beside and not version:
        raise InvalidInputError("which version is to be kept beside the default? name it: MODEL@VERSION")
    plan = plan_of(args)
    if beside and plan.rollout is not None:
        raise InvalidInputError("a version beside the default answers those who name it: it gets no share of others")
    if beside and plan.stage_only:
        raise InvalidInputError("a version that is only staged is beside nothing: stage it first, then --beside")
    return Desired(
        id=wish_id,
        slot=slot_of(names["model"], version if beside else ""),
        team=names["team"],
        version=version,
        channel=names["channel"],
        source=source,
        force=flag_of(args, "force"),
        medium=medium,
        plan=plan,
    )


def name_of(args: dict[str, Any], name: str) -> str:
    """Return a model's or team's name that must be there."""
    return _check_name(name, text_of(args, name))


def version_of(args: dict[str, Any]) -> str:
    """Return the version that is named, an empty text if none is."""
    version = args.get("version") or ""
    if not isinstance(version, str) or (version and not _VERSION.fullmatch(version)):
        raise InvalidInputError(f"version {version!r}: three numbers such as 1.4.0, or 1.4.0-rc.1")
    return version


def plan_of(args: dict[str, Any]) -> Plan:
    """Return how a wish is to be carried out.

    Raises:
        InvalidInputError: a time that is none, no waiting together with a limit of it, or stage-only with a rollout.
    """
    plan = Plan(
        stage_only=flag_of(args, "stage_only"),
        ignore_window=flag_of(args, "ignore_window"),
        force_after_s=_seconds(args, "force_after_s"),
        not_after=_seconds(args, "not_after"),
        allow_incompatible=flag_of(args, "allow_incompatible"),
        rollout=rollout_of(args.get("rollout")),
    )
    if plan.ignore_window and plan.force_after_s is not None:
        raise InvalidInputError("'ignore_window' (--now) and 'force_after_s' (--force-after) exclude each other")
    if plan.stage_only and plan.rollout is not None:
        raise InvalidInputError("a version that is only staged meets no requests: canary and shadow are for its deploy")
    return plan


def text_of(args: dict[str, Any], name: str) -> str:
    """Return a text that must be there and not empty."""
    value = args.get(name)
    if not isinstance(value, str) or not value:
        raise InvalidInputError(f"{name!r} is missing")
    return value


def wait_s_of(args: dict[str, Any]) -> float:
    """Return how long the caller would wait (seconds), 0 if it does not say."""
    value = args.get("wait_s", 0.0)
    if type(value) not in (int, float) or not 0 <= value <= _WAIT_S_MAX:
        raise InvalidInputError(f"'wait_s' must be a number from 0 to {_WAIT_S_MAX:g}")
    return float(value)


def integer_of(args: dict[str, Any], name: str, default: int, *, least: int = 0, most: int = 1 << 62) -> int:
    """Return a whole number within bounds, ``default`` if it is not there."""
    value = args.get(name, default)
    if type(value) is not int or not least <= value <= most:
        raise InvalidInputError(f"{name!r} must be an integer from {least} to {most}")
    return value


def flag_of(args: dict[str, Any], name: str, *, default: bool = False) -> bool:
    """Return true or false, ``default`` if it is not there."""
    value = args.get(name, default)
    if type(value) is not bool:
        raise InvalidInputError(f"{name!r} must be true or false")
    return value


def _seconds(args: dict[str, Any], name: str) -> float | None:
    value = args.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value <= _SECONDS_MAX:
        raise InvalidInputError(f"{name!r} must be a number of seconds, not negative")
    return float(value)


def shortened(args: dict[str, Any]) -> dict[str, str]:
    """Return arguments as an audit event may hold them."""
    return {name: str(value)[:200] for name, value in list(args.items())[:16]}


def _check_name(what: str, value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise InvalidInputError(f"{what} {value!r}: lower-case letters, digits, '.', '_', '-', at most 64")
    return value
