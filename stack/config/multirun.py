"""A sweep's command line, and the jobs that one of Hydra's sweepers makes of it.

A sweeper gets to see what is swept and nothing else: what all jobs share stays here, where `stack.config.compose` reads
it as strictly as for a single run.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, RangeSweep
from omegaconf.errors import OmegaConfBaseException

from stack.config import recipes
from stack.config.check import unknown_key
from stack.config.compose import compose
from stack.config.overrides import node_of, parse_line
from stack.config.recipes import Recipes
from stack.config.schema import Config
from stack.config.values import Spec, one_line, show
from stack.errors import ConfigError, StackError

#: What of Hydra's own a user may set: the rest would let Hydra make folders, or change directory.
_ALLOWED = re.compile(r"hydra([./](launcher|sweeper)([./].*)?|\.sweep\.dir)$")
#: Settings that say how many jobs there are to be, not which sweep this is.
_SIZES = ("hydra.sweeper.n_trials", "hydra.sweeper.n_jobs", "hydra.sweeper.max_failure_rate")
_DIGITS = 8
#: Jobs of a sweep, and values of one range; more is a slip of the keyboard.
_MOST = 10_000

#: Runs jobs, each being its swept overrides, and returns an objective for each; also gets the launcher's settings.
RunJobs = Callable[..., list[float | None]]


@dataclass(frozen=True)
class Request:
    """What a user asks a sweep to be."""

    shared: tuple[str, ...]
    """Overrides of every job."""
    swept: tuple[str, ...]
    """Overrides with several values."""
    hydra: tuple[str, ...]
    """Hydra's own: its launcher, its sweeper."""
    folder: str | None
    """`hydra.sweep.dir`."""
    recipes: Recipes
    """What its groups can be chosen from."""

    @property
    def is_optuna(self) -> bool:
        return "hydra/sweeper=optuna" in self.hydra

    @property
    def id(self) -> str:
        """The same for the same sweep, however it is written."""
        swept = [[key_of(line), *_space(parse_line(line))] for line in self.swept]
        sweeper = [line for line in self.hydra if "sweeper" in line and key_of(line) not in _SIZES]
        return _digest([sorted(map(_canonical, self.shared)), sorted(swept), sorted(sweeper)])

    def example(self) -> Config:
        """The config of one job, the first value of each override that has several.

        Raises:
            ConfigError: that job's config is wrong.
        """
        return compose([*self.shared, *(_values(parse_line(line))[0] for line in self.swept)])

    def job(self, swept: Sequence[str]) -> list[str]:
        """All overrides of the job that has `swept` from the sweeper."""
        taken = {key_of(line) for line in swept}
        return [*(line for line in self.shared if key_of(line) not in taken), *swept]


def read(lines: Sequence[str]) -> Request:
    """Tells apart what a sweep's command line holds. Single values are judged with the jobs that they are of.

    Raises:
        ConfigError: a line is not an override, or sets what a sweep does not let be set.
    """
    lines, known = recipes.find(lines, recipes.conf_folder())
    # In front, and absolute: every job is told it again.
    shared = [f"{recipes.FLAG}={known.own}"] if known.own else []
    swept, hydra, folder = [], [], None
    for line in lines:
        if re.match(r"[+~]*hydra($|[./])", line):
            _check_hydra(line)
            if key_of(line) == "hydra.sweep.dir":
                folder = str(parse_line(line).value())
            else:
                hydra.append(line)
            continue
        # A word that is no override is refused as for a single run.
        override = parse_line(line) if "=" in line and not line.startswith("-") else None
        if override is None or not override.is_sweep_override():
            shared.append(line)
            continue
        _check_swept(line, override, known)
        _check_values(line, override)
        swept.append(line)
    request = Request(tuple(shared), tuple(swept), tuple(hydra), folder, known)
    _check_sweeper(request)
    return request


def job_id(overrides: Sequence[str]) -> str:
    """Eight hex digits that stand for a set of overrides, whatever their order and however a number is written."""
    return _digest(sorted(map(_canonical, overrides)))


def key_of(line: str) -> str:
    """The key or group that an override sets."""
    return line.lstrip("+~").partition("=")[0]


def multirun(request: Request, folder: Path, run_jobs: RunJobs) -> None:
    """Lets the sweeper make jobs, and `run_jobs` run them, until it has enough.

    Args:
        folder: existing folder of the sweep; the sweeper writes its own result there.
        run_jobs: gets a list of jobs and, by name, the settings of hydra/launcher=stack.

    Raises:
        ConfigError: Hydra or its sweeper refuses what it was given.
        StackError: whatever `run_jobs` raises.
    """
    ConfigStore.instance().store(name="schema", node=asdict(Config()))
    files: dict[str, str] = {}
    lines = [
        *_defaults(request),
        *request.recipes.search_path,
        *request.hydra,
        f"hydra.sweep.dir={_quoted(str(folder))}",
        *(_open(line, request.recipes, files) for line in request.swept),
    ]

    own: list[Exception] = []

    def task(jobs: list[list[str]], **settings: Any) -> list[float | None]:
        try:
            # What was opened and renamed for Hydra's tree; ours is strict about it.
            return run_jobs([[files.get(line, line.lstrip("+")) for line in job] for job in jobs], **settings)
        except Exception as error:
            own.append(error)
            raise

    try:
        with initialize_config_dir(str(recipes.conf_folder()), job_name="stack", version_base="1.3"):
            hydra = GlobalHydra.instance().hydra
        # Out of the context: each job is composed in one of its own, which Hydra does not nest.
        assert hydra is not None
        hydra.multirun("config", task, lines, with_log_configuration=False)
    except StackError:
        raise
    # Sweepers, and the libraries below them, tell of mistakes in whatever way they like.
    except Exception as error:
        if own:
            raise
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        raise ConfigError(f"{' '.join([*request.hydra, *request.swept])}: {one_line(cause)}") from error


