"""Ours: `stack.parallel.engine.Engine` on synthetic batches, as the training loop drives it."""

import argparse
from dataclasses import asdict

import torch.distributed as dist

from benchmarks.contestants import common
from benchmarks.work import apply_settings
from stack.config.check import to_config
from stack.config.schema import Config
from stack.parallel.engine import Engine
from stack.parallel.loading import DeviceBatch
from stack.parallel.mesh import Mesh, make_mesh
from stack.plan.layout import make_plan
from stack.train.ahead import Prefetch, results


def main() -> None:
    """Entry of a rank."""
    arguments = common.parser()
    arguments.add_argument("--cfg", nargs="*", default=[], metavar="SECTION.KEY=VALUE", help="keys of the config")
    args = common.start(arguments)
    world_size = dist.get_world_size()
    cfg = _config(args, world_size)
    plan = make_plan(cfg, world_size)
    mesh = make_mesh(plan, timeout=common.TIMEOUT)
    engine = Engine(cfg, plan, mesh)
    clock = common.Clock(args)
    loss = _train(engine, args, cfg, mesh, clock)
    # The engine's loss is already the mean over the global batch.
    clock.report(loss, replicas=mesh.replicas, split=list(plan.first_layers))
    common.leave()


def _train(engine: Engine, args: argparse.Namespace, cfg: Config, mesh: Mesh, clock: common.Clock) -> float:
    """Runs all steps in the way of the training loop. Returns the loss of the last step."""
    steps = range(args.warmup + args.steps)

    def load(step: int) -> DeviceBatch:
        return engine.load(common.replica_batch(args.work, step, replica=mesh.replica, replicas=mesh.replicas))

    with Prefetch(load, stop=len(steps), ahead=cfg.data.prefetch) as batches:
        clock.begin()
        for result, _ in results(
            lambda step: engine.start_batch(batches.take(step), lr=cfg.optim.lr),
            steps,
            ahead=engine.runs_ahead,
            settle_after=lambda _: False,
            asked=lambda: False,
        ):
            clock.lap()
            loss = result.loss
    return loss


def _config(args: argparse.Namespace, world_size: int) -> Config:
    """Our config: the work for one replica, the keys of the command line, then the global batch of all replicas."""
    base = common.config(args.work, replicas=1, pipeline=1)
    cfg = to_config(apply_settings(asdict(base), args.cfg))
    cfg.batch.global_size *= world_size // cfg.parallel.pipeline
    return cfg


if __name__ == "__main__":
    main()
