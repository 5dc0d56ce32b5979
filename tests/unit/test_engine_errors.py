"""An error inside one of the engine's contexts leaves no mode switched, and starts no collective."""

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stack.parallel.rank_engine import RankEngine
from stack.parallel.zero import ZeroEngine


def raise_inside(context: contextlib.AbstractContextManager[Any]) -> None:
    with pytest.raises(ValueError, match="inside"), context:
        raise ValueError("inside")


def test_an_evaluation_ends_in_training_mode():
    engine: Any = SimpleNamespace(module=torch.nn.Linear(1, 1))
    raise_inside(RankEngine.evaluate(engine))
    assert engine.module.training
    assert torch.is_grad_enabled()


def test_a_step_that_failed_reduces_nothing():
    switched: list[bool] = []
    # Any other attribute that is asked for would raise AttributeError: the reduction needs the DeepSpeed engine.
    engine: Any = SimpleNamespace(_coalesce=switched.append)
    raise_inside(ZeroEngine._reduced_once(engine))
    assert switched == [True, False]
