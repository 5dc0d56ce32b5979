"""The functions that the ranks of the GPU tests run."""

import warnings
from datetime import timedelta
from typing import Any

import numpy as np

from tests.helpers.tiny import STEPS, replica_batch, tiny_config


def engine_of(settings: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """Config, plan, mesh and engine of a tiny run on this rank."""
    import torch.distributed as dist

    from stack.parallel.engine import Engine
    from stack.parallel.mesh import make_mesh
    from stack.plan.layout import make_plan

    cfg = tiny_config(**settings)
    plan = make_plan(cfg, dist.get_world_size())
    mesh = make_mesh(plan, timeout=timedelta(seconds=60))
    return cfg, plan, mesh, Engine(cfg, plan, mesh)


def run(settings: dict[str, Any], kind: str) -> dict[str, Any]:
    """Trains some steps. Returns the values that `tests.numerics.compare` reads, bubble fractions and the device."""
    cfg, _, mesh, engine = engine_of(settings)
    update, gradients = engine.rank_engine.step, {}

    def capture_then_step(lr: float) -> Any:
        if not gradients:
            gradients.update(_full(engine, engine.rank_engine.reduced_gradient))
        return update(lr)

    engine.rank_engine.step = capture_then_step
    results = []
    for step in range(STEPS):
        batch = replica_batch(cfg, step, replica=mesh.replica, replicas=mesh.replicas, kind=kind)
        results.append(engine.train_batch(batch, lr=cfg.optim.lr))
    return {
        "steps": [(result.loss, result.grad_norm) for result in results],
        "bubble": [result.bubble_fraction for result in results],
        "gradients": gradients,
        "parameters": _full(engine, engine.rank_engine.master),
        "device": str(mesh.device),
    }


def _full(engine: Any, read: Any) -> dict[str, np.ndarray]:
    return {
        name: read(parameter).detach().float().cpu().numpy().copy()
        for stage in engine.stages
        for name, parameter in stage.model.named_parameters()
    }


def peak(settings: dict[str, Any]) -> tuple[int, dict[str, int]]:
    """Peak GPU memory of the second of two steps, minus the memory that was allocated before, in bytes; and the memory
    of each phase in the plan."""
    import gc

    import torch

    from stack.plan.memory import plan_memory

    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    cfg, plan, mesh, engine = engine_of(settings)
    for step in range(2):
        batch = replica_batch(cfg, step, replica=mesh.replica, replicas=mesh.replicas, kind="full")
        torch.cuda.reset_peak_memory_stats()
        engine.train_batch(batch, lr=cfg.optim.lr)
    return torch.cuda.max_memory_allocated() - before, plan_memory(cfg, plan)[mesh.pipe_rank].phases


def waits(settings: dict[str, Any]) -> list[str]:
    """The places (file:line) at which the host waits for the device in the forwards and backwards of a step, as torch
    reports them."""
    import torch

    cfg, _, mesh, engine = engine_of(settings)
    batches = [replica_batch(cfg, step, replica=mesh.replica, replicas=mesh.replicas, kind="full") for step in range(3)]
    for batch in batches[:2]:
        engine.train_batch(batch, lr=cfg.optim.lr)
    accumulate, found = engine.rank_engine.accumulate, []

    def watched() -> Any:
        torch.cuda.set_sync_debug_mode("warn")
        return accumulate()

    def stop_then_step(lr: float) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        return update(lr)

    update = engine.rank_engine.step
    engine.rank_engine.accumulate, engine.rank_engine.step = watched, stop_then_step
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.train_batch(batches[2], lr=cfg.optim.lr)
    found += [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    return found


def loss_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Loss and gradients of one microbatch, once with the whole model as one stage (`ours`), once by F.cross_entropy of
    the logits of transformers' own forward (`theirs`)."""
    import torch
    import torch.nn.functional as F

    from stack.models.build import build_stages
    from stack.parallel.mesh import local_device
    from stack.plan.layout import make_plan

    device, alone = local_device(), {"parallel__pipeline": 1, "parallel__zero": 0}
    plain = {key: value for key, value in settings.items() if not key.startswith("kernels__")}
    if plain != settings:
        plain["kernels__loss"] = "logits"

    def build(given: dict[str, Any]) -> Any:
        cfg = tiny_config(**alone, **given)
        return cfg, build_stages(cfg, make_plan(cfg, 1), 0, device=device)[0]

    def gradients(stage: Any, loss: Any) -> dict[str, np.ndarray]:
        loss.backward()
        return {name: p.grad.float().cpu().numpy().copy() for name, p in stage.model.named_parameters()}

    cfg, stage = build(settings)
    _, reference = build(plain)
    batch = replica_batch(cfg, 0, replica=0, replicas=1, kind="padded")
    arrays = (batch.input_ids[0], batch.labels[0], batch.positions[0])
    ids, labels, positions = (torch.from_numpy(array).to(device) for array in arrays)
    ours = stage(ids, positions, labels)
    logits = reference.model(input_ids=ids, position_ids=positions).logits.float()
    theirs = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return {
        "ours": ours.item(),
        "ours_gradients": gradients(stage, ours),
        "theirs": theirs.item(),
        "their_gradients": gradients(reference, theirs),
    }
