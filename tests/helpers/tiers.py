"""Which cases of a parametrized test `make test` runs, and which are left to `make test-ci`."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest


def in_ci_unless(fast: Callable[[Any], bool], cases: Iterable[Any]) -> list[Any]:
    """Cases for `pytest.mark.parametrize`, a tuple where there are several arguments; CI runs them all, and `make test`
    those of which `fast` is true."""
    values = ((case if isinstance(case, tuple) else (case,), fast(case)) for case in cases)
    return [pytest.param(*arguments, marks=() if is_fast else pytest.mark.ci) for arguments, is_fast in values]


def each_in_turn(rows: Iterable[Any], columns: Sequence[Any]) -> list[Any]:
    """All pairs as cases for `pytest.mark.parametrize`; CI runs them all, and `make test` each row with one column, the
    next row with the next column."""
    rows = list(rows)
    fast = list(zip(rows, itertools.cycle(columns), strict=False))
    return in_ci_unless(lambda case: case in fast, itertools.product(rows, columns))
