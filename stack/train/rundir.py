"""The run directory: created once, exclusively, by whoever starts the run; every rank writes under its own folder."""

import contextlib
import json
import os
import platform
import secrets
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

from stack import disk
from stack.config.changes import Change, changes
from stack.config.compose import MODEL_COPY, as_saved, to_yaml
from stack.config.families import FAMILIES
from stack.config.model_folder import copy_without_weights
from stack.config.schema import Config
from stack.data.manifest import TOKENIZER
from stack.data.tokenizer import copy_tokenizer
from stack.errors import ConfigError, DataError, Requeue, UsageError
from stack.health.lost_peer import is_lost_peer
from stack.plan.layout import Plan
from stack.plan.report import render

#: Packages whose versions are recorded with a run.
_RECORDED = ("stack", "torch", "deepspeed", "transformers", "datasets", "tokenizers", "wandb", "hydra-core", "numpy")
#: Folder of evaluations, inside a run or, those of model folders, beside runs.
EVALUATIONS = "evaluations"
#: What belongs to one attempt, and is kept apart when the next one begins.
_OF_AN_ATTEMPT = (
    *("plan.json", "plan.txt", "env.json", "ds_config.json", "launchers", "ranks"),
    *("DONE.json", "SAVED.json", "FAILED.json", "curve.png"),
)


