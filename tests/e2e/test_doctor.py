"""The command `stack doctor` on one host."""

import subprocess
from pathlib import Path

from tests.helpers.runs import STACK

_SMALL = ("launch.ranks_per_node=2", "precision.dtype=bf16")


def doctor(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    words = [STACK, "doctor", *arguments, f"run.root={folder / 'runs'}"]
    return subprocess.run(words, check=False, capture_output=True, text=True, cwd=folder, timeout=200)


def test_hosts_ranks_and_parity(tmp_path):
    done = doctor(tmp_path, "--parity", *_SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    header, host = done.stdout.splitlines()[:2]
    assert header.split()[:2] == ["host", "address"]
    assert host.split()[:2] == ["localhost", "ok"]
    links, fp32, bf16, verdict = done.stdout.splitlines()[-4:]
    assert verdict == "all is well: 2 ranks on 1 host"
    assert links.startswith("2 ranks on 1 host (gloo): ring ")
    assert fp32.startswith("parity fp32, PP2 x DP1, ZeRO-3, 1f1b: worst relative difference ")
    assert fp32.endswith(": ok")
    assert bf16.startswith("parity bf16, ")


def test_a_host_that_cannot_be_used_is_named_and_nothing_is_started(tmp_path):
    (tmp_path / "hosts").write_text("localhost slots=2\nno-such-host.invalid slots=2\n")
    done = doctor(tmp_path, f"launch.hostfile={tmp_path / 'hosts'}")
    assert done.returncode == 9, done.stdout + done.stderr
    rows = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines()[1:3]}
    assert rows == {"localhost": "ok", "no-such-host.invalid": "FAULT"}
    assert done.stderr.startswith("HostError: no-such-host.invalid: ")
    assert list((tmp_path / "runs/doctor").iterdir()) == []


def test_a_wrong_word_costs_one_line(tmp_path):
    done = doctor(tmp_path, "--paritty")
    assert done.returncode == 2
    assert (
        done.stderr == "UsageError: --paritty: stack doctor knows --parity, --config-dir DIR, and overrides key=value\n"
    )
