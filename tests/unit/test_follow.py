"""Which rank is named, from what the ranks left behind."""

import io
import socket
import subprocess
import sys
import time

import pytest

from stack.launch.follow import follow
from stack.observe.console import Console
from stack.train.rundir import RunDir, write_json


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path)
    run.launcher_log.touch()
    for rank in (0, 1):
        run.rank(rank).mkdir(parents=True)
        # Process ids that nothing has.
        write_json(run.rank(rank) / "rank.json", {"pid": 2**22 + rank, "host": socket.gethostname()})
    return run


def ended(run, code):
    launcher = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({code})"])
    launcher.wait()
    return follow(launcher, run, Console(5, log_every=1, out=io.StringIO()), [], grace_s=1)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_its_launcher_stopped_is_not_the_one_that_failed(run, killed):
    write_json(run.rank(1 - killed) / "stopped.json", {"time": time.time()})

    failure = ended(run, 1)

    assert (failure.type, failure.rank, failure.exit_code) == ("RankFailure", killed, 9)
    assert f"process {2**22 + killed} was killed" in failure.message