def _defaults(request: Request) -> list[str]:
    """What a sweep is unless it is told otherwise."""
    keys = {key_of(line) for line in request.hydra}
    lines = {"hydra/launcher": "stack"}
    if request.is_optuna:
        # One trial after another learns the most from each. A fixed seed suggests the same again in a repeated sweep.
        lines["hydra.sweeper.n_jobs"] = "${hydra.launcher.max_parallel}"
        lines["hydra.sweeper.max_failure_rate"] = "1.0"
        if "hydra/sweeper/sampler=grid" not in request.hydra:
            lines["hydra.sweeper.sampler.seed"] = "0"
    return [f"{key}={value}" for key, value in lines.items() if key not in keys]


def _check_hydra(line: str) -> None:
    key = key_of(line)
    if not _ALLOWED.match(key):
        allowed = "hydra.launcher, hydra.sweeper and hydra.sweep.dir"
        raise ConfigError(f"{show(line)}: a sweep takes of Hydra's own {allowed}; drop it")
    if parse_line(line).is_sweep_override():
        raise ConfigError(f"{show(line)}: Hydra's own settings take one value; give one")
    if key == "hydra/launcher" and line != "hydra/launcher=stack":
        raise ConfigError(f"{show(line)}: only hydra/launcher=stack gives each job processes of its own; drop it")


def _check_swept(line: str, override: Override, known: Recipes) -> None:
    key = override.key_or_group
    if key in ("run.root", "run.name"):
        raise ConfigError(f"{show(line)}: all jobs of a sweep lie in one folder, which {key} names; give one value")
    if key not in known.groups and node_of(key) is None:
        unknown_key(key, show(line), known.groups)


def _check_values(line: str, override: Override) -> None:
    """Counts them where they are not written out, without making them."""
    value = override.value()
    if isinstance(value, Glob):
        raise ConfigError(f"{show(line)}: a pattern is not looked up here; list the values")
    if isinstance(value, RangeSweep):
        assert value.start is not None
        assert value.stop is not None
        count = max(0, math.ceil((value.stop - value.start) / value.step))
        if count == 0:
            raise ConfigError(f"{show(line)}: there is no value in that range; give at least one")
        if count > _MOST:
            raise ConfigError(f"{show(line)}: {count:,} values; a sweep has at most {_MOST:,} jobs")


def _check_sweeper(request: Request) -> None:
    if request.is_optuna:
        return
    jobs = 1
    for line in request.swept:
        if not parse_line(line).is_discrete_sweep():
            raise ConfigError(
                f"{show(line)}: the basic sweeper takes lists; add hydra/sweeper=optuna, or list the values"
            )
        jobs *= len(_values(parse_line(line)))
    if jobs > _MOST:
        raise ConfigError(f"{' '.join(request.swept)}: {jobs:,} jobs; a sweep has at most {_MOST:,}")


def _values(override: Override) -> list[str]:
    """The overrides of one value each; of an interval, its ends."""
    value = override.value()
    key = override.get_key_element()
    if isinstance(value, IntervalSweep):
        return [f"{key}={value.start}", f"{key}={value.end}"]
    return [f"{key}={text}" for text in override.sweep_string_iterator()]


def _space(override: Override) -> list[str]:
    """What an override is swept over, in whatever order its values are listed."""
    value = override.value()
    tags = sorted(value.tags) if isinstance(value, IntervalSweep) else []
    return [*tags, *sorted(set(map(_canonical, _values(override))))]


def _canonical(line: str) -> str:
    if line.startswith(f"{recipes.FLAG}="):
        return json.dumps(line)
    override = parse_line(line)
    path, value = override.key_or_group, override.value()
    node = node_of(path)
    if isinstance(node, Spec) and node.kind is float and type(value) is int:
        value = float(value)
    return json.dumps(["~" if override.is_delete() else "", path, value], sort_keys=True, default=str)


def _open(line: str, known: Recipes, files: dict[str, str]) -> str:
    """A swept override as Hydra's tree can take it: the tree is closed, and lacks the fields of the model's family; and
    a file is a choice there under another name.

    Args:
        files: gets the override that each of Hydra's stands for.
    """
    key = key_of(line)
    if key.startswith("model.config."):
        return f"++{line.lstrip('+')}"
    if key not in known.groups:
        return line
    choices = [override.partition("=")[2] for override in _values(parse_line(line))]
    names = {choice: recipes.store(key, choice) for choice in choices if recipes.is_file_choice(choice)}
    files |= {f"{key}={name}": f"{key}={choice}" for choice, name in names.items()}
    return f"{key}={','.join(names.get(choice, choice) for choice in choices)}" if names else line


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:_DIGITS]
