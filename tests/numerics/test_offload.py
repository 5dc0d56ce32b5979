"""Offloading states to host memory or files, and hpZ's second copy of the parameters, do not change results."""

import functools
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.layouts import run_layout
from tests.helpers.reference import dense_run
from tests.helpers.saved import logical_state, run_from
from tests.helpers.tiny import tiny_config
from tests.numerics.compare import FP32, against_dense, against_run, record

_MICROBATCH = {"parallel__reduce": "microbatch", "parallel__gather": "microbatch"}
_OPTIMIZER, _PARAMS = {"parallel__offload__optimizer": "cpu"}, {"parallel__offload__params": "cpu"}
_TIED = {"shape__tie_word_embeddings": True}

CASES = {
    "zero1": {"parallel__zero": 1, **_OPTIMIZER},
    "zero1, four stages, tied": {"parallel__zero": 1, "parallel__pipeline": 4, **_OPTIMIZER, **_TIED},
    "zero2": {"parallel__zero": 2, **_OPTIMIZER},
    "zero2, reduced each microbatch, tied": {
        "parallel__zero": 2, "parallel__reduce": "microbatch", **_OPTIMIZER, **_TIED,
    },
    "zero3": _OPTIMIZER,
    "zero3, parameters": _PARAMS,
    "zero3, both, each microbatch, tied": {**_OPTIMIZER, **_PARAMS, **_MICROBATCH, **_TIED},
    "zero3, both, interleaved": {
        **_OPTIMIZER, **_PARAMS, "parallel__schedule": "interleaved_1f1b", "parallel__virtual_stages": 2,
    },
    "hpZ": {"parallel__hpz": 2, "parallel__gather": "microbatch"},
    "hpZ, one stage": {"parallel__hpz": 2, "parallel__pipeline": 1, **_MICROBATCH},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equals_a_dense_process(ranks, name):
    dense = dense_run(tiny_config(**{k: v for k, v in CASES[name].items() if k.startswith("shape__")}), "padded")

    results = ranks(4).run(run_layout, CASES[name], "padded")

    worst = record("offload", name, against_dense(results, dense))
    assert worst.size < FP32, worst.what


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("reduce", ["step", "microbatch"])
def test_bf16_is_offloaded_with_sums_in_fp32(ranks, zero_stage, reduce):
    if zero_stage == 1 and reduce == "microbatch":
        pytest.skip("the plan refuses it")
    settings = {"precision__dtype": "bf16", "parallel__zero": zero_stage, "parallel__reduce": reduce}
    expected = ranks(4).run(run_layout, settings, "padded")

    results = ranks(4).run(run_layout, {**settings, **_OPTIMIZER}, "padded")

    for result, single in zip(results, expected, strict=True):
        assert result["dtypes"] == single["dtypes"]
        worst = max(against_run([result], single))
        assert worst.size < FP32, worst.what


def build_async_io() -> float:
    """Compiles DeepSpeed's operator for files on rank 0; other ranks find it in the cache. Returns the seconds."""
    import torch.distributed as dist
    from deepspeed.ops.op_builder import AsyncIOBuilder

    began = time.monotonic()
    if dist.get_rank() == 0:
        AsyncIOBuilder().load(verbose=False)
    return time.monotonic() - began


def has_async_io() -> bool:
    """Whether this host can compile the operator."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder().is_compatible(verbose=False)


def need_async_io(pool: Any) -> None:
    """Compiles DeepSpeed's operator for files on the ranks of a pool, or skips the test where the host cannot."""
    if not (shutil.which("ninja") and shutil.which("g++") and all(pool.run(has_async_io))):
        pytest.skip("DeepSpeed's async_io op needs g++, ninja and libaio-dev")
    pool.run(build_async_io, timeout_s=1000)


#: A model with sub-groups larger than a MiB, because DeepSpeed keeps smaller ones in memory instead of files.
LARGE = {"shape__hidden_size": 128, "shape__intermediate_size": 2048}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_optimizer_in_files(ranks, tmp_path):
    pool = ranks(4)
    need_async_io(pool)
    nvme = {"parallel__offload__optimizer": "nvme", "parallel__offload__folder": str(tmp_path)}

    results = pool.run(run_layout, {**LARGE, **nvme}, "padded")

    assert list(tmp_path.rglob("*.swp"))
    worst = record("offload", "nvme", against_dense(results, dense_run(tiny_config(**LARGE), "padded")))
    assert worst.size < FP32, worst.what


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_states_in_files_are_saved_and_loaded(ranks, tmp_path):
    pool, alone = ranks(4), ranks(1)
    need_async_io(pool)
    nvme = {**LARGE, "parallel__offload__optimizer": "nvme", "parallel__offload__folder": str(tmp_path / "swapped")}
    plain = {**LARGE, "parallel__pipeline": 1, "parallel__zero": 0}
    there, back, home = tmp_path / "there", tmp_path / "back", tmp_path / "home"

    def go(on: Any, settings: dict[str, Any], root: Path, **about: Any) -> list[tuple[float, float]]:
        return on.run(functools.partial(run_from, **about), settings, root, timeout_s=200)[0]["steps"]

    go(pool, nvme, there, step=0, until=2, save=there)
    assert list(tmp_path.rglob("*.swp"))
    go(alone, plain, there, step=2, until=2, load=True, save=back)
    go(pool, nvme, back, step=2, until=2, load=True, save=home)
    states = [logical_state(root, 2) for root in (there, back, home)]
    for name, tensor in states[0].items():
        assert all(torch.equal(tensor, state[name]) for state in states), name
    onwards = [go(pool, nvme, there, step=2, until=4, load=True), go(alone, plain, back, step=2, until=4, load=True)]
    assert [pytest.approx(step, rel=1e-5) for step in onwards[0]] == onwards[1]
