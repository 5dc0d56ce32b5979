"""Who differs from the rest: of hosts ahead of a launch, of ranks after it."""

from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Generic, NamedTuple, TypeVar

_Who = TypeVar("_Who")
_What = TypeVar("_What", bound=Hashable)


class Odd(NamedTuple, Generic[_Who]):
    """One that differs."""

    who: _Who
    key: str
    has: object
    others: object


def odd_ones(of: Mapping[_Who, Mapping[str, _What]]) -> list[Odd[_Who]]:
    """Those that differ from the most in a value, key by key. Of values that are as frequent the first one's counts.

    Args:
        of: for each host or rank, in order, its values by key; all have the same keys.
    """
    found: list[Odd[_Who]] = []
    for key in next(iter(of.values()), {}):
        # most_common keeps the order of first occurrence among equals.
        [(norm, _)] = Counter(values[key] for values in of.values()).most_common(1)
        found += [Odd(who, key, values[key], norm) for who, values in of.items() if values[key] != norm]
    return found
