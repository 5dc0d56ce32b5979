"""A run that the `deepspeed` launcher starts, without `stack`'s driver."""

import pytest

from tests.helpers.pool import free_port
from tests.helpers.runs import DEEPSPEED
from tests.helpers.tiers import in_ci_unless


@pytest.mark.parametrize("flags", in_ci_unless(lambda flags: flags == "--no_local_rank", ["--no_local_rank", ""]))
def test_ranks_of_the_bare_launcher_agree_on_one_run(start, tmp_path, flags):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    master = ("--master_addr", "127.0.0.1", "--master_port", str(free_port()))
    bare = ("--hostfile", str(hostfile), "--no_ssh_check", *master, *flags.split(), "--module", "stack.train")

    run = start({}, (DEEPSPEED, *bare))

    assert run.wait() == 0, run.stdout + run.stderr
    run.assert_nothing_left(within_s=1)
    assert run.json("DONE.json")["step"] == 5
    assert len(run.records()) == 5
    assert all((run.run / f"ranks/{rank}/done.json").exists() for rank in (0, 1))
    assert "5/5" in run.stdout
