"""Sends a run to Weights & Biases so that training neither waits for W&B nor fails with it.

One daemon thread reads metrics.jsonl and makes all calls into the library. A slow import or login, or a hang of the
library, therefore does not delay the training thread.
"""

import queue
import threading
from collections.abc import Callable

from stack.config.schema import Wandb
from stack.observe.wandb import library
from stack.observe.wandb.environment import passed_over
from stack.observe.wandb.node import Node
from stack.observe.wandb.session import Facts, Session


class WandbSink:
    """Sends a run directory to its W&B run, from rank 0. In shared mode, other hosts send their system metrics.

    The id of the W&B run is in the run directory, so every attempt continues the same W&B run, on any host. In mode
    `disabled` nothing is imported, and every call returns at once. No method raises. Call `finish` however the run
    ends: it replaces the exit hook of the library, which may wait for ever for a service that hangs.
    """

    def __init__(self, facts: Facts, cfg: Wandb, *, note: Callable[[str], None], node: int = 0) -> None:
        """
        Args:
            facts: the data of the run directory.
            cfg: the section `log.wandb` of the config.
            note: called with a line for the user at each change of state, in the thread that calls `advance` or
                `finish`.
            node: number of this host; 0 is the host of rank 0.
        """
        self._metrics, self._timeout_s, self._note = facts.metrics, cfg.timeout_s, note
        self._notes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._wake, self._ended = threading.Event(), threading.Event()
        self._exit_code = 0
        self._work: Session | Node
        if node:
            self._work = Node(facts, cfg, node, ended=self._ended)
        else:
            self._work = Session(facts, cfg, note=self._notes.put)
            for line in passed_over(cfg.mode):
                note(line)
        self._failed = threading.Event()
        self._failing = threading.Lock()
        self._imported = False
        self._thread = threading.Thread(target=self._run, name="wandb-sink", daemon=True)
        self._open = cfg.mode == "shared" if node else cfg.mode != "disabled"
        if self._open:
            self._thread.start()

    def advance(self) -> None:
        """Tells the sink that metrics.jsonl has a new row; returns at once."""
        if not self._open:
            return
        self._wake.set()
        if self._failed.is_set():
            self._open = False
        self._tell()

    def finish(self, *, exit_code: int = 0) -> None:
        """Ends the W&B run. Returns after at most `log.wandb.timeout_s`, even if the library hangs. Later calls do
        nothing.

        Args:
            exit_code: 0 marks the run as finished, that of `Requeue` as preempted, others as failed.
        """
        if not self._open:
            return
        self._open = False
        self._exit_code = exit_code
        self._ended.set()
        self._wake.set()
        self._thread.join(self._timeout_s)
        if self._thread.is_alive():
            self._fail(f"not finished within log.wandb.timeout_s={self._timeout_s:g}")
            self._guard(self._kill)
        self._tell()

    def _tell(self) -> None:
        while not self._notes.empty():
            self._note(self._notes.get())

    def _guard(self, call: Callable[[], None]) -> bool:
        """Calls `call`, and returns whether it raised nothing. The first failure turns the sink off and is reported;
        later ones are not."""
        try:
            call()
        # No error of the library may end the run. SystemExit is included because the library's teardown calls sys.exit.
        except (Exception, SystemExit) as error:  # noqa: BLE001
            self._fail(library.describe(error))
            return False
        return True

    def _fail(self, reason: str) -> None:
        text = f"W&B stopped: {reason}; training is not affected, every row is in {self._metrics}; upload it with: "
        with self._failing:
            if not self._failed.is_set():
                self._notes.put(text + self._work.upload_command)
                self._failed.set()

    def _kill(self) -> None:
        if self._imported:
            library.kill()

    # The methods below run in the sink's own thread.

    def _run(self) -> None:
        if not self._guard(self._follow):
            self._guard(self._kill)

    def _follow(self) -> None:
        library.load()
        self._imported = True
        self._work.open()
        while not self._ended.is_set():
            self._wake.wait()
            self._wake.clear()
            self._work.catch_up()
        self._work.catch_up()
        self._work.end(self._exit_code)
