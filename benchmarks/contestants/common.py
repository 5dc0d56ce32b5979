"""What every contestant shares: model, first weights, batches, optimizer, process group, clock."""

import argparse
import json
import os
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

from stack.config.schema import Config
from stack.data.batches import Batch
from stack.models.build import build_stages
from stack.parallel import zero
from stack.plan.layout import make_plan

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
SEQ_LEN = 256
MICRO_SIZE = 2
MICROBATCHES = 8
GRAD_CLIP = 1.0
#: One group of parameters, as in DeepSpeed's examples; a weight decay of 0 makes that equal to our two groups.
ADAMW = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0}
TIMEOUT = timedelta(seconds=300)
#: First word of the line in which rank 0 hands the harness its result.
RESULT = "RESULT"


def parser() -> argparse.ArgumentParser:
    """The arguments every contestant takes."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--steps", type=int, default=12, help="measured optimizer steps")
    arguments.add_argument("--warmup", type=int, default=3, help="steps before them, discarded")
    arguments.add_argument("--checkpoint", choices=("none", "full"), default="none", help="of activations")
    return arguments


def start() -> None:
    """Joins the process group with one thread. Peers too do without the shared-memory op that DeepSpeed compiles:
    only its all-reduce for inference would use it."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    zero.init_distributed(timeout=TIMEOUT)


def config(replicas: int, **parallel: Any) -> Config:
    """The run in our own terms; `parallel` are fields of that section."""
    cfg = Config()
    cfg.model.config = dict(SHAPE)
    cfg.data.seq_len, cfg.data.vocab_size = SEQ_LEN, SHAPE["vocab_size"]
    cfg.batch.micro_size, cfg.batch.global_size = MICRO_SIZE, MICRO_SIZE * MICROBATCHES * replicas
    cfg.precision.dtype = "fp32"
    cfg.optim.lr, cfg.optim.betas, cfg.optim.eps = ADAMW["lr"], ADAMW["betas"], ADAMW["eps"]
    cfg.optim.weight_decay, cfg.optim.grad_clip = ADAMW["weight_decay"], GRAD_CLIP
    for name, value in parallel.items():
        setattr(cfg.parallel, name, value)
    return cfg


def whole_model() -> LlamaForCausalLM:
    """The Hugging Face model with the weights that every layout of ours starts from."""
    cfg = config(replicas=1, pipeline=1, zero=0)
    [stage] = build_stages(cfg, make_plan(cfg, 1), 0, device=torch.device("cpu"))
    return stage.model


def peer_config(zero_optimization: dict[str, Any]) -> dict[str, Any]:
    """A DeepSpeed config as its documentation writes it, with torch's fused AdamW as ours has it."""
    return {
        "train_micro_batch_size_per_gpu": MICRO_SIZE,
        "gradient_accumulation_steps": MICROBATCHES,
        "gradient_clipping": GRAD_CLIP,
        "optimizer": {"type": "AdamW", "params": {**ADAMW, "torch_adam": True, "fused": True}},
        "zero_optimization": zero_optimization,
    }


def replica_batch(step: int, *, replica: int, replicas: int) -> Batch:
    """A replica's part of the global batch of a step: a pure function of the step.

    Small ids are far more frequent, so that the loss falls from the first step on and wrong updates show in it.
    """
    uniform = np.random.default_rng([11, step]).random((replicas * MICROBATCHES * MICRO_SIZE, SEQ_LEN + 1))
    tokens = (uniform**3 * SHAPE["vocab_size"]).astype(np.int64)
    mine = tokens.reshape(replicas, MICROBATCHES, MICRO_SIZE, SEQ_LEN + 1)[replica]
    return Batch(
        input_ids=np.ascontiguousarray(mine[..., :-1]),
        labels=np.ascontiguousarray(mine[..., 1:]),
        positions=np.broadcast_to(np.arange(SEQ_LEN), mine[..., 1:].shape).copy(),
        global_target_tokens=replicas * MICROBATCHES * MICRO_SIZE * SEQ_LEN,
    )


def measure(
    train_step: Callable[[Batch], float | torch.Tensor],
    args: argparse.Namespace,
    *,
    replica: int,
    replicas: int,
    split: list[int],
) -> None:
    """Runs the steps, and prints the result on rank 0. Collective.

    Args:
        train_step: one optimizer step; returns the mean loss of the global batch, or of the replica's part of it.
        split: first decoder layer of each stage.
    """
    seconds: list[float] = []
    loss: float | torch.Tensor = 0.0
    for step in range(args.warmup + args.steps):
        if step == args.warmup:
            cpu_began = time.process_time()
        batch = replica_batch(step, replica=replica, replicas=replicas)
        began = time.perf_counter()
        loss = train_step(batch)
        seconds.append(time.perf_counter() - began)
    cpu_s = (time.process_time() - cpu_began) / args.steps
    sums = torch.tensor([float(loss), cpu_s], dtype=torch.float64)
    dist.all_reduce(sums)
    median = statistics.median(seconds[args.warmup :])
    peaks = torch.zeros(dist.get_world_size(), dtype=torch.float64)
    peaks[dist.get_rank()] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    dist.all_reduce(peaks)
    result = {
        "tokens_per_s": batch.global_target_tokens / median,
        "step_s": median,
        # Of all ranks together; other processes on the machine change it little.
        "cpu_s_per_step": sums[1].item(),
        "peak_rss_mib": [round(peak) for peak in peaks.tolist()],
        "loss": sums[0].item() / dist.get_world_size(),
        "split": split,
    }
    if dist.get_rank() == 0:
        print(RESULT, json.dumps(result), flush=True)
    zero.close()
