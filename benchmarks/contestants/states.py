"""Bytes of model states on each rank, counted at their peak: after gradients are reduced and before the update."""

import gc
import json

import torch
import torch.distributed as dist

from benchmarks.contestants import common
from benchmarks.work import Work
from stack.config import deepspeed as ds
from stack.parallel import zero
from stack.parallel.engine import Engine
from stack.parallel.mesh import make_mesh
from stack.plan.layout import make_plan

PIPELINE = 2
#: Elements that are reduced together. Their buffer has the same size for any model; a small bucket keeps it out of the
#: count.
BUCKET = 1000


def main() -> None:
    """Entry of a rank: ZeRO 0 to 3 under their least-memory policies, in bf16 with fp32 masters and sums."""
    args = common.start(common.parser())
    ds._BUCKET_ELEMENTS = BUCKET
    found = {zero_stage: _count(args.work, zero_stage) for zero_stage in range(4)}
    if dist.get_rank() == 0:
        print(common.RESULT, json.dumps({"state_bytes": found}), flush=True)
    zero.close()


def _count(work: Work, zero_stage: int) -> list[int]:
    """Bytes of model states on each rank with this ZeRO stage."""
    before = _storages()
    policy = {"reduce": "microbatch"} if zero_stage > 1 else {}
    if zero_stage == 3:
        policy["gather"] = "microbatch"
    replicas = dist.get_world_size() // PIPELINE
    cfg = common.config(work, replicas, pipeline=PIPELINE, zero=zero_stage, **policy)
    cfg.precision.dtype = "bf16"
    plan = make_plan(cfg, dist.get_world_size())
    mesh = make_mesh(plan, timeout=common.TIMEOUT)
    engine = Engine(cfg, plan, mesh)
    counted: list[int] = []
    update = engine.rank_engine.step

    def count_then_step(lr: float) -> torch.Tensor:
        counted.append(sum(size for address, size in _storages().items() if address not in before))
        return update(lr)

    engine.rank_engine.step = count_then_step
    for step in range(2):
        batch = common.replica_batch(work, step, replica=mesh.replica, replicas=mesh.replicas)
        engine.train_batch(batch, lr=1e-3)
    everyone = [0] * dist.get_world_size()
    dist.all_gather_object(everyone, counted[-1])
    return everyone


def _storages() -> dict[int, int]:
    """Address and bytes of each storage of a live tensor. Hidden states between stages are included, a hundredth of the
    bytes."""
    gc.collect()
    storages = [t.untyped_storage() for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.device.type == "cpu"]
    return {s.data_ptr(): s.nbytes() for s in storages}


if __name__ == "__main__":
    main()
