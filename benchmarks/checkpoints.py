"""Times saving, loading and exporting a state of 300 M parameters. Saving is compared with DeepSpeed's own
`save_checkpoint`, and exporting with a plain copy of the file.

`python -m benchmarks.checkpoints` runs all measurements and writes checkpoints.md.
"""

import argparse
import datetime
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import process
from benchmarks.report import hardware, versions

_PAGE = Path(__file__).with_suffix(".md")
#: Layouts of 4 ranks that load the checkpoint of pp2 x dp2, with their pipeline stages.
_LOADS = {"same: pp2 x dp2": 2, "pp1 x dp4": 1, "pp4 x dp1": 4}
_LOAD_TURNS = 2

Seconds = list[float]


def main() -> int:
    """Runs the measurements and writes the page."""
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints", description=__doc__)
    arguments.add_argument("--work", default="300m", help="name of the work, see benchmarks/work.py")
    arguments.add_argument("--folder", type=Path, help="parent of the checkpoints' folder, on the disk to measure")
    args = arguments.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="stack-bench-", dir=args.folder))
    try:
        saved = _run(args.work, folder, "save", ranks=4)
        loads: dict[str, dict[str, Seconds]] = {name: {"first_s": [], "again_s": [], "verify_s": []} for name in _LOADS}
        for _ in range(_LOAD_TURNS):
            for name, pipeline in _LOADS.items():
                found = _run(args.work, folder, "load", "--pipeline", str(pipeline), ranks=4)
                loads[name]["first_s"].append(found["load_s"][0])
                loads[name]["again_s"] += found["load_s"][1:]
                loads[name]["verify_s"] += found["verify_s"]
        exported = _run(args.work, folder, "export", ranks=1)
    finally:
        shutil.rmtree(folder)
    page = _page(saved, loads, exported)
    _PAGE.write_text(page)
    print(page)
    return 0


def _run(work: str, folder: Path, do: str, *more: str, ranks: int) -> dict[str, Any]:
    contestant = ["checkpoints", "--work", work, "--folder", str(folder), "--do", do, *more]
    print(f"{do} {' '.join(more)}", file=sys.stderr, flush=True)
    return process.run(process.command_of(contestant, ranks=ranks), device="cpu")


def _page(saved: dict[str, Any], loads: dict[str, dict[str, Seconds]], exported: dict[str, Any]) -> str:
    same = statistics.median(loads["same: pp2 x dp2"]["again_s"])
    first = statistics.median(loads["same: pp2 x dp2"]["first_s"])
    stall, write = saved["deepspeed_stall_s"], saved["deepspeed_write_s"]
    rows = [
        ("save", "training waits, s", "ratio to DeepSpeed", "until on the disk, s", "ratio to DeepSpeed"),
        ("DeepSpeed `save_checkpoint`, then fsync", _shown(stall), "", _shown(write), ""),
        *(
            (
                f"ours, {way}",
                _shown(saved[f"{key}_stall_s"]),
                _ratios(saved[f"{key}_stall_s"], stall),
                _shown(saved[f"{key}_write_s"]),
                _ratios(saved[f"{key}_write_s"], write),
            )
            for way, key in (("`async_save=false`", "sync"), ("`async_save=true`", "async"))
        ),
    ]
    ratio = "ratio to the same layout"
    load_rows = [("load into", "first load, s", ratio, "later loads, s", ratio, "verify, s")]
    for name, found in loads.items():
        of_first, of_again = (
            f"{statistics.median(found[k]) / base:.2f}" for k, base in (("first_s", first), ("again_s", same))
        )
        load_rows.append(
            (name, _shown(found["first_s"]), of_first, _shown(found["again_s"]), of_again, _shown(found["verify_s"]))
        )
    rates = [[exported["export_bytes"] / 1e6 / s for s in exported[key]] for key in ("export_s", "copy_s")]
    about = {**versions(), **hardware("cpu")}
    return f"""# Checkpoints of {saved["parameters"] / 1e6:.0f} M parameters, {datetime.date.today().isoformat()}

    python -m benchmarks.checkpoints

Four ranks as pp2 x dp2, ZeRO-3, fp32: {saved["ours_bytes"][0] / 1e9:.2f} GB of masters and AdamW's moments, and
{saved["deepspeed_bytes"][0] / 1e9:.2f} GB in DeepSpeed's files of the same engine. One run makes all three
kinds of saves in turn. Each save begins when the disk is idle, and the first turn is not counted. Seconds are
those of the slowest rank: median (least to most). A ratio compares two saves of the same turn. Goals: with
`async_save=true` the training waits at most 0.25 of DeepSpeed's time, and the files are on the disk within 1.2 of
DeepSpeed's time. DeepSpeed neither hashes its files nor writes them through to the disk, so its second column includes
an fsync of each file.

{_table(rows)}

Each layout loads what pp2 x dp2 saved, in fresh processes, in turn. The first load of a process also allocates the
optimizer's state. Before a load, verifying reads all files, hashes them and looks for values that are not finite.
Goal: a load into another layout takes at most 1.5 of the time of the same layout.

{_table(load_rows)}

Export of the weights to one safetensors file in fp32, in one process: {_rates(rates[0])} MB/s. A plain copy of that
file with fsync: {_rates(rates[1])} MB/s. Ratio within one turn: {_ratios(exported["copy_s"], exported["export_s"])}.

{", ".join(f"{name} {value}" for name, value in about.items())}
"""


def _shown(seconds: Seconds) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f})"


def _rates(rates: list[float]) -> str:
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f}-{max(rates):,.0f})"


def _ratios(ours: Seconds, theirs: Seconds) -> str:
    return _shown([mine / yours for mine, yours in zip(ours, theirs, strict=True)])


def _table(rows: list[tuple[str, ...]]) -> str:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


if __name__ == "__main__":
    sys.exit(main())
