"""Compares our engine with its peers: `python -m benchmarks.run [NAME ...]`.

Ours and the peer run in turn, each in fresh processes, on the same model, first weights, tokens, precision, optimizer
and threads. Both report the loss of their last step. If the losses differ, the programs did not do the same work, and
the comparison fails.
"""

import argparse
import datetime
import math
import os
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import plot, report
from benchmarks.comparisons import COMPARISONS, Comparison, Entry
from benchmarks.process import BenchmarkError, command_of, run, shown
from benchmarks.work import WORKS, make_work
from stack.errors import ConfigError

#: Relative tolerance; in bf16 the order of sums changes the loss.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}

Turn = dict[str, dict[str, Any]]


def main() -> int:
    """Runs the chosen comparisons. The exit code is 1 if one of them failed."""
    args = _arguments()
    results, failed, page = [], 0, None
    for name in args.names or COMPARISONS:
        try:
            found = _compare(COMPARISONS[name], args)
        except BenchmarkError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = 1
            continue
        results += found
        page = report.write(found, args.out)
        plot.draw(report.stored(args.out, args.device), page.with_suffix(".png"), title=report.title(args.device))
    if page:
        print(f"\n{report.table(results)}\n\n{page}\n{page.with_suffix('.png')}")
    return failed


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(COMPARISONS)}")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each contestant")
    parser.add_argument("--steps", type=int, default=12, help="measured optimizer steps of a turn")
    parser.add_argument("--warmup", type=int, default=3, help="optimizer steps before the measured ones")
    parser.add_argument("--work", default="small", help=f"one of {', '.join(WORKS)}")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=VALUE", help="overrides of the work, e.g. seq_len=512"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile ours and the peer in every comparison")
    parser.add_argument("--ranks", type=int, help="instead of the comparison's ranks, if it has no pipeline")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the results")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in COMPARISONS]:
        parser.error(f"no comparison {', '.join(unknown)}; there are {', '.join(COMPARISONS)}")
    if min(args.repeats, args.steps) < 1 or args.warmup < 0:
        parser.error("--repeats and --steps must be at least 1 and --warmup at least 0")
    try:
        make_work(args.work, args.set)
    except ConfigError as error:
        parser.error(str(error))
    return args


def _compare(comparison: Comparison, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs all turns of a comparison. Returns a result for each setting of ours."""
    work, variant = make_work(args.work, args.set), _variant(args)
    contestants = {"peer": comparison.peer, **{name: ("ours", *e.arguments) for name, e in comparison.ours.items()}}
    commands = {name: _command(comparison, contestant, args) for name, contestant in contestants.items()}
    turns = [
        _turn(commands, args, title=f"{comparison.name} {turn}/{args.repeats}", tolerance=LOSS_TOLERANCE[work.dtype])
        for turn in range(1, args.repeats + 1)
    ]
    shared = {
        "comparison": comparison.name,
        "variant": variant,
        "device": args.device,
        "about": comparison.about,
        "work": str(work),
        "steps": f"{args.warmup} to warm up, then {args.steps} measured",
        "command": shlex.join(["python", "-m", "benchmarks.run", *sys.argv[1:]]),
        "versions": report.versions(),
        "hardware": report.hardware(args.device),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    return [
        _result(f"{comparison.name}{variant}: {name}", entry, commands, turns, key=name) | shared
        for name, entry in comparison.ours.items()
    ]


def _variant(args: argparse.Namespace) -> str:
    """The options that differ from the defaults, for the names of results."""
    words = [args.work] if args.work != "small" else []
    words += args.set + (["compiled"] if args.compile else []) + ([args.device] if args.device != "cpu" else [])
    words += [f"{args.ranks} ranks"] if args.ranks else []
    return f" ({', '.join(words)})" if words else ""


def _result(title: str, entry: Entry, commands: dict[str, list[str]], turns: list[Turn], *, key: str) -> dict[str, Any]:
    pair = {"ours": key, "peer": "peer"}
    ratios = [turn[key]["tokens_per_s"] / turn["peer"]["tokens_per_s"] for turn in turns]
    return {
        "name": title,
        "entry": key,
        **{side: statistics.median(turn[name]["tokens_per_s"] for turn in turns) for side, name in pair.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "spread": [min(ratios), max(ratios)],
        "goal": entry.goal,
        "reached": statistics.median(ratios) >= entry.goal,
        "commands": {side: shown(commands[name]) for side, name in pair.items()},
        "turns": [{side: turn[name] for side, name in pair.items()} for turn in turns],
    }


def _turn(commands: dict[str, list[str]], args: argparse.Namespace, *, title: str, tolerance: float) -> Turn:
    """Runs every contestant once, the peer first.

    Raises:
        BenchmarkError: a contestant failed, or two contestants did not do the same work.
    """
    turn: Turn = {}
    for name, command in commands.items():
        # The load average shows whether the machine was busy with something else.
        load = round(os.getloadavg()[0], 2)
        turn[name] = {**run(command, device=args.device), "load_before": load}
        speed, loss, peer = turn[name]["tokens_per_s"], turn[name]["loss"], turn["peer"]
        ratio = speed / peer["tokens_per_s"]
        print(f"{title} {name}: {speed:,.0f} tokens/s, {ratio:.3f}, loss {loss:.6f}, load {load}", flush=True)
        if not math.isclose(loss, peer["loss"], rel_tol=tolerance):
            raise BenchmarkError(f"the losses differ: {name} {loss}, peer {peer['loss']}: not the same work")
        if turn[name]["split"] != peer["split"]:
            raise BenchmarkError(f"the stages differ: {name} {turn[name]['split']}, peer {peer['split']}")
    return turn


def _command(comparison: Comparison, contestant: tuple[str, ...], args: argparse.Namespace) -> list[str]:
    module, *own = contestant
    shared = ["--work", args.work, *(["--set", *args.set] if args.set else [])]
    shared += ["--steps", str(args.steps), "--warmup", str(args.warmup)]
    if args.compile and module == "ours" and "precision.compile=true" not in own:
        own.insert(own.index("--cfg") + 1, "precision.compile=true")
    if args.compile and module != "ours" and "--compile" not in own:
        own.append("--compile")
    return command_of([module, *own, *shared], ranks=args.ranks or comparison.ranks)


if __name__ == "__main__":
    sys.exit(main())
