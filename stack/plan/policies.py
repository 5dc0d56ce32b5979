"""Checks which schedules, ZeRO stages and policies can be combined. An error says why not, and what works."""

import glob
import os
from dataclasses import dataclass

from stack.config.kernels import liger_parts
from stack.config.schema import Config, Parallel
from stack.errors import LayoutError
from stack.plan.shape import divisors

_DEVICE_FILES = "/dev/nvidia[0-9]*"


@dataclass(frozen=True)
class ScheduleRules:
    """Properties of a pipeline schedule that restrict the layout."""

    virtual: bool = False
    """Each rank holds several stages."""
    folded: bool = False
    """The second half of the stages runs through the ranks in reverse order, so that one rank holds the first and the
    last stage."""
    splits_backward: bool = False
    """The gradients of the inputs and those of the weights are computed at different times."""


SCHEDULES = {
    "1f1b": ScheduleRules(),
    "gpipe": ScheduleRules(),
    "interleaved_1f1b": ScheduleRules(virtual=True),
    "interleaved_zero_bubble": ScheduleRules(virtual=True, splits_backward=True),
    "zbv": ScheduleRules(virtual=True, folded=True, splits_backward=True),
}


def check_policies(cfg: Config, replicas: int, *, tied: bool) -> None:
    """Checks that schedule, ZeRO stage, policies and offload can be combined.

    Args:
        cfg: config of the run.
        replicas: ranks in a data-parallel group.
        tied: whether the token embedding and the head share one parameter.

    Raises:
        LayoutError: they cannot.
    """
    _check_schedule(cfg)
    _check_reduce(cfg.parallel)
    _check_offload(cfg.parallel, tied=tied)
    _check_zero_plus_plus(cfg.parallel, replicas)


def _check_schedule(cfg: Config) -> None:
    parallel = cfg.parallel
    rules, virtual = SCHEDULES[parallel.schedule], parallel.virtual_stages
    if rules.virtual and virtual == 1:
        raise LayoutError(
            f"parallel.schedule={parallel.schedule} needs several stages on each rank, and "
            "parallel.virtual_stages=1; use parallel.virtual_stages=2"
        )
    if not rules.virtual and virtual > 1:
        raise LayoutError(
            f"parallel.virtual_stages={virtual} with parallel.schedule={parallel.schedule}, which runs one stage on "
            "each rank; use parallel.schedule=interleaved_1f1b or parallel.virtual_stages=1"
        )
    if rules.folded and virtual != 2:
        raise LayoutError(
            f"parallel.virtual_stages={virtual} with parallel.schedule={parallel.schedule}, which folds the "
            "pipeline once; use parallel.virtual_stages=2"
        )
    if not rules.splits_backward:
        return
    if parallel.zero > 1:
        raise LayoutError(
            f"parallel.schedule={parallel.schedule} with parallel.zero={parallel.zero}: it computes weight gradients "
            "separately from the backward, and ZeRO-2 and 3 reduce those of the backward only; use parallel.zero=1 or "
            "parallel.schedule=interleaved_1f1b"
        )
    if cfg.precision.dtype == "fp16":
        raise LayoutError(
            f"parallel.schedule={parallel.schedule} with precision.dtype=fp16: its weight gradients are not scaled; "
            "use precision.dtype=bf16 or parallel.schedule=interleaved_1f1b"
        )
    if cfg.precision.compile:
        raise LayoutError(
            f"parallel.schedule={parallel.schedule} with precision.compile=true: the backward of a "
            "compiled layer cannot be split into two parts; use precision.compile=false or "
            "parallel.schedule=interleaved_1f1b"
        )
    if liger := liger_parts(cfg):
        raise LayoutError(
            f"parallel.schedule={parallel.schedule} with kernels.{liger[0]}=liger: its kernels overwrite "
            "gradients that the second part of a backward reads again; use "
            f"kernels.{liger[0]}={'chunked' if liger[0] == 'loss' else 'torch'} or parallel.schedule=interleaved_1f1b"
        )
    if cfg.activation.checkpoint != "none":
        raise LayoutError(
            f"parallel.schedule={parallel.schedule} with activation.checkpoint={cfg.activation.checkpoint}: a "
            "backward in two parts would recompute each layer twice; use activation.checkpoint=none or "
            "parallel.schedule=interleaved_1f1b"
        )


