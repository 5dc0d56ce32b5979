"""How time and memory of a step grow with the work: `python -m benchmarks.scaling [AXIS ...]`.

Each axis starts from one base point and changes one setting. Time and memory must not grow faster than the arithmetic
of the step (model FLOPs, from `stack.plan.shape`). The page therefore shows the fitted exponents of all of them.
"""

import argparse
import dataclasses
import datetime
import json
import math
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import plot, report
from benchmarks.process import BenchmarkError, command_of, run, shown
from benchmarks.work import Work, make_work

#: A fitted exponent may exceed that of the arithmetic by this much.
MARGIN = 0.1
#: The measures that exponents are fitted to, with their titles.
MEASURES = {"step_s": "step time", "cpu_s_per_step": "CPU time", "grown_mib": "peak memory"}
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Point:
    """One run of ours: its place on an axis, its ranks, its pipeline stages and its overrides of the work."""

    x: int
    ranks: int = 4
    pipeline: int = 2
    settings: tuple[str, ...] = ()

    @property
    def replicas(self) -> int:
        return self.ranks // self.pipeline

    @property
    def work(self) -> Work:
        return make_work("small", self.settings)

    def command(self, args: argparse.Namespace) -> list[str]:
        contestant = ["ours", "--cfg", f"parallel.pipeline={self.pipeline}", "parallel.zero=3", "--work", "small"]
        contestant += ["--set", *self.settings] if self.settings else []
        contestant += ["--steps", str(args.steps), "--warmup", str(args.warmup)]
        return command_of(contestant, ranks=self.ranks)


@dataclass(frozen=True)
class Axis:
    """Points that differ from the base point in one setting."""

    name: str
    label: str
    about: str
    points: list[Point] = field(default_factory=list)


#: Sequences of a step at the base point: 2 replicas with 8 microbatches of 2 sequences.
_SEQUENCES = 32
AXES = {
    axis.name: axis
    for axis in (
        Axis(
            "seq_len",
            "tokens in a sequence",
            "pp2 x dp2; the number of sequences a step is constant, so the tokens grow with the length.",
            [Point(n, settings=(f"seq_len={n}",) if n != 256 else ()) for n in (128, 256, 512, 1024)],
        ),
        Axis(
            "microbatches",
            "microbatches",
            "pp2 x dp2; the number of microbatches of a replica grows, with 2 x 256 tokens each.",
            [Point(n, settings=(f"microbatches={n}",) if n != 8 else ()) for n in (2, 4, 8, 16)],
        ),
        Axis(
            "stages",
            "stages",
            f"4 ranks as pp1 x dp4, pp2 x dp2 and pp4 x dp1; always {_SEQUENCES} sequences of 256 tokens a step.",
            [
                Point(n, pipeline=n, settings=(f"microbatches={_SEQUENCES * n // 8}",) if n != 2 else ())
                for n in (1, 2, 4)
            ],
        ),
        Axis(
            "layers",
            "decoder layers",
            "pp2 x dp2; the embedding and the head are the same at every point.",
            [Point(n, settings=(f"shape.num_hidden_layers={n}",) if n != 8 else ()) for n in (2, 4, 8, 16)],
        ),
        Axis(
            "ranks",
            "ranks",
            "pp1, data parallel only; each replica has 8 microbatches of 2 x 256 tokens, so work grows with ranks.",
            [Point(n, ranks=n, pipeline=1) for n in (1, 2, 4)],
        ),
    )
}


