"""Our engine: `stack.parallel.engine.Engine` on synthetic batches, as the training loop drives it."""

import argparse
from dataclasses import asdict

import torch.distributed as dist

from benchmarks.contestants import common
from benchmarks.work import apply_settings
from stack.config.check import to_config
from stack.config.schema import Config
from stack.parallel.engine import Engine
from stack.parallel.mesh import make_mesh
from stack.plan.layout import make_plan


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
    common.measure(
        lambda batch: engine.train_batch(batch, lr=cfg.optim.lr).loss,
        args,
        replica=mesh.replica,
        replicas=mesh.replicas,
        split=list(plan.first_layers),
    )


def _config(args: argparse.Namespace, world_size: int) -> Config:
    """The work on one rank, then the keys of the command line, then as many replicas as there are ranks for."""
    base = common.config(args.work, replicas=1, pipeline=1)
    cfg = to_config(apply_settings(asdict(base), args.cfg))
    cfg.batch.global_size *= world_size // cfg.parallel.pipeline
    return cfg


if __name__ == "__main__":
    main()
