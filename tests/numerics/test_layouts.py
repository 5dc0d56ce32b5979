"""The held-out loss does not depend on the layout, and the bubble does; gathers are never hidden inside DeepSpeed."""

import functools
from typing import Any

import pytest

from tests.helpers.layouts import run_layout
from tests.helpers.tiers import each_in_turn
from tests.helpers.tiny import family_settings

#: (number of ranks, settings). Together they have every schedule, and both values of parallel.gather.
_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero3": (4, {}),
    "zero3 gathered each microbatch": (4, {"parallel__pipeline": 4, "parallel__gather": "microbatch"}),
    "zero2 gpipe": (4, {"parallel__zero": 2, "parallel__schedule": "gpipe"}),
    "zero3 interleaved": (4, {"parallel__schedule": "interleaved_1f1b", "parallel__virtual_stages": 2}),
    "zero1 interleaved zero bubble": (
        4,
        {
            "parallel__zero": 1,
            "parallel__schedule": "interleaved_zero_bubble",
            "parallel__virtual_stages": 2,
            "activation__checkpoint": "none",
        },
    ),
    "zero0 zbv on two ranks": (
        2,
        {
            "parallel__zero": 0,
            "parallel__schedule": "zbv",
            "parallel__virtual_stages": 2,
            "activation__checkpoint": "none",
        },
    ),
}
_MODELS = {"llama": False, "olmoe": True}


@functools.cache
def _single(pool: Any, family: str, tied: bool) -> float:
    alone = {**family_settings(family, tied=tied), "parallel__pipeline": 1, "parallel__zero": 0}
    [result] = pool.run(run_layout, alone, "padded")
    return result["heldout"]


@pytest.mark.parametrize(("name", "family"), each_in_turn(_LAYOUTS, list(_MODELS)))
def test_heldout_loss_is_the_same_in_every_layout(ranks, name, family):
    world_size, layout = _LAYOUTS[name]
    tied = _MODELS[family]
    results = ranks(world_size).run(run_layout, {**family_settings(family, tied=tied), **layout}, "padded")
    expected = _single(ranks(1), family, tied)
    assert [result["heldout"] for result in results] == pytest.approx([expected] * world_size, rel=1e-5)


def test_one_stage_has_no_bubble_and_a_deeper_pipe_a_larger_one(ranks):
    def bubble(pipeline: int) -> float:
        return ranks(4).run(run_layout, {"parallel__pipeline": pipeline}, "full")[0]["bubble"][-1]

    # The batch has 8 sequences, in microbatches of one: two microbatches for each of four replicas, eight for one.
    assert bubble(1) < 0.05 < bubble(4) < 1


def read_ungathered(settings: dict[str, Any]) -> str:
    """Called on every rank: the error of a step in which no unit is gathered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stack.parallel.gathering.Gathers.ask", lambda *_: None)
        try:
            run_layout(settings, "full")
        except RuntimeError as error:
            # torch's schedule wraps the exception of a stage.
            return str(error.__cause__)
    return ""


def test_a_weight_that_is_read_before_it_is_gathered_is_an_error(ranks):
    settings = {"parallel__pipeline": 1, "parallel__gather": "microbatch"}
    for error in ranks(2).run(read_ungathered, settings):
        assert error.startswith("DeepSpeed itself gathers a parameter")


@pytest.mark.parametrize("kind", ["full", "packed"])
def test_eager_attention_trains_as_sdpa_does(ranks, kind):
    [sdpa, eager] = [
        ranks(4).run(run_layout, {"model__attention": attention}, kind)[0]["steps"] for attention in ("sdpa", "eager")
    ]
    assert sdpa == [pytest.approx(step, rel=1e-5) for step in eager]
