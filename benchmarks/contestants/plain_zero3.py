"""Peer: the plain DeepSpeed ZeRO-3 training loop of a Hugging Face model, as DeepSpeed's documentation shows it."""

import deepspeed
import torch
import torch.distributed as dist

from benchmarks.contestants import common
from stack.data.batches import Batch


def main() -> None:
    """Entry of a rank."""
    arguments = common.parser()
    arguments.add_argument("--persistence", type=int, default=100_000, help="smaller parameters are not sharded")
    args = arguments.parse_args()
    common.start()
    model = common.whole_model()
    if args.checkpoint == "full":
        model.activation_checkpointing_enable({"use_reentrant": False})
    # The example of DeepSpeed's ZeRO tutorial; its buckets hold this whole model.
    zero_optimization = {
        "stage": 3,
        "contiguous_gradients": True,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_prefetch_bucket_size": 1e7,
        "stage3_param_persistence_threshold": args.persistence,
        "reduce_bucket_size": 1e7,
        "sub_group_size": 1e9,
    }
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=common.peer_config(zero_optimization)
    )

    def train_step(batch: Batch) -> torch.Tensor:
        losses = []
        for input_ids, labels in zip(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels), strict=True):
            loss = engine(input_ids=input_ids, labels=labels, shift_labels=labels).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    common.measure(train_step, args, replica=dist.get_rank(), replicas=dist.get_world_size(), split=[0])


if __name__ == "__main__":
    main()
