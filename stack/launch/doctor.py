"""`stack doctor`: checks the hosts of a run, then the links between its ranks, and with `--parity` its numbers."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from stack.config.compose import compose
from stack.config.places import settled
from stack.errors import HostError
from stack.health.stopped import SIGNALLED
from stack.launch import driver, preflight
from stack.launch.hosts import hosts
from stack.launch.preflight import Report
from stack.launch.signals import stop_requests
from stack.plan.miniature import miniature
from stack.train import rundir

PARITY = "--parity"
#: Folder of the checks' run directories, in `run.root`.
CHECKS = "doctor"
#: The dtypes that `--parity` compares with one process. fp16 is checked in fp32, because the loss scale of fp16 begins
#: too high and skips steps.
_DTYPES = {"fp32": ["fp32"], "bf16": ["fp32", "bf16"], "fp16": ["fp32"]}
_WIDTH = 120


def examine(overrides: Sequence[str], *, parity: bool) -> int:
    """Prints what is wrong with the hosts, links and numbers of a run before the run is started. Returns 0, or the exit
    code of the error with which the run would have ended.

    Raises:
        StackError: the config or the layout are wrong.
    """
    cfg = settled(compose(overrides))
    plan = driver.plan_of(cfg)
    folder = Path(cfg.run.root) / CHECKS
    if cfg.launch.backend != "slurm":
        with stop_requests() as requests:
            reports = preflight.examine(hosts(cfg, plan), folder, requests=requests)
        if requests:
            return SIGNALLED + requests[0]
        if not _are_well(reports):
            return HostError.exit_code
    dtypes = _DTYPES[cfg.precision.dtype] if parity else []
    checked = miniature(cfg, plan) if parity else cfg
    code = driver.check(checked, rundir.create_check(folder, checked, driver.plan_of(checked), parity=dtypes))
    if code == 0:
        print(f"all is well: {plan.world_size} ranks on {plan.nodes} {'host' if plan.nodes == 1 else 'hosts'}")
    return code


def _are_well(reports: Sequence[Report]) -> bool:
    """Prints the table of hosts, then every fault and note."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("host", "", "address", "devices", "memory free", "python", "torch", "deepspeed", "transformers"):
        table.add_column(column, overflow="fold")
    for report in reports:
        table.add_row(report.name, "FAULT" if report.faults else "ok", *_about(report))
    width = max(_WIDTH, shutil.get_terminal_size().columns)
    Console(width=width, highlight=False).print(table)
    for report in reports:
        for line in report.notes:
            print(f"note: {line}")
    faults = [line for report in reports for line in report.faults]
    for line in faults:
        print(f"HostError: {line}", file=sys.stderr)
    if not faults:
        print(flush=True)
    return not faults


def _about(report: Report) -> list[str]:
    about = report.about
    if about is None:
        return []
    own = f"{report.address} ({report.interface})" if report.interface else about.hostname
    devices = f"{len(about.gpus)} x {about.gpus[0].name}" if about.gpus else "CPU"
    versions = [about.versions[name] or "none" for name in ("python", "torch", "deepspeed", "transformers")]
    return [own, devices, f"{about.memory_free / (1 << 30):.1f} GiB", *versions]
