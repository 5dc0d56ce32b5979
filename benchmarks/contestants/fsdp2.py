"""Peer: PyTorch's FSDP2, `fully_shard` on each decoder layer and on the root, as its tutorial and torchtitan do."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils import clip_grad_norm_

from benchmarks.contestants import common
from benchmarks.work import Work
from stack.data.batches import Batch
from stack.parallel.mesh import local_device


def main() -> None:
    """Entry of a rank."""
    arguments = common.parser()
    arguments.add_argument("--compile", action="store_true", help="each decoder layer through torch.compile")
    arguments.add_argument(
        "--reshard", choices=("always", "never"), default="always", help="free parameters after the forward of a layer"
    )
    args = common.start(arguments)
    world_size = dist.get_world_size()
    # FSDP2's parameters are the fp32 masters; the policy casts them when they are gathered.
    model = common.whole_model(args.work).float()
    if args.work.checkpoint == "full":
        model.activation_checkpointing_enable({"use_reentrant": False})
    if args.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    shard(
        model,
        model.model.layers,
        args.work,
        mesh=init_device_mesh(local_device().type, (world_size,)),
        reshard=args.reshard == "always",
    )
    optimizer = adamw(model.parameters())

    def train_step(batch: Batch) -> torch.Tensor:
        losses = []
        last = args.work.microbatches - 1
        for index, (input_ids, labels) in enumerate(zip(*common.on_device(batch), strict=True)):
            # Gradients are summed without communication and reduced in the last backward of the step.
            model.set_requires_gradient_sync(index == last)
            model.set_is_last_backward(index == last)
            loss = model(input_ids=input_ids, labels=labels, shift_labels=labels).loss
            (loss / args.work.microbatches).backward()
            losses.append(loss.detach())
        clip_grad_norm_(model.parameters(), common.GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).mean()

    common.measure(train_step, args, replica=dist.get_rank(), replicas=world_size, split=[0])


def shard(root: torch.nn.Module, layers: torch.nn.ModuleList, work: Work, *, mesh: DeviceMesh, reshard: bool) -> None:
    """Shards each layer, then the other parameters of the root, over `mesh`. Computes in the dtype of the work."""
    policy = MixedPrecisionPolicy()
    if work.dtype == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    # The backward begins with the parameters of the root, so freeing them after the forward would gather them twice.
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def adamw(parameters: Iterable[torch.Tensor]) -> torch.optim.AdamW:
    """AdamW with the settings that all contestants share."""
    given = common.ADAMW
    return torch.optim.AdamW(
        parameters,
        lr=given["lr"],
        betas=tuple(given["betas"]),
        eps=given["eps"],
        weight_decay=given["weight_decay"],
        fused=True,
    )


if __name__ == "__main__":
    main()
