"""The run directory. The process that starts the run creates it; every rank writes only into its own folder."""

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
#: Folder of evaluations: inside a run, or beside runs for evaluations of model folders.
EVALUATIONS = "evaluations"
#: Files and folders of one attempt, which move to `attempts/<n>/` when the next attempt begins.
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
        """Folder of the prepared corpus that this run reads, from corpus.json.

        Raises:
            DataError: corpus.json is missing or damaged.
        """
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
        """Copy of the model folder of `model.name` without its weights; exists only if `model.name` is not a family.
        `stack.config.compose.from_yaml` uses the copy if that folder is gone."""
        return self.path / MODEL_COPY

    @property
    def tokenizer(self) -> Path:
        """Copy of the corpus's tokenizer."""
        return self.path / TOKENIZER

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def curve(self) -> Path:
        return self.path / "curve.png"

    @property
    def exports(self) -> Path:
        """JSON list of the folders to which the run was exported; exists after the first export."""
        return self.path / "exports.json"

    @property
    def notes(self) -> Path:
        """Lines for the user, in the order in which they were written."""
        return self.path / "notes.txt"

    @property
    def attempt(self) -> int:
        """Number of this start of the run, from 1."""
        return 1 + sum(folder.name.isdigit() for folder in self.path.glob("attempts/*"))

    @property
    def started(self) -> float:
        """Beginning of the first attempt in Unix seconds. If its env.json is missing or damaged, the time at which the
        run directory was last changed, since this number is not worth an error."""
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
        """Exists if the ranks evaluate instead of training; names the source of the weights."""
        return self.path / "evaluation.json"

    @property
    def check(self) -> Path:
        """Exists if the ranks run the checks of `stack doctor` instead of training; names the checks."""
        return self.path / "check.json"

    @property
    def resume_command(self) -> str:
        """The shell command that resumes the run."""
        return f"stack resume {shlex.quote(str(self.path))}"

    @property
    def trains(self) -> bool:
        """Whether this is the directory of a training run, not of an evaluation or a check of `stack doctor`."""
        return not self.evaluation.exists() and not self.check.exists()

    @property
    def result(self) -> Path:
        """The result of an evaluation or a check."""
        return self.path / "result.json"

    @property
    def done(self) -> Path:
        return self.path / "DONE.json"

    @property
    def failed(self) -> Path:
        return self.path / "FAILED.json"

    @property
    def saved(self) -> Path:
        """Exists if the run ended on request, after a save, and can be resumed."""
        return self.path / "SAVED.json"

    def ended_early(self, exit_code: int) -> Path:
        """The file that says why the run ended early."""
        return self.saved if exit_code == Requeue.exit_code else self.failed

    def launcher_log(self, host: str) -> Path:
        """Output of the launcher on a host, and of the ssh connection to the host."""
        return self.path / "launchers" / f"{host}.log"

    def rank(self, rank: int) -> Path:
        """This rank's folder: log.txt, rank.json, and at its end done.json, error.json or stopped.json."""
        return self.path / "ranks" / str(rank)

    def outcome(self, rank: int) -> str | None:
        """How the rank reported its end: `done`, `error` or `stopped`; None where it has reported nothing."""
        return next(
            (name for name in ("error", "done", "stopped") if (self.rank(rank) / f"{name}.json").exists()), None
        )

    def attempts(self) -> list[Path]:
        """config.yaml of each attempt, in order; the last is the config.yaml of the run directory itself."""
        earlier = sorted((f for f in self.path.glob("attempts/*") if f.name.isdigit()), key=lambda f: int(f.name))
        return [*(folder / "config.yaml" for folder in earlier), self.config]

    def changes(self) -> dict[int, list[Change]]:
        """Number of an attempt, from 2 -> the settings in which it differs from the attempt before.

        Raises:
            ConfigError: the config.yaml of an attempt is damaged.
        """
        configs = [asdict(as_saved(file)) for file in self.attempts()]
        return {number: changes(*pair) for number, pair in enumerate(pairwise(configs), 2)}

    def errors(self) -> list[dict[str, Any]]:
        """The contents of the error.json files of failed ranks, in the order of time."""
        found = [read_json(file) for file in self.path.glob("ranks/*/error.json")]
        return sorted((error for error in found if error), key=lambda error: error["time"])


