"""Runs one contestant (our engine or a peer) in fresh processes."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Equal to RESULT of contestants/common.py, which is not imported here because it imports torch.
RESULT = "RESULT"
RUN_TIMEOUT_S = 900
ROOT = Path(__file__).parents[1]


class BenchmarkError(Exception):
    """A contestant failed, or two contestants did not do the same work."""


def command_of(contestant: Sequence[str], *, ranks: int) -> list[str]:
    """The command of a contestant: its module, then its arguments."""
    module, *arguments = contestant
    # --standalone makes the launcher choose a free port.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *launcher, "-m", f"benchmarks.contestants.{module}", *arguments]


def shown(command: Sequence[str]) -> str:
    """The command as a user would type it."""
    return shlex.join(["python", *command[1:]])


def run(command: list[str], *, device: str) -> dict[str, Any]:
    """Runs a contestant and returns what its rank 0 reports.

    Raises:
        BenchmarkError: the contestant failed, or took too long.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if device == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=RUN_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise BenchmarkError(f"no end after {RUN_TIMEOUT_S} s: {shown(command)}") from error
    finally:
        # On SIGTERM the launcher stops its ranks; after SIGKILL the ranks would go on running.
        process.terminate()
        process.wait()
    found = [line for line in output.splitlines() if line.startswith(RESULT)]
    if process.returncode or not found:
        tail = "\n".join(output.splitlines()[-80:])
        raise BenchmarkError(f"exit code {process.returncode}: {shown(command)}\n{tail}")
    return json.loads(found[-1].removeprefix(RESULT))
