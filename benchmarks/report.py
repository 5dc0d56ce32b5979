"""Where results go: a table on the screen, one JSON a comparison, one dated Markdown page."""

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_VERSIONS = ("torch", "deepspeed", "transformers", "numpy")
_HEADER = (
    "comparison",
    "tokens/s",
    "peer's",
    "ratio: median (min-max)",
    "peak MiB a rank",
    "peer's",
    "goal",
    "reached",
)


def versions() -> dict[str, str]:
    """Python, the packages that matter, and the commit of this checkout."""
    root = Path(__file__).parent
    commit = _output("git", "-C", str(root), "rev-parse", "--short", "HEAD")
    dirty = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return {
        "stack": commit + (" with local changes" if dirty else ""),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _VERSIONS},
    }


def hardware() -> dict[str, Any]:
    """The CPU's name, its cores and the memory of this machine."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": model, "cores": os.cpu_count(), "memory_gib": round(memory / 2**30, 1)}


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table that is also readable as it stands."""
    rows = [_HEADER, *(_row(result) for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def write(results: list[dict[str, Any]], folder: Path) -> Path:
    """Writes the JSON of each result and the page of the day.

    Returns:
        The page; it has every comparison that `folder` has from today.
    """
    (folder / "results").mkdir(parents=True, exist_ok=True)
    for result in results:
        text = json.dumps(result, indent=2) + "\n"
        name = re.sub(r"\W+", "_", result["name"])
        (folder / "results" / f"{name}.json").write_text(text, encoding="utf-8")
    today = datetime.date.today().isoformat()
    stored = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "results").glob("*.json"))]
    page = folder / f"{today}_engine_cpu.md"
    page.write_text(_page([r for r in stored if r["date"].startswith(today)], today), encoding="utf-8")
    return page


def _row(result: dict[str, Any]) -> tuple[str, ...]:
    low, high = result["spread"]
    verdict = ("", "") if not result["goal"] else (f">= {result['goal']:.2f}", "yes" if result["reached"] else "NO")
    return (
        result["name"],
        f"{result['ours']:,.0f}",
        f"{result['peer']:,.0f}",
        f"{result['ratio']:.3f} ({low:.3f}-{high:.3f})",
        _peak(result, "ours"),
        _peak(result, "peer"),
        *verdict,
    )


def _peak(result: dict[str, Any], side: str) -> str:
    """Largest resident memory of each rank in the last turn."""
    return " ".join(map(str, result["turns"][-1][side]["peak_rss_mib"]))


def _page(results: list[dict[str, Any]], today: str) -> str:
    lines = [
        f"# Engine on a CPU, {today}",
        "",
        "Ours and the peer run in turn, each in fresh processes. tokens/s: of the median step, median over the turns.",
        "",
        table(results),
        "",
    ]
    for result in results:
        machine, turns = result["hardware"], result["turns"]
        loads = " ".join(str(turn[side]["load_before"]) for turn in turns for side in ("ours", "peer"))
        lines += [
            f"## {result['name']}",
            "",
            result["about"],
            "",
            f"    {result['command']}",
            f"    ours: {result['commands']['ours']}",
            f"    peer: {result['commands']['peer']}",
            "",
            f"- work: {result['work']}",
            f"- steps of a turn: {result['steps']}",
            f"- loss of the last step: ours {turns[0]['ours']['loss']:.6f}, peer {turns[0]['peer']['loss']:.6f}",
            f"- versions: {', '.join(f'{name} {version}' for name, version in result['versions'].items())}",
            f"- hardware: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
            f"- CPU seconds a step, all ranks together: ours {_cpu(turns, 'ours')}, peer {_cpu(turns, 'peer')}",
            f"- load average of the minute before each run, the run before it included: {loads}",
            f"- date: {result['date']}",
            "",
        ]
    return "\n".join(lines)


def _cpu(turns: list[dict[str, Any]], side: str) -> str:
    return f"{statistics.median(turn[side]['cpu_s_per_step'] for turn in turns):.2f}"


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
