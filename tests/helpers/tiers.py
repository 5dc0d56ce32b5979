"""Which cases of a parametrized test `make test` runs, and which are left to `make test-ci`."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def in_ci_unless(fast: Callable[[Any], bool], cases: Iterable[Any]) -> list[Any]:
    """Cases for `pytest.mark.parametrize`, a tuple where there are several arguments; CI runs them all, and `make test`
    those of which `fast` is true."""
    values = ((case if isinstance(case, tuple) else (case,), fast(case)) for case in cases)
    return [pytest.param(*arguments, marks=() if is_fast else pytest.mark.ci) for arguments, is_fast in values]
