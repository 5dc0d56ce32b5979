"""One job of a sweep: what it is, what its folder says of it, and the command that runs it."""

import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from stack.checkpoint import manifest
from stack.config.compose import compose, from_yaml
from stack.config.multirun import Request, job_id, key_of
from stack.config.places import settled
from stack.config.schema import Config
from stack.errors import LayoutError, StackError
from stack.interpreter import PYTHON
from stack.observe import jsonl
from stack.plan.layout import Plan, make_plan
from stack.train.rundir import RunDir, read_json

#: The `stack` command, by this interpreter.
STACK = (*PYTHON, "-m", "stack")
#: How a job stands. `waiting` to be started, `running`, `stopped` by whoever stopped the sweep.
WAITING, RUNNING, DONE, FAILED, STOPPED = "waiting", "running", "done", "failed", "stopped"


@dataclass
class Job:
    """One job, and how it stands; the scheduler alone changes it."""

    id: str
    swept: list[str]
    """What tells it from the others, for people."""
    overrides: list[str]
    """All of a single run's."""
    cfg: Config
    nodes: int
    ranks_per_node: int
    devices: int
    """GPUs that it needs of a host that has any."""
    folder: Path
    state: str = WAITING
    how: str | None = None
    """Whether this command `started` or `resumed` it, or `skipped` it since it was done before."""
    exit_code: int | None = None
    objective: float | None = None
    """Held-out loss that its run ended with, in nats a token; None where it has none that is finite."""
    loss: float | None = None
    """Training loss of its run's last step, likewise."""
    fault: str | None = None
    """Why it failed, where that was seen from outside."""
    started: float | None = None
    ended: float | None = None

    @property
    def log(self) -> Path:
        """What the command printed, of all its attempts."""
        return self.folder / "log.txt"

    @property
    def name(self) -> str:
        return " ".join(self.swept) or "(no override with several values)"

    @property
    def run(self) -> RunDir | None:
        """Its newest run, if it has any. One that had no checkpoint is left as it is, beside the next one."""
        runs = sorted(self.folder.glob("*/*/config.yaml"), key=lambda file: file.parent.name)
        return RunDir(runs[-1].parent) if runs else None

    def row(self) -> dict[str, Any]:
        """Its line in sweep.jsonl. Times are seconds since 1970."""
        run = self.run
        return {
            "job": self.id,
            "overrides": self.swept,
            "state": self.state,
            "how": self.how,
            "exit_code": self.exit_code,
            "objective": self.objective,
            "loss": self.loss,
            "run": str(run.path) if run else None,
            "started": self.started,
            "ended": self.ended,
            "wandb_id": _wandb_id(run) if run else None,
        }


def make_job(request: Request, swept: Sequence[str], folder: Path, devices: int | None) -> Job:
    """A job that can be run, as far as that is known before it is started.

    Args:
        swept: what the sweeper gives it.
        folder: of the sweep.
        devices: GPUs of this host that it gets; None where it takes one for each rank, or none at all.

    Raises:
        StackError: its config or its layout is wrong; the line names the job.
    """
    overrides = request.job(swept)
    identity = job_id([line for line in overrides if key_of(line) != "run.root"])
    own = folder / identity
    told = [line for line in overrides if key_of(line) != "run.root"]
    told.append(f"run.root={_quoted(own)}")
    try:
        cfg = settled(compose(told))
        _check_allocation(cfg)
        if cfg.log.wandb.group is None:
            told.append(f"log.wandb.group={_quoted(folder.name)}")
        plan = _plan(cfg, None if is_elsewhere(cfg) else devices)
        ranks = plan.world_size // plan.nodes
        return Job(identity, list(swept), told, cfg, plan.nodes, ranks, devices or ranks, own)
    except StackError as error:
        raise type(error)(f"job {' '.join(swept)}: {error}" if swept else str(error)) from error


def _plan(cfg: Config, devices: int | None) -> Plan:
    """
    Raises:
        LayoutError: the ranks do not fit together, or not to the devices.
    """
    if devices is None:
        return make_plan(cfg)
    if cfg.launch.ranks_per_node == "auto":
        # In the job it is the GPUs that the job sees.
        cfg = replace(cfg, launch=replace(cfg.launch, ranks_per_node=devices))
    plan = make_plan(cfg)
    ranks = plan.world_size // plan.nodes
    if ranks > devices:
        raise LayoutError(
            f"launch.ranks_per_node={ranks} is more than hydra.launcher.devices={devices}, and NCCL takes one rank a "
            f"GPU; use hydra.launcher.devices={ranks}"
        )
    return plan


