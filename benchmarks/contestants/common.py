"""Shared by all contestants: model, first weights, batches, optimizer, process group and clock."""

import argparse
import json
import os
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

from benchmarks.work import Work, make_work
from stack.config.schema import Config
from stack.data.batches import Batch
from stack.models.build import build_stages
from stack.parallel import zero
from stack.parallel.mesh import local_device
from stack.plan.layout import make_plan

GRAD_CLIP = 1.0
#: A weight decay of 0 makes one group of parameters, as in DeepSpeed's examples, equal to our two groups.
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0}
TIMEOUT = timedelta(seconds=300)
#: First word of the line in which rank 0 hands the harness its result.
RESULT = "RESULT"


def parser() -> argparse.ArgumentParser:
    """The arguments every contestant takes."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--work", default="small", help="name of the work, see benchmarks/work.py")
    arguments.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="overrides of the work")
    arguments.add_argument("--steps", type=int, default=12, help="measured optimizer steps")
    arguments.add_argument("--warmup", type=int, default=3, help="optimizer steps before the measured ones")
    return arguments


def start(arguments: argparse.ArgumentParser) -> argparse.Namespace:
    """Joins the process group and sets the number of threads, one on a CPU. No contestant compiles DeepSpeed's
    shared-memory operator, since only DeepSpeed's all-reduce for inference would use it.

    Returns:
        The command line. Its `work` is the Work, and `rss_before_mib` is the resident memory before the model is built.
    """
    args = arguments.parse_args()
    args.work = make_work(args.work, args.set)
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    zero.init_distributed(timeout=TIMEOUT)
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    args.rss_before_mib = resident_pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return args


def config(work: Work, replicas: int, **parallel: Any) -> Config:
    """Our config for the work; `parallel` has fields of the section of that name."""
    cfg = Config()
    cfg.model.config = work.llama
    # The batches need no tokenizer. With `bpe` the planner would compare data.vocab_size with the model's vocabulary.
    cfg.data.seq_len, cfg.data.tokenizer = work.seq_len, "synthetic"
    cfg.batch.micro_size, cfg.batch.global_size = work.micro_size, work.micro_size * work.microbatches * replicas
    cfg.precision.dtype, cfg.activation.checkpoint = work.dtype, work.checkpoint
    cfg.optim.lr, cfg.optim.betas, cfg.optim.eps = ADAMW["lr"], ADAMW["betas"], ADAMW["eps"]
    cfg.optim.weight_decay, cfg.optim.grad_clip = ADAMW["weight_decay"], GRAD_CLIP
    for name, value in parallel.items():
        setattr(cfg.parallel, name, value)
    return cfg


def whole_model(work: Work) -> LlamaForCausalLM:
    """The Hugging Face model on this rank's device, in the dtype of the work, with the weights that every layout of
    ours starts from."""
    cfg = config(work, replicas=1, pipeline=1, zero=0)
    # `stack` may replace the forward of the head by its chunked loss; the peers need the model class's own forward.
    cfg.kernels.loss = "logits"
    [stage] = build_stages(cfg, make_plan(cfg, 1), 0, device=local_device())
    return stage.model


def peer_config(work: Work, zero_optimization: dict[str, Any]) -> dict[str, Any]:
    """A DeepSpeed config as in DeepSpeed's documentation, but with torch's fused AdamW, which ours has too."""
    return {
        "train_micro_batch_size_per_gpu": work.micro_size,
        "gradient_accumulation_steps": work.microbatches,
        "gradient_clipping": GRAD_CLIP,
        "bf16": {"enabled": work.dtype == "bf16"},
        "optimizer": {"type": "AdamW", "params": {**ADAMW, "torch_adam": True, "fused": True}},
        "zero_optimization": zero_optimization,
    }


def bucket(work: Work) -> int:
    """Elements of a DeepSpeed bucket: DeepSpeed's default, or the whole model if that is smaller."""
    return int(min(5e8, max(1e7, work.arithmetic.total_params)))


