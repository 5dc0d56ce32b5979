"""Runs the tiny model in a layout on the ranks of a pool, and returns the values that the parity tests compare."""

from datetime import timedelta
from typing import Any

import numpy as np

from tests.helpers.tiny import STEPS, replica_batch, tiny_config


def run_layout(settings: dict[str, Any], kind: str) -> dict[str, Any]:
    """Trains in a layout. Called on every rank of a `RankPool`.

    Args:
        settings: arguments of `tiny_config`.
        kind: as in `global_batch`.

    Returns:
        steps: (loss, grad_norm) of each step; skipped: whether each step skipped its update; bubble: bubble fraction of
        each step; gradients: whole fp32 gradients of this rank's stages in the first step; parameters: their whole
        fp32 masters after the last step; heldout: sum of the token losses of a batch after the last step; dtypes:
        `Engine.dtypes`.
    """
    import torch.distributed as dist

    from stack.parallel.engine import Engine
    from stack.parallel.mesh import make_mesh
    from stack.plan.layout import make_plan

    _refuse_hidden_gathers()
    cfg = tiny_config(**settings)
    plan = make_plan(cfg, dist.get_world_size())
    mesh = make_mesh(plan, timeout=timedelta(seconds=60))
    engine = Engine(cfg, plan, mesh)
    gradients: dict[str, np.ndarray] = {}
    update = engine.rank_engine.step

    def capture_then_step(lr: float) -> float:
        if not gradients:
            gradients.update(_full(engine, "gradient"))
        return update(lr)

    engine.rank_engine.step = capture_then_step  # type: ignore[method-assign]
    results = []
    for step in range(STEPS):
        batch = replica_batch(cfg, step, replica=mesh.replica, replicas=mesh.replicas, kind=kind)
        results.append(engine.train_batch(batch, lr=cfg.optim.lr))
    held = replica_batch(cfg, 99, replica=mesh.replica, replicas=mesh.replicas, kind=kind)
    return {
        "steps": [(result.loss, result.grad_norm) for result in results],
        "skipped": [result.skipped for result in results],
        "bubble": [result.bubble_fraction for result in results],
        "gradients": gradients,
        "parameters": _full(engine, "parameter"),
        "heldout": engine.eval_batch(held),
        "dtypes": engine.dtypes,
    }


def _refuse_hidden_gathers() -> None:
    """Makes it an error that a forward reads a weight before it is gathered. DeepSpeed would gather such a weight when
    it is read, by a blocking collective in each microbatch, and no result would change."""
    from deepspeed.runtime.zero import parameter_offload

    def refuse(module: Any, _parameter: Any) -> None:
        raise AssertionError(f"DeepSpeed itself gathers a parameter that {type(module).__name__} reads")

    parameter_offload.register_external_parameter = refuse


def _full(engine: Any, what: str) -> dict[str, np.ndarray]:
    read = engine.rank_engine.reduced_gradient if what == "gradient" else engine.rank_engine.master
    return {
        name: read(p).detach().float().numpy().copy()
        for stage in engine.stages
        for name, p in stage.model.named_parameters()
    }
