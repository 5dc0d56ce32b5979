"""Trains, saves and loads the tiny model in any layout, on the ranks of a pool."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from stack.config.schema import Config
from stack.plan.layout import Plan
from tests.helpers.tiny import replica_batch, tiny_config

#: (number of ranks, settings) of the layouts between which checkpoints are exchanged.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "pp2 dp2 zero3": (4, {}),
    "pp1 dp1 zero0": (1, {"parallel__pipeline": 1, "parallel__zero": 0}),
    "pp4 dp1 zero1": (4, {"parallel__pipeline": 4, "parallel__zero": 1}),
    "pp1 dp4 zero3": (4, {"parallel__pipeline": 1}),
    "pp2 dp1 zero2": (2, {"parallel__zero": 2}),
    "pp2 dp2 zero0": (4, {"parallel__zero": 0}),
    "interleaved": (4, {"parallel__schedule": "interleaved_1f1b", "parallel__virtual_stages": 2}),
    "zbv": (
        2,
        {
            "parallel__zero": 1,
            "parallel__schedule": "zbv",
            "parallel__virtual_stages": 2,
            "activation__checkpoint": "none",
        },
    ),
    "offloaded": (4, {"parallel__offload__optimizer": "cpu"}),
    "hpZ": (4, {"parallel__hpz": 2, "parallel__gather": "microbatch"}),
}


def run_from(
    settings: dict[str, Any],
    root: Path,
    *,
    step: int,
    until: int,
    load: bool = False,
    save: Path | None = None,
    save_loaded: Path | None = None,
) -> dict[str, Any]:
    """Trains from `step` to `until`. Called on every rank of a pool.

    Args:
        settings: arguments of `tiny_config`.
        root: folder of checkpoints to load from.
        step: finished steps at the beginning.
        until: finished steps at the end.
        load: load the checkpoint of `step` from `root` first.
        save: folder into which a checkpoint of `until` is saved.
        save_loaded: folder into which a checkpoint of `step` is saved, in the background while the first step runs.

    Returns:
        steps: (loss, grad_norm) of each step; heldout: sum of the token losses of a batch at the end; dtypes:
        `Engine.dtypes`.
    """
    import torch.distributed as dist

    from stack.checkpoint import load as loading
    from stack.parallel.engine import Engine
    from stack.parallel.mesh import make_mesh
    from stack.plan.layout import make_plan

    cfg = tiny_config(**settings)
    plan = make_plan(cfg, dist.get_world_size())
    mesh = make_mesh(plan, timeout=timedelta(seconds=60))
    engine = Engine(cfg, plan, mesh, empty=load)
    if load:
        found = loading.find(root, step, mesh, tell=print)
        assert found is not None
        loading.load(found, engine.rank_engine)
    early = _save(save_loaded, step, engine, cfg, plan) if save_loaded else None
    results = []
    for number in range(step, until):
        batch = replica_batch(cfg, number, replica=mesh.replica, replicas=mesh.replicas, kind="padded")
        engine.seed(number)
        results.append(engine.train_batch(batch, lr=cfg.optim.lr))
    if early:
        early.close()
    if save:
        saver = _save(save, until, engine, cfg, plan)
        if cfg.checkpoint.async_save and results:
            # Trains another step while the save runs, which must not change the saved state.
            engine.train_batch(batch, lr=cfg.optim.lr)
        saver.close()
    held = replica_batch(cfg, 99, replica=mesh.replica, replicas=mesh.replicas, kind="padded")
    return {
        "steps": [(result.loss, result.grad_norm) for result in results],
        "heldout": engine.eval_batch(held),
        "dtypes": engine.dtypes,
    }


def _save(root: Path, step: int, engine: Any, cfg: Config, plan: Plan) -> Any:
    """Begins to save a checkpoint of `step`. Returns the Saver; its `close` waits for the save."""
    from stack.checkpoint.save import Saver
    from stack.models.build import parameter_shapes

    about = {"course": {"batch.global_size": cfg.batch.global_size}, "plan": plan.to_dict(), "versions": {}}
    saver = Saver(
        root,
        engine.rank_engine,
        cfg.checkpoint,
        about=about,
        shapes=parameter_shapes(cfg),
        tell=print,
        phase=lambda *_: None,
    )
    saver.save(step, {"step": step}, heldout_loss=None, last=not cfg.checkpoint.async_save)
    return saver


def logical_state(root: Path, step: int) -> dict[str, torch.Tensor]:
    """Name `<state>/<Hugging Face name>` -> whole tensor, for everything in a checkpoint."""
    from stack.checkpoint import manifest as manifests
    from stack.checkpoint.storage import whole

    folder = manifests.folder_of(root, step)
    manifest = manifests.read(folder)
    return {
        f"{state}/{name}": whole(folder, manifest, name, state=state)
        for name in manifest.parameters
        for state in manifest.states
    }
