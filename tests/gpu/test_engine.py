"""The engine on a device: parity with a dense process, several ranks on one device, clock, waits and peak memory."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from stack.config.schema import Config
from tests.gpu import cases
from tests.helpers.reference import dense_run
from tests.helpers.tiny import tiny_config
from tests.numerics.compare import BF16, against_dense, against_run

#: Tolerance for fp32 on a GPU against a dense process on the CPU, whose kernels add in another order.
FP32 = 1e-4
#: Tolerance for losses in bf16 against those in fp32; each rounding is up to 2**-8.
ROUNDED = 2e-2
#: A model that needs so much memory that small buffers of a run do not matter.
LARGE = {
    "shape__hidden_size": 1024, "shape__intermediate_size": 2816, "shape__num_hidden_layers": 8,
    "shape__num_attention_heads": 16, "shape__num_key_value_heads": 4, "shape__vocab_size": 16384,
    "shape__max_position_embeddings": 1024, "data__seq_len": 1024, "data__pack": False, "batch__micro_size": 4,
    "batch__global_size": 16, "precision__dtype": "bf16", "parallel__pipeline": 1,
}  # fmt: skip
LEAST = {"parallel__reduce": "microbatch", "parallel__gather": "microbatch"}


def layout(pipeline: int, zero: int, **more: Any) -> dict[str, Any]:
    return {"parallel__pipeline": pipeline, "parallel__zero": zero, **more}


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_one_rank_in_fp32_is_the_dense_process(device_ranks, zero):
    results = device_ranks(1).run(cases.run, layout(1, zero), "padded")
    worst = max(against_dense(results, dense_run(tiny_config(), "padded")))
    assert worst.size < FP32, worst


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_one_rank_in_bf16_is_zero_0(device_ranks, zero):
    bf16 = {"precision__dtype": "bf16"}
    [whole] = device_ranks(1).run(cases.run, layout(1, 0, **bf16), "padded")
    results = device_ranks(1).run(cases.run, layout(1, zero, **bf16), "padded")
    worst = max(against_run(results, whole, steps=1))
    assert worst.size < BF16, worst
    dense = dense_run(tiny_config(), "padded")
    assert [loss for loss, _ in whole["steps"]] == pytest.approx(dense.losses, rel=ROUNDED)


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, layout(2, 1)),
        (2, layout(2, 3)),
        (2, layout(1, 3, **LEAST)),
        (4, layout(2, 3)),
        (4, layout(2, 3, **LEAST)),
        (4, layout(2, 3, activation__checkpoint="selective")),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "-".join(map(str, value.values())),
)
def test_ranks_that_share_a_device_are_the_dense_process(device_ranks, ranks, settings):
    results = device_ranks(ranks).run(cases.run, settings, "padded")
    worst = max(against_dense(results, dense_run(tiny_config(), "padded")))
    assert worst.size < FP32, worst


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_the_clock_finds_a_bubble(device_ranks, schedule):
    results = device_ranks(2).run(cases.run, layout(2, 0, parallel__schedule=schedule), "full")
    for result in results:
        assert all(0 < fraction < 1 for fraction in result["bubble"])


@pytest.mark.cuda_only
@pytest.mark.parametrize("zero", [0, 3])
def test_the_host_waits_for_no_microbatch(device_ranks, zero):
    settings = layout(1, zero, parallel__overlap=False)
    few = device_ranks(1).run(cases.waits, {**settings, "batch__global_size": 2})[0]
    many = device_ranks(1).run(cases.waits, {**settings, "batch__global_size": 6})[0]
    assert len(many) == len(few), sorted(set(many))


@pytest.mark.cuda_only
@pytest.mark.parametrize(
    "settings",
    [
        layout(1, 0), layout(1, 1), layout(1, 3), layout(1, 3, **LEAST),
        layout(1, 1, activation__checkpoint="none"), layout(1, 1, activation__checkpoint="selective"),
        layout(1, 3, parallel__offload__optimizer="cpu"),
    ],
    ids=lambda value: "-".join(map(str, value.values())),
)  # fmt: skip
def test_the_peak_is_the_planned_one(device_ranks, settings):
    [(found, phases)] = device_ranks(1).run(cases.peak, {**LARGE, **settings})
    assert max(phases.values()) == pytest.approx(found, rel=0.1), phases


def kernels_of() -> list[dict[str, Any]]:
    """Each value of each key in the section `kernels`, as settings of `tiny_config`."""
    section = dataclasses.fields(Config().kernels)
    choices = {field.name: field.metadata.get("choices", ()) for field in section}
    return [{f"kernels__{name}": choice} for name, all_of in choices.items() for choice in all_of]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kernel", kernels_of(), ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()))
def test_the_loss_is_that_of_the_logits(device_ranks, kernel, dtype):
    if "liger" in kernel.values():
        pytest.importorskip("liger_kernel")
    [found] = device_ranks(1).run(cases.loss_of, {"precision__dtype": dtype, **kernel})
    tolerance = FP32 if dtype == "fp32" else ROUNDED
    assert found["ours"] == pytest.approx(found["theirs"], rel=tolerance)
    for name, theirs in found["their_gradients"].items():
        difference = np.abs(found["ours_gradients"][name] - theirs).max()
        assert difference <= tolerance * np.abs(theirs).max(), name
