"""The driver's checks of hosts. A script replaces ssh, and runs the real probe on this machine."""

import json
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from stack.errors import HostError
from stack.health.odd import Odd, odd_ones
from stack.launch import preflight, probe
from stack.launch.hosts import Host

#: The script in the place of ssh. A table beside it has for each host the output and exit code, or changes of the
#: probe's answer.
_SSH = """#!{python}
import json, os, pathlib, subprocess, sys, time
host, command = sys.argv[-2:]
plays = json.loads(pathlib.Path(__file__).with_name("plays.json").read_text())[host]
if "say" in plays:
    print(plays["say"], file=sys.stderr)
    sys.exit(plays["exit"])
time.sleep(plays.get("sleep", 0))
print("Welcome to", host)
run = plays.get("run", command)
env = {{**os.environ, **plays.get("env", {{}})}}
done = subprocess.run(run, shell=True, stdout=subprocess.PIPE, text=True, env=env)
if done.stdout:
    answer = json.loads(done.stdout)
    answer |= plays.get("change", {{}})
    for clock in ("asked", "answered"):
        answer[clock] += plays.get("ahead", 0)
    print(json.dumps(answer))
sys.exit(done.returncode)
"""
_HERE = Host("first", 2, here=True)


@pytest.fixture
def examine(tmp_path, monkeypatch):
    """`examine({host: entry of the table}, slots=2)` returns the reports on this host and on those hosts."""
    ssh = tmp_path / "bin/ssh"
    ssh.parent.mkdir()
    ssh.write_text(_SSH.format(python=sys.executable))
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(plays: dict, *, slots: int = 2, timeout_s: float = 60.0, check=preflight.examine, requests=()):
        (tmp_path / "bin/plays.json").write_text(json.dumps(plays))
        hosts = [_HERE, *(Host(name, slots, here=False) for name in plays)]
        reports = check(hosts, tmp_path / "runs", timeout_s=timeout_s, requests=requests)
        assert list((tmp_path / "runs").iterdir()) == []
        return reports

    return run


def test_this_host_alone_is_well(examine):
    [report] = examine({})
    assert report.faults == ()
    assert report.about.versions["torch"].startswith("2.")
    assert report.about.python == sys.executable
    assert report.about.memory_free > 0
    assert report.skew_s == pytest.approx(0)
    assert (report.address, report.interface) == ("127.0.0.1", None)


@pytest.mark.parametrize(
    ("play", "fault"),
    [
        (
            {"say": "ssh: Could not resolve hostname b: Name or service not known", "exit": 255},
            "its name does not resolve",
        ),
        ({"say": "ssh: connect to host b port 22: Connection refused", "exit": 255}, "ssh is refused; start sshd"),
        ({"say": "ssh: connect to host b port 22: No route to host", "exit": 255}, "cannot be reached"),
        ({"say": "b: Permission denied (publickey).", "exit": 255}, "ssh-copy-id b"),
        ({"say": "Host key verification failed.", "exit": 255}, "run `ssh b true` once"),
        ({"say": "sh: 1: exec: python: not found", "exit": 127}, f"there is no {sys.executable}"),
        ({"run": f"{sys.executable} -m stack.nothing"}, "No module named stack.nothing); install the same stack"),
        ({"run": "echo broken >&2; false"}, "failed: broken"),
    ],
)
def test_a_host_that_does_not_answer_says_why(examine, play, fault):
    first, second = examine({"b": play})
    # Only the cause is reported, not the faults that follow from it.
    assert first.faults == ()
    [line] = second.faults
    assert line.startswith("b: ")
    assert fault in line


def test_a_host_that_is_silent_is_not_waited_for(examine):
    _, second = examine({"b": {"sleep": 600}}, timeout_s=5)
    assert second.faults == ("b: no answer within 5 s; the host may be overloaded",)


def test_nobody_is_waited_for_after_ctrl_c(examine):
    began = time.monotonic()
    requests = []
    threading.Timer(1, requests.append, [signal.SIGINT]).start()
    examine({"b": {"sleep": 600}}, requests=requests)
    assert time.monotonic() - began < 10


