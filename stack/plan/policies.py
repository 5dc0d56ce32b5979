"""Which schedule, ZeRO stage and policies go together; each refusal says why and what works."""

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
    """What a pipeline schedule asks of a layout."""

    virtual: bool = False
    """Several stages on each rank of the pipe."""
    folded: bool = False
    """The second half of the stages runs back up the pipe, so the first and the last stage share a rank."""
    splits_backward: bool = False
    """Runs the gradient of the inputs and that of the weights apart."""


SCHEDULES = {
    "1f1b": ScheduleRules(),
    "gpipe": ScheduleRules(),
    "interleaved_1f1b": ScheduleRules(virtual=True),
    "interleaved_zero_bubble": ScheduleRules(virtual=True, splits_backward=True),
    "zbv": ScheduleRules(virtual=True, folded=True, splits_backward=True),
}


def check_policies(cfg: Config, replicas: int, *, tied: bool) -> None:
    """Refuses what cannot work together.

    Raises:
        LayoutError: the schedule, ZeRO stage, policies and offload contradict each other.
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
            f"parallel.schedule={parallel.schedule} runs several stages on each rank of the pipe and "
            "parallel.virtual_stages=1; use parallel.virtual_stages=2"
        )
    if not rules.virtual and virtual > 1:
        raise LayoutError(
            f"parallel.virtual_stages={virtual} with parallel.schedule={parallel.schedule}, which runs one stage on "
            "each rank; use parallel.schedule=interleaved_1f1b or parallel.virtual_stages=1"
        )
    if rules.folded and virtual != 2:
        raise LayoutError(
            f"parallel.virtual_stages={virtual} with parallel.schedule={parallel.schedule}, whose pipe goes down "
            "and up once; use parallel.virtual_stages=2"
        )
    if not rules.splits_backward:
        return
    if parallel.zero > 1:
        raise LayoutError(
            f"parallel.schedule={parallel.schedule} with parallel.zero={parallel.zero}: it computes weight gradients "
            "apart from the backward, where ZeRO-2 and 3 do not see them; use parallel.zero=1 or parallel.schedule="
            "interleaved_1f1b"
        )
    if cfg.precision.dtype == "fp16":
        raise LayoutError(
            f"parallel.schedule={parallel.schedule} with precision.dtype=fp16: its weight gradients are not scaled; "
            "use precision.dtype=bf16 or parallel.schedule=interleaved_1f1b"
        )
    if cfg.precision.compile:
        raise LayoutError(
            f"parallel.schedule={parallel.schedule} with precision.compile=true: a compiled layer has one "
            "backward and no two parts; use precision.compile=false or parallel.schedule=interleaved_1f1b"
        )
    if liger := liger_parts(cfg):
        raise LayoutError(
            f"parallel.schedule={parallel.schedule} with kernels.{liger[0]}=liger: its kernels write over "
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
            f"parallel.offload.optimizer=nvme with parallel.zero={parallel.zero}: DeepSpeed would keep it in host "
            "memory without a word; use offload.optimizer=cpu or parallel.zero=3"
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
            f"parallel.hpz={hpz} with parallel.zero={parallel.zero} gather={parallel.gather}: its second copy serves "
            "gathers again within a step; use parallel.zero=3 gather=microbatch, or parallel.hpz=1"
        )
    if parallel.quantized_weights and parallel.zero < 3:
        raise LayoutError(
            f"parallel.quantized_weights=true with parallel.zero={parallel.zero}: only ZeRO-3 gathers parameters; "
            "use parallel.zero=3 or quantized_weights=false"
        )


def local_devices() -> int:
    """NVIDIA GPUs this process may use, without importing torch; 0 on a host without any."""
    return len(visible_devices())


def visible_devices() -> list[str]:
    """Those GPUs by the names that CUDA_VISIBLE_DEVICES has for them. The variable chooses among a host's GPUs: where
    it is set on a host without any, as by a login shell, there is nothing to choose from."""
    there = [str(number) for number in range(len(glob.glob(_DEVICE_FILES)))]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not there:
        return there
    return [name for entry in visible.split(",") if (name := entry.strip()) not in ("", "-1")]


#: Name of a parameter's fp32 value among its states.
MASTER = "master"


def state_names(cfg: Config) -> tuple[str, ...]:
    """What is saved for each parameter: its master, and the optimizer's tensors by their names in torch."""
    if cfg.optim.kind == "adamw":
        return (MASTER, "exp_avg", "exp_avg_sq")
    return (MASTER, "momentum_buffer") if cfg.optim.momentum else (MASTER,)
