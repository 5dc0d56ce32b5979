"""The gradient norm on a device equals the norm in fp64, and no gradient is copied to fp64."""

import math

import pytest
import torch

from stack.parallel.norm import global_norm
from tests.gpu.conftest import DEVICE


def test_many_elements():
    gradients = [torch.full(shape, value, device=DEVICE) for shape, value in (((10**7,), 0.1), ((300, 70), -0.7))]
    expected = math.sqrt(sum(gradient.numel() * gradient.flatten()[0].item() ** 2 for gradient in gradients))
    assert global_norm(gradients).item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.cuda_only
def test_no_copy_is_made():
    gradient = torch.ones(10**7, device=DEVICE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    global_norm([gradient])
    assert torch.cuda.max_memory_allocated() - before < 10**6
