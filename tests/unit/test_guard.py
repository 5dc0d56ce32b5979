"""Losses and gradient norms that end a run, and overflows in fp16 that only skip a step."""

import math

import pytest

from stack.errors import NumericsError
from stack.health.guard import check_finite
from stack.train.state import TrainState


@pytest.mark.parametrize("bad", [{"loss": math.nan}, {"grad_norm": math.inf}])
def test_a_value_that_is_not_finite_ends_the_run(bad):
    with pytest.raises(NumericsError, match=f"{next(iter(bad))} is .* at step 7"):
        check_finite(**{"step": 7, "loss": 1.0, "grad_norm": 1.0, **bad})


def test_an_overflow_of_fp16_only_lowers_the_scale():
    check_finite(step=7, loss=1.0, grad_norm=math.nan, loss_scale=2.0)


@pytest.mark.parametrize("bad", [{"loss": math.nan}, {"loss_scale": 1.0}])
def test_a_scale_that_cannot_be_lowered_or_a_bad_loss_does(bad):
    with pytest.raises(NumericsError):
        check_finite(**{"step": 7, "loss": 1.0, "grad_norm": math.nan, "loss_scale": 2.0, **bad})


def test_a_skipped_step_is_counted_and_its_tokens_too():
    state = TrainState().advance(tokens=5, sequences=2).advance(tokens=5, sequences=2, skipped=True)
    assert (state.step, state.tokens, state.skipped_steps) == (2, 10, 1)
