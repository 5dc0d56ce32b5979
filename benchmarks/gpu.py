"""The suite for one NVIDIA GPU: `python -m benchmarks.gpu [--part a,b,c]`, see benchmarks/gpu.md.

Every job is a process of its own with a time limit; the most important jobs come first. The results are written after
each job, so that a suite that is cut off keeps those of all finished jobs. This process needs no torch.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_page import page
from benchmarks.work import Work, make_work
from stack.observe.metrics import mfu, peak_flops
from stack.plan.policies import local_devices

ROOT = Path(__file__).parents[1]
RESULT = "RESULT"
PARTS = {
    "a": "environment and physical limit",
    "b": "contestants",
    "c": "ablation of ours",
    "d": "tests on the device",
    "e": "largest model that fits",
    "f": "memory against the plan",
}
#: A job is not started with fewer seconds left.
_LEAST_S = 20

#: The best setting. Each row of the ablation changes one of its keys.
BEST = {
    "parallel.zero": 3, "precision.compile": True, "kernels.loss": "chunked", "parallel.overlap": True,
    "optim.fused": True, "data.pack": False,
}  # fmt: skip
#: Keys of the ablation with their changed values. Those that should matter most come first.
TURNED = (
    ("precision.compile", False), ("kernels.loss", "logits"), ("activation.checkpoint", "full"),
    ("activation.checkpoint", "selective"), ("parallel.zero", 0), ("parallel.zero", 1),
    ("parallel.reduce", "microbatch"), ("parallel.gather", "microbatch"), ("parallel.overlap", False),
    ("optim.fused", False), ("data.prefetch", False), ("model.attention", "flash_attention_2"),
    ("kernels.loss", "liger"), ("kernels.rms_norm", "liger"), ("kernels.rope", "liger"), ("kernels.swiglu", "liger"),
)  # fmt: skip
#: Packages that a value needs; without its package a value is left out of the ablation.
_NEEDS = {"liger": "liger_kernel", "flash_attention_2": "flash_attn"}
_LEAST_MEMORY = {"parallel.reduce": "microbatch", "parallel.gather": "microbatch"}


@dataclass(frozen=True)
class Job:
    """One process of the suite."""

    part: str
    name: str
    command: tuple[str, ...]
    limit_s: int = 120
    tokens: bool = False
    """Whether the job measures the speed of the named work."""


def main() -> int:
    """Runs the chosen parts. The exit code is 2 without a GPU, 1 when a job failed."""
    args = _arguments()
    if args.device == "cuda" and (not local_devices() or shutil.which("nvidia-smi") is None):
        print(
            "benchmarks.gpu needs one NVIDIA GPU with its driver; --device cpu --work tiny tries it on a CPU",
            file=sys.stderr,
        )
        return 2
    suite = Suite(args)
    for job in jobs(args):
        suite.run(job)
    print(f"\n{suite.write()}")
    return 1 if suite.failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--part", default=",".join(PARTS), help=f"any of {','.join(PARTS)}; default: all")
    parser.add_argument("--work", default="1b", help="name of the work, see benchmarks/work.py")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="overrides of the work")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=int, default=5, help="measured optimizer steps of a job")
    parser.add_argument("--warmup", type=int, default=2, help="optimizer steps before the measured ones")
    parser.add_argument("--limit-s", type=int, default=540, help="seconds for all jobs together")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the results")
    args = parser.parse_args()
    args.part = args.part.split(",")
    if unknown := [part for part in args.part if part not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return args


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """All jobs of the chosen parts, in the order in which the parts are given."""
    made = {"a": _environment, "b": _contestants, "c": _ablation, "d": _tests, "e": _largest, "f": _memory}
    for part in args.part:
        yield from made[part](args)


def _child(name: str, *arguments: str) -> tuple[str, ...]:
    return ("-m", "benchmarks.gpu_child", name, *arguments)


def _contestant(args: argparse.Namespace, module: str, *arguments: str, sets: tuple[str, ...] = ()) -> tuple[str, ...]:
    shared = ["--work", args.work, "--steps", str(args.steps), "--warmup", str(args.warmup)]
    given = [*args.set, *sets]
    return ("-m", f"benchmarks.contestants.{module}", *shared, *(["--set", *given] if given else []), *arguments)


def _ours(args: argparse.Namespace, settings: dict[str, Any], sets: tuple[str, ...] = ()) -> tuple[str, ...]:
    return _contestant(args, "ours", "--cfg", *_as_yaml(settings), sets=sets)


def _as_yaml(settings: dict[str, Any]) -> list[str]:
    """`section.key=value` of each key."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def _environment(args: argparse.Namespace) -> Iterator[Job]:
    yield Job("a", "environment", _child("environment", "--size", "8192" if args.device == "cuda" else "256"), 90)


