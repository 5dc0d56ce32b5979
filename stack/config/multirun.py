"""Reads the command line of a sweep, and lets one of Hydra's sweepers generate its jobs.

The sweeper gets only the overrides with several values. The overrides that all jobs share are added to each job
afterwards, so that `stack.config.compose` checks them as strictly as for a single run.
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

#: Hydra's own keys that a user may set. The others would let Hydra create folders or change the working directory.
_ALLOWED = re.compile(r"hydra([./](launcher|sweeper)([./].*)?|\.sweep\.dir)$")
#: Sweeper settings that do not enter `Request.id`: a repeated sweep with more trials continues the same sweep.
_SIZES = ("hydra.sweeper.n_trials", "hydra.sweeper.n_jobs", "hydra.sweeper.max_failure_rate")
_DIGITS = 8
#: Largest number of jobs in a sweep, and of values in a range. A larger number is most likely a typing error.
_MOST = 10_000

#: Called with a list of jobs, each a list of its swept overrides, and the launcher's settings as keyword arguments.
#: Returns the objective of each job.
RunJobs = Callable[..., list[float | None]]


@dataclass(frozen=True)
class Request:
    """The command line of a sweep, sorted by kind of override."""

    shared: tuple[str, ...]
    """Overrides that apply to all jobs."""
    swept: tuple[str, ...]
    """Overrides with several values."""
    hydra: tuple[str, ...]
    """Overrides of Hydra's launcher and sweeper."""
    folder: str | None
    """The value of `hydra.sweep.dir`, if given."""
    recipes: Recipes
    """The groups, with their choices."""

    @property
    def is_optuna(self) -> bool:
        return "hydra/sweeper=optuna" in self.hydra

    @property
    def id(self) -> str:
        """Eight hexadecimal digits. They do not depend on the order of overrides or values, or on how numbers are
        written."""
        swept = [[key_of(line), *_space(parse_line(line))] for line in self.swept]
        sweeper = [line for line in self.hydra if "sweeper" in line and key_of(line) not in _SIZES]
        return _digest([sorted(map(_canonical, self.shared)), sorted(swept), sorted(sweeper)])

    def example(self) -> Config:
        """The config of the job with the first value of each swept override.

        Raises:
            ConfigError: the config of that job is wrong.
        """
        return compose([*self.shared, *(_values(parse_line(line))[0] for line in self.swept)])

    def job(self, swept: Sequence[str]) -> list[str]:
        """All overrides of a job: those that the sweeper chose (`swept`), and the shared ones for other keys."""
        taken = {key_of(line) for line in swept}
        return [*(line for line in self.shared if key_of(line) not in taken), *swept]


def read(lines: Sequence[str]) -> Request:
    """Parses the command line of a sweep. Values are checked later, with the config of each job.

    Raises:
        ConfigError: a line is not an override, or sets a key that a sweep cannot set.
    """
    lines, known = recipes.find(lines, recipes.conf_folder())
    # `--config-dir` is passed on to every job, with an absolute path.
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
        # Words that are no overrides stay in `shared`, and `compose` refuses them as for a single run.
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
    """Identifies a set of overrides by eight hexadecimal digits. They do not depend on the order of the overrides or on
    how numbers are written."""
    return _digest(sorted(map(_canonical, overrides)))


def key_of(line: str) -> str:
    """The key or group that an override sets, from its text."""
    return line.lstrip("+~").partition("=")[0]


def multirun(request: Request, folder: Path, run_jobs: RunJobs) -> None:
    """Runs a sweep: Hydra's sweeper generates batches of jobs and passes them to `run_jobs` until it is done.

    Args:
        request: the sweep.
        folder: existing folder of the sweep, in which the sweeper writes its result.
        run_jobs: called with a list of jobs and, as keyword arguments, the settings of hydra/launcher=stack.

    Raises:
        ConfigError: Hydra or its sweeper refuses an override.
        StackError: raised by `run_jobs`.
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
            # Undo `_open`: `compose` refuses its forms of an override.
            return run_jobs([[files.get(line, line.lstrip("+")) for line in job] for job in jobs], **settings)
        except Exception as error:
            own.append(error)
            raise

    try:
        with initialize_config_dir(str(recipes.conf_folder()), job_name="stack", version_base="1.3"):
            hydra = GlobalHydra.instance().hydra
        # After the context has ended, because composing each job enters such a context and Hydra cannot nest them.
        assert hydra is not None
        hydra.multirun("config", task, lines, with_log_configuration=False)
    except StackError:
        raise
    # Sweepers and the libraries that they use raise exceptions of many types for a wrong setting.
    except Exception as error:
        if own:
            raise
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        raise ConfigError(f"{' '.join([*request.hydra, *request.swept])}: {one_line(cause)}") from error


def _defaults(request: Request) -> list[str]:
    """Overrides of Hydra's own keys that apply unless the user sets these keys."""
    keys = {key_of(line) for line in request.hydra}
    lines = {"hydra/launcher": "stack"}
    if request.is_optuna:
        # Optuna asks for as many trials at once as can run in parallel, one by default, since later trials learn from
        # earlier ones. With a fixed seed a repeated sweep gets the same suggestions.
        lines["hydra.sweeper.n_jobs"] = "${hydra.launcher.max_parallel}"
        lines["hydra.sweeper.max_failure_rate"] = "1.0"
        if "hydra/sweeper/sampler=grid" not in request.hydra:
            lines["hydra.sweeper.sampler.seed"] = "0"
    return [f"{key}={value}" for key, value in lines.items() if key not in keys]


def _check_hydra(line: str) -> None:
    key = key_of(line)
    if not _ALLOWED.match(key):
        allowed = "hydra.launcher, hydra.sweeper and hydra.sweep.dir"
        raise ConfigError(f"{show(line)}: of Hydra's own keys a sweep accepts only {allowed}; drop it")
    if parse_line(line).is_sweep_override():
        raise ConfigError(f"{show(line)}: Hydra's own settings take one value; give one")
    if key == "hydra/launcher" and line != "hydra/launcher=stack":
        raise ConfigError(f"{show(line)}: a sweep works with hydra/launcher=stack only; drop it")


def _check_swept(line: str, override: Override, known: Recipes) -> None:
    key = override.key_or_group
    if key in ("run.root", "run.name"):
        raise ConfigError(f"{show(line)}: all jobs of a sweep lie in one folder, which {key} names; give one value")
    if key not in known.groups and node_of(key) is None:
        unknown_key(key, show(line), known.groups)


def _check_values(line: str, override: Override) -> None:
    """Refuses globs, and ranges with no value or too many. Ranges are counted without generating their values."""
    value = override.value()
    if isinstance(value, Glob):
        raise ConfigError(f"{show(line)}: glob(...) is not supported; list the values")
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
    """One override for each value of a swept one. An interval gives two, for its ends."""
    value = override.value()
    key = override.get_key_element()
    if isinstance(value, IntervalSweep):
        return [f"{key}={value.start}", f"{key}={value.end}"]
    return [f"{key}={text}" for text in override.sweep_string_iterator()]


def _space(override: Override) -> list[str]:
    """The values of a swept override and the tags of an interval, sorted, in a form for `Request.id`."""
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
    """Changes a swept override into a form that Hydra accepts. Hydra's tree is closed and lacks the fields of the
    model's family, so those get `++`. A YAML file as a choice gets the name under which it is stored.

    Args:
        line: the override.
        known: the groups.
        files: filled with Hydra's form of each override that names a file -> the user's form.
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
