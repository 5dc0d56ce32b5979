"""Opens and closes W&B's library. It is imported on first use, because the import takes a second and may hang."""

import os
from pathlib import Path
from typing import Any

from stack.config.schema import Wandb
from stack.observe.wandb.environment import DECIDED


def load() -> Any:
    """The module wandb. Typed as Any, because its annotations are narrower than the values that it accepts."""
    import wandb

    return wandb


def init(cfg: Wandb, folder: Path, run_id: str, *, mode: str, **changed: Any) -> Any:
    """Opens the run `run_id`, new or existing, as a `wandb.Run` with the library's files below `folder`/wandb.

    The library prints nothing. The server has half of `cfg.timeout_s` to answer now, and half of it to receive the rest
    at the end.

    Args:
        cfg: the section `log.wandb` of the config.
        folder: the run directory, or a folder in it.
        run_id: id of the W&B run.
        mode: `online`, `offline` or `shared`.
        changed: settings of the library named `x_...`, and arguments of `wandb.init`, which override those from `cfg`.

    Raises:
        wandb.Error, TimeoutError, ValueError: the server cannot be reached or refuses, or a variable has a value that
            the library does not know; see `failures`.
    """
    wandb = load()
    for name in DECIDED:
        # The config replaces these variables. With `disabled` the library would start no service process, and it
        # refuses unknown values.
        os.environ.pop(name, None)
    # `setup` silences output outside of a run too. Without info the library asks for no API key, even on a terminal.
    quiet = {"quiet": True, "show_info": False, "show_warnings": False, "show_errors": False}
    wandb.setup(wandb.Settings(**quiet))
    settings = wandb.Settings(
        **quiet,
        console="off",
        disable_code=True,
        save_code=False,
        use_dot_wandb=False,
        init_timeout=cfg.timeout_s / 2,
        finish_timeout=cfg.timeout_s / 2,
        finish_timeout_raises=True,
        **{name: changed.pop(name) for name in list(changed) if name.startswith("x_")},
    )
    identity = {"project": cfg.project, "entity": cfg.entity, "group": cfg.group, "tags": list(cfg.tags)}
    return wandb.init(
        **{**identity, **changed},
        dir=str(folder),
        id=run_id,
        resume="allow",
        mode=mode,
        settings=settings,
    )


def failures() -> tuple[type[Exception], ...]:
    """The exceptions of `init` whose cause is the server or one of W&B's environment variables."""
    return (load().Error, TimeoutError, ValueError)


def teardown(exit_code: int = 1) -> None:
    """Ends the library's service process after it has finished its work, for which it may wait."""
    load().teardown(exit_code=exit_code)


def kill() -> None:
    """Removes the library's exit hook, which may wait for ever, and kills its service process, which keeps this
    process's standard output open. The library has no public function for either; its version is pinned."""
    try:
        service = load().setup().assert_service()
    except (AssertionError, ValueError):
        # The library has started no service, or refuses the value of one of its environment variables.
        return
    service._cleanup()
    service._proc._process.kill()


def describe(error: BaseException) -> str:
    """An error of the library on one line, with its class and without a full stop at the end."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