def look(job: Job) -> list[str] | None:
    """The verb and arguments that the job needs yet, or None where it is done; by what lies in its folder."""
    run = job.run
    if run is None:
        return ["train", *job.overrides]
    if run.done.exists():
        return None
    cfg = from_yaml(run.config)
    kept = manifest.steps(manifest.root_of(cfg.checkpoint.path, run.path))
    if not kept:
        return ["train", *job.overrides]
    # A run that was killed after its last checkpoint has nothing left to do.
    return ["resume", str(run.path)] if kept[-1] < cfg.train.steps else None


def command(job: Job, arguments: Sequence[str], stack: Sequence[str] = STACK) -> list[str]:
    """The job's command line: with launch.backend=slurm, outside of an allocation, in an allocation of its own."""
    words = [*stack, *arguments]
    if not needs_allocation(job.cfg):
        return words
    size = [f"--nodes={job.nodes}", f"--ntasks-per-node={job.ranks_per_node}"]
    options = job.cfg.launch.slurm
    return ["salloc", f"--job-name={job.cfg.run.name}-{job.id}", *size, *options, *words]


def _check_allocation(cfg: Config) -> None:
    """
    Raises:
        LayoutError: Slurm is to be asked for hosts, and cannot be, or nothing says how many ranks each has.
    """
    if not needs_allocation(cfg):
        return
    if shutil.which("salloc") is None:
        raise LayoutError("launch.backend=slurm: there is no salloc on this host; sweep on a login node of the cluster")
    if cfg.launch.ranks_per_node == "auto":
        raise LayoutError(
            "launch.ranks_per_node=auto: that counts the GPUs of this host, and Slurm gives others; use "
            "launch.ranks_per_node=8"
        )


def needs_allocation(cfg: Config) -> bool:
    """Whether a job waits for hosts that Slurm gives to it alone."""
    return cfg.launch.backend == "slurm" and "SLURM_JOB_ID" not in os.environ


def shares_hosts(cfg: Config) -> bool:
    """Whether a job's hosts are those of all jobs: of a hostfile, or of the allocation that this command runs in."""
    if cfg.launch.backend == "slurm":
        return not needs_allocation(cfg)
    return cfg.launch.hostfile is not None


def is_elsewhere(cfg: Config) -> bool:
    """Whether this command has no say in which devices a job uses."""
    return needs_allocation(cfg) or shares_hosts(cfg)


def losses(job: Job) -> tuple[float | None, float | None]:
    """The last held-out loss of the job's run, and the training loss of its last step, in nats a token; None for what
    it does not have or what is not finite, so that no ranking ever puts it first.

    Raises:
        StackError: metrics.jsonl is damaged.
    """
    run = job.run
    rows = jsonl.latest(jsonl.read(run.metrics)) if run and run.metrics.exists() else []
    # An evaluation before the first step says nothing of the job.
    rows = [row for row in rows if row.step]
    heldout = [row.heldout_loss for row in rows if row.heldout_loss is not None]
    return _last_finite(heldout), _last_finite([row.loss for row in rows])


def _last_finite(values: Sequence[float]) -> float | None:
    return values[-1] if values and math.isfinite(values[-1]) else None


@dataclass(frozen=True)
class Best:
    """The job of a sweep with the lowest loss."""

    job: Job
    measure: str
    """Which loss that is."""
    value: float

    @property
    def command(self) -> str:
        """What a shell takes to go on with its run, to twice the steps."""
        assert self.job.run is not None
        return f"{self.job.run.resume_command} train.steps={2 * self.job.cfg.train.steps}"


def best_of(jobs: Sequence[Job]) -> Best | None:
    """Of the jobs that are done, the one with the lowest held-out loss, or training loss where none was evaluated."""
    done = [job for job in jobs if job.state == DONE]
    for measure, of in (("held-out loss", attrgetter("objective")), ("training loss", attrgetter("loss"))):
        measured = [job for job in done if of(job) is not None]
        if measured:
            best = min(measured, key=of)
            return Best(best, measure, of(best))
    return None


def why_failed(job: Job) -> str:
    """One line: what the run says of itself, else the last thing that was printed."""
    if job.fault:
        return job.fault
    run = job.run
    told = read_json(run.failed) or read_json(run.saved) if run else None
    if told:
        return f"{told['type']}: {told['message'].strip().splitlines()[0]}"
    lines = job.log.read_text(errors="replace").strip().splitlines() if job.log.is_file() else []
    return lines[-1] if lines else "it printed nothing"


def _wandb_id(run: RunDir) -> str | None:
    file = run.path / "wandb" / "run_id"
    return file.read_text().strip() if file.exists() else None


def _quoted(value: object) -> str:
    """Text as Hydra's grammar takes any: in quotes."""
    return json.dumps(str(value), ensure_ascii=False)
