"""Marks the cases of a parametrized test that only `make test-ci` runs."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest


def in_ci_unless(fast: Callable[[Any], bool], cases: Iterable[Any]) -> list[Any]:
    """Cases for `pytest.mark.parametrize`. CI runs all of them, and `make test` those for which `fast` is true. A case
    with several arguments is a tuple."""
    values = ((case if isinstance(case, tuple) else (case,), fast(case)) for case in cases)
    return [pytest.param(*arguments, marks=() if is_fast else pytest.mark.ci) for arguments, is_fast in values]


def each_in_turn(rows: Iterable[Any], columns: Sequence[Any]) -> list[Any]:
    """All pairs of a row and a column as cases for `pytest.mark.parametrize`. CI runs all of them. `make test` runs
    each row with one column: the first row with the first column, the second row with the second, and so on."""
    rows = list(rows)
    fast = list(zip(rows, itertools.cycle(columns), strict=False))
    return in_ci_unless(lambda case: case in fast, itertools.product(rows, columns))
