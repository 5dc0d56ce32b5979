"""After an error inside a context of the engine its modes are switched back, and no collective is started."""

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
    # The object has only this attribute, so a reduction, which needs the DeepSpeed engine, would raise AttributeError.
    engine: Any = SimpleNamespace(_coalesce=switched.append)
    raise_inside(ZeroEngine._reduced_once(engine))
    assert switched == [True, False]