def _contestants(args: argparse.Namespace) -> Iterator[Job]:
    for name, command in (
        ("ours, ZeRO-3, compiled", _ours(args, BEST)),
        ("Trainer + DeepSpeed ZeRO-3", _contestant(args, "hf_trainer")),
        ("FSDP2, compiled", _contestant(args, "fsdp2", "--compile")),
        ("plain DeepSpeed ZeRO-3", _contestant(args, "plain_zero3")),
        ("ours, not compiled", _ours(args, BEST | {"precision.compile": False})),
    ):
        yield Job("b", name, command, 120, tokens=True)


def _ablation(args: argparse.Namespace) -> Iterator[Job]:
    yield Job("c", "best", _ours(args, BEST), tokens=True)
    for key, value in TURNED:
        package = _NEEDS.get(str(value))
        if package is None or importlib.util.find_spec(package):
            # torch.compile generates kernels of its own, so Liger's are compared with layers that are not compiled.
            eager = {"precision.compile": False} if value == "liger" and key != "kernels.loss" else {}
            name = f"{key}={value}{', not compiled' if eager else ''}"
            yield Job("c", name, _ours(args, BEST | {key: value} | eager), 90, tokens=True)
    least = BEST | _LEAST_MEMORY
    yield Job("c", "reduce and gather=microbatch", _ours(args, least), 90, tokens=True)
    whole = make_work(args.work, args.set)
    for size in (1, 2, 4):
        count = whole.microbatches * whole.micro_size // size
        if size != whole.micro_size and count:
            sets = (f"micro_size={size}", f"microbatches={count}")
            yield Job("c", f"batch.micro_size={size}", _ours(args, BEST, sets), 90, tokens=True)


def _tests(args: argparse.Namespace) -> Iterator[Job]:
    chosen = ["-k", "one_rank_in_fp32"] if args.device == "cpu" else []
    yield Job("d", "tests/gpu", ("-m", "pytest", "tests/gpu", "-q", "-rA", "--tb=short", *chosen), 300)


def _largest(args: argparse.Namespace) -> Iterator[Job]:
    for offload in ("none", "cpu"):
        yield Job("e", f"offload {offload}", _child("largest", "--offload", offload, *_model(args)), 200)


def _memory(args: argparse.Namespace) -> Iterator[Job]:
    for name, settings in (
        ("ZeRO-3, checkpoint none", {"parallel.zero": 3}),
        ("ZeRO-3, checkpoint full", {"parallel.zero": 3, "activation.checkpoint": "full"}),
        ("ZeRO-3, least memory, checkpoint full", {"activation.checkpoint": "full", "parallel.zero": 3}
         | _LEAST_MEMORY),
        ("ZeRO-1, compiled, checkpoint none", {"parallel.zero": 1, "precision.compile": True}),
    ):  # fmt: skip
        command = _child("memory", *_model(args), "--cfg", "data.pack=false", *_as_yaml(settings))
        yield Job("f", name, command, 90)


def _model(args: argparse.Namespace) -> list[str]:
    return ["--work", args.work, *(["--set", *args.set] if args.set else [])]


