"""The check of the parity matrix finds each of the deliberate faults, with at least ten times its tolerance."""

import pytest

from tests.helpers.layouts import run_layout
from tests.numerics.compare import BF16, FP32, Difference, against_dense, against_run, dense_of
from tests.numerics.faults import FAULTS, Fault, run_with_fault
from tests.numerics.matrix import legal

_DENSE = [name for name, fault in FAULTS.items() if "precision__dtype" not in fault.settings]
_BF16 = [name for name in FAULTS if name not in _DENSE]
#: Case -> its largest difference without a fault, computed once because several faults use the same case.
_SOUND: dict[object, Difference] = {}


def _sound(ranks, fault: Fault) -> Difference:
    if fault.case not in _SOUND:
        results = ranks(fault.case.ranks).run(run_layout, fault.case.settings, fault.case.kind)
        _SOUND[fault.case] = max(against_dense(results, dense_of(fault.case)))
    return _SOUND[fault.case]


@pytest.mark.slow
@pytest.mark.parametrize("name", _DENSE)
def test_a_fault_is_far_outside_the_tolerance(ranks, name):
    fault = FAULTS[name]
    assert legal(fault.case)
    assert _sound(ranks, fault).size < FP32
    settings = {**fault.case.settings, **fault.settings}
    results = ranks(fault.case.ranks).run(run_with_fault, name, settings, fault.case.kind)
    worst = max(against_dense(results, dense_of(fault.case)))
    print(f"{name}: {worst.size:.1e}, {worst.what}")
    assert worst.size > 10 * FP32


@pytest.mark.parametrize("name", _BF16)
def test_bf16_loses_bits_where_a_sum_is_not_in_fp32(ranks, name):
    fault = FAULTS[name]
    settings = {**fault.case.settings, **fault.settings}
    one = {**settings, "parallel__pipeline": 1, "parallel__zero": 0}
    [single] = ranks(1).run(run_layout, one, fault.case.kind)
    sound = ranks(4).run(run_layout, settings, fault.case.kind)
    assert max(against_run(sound, single, steps=1)).size < BF16
    results = ranks(4).run(run_with_fault, name, settings, fault.case.kind)
    worst = max(against_run(results, single, steps=1))
    print(f"{name}: {worst.size:.1e}, {worst.what}")
    assert worst.size > 10 * BF16
