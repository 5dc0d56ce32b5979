"""Copies of the states in host memory, which a save in the background writes while training goes on."""

from collections.abc import Mapping

import torch

from stack.checkpoint.storage import Slice


class Staging:
    """Host buffers, one for each optimizer group, that are allocated by the first save and reused by later ones."""

    def __init__(self) -> None:
        self._buffers: dict[int, torch.Tensor] = {}

    def copy(self, group: int, slices: Mapping[str, Slice]) -> None:
        """Replaces the tensors of a group's slices by copies in the group's buffer. From a GPU the copies are not done
        when this returns; synchronize the device before they are read.

        Args:
            group: number of the optimizer group, whose slices have the same sizes in every save.
            slices: fp32 [length] each.
        """
        sizes = [part.tensor.numel() for part in slices.values()]
        if group not in self._buffers:
            on_gpu = any(part.tensor.is_cuda for part in slices.values())
            self._buffers[group] = _pinned(sum(sizes)) if on_gpu else torch.empty(sum(sizes))
        for part, copy in zip(slices.values(), self._buffers[group].split(sizes), strict=True):
            part.tensor = copy.copy_(part.tensor, non_blocking=True)


def _pinned(numel: int) -> torch.Tensor:
    """fp32 [numel] in page-locked host memory, which a GPU copies to without making the host wait.

    torch's own allocator of such memory rounds each request up to a power of two: up to twice the memory of all states.
    """
    buffer = torch.empty(numel)
    if numel:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
    return buffer
