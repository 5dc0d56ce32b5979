"""Peer: the plain DeepSpeed ZeRO-3 training loop of a Hugging Face model, as DeepSpeed's documentation shows it."""

from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from benchmarks.contestants import common
from benchmarks.work import Work
from stack.data.batches import Batch


def main() -> None:
    """Entry of a rank."""
    arguments = common.parser()
    arguments.add_argument("--persistence", type=int, default=100_000, help="smaller parameters are not sharded")
    arguments.add_argument("--compile", action="store_true", help="the engine through torch.compile")
    args = common.start(arguments)
    model = common.whole_model(args.work)
    if args.work.checkpoint == "full":
        model.activation_checkpointing_enable({"use_reentrant": False})
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config=common.peer_config(args.work, zero3(args.work, persistence=args.persistence)),
    )
    if args.compile:
        engine.compile()

    def train_step(batch: Batch) -> torch.Tensor:
        losses = []
        for input_ids, labels in zip(*common.on_device(batch), strict=True):
            loss = engine(input_ids=input_ids, labels=labels, shift_labels=labels).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    common.measure(train_step, args, replica=dist.get_rank(), replicas=dist.get_world_size(), split=[0])


def zero3(work: Work, *, persistence: int) -> dict[str, Any]:
    """The example of DeepSpeed's ZeRO tutorial, with buckets large enough for a whole small model."""
    return {
        "stage": 3,
        "contiguous_gradients": True,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_prefetch_bucket_size": 1e7,
        "stage3_param_persistence_threshold": persistence,
        "reduce_bucket_size": common.bucket(work),
        "sub_group_size": 1e9,
    }


if __name__ == "__main__":
    main()
