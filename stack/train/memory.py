"""The message for a run that is out of memory, with the settings that need less."""

from dataclasses import replace

from stack.config.schema import Config
from stack.errors import LayoutError, RankFailure
from stack.plan.layout import Plan, make_plan
from stack.plan.policies import local_devices


def out_of_memory(error: BaseException, cfg: Config | None, plan: Plan | None) -> RankFailure:
    """A one-line error for the user, with the text of `error` and the settings that need less memory.

    Args:
        error: an error that says that memory ran out.
        cfg: the config, if it is known.
        plan: the layout, if it is known.
    """
    told = " ".join((str(error).strip() or type(error).__name__).split())
    help_ = " or ".join(lower_memory(cfg, plan)) if cfg and plan else ""
    return RankFailure(f"out of memory ({told[:300]}); use {help_ or 'more ranks, or a smaller model'}")


def lower_memory(cfg: Config, plan: Plan) -> list[str]:
    """Overrides of `cfg` that need less memory on each rank, the one that costs least time first. Each of them alone is
    legal in the layout of `plan`."""
    parallel, offload = cfg.parallel, cfg.parallel.offload
    changed: dict[str, Config] = {}
    if smaller := max((n for n in range(1, plan.micro_size) if plan.micro_size % n == 0), default=0):
        changed[f"batch.micro_size={smaller}"] = replace(cfg, batch=replace(cfg.batch, micro_size=smaller))
    if cfg.activation.checkpoint != "full":
        full = replace(cfg.activation, checkpoint="full")
        changed["activation.checkpoint=full"] = replace(cfg, activation=full)
    if plan.zero < 3 and plan.replicas > 1:
        changed["parallel.zero=3"] = replace(cfg, parallel=replace(parallel, zero=3))
    if plan.zero == 3 and parallel.gather == "step":
        changed["parallel.gather=microbatch"] = replace(cfg, parallel=replace(parallel, gather="microbatch"))
    if plan.zero >= 2 and parallel.reduce == "step":
        changed["parallel.reduce=microbatch"] = replace(cfg, parallel=replace(parallel, reduce="microbatch"))
    # Without a GPU the states are in host memory already.
    if plan.zero > 0 and offload.optimizer == "none" and local_devices():
        cpu = replace(parallel, offload=replace(offload, optimizer="cpu"))
        changed["parallel.offload.optimizer=cpu"] = replace(cfg, parallel=cpu)
    return [override for override, other in changed.items() if _is_legal(other, plan)]


def _is_legal(cfg: Config, plan: Plan) -> bool:
    try:
        make_plan(cfg, plan.world_size, plan.nodes)
    except LayoutError:
        return False
    return True
