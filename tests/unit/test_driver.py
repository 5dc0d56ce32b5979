"""What the driver says before there are ranks."""

import re

import pytest

from stack.config.compose import compose
from stack.launch.driver import jump

COSINE = ("schedule.warmup_steps=10", "optim.lr=1e-3", "schedule.min_lr_ratio=0.1")


@pytest.mark.parametrize(
    ("steps", "change", "step", "told"),
    [
        (100, (), 50, None),
        (200, (), 100, "cosine schedule to step 200 after one to 100: .* from 1.00e-04 to 5.84e-04"),
        (60, (), 50, "cosine schedule to step 60 after one to 100: .* from 6.37e-04 to 1.73e-04"),
        (100, ("schedule=constant",), 50, "constant schedule to step 100 after one to 100: .* to 1.00e-03"),
        (200, (), 5, None),
    ],
)
def test_a_jump_of_the_learning_rate_is_told(steps, change, step, told):
    found = jump(compose([*COSINE, *change, f"train.steps={steps}"]), compose([*COSINE, "train.steps=100"]), step)
    assert (found is None) == (told is None), found
    if told:
        assert re.search(told, found), found


def test_a_constant_rate_goes_on_to_any_end():
    constant = ("schedule=constant", "schedule.warmup_steps=10")
    assert jump(compose([*constant, "train.steps=300"]), compose([*constant, "train.steps=100"]), 100) is None
