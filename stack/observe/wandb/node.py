"""A client for each further host of a shared W&B run, which sends only the system metrics of its host."""

import json
import threading
from typing import Any

from stack.config.schema import Wandb
from stack.observe.wandb import library
from stack.observe.wandb.session import Facts, invitation

#: Seconds between two looks for the file of the first host.
_LOOK_EVERY_S = 1.0


class Node:
    """Joins the W&B run after the first host has opened it, and does not change the run's state.

    The first host announces the run by a file in the run directory, so no rank waits for another rank's W&B.
    """

    def __init__(self, facts: Facts, cfg: Wandb, number: int, *, ended: threading.Event) -> None:
        """
        Args:
            facts: the data of the run directory.
            cfg: the section `log.wandb` of the config.
            number: number of this host, from 1.
            ended: set when training has ended.
        """
        self._facts, self._cfg, self._label, self._ended = facts, cfg, f"node-{number}", ended
        self.upload_command = f"stack wandb-sync {facts.folder}"
        self._run: Any = None

    def open(self) -> None:
        """Waits until the first host has opened the run, and joins it. Returns earlier if training ends.

        Raises:
            wandb.Error, TimeoutError: the server cannot be reached or refuses.
        """
        path = invitation(self._facts)
        while not path.exists():
            if self._ended.wait(_LOOK_EVERY_S):
                return
        told = json.loads(path.read_text(encoding="ascii"))
        # Each host has a folder of its own: the library names its files by time and run id, which may be equal on two
        # hosts.
        folder = self._facts.folder / "wandb" / self._label
        folder.mkdir(exist_ok=True)
        self._run = library.init(
            self._cfg,
            folder,
            told["id"],
            mode="shared",
            entity=told["entity"],
            project=told["project"],
            x_primary=False,
            x_label=self._label,
            x_update_finish_state=False,
        )

    def catch_up(self) -> None:
        """Does nothing, since this host has no rows to send."""

    def end(self, exit_code: int) -> None:
        """Sends the remaining metrics and closes the run."""
        if self._run is not None:
            self._run.finish(exit_code=exit_code)
            library.teardown(exit_code)
