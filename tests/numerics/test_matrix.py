"""The parity matrix: loss, every gradient, the norm, and the parameters after three steps equal those of a dense
process.

The cases are those of `tests.numerics.matrix`. `make test` runs the fast ones, `make test-all` all of them.
"""

import itertools

import pytest

from tests.helpers.layouts import run_layout
from tests.numerics.compare import FP32, against_dense, dense_of, record
from tests.numerics.matrix import (
    AXES,
    CORE,
    FAST,
    LAYOUT,
    Case,
    cases,
    completion,
    fast_cases,
    legal,
    legal_combinations,
)


def _parameter(case: Case):
    return pytest.param(case, id=case.name, marks=() if case in fast_cases() else pytest.mark.slow)


@pytest.mark.parametrize("case", map(_parameter, cases()))
def test_fp32_equals_a_dense_process(ranks, case):
    dense = dense_of(case)
    assert not case.clip or max(dense.norms) > case.clip, "clipping must have something to do"
    results = ranks(case.ranks).run(run_layout, case.settings, case.kind)
    worst = record("fp32 against a dense process", case.name, against_dense(results, dense))
    assert worst.size < FP32, worst.what


def test_each_legal_pair_of_values_is_in_a_case():
    covered = {values for case in cases() for values in case.combinations(tuple(AXES), 2)}
    assert covered == set(legal_combinations(tuple(AXES), 2))


def test_each_legal_triple_of_what_moves_gradients_is_in_a_case():
    covered = {values for case in cases() for values in case.combinations(CORE, 3)}
    assert covered == set(legal_combinations(CORE, 3))


def test_only_layouts_are_illegal():
    """`completion` tries one value only for each axis outside of `LAYOUT`, so these axes must never be the reason of a
    refusal."""
    for first, second in itertools.combinations(AXES, 2):
        for one, other in itertools.product(AXES[first], AXES[second]):
            if not {first, second} <= LAYOUT.keys():
                assert completion(((first, one), (second, other))) is not None, (one, other)


def test_cases_are_legal_and_have_names_of_their_own():
    assert all(map(legal, cases()))
    assert len({case.name for case in cases()}) == len(cases())


def test_the_fast_cases_have_every_value_of_every_axis():
    chosen = set(fast_cases())
    assert len(chosen) == FAST
    for axis, values in AXES.items():
        assert {getattr(case, axis) for case in chosen} == set(values)