def _check_reduce(parallel: Parallel) -> None:
    if parallel.reduce == "step":
        return
    if parallel.zero < 2:
        raise LayoutError(
            f"parallel.reduce=microbatch with parallel.zero={parallel.zero}: whole gradients are kept until the step, "
            "so reducing each of them costs traffic and saves nothing; use parallel.reduce=step or parallel.zero=2"
        )
    if parallel.virtual_stages > 1:
        raise LayoutError(
            f"parallel.reduce=microbatch with parallel.virtual_stages={parallel.virtual_stages}: DeepSpeed would add "
            "one stage's gradients to those of the step before; use parallel.reduce=step"
        )


def _check_offload(parallel: Parallel, *, tied: bool) -> None:
    offload = parallel.offload
    if offload.optimizer != "none" and parallel.zero == 0:
        raise LayoutError(
            f"parallel.offload.optimizer={offload.optimizer} with parallel.zero=0, which updates where the parameters "
            "are; use parallel.zero=1 or offload.optimizer=none"
        )
    if offload.params != "none" and parallel.zero < 3:
        raise LayoutError(
            f"parallel.offload.params={offload.params} with parallel.zero={parallel.zero}: only ZeRO-3 shards "
            "parameters; use parallel.zero=3 or offload.params=none"
        )
    if offload.optimizer != "nvme":
        return
    if parallel.zero < 3:
        raise LayoutError(
            f"parallel.offload.optimizer=nvme with parallel.zero={parallel.zero}: DeepSpeed would silently keep it in "
            "host memory; use offload.optimizer=cpu or parallel.zero=3"
        )
    if offload.folder is None:
        raise LayoutError("parallel.offload.optimizer=nvme needs parallel.offload.folder, for example /local/nvme")
    if tied and parallel.pipeline > 1:
        raise LayoutError(
            "parallel.offload.optimizer=nvme with an embedding that is tied across stages: the sum of its two "
            "gradients cannot reach an optimizer on disk; use offload.optimizer=cpu or tie_word_embeddings=false"
        )


def _check_zero_plus_plus(parallel: Parallel, replicas: int) -> None:
    hpz = parallel.hpz
    if hpz > 1 and replicas % hpz:
        legal = max(size for size in divisors(replicas) if size <= hpz)
        raise LayoutError(
            f"parallel.hpz={hpz} does not divide the {replicas} replicas: DeepSpeed groups consecutive ranks of the "
            f"world, and a group would cross stages; use parallel.hpz={legal}"
        )
    if hpz > 1 and (parallel.zero < 3 or parallel.gather == "step"):
        raise LayoutError(
            f"parallel.hpz={hpz} with parallel.zero={parallel.zero} gather={parallel.gather}: its second copy is used "
            "only if parameters are gathered again within a step; use parallel.zero=3 gather=microbatch, or "
            "parallel.hpz=1"
        )
    if parallel.quantized_weights and parallel.zero < 3:
        raise LayoutError(
            f"parallel.quantized_weights=true with parallel.zero={parallel.zero}: only ZeRO-3 gathers parameters; "
            "use parallel.zero=3 or quantized_weights=false"
        )


def local_devices() -> int:
    """Number of NVIDIA GPUs that this process may use, 0 if the host has none. Does not import torch."""
    return len(visible_devices())


def visible_devices() -> list[str]:
    """The NVIDIA GPUs that this process may use, by their names in CUDA_VISIBLE_DEVICES, or by number without it. Empty
    on a host without GPUs, even if the variable is set, for example by a login shell."""
    there = [str(number) for number in range(len(glob.glob(_DEVICE_FILES)))]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not there:
        return there
    return [name for entry in visible.split(",") if (name := entry.strip()) not in ("", "-1")]


#: Name of the fp32 master weight among the saved states of a parameter.
MASTER = "master"
#: With ZeRO stage 0, most bytes of gradients that one collective reduces, except of a single larger gradient.
REPLICATED_BUCKET_BYTES = 64 << 20


def state_names(cfg: Config) -> tuple[str, ...]:
    """Names of the fp32 tensors that a checkpoint holds for each parameter: the master weight, and the optimizer state
    under torch's names."""
    if cfg.optim.kind == "adamw":
        return (MASTER, "exp_avg", "exp_avg_sq")
    return (MASTER, "momentum_buffer") if cfg.optim.momentum else (MASTER,)
