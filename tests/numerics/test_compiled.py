"""Compiled decoder layers give the same results, also with ZeRO-3's hooks and recomputation."""

import pytest

from tests.helpers.layouts import run_layout
from tests.helpers.reference import dense_run
from tests.helpers.tiny import tiny_config
from tests.numerics.compare import FP32, against_dense, record

CASES = {
    "zero3": {"activation__checkpoint": "full"},
    "zero3, each microbatch": {"parallel__reduce": "microbatch", "parallel__gather": "microbatch"},
    "zero1, nothing recomputed": {"parallel__zero": 1, "activation__checkpoint": "none"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_equals_a_dense_process(ranks, name):
    results = ranks(4).run(run_layout, {"precision__compile": True, **CASES[name]}, "packed", timeout_s=280)
    worst = record("compiled", name, against_dense(results, dense_run(tiny_config(), "packed")))
    assert worst.size < FP32, worst.what
