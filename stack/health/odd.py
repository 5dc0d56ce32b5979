"""Finds the hosts or ranks that differ from the rest."""

from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Generic, NamedTuple, TypeVar

_Who = TypeVar("_Who")
_What = TypeVar("_What", bound=Hashable)


class Odd(NamedTuple, Generic[_Who]):
    """A host or rank that differs from the most."""

    who: _Who
    key: str
    has: object
    others: object


def odd_ones(of: Mapping[_Who, Mapping[str, _What]]) -> list[Odd[_Who]]:
    """The hosts or ranks that differ from the most in a value, key by key. Of equally frequent values the first counts.

    Args:
        of: for each host or rank, in order, its values by key; all have the same keys.
    """
    found: list[Odd[_Who]] = []
    for key in next(iter(of.values()), {}):
        # Among equally frequent values most_common keeps the order of first occurrence.
        [(norm, _)] = Counter(values[key] for values in of.values()).most_common(1)
        found += [Odd(who, key, values[key], norm) for who, values in of.items() if values[key] != norm]
    return found