def test_the_odd_version_is_named(examine, tmp_path):
    about = tmp_path / "old/torch-2.12.0.dist-info/METADATA"
    about.parent.mkdir(parents=True)
    about.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.12.0\n")
    paths = ":".join([str(tmp_path / "old"), *sys.path])
    first, second, third = examine({"b": {}, "c": {"env": {"PYTHONPATH": paths}}})
    here = first.about.versions["torch"]
    assert f"c has torch 2.12.0, the others {here}; install the same version there" in third.faults
    assert not any("torch" in line for line in (*first.faults, *second.faults))


def test_too_few_gpus_a_wrong_clock_and_another_driver(examine):
    eight = {"usable_gpus": 8, "driver": "580.1", "gpus": [{"name": "H100", "total_mib": 100, "free_mib": 100}]}
    seven = {**eight, "usable_gpus": 7, "driver": "570.2", "gpus": [{"name": "H100", "total_mib": 4096, "free_mib": 1}]}
    _, _, third, late = examine(
        {"b": {"change": eight}, "c": {"change": seven, "ahead": 600}, "d": {"ahead": -600}}, slots=8
    )
    assert "c has 7 GPUs for 8 ranks; use launch.ranks_per_node=7" in third.faults
    assert any(line.startswith("c has driver 570.2, the others ") for line in third.notes)
    assert any(line.startswith("c: another process has 4.0 GiB of GPU 0") for line in third.notes)
    assert any("c: its clock is" in line and "ahead of" in line for line in third.notes)
    assert any("d: its clock is" in line and "behind" in line for line in late.notes)


def test_names_that_mean_the_host_itself(examine):
    routed = {"peer": "127.0.0.1", "source": "127.0.0.1", "interface": "lo"}
    _, second = examine({"b": {"change": {"route": routed, "own_address": "127.0.1.1", "hostname": "node-b"}}})
    assert "b resolves first to itself (127.0.0.1); use a name in the hostfile that all hosts know" in second.faults
    assert "b: its own name node-b resolves to 127.0.1.1; gloo needs GLOO_SOCKET_IFNAME there" in second.notes


def test_address_and_interface_are_those_of_the_route(examine):
    routed = {"peer": "10.1.2.3", "source": "10.1.2.4", "interface": "ib0"}
    _, second = examine({"b": {"change": {"route": routed}}})
    assert (second.address, second.interface) == ("10.1.2.4", "ib0")


def test_another_folder_of_the_same_name(examine):
    fault = "is a different folder there; put run.root on a file system that all hosts share"
    _, second = examine({"b": {"change": {"folder_fault": fault}}})
    assert any(line.endswith(f"/runs {fault}") for line in second.faults)


def test_a_launch_gets_one_line(examine):
    refused = {"say": "Connection refused", "exit": 255}
    with pytest.raises(
        HostError, match=r"^b: ssh is refused; start sshd there \(and 1 more; stack doctor lists them\)"
    ):
        examine({"b": refused, "c": refused}, check=preflight.check_hosts)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match="file/runs cannot be written here"):
        preflight.examine([_HERE], tmp_path / "file/runs")


@pytest.mark.parametrize(
    ("folder", "fault"),
    [("there", "is a different folder there"), ("nowhere", "does not exist there"), ("file", "cannot be read")],
)
def test_the_probe_looks_for_the_drivers_file(tmp_path, folder, fault, monkeypatch, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    question = {"folder": str(tmp_path / folder), "token": "t", "answer": "a", "peer": "127.0.0.1", "wait_s": 0.0}
    monkeypatch.setattr(sys, "stdin", _lines(tmp_path, json.dumps(question)))
    probe.main()
    about = probe.About.from_json(capsys.readouterr().out)
    assert fault in about.folder_fault
    assert about.route.source == "127.0.0.1"
    assert not (tmp_path / "there/a").exists()


def _lines(folder: Path, text: str):
    (folder / "question").write_text(text + "\n")
    return (folder / "question").open()


def test_the_odd_one_is_the_rarer_and_of_two_the_second():
    assert odd_ones({"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 2}}) == [Odd("a", "x", 1, 2)]
    assert odd_ones({"a": {"x": 1, "y": 0}, "b": {"x": 2, "y": 0}}) == [Odd("b", "x", 2, 1)]
    assert odd_ones({}) == []
