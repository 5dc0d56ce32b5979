"""Writes results: a table on the screen, a JSON file for each result, and a Markdown page for each day."""

import datetime
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.comparisons import COMPARISONS

_VERSIONS = ("torch", "deepspeed", "transformers", "accelerate", "numpy")
_HEADER = ("", "tokens/s", "ratio: median (min-max)", "CPU s a step", "peak MiB a rank", "goal", "reached")

Result = dict[str, Any]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter for speed, and the commit of this checkout."""
    root = Path(__file__).parent
    commit = _output("git", "-C", str(root), "rev-parse", "--short", "HEAD")
    dirty = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    installed = {found.metadata["Name"] for found in metadata.distributions()}
    return {
        "stack": commit + (" with local changes" if dirty else ""),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _VERSIONS if name in installed},
    }


def hardware(device: str) -> dict[str, Any]:
    """Name of the CPU, number of cores, memory, and the GPUs if the benchmark used them."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found: dict[str, Any] = {"cpu": model, "cores": os.cpu_count(), "memory_gib": round(memory / 2**30, 1)}
    if device == "cuda":
        found["gpus"] = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    return found


def title(device: str) -> str:
    """Title of today's page and picture."""
    place = {"cpu": "a CPU", "cuda": "GPUs"}[device]
    return f"Engine on {place}, {datetime.date.today().isoformat()}"


def stored(folder: Path, device: str) -> list[Result]:
    """Today's results on `device`, in the order of `comparisons.py`."""
    today = datetime.date.today().isoformat()
    paths = sorted((folder / "results").glob("*.json"))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    mine = [r for r in results if "comparison" in r and r["device"] == device and r["date"].startswith(today)]
    return sorted(mine, key=_place)


def write(results: Sequence[Result], folder: Path) -> Path:
    """Writes the JSON of each result and the page of the day.

    Returns:
        The path of the page, which has all of today's comparisons in `folder`.
    """
    (folder / "results").mkdir(parents=True, exist_ok=True)
    for result in results:
        text = json.dumps(result, indent=2) + "\n"
        name = re.sub(r"\W+", "_", result["name"])
        (folder / "results" / f"{name}.json").write_text(text, encoding="utf-8")
    device = results[0]["device"]
    path = folder / f"{datetime.date.today().isoformat()}_engine_{device}.md"
    path.write_text(page(stored(folder, device), title=title(device), picture=f"{path.stem}.png"), encoding="utf-8")
    return path


def page(results: Sequence[Result], *, title: str, picture: str) -> str:
    """The Markdown page: a section for each comparison, a row for each entry."""
    lines = [
        f"# {title}",
        "",
        "`stack` (ours) and the other program (the peer) run in turn, each in fresh processes, and end at the same",
        "loss. tokens/s is the speed of the median step, as the median over the turns. A ratio divides our tokens/s by",
        "the peer's of the same turn.",
        "",
        f"![Ratio of tokens/s, ours over the peer's]({picture})",
        "",
    ]
    for (name, variant), found in itertools.groupby(sorted(results, key=_place), key=_section):
        lines += _section_lines(f"{name}{variant}", list(found))
    return "\n".join(lines)


def table(results: Sequence[Result]) -> str:
    """The results as a Markdown table with aligned columns, for the screen."""
    return aligned([_HEADER, *(_row(result, result["name"]) for result in results)])


def _place(result: Result) -> tuple[int, str, str, int]:
    """Sort key of a result: the order of `comparisons.py`, then comparisons that it no longer has."""
    name, entry = result["comparison"], result["entry"]
    order, entries = list(COMPARISONS), list(COMPARISONS[name].ours) if name in COMPARISONS else []
    place = order.index(name) if name in order else len(order)
    return place, name, result["variant"], entries.index(entry) if entry in entries else len(entries)


def _section(result: Result) -> tuple[str, str]:
    return result["comparison"], result["variant"]


def _section_lines(name: str, results: list[Result]) -> list[str]:
    first = results[0]
    rows = [_HEADER, _peer_row(first), *(_row(result, result["entry"]) for result in results)]
    loads = [turn[side]["load_before"] for turn in first["turns"] for side in ("peer", "ours")]
    losses = [turn["ours"]["loss"] for result in results for turn in result["turns"]]
    machine = first["hardware"]
    gpus = f", {' + '.join(machine['gpus'])}" if machine.get("gpus") else ""
    return [
        f"## {name}",
        "",
        first["about"],
        "",
        aligned(rows),
        "",
        f"    {first['command']}",
        f"    peer: {first['commands']['peer']}",
        *(f"    {result['entry']}: {result['commands']['ours']}" for result in results),
        "",
        f"- work: {first['work']}",
        f"- steps of a turn: {first['steps']}; turns: {len(first['turns'])}",
        f"- loss of the last step: peer {first['turns'][0]['peer']['loss']:.6f}, "
        f"ours {min(losses):.6f} to {max(losses):.6f}",
        f"- versions: {', '.join(f'{package} {version}' for package, version in first['versions'].items())}",
        f"- hardware: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB{gpus}",
        f"- load average in the minute before each run, the previous run included: {min(loads)} to {max(loads)}",
        f"- date: {first['date']}",
        "",
    ]


def _row(result: Result, name: str) -> tuple[str, ...]:
    low, high = result["spread"]
    verdict = ("", "") if not result["goal"] else (f">= {result['goal']:.2f}", "yes" if result["reached"] else "NO")
    ratio = f"{result['ratio']:.3f} ({low:.3f}-{high:.3f})"
    return (name, f"{result['ours']:,.0f}", ratio, *_costs(result, "ours"), *verdict)


def _peer_row(result: Result) -> tuple[str, ...]:
    return ("peer", f"{result['peer']:,.0f}", "1", *_costs(result, "peer"), "", "")


def _costs(result: Result, side: str) -> tuple[str, str]:
    """CPU seconds a step of all ranks together, and the peak memory of each rank in the last turn."""
    turns = result["turns"]
    cpu_s = statistics.median(turn[side]["cpu_s_per_step"] for turn in turns)
    return f"{cpu_s:.2f}", " ".join(map(str, turns[-1][side]["peak_mib"]))


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as a Markdown table with aligned columns; the first row is the header."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
