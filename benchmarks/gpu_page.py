"""The suite's results as Markdown: a table for each part of each run."""

from typing import Any

#: For each column: its title, the key of the job, a factor, and the number of decimals.
_COLUMNS: tuple[tuple[str, str, float, int], ...] = (
    ("tokens/s", "tokens_per_s", 1, 0),
    ("step s", "step_s", 1, 3),
    ("MFU %", "mfu", 100, 1),
    ("% of measured peak", "of_measured", 100, 1),
    ("peak GiB", "peak_gib", 1, 2),
    ("plan GiB", "plan_gib", 1, 2),
    ("peak / plan", "peak_over_plan", 1, 3),
    ("host plan GiB", "host_gib", 1, 1),
    ("layers", "layers", 1, 0),
    ("parameters B", "params_b", 1, 2),
    ("matmul TFLOP/s", "matmul_tflops", 1, 0),
    ("passed", "passed", 1, 0),
    ("loss", "loss", 1, 5),
)


def page(records: list[dict[str, Any]]) -> str:
    """The Markdown page of all runs, the newest first."""
    lines = ["# One GPU: results", "", "Written by `python -m benchmarks.gpu`. gpu.md describes the jobs.", ""]
    for record in reversed(records):
        lines += [f"## {record['date']}, {record['gpu'] or record['device']}", "", f"    {record['command']}", ""]
        lines += [f"Work: {record['work']}.", ""]
        for part, title in record["parts"].items():
            if jobs := [_shown(job) for job in record["jobs"] if job["part"] == part]:
                lines += [f"### {part}: {title}", "", *_table(jobs), "", *_details(jobs)]
    return "\n".join(lines)


def _shown(job: dict[str, Any]) -> dict[str, Any]:
    if "peak_mib" in job:
        job = {**job, "peak_gib": max(job["peak_mib"]) / 1024}
    return job


def _table(jobs: list[dict[str, Any]]) -> list[str]:
    columns = [column for column in _COLUMNS if any(job.get(column[1]) is not None for job in jobs)]
    lines = ["| " + " | ".join(["job", *(column[0] for column in columns), "seconds", "remark"]) + " |"]
    lines.append("|---" * (len(columns) + 3) + "|")
    for job in jobs:
        cells = [_cell(job.get(key), factor, digits) for _, key, factor, digits in columns]
        remark = str(job.get("error", job.get("remark", ""))).replace("|", "/")
        lines.append("| " + " | ".join([job["name"], *cells, f"{job['took_s']:.0f}", remark]) + " |")
    return lines


def _cell(value: float | None, factor: float, digits: int) -> str:
    return "" if value is None else f"{value * factor:,.{digits}f}"


def _details(jobs: list[dict[str, Any]]) -> list[str]:
    """Results that are not numbers: the environment, and the tests that did not pass."""
    lines = [f"- {name}: {value}" for job in jobs for name, value in job.get("versions", {}).items()]
    lines += [f"- {line}" for job in jobs for line in job.get("summary", []) if not line.startswith("PASSED")]
    return [*lines, ""] if lines else []
