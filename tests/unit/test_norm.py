"""The global gradient norm is exact for gradients of real size, for which torch's fp32 norm is not."""

import math

import pytest
import torch

from stack.parallel.norm import clip, global_norm


def test_a_hundred_million_elements():
    gradient = torch.empty(10**8)
    # Eight values whose squares are exact in fp64, so that the expected sum is exact.
    values = torch.tensor([0.125, -0.3125, 1.4375, 0.6875, -2.0625, 0.0625, 1.1875, -0.8125])
    gradient.view(-1, 8).copy_(values)
    expected = math.sqrt(10**8 // 8 * values.double().square().sum().item())
    assert global_norm([gradient]).item() == pytest.approx(expected, rel=1e-7)
    # torch's function is not accurate enough. If this ever fails, torch's function can replace ours.
    assert torch.nn.utils.get_total_norm([gradient]).item() != pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("sizes", [[], [0], [1], [63], [64], [65, 0, 200], [2**22 + 64 + 3]])
def test_every_element_of_every_gradient_counts_once(sizes):
    generator = torch.Generator().manual_seed(5)
    gradients = [torch.randn(size, generator=generator) for size in sizes]
    expected = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))
    found = global_norm(gradients)
    assert (found.dtype, found.shape) == (torch.float32, torch.Size())
    assert found.item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7])
def test_errors_that_all_round_the_same_way_do_not_add_up(value):
    gradient = torch.full((10**6,), value)
    assert global_norm([gradient]).item() == pytest.approx(gradient[0].item() * 1000, rel=1e-7)


def test_a_gradient_in_another_memory_order():
    gradient = torch.arange(200.0).view(10, 20).t()
    assert global_norm([gradient]).item() == pytest.approx(gradient.double().norm().item(), rel=1e-7)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_value_that_is_not_finite_shows(value):
    gradient = torch.ones(1000)
    gradient[137] = value
    assert not global_norm([torch.ones(100), gradient]).isfinite()


def test_clipping_gives_the_limit():
    gradients = [torch.full((10, 100), 2.0), torch.full((500,), -1.0)]
    clip(gradients, global_norm(gradients), 0.5)
    assert global_norm(gradients).item() == pytest.approx(0.5, rel=1e-6)
    clip(gradients, global_norm(gradients), 0.0)
    assert global_norm(gradients).item() == pytest.approx(0.5, rel=1e-6)
