"""Makes the paths in a config absolute."""

import os
from dataclasses import replace
from pathlib import Path

from stack.config.families import FAMILIES
from stack.config.schema import Config
from stack.errors import ConfigError


def settled(cfg: Config) -> Config:
    """The config with absolute paths, as it is saved with a run, so that the run can be resumed from another folder.

    A value that may be either a path or a name (`model.name`, `data.name`, `data.tokenizer`) is a path if it names an
    existing folder. The name of a model family is always the family: `./llama` is the folder.

    Raises:
        ConfigError: a path is empty or begins with an unknown `~user`.
    """
    return replace(
        cfg,
        run=replace(cfg.run, root=absolute("run.root", cfg.run.root)),
        model=replace(cfg.model, name=name if (name := cfg.model.name) in FAMILIES else _folder("model.name", name)),
        data=replace(
            cfg.data,
            root=absolute("data.root", cfg.data.root),
            paths=[absolute("data.paths", path) for path in cfg.data.paths],
            name=_folder("data.name", cfg.data.name) if cfg.data.name else None,
            tokenizer=_folder("data.tokenizer", cfg.data.tokenizer),
        ),
        parallel=replace(
            cfg.parallel,
            offload=replace(
                cfg.parallel.offload, folder=_optional("parallel.offload.folder", cfg.parallel.offload.folder)
            ),
        ),
        checkpoint=replace(cfg.checkpoint, path=_optional("checkpoint.path", cfg.checkpoint.path)),
        launch=replace(cfg.launch, hostfile=_optional("launch.hostfile", cfg.launch.hostfile)),
    )


def absolute(key: str, path: str) -> str:
    """The absolute form of a path.

    Args:
        key: the config key, for messages.
        path: a path, relative to the current folder, in which `~` is expanded.

    Raises:
        ConfigError: the path is empty or begins with an unknown `~user`.
    """
    if not path:
        raise ConfigError(f"{key}= is empty; name a folder, or . for this one")
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError as error:
        raise ConfigError(f"{key}={path}: there is no such user here; write the whole path") from error


def _optional(key: str, path: str | None) -> str | None:
    return absolute(key, path) if path is not None else None


def _folder(key: str, name: str) -> str:
    return found if os.path.isdir(found := absolute(key, name)) else name
