"""The run directory: created once, exclusively, by whoever starts the run; every rank writes under its own folder."""

import json
import os
import platform
import secrets
import socket
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from stack.config.compose import to_yaml
from stack.config.schema import Config
from stack.errors import ConfigError, DataError
from stack.plan.layout import Plan
from stack.plan.report import render

#: Packages whose versions are recorded with a run.
_RECORDED = ("stack", "torch", "deepspeed", "transformers", "datasets", "tokenizers", "wandb", "hydra-core", "numpy")


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
        found = read_json(self.path / "corpus.json")
        if found is None:
            raise DataError(f"{self.path / 'corpus.json'} is missing: the run directory is not whole; start a new run")
        return Path(found["folder"])

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def curve(self) -> Path:
        return self.path / "curve.png"

    @property
    def done(self) -> Path:
        return self.path / "DONE.json"

    @property
    def failed(self) -> Path:
        return self.path / "FAILED.json"

    @property
    def launcher_log(self) -> Path:
        return self.path / "launcher.log"

    def rank(self, rank: int) -> Path:
        """This rank's folder: log.txt, rank.json, and at its end done.json or error.json."""
        return self.path / "ranks" / str(rank)

    def has_outcome(self, rank: int) -> bool:
        """Whether the rank itself has said how it ended."""
        return any((self.rank(rank) / name).exists() for name in ("done.json", "error.json"))

    def errors(self) -> list[dict[str, Any]]:
        """What failed ranks wrote, the first failure first."""
        found = [read_json(file) for file in self.path.glob("ranks/*/error.json")]
        return sorted((error for error in found if error), key=lambda error: error["time"])


def create(cfg: Config, plan: Plan, *, corpus: Path) -> RunDir:
    """Makes a new run directory with config.yaml, plan.json, plan.txt, env.json and corpus.json.

    Args:
        corpus: folder of the prepared corpus; the ranks read nothing but it.

    Raises:
        ConfigError: the folder cannot be created there.
    """
    parent = Path(cfg.run.root).expanduser().absolute() / cfg.run.name
    run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        (parent / run_id).mkdir()
    except OSError as error:
        raise ConfigError(
            f"run.root={cfg.run.root}: {error.filename} cannot be created ({error.strerror}); "
            "use a folder that can be written"
        ) from error
    run = RunDir(parent / run_id)
    run.config.write_text(to_yaml(cfg))
    write_json(run.plan, plan.to_dict())
    (run.path / "plan.txt").write_text(render(plan, cfg) + "\n")
    write_json(run.path / "env.json", _environment())
    write_json(run.path / "corpus.json", {"folder": str(corpus.absolute())})
    for rank in range(plan.world_size):
        run.rank(rank).mkdir(parents=True)
    return run


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes the whole file or nothing: a reader never sees half of it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The file's object, or None where there is no such file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def _environment() -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for name in _RECORDED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "command": sys.argv,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "versions": versions,
    }
