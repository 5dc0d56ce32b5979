"""The auxiliary loss of a mixture of experts is accurate for many tokens as well as for few."""

import pytest
import torch
import torch.nn.functional as F

from stack.models.router import load_balancing


@pytest.mark.parametrize("tokens", [100, 2**18])
def test_load_balancing_is_that_of_fp64(tokens):
    generator = torch.Generator().manual_seed(4)
    # Most tokens go to one expert. With equal experts the errors of their means would cancel.
    logits = torch.randn(tokens, 8, generator=generator) + torch.tensor([3.0, *[0.0] * 7])
    trained = (torch.rand(tokens, generator=generator) < 0.9).float()
    probabilities = logits.double().softmax(dim=-1)[trained.bool()]
    choices = F.one_hot(probabilities.topk(2, dim=-1).indices, 8).sum(dim=1).double()
    expected = 8 * (choices.mean(dim=0) * probabilities.mean(dim=0)).sum()
    assert load_balancing(logits, trained, 2).item() == pytest.approx(expected.item(), rel=5e-7)
