"""Gives the data of a run directory to Weights & Biases, during training and later by `stack wandb-sync`."""

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
    """The data of a run for W&B. ds_config.json is included if it exists already."""
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
    """Content of ds_config.json; None where the file does not exist yet or is damaged."""
    try:
        return rundir.read_json(run.ds_config)
    except (OSError, ValueError):
        return None


def sync(run: RunDir, overrides: list[str]) -> int:
    """Uploads what W&B does not have yet, and prints a line.

    The rows, files and artifacts of all attempts go into the one W&B run whose id is in the run directory, also those
    of attempts that ran offline or with W&B disabled. Rows are compared by (step, attempt), files and summaries by
    name, artifacts by content.

    Args:
        run: the run directory.
        overrides: of keys `log.wandb...`, for another place of the W&B run than the run's config has.

    Returns:
        The exit code 0.

    Raises:
        UsageError: the run is still training, or finished no step.
        StackError: the server cannot be reached or refuses, or did not take all rows.
    """
    cfg = from_yaml(run.config, overrides)
    if not run.metrics.is_file() or not (rows := len(read(run.metrics))):
        raise UsageError(f"{run.path} finished no step; there is nothing to upload")
    # A run that began in shared mode stays in it, because there the server numbers the rows.
    mode = "shared" if cfg.log.wandb.mode == "shared" else "online"
    settings = replace(cfg.log.wandb, mode=mode)
    exit_code = 0 if run.done.exists() else Requeue.exit_code if run.saved.exists() else 1
    with RunLock(run.path):
        # Reads the id first, so that a damaged one is refused before the library starts its service process.
        run_id(run.path)
        uploading = Session(facts(run, cfg), settings, note=print)
        sent = _send(uploading, lambda: uploading.end(exit_code))
        # The W&B run is opened a second time to ask the server whether it has all rows.
        asking = Session(facts(run, cfg), settings, note=lambda _: None)
        missing = _send(asking, lambda: asking.close(exit_code))
    if missing:
        raise StackError(
            f"W&B did not take {missing} of {rows} rows; run stack wandb-sync {shlex.quote(str(run.path))} again"
        )
    print(f"{rows} rows are in W&B, {sent} of them new")
    return 0


def _send(session: Session, close: Callable[[], None]) -> int:
    """Uploads, closes the session, and returns the number of rows that W&B did not have.

    Raises:
        StackError: W&B cannot be reached, or the upload took too long.
    """
    try:
        session.open(fallback=False)
        close()
    except BaseException as error:
        # Without this the library's exit hook would go on waiting for the server.
        library.kill()
        if isinstance(error, library.failures()):
            late = isinstance(error, TimeoutError)
            help_ = "give it more time with log.wandb.timeout_s=600" if late else "check WANDB_API_KEY, WANDB_BASE_URL"
            raise StackError(f"W&B did not take the run ({library.describe(error)}); {help_}") from error
        raise
    return session.sent


def remember_export(run: RunDir, folder: Path) -> None:
    """Adds a folder to the list of the run's exports, which W&B gets. If that fails, prints a line."""
    try:
        known = exports_in(run.exports)
        if str(folder) not in known:
            write_whole(run.exports, json.dumps([*known, str(folder)]) + "\n")
    except (OSError, ValueError) as error:
        print(f"the export is whole, but {run.exports} cannot be written ({error}): W&B will not know of the export")