class Suite:
    """Runs jobs one after another and stores their results."""

    def __init__(self, args: argparse.Namespace):
        self._args, self._work = args, make_work(args.work, args.set)
        self._until = time.monotonic() + args.limit_s
        self.failed = False
        self.record: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": f"python -m benchmarks.gpu {' '.join(sys.argv[1:])}",
            "device": args.device,
            "gpu": _gpu_name() if args.device == "cuda" else "",
            "work": str(self._work),
            "parts": {part: PARTS[part] for part in args.part},
            "jobs": [],
        }

    def run(self, job: Job) -> None:
        """Runs a job, or notes that no time is left for it."""
        left = int(self._until - time.monotonic())
        began = time.monotonic()
        if left < _LEAST_S:
            found: dict[str, Any] = {"error": f"not run: {max(left, 0)} s left"}
        else:
            found = _process([sys.executable, *job.command], min(job.limit_s, left), device=self._args.device)
            self.failed |= "error" in found
        if job.tokens and "step_s" in found:
            found |= _speed(found["step_s"], self._work, self.record)
        entry = {
            "part": job.part, "name": job.name, "command": " ".join(("python", *job.command)),
            "took_s": round(time.monotonic() - began, 1), **found,
        }  # fmt: skip
        self.record["jobs"].append(entry)
        told = found.get("error", {k: v for k, v in found.items() if not isinstance(v, str | list | dict)})
        print(f"{job.part} {job.name}: {told}", flush=True)
        self.write()

    def write(self) -> Path:
        """Adds this suite to the results of earlier ones, as JSON and as a page.

        Returns:
            The path of the page.
        """
        folder: Path = self._args.out
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "gpu_results.json"
        stored = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        stored = [record for record in stored if record["date"] != self.record["date"]] + [self.record]
        file.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
        written = folder / "gpu_results.md"
        written.write_text(page(stored), encoding="utf-8")
        return written


def _speed(step_s: float, work: Work, record: dict[str, Any]) -> dict[str, Any]:
    """Model FLOPs utilisation of the peak in the data sheet, and of the matrix product measured in part a."""
    flops, dtype = work.flops(1), work.dtype
    measured = next((job.get("matmul_tflops") for job in record["jobs"] if job["part"] == "a"), None)
    return {
        "mfu": mfu(flops, step_s, 1, peak_flops(record["gpu"], dtype) if record["gpu"] else None),
        "of_measured": mfu(flops, step_s, 1, measured * 1e12 if measured else None),
    }


def _process(command: list[str], limit_s: int, *, device: str) -> dict[str, Any]:
    """Runs a job; returns its last RESULT line, or `error` with the end of its output."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "OMP_NUM_THREADS": "8" if device == "cuda" else "1", **os.environ, "RANK": "0", "LOCAL_RANK": "0",
        "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    if device == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "STACK_TEST_DEVICE": "cpu"}
    # The job gets a session of its own, so that a timeout also kills the processes that the job started.
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, late = process.communicate(timeout=limit_s)[0], False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, late = process.communicate()[0], True
    lines = output.splitlines()
    found = [line for line in lines if line.startswith(RESULT)]
    result = json.loads(found[-1].removeprefix(RESULT)) if found else {}
    if "pytest" in command:
        result = {"summary": [line for line in lines if line.startswith(("PASSED", "FAILED", "ERROR", "XF", "XP"))]}
        result["passed"] = sum(line.startswith("PASSED") for line in result["summary"])
    if late:
        result["error"] = f"no end after {limit_s} s"
    elif process.returncode:
        result["error"] = f"exit code {process.returncode}: {_reason(lines)}"
    if "error" in result:
        result["tail"] = lines[-25:]
    return result


def _reason(lines: list[str]) -> str:
    """The last output line that names an error, else the last line."""
    named = [line for line in lines if "Error" in line or "error" in line]
    return (named or lines or [""])[-1].strip()[:200]


def _gpu_name() -> str:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
