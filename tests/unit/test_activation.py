"""`activation.checkpoint=selective` keeps the expensive operations, so the backward does not compute them again."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from stack.models.build import build_stages
from stack.parallel.activation import apply_checkpointing
from stack.plan.layout import make_plan
from tests.helpers.tiny import FAMILIES, family_settings, global_batch, tiny_config

#: Expensive operations: matrix products, also of all experts at once, and attention.
_EXPENSIVE = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_dot_product_flash_attention_for_cpu")


class _Calls(TorchDispatchMode):
    """Counts how often each operation is computed, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.of[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def _calls(family: str, checkpoint: str) -> Counter[str]:
    """The number of calls of each operation in a forward and a backward of one stage."""
    settings = {**family_settings(family, tied=False), "shape__num_hidden_layers": 2}
    cfg = tiny_config(**settings, parallel__pipeline=1, parallel__zero=0, activation__checkpoint=checkpoint)
    [stage] = build_stages(cfg, make_plan(cfg, 1), 0, device=torch.device("cpu"))
    apply_checkpointing(stage, cfg.activation)
    ids, labels, positions = map(torch.from_numpy, global_batch(cfg, 0, "packed"))
    with _Calls() as calls:
        stage(ids[:2], positions[:2], labels[:2]).backward()
    return calls.of


@pytest.mark.parametrize("family", FAMILIES)
def test_selective_computes_products_and_attention_once(family):
    once, kept = _calls(family, "none"), _calls(family, "selective")
    assert {name: kept[name] for name in _EXPENSIVE} == {name: once[name] for name in _EXPENSIVE}
    # The rest of a layer is computed again.
    assert kept["mul"] > once["mul"]


def _kept(dropout: float, operation: Any) -> bool:
    """Whether `selective` keeps the result of an operation in a layer with or without dropout."""
    cfg = tiny_config(
        **family_settings("llama", tied=False), parallel__pipeline=1, parallel__zero=0,
        activation__checkpoint="selective", shape__attention_dropout=dropout,
    )  # fmt: skip
    [stage] = build_stages(cfg, make_plan(cfg, 1), 0, device=torch.device("cpu"))
    apply_checkpointing(stage, cfg.activation)
    [_, layer], *_ = stage.numbered_layers()
    checkpoint: Any = layer._gradient_checkpointing_func
    forward, _ = checkpoint.keywords["context_fn"]()
    return forward.policy_fn(None, operation) == CheckpointPolicy.MUST_SAVE


@pytest.fixture
def flash():
    """An operation that is registered in the way of flash-attention's operations."""
    with torch.library._scoped_library("flash_attn", "FRAGMENT") as library:
        library.define("_flash_attn_varlen_forward(Tensor q, Tensor k, Tensor v) -> Tensor")
        yield torch.ops.flash_attn._flash_attn_varlen_forward.default


def test_flash_attention_is_kept(flash):
    assert _kept(0.0, flash)


def test_attention_that_draws_random_numbers_is_computed_again(flash):
    # If attention were not run again, the generator would not advance, and later dropouts would draw other numbers.
    attention = torch.ops.aten._scaled_dot_product_flash_attention.default
    assert torch.Tag.nondeterministic_seeded in attention.tags
    assert _kept(0.0, attention)
    assert not _kept(0.1, attention)
    assert not _kept(0.1, flash)
    assert _kept(0.1, torch.ops.aten.mm.default)


def test_the_products_of_experts_are_one_operation():
    assert _calls("mixtral", "none")["_grouped_mm"] < _calls("mixtral", "full")["_grouped_mm"]
