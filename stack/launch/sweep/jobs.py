"""One job of a sweep: its settings, its state according to its folder, and the command that runs it."""

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

#: The `stack` command, with this interpreter.
STACK = (*PYTHON, "-m", "stack")
#: States of a job. A waiting job has not been started; a stopped one was stopped with the sweep.
WAITING, RUNNING, DONE, FAILED, STOPPED = "waiting", "running", "done", "failed", "stopped"


@dataclass
class Job:
    """One job and its state. Only the scheduler changes it."""

    id: str
    swept: list[str]
    """The overrides that distinguish the job from the others, for messages."""
    overrides: list[str]
    """All overrides of the job's command."""
    cfg: Config
    nodes: int
    ranks_per_node: int
    devices: int
    """GPUs that the job needs on a host with GPUs."""
    folder: Path
    state: str = WAITING
    how: str | None = None
    """Whether this command `started` or `resumed` the job, or `skipped` it because it was done before."""
    exit_code: int | None = None
    objective: float | None = None
    """Last held-out loss of its run, in nats per token; None if there is no finite one."""
    loss: float | None = None
    """Training loss of the last step of its run, in nats per token; None if it is not finite."""
    fault: str | None = None
    """Why the job failed, if this process and not the job itself reported the failure."""
    started: float | None = None
    ended: float | None = None

    @property
    def log(self) -> Path:
        """The output of the command, of all attempts."""
        return self.folder / "log.txt"

    @property
    def name(self) -> str:
        return " ".join(self.swept) or "(no override with several values)"

    @property
    def run(self) -> RunDir | None:
        """The newest run of the job, or None. An earlier run that had no checkpoint stays in the folder."""
        runs = sorted(self.folder.glob("*/*/config.yaml"), key=lambda file: file.parent.name)
        return RunDir(runs[-1].parent) if runs else None

    def row(self) -> dict[str, Any]:
        """The line of the job in sweep.jsonl. Times are seconds since 1970."""
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
    """Makes a job, and checks what can be checked before it is started.

    Args:
        swept: the overrides from the sweeper.
        folder: folder of the sweep.
        devices: GPUs of this host for the job; None if the job takes one for each rank, or no GPU.

    Raises:
        StackError: the config or the layout is wrong; the message names the job.
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
        LayoutError: the layout is wrong, or needs more ranks than `devices`.
    """
    if devices is None:
        return make_plan(cfg)
    if cfg.launch.ranks_per_node == "auto":
        # The job itself resolves auto to the number of GPUs that it sees.
        cfg = replace(cfg, launch=replace(cfg.launch, ranks_per_node=devices))
    plan = make_plan(cfg)
    ranks = plan.world_size // plan.nodes
    if ranks > devices:
        raise LayoutError(
            f"launch.ranks_per_node={ranks} is more than hydra.launcher.devices={devices}, and NCCL takes one rank on "
            f"each; use hydra.launcher.devices={ranks}"
        )
    return plan


def look(job: Job) -> list[str] | None:
    """The verb and arguments that finish the job, according to its folder; None if the job is done."""
    run = job.run
    if run is None:
        return ["train", *job.overrides]
    if run.done.exists():
        return None
    cfg = from_yaml(run.config)
    kept = manifest.steps(manifest.root_of(cfg.checkpoint.path, run.path))
    if not kept:
        return ["train", *job.overrides]
    # A run that was killed after its last checkpoint has no step left.
    return ["resume", str(run.path)] if kept[-1] < cfg.train.steps else None


def command(job: Job, arguments: Sequence[str], stack: Sequence[str] = STACK) -> list[str]:
    """The command line of the job. With launch.backend=slurm outside of an allocation, salloc makes one for the job."""
    words = [*stack, *arguments]
    if not needs_allocation(job.cfg):
        return words
    size = [f"--nodes={job.nodes}", f"--ntasks-per-node={job.ranks_per_node}"]
    options = job.cfg.launch.slurm
    return ["salloc", f"--job-name={job.cfg.run.name}-{job.id}", *size, *options, *words]


def _check_allocation(cfg: Config) -> None:
    """
    Raises:
        LayoutError: the job needs a Slurm allocation, but salloc is missing, or the ranks per host are not given.
    """
    if not needs_allocation(cfg):
        return
    if shutil.which("salloc") is None:
        raise LayoutError("launch.backend=slurm: there is no salloc on this host; sweep on a login node of the cluster")
    if cfg.launch.ranks_per_node == "auto":
        raise LayoutError(
            "launch.ranks_per_node=auto: auto counts the GPUs of this host, but the job runs on hosts from Slurm; use "
            "launch.ranks_per_node=8"
        )


def needs_allocation(cfg: Config) -> bool:
    """Whether a job runs in a Slurm allocation of its own, for which it has to wait."""
    return cfg.launch.backend == "slurm" and "SLURM_JOB_ID" not in os.environ


def shares_hosts(cfg: Config) -> bool:
    """Whether all jobs run on the same hosts: those of a hostfile, or of the allocation in which this command runs."""
    if cfg.launch.backend == "slurm":
        return not needs_allocation(cfg)
    return cfg.launch.hostfile is not None


def is_elsewhere(cfg: Config) -> bool:
    """Whether this command cannot choose the devices of a job."""
    return needs_allocation(cfg) or shares_hosts(cfg)


def losses(job: Job) -> tuple[float | None, float | None]:
    """The last held-out loss of the job's run, and the training loss of its last step, in nats per token. None for a
    loss that is missing or not finite, so that a ranking never puts it first.

    Raises:
        StackError: metrics.jsonl is damaged.
    """
    run = job.run
    rows = jsonl.latest(jsonl.read(run.metrics)) if run and run.metrics.exists() else []
    # An evaluation before the first step measures the first weights, not the job.
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
    """Name of the loss: held-out loss or training loss."""
    value: float

    @property
    def command(self) -> str:
        """Shell command that continues the run to twice the steps."""
        assert self.job.run is not None
        return f"{self.job.run.resume_command} train.steps={2 * self.job.cfg.train.steps}"


def best_of(jobs: Sequence[Job]) -> Best | None:
    """The job that is done and has the lowest held-out loss, or the lowest training loss if no job was evaluated."""
    done = [job for job in jobs if job.state == DONE]
    for measure, of in (("held-out loss", attrgetter("objective")), ("training loss", attrgetter("loss"))):
        measured = [job for job in done if of(job) is not None]
        if measured:
            best = min(measured, key=of)
            return Best(best, measure, of(best))
    return None


def why_failed(job: Job) -> str:
    """One line: the error that the run has recorded, otherwise the last line of the job's output."""
    if job.fault:
        return job.fault
    run = job.run
    told = read_json(run.failed) or read_json(run.saved) if run else None
    if told:
        return f"{told['type']}: {told['message'].strip().splitlines()[0]}"
    lines = job.log.read_text(errors="replace").strip().splitlines() if job.log.is_file() else []
    return lines[-1] if lines else "the job printed nothing"


def _wandb_id(run: RunDir) -> str | None:
    file = run.path / "wandb" / "run_id"
    return file.read_text().strip() if file.exists() else None


def _quoted(value: object) -> str:
    """A value in quotes, so that Hydra's grammar takes any text."""
    return json.dumps(str(value), ensure_ascii=False)
