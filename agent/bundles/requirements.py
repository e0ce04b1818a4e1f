"""Version ranges such as ``>=1.20,<2``: the little of PEP 440 that manifests use.

Pure. Only numbers separated by dots are compared; a local or pre-release suffix (``1.31.1+cu12``, ``2.0rc1``) is cut
off, so a release candidate counts as its release.
"""

from __future__ import annotations

import re
from typing import Final

from agent.errors import UnsafeBundleError

_CLAUSE: Final = re.compile(r"\s*(>=|<=|==|!=|>|<)\s*([0-9]+(?:\.[0-9]+){0,5})\s*", re.ASCII)
_NUMBERS: Final = re.compile(r"[0-9]+(?:\.[0-9]+)*", re.ASCII)


def satisfies(version: str, spec: str) -> bool:
    """Say whether ``version`` lies in ``spec``; an empty spec holds always, an unreadable version never otherwise.

    Raises:
        UnsafeBundleError: ``spec`` is not a list of comparisons.
    """
    clauses = [_parse_clause(clause, spec) for clause in spec.split(",")] if spec.strip() else []
    if not clauses:
        return True
    found = _NUMBERS.match(version)
    if not found:
        return False
    have = _numbers(found.group())
    return all(_holds(have, operator, _numbers(wanted)) for operator, wanted in clauses)


def _parse_clause(clause: str, spec: str) -> tuple[str, str]:
    match = _CLAUSE.fullmatch(clause)
    if not match:
        raise UnsafeBundleError(f"version range {spec[:80]!r} is not like '>=1.20,<2'")
    return match.group(1), match.group(2)


def _numbers(version: str) -> tuple[int, ...]:
    numbers = [int(part[:9]) for part in version.split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _holds(have: tuple[int, ...], operator: str, wanted: tuple[int, ...]) -> bool:
    match operator:
        case ">=":
            return have >= wanted
        case "<=":
            return have <= wanted
        case ">":
            return have > wanted
        case "<":
            return have < wanted
        case "==":
            return have == wanted
        case _:
            return have != wanted
