"""Our engine: `stack.parallel.engine.Engine` on synthetic batches, as the training loop drives it."""

import torch.distributed as dist

from benchmarks.contestants import common
from stack.parallel.engine import Engine
from stack.parallel.mesh import make_mesh
from stack.plan.layout import make_plan


def main() -> None:
    """Entry of a rank."""
    arguments = common.parser()
    arguments.add_argument("--pipeline", type=int, required=True)
    arguments.add_argument("--zero", type=int, required=True)
    arguments.add_argument("--reduce", choices=("step", "microbatch"), default="step")
    arguments.add_argument("--gather", choices=("step", "microbatch"), default="step")
    args = arguments.parse_args()
    common.start()
    world_size = dist.get_world_size()
    cfg = common.config(
        world_size // args.pipeline, pipeline=args.pipeline, zero=args.zero, reduce=args.reduce, gather=args.gather
    )
    cfg.activation.checkpoint = args.checkpoint
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


if __name__ == "__main__":
    main()
