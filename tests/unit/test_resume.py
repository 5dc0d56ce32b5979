"""The lines that `stack resume` prints before it starts ranks."""

import re
from dataclasses import asdict

import pytest

from stack.config.changes import changes
from stack.config.compose import compose
from stack.launch.resume import jump

COSINE = ("schedule.warmup_steps=10", "optim.lr=1e-3", "schedule.min_lr_ratio=0.1", "train.steps=100")


def with_changes(*changed: str):
    """The config of `COSINE` with some overrides changed."""
    keys = {line.partition("=")[0] for line in changed}
    return compose([*(line for line in COSINE if line.partition("=")[0] not in keys), *changed])


@pytest.mark.parametrize(
    ("change", "step", "told"),
    [
        ((), 50, None),
        (("train.steps=200",), 5, None),
        (("schedule.kind=wsd",), 5, None),
        (("parallel.pipeline=1",), 50, None),
        (
            ("train.steps=200",),
            100,
            "from 1.00e-04 in step 100 to 5.84e-04 in step 101, by train.steps 100 -> 200 under schedule.kind=cosine; "
            "to keep it, resume with schedule.kind=constant optim.lr=0.0001",
        ),
        (("train.steps=60",), 50, "from 6.37e-04 in step 50 to 1.73e-04 in step 51, by train.steps 100 -> 60 under"),
        (("optim.lr=2e-3",), 50, "to 1.24e-03 in step 51, by optim.lr 0.001 -> 0.002$"),
        (("schedule.kind=constant",), 50, "to 1.00e-03 in step 51, by schedule.kind cosine -> constant$"),
        (("schedule.min_lr_ratio=0.5",), 99, "by schedule.min_lr_ratio 0.1 -> 0.5$"),
        (
            ("optim.lr=2e-3", "schedule.kind=linear", "train.steps=200"),
            100,
            "by optim.lr 0.001 -> 0.002; schedule.kind cosine -> linear; train.steps 100 -> 200$",
        ),
    ],
)
def test_a_jump_of_the_learning_rate_names_the_keys_that_make_it(change, step, told):
    found = jump(with_changes(*change), with_changes(), step)
    assert (found is None) == (told is None), found
    if found:
        assert re.search(told, found), found


@pytest.mark.parametrize("step", [30, 50, 99, 100])
def test_what_the_line_says_keeps_the_rate(step):
    told = jump(with_changes("train.steps=300"), with_changes(), step)
    assert told
    advice = told.partition("resume with ")[2].split()
    assert jump(with_changes("train.steps=300", *advice), with_changes(), step) is None


def test_a_constant_rate_goes_on_to_any_end():
    before = with_changes("schedule.kind=constant")
    assert jump(with_changes("schedule.kind=constant", "train.steps=300"), before, 100) is None


def test_changes_are_told_key_by_key():
    before = compose(["model.config.rope_parameters={rope_type: linear, factor: 2.0}"])
    after = compose(
        [
            "model.config.rope_parameters={rope_type: linear, factor: 4.0}",
            "parallel.pipeline=1",
            "optim.betas=[0.9,0.99]",
            "checkpoint.path=/elsewhere",
            "checkpoint.step=7",
            "checkpoint.allow=[model]",
        ]
    )
    assert [str(change) for change in changes(asdict(before), asdict(after))] == [
        "model.config.rope_parameters.factor 2.0 -> 4.0",
        "parallel.pipeline 2 -> 1",
        "optim.betas [0.9,0.95] -> [0.9,0.99]",
        "checkpoint.path null -> /elsewhere",
    ]
    assert not changes(asdict(before), asdict(before))
    assert [change.short for change in changes({"a": {"b": "x" * 50}}, {"a": {}})] == [f"a.b {'x' * 13}... -> null"]
