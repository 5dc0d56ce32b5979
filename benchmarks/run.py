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
class Entry:
    """One setting of ours, and the ratio to the peer that it should reach; 0 is a lever that is only shown."""

    arguments: tuple[str, ...]
    goal: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """Settings of ours against one peer on equally many ranks; a contestant is its module and its own arguments."""

    name: str
    about: str
    ranks: int
    ours: dict[str, Entry]
    peer: tuple[str, ...]


#: Where the peer cuts the layers; ours has another cut that is as good.
_PP4 = ("--pipeline", "4", "--split", "0", "3", "5", "7")
_MICROBATCH = ("--reduce", "microbatch", "--gather", "microbatch")

COMPARISONS = {
    comparison.name: comparison
    for comparison in (
        Comparison(
            name="plain_zero3",
            about="pp1 x dp2: our ZeRO-3 against the plain DeepSpeed ZeRO-3 loop.",
            ranks=2,
            ours={"zero3": Entry(("--pipeline", "1", "--zero", "3"), goal=1.2)},
            peer=("plain_zero3",),
        ),
        Comparison(
            name="pipeline_engine_pp2",
            about="pp2 x dp2: ours against DeepSpeed's PipelineEngine with ZeRO-1, the most it can.",
            ranks=4,
            ours={
                "zero1": Entry(("--pipeline", "2", "--zero", "1")),
                "zero1, compiled": Entry(("--pipeline", "2", "--zero", "1", "--compile"), goal=1.1),
                "zero2": Entry(("--pipeline", "2", "--zero", "2")),
                "zero2, reduce=microbatch": Entry(("--pipeline", "2", "--zero", "2", "--reduce", "microbatch")),
                "zero3": Entry(("--pipeline", "2", "--zero", "3")),
                "zero3, compiled": Entry(("--pipeline", "2", "--zero", "3", "--compile"), goal=1.05),
                "zero3, reduce=microbatch": Entry(("--pipeline", "2", "--zero", "3", "--reduce", "microbatch")),
                "zero3, gather=microbatch": Entry(("--pipeline", "2", "--zero", "3", "--gather", "microbatch")),
                "zero3, least memory": Entry(("--pipeline", "2", "--zero", "3", *_MICROBATCH), goal=0.75),
                "zero3, least memory, no leaf layers": Entry(
                    ("--pipeline", "2", "--zero", "3", *_MICROBATCH, "--no-leaf")
                ),
                "zero3, least memory, prefetch": Entry(
                    ("--pipeline", "2", "--zero", "3", *_MICROBATCH, "--prefetch", "1000000")
                ),
                "zero3, small buckets": Entry(("--pipeline", "2", "--zero", "3", "--bucket", "100000")),
            },
            peer=("pipeline_engine",),
        ),
        Comparison(
            name="pipeline_engine_pp4",
            about="pp4: ours against DeepSpeed's PipelineEngine with ZeRO-1.",
            ranks=4,
            ours={
                "zero1": Entry((*_PP4, "--zero", "1")),
                "zero1, compiled": Entry((*_PP4, "--zero", "1", "--compile"), goal=1.1),
                "zero3": Entry((*_PP4, "--zero", "3")),
                "zero3, compiled": Entry((*_PP4, "--zero", "3", "--compile"), goal=1.05),
                "zero3, least memory": Entry((*_PP4, "--zero", "3", *_MICROBATCH), goal=0.75),
            },
            peer=("pipeline_engine", "--stages", "4"),
        ),
        Comparison(
            name="pipeline_engine_compiled",
            about="pp2 x dp2, both with compiled decoder layers.",
            ranks=4,
            ours={
                "zero1, compiled": Entry(("--pipeline", "2", "--zero", "1", "--compile")),
                "zero3, compiled": Entry(("--pipeline", "2", "--zero", "3", "--compile")),
            },
            peer=("pipeline_engine", "--compile"),
        ),
    )
}


def main() -> int:
    """Runs the chosen comparisons; the exit code is 1 when one could not be made."""
    args = _arguments()
    results = []
    for name in args.names or COMPARISONS:
        try:
            found = _compare(COMPARISONS[name], args)
        except BenchmarkError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        results += found
        page = report.write(found, args.out)
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


def _compare(comparison: Comparison, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A result for each setting of ours."""
    contestants = {"peer": comparison.peer, **{name: ("ours", *e.arguments) for name, e in comparison.ours.items()}}
    commands = {name: _command(comparison, contestant, args) for name, contestant in contestants.items()}
    turns = [_turn(commands, title=f"{comparison.name} {turn}/{args.repeats}") for turn in range(1, args.repeats + 1)]
    shared = {
        "about": comparison.about,
        "work": f"{WORK}; activation checkpointing {args.checkpoint}",
        "steps": f"{args.warmup} to warm up, then {args.steps} measured",
        "command": shlex.join(["python", "-m", "benchmarks.run", *sys.argv[1:]]),
        "versions": report.versions(),
        "hardware": report.hardware(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    return [
        _result(f"{comparison.name}: {name}", entry, commands, turns, key=name) | shared
        for name, entry in comparison.ours.items()
    ]


def _result(
    title: str, entry: Entry, commands: dict[str, list[str]], turns: list[dict[str, dict[str, Any]]], *, key: str
) -> dict[str, Any]:
    pair = {"ours": key, "peer": "peer"}
    ratios = [turn[key]["tokens_per_s"] / turn["peer"]["tokens_per_s"] for turn in turns]
    return {
        "name": title,
        **{side: statistics.median(turn[name]["tokens_per_s"] for turn in turns) for side, name in pair.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "spread": [min(ratios), max(ratios)],
        "goal": entry.goal,
        "reached": statistics.median(ratios) >= entry.goal,
        "commands": {side: shlex.join(["python", *commands[name][1:]]) for side, name in pair.items()},
        "turns": [{side: turn[name] for side, name in pair.items()} for turn in turns],
    }


def _turn(commands: dict[str, list[str]], *, title: str) -> dict[str, dict[str, Any]]:
    """Runs every contestant once, the peer first.

    Raises:
        BenchmarkError: they did not do the same work.
    """
    turn: dict[str, dict[str, Any]] = {}
    for name, command in commands.items():
        # Tells a reader whether the machine was busy with something else.
        load = round(os.getloadavg()[0], 2)
        turn[name] = {**_run(command), "load_before": load}
        speed, loss, peer = turn[name]["tokens_per_s"], turn[name]["loss"], turn["peer"]
        ratio = speed / peer["tokens_per_s"]
        print(f"{title} {name}: {speed:,.0f} tokens/s, {ratio:.3f}, loss {loss:.6f}, load {load}", flush=True)
        if not math.isclose(loss, peer["loss"], rel_tol=LOSS_TOLERANCE):
            raise BenchmarkError(f"the losses differ: {name} {loss}, peer {peer['loss']}: not the same work")
        if turn[name]["split"] != peer["split"]:
            raise BenchmarkError(f"the stages differ: {name} {turn[name]['split']}, peer {peer['split']}")
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
