"""Another host of a shared W&B run: a client that sends the system metrics of its host and nothing else."""

import json
import threading
from typing import Any

from stack.config.schema import Wandb
from stack.observe.wandb import library
from stack.observe.wandb.session import Facts, invitation

#: Seconds between two looks for the first host's word.
_LOOK_EVERY_S = 1.0


class Node:
    """Joins the run once the first host has opened it, and leaves the run's state to that one.

    The hosts agree through a file in the run directory: no rank waits for another one's W&B.
    """

    def __init__(self, facts: Facts, cfg: Wandb, number: int, *, ended: threading.Event) -> None:
        """
        Args:
            number: of the host, from 1.
            ended: set when there is nothing left to join for.
        """
        self._facts, self._cfg, self._label, self._ended = facts, cfg, f"node-{number}", ended
        self.upload_command = f"stack wandb-sync {facts.folder}"
        self._run: Any = None

    def open(self) -> None:
        """Waits for the run to be there, or the training to end.

        Raises:
            wandb.Error, TimeoutError: the server does not let it in.
        """
        path = invitation(self._facts)
        while not path.exists():
            if self._ended.wait(_LOOK_EVERY_S):
                return
        told = json.loads(path.read_text(encoding="ascii"))
        # The library names its files after the second and the run, which hosts have in common.
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
        """Has no rows."""

    def end(self, exit_code: int) -> None:
        """Sends what is left."""
        if self._run is not None:
            self._run.finish(exit_code=exit_code)
            library.teardown(exit_code)
