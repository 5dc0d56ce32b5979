"""Sends small values between ranks, as JSON in tensors of bytes.

The object collectives of torch.distributed unpickle the bytes that arrive, and a pickle can run code. A process that
reaches the ports of a run could then run code in a rank. Parsing JSON runs no code.
"""

import json
from typing import Any

import torch
import torch.distributed as dist


def gather(own: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The values of all ranks of a group, in the order of ranks. Collective.

    Args:
        own: this rank's value, which JSON must be able to represent; tuples arrive as lists, and keys of dicts as text.
        group: the default group if None.
    """
    data = _packed(own, group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=data.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([len(data)], device=data.device), group=group)
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=data.device)
    padded[: len(data)] = data
    everyone = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(everyone, padded, group=group)
    return [_unpacked(bytes_[: int(size)]) for bytes_, size in zip(everyone, sizes, strict=True)]


def broadcast(own: Any, group: dist.ProcessGroup | None = None) -> Any:
    """The value of global rank 0, which must be in the group. Collective.

    Args:
        own: as in `gather`; ignored on other ranks than 0.
        group: the default group if None.
    """
    data = _packed(own, group)
    size = torch.tensor([len(data)], device=data.device)
    dist.broadcast(size, src=0, group=group)
    if dist.get_rank() > 0:
        data = torch.empty(int(size), dtype=torch.uint8, device=data.device)
    dist.broadcast(data, src=0, group=group)
    return _unpacked(data)


def _packed(value: Any, group: dist.ProcessGroup | None) -> torch.Tensor:
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)


def _unpacked(data: torch.Tensor) -> Any:
    return json.loads(data.cpu().numpy().tobytes())
