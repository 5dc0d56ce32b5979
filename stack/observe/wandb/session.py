"""Sends the data of a run directory to its W&B run. Calls may wait for the server and raise; `sink` handles that."""

import json
import secrets
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stack.checkpoint import manifest
from stack.config.schema import Wandb
from stack.disk import parse_json, read_regular, write_whole
from stack.errors import CheckpointError, Requeue, StackError
from stack.observe.course import Course
from stack.observe.jsonl import Follower
from stack.observe.metrics import StepRecord
from stack.observe.wandb import library
from stack.observe.wandb.environment import agents_run_id

#: Folder for our files inside the W&B run, because W&B writes a config.yaml of its own at the top level.
_FILES_FOLDER = "stack"
#: Seconds between two updates of the summary while the run goes on.
_SUMMARY_EVERY_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The data of a run directory that W&B gets."""

    folder: Path
    """The run directory, absolute. Its file `wandb/run_id` has the id of the W&B run."""
    name: str
    """Name of the W&B run."""
    metrics: Path
    """metrics.jsonl, the only source of rows."""
    checkpoints: Path
    """Folder of the checkpoints."""
    exports: Path
    """JSON list of the folders that `stack export` wrote; the file need not exist."""
    files: tuple[Path, ...]
    """Files to copy into the W&B run; they must exist."""
    config: dict[str, Any]
    """The config of the run, as W&B shows it."""
    started: float
    """Beginning of the first attempt in Unix seconds."""
    attempt: int
    """Number of this start of the run, from 1."""


class Session:
    """Sends the rows of metrics.jsonl to the W&B run, each row once.

    A row is identified by its (step, attempt). The server says which row it got last, and the rows after that are sent,
    also those of attempts that never reached the server. Rows are sent in the order of the file, so there are no gaps.
    An offline session writes only the rows of its own attempt.
    """

    def __init__(self, facts: Facts, cfg: Wandb, *, note: Callable[[str], None]) -> None:
        self.facts, self._cfg, self._note = facts, cfg, note
        self.upload_command = f"stack wandb-sync {shlex.quote(str(facts.folder))}"
        self.rows = 0
        """Number of rows of metrics.jsonl that were read."""
        self.sent = 0
        """Number of rows that this session added to the W&B run."""
        self._course = Course(facts.started)
        self._follower = Follower(facts.metrics)
        self._mode = cfg.mode
        self.run: Any = None
        self._first = 0
        self._checkpoints: set[int] = set()
        self._summary_due = 0.0

    def open(self, *, fallback: bool = True) -> None:
        """Opens the W&B run in the config's mode, and sends files and missing rows.

        Args:
            fallback: whether to go on offline if the server cannot be reached or refuses.

        Raises:
            wandb.Error, TimeoutError: the server cannot be reached or refuses, and `fallback` is off.
            StackError: W&B has a row that metrics.jsonl does not have.
        """
        if self._mode != "offline":
            try:
                self.run = self._open(self._mode)
            except library.failures() as error:
                if not fallback:
                    raise
                # The library treats the run id as in use until its service process has ended.
                library.teardown()
                self._mode = "offline"
                self._note(f"W&B continues offline: {library.describe(error)}")
            else:
                self._note(f"W&B run: {self.run.url}")
        if self.run is None:
            self.run = self._open("offline")
        if self._mode == "shared":
            self._invite()
        self.run.define_metric("*", step_metric="step")
        self._save_files(self.facts.files)
        known = self._follower.poll()
        self._first = self._first_missing(known)
        self._take(known)

    def catch_up(self) -> None:
        """Sends the new rows of metrics.jsonl, new checkpoints and, every 30 s, the summary."""
        new = self._follower.poll()
        self._take(new)
        if any(row.checkpoint_write_s is not None for row in new):
            self._log_checkpoints()
        if time.monotonic() >= self._summary_due:
            self._summary_due = time.monotonic() + _SUMMARY_EVERY_S
            self.run.summary.update(self._course.summary())

    def end(self, exit_code: int) -> None:
        """Sends checkpoints, exports, pictures and the final summary, and closes the run. Raises as `close`."""
        self._log_checkpoints()
        self._log_exports()
        self._log_pictures()
        figures: dict[str, Any] = {**self._course.summary(), **self._stage_table()}
        if self._checkpoints:
            figures["final_checkpoint"] = str(manifest.folder_of(self.facts.checkpoints, max(self._checkpoints)))
        self.run.summary.update(figures)
        self.close(exit_code)

    def close(self, exit_code: int) -> None:
        """Waits until everything is uploaded, at most half of `log.wandb.timeout_s`, and closes the run.

        Args:
            exit_code: 0 marks the run as finished, that of `Requeue` as preempted, others as failed.

        Raises:
            TimeoutError: the upload took longer.
        """
        if exit_code == Requeue.exit_code:
            self.run.mark_preempting()
        self.run.finish(exit_code=exit_code)
        # Called here, where the deadline applies, and not left to the library's exit hook.
        library.teardown(exit_code)
        if self._mode == "offline":
            self._note(f"W&B run is on disk; upload it with: {self.upload_command}")

    def _open(self, mode: str) -> Any:
        shared = {"x_primary": True, "x_label": "node-0"} if mode == "shared" else {}
        return library.init(
            self._cfg,
            self.facts.folder,
            run_id(self.facts.folder),
            mode=mode,
            name=self.facts.name,
            config=self.facts.config,
            **shared,
        )

    def _invite(self) -> None:
        """Writes the file by which the other hosts find the W&B run."""
        told = {"id": self.run.id, "entity": self.run.entity, "project": self.run.project}
        write_whole(invitation(self.facts), json.dumps(told) + "\n")

    def _first_missing(self, rows: list[StepRecord]) -> int:
        """Number of the first row of metrics.jsonl that the W&B run does not have.

        Raises:
            StackError: W&B has a row that metrics.jsonl does not have.
        """
        if self._mode == "offline":
            return sum(row.attempt < self.facts.attempt for row in rows)
        last = self.run.summary.get("step"), self.run.summary.get("attempt")
        if last == (None, None):
            return 0
        found = [number for number, row in enumerate(rows) if (row.step, row.attempt) == last]
        if not found:
            raise StackError(
                f"W&B run {self.run.id} ends with step {last[0]} of attempt {last[1]}, which {self.facts.metrics} does "
                f"not have; delete {_id_file(self.facts.folder)} to begin a new W&B run"
            )
        return found[-1] + 1

    def _take(self, rows: list[StepRecord]) -> None:
        for row in rows:
            self._course.add(row)
            if self.rows >= self._first:
                self._log(self._values(row))
                self.sent += 1
            self.rows += 1

    def _log(self, values: dict[str, Any]) -> None:
        """Sends one row. W&B's own step is the number of the row, except in shared mode, where the server numbers
        rows."""
        self.run.log(values, **({} if self._mode == "shared" else {"step": self.rows}))

    @staticmethod
    def _values(row: StepRecord) -> dict[str, Any]:
        values = {name: value for name, value in row.to_dict().items() if value is not None}
        stages = values.pop("stage_busy_s", ())
        return values | {f"stages/{stage}/busy_s": busy_s for stage, busy_s in enumerate(stages)}

    def _save_files(self, files: tuple[Path, ...]) -> None:
        """Copies files into the W&B run. W&B would only link to a path outside of its folder, and the links would break
        when the run directory is moved."""
        folder = Path(self.run.dir) / _FILES_FOLDER
        folder.mkdir(exist_ok=True)
        for file in files:
            copy = shutil.copy(file, folder)
            self.run.save(copy, base_path=self.run.dir, policy="now", glob=False)

    def _log_pictures(self) -> None:
        files = tuple(sorted(self.facts.folder.glob("*.png")))
        self._save_files(files)
        pictures = {f"pictures/{file.stem}": library.load().Image(str(file)) for file in files}
        if pictures and self.sent and self._mode != "shared":
            # W&B keeps a row open until the next one begins, so the pictures are added to the last row.
            self.rows -= 1
            self._log(pictures)
            self.rows += 1
        else:
            self.run.summary.update(pictures)

    def _stage_table(self) -> dict[str, Any]:
        lines = [[line.stage, line.busy_s, line.busy_fraction] for line in self._course.stages()]
        columns = ["stage", "busy_s", "busy_fraction"]
        return {"stages": library.load().Table(columns=columns, data=lines)} if lines else {}

    def _log_checkpoints(self) -> None:
        """Logs the new checkpoints as artifacts by reference: W&B gets their paths and none of their bytes."""
        for step in sorted(set(manifest.steps(self.facts.checkpoints)) - self._checkpoints):
            folder = manifest.folder_of(self.facts.checkpoints, step)
            try:
                about = manifest.read(folder)
            except CheckpointError:
                # The checkpoint was deleted meanwhile because newer ones are kept, or it is damaged and of no use.
                continue
            metadata = {"step": step, "heldout_loss": about.heldout_loss, "bytes": sum(f.bytes for f in about.files)}
            self._log_reference("checkpoint", folder, f"step-{step}", metadata=metadata)
            self._checkpoints.add(step)

    def _log_exports(self) -> None:
        try:
            exports = exports_in(self.facts.exports)
        except (OSError, ValueError) as error:
            self._note(f"{self.facts.exports} cannot be read ({error}): W&B does not learn of the exports")
            return
        for folder in map(Path, exports):
            if folder.is_dir():
                self._log_reference("export", folder, metadata={})

    def _log_reference(self, kind: str, folder: Path, *aliases: str, metadata: dict[str, Any]) -> None:
        artifact = library.load().Artifact(
            f"{kind}-{self.run.id}", type=kind, metadata={**metadata, "folder": str(folder)}
        )
        # W&B's checksums would read every byte, and the manifest of a checkpoint has hashes already.
        artifact.add_reference(folder.as_uri(), checksum=False)
        self.run.log_artifact(artifact, aliases=["latest", *aliases])


def invitation(facts: Facts) -> Path:
    """The file by which the first host tells the others the id of the W&B run of this attempt."""
    return facts.folder / "wandb" / f"shared-{facts.attempt}.json"


def exports_in(file: Path) -> list[str]:
    """The folders that the file `Facts.exports` lists; empty where the file does not exist.

    Raises:
        ValueError: the file is damaged.
        OSError: the file cannot be read.
    """
    try:
        found = parse_json(read_regular(file))
    except FileNotFoundError:
        return []
    if not isinstance(found, list) or not all(isinstance(folder, str) for folder in found):
        raise ValueError("it is no list of folders")
    return found


def _id_file(folder: Path) -> Path:
    return folder / "wandb" / "run_id"


def run_id(folder: Path) -> str:
    """The id of the W&B run of the run directory `folder`. The first call makes it and writes it to a file.

    Raises:
        StackError: the file is damaged.
    """
    path = _id_file(folder)
    try:
        known = read_regular(path).decode("ascii").strip()
    except FileNotFoundError:
        known = ""
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not text"
        raise StackError(f"{path} is damaged ({why}); delete it to begin a new W&B run") from error
    if known:
        return known
    new = agents_run_id() or secrets.token_hex(8)
    # Only the user, and the group if the umask allows, may read the folder: the library writes the user, the host and
    # the command into it.
    path.parent.mkdir(mode=0o770, parents=True, exist_ok=True)
    write_whole(path, new + "\n")
    return new
