"""In fp16 all stages have the same loss scale and skip the same steps, in every ZeRO stage."""

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.layouts import run_layout

FP16 = {"precision__dtype": "fp16"}
SINGLE = {**FP16, "parallel__pipeline": 1, "parallel__zero": 0}
LAYOUTS: dict[str, dict[str, Any]] = {
    "zero0": {"parallel__zero": 0},
    "zero1": {"parallel__zero": 1},
    "zero2, reduced each microbatch": {"parallel__zero": 2, "parallel__reduce": "microbatch"},
    "zero3": {},
    "zero3, each microbatch": {"parallel__reduce": "microbatch", "parallel__gather": "microbatch"},
    "zero3, interleaved": {"parallel__schedule": "interleaved_1f1b", "parallel__virtual_stages": 2},
    "zero3, tied": {"shape__tie_word_embeddings": True},
    "zero2, offloaded": {"parallel__zero": 2, "parallel__offload__optimizer": "cpu"},
    "mixture of experts": {
        "model__name": "mixtral", "shape__num_local_experts": 4, "shape__num_experts_per_tok": 2,
        "shape__router_aux_loss_coef": 0.1,
    },
}  # fmt: skip
#: Tolerance for weights. They are rounded to fp16 after each update, so a difference in the last bit of a master may
#: become one in the last bit of fp16 (2**-11).
WEIGHTS = 2**-10


def run_with_overflow(settings: dict[str, Any], pipe_rank: int | None) -> dict[str, Any]:
    """`run_layout` with an infinite gradient on one replica of the stage `pipe_rank` in the second step (on none with
    None)."""
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed refuses fp16 on CPUs without instructions for it, although torch computes it there.
    scales: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(get_accelerator()), "is_fp16_supported", lambda _self: True)
        spoil_one_gradient(patch, pipe_rank, scales)
        return {**run_layout(settings, "padded"), "scales": scales}


def spoil_one_gradient(patch: pytest.MonkeyPatch, pipe_rank: int | None, scales: list[float]) -> None:
    from stack.parallel.engine import Engine

    train = Engine.train_batch

    def train_batch(self: Engine, batch: Any, *, lr: float) -> Any:
        scales.append(self.rank_engine.loss_scale)
        mesh = self._mesh
        if len(scales) != 2 or mesh.pipe_rank != pipe_rank or mesh.replica != 0:
            return train(self, batch, lr=lr)
        parameter = next(self.stages[0].layers[0].parameters())
        hook = parameter.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
        try:
            return train(self, batch, lr=lr)
        finally:
            hook.remove()

    patch.setattr(Engine, "train_batch", train_batch)


@pytest.mark.parametrize("name", LAYOUTS)
def test_fp16_does_not_depend_on_the_layout(ranks, name):
    model = {k: v for k, v in LAYOUTS[name].items() if k.startswith(("model", "shape"))}
    [single] = ranks(1).run(run_with_overflow, {**SINGLE, **model}, None)

    results = ranks(4).run(run_with_overflow, {**FP16, **LAYOUTS[name]}, None)

    assert np.array(results[0]["steps"]) == pytest.approx(np.array(single["steps"]), rel=1e-4)
    assert {tuple(result["scales"]) for result in results} == {(2.0**16,) * 3}
    for result in results:
        assert {dtype for what, dtype in result["dtypes"].items() if what != "parameters"} == {"float32"}
        for parameter, value in result["parameters"].items():
            expected = single["parameters"].get(parameter, single["parameters"]["model.embed_tokens.weight"])
            assert np.abs(value - expected).max() < WEIGHTS * np.abs(expected).max(), parameter


@functools.cache
def _clean(pool: Any, zero_stage: int) -> list[dict[str, Any]]:
    return pool.run(run_with_overflow, {**FP16, "parallel__zero": zero_stage}, None)


@pytest.mark.parametrize("pipe_rank", [0, 1])
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_an_overflow_on_one_stage_is_everybodys(ranks, zero_stage, pipe_rank):
    results = ranks(4).run(run_with_overflow, {**FP16, "parallel__zero": zero_stage}, pipe_rank)

    for result, expected in zip(results, _clean(ranks(4), zero_stage), strict=True):
        assert result["scales"] == [2.0**16, 2.0**16, 2.0**15]
        (_, first), (_, second), (loss, third) = result["steps"]
        assert math.isfinite(first)
        assert math.isnan(second) or math.isinf(second)
        assert math.isfinite(third)
        # The second update was skipped, so the third step started from the weights after the first.
        assert result["skipped"] == [False, True, False]
        assert loss != expected["steps"][2][0]