def create(cfg: Config, plan: Plan, *, corpus: Path) -> RunDir:
    """Makes a new run directory with config.yaml, plan.json, plan.txt, env.json, corpus.json, the tokenizer, and a copy
    of the model folder without weights. An export needs only these files and a checkpoint.

    Args:
        corpus: folder of the prepared corpus.

    Raises:
        ConfigError: the run directory cannot be created.
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
        corpus: folder of the prepared corpus.
        checkpoints: folder of checkpoints that has the weights, or None for the weights of `model.name`.

    Raises:
        UsageError: it cannot be created.
    """
    try:
        run = _new(parent)
        # Written before config.yaml: a folder with config.yaml but without this file counts as a training run.
        write_json(run.evaluation, {"checkpoints": str(checkpoints) if checkpoints else None})
        _describe(run, cfg, plan, corpus)
    except OSError as error:
        raise UsageError(
            f"{error.filename or parent} cannot be created ({error.strerror}); make its folder writable"
        ) from error
    return run


def create_check(parent: Path, cfg: Config, plan: Plan, *, parity: Sequence[str]) -> RunDir:
    """Makes a run directory below `parent` for ranks that run the checks of `stack doctor`. They read no corpus.

    Args:
        cfg: config of a miniature of the layout.
        plan: plan of the miniature.
        parity: dtypes in which the miniature is compared with the same model trained in one ordinary process.

    Raises:
        UsageError: it cannot be created.
    """
    try:
        run = _new(parent)
        # Written before config.yaml: a folder with config.yaml but without this file counts as a training run.
        write_json(run.check, {"parity": list(parity)})
        _describe(run, cfg, plan, parent)
    except OSError as error:
        raise UsageError(
            f"{error.filename or parent} cannot be created ({error.strerror}); set run.root to a writable folder"
        ) from error
    return run


def _new(parent: Path) -> RunDir:
    run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    parent.mkdir(parents=True, exist_ok=True)
    (parent / run_id).mkdir()
    return RunDir(parent / run_id)


def begin_again(run: RunDir, cfg: Config, plan: Plan, *, corpus: Path) -> None:
    """Makes a run directory ready for another attempt. The files of the last attempt move to `attempts/<its number>/`,
    except metrics.jsonl, notes.txt, checkpoints, the tokenizer and W&B's files, which all attempts share.

    Raises:
        UsageError: the directory cannot be written. config.yaml and corpus.json of the last attempt are then still
            there, and other files of it may have moved.
    """
    kept = run.path / "attempts" / str(run.attempt)
    made = kept.with_name(f".{kept.name}")
    try:
        made.mkdir(parents=True, exist_ok=True)
        # These are copied, not moved: without them the directory would be no run until the new ones are written.
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
    """Copies the model folder without its weights, unless `model.name` is a family or that copy itself."""
    if cfg.model.name not in FAMILIES and Path(cfg.model.name) != run.model:
        copy_without_weights(cfg.model.name, run.model)


def _describe(run: RunDir, cfg: Config, plan: Plan, corpus: Path) -> None:
    # Logs may contain variables and paths of their users, so only the owner may read them, and the group if the umask
    # allows.
    for folder in ("launchers", "ranks"):
        (run.path / folder).mkdir(mode=0o770)
    for rank in range(plan.world_size):
        run.rank(rank).mkdir()
    write_json(run.plan, plan.to_dict())
    disk.write_whole(run.path / "plan.txt", render(plan, cfg) + "\n")
    write_json(run.path / "env.json", {**_environment(), "versions": versions()})
    write_json(run.path / "corpus.json", {"folder": str(corpus.absolute())})
    # config.yaml is written last, because a folder with it counts as a run.
    disk.write_whole(run.config, to_yaml(cfg))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON file at once, so that a reader never sees a part of it. Raises `OSError` as `disk.write_whole`."""
    disk.write_whole(path, _json(value))


def write_last(path: Path, value: dict[str, Any]) -> None:
    """As `write_json`, for the file that says how a process ended, into the room that `disk.reserve` reserved. A failed
    write is ignored: the exit code still says how the process ended."""
    with contextlib.suppress(OSError):
        disk.write_reserved(path, _json(value))


def record_end(run: RunDir, told: dict[str, Any]) -> None:
    """Writes SAVED.json or FAILED.json for a rank without a driver; a failed write is ignored.

    Of several ranks that end at the same time the first one writes the file. A rank that knows the cause replaces the
    file of a rank that only lost its connection to another rank.

    Args:
        run: the run directory.
        told: content of the file, with `message` and `exit_code`.
    """
    path = run.ended_early(told["exit_code"])
    disk.release(run.path)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if disk.write_new(path, _json(told)) or is_lost_peer(told["message"]):
            return
        known = read_json(path)
        if known is None or is_lost_peer(str(known.get("message"))):
            write_json(path, told)


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file, or None where the file does not exist.

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
    """Name of a package that a run depends on -> its version, or None if it is not installed."""
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
