"""Documents that are packed into one sequence do not see each other, on any stage of any family.

What one document's tokens are must not change the logits of another one in the same sequence.
"""

import pytest
import torch

from stack.config.families import FAMILIES as CONFIGURED
from stack.models.build import build_stages
from stack.plan.layout import make_plan
from tests.helpers.tiny import FAMILIES, family_settings, tiny_config

_TOLERANCE = 1e-6
#: Where the second document begins in each sequence, and the third, which must not see the second either.
_STARTS = ((5, 11), (9, 12))
_CASES = [
    (family, attention)
    for family in FAMILIES
    for attention in ("sdpa", "eager")
    if attention == "eager" or CONFIGURED[family].sdpa
]


class _Row:
    """The stages of a model in a row, in one process."""

    def __init__(self, family: str, attention: str):
        settings = {**family_settings(family, tied=False), "model__attention": attention}
        self._cfg = tiny_config(**settings, parallel__pipeline=3, parallel__zero=0)
        plan = make_plan(self._cfg, 3)
        cpu = torch.device("cpu")
        self._stages = [stage.eval() for rank in range(3) for stage in build_stages(self._cfg, plan, rank, device=cpu)]

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
    def logits(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[sequences, seq_len, vocabulary] as the model's own forward gives them to the loss."""
        found: list[torch.Tensor] = []
        watch = self._stages[-1].model.register_forward_hook(lambda *call: found.append(call[-1].logits))
        hidden = tokens
        for stage in self._stages:
            hidden = stage(hidden, positions, tokens)
        watch.remove()
        return found[0]


def _largest_change(row: _Row, changed: int, *, packed: bool) -> float:
    """How far the logits after document `changed` of each sequence move, over the largest, when all of its tokens are
    others."""
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
        # Where the positions say that it is one document, the same tokens are seen.
        assert _largest_change(row, changed, packed=False) > 100 * _TOLERANCE
