"""Compares two configs key by key."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from stack.config.values import show

#: Keys that apply to a single `stack resume` only -> the values that they have again afterwards. They are no changes.
ONCE = {"checkpoint.step": "auto", "checkpoint.allow": "[]"}
#: Largest number of characters of a value in a label of a plot.
_SHORT = 16
_MISSING = object()


class Change(NamedTuple):
    """A key whose value differs. `before` or `after` is None if the key is missing in that config."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key} {show(self.before)} -> {show(self.after)}"

    @property
    def short(self) -> str:
        """As `str`, with each value cut to 16 characters, for a label in a plot."""
        return f"{self.key} {show(self.before, _SHORT)} -> {show(self.after, _SHORT)}"


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """The dotted keys whose values differ, in the order of `after`, without the keys of `ONCE`.

    Args:
        before: a config as nested mappings (`dataclasses.asdict`, or a parsed config.yaml).
        after: the config to compare with, in the same form.
    """
    old, new = dict(_leaves(before)), dict(_leaves(after))
    return [
        Change(key, old.get(key), new.get(key))
        for key in {**new, **old}
        if key not in ONCE and old.get(key, _MISSING) != new.get(key, _MISSING)
    ]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
