"""In what two configs differ, key by key."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from stack.config.values import show

#: What a resume is told for that once, and the values that the next one begins with again.
ONCE = {"checkpoint.step": "auto", "checkpoint.allow": "[]"}
#: Letters of a value that there is room for in a picture.
_SHORT = 16
_MISSING = object()


class Change(NamedTuple):
    """One key that has another value than before; None where there was none, or is none any more."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key} {show(self.before)} -> {show(self.after)}"

    @property
    def short(self) -> str:
        """The same for a picture, with values cut to a few letters."""
        return f"{self.key} {show(self.before, _SHORT)} -> {show(self.after, _SHORT)}"


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """The keys, dotted, whose values differ, in the order of `after`; `ONCE` is left out.

    Args:
        before: a config as nested mappings (`dataclasses.asdict`, or a config.yaml that was read).
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
