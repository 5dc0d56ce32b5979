"""Every layout equals one dense process: loss, every gradient, the global norm, parameters after three steps.

fp32 is held to 1e-5 relative. bf16 is held to the same run in one process without ZeRO, in the same dtype.
"""

import functools
from typing import Any

import numpy as np
import pytest

from tests.helpers.layouts import run_layout
from tests.helpers.reference import Curve, dense_run
from tests.helpers.tiny import tiny_config

#: (ranks, padded, settings). Chosen so that each ZeRO stage, policy, schedule, pipeline depth, split and padding meets
#: each other at least once.
CASES: dict[str, tuple[int, bool, dict[str, Any]]] = {
    "pp2 dp2 zero3": (4, True, {}),
    "pp2 dp2 zero3, gathered and reduced each microbatch": (
        4, True, {"parallel__gather": "microbatch", "parallel__reduce": "microbatch"},
    ),
    "pp2 dp2 zero3, gathered each microbatch": (4, False, {"parallel__gather": "microbatch"}),
    "pp2 dp2 zero3, reduced each microbatch": (4, False, {"parallel__reduce": "microbatch"}),
    "pp2 dp2 zero3, nothing recomputed": (4, True, {"activation__checkpoint": "none"}),
    "pp2 dp2 zero3, not clipped": (4, True, {"optim__grad_clip": 0.0}),
    "pp2 dp2 zero3, gpipe": (4, True, {"parallel__schedule": "gpipe"}),
    "pp2 dp2 zero3, gpipe, reduced each microbatch": (
        4, True, {"parallel__schedule": "gpipe", "parallel__reduce": "microbatch"},
    ),
    "pp2 dp2 zero3, microbatches of two": (4, True, {"batch__micro_size": 2}),
    "pp2 dp2 zero3, uneven by hand": (4, True, {"parallel__split": [0, 1]}),
    "pp2 dp2 zero3, eager attention": (4, True, {"model__attention": "eager"}),
    "pp4 dp1 zero3": (4, True, {"parallel__pipeline": 4}),
    "pp4 dp1 zero3, reduced each microbatch": (4, False, {"parallel__pipeline": 4, "parallel__reduce": "microbatch"}),
    "pp1 dp4 zero3": (4, True, {"parallel__pipeline": 1}),
    "pp1 dp4 zero3, tied": (4, True, {"parallel__pipeline": 1, "shape__tie_word_embeddings": True}),
    "pp2 dp2 zero2": (4, True, {"parallel__zero": 2}),
    "pp2 dp2 zero2, reduced each microbatch": (4, True, {"parallel__zero": 2, "parallel__reduce": "microbatch"}),
    "pp2 dp2 zero1": (4, True, {"parallel__zero": 1}),
    "pp2 dp2 zero1, gpipe, not clipped": (
        4, False, {"parallel__zero": 1, "parallel__schedule": "gpipe", "optim__grad_clip": 0.0},
    ),
    "pp2 dp2 zero0": (4, True, {"parallel__zero": 0}),
    "pp2 dp2 zero0, not clipped": (4, True, {"parallel__zero": 0, "optim__grad_clip": 0.0}),
    "pp4 dp1 zero0": (4, False, {"parallel__pipeline": 4, "parallel__zero": 0}),
    "pp1 dp1 zero0": (1, True, {"parallel__pipeline": 1, "parallel__zero": 0}),
    "pp1 dp1 zero0, tied": (1, True, {"parallel__pipeline": 1, "parallel__zero": 0, "shape__tie_word_embeddings": True}),
    "pp1 dp1 zero3": (1, False, {"parallel__pipeline": 1}),
}  # fmt: skip

BF16_CASES: dict[str, dict[str, Any]] = {
    "zero3": {},
    "zero3, gathered and reduced each microbatch": {
        "parallel__gather": "microbatch", "parallel__reduce": "microbatch",
    },
    "zero3, four stages": {"parallel__pipeline": 4},
    "zero2": {"parallel__zero": 2},
    "zero2, reduced each microbatch": {"parallel__zero": 2, "parallel__reduce": "microbatch"},
    "zero1": {"parallel__zero": 1},
    "zero0": {"parallel__zero": 0},
}  # fmt: skip


@functools.cache
def _dense(padded: bool, grad_clip: float, tied: bool) -> Curve:
    return dense_run(
        tiny_config(optim__grad_clip=grad_clip, shape__tie_word_embeddings=tied), padded=padded
    )


@pytest.mark.parametrize("name", CASES)
def test_fp32_equals_a_dense_process(ranks, name):
    world_size, padded, settings = CASES[name]
    reference = _dense(
        padded, settings.get("optim__grad_clip", 0.5), settings.get("shape__tie_word_embeddings", False)
    )

    results = ranks(world_size).run(run_layout, settings, padded)

    for result in results:
        losses, norms = zip(*result["steps"], strict=True)
        assert losses == pytest.approx(reference.losses, rel=1e-5)
        assert norms == pytest.approx(reference.norms, rel=1e-5)
    for what, expected in (("gradients", reference.gradients), ("parameters", reference.parameters)):
        found = {name: value for result in results for name, value in result[what].items()}
        assert found.keys() == expected.keys()
        for parameter, value in found.items():
            assert _relative(value, expected[parameter].numpy()) < 1e-5, f"{what} of {parameter}"


@pytest.mark.parametrize("name", BF16_CASES)
def test_bf16_does_not_depend_on_the_layout(ranks, name):
    bf16 = {"precision__dtype": "bf16"}
    [single] = ranks(1).run(run_layout, {**bf16, "parallel__pipeline": 1, "parallel__zero": 0}, True)

    results = ranks(4).run(run_layout, {**bf16, **BF16_CASES[name]}, True)

    assert np.array(results[0]["steps"]) == pytest.approx(np.array(single["steps"]), rel=1e-5)
    found = {name: value for result in results for name, value in result["gradients"].items()}
    for parameter, value in found.items():
        assert _relative(value, single["gradients"][parameter]) < 1e-5, parameter


def test_bf16_keeps_all_but_the_parameters_in_fp32(ranks):
    for settings in ({}, {"parallel__reduce": "microbatch"}, {"parallel__zero": 1}, {"parallel__zero": 0}):
        table = ranks(4).run(run_layout, {"precision__dtype": "bf16", **settings}, False)[0]["dtypes"]
        assert table == {
            "parameters": "bfloat16",
            "masters": "float32",
            "gradient sums": "float32",
            "gradient reduction": "float32",
            "exp_avg": "float32",
            "exp_avg_sq": "float32",
            "rotary tables": "float32",
        }


def test_heldout_loss_is_the_same_in_every_layout(ranks):
    [single] = ranks(1).run(run_layout, {"parallel__pipeline": 1, "parallel__zero": 0}, True)
    for settings in ({}, {"parallel__zero": 2}, {"parallel__pipeline": 4, "parallel__gather": "microbatch"}):
        results = ranks(4).run(run_layout, settings, True)
        assert [result["heldout"] for result in results] == pytest.approx([single["heldout"]] * 4, rel=1e-5)


def test_one_stage_has_no_bubble_and_a_deeper_pipe_a_larger_one(ranks):
    def bubble(pipeline: int) -> float:
        return ranks(4).run(run_layout, {"parallel__pipeline": pipeline}, False)[0]["bubble"][-1]

    # 8 sequences of one: two microbatches for each of four replicas, eight for one.
    assert bubble(1) < 0.05 < bubble(4) < 1


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest magnitude of the tensor."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12))
