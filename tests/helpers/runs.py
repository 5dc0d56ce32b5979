"""Starts real commands as a user does, each in a process of its own, and finds all processes that come from them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

from stack.observe.jsonl import read
from stack.observe.metrics import StepRecord

STACK = str(Path(sys.executable).with_name("stack"))
DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))
#: Every process that comes from a command inherits this variable, even if it left the session or lost its parent.
_MARK = "STACK_TEST_COMMAND"
_WANDB_S = 10
_PATIENCE_S = 120

_T = TypeVar("_T")


class Command:
    """A started command. Its output is in `folder`, and its runs are below `folder`/runs."""

    def __init__(self, command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None):
        """
        Args:
            command: the words of the command.
            folder: folder for the output; made if needed.
            environment: variables in addition to those of this process, from which W&B's variables are removed.
        """
        self.folder, self._mark = folder, uuid.uuid4().hex
        folder.mkdir(parents=True, exist_ok=True)
        own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        with self._output("stdout").open("wb") as out, self._output("stderr").open("wb") as err:
            self.process = subprocess.Popen(
                list(command),
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                env={**own, **(environment or {}), "CUDA_VISIBLE_DEVICES": "", _MARK: self._mark},
            )

    def _output(self, stream: str) -> Path:
        return self.folder / f"{stream}-{self._mark[:6]}.txt"

    @property
    def stdout(self) -> str:
        return self._output("stdout").read_text()

    @property
    def stderr(self) -> str:
        return self._output("stderr").read_text()

    def wait_for(self, probe: Callable[[], _T | None], what: str) -> _T:
        """Waits until `probe` returns a value that is not empty, and returns it. Fails if the command ends before."""
        deadline = time.monotonic() + _PATIENCE_S
        while not (found := probe()):
            ended = self.process.poll() is not None
            if ended and (found := probe()):
                break
            assert not ended, f"the command ended without {what}:\n{self.stdout}{self.stderr}"
            assert time.monotonic() < deadline, f"{what} did not come within {_PATIENCE_S} s"
            time.sleep(0.05)
        return found

    def wait(self, timeout_s: float = _PATIENCE_S) -> int:
        """Waits until the command has ended, and returns its exit code."""
        return self.process.wait(timeout_s)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    # The processes of the command.

    def processes(self) -> list[psutil.Process]:
        """All live processes that come from this command, itself included; `info` of each has name and cmdline."""
        found = psutil.process_iter(["name", "cmdline", "environ", "status"])
        alive = [process for process in found if process.info["status"] != psutil.STATUS_ZOMBIE]
        return [process for process in alive if (process.info["environ"] or {}).get(_MARK) == self._mark]

    def find(self, word: str) -> psutil.Process:
        """Waits for a process of this command with `word` in its command line, and returns it."""

        def search() -> list[psutil.Process]:
            return [process for process in self.processes() if word in " ".join(process.info["cmdline"])]

        return self.wait_for(search, f"the process {word}")[0]

    def rank(self, rank: int) -> psutil.Process:
        return psutil.Process(self.wait_for(lambda: self.json(f"ranks/{rank}/rank.json"), f"rank {rank}")["pid"])

    def assert_nothing_left(self, *, within_s: float) -> None:
        """Fails unless every process has ended after `within_s` seconds. W&B's own processes have some seconds more, to
        notice that their parent has ended."""
        self._assert_gone(within_s, apart_from="wandb-")
        self._assert_gone(_WANDB_S, apart_from="nothing")

    def _assert_gone(self, within_s: float, *, apart_from: str) -> None:
        deadline = time.monotonic() + within_s
        while left := [p.info["cmdline"] for p in self.processes() if not p.info["name"].startswith(apart_from)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)

    def kill(self) -> None:
        """Kills all processes that are left."""
        while left := self.processes():
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.1)
        self.process.wait()

    # The run directory of the command.

    @property
    def run(self) -> Path:
        """Waits for the single run directory below `runs/`, and returns it."""
        [run] = self.wait_for(lambda: list(self.folder.glob("runs/*/*/")), "the run directory")
        return run

    def json(self, name: str) -> dict[str, Any] | None:
        """The content of a JSON file in the run directory, or None where the file does not exist."""
        with contextlib.suppress(FileNotFoundError):
            return json.loads((self.run / name).read_text())
        return None

    def records(self) -> list[StepRecord]:
        with contextlib.suppress(FileNotFoundError):
            return read(self.run / "metrics.jsonl")
        return []

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: len(self.records()) >= step, f"step {step}")
