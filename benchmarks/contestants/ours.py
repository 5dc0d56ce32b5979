"""Our engine: `stack.parallel.engine.Engine` on synthetic batches, as the training loop drives it."""

import argparse

import deepspeed
import torch.distributed as dist

from benchmarks.contestants import common
from stack.config import deepspeed as ds
from stack.parallel import zero
from stack.parallel.engine import Engine
from stack.parallel.mesh import make_mesh
from stack.plan.layout import make_plan


def main() -> None:
    """Entry of a rank."""
    args = _arguments()
    common.start()
    _pull(args)
    world_size = dist.get_world_size()
    cfg = common.config(
        world_size // args.pipeline, pipeline=args.pipeline, zero=args.zero, reduce=args.reduce, gather=args.gather
    )
    cfg.parallel.split = args.split or "auto"
    cfg.activation.checkpoint, cfg.precision.compile = args.checkpoint, args.compile
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


def _arguments() -> argparse.Namespace:
    arguments = common.parser()
    arguments.add_argument("--pipeline", type=int, required=True)
    arguments.add_argument("--zero", type=int, required=True)
    arguments.add_argument("--reduce", choices=("step", "microbatch"), default="step")
    arguments.add_argument("--gather", choices=("step", "microbatch"), default="step")
    arguments.add_argument("--split", type=int, nargs="+", help="first layer of each stage")
    arguments.add_argument("--compile", action="store_true", help="decoder layers through torch.compile")
    arguments.add_argument("--no-leaf", action="store_true", help="a hook around each projection, not each layer")
    arguments.add_argument("--bucket", type=int, help="elements that are reduced together")
    arguments.add_argument("--prefetch", type=int, default=0, help="elements that are gathered ahead")
    return arguments.parse_args()


def _pull(args: argparse.Namespace) -> None:
    """Levers that no config key has, since one setting of them is best everywhere."""
    if args.no_leaf:
        deepspeed.utils.set_z3_leaf_modules = lambda *_: None
    if args.bucket:
        ds._BUCKET_ELEMENTS = args.bucket
    if args.prefetch:
        made = zero.ds_config

        def prefetching(*given: object, **named: object) -> dict:
            config = made(*given, **named)
            config["zero_optimization"]["stage3_prefetch_bucket_size"] = args.prefetch
            return config

        zero.ds_config = prefetching


if __name__ == "__main__":
    main()
