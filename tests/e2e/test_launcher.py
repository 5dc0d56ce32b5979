"""The bare DeepSpeed launcher, without the driver."""

import pytest

from tests.helpers.pool import free_port
from tests.helpers.runs import DEEPSPEED


@pytest.mark.parametrize("flags", [("--no_local_rank",), ()], ids=["no_local_rank", "stray local_rank"])
def test_ranks_of_the_bare_launcher_agree_on_one_run(start, tmp_path, flags):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    master = ("--master_addr", "127.0.0.1", "--master_port", str(free_port()))
    command = (DEEPSPEED, "--hostfile", str(hostfile), "--no_ssh_check", *master, *flags, "--module", "stack.train")

    run = start({}, command)

    assert run.wait() == 0, run.stdout + run.stderr
    run.assert_nothing_left(within_s=1)
    assert run.json("DONE.json")["step"] == 5
    assert len(run.records()) == 5
    assert all((run.run / f"ranks/{rank}/done.json").exists() for rank in (0, 1))
    assert "5/5" in run.stdout
