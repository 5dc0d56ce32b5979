"""Compares our engine with what it replaces: `python -m benchmarks.run [NAME ...]`.

Ours and the peer run in turn, each in fresh processes, on the same model, first weights, tokens, precision, optimizer
and threads. Both report the loss of their last step; unless they agree, they did not do the same work.
"""

import argparse
import datetime
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report

#: As in contestants/common.py, which this process does not import: it needs no torch.
RESULT = "RESULT"
LOSS_TOLERANCE = 1e-4
RUN_TIMEOUT_S = 900
ROOT = Path(__file__).parents[1]
WORK = (
    "Llama 8 layers x 256 (intermediate 688, 8 heads, 4 kv heads, vocabulary 4096, untied), fp32, AdamW, clipping at "
    "1, 8 microbatches of 2 x 256 tokens a replica and step"
)


class BenchmarkError(Exception):
    """A contestant failed, or the two did not do the same work."""


@dataclass(frozen=True)
class Comparison:
    """Two contestants on equally many ranks; a contestant is its module and its own arguments."""

    name: str
    about: str
    ranks: int
    ours: tuple[str, ...]
    peer: tuple[str, ...]
    goal: float


COMPARISONS = {
    comparison.name: comparison
    for comparison in (
        Comparison(
            name="zero3_vs_plain",
            about="pp1 x dp2: our ZeRO-3 against the plain DeepSpeed ZeRO-3 loop.",
            ranks=2,
            ours=("ours", "--pipeline", "1", "--zero", "3"),
            peer=("plain_zero3",),
            goal=1.2,
        ),
        Comparison(
            name="zero1_pipeline_vs_pipeline_engine",
            about="pp2 x dp2: our ZeRO-1 pipeline against DeepSpeed's PipelineEngine with ZeRO-1.",
            ranks=4,
            ours=("ours", "--pipeline", "2", "--zero", "1"),
            peer=("pipeline_engine",),
            goal=1.0,
        ),
        Comparison(
            name="zero3_pipeline_vs_pipeline_engine",
            about="pp2 x dp2: our ZeRO-3 pipeline against DeepSpeed's PipelineEngine with ZeRO-1, the most it can.",
            ranks=4,
            ours=("ours", "--pipeline", "2", "--zero", "3"),
            peer=("pipeline_engine",),
            goal=0.95,
        ),
    )
}


def main() -> int:
    """Runs the chosen comparisons; the exit code is 1 when one could not be made."""
    args = _arguments()
    results = []
    for name in args.names or COMPARISONS:
        try:
            results.append(_compare(COMPARISONS[name], args))
        except BenchmarkError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        page = report.write(results[-1:], args.out)
    print(f"\n{report.table(results)}\n\n{page}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(COMPARISONS)}")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each contestant")
    parser.add_argument("--steps", type=int, default=12, help="measured optimizer steps of a turn")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them, discarded")
    parser.add_argument("--checkpoint", choices=("none", "full"), default="none", help="of activations, for both")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the results")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in COMPARISONS]:
        parser.error(f"no comparison {', '.join(unknown)}; there are {', '.join(COMPARISONS)}")
    if min(args.repeats, args.steps) < 1 or args.warmup < 0:
        parser.error("--repeats and --steps must be at least 1 and --warmup at least 0")
    return args


def _compare(comparison: Comparison, args: argparse.Namespace) -> dict[str, Any]:
    contestants = {"ours": comparison.ours, "peer": comparison.peer}
    commands = {side: _command(comparison, contestant, args) for side, contestant in contestants.items()}
    turns = [_turn(commands, title=f"{comparison.name} {turn}/{args.repeats}") for turn in range(1, args.repeats + 1)]
    ratios = [turn["ours"]["tokens_per_s"] / turn["peer"]["tokens_per_s"] for turn in turns]
    return {
        "name": comparison.name,
        "about": comparison.about,
        **{side: statistics.median(turn[side]["tokens_per_s"] for turn in turns) for side in commands},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "spread": [min(ratios), max(ratios)],
        "goal": comparison.goal,
        "reached": statistics.median(ratios) >= comparison.goal,
        "work": f"{WORK}; activation checkpointing {args.checkpoint}",
        "steps": f"{args.warmup} to warm up, then {args.steps} measured",
        "command": shlex.join(["python", "-m", "benchmarks.run", *sys.argv[1:]]),
        "commands": {side: shlex.join(["python", *command[1:]]) for side, command in commands.items()},
        "turns": turns,
        "versions": report.versions(),
        "hardware": report.hardware(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _turn(commands: dict[str, list[str]], *, title: str) -> dict[str, dict[str, Any]]:
    """Runs ours, then the peer.

    Raises:
        BenchmarkError: they did not do the same work.
    """
    turn = {}
    for side, command in commands.items():
        # Tells a reader whether the machine was busy with something else.
        load = round(os.getloadavg()[0], 2)
        turn[side] = {**_run(command), "load_before": load}
        speed, loss = turn[side]["tokens_per_s"], turn[side]["loss"]
        print(f"{title} {side}: {speed:,.0f} tokens/s, loss {loss:.6f}, load before {load}", flush=True)
    ours, peer = turn["ours"], turn["peer"]
    if not math.isclose(ours["loss"], peer["loss"], rel_tol=LOSS_TOLERANCE):
        raise BenchmarkError(f"the losses differ: ours {ours['loss']}, peer {peer['loss']}: not the same work")
    if ours["split"] != peer["split"]:
        raise BenchmarkError(f"the stages differ: ours start at layers {ours['split']}, peer at {peer['split']}")
    return turn


def _command(comparison: Comparison, contestant: tuple[str, ...], args: argparse.Namespace) -> list[str]:
    module, *own = contestant
    shared = ["--steps", str(args.steps), "--warmup", str(args.warmup), "--checkpoint", args.checkpoint]
    # Standalone: on a port that is free.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(comparison.ranks)]
    return [sys.executable, *launcher, "-m", f"benchmarks.contestants.{module}", *own, *shared]


def _run(command: list[str]) -> dict[str, Any]:
    """Runs one contestant in fresh processes.

    Raises:
        BenchmarkError: it failed, or took too long.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=RUN_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise BenchmarkError(f"no end after {RUN_TIMEOUT_S} s: {shlex.join(command)}") from error
    finally:
        # On SIGTERM the launcher stops its ranks; SIGKILL would leave them behind.
        process.terminate()
        process.wait()
    found = [line for line in output.splitlines() if line.startswith(RESULT)]
    if process.returncode or not found:
        tail = "\n".join(output.splitlines()[-80:])
        raise BenchmarkError(f"exit code {process.returncode}: {shlex.join(command)}\n{tail}")
    return json.loads(found[-1].removeprefix(RESULT))


if __name__ == "__main__":
    sys.exit(main())
