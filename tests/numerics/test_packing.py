"""Attention stays inside a document when several documents are packed into a sequence, on every stage of every family.

A change of one document's tokens must not change the logits of another document in the same sequence.
"""

import pytest
import torch
from transformers import masking_utils
from transformers import modeling_flash_attention_utils as flash
from transformers.integrations import flash_attention

from stack.config.families import FAMILIES as CONFIGURED
from stack.models.build import build_stages
from stack.models.documents import Documents, uses_bounds
from stack.plan.layout import make_plan
from tests.helpers.tiny import FAMILIES, family_settings, tiny_config

_TOLERANCE = 1e-6
#: For each sequence the first tokens of its second and third document. The third must not see the second either.
_STARTS = ((5, 11), (9, 12))
_CASES = [
    (family, attention)
    for family in FAMILIES
    for attention in ("sdpa", "eager")
    if attention == "eager" or CONFIGURED[family].sdpa
]


class _Row:
    """The three pipeline stages of a model, run one after another in one process."""

    def __init__(self, family: str, attention: str):
        settings = {**family_settings(family, tied=False), "model__attention": attention, "kernels__loss": "logits"}
        self._cfg = tiny_config(**settings, parallel__pipeline=3, parallel__zero=0)
        plan = make_plan(self._cfg, 3)
        cpu = torch.device("cpu")
        self.stages = [stage.eval() for rank in range(3) for stage in build_stages(self._cfg, plan, rank, device=cpu)]

    def tokens(self) -> torch.Tensor:
        shape = (len(_STARTS), self._cfg.data.seq_len)
        return torch.randint(self._cfg.model.config["vocab_size"], shape, generator=torch.Generator().manual_seed(3))

    def positions(self, *, packed: bool) -> torch.Tensor:
        positions = torch.arange(self._cfg.data.seq_len).repeat(len(_STARTS), 1)
        for row, starts in enumerate(_STARTS if packed else ()):
            for start in starts:
                positions[row, start:] = torch.arange(self._cfg.data.seq_len - start)
        return positions

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, positions: torch.Tensor, *, told: bool = False) -> torch.Tensor:
        """The logits [sequences, seq_len, vocabulary] of the model's own forward, before the loss.

        Args:
            tokens, positions: int64 [sequences, seq_len].
            told: whether the stages get the bounds of documents from the host, as in a run.
        """
        documents = Documents.of(positions.numpy()[None]) if told else None
        bounds = torch.from_numpy(documents.bounds) if documents else None
        found: list[torch.Tensor] = []
        watch = self.stages[-1].model.register_forward_hook(lambda *call: found.append(call[-1].logits))
        hidden = tokens
        for stage in self.stages:
            stage.documents = documents
            uses = uses_bounds(stage.model.config)
            hidden = stage(hidden, positions, tokens, bounds if uses else None)
        watch.remove()
        return found[0]


def _largest_change(row: _Row, changed: int, *, packed: bool) -> float:
    """Replaces all tokens of document number `changed` in each sequence. Returns the largest change of logits after the
    document, over the largest logit."""
    tokens, positions = row.tokens(), row.positions(packed=packed)
    others = tokens.clone()
    for sequence, starts in enumerate(_STARTS):
        bounds = (0, *starts)
        document = slice(bounds[changed], bounds[changed + 1])
        others[sequence, document] = (tokens[sequence, document] + 1) % 128
    before, after = row.logits(tokens, positions), row.logits(others, positions)
    moved = torch.stack(
        [(before - after)[sequence, starts[changed] :].abs().max() for sequence, starts in enumerate(_STARTS)]
    )
    return (moved.max() / before.abs().max()).item()


@pytest.mark.parametrize(("family", "attention"), _CASES)
def test_a_document_does_not_change_the_next_one(family, attention):
    row = _Row(family, attention)
    for changed in range(2):
        assert _largest_change(row, changed, packed=True) < _TOLERANCE
        # If the positions say that the sequence is one document, later tokens do see the changed ones.
        assert _largest_change(row, changed, packed=False) > 100 * _TOLERANCE


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("family", "attention"), _CASES)
def test_a_stage_that_is_told_asks_nothing(family, attention, packed, monkeypatch):
    row = _Row(family, attention)
    tokens, positions = row.tokens(), row.positions(packed=packed)
    expected = row.logits(tokens, positions)

    def looked(_positions):
        raise AssertionError("the device was asked")

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", looked)
    assert torch.equal(row.logits(tokens, positions, told=True), expected)


def _variable_length(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> torch.Tensor:
    """The definition of flash_attn_varlen_func: causal attention of [tokens, heads, head_dim] inside each document."""
    assert causal
    assert dropout_p == 0
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
    k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for states in (k, v))
    found = torch.empty_like(q)
    for start, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        queries, keys, values = (states[start:end].transpose(0, 1) for states in (q, k, v))
        scores = queries @ keys.mT * (softmax_scale or q.shape[-1] ** -0.5)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
        found[start:end] = (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(0, 1)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_flash_attention_is_told_where_documents_begin(family, monkeypatch):
    """Runs the real code of transformers for flash attention, with the kernel replaced by its definition."""

    def missing(*_args, **_options):
        raise AssertionError("documents would see each other")

    # The real kernel does not support fp32, so transformers would look for a half-precision dtype to cast to.
    monkeypatch.setattr(flash_attention, "get_target_dtype", lambda *_: None)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: (missing, _variable_length, None, missing, missing))
    row = _Row(family, "eager")
    tokens, positions = row.tokens(), row.positions(packed=True)
    expected = row.logits(tokens, positions)
    for stage in row.stages:
        stage.model.config._attn_implementation = "flash_attention_2"
    found = row.logits(tokens, positions, told=True)
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5
