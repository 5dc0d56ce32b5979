"""ZeRO-3 with several DeepSpeed sub-groups in one parameter group.

DeepSpeed begins a new sub-group after 1e9 elements of a rank, as many as a rank of a 70B model has. Here sub-groups are
small, so that the tiny model has several.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.layouts import run_layout
from tests.helpers.reference import dense_run
from tests.helpers.saved import LAYOUTS, logical_state, run_from
from tests.helpers.tiny import tiny_config
from tests.numerics.compare import FP32, against_dense, record
from tests.numerics.test_offload import LARGE, need_async_io

#: Number of elements of a rank in a sub-group.
_SMALL = 1000

CASES: dict[str, dict[str, Any]] = {
    "gathered once a step": {},
    "reduced and gathered each microbatch, tied": {
        "parallel__reduce": "microbatch", "parallel__gather": "microbatch", "shape__tie_word_embeddings": True,
    },
    "offloaded": {"parallel__offload__optimizer": "cpu"},
    "bf16 masters apart from the parameters": {"precision__dtype": "bf16"},
}  # fmt: skip


def in_small_sub_groups(call: Callable[..., Any], size: int, *args: Any, **options: Any) -> Any:
    """Calls `call` on this rank, with sub-groups of about `size` elements.

    Raises:
        AssertionError: no parameter group has more than one sub-group, so nothing would be tested.
    """
    from stack.parallel import zero

    make, config_of = zero.ZeroEngine.__init__, zero.config_of
    splits: list[bool] = []

    def config(cfg: Any, plan: Any) -> dict[str, Any]:
        found = config_of(cfg, plan)
        found["zero_optimization"]["sub_group_size"] = size
        return found

    def init(self: Any, *about: Any, **more: Any) -> None:
        make(self, *about, **more)
        splits.append(self.groups > len(self.torch_optimizer.param_groups))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero, "config_of", config)
        patch.setattr(zero.ZeroEngine, "__init__", init)
        found = call(*args, **options)
    assert splits == [True], splits
    return found


@pytest.mark.parametrize("name", CASES)
def test_equals_the_run_it_is_compared_with(ranks, name):
    settings = CASES[name]
    if "precision__dtype" in settings:
        # In bf16 a dense process differs by more than the rounding of fp32 sums. The comparison is with a run that has
        # one sub-group in each group.
        expected = ranks(4).run(run_layout, settings, "padded")
        results = ranks(4).run(in_small_sub_groups, run_layout, _SMALL, settings, "padded")
        for result, single in zip(results, expected, strict=True):
            assert result["steps"] == [pytest.approx(step, rel=FP32) for step in single["steps"]]
        return
    shape = {key: value for key, value in settings.items() if key.startswith("shape__")}
    results = ranks(4).run(in_small_sub_groups, run_layout, _SMALL, settings, "padded")
    worst = record("sub-groups", name, against_dense(results, dense_run(tiny_config(**shape), "padded")))
    assert worst.size < FP32, worst.what


def _go(pool: Any, settings: dict[str, Any], root: Path, *, small: int = 0, **about: Any) -> list[tuple[float, float]]:
    call: Any = functools.partial(run_from, **about)
    before = (functools.partial(in_small_sub_groups, call, small),) if small else (call,)
    return pool.run(*before, settings, root, timeout_s=200)[0]["steps"]


def test_a_checkpoint_goes_from_many_sub_groups_to_one_and_back(ranks, tmp_path):
    world_size, settings = LAYOUTS["pp1 dp1 zero0"]
    many, one = ranks(4), ranks(world_size)
    there, back = tmp_path / "there", tmp_path / "back"
    _go(many, {}, there, small=_SMALL, step=0, until=2, save=there)
    onwards = _go(many, {}, there, small=_SMALL, step=2, until=4, load=True)
    alone = _go(one, settings, there, step=2, until=4, load=True, save_loaded=back)
    _assert_same_state(there, back)
    assert alone == [pytest.approx(step, rel=1e-5) for step in onwards]
    assert _go(many, {}, back, small=_SMALL, step=2, until=4, load=True) == onwards


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_several_sub_groups_in_files(ranks, tmp_path):
    pool = ranks(4)
    need_async_io(pool)
    # Sub-groups are larger than a MiB, because DeepSpeed keeps smaller ones in memory.
    small = 300_000
    nvme = {**LARGE, "parallel__offload__optimizer": "nvme", "parallel__offload__folder": str(tmp_path / "swapped")}
    there, home = tmp_path / "there", tmp_path / "home"

    results = pool.run(in_small_sub_groups, run_layout, small, nvme, "padded", timeout_s=200)
    worst = record("sub-groups", "nvme", against_dense(results, dense_run(tiny_config(**LARGE), "padded")))
    assert worst.size < FP32, worst.what

    _go(pool, nvme, there, small=small, step=0, until=2, save=there)
    assert list(tmp_path.rglob("*.swp"))
    _go(pool, nvme, there, small=small, step=2, until=2, load=True, save=home)
    _assert_same_state(there, home)


def _assert_same_state(one: Path, other: Path) -> None:
    states = logical_state(one, 2), logical_state(other, 2)
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