@dataclass(frozen=True)
class RunDir:
    """Paths inside `runs/<name>/<run_id>`."""

    path: Path

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def ds_config(self) -> Path:
        return self.path / "ds_config.json"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def corpus(self) -> Path:
        """The prepared corpus this run reads, as it was found when the run was started."""
        try:
            found = read_json(self.path / "corpus.json")
            if found is not None and not isinstance(found["folder"], str):
                raise ValueError("no path")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{self.path / 'corpus.json'} is damaged, it names no folder; start a new run") from error
        if found is None:
            raise DataError(f"{self.path / 'corpus.json'} is missing: the run directory is not whole; start a new run")
        return Path(found["folder"])

    @property
    def model(self) -> Path:
        """Copy of what describes the model folder that the run began with, without weights; there only where
        `model.name` is no family. `stack.config.compose.from_yaml` takes it where that folder is gone."""
        return self.path / MODEL_COPY

    @property
    def tokenizer(self) -> Path:
        """Copy of the corpus's tokenizer, which belongs to the model from its first step on."""
        return self.path / TOKENIZER

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def curve(self) -> Path:
        return self.path / "curve.png"

    @property
    def exports(self) -> Path:
        """Folders that the run was exported to, a JSON list; there after the first export."""
        return self.path / "exports.json"

    @property
    def notes(self) -> Path:
        """Lines for the user, one after another, as they came up."""
        return self.path / "notes.txt"

    @property
    def attempt(self) -> int:
        """Number of this start of the run, the first being 1."""
        return 1 + sum(folder.name.isdigit() for folder in self.path.glob("attempts/*"))

    @property
    def started(self) -> float:
        """Beginning of the first attempt in Unix seconds. Where its env.json is gone or damaged, the time at which the
        run directory was last changed: no run ends for the want of this number."""
        first = self.path / "attempts" / "1" / "env.json"
        try:
            return float((read_json(first if first.exists() else self.path / "env.json") or {})["time"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError):
            return self.path.stat().st_mtime

    @property
    def evaluations(self) -> Path:
        """Folder of the run directories that `stack eval` made."""
        return self.path / EVALUATIONS

    @property
    def evaluation(self) -> Path:
        """There where the ranks evaluate and do not train; says what."""
        return self.path / "evaluation.json"

    @property
    def check(self) -> Path:
        """There where the ranks only check themselves; says what."""
        return self.path / "check.json"

    @property
    def resume_command(self) -> str:
        """What a shell takes to go on with the run."""
        return f"stack resume {shlex.quote(str(self.path))}"

    @property
    def trains(self) -> bool:
        """Whether the directory is of a run, and not of an evaluation or of a check of `stack doctor`."""
        return not self.evaluation.exists() and not self.check.exists()

    @property
    def result(self) -> Path:
        """What an evaluation or a check found."""
        return self.path / "result.json"

    @property
    def done(self) -> Path:
        return self.path / "DONE.json"

    @property
    def failed(self) -> Path:
        return self.path / "FAILED.json"

    @property
    def saved(self) -> Path:
        """There where the run ended since it was asked to, and is to go on."""
        return self.path / "SAVED.json"

    def ended_early(self, exit_code: int) -> Path:
        """The file that says why the run ended early."""
        return self.saved if exit_code == Requeue.exit_code else self.failed

    def launcher_log(self, host: str) -> Path:
        """What the launcher of a host printed, and ssh on the way to it."""
        return self.path / "launchers" / f"{host}.log"

    def rank(self, rank: int) -> Path:
        """This rank's folder: log.txt, rank.json, and at its end done.json, error.json or stopped.json."""
        return self.path / "ranks" / str(rank)

    def outcome(self, rank: int) -> str | None:
        """How the rank itself says that it ended: `done`, `error` or `stopped`; None where it has not."""
        return next(
            (name for name in ("error", "done", "stopped") if (self.rank(rank) / f"{name}.json").exists()), None
        )

    def attempts(self) -> list[Path]:
        """config.yaml of each attempt, the first one first; the last one is the run's own."""
        earlier = sorted((f for f in self.path.glob("attempts/*") if f.name.isdigit()), key=lambda f: int(f.name))
        return [*(folder / "config.yaml" for folder in earlier), self.config]

    def changes(self) -> dict[int, list[Change]]:
        """In what each attempt but the first differs from the one before it, by its number.

        Raises:
            ConfigError: the config.yaml of an attempt is damaged.
        """
        configs = [asdict(as_saved(file)) for file in self.attempts()]
        return {number: changes(*pair) for number, pair in enumerate(pairwise(configs), 2)}

    def errors(self) -> list[dict[str, Any]]:
        """What failed ranks wrote, the first failure first."""
        found = [read_json(file) for file in self.path.glob("ranks/*/error.json")]
        return sorted((error for error in found if error), key=lambda error: error["time"])


def create(cfg: Config, plan: Plan, *, corpus: Path) -> RunDir:
    """Makes a new run directory with config.yaml, plan.json, plan.txt, env.json, corpus.json, the tokenizer and a copy
    of the model folder's description: with a checkpoint it is all that an export needs.

    Args:
        corpus: folder of the prepared corpus; the ranks read nothing but it.

    Raises:
        ConfigError: the folder cannot be created there.
        DataError: a file of the tokenizer is a link that leads out of its folder.
    """
    parent = Path(cfg.run.root).expanduser().absolute() / cfg.run.name
    try:
        run = _new(parent)
        copy_tokenizer(corpus / TOKENIZER, run.tokenizer)
        _copy_model(run, cfg)
        _describe(run, cfg, plan, corpus)
    except OSError as error:
        raise ConfigError(
            f"run.root={cfg.run.root}: {error.filename or parent} cannot be created ({error.strerror}); "
            "use a folder that can be written"
        ) from error
    return run


def create_evaluation(parent: Path, cfg: Config, plan: Plan, *, corpus: Path, checkpoints: Path | None) -> RunDir:
    """Makes a run directory below `parent` for ranks that evaluate.

    Args:
        checkpoints: where the weights come from, or None for those of `model.name`.

    Raises:
        UsageError: it cannot be created there.
    """
    try:
        run = _new(parent)
        # Before config.yaml: what has that alone is taken for a run.
        write_json(run.evaluation, {"checkpoints": str(checkpoints) if checkpoints else None})
        _describe(run, cfg, plan, corpus)
    except OSError as error:
        raise UsageError(
            f"{error.filename or parent} cannot be created ({error.strerror}); evaluate where you can write"
        ) from error
    return run


def create_check(parent: Path, cfg: Config, plan: Plan, *, parity: Sequence[str]) -> RunDir:
    """Makes a run directory below `parent` for ranks that check themselves; they read no corpus.

    Args:
        parity: dtypes in which the layout, of which `cfg` is the miniature, is held to one dense process.

    Raises:
        UsageError: it cannot be created there.
    """
    try:
        run = _new(parent)
        # Before config.yaml: what has that alone is taken for a run.
        write_json(run.check, {"parity": list(parity)})
        _describe(run, cfg, plan, parent)
    except OSError as error:
        raise UsageError(
            f"{error.filename or parent} cannot be created ({error.strerror}); set run.root to a folder that can"
        ) from error
    return run


def _new(parent: Path) -> RunDir:
    run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    parent.mkdir(parents=True, exist_ok=True)
    (parent / run_id).mkdir()
    return RunDir(parent / run_id)


def begin_again(run: RunDir, cfg: Config, plan: Plan, *, corpus: Path) -> None:
    """Makes a run directory ready for another attempt: what the last one left goes to `attempts/<its number>/`, but
    for metrics.jsonl, notes.txt, checkpoints, the tokenizer and W&B's files, which go on.

    Raises:
        UsageError: it cannot be written. The run is then as it was, or ready but for what the last attempt left.
    """
    kept = run.path / "attempts" / str(run.attempt)
    made = kept.with_name(f".{kept.name}")
    try:
        made.mkdir(parents=True, exist_ok=True)
        # Without these there is no run: the old ones stay until the new ones take their place.
        for name in ("config.yaml", "corpus.json"):
            shutil.copy(run.path / name, made)
        for name in _OF_AN_ATTEMPT:
            if (run.path / name).exists():
                (run.path / name).replace(made / name)
        made.replace(kept)
        _copy_model(run, cfg)
        _describe(run, cfg, plan, corpus)
    except OSError as error:
        raise UsageError(f"{run.path} cannot be written ({error.strerror}); make room, or make it writable") from error


def _copy_model(run: RunDir, cfg: Config) -> None:
    """Keeps what describes the model folder, unless the run has nothing but that copy already."""
    if cfg.model.name not in FAMILIES and Path(cfg.model.name) != run.model:
        copy_without_weights(cfg.model.name, run.model)


def _describe(run: RunDir, cfg: Config, plan: Plan, corpus: Path) -> None:
    # Logs may show variables and paths of their users: nobody but the owner, and the group where the umask says so.
    for folder in ("launchers", "ranks"):
        (run.path / folder).mkdir(mode=0o770)
    for rank in range(plan.world_size):
        run.rank(rank).mkdir()
    write_json(run.plan, plan.to_dict())
    disk.write_whole(run.path / "plan.txt", render(plan, cfg) + "\n")
    write_json(run.path / "env.json", {**_environment(), "versions": versions()})
    write_json(run.path / "corpus.json", {"folder": str(corpus.absolute())})
    # The last one: a folder with it is a run.
    disk.write_whole(run.config, to_yaml(cfg))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes the whole file or nothing: a reader never sees half of it."""
    disk.write_whole(path, _json(value))


def write_last(path: Path, value: dict[str, Any]) -> None:
    """As `write_json`, for the last words of a process, into the room that was reserved for them. Where the disk does
    not take them, the exit code says how the process ended."""
    with contextlib.suppress(OSError):
        disk.write_reserved(path, _json(value))


def record_end(run: RunDir, told: dict[str, Any]) -> None:
    """Writes SAVED.json or FAILED.json for a rank without a driver, if the disk takes it. Of ranks that end together
    the first one counts, but that a rank which only lost another one makes way for a rank that knows the cause."""
    path = run.ended_early(told["exit_code"])
    disk.release(run.path)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if disk.write_new(path, _json(told)) or is_lost_peer(told["message"]):
            return
        known = read_json(path)
        if known is None or is_lost_peer(str(known.get("message"))):
            write_json(path, told)


def read_json(path: Path) -> dict[str, Any] | None:
    """The file's object, or None where there is no such file.

    Raises:
        ValueError: it is damaged.
        OSError: it cannot be read.
    """
    try:
        return disk.parse_json(disk.read_regular(path))
    except FileNotFoundError:
        return None


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def versions() -> dict[str, str | None]:
    """Versions of the packages that a run depends on; None for one that is not there."""
    found: dict[str, str | None] = {}
    for name in _RECORDED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _environment() -> dict[str, Any]:
    return {
        "time": time.time(),
        "command": sys.argv,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }
