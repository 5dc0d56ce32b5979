"""Weights & Biases as a sink that may fail: training neither waits for it nor learns of its errors.

Every call into the library is made by one daemon thread that reads rows from a queue, so the import, a slow
login or a hang costs the training thread nothing. The library is imported there and nowhere else.
"""

import os
import queue
import secrets
import shlex
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stack.observe.metrics import StepRecord

if TYPE_CHECKING:
    import wandb

#: Seconds for the server to answer at the start; after that the run is kept offline.
INIT_TIMEOUT_S = 30.0
#: Seconds that the library gives its own upload at the end, after which it lets go in good order.
UPLOAD_TIMEOUT_S = 60.0
#: Rows kept while the library takes none, about 10 MB; more of them mean that it hangs.
_QUEUE_ROWS = 10_000
#: Folder inside the W&B run. At its top W&B writes a config.yaml of its own.
_FILES_FOLDER = "stack"


class WandbSink:
    """Sends the rows of one run to W&B, from one rank.

    The run keeps its id in `<run_dir>/wandb/run_id`, so that every attempt continues the same W&B run. W&B's own step
    counter is not used: `step` is the x axis of everything, and a repeated step is told apart by `attempt`.

    `mode` is "online", "offline" or "disabled" (nothing is imported, every call returns at once). Online turns to
    offline when the server cannot be reached or knows no key. `config` and copies of `files`, which must exist, are in
    the run from the start. `note` gets one line for the user on each change of state, always from the thread that
    calls `log` or `finish`. Nothing here raises. Call `finish` however the run ends: the exit hook of the library,
    which it takes the place of, waits for a hanging service without a bound.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        mode: str,
        project: str,
        config: dict[str, Any],
        note: Callable[[str], None],
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        name: str | None = None,
        files: Sequence[Path] = (),
        init_timeout_s: float = INIT_TIMEOUT_S,
    ) -> None:
        self._run_dir = run_dir.absolute()
        self._mode = mode
        self._identity = {"project": project, "entity": entity, "group": group, "tags": list(tags), "name": name}
        self._config = config
        self._files = list(files)
        self._note = note
        self._init_timeout_s = init_timeout_s
        self._rows: queue.Queue[dict[str, Any] | None] = queue.Queue(_QUEUE_ROWS)
        self._notes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._exit_code = 0
        self._upload_command = ""
        self._wandb: Any = None
        self._failed = threading.Event()
        self._failing = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="wandb-sink", daemon=True)
        self._open = mode != "disabled"
        if self._open:
            self._thread.start()

    def log(self, record: StepRecord) -> None:
        """Hands one row over; returns at once."""
        if not self._open:
            return
        row = {name: value for name, value in record.to_dict().items() if value is not None}
        self._put(row)
        if self._failed.is_set():
            self._open = False
        self._tell()

    def finish(self, *, exit_code: int = 0, timeout_s: float = UPLOAD_TIMEOUT_S + 30) -> None:
        """Ends the W&B run within `timeout_s` seconds, whatever the library does; later calls do nothing.

        `exit_code` other than 0 marks the run as failed.
        """
        if not self._open:
            return
        self._open = False
        self._exit_code = exit_code
        if self._put(None):
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                self._abandon(f"it did not finish within {timeout_s:g} s")
        self._tell()

    def _put(self, row: dict[str, Any] | None) -> bool:
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._abandon(f"it has not taken a row for {_QUEUE_ROWS:,} steps")
            return False
        return True

    def _tell(self) -> None:
        while not self._notes.empty():
            self._note(self._notes.get())

    def _guard(self, call: Callable[[], None]) -> bool:
        """Whether `call` went through; the first failure turns the sink off, and it alone is noted."""
        try:
            call()
        # Whatever a library for pictures of a run does, the run goes on. SystemExit: its teardown calls sys.exit.
        except (Exception, SystemExit) as error:  # noqa: BLE001
            self._fail(_describe(error))
            return False
        return True

    def _fail(self, reason: str) -> None:
        text = f"W&B stopped: {reason}; training is not affected, every row is in {self._run_dir / 'metrics.jsonl'}"
        if self._upload_command:
            text += f"; upload what W&B has with: {self._upload_command}"
        with self._failing:
            if not self._failed.is_set():
                self._notes.put(text)
                self._failed.set()

    def _abandon(self, reason: str) -> None:
        """Gives up on a thread that hangs."""
        self._fail(reason)
        self._guard(self._release_process)

    def _release_process(self) -> None:
        """Takes away the library's exit hook, which waits without a bound, and its service process, which keeps our
        standard output open. There is no public way to either; the version of wandb is pinned."""
        if self._wandb is None:
            return
        service = self._wandb.setup().assert_service()
        service._cleanup()
        service._proc._process.kill()

    # All below runs in the sink's own thread.

    def _run(self) -> None:
        if not self._guard(self._work):
            self._guard(self._release_process)

    def _work(self) -> None:
        import wandb

        self._wandb = wandb
        run = self._start()
        run.define_metric("*", step_metric="step")
        self._save_files(run)
        while (row := self._rows.get()) is not None:
            run.log(row)
        self._end(run)

    def _start(self) -> "wandb.Run":
        if self._mode == "online":
            try:
                run = self._init("online")
            except (self._wandb.Error, TimeoutError) as error:
                # Until its service is gone the library holds the run id to be in use.
                self._wandb.teardown(exit_code=1)
                self._notes.put(f"W&B goes on offline: {_describe(error)}")
            else:
                self._upload_command = f"wandb sync --include-online {shlex.quote(run.settings.sync_dir)}"
                self._notes.put(f"W&B run: {run.url}")
                return run
        self._mode = "offline"
        run = self._init("offline")
        self._upload_command = f"wandb sync {shlex.quote(str(self._run_dir / 'wandb'))}/offline-run-*"
        return run

    def _init(self, mode: str) -> "wandb.Run":
        # Also for what the library prints outside of a run. Without info it asks for no key, even on a terminal.
        quiet = {"quiet": True, "show_info": False}
        self._wandb.setup(self._wandb.Settings(**quiet))
        settings = self._wandb.Settings(
            **quiet,
            console="off",
            disable_code=True,
            save_code=False,
            use_dot_wandb=False,
            init_timeout=self._init_timeout_s,
            finish_timeout=UPLOAD_TIMEOUT_S,
            finish_timeout_raises=True,
        )
        return self._wandb.init(
            dir=str(self._run_dir),
            id=_run_id(self._run_dir / "wandb" / "run_id"),
            resume="allow",
            mode=mode,
            config=self._config,
            settings=settings,
            **self._identity,
        )

    def _save_files(self, run: "wandb.Run") -> None:
        """Copies, not the links that W&B makes of a path outside: the run's folder is whole, wherever it is moved."""
        folder = Path(run.dir) / _FILES_FOLDER
        folder.mkdir(exist_ok=True)
        for file in self._files:
            copy = shutil.copy(file, folder)
            run.save(copy, base_path=run.dir, policy="now", glob=False)

    def _end(self, run: "wandb.Run") -> None:
        run.finish(exit_code=self._exit_code)
        # Here and under the deadline, not in the library's exit hook.
        self._wandb.teardown(exit_code=self._exit_code)
        if self._mode == "offline":
            self._notes.put(f"W&B run is on disk; upload it with: {self._upload_command}")


def _describe(error: BaseException) -> str:
    """One line: the errors of this library span several and end in a full stop."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _run_id(path: Path) -> str:
    """The id in `path`, made at the first call and the same ever after."""
    if path.exists() and (known := path.read_text(encoding="ascii").strip()):
        return known
    path.parent.mkdir(parents=True, exist_ok=True)
    new = secrets.token_hex(8)
    # Renamed into place, so that a crash leaves no half of an id.
    draft = path.with_suffix(".tmp")
    draft.write_text(new + "\n", encoding="ascii")
    os.replace(draft, path)
    return new