def replica_batch(work: Work, step: int, *, replica: int, replicas: int) -> Batch:
    """A replica's part of the global batch of a step: a pure function of the step.

    Small ids are far more frequent than large ones, so the loss falls from the first step on and shows wrong updates.
    """
    shape = (replicas, work.microbatches, work.micro_size, work.seq_len + 1)
    uniform = np.random.default_rng([11, step]).random((int(np.prod(shape[:3])), shape[3]))
    tokens = (uniform**3 * work.vocab_size).astype(np.int64)
    mine = tokens.reshape(shape)[replica]
    return Batch(
        input_ids=np.ascontiguousarray(mine[..., :-1]),
        labels=np.ascontiguousarray(mine[..., 1:]),
        positions=np.broadcast_to(np.arange(work.seq_len), mine[..., 1:].shape).copy(),
        global_target_tokens=work.tokens(replicas),
    )


def on_device(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels on the device, both int64 [microbatches, micro_size, seq_len]."""
    device = local_device()
    return torch.from_numpy(batch.input_ids).to(device), torch.from_numpy(batch.labels).to(device)


class Clock:
    """Wall and CPU seconds of each step of this rank."""

    def __init__(self, args: argparse.Namespace):
        self._args = args
        self._seconds: list[float] = []
        self._cpu_seconds: list[float] = []

    def begin(self) -> None:
        """Starts the clock of a step whose batch is ready."""
        _synchronize()
        self._began = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """Records the time since `begin`."""
        _synchronize()
        self._seconds.append(time.perf_counter() - self._began[0])
        self._cpu_seconds.append(time.process_time() - self._began[1])

    def lap(self) -> None:
        """Records the time since the last result was read. For steps that overlap: the next step may already run."""
        wall, cpu = time.perf_counter(), time.process_time()
        self._seconds.append(wall - self._began[0])
        self._cpu_seconds.append(cpu - self._began[1])
        self._began = wall, cpu

    def report(self, loss: float, *, replicas: int, split: list[int]) -> None:
        """Prints the result on rank 0. Collective.

        Args:
            loss: of the last step; its mean over the ranks is the mean token loss of the global batch.
            split: first decoder layer of each stage.
        """
        args, ranks = self._args, dist.get_world_size()
        cpu_s = statistics.mean(self._cpu_seconds[args.warmup :])
        gathered: list[Any] = [None] * ranks
        dist.all_gather_object(gathered, (loss, cpu_s, _peak_mib(), args.rss_before_mib))
        losses, cpu_seconds, peaks, before = zip(*gathered, strict=True)
        median = statistics.median(self._seconds[args.warmup :])
        result = {
            "tokens_per_s": args.work.tokens(replicas) / median,
            "step_s": median,
            # Sum over the ranks. Other processes on the machine change CPU time little.
            "cpu_s_per_step": sum(cpu_seconds),
            "peak_mib": [round(peak) for peak in peaks],
            "rss_before_mib": [round(mib) for mib in before],
            "loss": sum(losses) / ranks,
            "split": split,
        }
        if dist.get_rank() == 0:
            print(RESULT, json.dumps(result), flush=True)


def measure(
    train_step: Callable[[Batch], float | torch.Tensor],
    args: argparse.Namespace,
    *,
    replica: int,
    replicas: int,
    split: list[int],
) -> None:
    """Runs the steps, prints the result on rank 0 and ends the groups. Collective.

    Args:
        train_step: one optimizer step; the mean over the ranks of what it returns is the loss of the global batch.
        split: first decoder layer of each stage.
    """
    clock = Clock(args)
    loss: float | torch.Tensor = 0.0
    for step in range(args.warmup + args.steps):
        batch = replica_batch(args.work, step, replica=replica, replicas=replicas)
        clock.begin()
        loss = train_step(batch)
        clock.end()
    clock.report(float(loss), replicas=replicas, split=split)
    leave()


def leave() -> NoReturn:
    """Ends the groups and the process. Skips the interpreter's shutdown, as `stack.train` does. Collective."""
    zero.close()
    sys.stdout.flush()
    os._exit(0)


def _peak_mib() -> float:
    """Peak memory of this rank: of tensors on the GPU, or resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
