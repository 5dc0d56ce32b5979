"""The global norm of gradients, and clipping by it."""

import torch
import torch.distributed as dist

#: On a CPU, the squares of this many elements are summed in fp32. Each lane of a vector unit adds 4 or 8 of them.
_ROW = 64
#: On a CPU, row norms of this many elements are in memory at once.
_CHUNK = 1 << 22


def global_norm(
    gradients: list[torch.Tensor], *groups: dist.ProcessGroup, device: torch.device | None = None
) -> torch.Tensor:
    """L2 norm (0-dimensional fp32) of the fp32 gradients of all ranks. Collective over `groups`, one after another.

    The squares are summed over this rank, then over each of `groups`. Sums over more than a few elements, and over
    ranks, are in fp64: torch's fp32 norm on a CPU adds one square after another, with an error of 1e-5 for 10^6
    elements, 4e-4 for 10^7 and 1e-2 for 10^8. No gradient is copied to fp64, and the host does not wait for the device.

    Args:
        gradients: this rank's gradients, of any shape.
        groups: the groups over which the squares are summed.
        device: the device on which the groups reduce; None for the device of the gradients.
    """
    squared = _sum_of_squares(gradients).to(device)
    for group in groups:
        dist.all_reduce(squared, group=group)
    return squared.sqrt().float()


def clip(gradients: list[torch.Tensor], norm: torch.Tensor, limit: float) -> None:
    """Scales gradients in place so that their global norm is at most `limit`; with `limit` 0 nothing is scaled.

    The factor is limit / (norm + 1e-6), at most 1, as in torch.nn.utils.clip_grad_norm_ and DeepSpeed.
    """
    if limit > 0:
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))


def _sum_of_squares(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Sum of all squares, 0-dimensional fp64, on the device of the gradients; 0 on the CPU where there are none."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    if gradients[0].device.type == "cpu":
        norms = [norm for gradient in gradients for norm in _norms(gradient.flatten())]
    else:
        # One kernel for all gradients, which converts each element to fp64 when it reads the element.
        norms = list(torch._foreach_norm(gradients, 2, torch.float64))
    return torch.stack(norms).square().sum()


def _norms(flat: torch.Tensor) -> list[torch.Tensor]:
    """Norms (0-dimensional fp64) of consecutive pieces of a one-dimensional fp32 tensor on a CPU."""
    whole = len(flat) // _ROW * _ROW
    norms = [
        torch.linalg.vector_norm(torch.linalg.vector_norm(chunk.view(-1, _ROW), dim=1), dtype=torch.float64)
        for chunk in flat[:whole].split(_CHUNK)
    ]
    return [*norms, torch.linalg.vector_norm(flat[whole:], dtype=torch.float64)]
