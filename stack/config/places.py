"""Paths of a config, made to mean the same from any folder."""

from dataclasses import replace
from pathlib import Path

from stack.config.schema import Config


def settled(cfg: Config) -> Config:
    """The config with absolute paths, as it is saved with a run: the run may go on from another folder.

    What may also be a name of the hub, or of a family, is a path where there is such a folder.
    """
    return replace(
        cfg,
        run=replace(cfg.run, root=_absolute(cfg.run.root)),
        model=replace(cfg.model, name=_folder(cfg.model.name)),
        data=replace(
            cfg.data,
            root=_absolute(cfg.data.root),
            paths=[_absolute(path) for path in cfg.data.paths],
            name=_folder(cfg.data.name) if cfg.data.name else None,
            tokenizer=_folder(cfg.data.tokenizer),
        ),
        parallel=replace(
            cfg.parallel,
            offload=replace(cfg.parallel.offload, folder=_optional(cfg.parallel.offload.folder)),
        ),
        checkpoint=replace(cfg.checkpoint, path=_optional(cfg.checkpoint.path)),
        launch=replace(cfg.launch, hostfile=_optional(cfg.launch.hostfile)),
    )


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _optional(path: str | None) -> str | None:
    return _absolute(path) if path is not None else None


def _folder(name: str) -> str:
    return _absolute(name) if Path(name).expanduser().is_dir() else name
