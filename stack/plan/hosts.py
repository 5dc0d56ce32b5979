"""Determines the hosts of a run and the ranks on each, from the hostfile, the Slurm allocation, or this machine."""

import os
import re
from pathlib import Path

from stack.config.schema import Config
from stack.config.values import show
from stack.disk import read_regular
from stack.errors import LayoutError
from stack.plan.policies import local_devices

#: Ranks on a host without a GPU: two stages x two replicas is the smallest layout with both kinds of parallelism.
CPU_RANKS = 4
#: Upper bound of launch.ranks_per_node in the schema.
_MOST_SLOTS = 1024
_LINE = re.compile(r"(?P<name>\w[\w.:%@-]*)\s+slots\s*=\s*(?P<slots>[1-9]\d*)")
_EXAMPLE = "a line is NAME slots=RANKS, for example node-0 slots=8"


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Reads a hostfile: host -> its slots, in the order of the file. A # starts a comment.

    Raises:
        LayoutError: the file cannot be read, or is not a hostfile.
    """
    given = f"launch.hostfile={show(path)}"
    try:
        lines = read_regular(Path(path)).decode().splitlines()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "not text"
        raise LayoutError(f"{given}: cannot be read ({why}); {_EXAMPLE}") from error
    found: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not (entry := line.partition("#")[0].strip()):
            continue
        if not (match := _LINE.fullmatch(entry)):
            raise LayoutError(f"{given}, line {number}: '{show(entry)}' is no host; {_EXAMPLE}")
        slots = match["slots"]
        if len(slots) > len(str(_MOST_SLOTS)) or int(slots) > _MOST_SLOTS:
            raise LayoutError(
                f"{given}, line {number}: slots={show(slots)}: no host has so many; use at most {_MOST_SLOTS}"
            )
        if match["name"] in found:
            raise LayoutError(f"{given}, line {number}: {match['name']} is listed twice; keep one line")
        found[match["name"]] = int(slots)
    if not found:
        raise LayoutError(f"{given}: names no host; {_EXAMPLE}")
    return found


def hosts_of(cfg: Config) -> dict[str, int] | None:
    """The hosts of the hostfile that the run uses -> their slots; None without a hostfile.

    Raises:
        LayoutError: as for `read_hostfile`; or the file has fewer hosts than `launch.nodes`.
    """
    if cfg.launch.hostfile is None:
        return None
    there = read_hostfile(cfg.launch.hostfile)
    nodes = len(there) if cfg.launch.nodes == "auto" else cfg.launch.nodes
    if nodes > len(there):
        raise LayoutError(
            f"launch.nodes={nodes}: launch.hostfile={cfg.launch.hostfile} has {len(there)}; use launch.nodes=auto"
        )
    return dict(list(there.items())[:nodes])


def ranks_of_hosts(cfg: Config) -> tuple[int, int, str]:
    """The number of hosts, the number of ranks on each, and where the numbers come from, as text.

    Raises:
        LayoutError: as for `hosts_of`; or `launch.ranks_per_node` is larger than a host's slots, or is auto while the
            hosts have different numbers of slots.
    """
    if hosts := hosts_of(cfg):
        ranks, why = _ranks_of_slots(cfg, hosts)
        return len(hosts), ranks, f"launch.hostfile, {why}"
    in_slurm = cfg.launch.backend == "slurm"
    nodes, by = cfg.launch.nodes, "launch.nodes; "
    if nodes == "auto":
        nodes, by = _of_slurm("SLURM_JOB_NUM_NODES") or 1 if in_slurm else 1, ""
    if cfg.launch.ranks_per_node != "auto":
        return nodes, cfg.launch.ranks_per_node, f"{by}launch.ranks_per_node"
    if in_slurm and (tasks := _of_slurm("SLURM_NTASKS_PER_NODE")):
        return nodes, tasks, f"{by}the allocation's tasks per node"
    if gpus := local_devices():
        return nodes, gpus, f"{by}one for each of this host's {gpus} NVIDIA GPUs"
    return nodes, CPU_RANKS, f"{by}no NVIDIA GPU here: the CPU default"


def _of_slurm(variable: str) -> int | None:
    """The number at the start of a Slurm variable, such as 8 in `8(x2)`; None if the variable is not set."""
    found = re.match(r"\d{1,6}(?!\d)", os.environ.get(variable, ""))
    return int(found[0]) if found else None


def _ranks_of_slots(cfg: Config, hosts: dict[str, int]) -> tuple[int, str]:
    fewest = min(hosts, key=lambda name: hosts[name])
    wanted = cfg.launch.ranks_per_node
    if wanted != "auto":
        if wanted > hosts[fewest]:
            raise LayoutError(
                f"launch.ranks_per_node={wanted}: {fewest} has {hosts[fewest]} slots in "
                f"launch.hostfile={cfg.launch.hostfile}; use launch.ranks_per_node={hosts[fewest]}"
            )
        return wanted, "launch.ranks_per_node"
    if len(set(hosts.values())) > 1:
        raise LayoutError(
            f"launch.hostfile={cfg.launch.hostfile}: {fewest} has {hosts[fewest]} slots, others have more, and every "
            f"host must run the same number of ranks; use launch.ranks_per_node={hosts[fewest]}"
        )
    return hosts[fewest], "its slots"
