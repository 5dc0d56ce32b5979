"""Jobs of the GPU suite that do not compare programs, each in a process of its own: environment, memory, largest."""

import argparse
import json
import os
import platform
import subprocess
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.contestants import common
from benchmarks.work import Work, apply_settings, make_work
from stack.config.check import to_config
from stack.config.schema import Config
from stack.parallel import zero
from stack.parallel.engine import Engine
from stack.parallel.mesh import make_mesh
from stack.plan.layout import Plan, make_plan
from stack.plan.memory import RankMemory, plan_memory

#: Bytes kept free on the device for CUDA's context, workspaces, and fragmentation of the allocator.
RESERVED_BYTES = 4 * 2**30
#: Share of the host's free memory that an offloaded model may take.
HOST_SHARE = 0.8
#: The width of Llama 3.1 8B. `largest` uses a short sequence with it, so that model states decide how much fits.
WIDE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
_PACKAGES = ("torch", "deepspeed", "transformers", "triton", "liger-kernel", "flash-attn", "numpy")


def main() -> None:
    """Runs one job and prints its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=("environment", "memory", "largest"))
    parser.add_argument("--size", type=int, default=8192, help="rows and columns of the matrices of `environment`")
    parser.add_argument("--work", default="1b")
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--cfg", nargs="*", default=[])
    parser.add_argument("--offload", choices=("none", "cpu"), default="none")
    args = parser.parse_args()
    found = {"environment": environment, "memory": memory, "largest": largest}[args.job](args)
    print(common.RESULT, json.dumps(found), flush=True)


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """Versions, clocks, and the speed of a bf16 product of two square matrices, as the limit of the device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda), "cores": str(os.cpu_count())}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    left, right = (torch.randn(args.size, args.size, device=device).bfloat16() for _ in range(2))
    seconds = []
    for _ in range(30 if device.type == "cuda" else 2):
        began = _now()
        left @ right
        seconds.append(_now() - began)
    if device.type == "cuda":
        # Read just after the products, so that the clocks are those of the products.
        query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,memory.total,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        values = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip().split(", ")
        found |= dict(zip(query.split(","), values, strict=False))
    median = sorted(seconds)[len(seconds) // 2]
    return {"matmul_tflops": 2 * args.size**3 / median / 1e12, "versions": found}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """The measured and the planned peak of two steps."""
    work = make_work(args.work, args.set)
    cfg, plan = _run_of(work, args.cfg)
    zero.init_distributed(timeout=common.TIMEOUT)
    peak, step_s, loss = _steps(work, cfg, plan)
    [planned] = plan_memory(cfg, plan)
    zero.close()
    return {**_beside(planned, peak), "step_s": step_s, "loss": loss, "phases": planned.phases}


def largest(args: argparse.Namespace) -> dict[str, Any]:
    """The largest number of layers that fits by the plan, and two real steps of that model. After an out-of-memory
    error the model is tried with a tenth of the layers less, at most twice."""
    work = make_work(args.work, args.set)
    cuda = torch.cuda.is_available()
    if cuda:
        work = make_work("1b", [*(f"shape.{key}={value}" for key, value in WIDE.items()),
                                "seq_len=2048", "micro_size=1", "microbatches=2", "checkpoint=full"])  # fmt: skip
    settings = ["parallel.zero=3", "parallel.reduce=microbatch", "parallel.gather=microbatch", "data.pack=false",
                f"parallel.offload.optimizer={args.offload}"]  # fmt: skip
    room = torch.cuda.get_device_properties(0).total_memory - RESERVED_BYTES if cuda else 2**26
    host = int(psutil.virtual_memory().available * HOST_SHARE)
    layers = _most_layers(work, settings, room=room, host=host)
    zero.init_distributed(timeout=common.TIMEOUT)
    tries, found = [], {}
    while not found and layers > 0 and len(tries) < 3:
        tries.append(layers)
        cfg, plan = _run_of(_deep(work, layers), settings)
        try:
            peak, step_s, loss = _steps(_deep(work, layers), cfg, plan)
        except torch.cuda.OutOfMemoryError:
            layers = min(layers - 1, layers * 9 // 10)
            torch.cuda.empty_cache()
            continue
        [planned] = plan_memory(cfg, plan)
        found = {**_beside(planned, peak), "step_s": step_s, "loss": loss, "layers": layers}
        found["params_b"] = plan.shape.total_params / 1e9
    zero.close()
    return found | {"remark": f"layers tried: {', '.join(map(str, tries))}"}


def _most_layers(work: Work, settings: list[str], *, room: int, host: int) -> int:
    """Largest number of layers that fits by the plan, by bisection; 0 if one layer does not fit."""

    def fits(layers: int) -> bool:
        [planned] = plan_memory(*_run_of(_deep(work, layers), settings))
        return planned.peak <= room and planned.host <= host

    low, high = 0, 1
    while high < 4096 and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _deep(work: Work, layers: int) -> Work:
    return Work(**{**vars(work), "shape": {**work.shape, "num_hidden_layers": layers}})


def _run_of(work: Work, settings: list[str]) -> tuple[Config, Plan]:
    base = asdict(common.config(work, replicas=1, pipeline=1))
    cfg = to_config(apply_settings(base, settings))
    return cfg, make_plan(cfg, 1)


def _steps(work: Work, cfg: Config, plan: Plan) -> tuple[int, float, float]:
    """Two steps: the peak in bytes, the seconds of the second step, and its loss."""
    mesh = make_mesh(plan, timeout=common.TIMEOUT)
    engine = Engine(cfg, plan, mesh)
    for step in range(2):
        batch = common.replica_batch(work, step, replica=0, replicas=1)
        began = _now()
        loss = engine.train_batch(batch, lr=cfg.optim.lr).loss
        took = _now() - began
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), took, loss
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"), took, loss


def _beside(planned: RankMemory, peak: int) -> dict[str, float]:
    return {
        "peak_gib": peak / 2**30,
        "plan_gib": planned.peak / 2**30,
        "host_gib": planned.host / 2**30,
        "peak_over_plan": peak / planned.peak,
    }


if __name__ == "__main__":
    main()
