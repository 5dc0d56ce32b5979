"""Peer: Hugging Face's Trainer with its DeepSpeed ZeRO-3 integration, as transformers' documentation sets it up."""

import argparse
import json
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.contestants import common
from benchmarks.contestants.plain_zero3 import zero3
from benchmarks.work import Work

_ZERO3 = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
}


class Sequences(Dataset):
    """All sequences of the run, in the order in which the Trainer deals them out.

    The Trainer gives `micro_size` sequences to each rank in turn. The sequences of a step are therefore ordered by
    microbatch, and those of a microbatch by replica.
    """

    def __init__(self, work: Work, *, steps: int, replicas: int):
        self._work, self._steps, self._replicas = work, steps, replicas
        self._kept: tuple[int, list[Any]] = (-1, [])

    def __len__(self) -> int:
        return self._steps * self._replicas * self._work.microbatches * self._work.micro_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rest, sequence = divmod(index, self._work.micro_size)
        rest, replica = divmod(rest, self._replicas)
        step, microbatch = divmod(rest, self._work.microbatches)
        if self._kept[0] != step:
            replicas = range(self._replicas)
            batches = [common.replica_batch(self._work, step, replica=r, replicas=self._replicas) for r in replicas]
            self._kept = (step, batches)
        batch = self._kept[1][replica]
        labels = torch.from_numpy(batch.labels[microbatch, sequence])
        # The labels are already shifted. The Trainer counts the targets in `shift_labels`, and asks for a loss
        # only if there are `labels`.
        return {
            "input_ids": torch.from_numpy(batch.input_ids[microbatch, sequence]),
            "labels": labels,
            "shift_labels": labels,
        }


class Timing(TrainerCallback):
    """Times the same interval as for other contestants: the Trainer fetches the batches before a step begins."""

    def __init__(self, clock: common.Clock):
        self._clock = clock

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._clock.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._clock.end()


class LossKeeper(Trainer):
    """A Trainer that keeps the losses of a step's microbatches."""

    def __init__(self, **given: Any):
        super().__init__(**given)
        self.losses: list[torch.Tensor] = []

    def training_step(self, *given: Any, **named: Any) -> torch.Tensor:
        loss = super().training_step(*given, **named)
        self.losses = [*self.losses[-self.args.gradient_accumulation_steps + 1 :], loss]
        return loss


def main() -> None:
    """Entry of a rank."""
    arguments = common.parser()
    arguments.add_argument("--compile", action="store_true", help="the model through torch.compile")
    # The Trainer derives `auto` sizes from the hidden size, which gives many small buckets for a small model.
    arguments.add_argument("--tuned", action="store_true", help="the ZeRO-3 settings of the plain loop")
    arguments.add_argument("--show-config", action="store_true", help="print the resulting DeepSpeed config")
    # Accelerate uses an existing process group and would otherwise start one through DeepSpeed, which would compile an
    # operator. Accelerate chooses the backend itself; it must be the backend of the existing group.
    args = common.start(arguments)
    world_size, work = dist.get_world_size(), args.work
    clock = common.Clock(args)
    # The model is built before TrainingArguments: these announce ZeRO-3 to transformers, which would then shard the
    # model while building it and draw other first weights.
    model = common.whole_model(work)
    # The Trainer needs an output folder but saves nothing.
    with tempfile.TemporaryDirectory() as folder:
        trainer = LossKeeper(
            model=model,
            args=_training_arguments(args, folder),
            train_dataset=Sequences(work, steps=args.warmup + args.steps, replicas=world_size),
            callbacks=[Timing(clock)],
        )
        trainer.train()
    if args.show_config and dist.get_rank() == 0:
        print(json.dumps(trainer.accelerator.state.deepspeed_plugin.deepspeed_config, indent=2, default=str))
    # Each loss is the microbatch's part of the replica's mean over all targets, so the sum is that mean.
    clock.report(float(torch.stack(trainer.losses).sum()), replicas=world_size, split=[0])
    common.leave()


def _training_arguments(args: argparse.Namespace, folder: str) -> TrainingArguments:
    work = args.work
    return TrainingArguments(
        output_dir=folder,
        deepspeed=_deepspeed(work, tuned=args.tuned),
        use_cpu=not torch.cuda.is_available(),
        bf16=work.dtype == "bf16",
        per_device_train_batch_size=work.micro_size,
        gradient_accumulation_steps=work.microbatches,
        max_steps=args.warmup + args.steps,
        learning_rate=common.ADAMW["lr"],
        adam_beta1=common.ADAMW["betas"][0],
        adam_beta2=common.ADAMW["betas"][1],
        adam_epsilon=common.ADAMW["eps"],
        weight_decay=common.ADAMW["weight_decay"],
        max_grad_norm=common.GRAD_CLIP,
        lr_scheduler_type="constant",
        warmup_steps=0,
        train_sampling_strategy="sequential",
        # The Trainer would remove `shift_labels`, since the model's forward takes it only through **kwargs. The model
        # would then shift the labels a second time.
        remove_unused_columns=False,
        gradient_checkpointing=work.checkpoint == "full",
        torch_compile=args.compile,
        # Progress bar, logging and saving would add time to the steps.
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        # From pinned memory a batch is copied to the GPU while the GPU works on the batch before.
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _deepspeed(work: Work, *, tuned: bool) -> dict[str, Any]:
    """The ZeRO-3 example of transformers' documentation; the Trainer fills in the `auto` values. The optimizer is
    torch's fused AdamW, as in ours, because DeepSpeed's AdamW would compile an operator."""
    return {
        "bf16": {"enabled": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": "auto",
                "betas": "auto",
                "eps": "auto",
                "weight_decay": "auto",
                "torch_adam": True,
                "fused": True,
            },
        },
        "zero_optimization": zero3(work, persistence=100_000) if tuned else _ZERO3,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }


if __name__ == "__main__":
    main()
