"""Which schedule, ZeRO stage and policies go together; each refusal says why and what works."""

from dataclasses import dataclass

from stack.config.schema import Config, Parallel
from stack.errors import LayoutError


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


def check_policies(cfg: Config, replicas: int) -> None:
    """Refuses what cannot work together.

    Raises:
        LayoutError: the schedule, ZeRO stage, policies and offload contradict each other.
    """
    _check_schedule(cfg)
    _check_reduce(cfg.parallel)


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
