"""A run directory as Weights & Biases gets it, while it trains and afterwards."""

import json
import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from stack.checkpoint import manifest
from stack.config.compose import from_yaml
from stack.config.schema import Config
from stack.disk import write_whole
from stack.errors import Requeue, StackError, UsageError
from stack.observe.jsonl import read
from stack.observe.wandb import library
from stack.observe.wandb.session import Facts, Session, exports_in, run_id
from stack.train import rundir
from stack.train.lock import RunLock
from stack.train.rundir import RunDir


def facts(run: RunDir, cfg: Config) -> Facts:
    """What W&B is to know of a run. `ds_config.json` is a part of it where there is one yet."""
    files = [run.config, run.ds_config, run.plan, run.plan.with_suffix(".txt")]
    return Facts(
        folder=run.path,
        name=run.run_id,
        metrics=run.metrics,
        checkpoints=manifest.root_of(cfg.checkpoint.path, run.path),
        exports=run.exports,
        files=tuple(file for file in files if file.is_file()),
        config={**asdict(cfg), "ds_config": _ds_config(run)},
        started=run.started,
        attempt=run.attempt,
    )


def _ds_config(run: RunDir) -> dict[str, Any] | None:
    """None where there is none yet, or where the file is damaged."""
    try:
        return rundir.read_json(run.ds_config)
    except (OSError, ValueError):
        return None


def sync(run: RunDir, overrides: list[str]) -> int:
    """Brings the run's W&B run up to all that the run directory has, and prints a line.

    Sends only what is not there: rows by (step, attempt), files and summaries by name, artifacts by content. Sent
    offline or never, of whichever attempt, it becomes the one W&B run that the run directory has the id of.

    Args:
        overrides: `log.wandb...`, where the run is to be found elsewhere than it was configured.

    Raises:
        UsageError: the run is at work, and its own W&B too, or finished no step.
        StackError: the server does not take it, or did not take all.
    """
    cfg = from_yaml(run.config, overrides)
    if not run.metrics.is_file() or not (rows := len(read(run.metrics))):
        raise UsageError(f"{run.path} finished no step; there is nothing to upload")
    # A run that was shared stays so: there the server numbers its rows.
    mode = "shared" if cfg.log.wandb.mode == "shared" else "online"
    settings = replace(cfg.log.wandb, mode=mode)
    exit_code = 0 if run.done.exists() else Requeue.exit_code if run.saved.exists() else 1
    with RunLock(run.path):
        # A damaged id is told before the library starts a service, which would have to be ended.
        run_id(run.path)
        uploading = Session(facts(run, cfg), settings, note=print)
        sent = _send(uploading, lambda: uploading.end(exit_code))
        # Opened again: the server itself is asked whether it has all.
        asking = Session(facts(run, cfg), settings, note=lambda _: None)
        missing = _send(asking, lambda: asking.close(exit_code))
    if missing:
        raise StackError(
            f"W&B did not take {missing} of {rows} rows; run stack wandb-sync {shlex.quote(str(run.path))} again"
        )
    print(f"{rows} rows are in W&B, {sent} of them new")
    return 0


def _send(session: Session, close: Callable[[], None]) -> int:
    """The number of rows that were not there.

    Raises:
        StackError: W&B cannot be reached, or the upload took too long.
    """
    try:
        session.open(fallback=False)
        close()
    except BaseException as error:
        # The library's exit hook would go on waiting for the server.
        library.kill()
        if isinstance(error, library.failures()):
            late = isinstance(error, TimeoutError)
            help_ = "give it more time with log.wandb.timeout_s=600" if late else "check WANDB_API_KEY, WANDB_BASE_URL"
            raise StackError(f"W&B did not take the run ({library.describe(error)}); {help_}") from error
        raise
    return session.sent


def remember_export(run: RunDir, folder: Path) -> None:
    """Notes a folder that the run was exported to, for W&B. A run directory that cannot be written stays as it is."""
    try:
        known = exports_in(run.exports)
        if str(folder) not in known:
            write_whole(run.exports, json.dumps([*known, str(folder)]) + "\n")
    except (OSError, ValueError) as error:
        print(f"the export is whole, but {run.exports} cannot be added to ({error}): W&B will not know of it")
