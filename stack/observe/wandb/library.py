"""How W&B's library is opened and got rid of. It is imported on first use: it takes a second, and may hang."""

import os
from pathlib import Path
from typing import Any

from stack.config.schema import Wandb
from stack.observe.wandb.environment import DECIDED


def load() -> Any:
    """The library. Untyped, for its own types are narrower than what it takes."""
    import wandb

    return wandb


def init(cfg: Wandb, folder: Path, run_id: str, *, mode: str, **changed: Any) -> Any:
    """Opens the run `run_id`, new or known, as a `wandb.Run` with the library's files below `folder`/wandb.

    Silent; half of `cfg.timeout_s` is the server's time to answer, and at the end to take all that is left.

    Args:
        changed: the library's settings, those of `x_...`, and arguments of its `init` that `cfg` does not have.

    Raises:
        wandb.Error, TimeoutError, ValueError: the server cannot be reached or refuses, or a variable has a value that
            the library does not know; see `failures`.
    """
    wandb = load()
    for name in DECIDED:
        # The library would start no service for `disabled`, and refuse a word that it does not know.
        os.environ.pop(name, None)
    # Also for what the library prints outside of a run. Without info it asks for no key, even on a terminal.
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
    """What `init` raises where the server, or a variable of W&B's in the environment, is to blame."""
    return (load().Error, TimeoutError, ValueError)


def teardown(exit_code: int = 1) -> None:
    """Ends the library's service process in good order. May wait."""
    load().teardown(exit_code=exit_code)


def kill() -> None:
    """Takes away the library's exit hook, which waits without a bound, and its service process, which keeps our
    standard output open. There is no public way to either; the version of wandb is pinned."""
    try:
        service = load().setup().assert_service()
    except (AssertionError, ValueError):
        # The library has started none, or refuses what its variables in the environment say.
        return
    service._cleanup()
    service._proc._process.kill()


def describe(error: BaseException) -> str:
    """One line: the errors of this library span several and end in a full stop."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
