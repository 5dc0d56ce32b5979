"""The checks that `stack doctor` runs on the ranks: the checks of hosts and network, and a comparison of a miniature of
the configured layout with the same model trained in one ordinary process."""

import time
from dataclasses import replace
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np

from stack.config.schema import Config
from stack.data.batches import IGNORE, Batch
from stack.errors import NumericsError
from stack.health.ranks import check_ranks
from stack.parallel import messages, zero
from stack.parallel.engine import Engine
from stack.parallel.mesh import Mesh, make_mesh
from stack.parallel.reference import Curve, synthetic_rows, train_dense
from stack.plan.layout import Plan
from stack.plan.miniature import STEPS
from stack.train import rundir
from stack.train.rundir import RunDir

#: The largest relative difference that rounding explains. fp32: sums are in another order, on a GPU in other kernels.
#: bf16: a weight that is rounded to the other neighbour differs by 2**-8, and changes later values; after three steps a
#: bias that began at zero differed by 0.02, equally in every layout.
TOLERANCE = {("fp32", "cpu"): 1e-5, ("fp32", "cuda"): 1e-4, ("bf16", "cpu"): 5e-2, ("bf16", "cuda"): 5e-2}


class Difference(NamedTuple):
    """The difference of a value from the dense process."""

    size: float
    """L2 norm of the difference over the L2 norm of the expected value; infinite for another shape or a value that is
    not finite."""
    what: str
    """Name of the value, for the user."""


def check(cfg: Config, plan: Plan, run: RunDir, rank: int) -> None:
    """Runs the checks that `run.check` lists, and writes lines for the user to `run.result`. Collective.

    Raises:
        HangError, HostError: as `check_ranks`.
        NumericsError: the layout differs from the dense process.
    """
    asked = rundir.read_json(run.check) or {}
    timeout = timedelta(seconds=cfg.health.hang_timeout_s)
    zero.init_distributed(timeout=timeout)
    mesh = make_mesh(plan, timeout=timeout)
    # The checks of the network need at least two ranks.
    lines = [str(check_ranks(mesh.device)) if plan.world_size > 1 else "1 rank"]
    for dtype in asked["parity"]:
        lines.append(_parity(replace(cfg, precision=replace(cfg.precision, dtype=dtype)), plan, mesh))
    print(*lines[1:], sep="\n", flush=True)
    zero.close()
    if rank == 0:
        rundir.write_json(run.result, {"told": "\n".join(lines)})
        rundir.write_json(run.done, {"time": time.time()})


def _parity(cfg: Config, plan: Plan, mesh: Mesh) -> str:
    """Compares the layout with a dense process, and returns a line with the largest difference.

    Raises:
        NumericsError: the difference is larger than rounding explains. Raised on every rank.
    """
    dtype = cfg.precision.dtype
    allowed = TOLERANCE[dtype, mesh.device.type]
    own = _train(cfg, plan, mesh)
    # Each rank trains the tiny dense model itself, so that expected values are not sent over the network under test.
    dense = train_dense(cfg, steps=STEPS, device=mesh.device)
    everyone = messages.gather([max(_differences(own, dense)), list(own.parameters)], mesh.host_group)
    rank = max(range(mesh.world_size), key=lambda number: everyone[number][0])
    size, what = everyone[rank][0]
    if missing := dense.parameters.keys() - set().union(*(names for _, names in everyone)) - dense.also:
        size, what = float("inf"), f"no rank has {sorted(missing)[0]}"
    line = (
        f"parity {dtype}, {plan.summary}: worst relative difference {size:.1e} ({what}, on rank {rank}), allowed "
        f"{allowed:.0e}"
    )
    if size > allowed:
        raise NumericsError(f"{line}: this layout does not train as one process does on these hosts")
    return f"{line}: ok"


def _train(cfg: Config, plan: Plan, mesh: Mesh) -> Curve:
    """Trains the miniature in the layout. The result has the parameters of this rank's stages."""
    engine = Engine(cfg, plan, mesh)
    results = [engine.train_batch(_replica_batch(cfg, plan, step, mesh), lr=cfg.optim.lr) for step in range(STEPS)]
    parameters = {
        name: engine.rank_engine.master(parameter).detach().float().cpu()
        for stage in engine.stages
        for name, parameter in stage.model.named_parameters()
    }
    return Curve([result.loss for result in results], [result.grad_norm for result in results], parameters)


def _replica_batch(cfg: Config, plan: Plan, step: int, mesh: Mesh) -> Batch:
    """This replica's contiguous part of the global batch, cut into microbatches."""
    whole = synthetic_rows(cfg, step)
    size = plan.global_size // plan.replicas
    part = slice(mesh.replica * size, (mesh.replica + 1) * size)
    ids, labels, positions = (values[part].reshape(-1, plan.micro_size, plan.seq_len) for values in whole)
    return Batch(ids, labels, positions, global_target_tokens=int((whole[1] != IGNORE).sum()))


def _differences(own: Curve, dense: Curve) -> list[Difference]:
    found = []
    for step in range(STEPS):
        found.append(_difference(own.losses[step], dense.losses[step], f"loss of step {step}"))
        found.append(_difference(own.norms[step], dense.norms[step], f"gradient norm of step {step}"))
    for name, value in own.parameters.items():
        found.append(_difference(value, dense.parameters[name], f"parameters of {name}"))
    return found


def _difference(found: Any, expected: Any, what: str) -> Difference:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape or not np.isfinite(found).all():
        return Difference(float("inf"), f"{what}: shape or value")
    size = float(np.linalg.norm(expected))
    return Difference(float(np.linalg.norm(found - expected)) / max(size, 1e-12), what)
