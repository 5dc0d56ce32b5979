"""Weights & Biases as a sink that may fail: training neither waits for it nor learns of its errors.

Every call into the library is made by one daemon thread that reads metrics.jsonl, so the import, a slow login or a hang
costs the training thread nothing.
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
    """The W&B run of a run directory, from one rank; on other hosts, in shared mode, the metrics of their system.

    The run keeps its id in the run directory, so that every attempt continues the same W&B run, on any host. Mode
    `disabled` imports nothing, and every call returns at once. `note` gets one line for the user on each change of
    state, always from the thread that calls `advance` or `finish`. Nothing here raises. Call `finish` however the run
    ends: the exit hook of the library, which it takes the place of, waits for a hanging service without a bound.
    """

    def __init__(self, facts: Facts, cfg: Wandb, *, note: Callable[[str], None], node: int = 0) -> None:
        """
        Args:
            node: number of the host, whose W&B this is; 0 is the one with metrics.jsonl.
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
        """Says that metrics.jsonl has a new row; returns at once."""
        if not self._open:
            return
        self._wake.set()
        if self._failed.is_set():
            self._open = False
        self._tell()

    def finish(self, *, exit_code: int = 0) -> None:
        """Ends the W&B run within `log.wandb.timeout_s`, whatever the library does; later calls do nothing.

        `exit_code` other than 0 marks the run as failed, that of `Requeue` as preempted.
        """
        if not self._open:
            return
        self._open = False
        self._exit_code = exit_code
        self._ended.set()
        self._wake.set()
        self._thread.join(self._timeout_s)
        if self._thread.is_alive():
            self._fail(f"it did not finish within log.wandb.timeout_s={self._timeout_s:g}")
            self._guard(self._kill)
        self._tell()

    def _tell(self) -> None:
        while not self._notes.empty():
            self._note(self._notes.get())

    def _guard(self, call: Callable[[], None]) -> bool:
        """Whether `call` went through; the first failure turns the sink off, and it alone is noted."""
        try:
            call()
        # Whatever a library for pictures of a run does, the run goes on. SystemExit: its teardown calls sys.exit.
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

    # All below runs in the sink's own thread.

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
