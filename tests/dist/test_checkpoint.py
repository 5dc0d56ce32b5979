"""A checkpoint does not depend on the layout: every layout saves the same state, and every layout can load it."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.saved import LAYOUTS, logical_state, run_from
from tests.helpers.tiers import each_in_turn
from tests.helpers.tiny import family_settings

_STEPS = 2
_HOME = "pp2 dp2 zero3"
_MODELS = {"llama": False, "llama tied": True, "olmoe": False, "gpt2 tied": True}


def run(ranks: Any, layout: str, model: str, root: Path, **about: Any) -> list[dict[str, Any]]:
    world_size, settings = LAYOUTS[layout]
    family = family_settings(model.split()[0], tied=_MODELS[model])
    return ranks(world_size).run(functools.partial(run_from, **about), {**family, **settings}, root)


@pytest.fixture(scope="module")
def origin(ranks, tmp_path_factory):
    """`origin(model)` returns a folder with a checkpoint of the layout `_HOME` after two steps, its state, and the
    results of two further steps in that layout."""

    @functools.cache
    def made(model: str):
        root = tmp_path_factory.mktemp("origin")
        run(ranks, _HOME, model, root, step=0, until=_STEPS, save=root)
        onwards = run(ranks, _HOME, model, root, step=_STEPS, until=_STEPS + 2, load=True)
        return root, logical_state(root, _STEPS), onwards

    return made


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


@pytest.mark.parametrize(("layout", "model"), each_in_turn(LAYOUTS, list(_MODELS)))
def test_another_layout_loads_the_same_state_and_goes_on_with_the_same_losses(ranks, origin, tmp_path, layout, model):
    root, state, onwards = origin(model)
    there = run(ranks, layout, model, root, step=_STEPS, until=_STEPS + 2, load=True, save_loaded=tmp_path)
    assert_equal(state, logical_state(tmp_path, _STEPS))
    for got, expected in zip(there[0]["steps"], onwards[0]["steps"], strict=True):
        assert got == pytest.approx(expected, rel=1e-5)
    assert there[0]["heldout"] == pytest.approx(onwards[0]["heldout"], rel=1e-5)
    # The checkpoint that the other layout saved is loaded back.
    again = run(ranks, _HOME, model, tmp_path, step=_STEPS, until=_STEPS + 2, load=True)
    assert again[0]["steps"] == onwards[0]["steps"]
