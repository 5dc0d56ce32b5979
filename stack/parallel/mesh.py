"""The rank grid as process groups: one data group a stage, one pipe group a replica."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from stack.plan.layout import Plan


@dataclass(frozen=True)
class Mesh:
    """This rank's place. `data_group` shards ZeRO states; `pipe_group` passes hidden states."""

    rank: int
    stage: int
    replica: int
    stages: int
    replicas: int
    data_group: dist.ProcessGroup
    pipe_group: dist.ProcessGroup
    device: torch.device

    @property
    def data_ranks(self) -> list[int]:
        """Global ranks of this stage's data group."""
        return [self.stage * self.replicas + replica for replica in range(self.replicas)]

    def __str__(self) -> str:
        return f"PP{self.stages} x DP{self.replicas} rank {self.rank} = stage {self.stage}, replica {self.replica}"


def make_mesh(plan: Plan, *, timeout: timedelta) -> Mesh:
    """Makes the groups. Collective: every rank makes every group, in the same order.

    Args:
        timeout: longest wait in one collective before it raises.
    """
    rank = dist.get_rank()
    stage, replica = plan.stage_of(rank), plan.replica_of(rank)
    pipes = [
        dist.new_group([plan.rank_of(s, r) for s in range(plan.stages)], timeout=timeout) for r in range(plan.replicas)
    ]
    data = [
        dist.new_group([plan.rank_of(s, r) for r in range(plan.replicas)], timeout=timeout) for s in range(plan.stages)
    ]
    return Mesh(rank, stage, replica, plan.stages, plan.replicas, data[stage], pipes[replica], local_device())


def local_device() -> torch.device:
    """The GPU of this rank's LOCAL_RANK, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


class Mpu:
    """What DeepSpeed asks of a model-parallel unit: ZeRO shards over the data group; the gradient norm is summed
    over the pipe group too."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh

    def get_model_parallel_rank(self) -> int:
        return self._mesh.stage

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.stages

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
        # DeepSpeed must not take the pipe for one of its own.
        return 1
