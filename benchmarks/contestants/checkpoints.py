"""Times saving, loading and exporting one state on the same ranks, with our code and with DeepSpeed's own save."""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.contestants import common
from stack.checkpoint import load as loading
from stack.checkpoint import manifest as manifests
from stack.checkpoint.save import Saver
from stack.checkpoint.storage import whole
from stack.config.schema import Checkpoint
from stack.models.build import parameter_shapes
from stack.models.export import export
from stack.parallel.engine import Engine
from stack.parallel.mesh import Mesh, make_mesh
from stack.plan.layout import make_plan

_TURNS = 3


def main() -> None:
    """Entry of a rank."""
    arguments = common.parser()
    arguments.add_argument("--folder", type=Path, required=True, help="folder of the checkpoints")
    arguments.add_argument("--pipeline", type=int, default=2)
    arguments.add_argument("--zero", type=int, default=3)
    arguments.add_argument(
        "--do", choices=("save", "load", "export"), default="save", help="`load` and `export` use what `save` wrote"
    )
    args = common.start(arguments)
    if args.do == "export":
        _report(_export(args))
        common.leave()
    cfg = common.config(args.work, dist.get_world_size() // args.pipeline, pipeline=args.pipeline, zero=args.zero)
    plan = make_plan(cfg, dist.get_world_size())
    mesh = make_mesh(plan, timeout=common.TIMEOUT)
    engine = Engine(cfg, plan, mesh, empty=args.do == "load")
    if args.do == "load":
        found = _load(engine, mesh, args.folder / "ours")
    else:
        _fill(engine)
        about = {"course": {}, "plan": plan.to_dict(), "versions": {}}
        found = _save(engine, args, {"about": about, "shapes": parameter_shapes(cfg)})
    _report({**found, "parameters": plan.shape.total_params})
    common.leave()


def _report(found: dict[str, Any]) -> None:
    if dist.get_rank() == 0:
        print(common.RESULT, json.dumps(found), flush=True)


def _fill(engine: Engine) -> None:
    """Fills the state with random values, as after many steps: a file system may not store zeros."""
    for group in range(engine.rank_engine.groups):
        with engine.rank_engine.parts(group, load=True) as parts:
            for part in parts:
                for tensor in part.states.values():
                    tensor.normal_(std=0.02)
    engine.rank_engine.loaded()
    engine.rank_engine.updates = 100


def _save(engine: Engine, args: argparse.Namespace, facts: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the slowest rank for each save. A turn has the three kinds of saves, one after another."""
    ways = ("deepspeed", "sync", "async")
    found: dict[str, list[float]] = {f"{way}_{what}": [] for way in ways for what in ("stall_s", "write_s")}
    savers = {
        way: Saver(
            args.folder / ("ours" if way == "sync" else way),
            engine.rank_engine,
            Checkpoint(async_save=way == "async", keep_last=1),
            tell=print,
            phase=lambda *_: None,
            **facts,
        )
        for way in ways[1:]
    }
    # The first turn is not counted: it allocates memory that later turns use again.
    for turn in range(_TURNS + 1):
        for way in ways:
            _quiet()
            began = time.perf_counter()
            if way == "deepspeed":
                folder = args.folder / way
                engine.rank_engine._engine.save_checkpoint(str(folder), tag="a")
                stall = time.perf_counter() - began
                _to_disk(folder)
            else:
                savers[way].save(turn + 1, {}, heldout_loss=None)
                stall = time.perf_counter() - began
                savers[way].wait()
            took = {"stall_s": _slowest(stall), "write_s": _slowest(time.perf_counter() - began)}
            for what, seconds in took.items() if turn else ():
                found[f"{way}_{what}"].append(seconds)
            if way == "deepspeed":
                found["deepspeed_bytes"] = [
                    float(sum(file.stat().st_size for file in (args.folder / way).rglob("*.pt")))
                ]
                _quiet()
                if dist.get_rank() == 0:
                    shutil.rmtree(args.folder / way)
    ours = args.folder / "ours"
    found["ours_bytes"] = [float(sum(file.stat().st_size for file in ours.rglob("*.safetensors")))]
    return found


def _to_disk(folder: Path) -> None:
    """Each rank writes its share of the files through to the disk, as our saves do before they report success."""
    for file in sorted(folder.rglob("*.pt"))[dist.get_rank() :: dist.get_world_size()]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _load(engine: Engine, mesh: Mesh, root: Path) -> dict[str, Any]:
    """Seconds of each turn to verify and to load."""
    found: dict[str, list[float]] = {"verify_s": [], "load_s": []}
    for _ in range(_TURNS):
        checkpoint: Any = None

        def find() -> None:
            nonlocal checkpoint
            checkpoint = loading.find(root, "auto", mesh, tell=print)

        found["verify_s"].append(_timed(find))
        found["load_s"].append(_timed(lambda: loading.load(checkpoint, engine.rank_engine)))  # noqa: B023
    return found


def _export(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds to export the weights in fp32, and to copy the exported file with an fsync."""
    cfg = common.config(args.work, 1, pipeline=1, zero=0)
    root = args.folder / "ours"
    folder = manifests.folder_of(root, manifests.steps(root)[-1])
    manifest = manifests.read(folder)
    found: dict[str, Any] = {"export_s": [], "copy_s": []}
    for turn in range(_TURNS + 1):
        out = args.folder / "exported"
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        exported = _timed(
            lambda: export(
                cfg,
                lambda name: whole(folder, manifest, name),
                out,  # noqa: B023
                dtype=torch.float32,
                tokenizer=None,
                progress=lambda *_: None,
            )
        )
        os.sync()
        copied = _timed(lambda: _copy(out / "model.safetensors", args.folder / "copy"))  # noqa: B023
        found["export_bytes"] = (args.folder / "copy").stat().st_size
        (args.folder / "copy").unlink()
        if turn:
            found["export_s"].append(exported)
            found["copy_s"].append(copied)
    return found


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as old, target.open("wb") as new:
        shutil.copyfileobj(old, new, 16 << 20)
        new.flush()
        os.fsync(new.fileno())


def _timed(call: Callable[[], object]) -> float:
    dist.barrier()
    began = time.perf_counter()
    call()
    return _slowest(time.perf_counter() - began)


def _slowest(seconds: float) -> float:
    told = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return told.item()


def _quiet() -> None:
    """Waits until the disk has all files of earlier saves, whose writes would slow the next save. Collective."""
    dist.barrier()
    if dist.get_rank() == 0:
        os.sync()
    dist.barrier()


if __name__ == "__main__":
    main()
