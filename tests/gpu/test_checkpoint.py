"""The state on a device is saved through pinned copies while training goes on, and loaded bit for bit."""

import functools
from typing import Any

import pytest
import torch

from tests.helpers.saved import logical_state, run_from

_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero0": (1, {"parallel__pipeline": 1, "parallel__zero": 0}),
    "zero1": (1, {"parallel__pipeline": 1, "parallel__zero": 1}),
    "zero3": (1, {"parallel__pipeline": 1}),
    "zero3 bf16": (1, {"parallel__pipeline": 1, "precision__dtype": "bf16"}),
    "zero3 pp2": (2, {}),
    "zero3 offloaded": (1, {"parallel__pipeline": 1, "parallel__offload__optimizer": "cpu"}),
}


@pytest.mark.parametrize("in_background", [True, False])
@pytest.mark.parametrize("name", _LAYOUTS)
def test_a_checkpoint_goes_on_bit_for_bit(device_ranks, tmp_path, name, in_background):
    ranks, layout = _LAYOUTS[name]
    settings = {**layout, "checkpoint__async_save": in_background}

    def run(root: Any, **about: Any) -> list[tuple[float, float]]:
        return device_ranks(ranks).run(functools.partial(run_from, **about), settings, root)[0]["steps"]

    straight = run(tmp_path, step=0, until=4)
    run(tmp_path / "one", step=0, until=2, save=tmp_path / "one")
    assert run(tmp_path / "one", step=2, until=4, load=True) == straight[2:]
    run(tmp_path / "one", step=2, until=2, load=True, save=tmp_path / "two")
    one, two = (logical_state(tmp_path / where, 2) for where in ("one", "two"))
    for key, tensor in one.items():
        assert torch.equal(tensor, two[key]), key
