"""Small values between ranks, as JSON in tensors of bytes.

The object collectives of torch.distributed unpickle what arrives, and a pickle can run code: whoever reaches the ports
of a run could hand a rank such a pickle. JSON can only be wrong.
"""

import json
from typing import Any

import torch
import torch.distributed as dist


def gather(own: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """What every rank of a group has to say, by rank. Collective.

    Args:
        own: a value of JSON; tuples arrive as lists, and the keys of objects as text.
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
    """What global rank 0, which must be in the group, has to say. Collective.

    Args:
        own: as in `gather`; that of the other ranks does not count.
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