def main() -> int:
    """Measures the chosen axes; the exit code is 1 when a contestant failed."""
    args = _arguments()
    names = args.names or list(AXES)
    kept: dict[Point, dict[str, Any]] = {}
    axes: list[dict[str, Any]] = []
    try:
        for name in names:
            axes.append(_measured(AXES[name], args, kept, title=f"{name} ({len(axes) + 1}/{len(names)})"))
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    result = {
        "name": "scaling",
        "command": shlex.join(["python", "-m", "benchmarks.scaling", *sys.argv[1:]]),
        "work": str(make_work("small")),
        "steps": f"{args.warmup} to warm up, then {args.steps} measured",
        "repeats": args.repeats,
        "versions": report.versions(),
        "hardware": report.hardware("cpu"),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "axes": axes,
    }
    (args.out / "results").mkdir(parents=True, exist_ok=True)
    (args.out / "results" / "scaling.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (args.out / "scaling.md").write_text(page(result), encoding="utf-8")
    plot.draw_scaling(axes, args.out / "scaling.png", measures=MEASURES)
    print(f"{args.out / 'scaling.md'}\n{args.out / 'scaling.png'}")
    return 0


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The e of y = c * x**e by least squares of the logarithms."""
    return statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope


def page(result: dict[str, Any]) -> str:
    """The Markdown page: a table of exponents, then the points of each axis."""
    axes = result["axes"]
    machine = result["hardware"]
    lines = [
        "# Scaling of the engine on a CPU",
        "",
        "All axes start from one base point: 4 ranks as pp2 x dp2, ZeRO-3, the small work. An axis changes one",
        "setting. A power law is fitted to the points of each axis, and the table shows its exponents. FASTER marks",
        f"an exponent that exceeds that of the arithmetic (model FLOPs of a step) by more than {MARGIN}. Memory is the",
        "largest growth of a rank's memory from the time before the model was built to its peak.",
        "",
        "![Growth along each axis](scaling.png)",
        "",
        _rows(["axis", *MEASURES.values(), "arithmetic"], [_exponent_cells(axis) for axis in axes]),
        "",
        f"    {result['command']}",
        "",
        f"- base work: {result['work']}",
        f"- steps of a point: {result['steps']}; median of {result['repeats']} runs",
        f"- versions: {', '.join(f'{name} {version}' for name, version in result['versions'].items())}",
        f"- hardware: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
        f"- date: {result['date']}",
        "",
    ]
    for axis in axes:
        header = [axis["label"], "ranks", "tokens/s", "step s", "CPU s a step", "memory MiB", "TFLOPs a step"]
        lines += [f"## {axis['name']}", "", axis["about"], "", _rows(header, map(_point_cells, axis["points"])), ""]
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="AXIS", help=f"default: {' '.join(AXES)}")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each point; the page shows their median")
    parser.add_argument("--steps", type=int, default=4, help="measured optimizer steps of a run")
    parser.add_argument("--warmup", type=int, default=2, help="optimizer steps before the measured ones")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in AXES]:
        parser.error(f"no axis {', '.join(unknown)}; there are {', '.join(AXES)}")
    if min(args.repeats, args.steps) < 1 or args.warmup < 0:
        parser.error("--repeats and --steps must be at least 1 and --warmup at least 0")
    return args


def _measured(axis: Axis, args: argparse.Namespace, kept: dict[Point, dict[str, Any]], *, title: str) -> dict[str, Any]:
    """Measures the points of an axis and fits the exponents. A point that several axes share is measured once."""
    points = []
    for point in axis.points:
        same = dataclasses.replace(point, x=0)
        if same not in kept:
            kept[same] = _measure(point, args)
        found = {"x": point.x, "ranks": point.ranks, "flops": point.work.flops(point.replicas), **kept[same]}
        print(
            f"{title} {point.x}: {found['tokens_per_s']:,.0f} tokens/s, step {found['step_s']:.2f} s, "
            f"CPU {found['cpu_s_per_step']:.2f} s, {found['grown_mib']} MiB",
            flush=True,
        )
        points.append(found)
    xs = [point["x"] for point in points]
    exponents = {key: exponent(xs, [point[key] for point in points]) for key in (*MEASURES, "flops")}
    return {
        "name": axis.name,
        "label": axis.label,
        "about": axis.about,
        "points": points,
        "exponents": exponents,
        "faster_than_arithmetic": [key for key in MEASURES if exponents[key] > exponents["flops"] + MARGIN],
    }


def _measure(point: Point, args: argparse.Namespace) -> dict[str, Any]:
    command = point.command(args)
    runs = [run(command, device="cpu") for _ in range(args.repeats)]
    grown = [max(p - b for p, b in zip(r["peak_mib"], r["rss_before_mib"], strict=True)) for r in runs]
    keys = ("tokens_per_s", "step_s", "cpu_s_per_step")
    return {
        **{key: statistics.median(found[key] for found in runs) for key in keys},
        "grown_mib": statistics.median(grown),
        "command": shown(command),
        "runs": runs,
    }


def _exponent_cells(axis: dict[str, Any]) -> list[str]:
    found = axis["exponents"]
    marks = {key: " FASTER" if key in axis["faster_than_arithmetic"] else "" for key in MEASURES}
    return [axis["name"], *(f"{found[key]:.2f}{marks[key]}" for key in MEASURES), f"{found['flops']:.2f}"]


def _point_cells(point: dict[str, Any]) -> list[str]:
    return [
        str(point["x"]),
        str(point["ranks"]),
        f"{point['tokens_per_s']:,.0f}",
        f"{point['step_s']:.2f}",
        f"{point['cpu_s_per_step']:.2f}",
        f"{point['grown_mib']:.0f}",
        f"{point['flops'] / 1e12:.3f}",
    ]


def _rows(header: list[str], rows: Any) -> str:
    return report.aligned([tuple(header), *map(tuple, rows)])


if __name__ == "__main__":
    sys.exit(main())
