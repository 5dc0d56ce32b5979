"""Training with the chunked loss equals the dense process, in layouts that gather, shard, split and recompute."""

from typing import Any

import pytest

from tests.helpers.layouts import run_layout
from tests.helpers.liger import interpret, needs_interpreter
from tests.helpers.reference import dense_run
from tests.helpers.tiny import family_settings, tiny_config
from tests.numerics.compare import BF16, FP32, against_dense, against_run, record

_CHUNKED = {"kernels__loss": "chunked"}
_EACH = {"parallel__reduce": "microbatch", "parallel__gather": "microbatch"}
_INTERLEAVED = {"parallel__schedule": "interleaved_1f1b", "parallel__virtual_stages": 2}
_ZERO_BUBBLE = {
    "parallel__zero": 0, "parallel__virtual_stages": 2, "activation__checkpoint": "none",
    "parallel__schedule": "interleaved_zero_bubble",
}  # fmt: skip
#: Name -> (settings of the layout, settings of the model).
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "zero3": ({}, {}),
    "zero3, each microbatch, tied": (_EACH, family_settings("llama", tied=True)),
    "zero3, each microbatch, mixture": (_EACH, family_settings("mixtral", tied=False)),
    "zero3, interleaved, selective": ({**_INTERLEAVED, "activation__checkpoint": "selective"}, {}),
    "zero2, gpipe, tied": (
        {"parallel__zero": 2, "parallel__schedule": "gpipe", "parallel__reduce": "microbatch"},
        family_settings("gpt2", tied=True),
    ),
    "zero1, one stage, tied": ({"parallel__zero": 1, "parallel__pipeline": 1}, family_settings("qwen3", tied=True)),
    "zero0, zero bubble, mixture": (_ZERO_BUBBLE, family_settings("olmoe", tied=False)),
    "zero0, zbv, tied": ({**_ZERO_BUBBLE, "parallel__schedule": "zbv"}, family_settings("llama", tied=True)),
}


def run_in_chunks(settings: dict[str, Any], kind: str, *, scaled: bool = True) -> dict[str, Any]:
    """`run_layout` with several chunks of unequal size in a microbatch. Without `scaled`, the backward of the loss
    ignores its upstream gradient."""
    from stack.models import loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loss.CHUNK_TOKENS, "cpu", 5)
        if not scaled:
            drop_the_upstream_gradient(patch)
        return run_layout(settings, kind)


def drop_the_upstream_gradient(patch: pytest.MonkeyPatch) -> None:
    from stack.models.loss import _LinearCrossEntropy

    backward = _LinearCrossEntropy.backward
    patch.setattr(_LinearCrossEntropy, "backward", lambda ctx, scale: backward(ctx, scale / scale))


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_a_dense_process(ranks, name):
    layout, model = LAYOUTS[name]
    results = ranks(4).run(run_in_chunks, {**layout, **model, **_CHUNKED}, "padded")
    worst = record("loss in chunks", name, against_dense(results, dense_run(tiny_config(**model), "padded")))
    assert worst.size < FP32, worst.what


def test_an_upstream_gradient_that_is_dropped_shows(ranks):
    results = ranks(4).run(_without_scale, _CHUNKED, "padded")
    assert max(against_dense(results, dense_run(tiny_config(), "padded"))).size > 10 * FP32


def _without_scale(settings: dict[str, Any], kind: str) -> dict[str, Any]:
    return run_in_chunks(settings, kind, scaled=False)


@pytest.mark.parametrize("name", ["zero3, each microbatch, tied", "zero0, zbv, tied"])
def test_heldout_loss_is_that_of_whole_logits(ranks, name):
    layout, model = LAYOUTS[name]
    chunked, logits = (
        ranks(4).run(run_in_chunks, {**layout, **model, "kernels__loss": kernel}, "padded")[0]["heldout"]
        for kernel in ("chunked", "logits")
    )
    assert chunked == pytest.approx(logits, rel=1e-5)


@pytest.mark.parametrize("name", ["zero3", "zero3, each microbatch, mixture", "zero0, zero bubble, mixture"])
def test_bf16_does_not_depend_on_the_layout(ranks, name):
    layout, model = LAYOUTS[name]
    settings = {**model, **_CHUNKED, "precision__dtype": "bf16"}
    results = ranks(4).run(run_in_chunks, {**layout, **settings}, "packed")
    [single] = ranks(1).run(run_in_chunks, {**settings, "parallel__pipeline": 1, "parallel__zero": 0}, "packed")
    worst = record("loss in chunks, bf16 against one rank", name, against_run(results, single, steps=1))
    assert worst.size < BF16, worst.what


def run_with_liger(settings: dict[str, Any], kind: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        interpret(patch)
        return run_layout(settings, kind)


@needs_interpreter
@pytest.mark.parametrize("name", ["zero3", "zero3, each microbatch, tied", "zero3, interleaved, selective"])
def test_liger_equals_a_dense_process(ranks, name):
    layout, model = LAYOUTS[name]
    model = {**model, "batch__global_size": 4, "shape__num_hidden_layers": 4}
    # `selective` refuses rope=liger: the kernel overwrites saved results, which makes gradients wrong.
    parts = {"loss", "rms_norm", "rope", "swiglu"} - ({"rope"} if "selective" in name else set())
    liger = {f"kernels__{part}": "liger" for part in parts}
    results = ranks(4).run(run_with_liger, {**layout, **model, **liger}, "padded", timeout_s=280)
    worst = record("liger", name, against_dense(results, dense_run(tiny_config(**model), "padded")))
    assert worst.size < FP32, worst.what
