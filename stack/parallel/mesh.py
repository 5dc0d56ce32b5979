"""The process groups of the rank grid: one data group for each rank of the pipe, one pipe group for each replica."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from stack.plan.layout import Plan


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the grid, and its process groups."""

    rank: int
    pipe_rank: int
    """Place in the pipe group, from 0."""
    replica: int
    """Place in the data group, from 0."""
    pipeline: int
    """Ranks in a pipe group."""
    replicas: int
    """Ranks in a data group."""
    data_group: dist.ProcessGroup
    """The ranks with the same stages; ZeRO shards states over them."""
    pipe_group: dist.ProcessGroup
    """The ranks of the same replica, for collectives."""
    transfer_group: dist.ProcessGroup
    """The same ranks as in `pipe_group`; hidden states and their gradients are sent between them."""
    tied_group: dist.ProcessGroup | None
    """The two ranks of this replica that hold the copies of a tied embedding; None on other ranks."""
    host_group: dist.ProcessGroup
    """All ranks, for tensors in host memory (gloo)."""
    disk_group: dist.ProcessGroup
    """All ranks, to wait for each other's writes and reads of files (gloo, with a timeout of its own). A save in the
    background uses this group, so training must not."""
    device: torch.device

    @property
    def world_size(self) -> int:
        """Number of ranks of the run."""
        return self.pipeline * self.replicas

    @property
    def data_ranks(self) -> list[int]:
        """Global ranks of the members of this rank's data group."""
        return dist.get_process_group_ranks(self.data_group)

    def __str__(self) -> str:
        place = f"pipe rank {self.pipe_rank}, replica {self.replica}"
        return f"PP{self.pipeline} x DP{self.replicas} rank {self.rank} = {place}"


def make_mesh(plan: Plan, *, timeout: timedelta, disk_timeout: timedelta | None = None) -> Mesh:
    """Makes the process groups. Collective: every rank makes every group, in the same order, as torch requires.

    Args:
        plan: the layout.
        timeout: longest wait in one collective before it raises.
        disk_timeout: longest wait in a collective of `disk_group`; None for `timeout`.
    """
    rank = dist.get_rank()
    pipe_rank, replica = plan.pipe_rank_of(rank), plan.replica_of(rank)

    def groups(of: Iterable[list[int]]) -> list[dist.ProcessGroup]:
        return [dist.new_group(ranks, timeout=timeout) for ranks in of]

    pipes_of = [[plan.rank_of(p, r) for p in range(plan.pipeline)] for r in range(plan.replicas)]
    # Two groups, because NCCL runs the operations of a group one after the other: collectives would wait for transfers.
    pipes, transfers = groups(pipes_of), groups(pipes_of)
    data = groups([plan.rank_of(p, r) for r in range(plan.replicas)] for p in range(plan.pipeline))
    tied: dist.ProcessGroup | None = None
    if plan.tied_apart:
        holders = [plan.holder_of(0), plan.holder_of(plan.stages - 1)]
        pairs = groups([plan.rank_of(p, r) for p in holders] for r in range(plan.replicas))
        tied = pairs[replica] if pipe_rank in holders else None
    device = local_device()
    world = dist.group.WORLD
    assert world is not None
    return Mesh(
        rank=rank,
        pipe_rank=pipe_rank,
        replica=replica,
        pipeline=plan.pipeline,
        replicas=plan.replicas,
        data_group=data[pipe_rank],
        pipe_group=pipes[replica],
        transfer_group=transfers[replica],
        tied_group=tied,
        host_group=world if device.type == "cpu" else dist.new_group(backend="gloo", timeout=timeout),
        disk_group=dist.new_group(backend="gloo", timeout=disk_timeout or timeout),
        device=device,
    )


def local_device() -> torch.device:
    """The GPU of this rank's LOCAL_RANK, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


class Mpu:
    """The interface of a model-parallel unit, as DeepSpeed calls it. ZeRO shards over the data group, and the gradient
    norm is also summed over the pipe group, which is passed as the model-parallel group."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh

    def get_model_parallel_rank(self) -> int:
        return self._mesh.pipe_rank

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.pipeline

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.pipe_group

    def get_data_parallel_rank(self) -> int:
        return self._mesh.replica

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.replicas

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.data_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self._mesh.data_ranks

    def get_pipeline_model_parallel_world_size(self) -> int:
        # 1, so that DeepSpeed does not treat the run as one of its own pipelines.
        return 1
