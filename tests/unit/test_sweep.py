"""Sweeps with stand-ins for jobs (tests/helpers/fake_stack.py): which jobs are run, with which devices, and the
results."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml

from stack.cli.main import main
from stack.config.compose import compose, to_yaml
from stack.config.multirun import job_id, read
from stack.errors import ConfigError, LayoutError, StackError
from stack.launch.sweep import jobs
from stack.launch.sweep import sweep as sweep_module
from stack.launch.sweep.board import _TITLES
from stack.launch.sweep.jobs import Job, command
from stack.launch.sweep.scheduler import SWEEP_PID
from stack.launch.sweep.slots import Slots, check_room
from stack.launch.sweep.sweep import sweep
from stack.plan import policies
from tests.helpers import fake_stack
from tests.helpers.rows import row

REPOSITORY = Path(__file__).parents[2]
FAKE = (sys.executable, fake_stack.__file__)
DEEP = ["train.steps=5", "schedule.warmup_steps=0"]


class Fakes:
    """Runs sweeps of stand-ins in one folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.root, self._plan, self._journal = folder / "runs", folder / "plan.json", folder / "journal.jsonl"
        self._journal.write_text("")
        monkeypatch.setenv("FAKE_STACK", str(self._plan))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.chdir(folder)

    def __call__(self, *lines: str, acts: dict[str, str] | None = None, together: int = 1) -> int:
        plan = {"config": to_yaml(compose(DEEP)), "row": row(5).to_dict(), "journal": str(self._journal)}
        self._plan.write_text(json.dumps({**plan, "acts": acts or {}, "together": together}))
        return sweep([*lines, *DEEP, f"run.root={self.root}"], stack=FAKE)

    @property
    def events(self) -> list[dict]:
        return [json.loads(line) for line in self._journal.read_text().splitlines()]

    @property
    def began(self) -> list[tuple[str, str]]:
        """Verb and learning rate of each start, in order."""
        return [(event["verb"], event["lr"]) for event in self.events if event["event"] == "began"]

    @property
    def folder(self) -> Path:
        [folder] = self.root.glob("run/sweeps/*")
        return folder

    @property
    def last(self) -> dict[str, dict]:
        """Override of each job -> its last line in sweep.jsonl."""
        rows = map(json.loads, (self.folder / "sweep.jsonl").read_text().splitlines())
        return {" ".join(row["overrides"]): row for row in rows}


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    return Fakes(tmp_path, monkeypatch)


@pytest.fixture
def gpus(tmp_path_factory, monkeypatch):
    """`gpus("4,5")` simulates a host with eight GPUs of which these are visible."""
    folder = tmp_path_factory.mktemp("dev")
    for number in range(8):
        (folder / f"nvidia{number}").touch()
    monkeypatch.setattr(policies, "_DEVICE_FILES", f"{folder}/nvidia[0-9]*")
    return lambda visible: monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


# The identity of jobs.


def test_a_job_is_its_overrides_however_they_are_written():
    one = job_id(["optim.lr=1e-3", "model=llama_4m", "train.steps=5", "run.name=a"])
    assert one == job_id(["run.name='a'", "train.steps=5", "optim.lr=0.0010", "model=llama_4m"])
    assert job_id(["optim.lr=1"]) == job_id(["optim.lr=1.0"])
    assert job_id(["model.config={hidden_size:8,head_dim:4}"]) == job_id(["model.config={head_dim:4,hidden_size:8}"])
    others = [["optim.lr=1e-3"], ["optim.lr=2e-3"], ["run.seed=1"], ["run.name='1'"], ["~model"], []]
    assert len({one, *map(job_id, others)}) == 7


def test_a_sweep_is_what_it_sweeps_over_and_not_how_many_at_once():
    def identity(*lines):
        return read(lines).id

    one = identity("optim.lr=1e-3,2e-3", "run.seed=1,2")
    assert one == identity("run.seed=2,1", "optim.lr=0.002,0.001", "hydra.launcher.max_parallel=2", "hydra.sweep.dir=x")
    assert one != identity("optim.lr=1e-3,2e-3", "run.seed=1,3")
    assert one != identity("optim.lr=1e-3,2e-3", "run.seed=1,2", "train.steps=7")
    optuna = ["hydra/sweeper=optuna", "optim.lr=interval(0.1,0.2)"]
    assert identity(*optuna) == identity(*optuna, "hydra.sweeper.n_trials=7")
    assert identity(*optuna) != identity(optuna[0], "optim.lr=tag(log,interval(0.1,0.2))")


# Jobs that are run, and results.


def test_jobs_are_run_once_and_a_repeated_sweep_skips_them(fakes, capsys, tmp_path):
    assert fakes("optim.lr=0.2,0.1,0.20", "run.seed=3") == 0
    assert fakes.began == [("train", "0.2"), ("train", "0.1")]
    assert [row["state"] for row in fakes.last.values()] == ["done", "done"]
    table = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert [line.split()[-1] for line in table] == ["overrides", "optim.lr=0.1", "optim.lr=0.2"]

    assert fakes("optim.lr=1e-1,2e-1", "run.seed=3", "hydra.launcher.max_parallel=2") == 0
    assert len(fakes.began) == 2
    assert fakes.last["optim.lr=0.1"]["how"] == "skipped"
    assert fakes.last["optim.lr=0.1"]["objective"] == 0.1
    assert "2 done" in capsys.readouterr().out
    # Hydra made no folders.
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "plan.json", "journal.jsonl"}
    assert {path.name for path in fakes.folder.iterdir() if path.is_file()} == {
        "multirun.yaml",
        "sweep.jsonl",
        "sweep.json",
        ".lock",
    }


def test_every_job_has_a_folder_of_its_own_and_the_sweeps_group(fakes):
    assert fakes("optim.lr=0.1,0.2") == 0
    first, second = (event["arguments"] for event in fakes.events if event["event"] == "began")
    assert f'log.wandb.group="{fakes.folder.name}"' in first
    assert fakes.last["optim.lr=0.1"]["job"] in next(word for word in first if word.startswith("run.root="))
    assert fakes.last["optim.lr=0.2"]["run"].startswith(str(fakes.folder / fakes.last["optim.lr=0.2"]["job"]))
    assert second != first


def test_a_group_of_the_users_stays(fakes):
    assert fakes("optim.lr=0.1,0.2", "log.wandb.group=mine") == 0
    assert all(f'log.wandb.group="{fakes.folder.name}"' not in event["arguments"] for event in fakes.events)


def test_one_value_is_a_sweep_of_one_job(fakes):
    assert fakes("optim.lr=0.1") == 0
    assert fakes.began == [("train", "0.1")]


def test_a_failing_job_fails_alone_and_is_tried_again(fakes, capsys):
    assert fakes("optim.lr=0.5,0.1,0.2", acts={"0.5": "fail", "0.2": "crash"}) == 9
    assert [row["state"] for row in fakes.last.values()] == ["failed", "done", "failed"]
    assert fakes.last["optim.lr=0.5"]["exit_code"] == 7
    told = capsys.readouterr().out
    assert "exit code 7: NumericsError: the loss is nan" in told
    assert "exit code 1: RankFailure: rank 1 was killed" in told
    assert "1 done, 2 failed" in told
    left = {lr: row["run"] for lr, row in fakes.last.items()}

    assert fakes("optim.lr=0.5,0.1,0.2") == 0
    # The job with a checkpoint is resumed; the one without starts in a new run directory.
    assert fakes.began[3:] == [("train", "0.5"), ("resume", "0.2")]
    assert fakes.last["optim.lr=0.2"]["run"] == left["optim.lr=0.2"]
    assert fakes.last["optim.lr=0.5"]["run"] != left["optim.lr=0.5"]
    assert Path(left["optim.lr=0.5"], "FAILED.json").exists()


def test_the_best_run_is_told_with_the_command_that_goes_on_with_it(fakes, capsys):
    assert fakes("optim.lr=0.3,0.2,0.1,0.05", acts={"0.1": "fail", "0.05": "nan"}) == 9
    run = fakes.last["optim.lr=0.2"]["run"]
    told = capsys.readouterr().out
    assert "\nbest: held-out loss 0.200000  optim.lr=0.2\n" in told
    [command] = re.findall("to continue this run: (.*)", told)
    assert shlex.split(command) == ["stack", "resume", run, "train.steps=10"]
    assert "3 done, 1 failed" in told
    kept = json.loads((fakes.folder / "sweep.json").read_text())
    assert kept["jobs"] == {"done": 3, "failed": 1}
    best = kept["best"]
    assert (best["overrides"], best["run"], best["value"]) == (["optim.lr=0.2"], run, 0.2)
    assert (best["measure"], best["go_on"]) == ("held-out loss", command)
    # sweep.jsonl has no objective for it either.
    assert fakes.last["optim.lr=0.05"]["objective"] is None


def test_without_evaluations_the_best_run_has_the_lowest_training_loss(fakes, capsys):
    assert fakes("optim.lr=0.5,0.2", acts={"0.5": "unevaluated", "0.2": "unevaluated"}) == 0
    assert "best: training loss 0.200000  optim.lr=0.2" in capsys.readouterr().out
    assert json.loads((fakes.folder / "sweep.json").read_text())["best"]["loss"] == 0.2


def test_a_sweep_without_a_finished_job_has_no_best_run(fakes, capsys):
    assert fakes("optim.lr=0.5", acts={"0.5": "fail"}) == 9
    assert "best" not in capsys.readouterr().out
    assert json.loads((fakes.folder / "sweep.json").read_text())["best"] is None


def test_a_run_that_cannot_be_read_fails_alone(fakes, capsys):
    assert fakes("optim.lr=0.5,0.1", acts={"0.5": "crash", "0.1": "crash"}) == 9
    Path(fakes.last["optim.lr=0.5"]["run"], "config.yaml").write_text("[")
    assert fakes("optim.lr=0.5,0.1") == 9
    assert "exit code 3: ConfigError" in capsys.readouterr().out
    assert [row["state"] for row in fakes.last.values()] == ["failed", "done"]


def test_a_job_whose_files_are_damaged_fails_alone(fakes, capsys):
    assert fakes("optim.lr=0.1,0.2,0.3,0.4") == 0
    runs = [Path(row["run"]) for row in fakes.last.values()]
    (runs[0] / "metrics.jsonl").write_text("{\n")
    shutil.rmtree(runs[1].parents[1])
    runs[1].parents[1].write_text("no folder")
    log = runs[2].parents[1] / "log.txt"
    log.unlink()
    log.mkdir()
    capsys.readouterr()

    assert fakes("optim.lr=0.1,0.2,0.3,0.4") == 9
    assert [row["state"] for row in fakes.last.values()] == ["failed", "failed", "failed", "done"]
    told = capsys.readouterr().out
    for words in ("metrics.jsonl:1 is not", "FileExistsError", "IsADirectoryError"):
        assert words in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("run.seed=range(0,0)", "there is no value in that range"),
        ("run.seed=range(0,1000000000)", "1,000,000,000 values; a sweep has at most 10,000 jobs"),
        ("run.seed=range(0,200) optim.lr=range(1,100)", "19,800 jobs; a sweep has at most 10,000"),
        ("run.seed=glob(*)", "list the values"),
    ],
)
def test_values_that_are_none_or_too_many_are_refused_at_once(words, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        read(words.split())


def test_fail_fast_starts_no_more(fakes):
    assert fakes("optim.lr=0.5,0.1", "hydra.launcher.fail_fast=true", acts={"0.5": "fail"}) == 9
    assert fakes.began == [("train", "0.5")]


def test_fail_fast_stops_the_others(fakes):
    acts = {"0.5": "fail", "0.1": "wait"}
    lines = ["optim.lr=0.1,0.5", "hydra.launcher.fail_fast=true", "hydra.launcher.max_parallel=2"]
    assert fakes(*lines, acts=acts, together=2) == 9
    assert [row["state"] for row in fakes.last.values()] == ["stopped", "failed"]
    assert not any(psutil.pid_exists(event["pid"]) for event in fakes.events)


def test_ctrl_c_stops_all_jobs_and_the_next_sweep_resumes_them(fakes, capsys):
    acts = {"0.1": "wait", "0.2": "interrupt"}
    lines = ["optim.lr=0.1,0.2,0.3", "hydra.launcher.max_parallel=2"]
    assert fakes(*lines, acts=acts, together=2) == 130
    assert [row["state"] for row in fakes.last.values()] == ["stopped", "stopped"]
    assert fakes.last["optim.lr=0.1"]["exit_code"] == 143
    assert "2 stopped, 1 waiting" in capsys.readouterr().out
    assert not any(psutil.pid_exists(event["pid"]) for event in fakes.events)

    assert fakes(*lines) == 0
    assert sorted(fakes.began[2:]) == [("resume", "0.2"), ("train", "0.1"), ("train", "0.3")]
    assert [row["state"] for row in fakes.last.values()] == ["done"] * 3


def test_sigterm_lets_the_jobs_save_and_the_next_sweep_resumes_them(fakes):
    assert fakes("optim.lr=0.1,0.2", acts={"0.1": "save"}) == 75
    assert [(row["state"], row["exit_code"]) for row in fakes.last.values()] == [("stopped", 75)]

    assert fakes("optim.lr=0.1,0.2") == 0
    assert fakes.began[1:] == [("resume", "0.1"), ("train", "0.2")]


def test_a_job_ends_with_the_sweep_that_was_killed():
    script = "import time; from stack.launch.sweep.sweep import end_with_sweep; end_with_sweep(); time.sleep(60)"
    killed = subprocess.Popen([sys.executable, "-c", "pass"])
    job = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, SWEEP_PID: str(killed.pid)})
    killed.wait()
    assert job.wait(60) == -15


# Devices.


def test_jobs_beside_each_other_share_no_gpu(fakes, gpus):
    gpus("4,5,GPU-6,7")
    lines = ["optim.lr=0.1,0.2,0.3,0.4", "launch.ranks_per_node=2", "hydra.launcher.max_parallel=2"]
    assert fakes(*lines, together=2) == 0
    busy: set[str] = set()
    most = 0
    for event in fakes.events:
        devices = set(event["devices"].split(","))
        assert len(devices) == 2
        if event["event"] == "began":
            assert not busy & devices
            busy |= devices
        else:
            busy -= devices
        most = max(most, len(busy))
    assert most == 4


def test_devices_may_be_more_than_ranks_and_count_for_auto(fakes, gpus):
    gpus("0,1,2,3")
    assert fakes("optim.lr=0.1,0.2", "hydra.launcher.devices=2", "hydra.launcher.max_parallel=2", together=2) == 0
    assert {event["devices"] for event in fakes.events} == {"0,1", "2,3"}


def test_without_gpus_jobs_share_the_cores(fakes, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert fakes("optim.lr=0.1,0.2", "hydra.launcher.max_parallel=2", together=2) == 0
    assert {event["devices"] for event in fakes.events} == {""}


# Optuna.


def test_optuna_gets_the_held_out_loss_and_repeats_itself(fakes):
    pytest.importorskip("optuna")
    lines = ["hydra/sweeper=optuna", "optim.lr=interval(0.1,0.9)", "hydra.sweeper.n_trials=3"]
    assert fakes(*lines) == 0
    rates = [lr for _, lr in fakes.began]
    assert len(set(rates)) == 3
    found = yaml.safe_load((fakes.folder / "optimization_results.yaml").read_text())
    assert found["best_value"] == min(map(float, rates))
    assert found["best_params"] == {"optim.lr": found["best_value"]}

    # The repetition has the same trials and one more.
    assert fakes(*lines[:2], "hydra.sweeper.n_trials=4") == 0
    assert [lr for _, lr in fakes.began][:3] == rates
    assert len(fakes.began) == 4


def test_optuna_goes_on_after_a_failing_job(fakes):
    pytest.importorskip("optuna")
    lines = ["hydra/sweeper=optuna", "optim.lr=0.1,0.5", "hydra/sweeper/sampler=grid"]
    assert fakes(*lines, acts={"0.5": "fail"}) == 9
    assert {row["state"] for row in fakes.last.values()} == {"done", "failed"}
    assert fakes(*lines, acts={"0.1": "fail", "0.5": "fail"}) == 9


# Slurm.


@pytest.fixture
def salloc(tmp_path, monkeypatch):
    """A stand-in for salloc on PATH, which prints its options and runs the command on this host."""
    script = tmp_path / "bin" / "salloc"
    script.parent.mkdir()
    script.write_text('#!/bin/bash\nwhile [[ $1 == --* ]]; do echo "$1"; shift; done\nexec "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def slurm(ranks):
    launch = SimpleNamespace(backend="slurm", nodes=2, ranks_per_node=ranks, slurm=["--partition=x"])
    return SimpleNamespace(launch=launch, run=SimpleNamespace(name="big"))


@pytest.mark.usefixtures("salloc")
def test_outside_of_an_allocation_each_job_asks_for_its_own(tmp_path, monkeypatch):
    job = Job("0123abcd", ["optim.lr=1"], [], slurm(8), 2, 8, 8, tmp_path)
    words = command(job, ["train", "optim.lr=1"], ("echo", "stack"))
    printed = subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()
    size = ["--nodes=2", "--ntasks-per-node=8", "--partition=x"]
    assert printed == ["--job-name=big-0123abcd", *size, "stack train optim.lr=1"]
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert command(job, ["train"], ("stack",)) == ["stack", "train"]


@pytest.mark.usefixtures("salloc")
def test_what_slurm_cannot_be_asked_for_is_refused(monkeypatch):
    jobs._check_allocation(slurm(8))
    with pytest.raises(LayoutError, match="ranks_per_node=auto"):
        jobs._check_allocation(slurm("auto"))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LayoutError, match="no salloc"):
        jobs._check_allocation(slurm(8))


def test_jobs_on_the_same_hosts_run_one_after_another(tmp_path, monkeypatch):
    def job(**launch):
        return Job("0", [], [], SimpleNamespace(launch=SimpleNamespace(**launch)), 2, 8, 8, tmp_path)

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for shared in (job(backend="slurm"), job(backend="torchrun", hostfile="hosts")):
        check_room(Slots(), [shared], 1)
        with pytest.raises(LayoutError, match="the same hosts"):
            check_room(Slots(), [shared, shared], 2)


# Refusals.

REFUSED = {
    "optim.lrr=1,2": (3, "did you mean optim.lr?"),
    "optim.lr=0.1,fast": (3, "job optim.lr=fast: optim.lr=fast: auto or a number is needed"),
    "optim.lr=0.1 parallel.pipeline=2,3": (4, "job parallel.pipeline=3: parallel.pipeline=3 does not divide 4 ranks"),
    "optim.lr=interval(0,1)": (3, "add hydra/sweeper=optuna"),
    "run.root=a,b": (3, "all jobs of a sweep lie in one folder"),
    "optim.lr=1,2 hydra.run.dir=x": (3, "hydra.launcher, hydra.sweeper and hydra.sweep.dir"),
    "optim.lr=1,2 hydra.job.chdir=true": (3, "drop it"),
    "optim.lr=1,2 hydra/launcher=basic": (3, "a sweep works with hydra/launcher=stack only; drop it"),
    "optim.lr=1,2 hydra.launcher.max_parallel=1,2": (3, "take one value"),
    "optim.lr=1,2 hydra.launcher.max_parallel=0": (3, "use 1"),
    "optim.lr=1,2 hydra.launcher.max_paralel=2": (3, "max_paralel"),
    "optim.lr=1,2 hydra.launcher.devices=2": (3, "no GPU that can be seen"),
    "optim.lr=1,2 hydra/sweeper=optunaa": (3, "optunaa"),
    "optim.lr=1,2 hydra/sweeper=optuna train.eval_every=0": (3, "train.eval_every=20"),
    "--foo optim.lr=1,2": (3, "not an override"),
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_cannot_work_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    exit_code, words = REFUSED[line]
    monkeypatch.setattr(sweep_module.Scheduler, "run", lambda *_: pytest.fail("a job was started"))
    assert main(["train", "-m", *line.split()]) == exit_code
    told = capsys.readouterr()
    assert words in told.err
    assert told.err.count("\n") == 1
    assert not told.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "words"),
    {
        "launch.ranks_per_node=2 hydra.launcher.max_parallel=3": "use hydra.launcher.max_parallel=2",
        "launch.ranks_per_node=4 hydra.launcher.devices=2": "use hydra.launcher.devices=4",
        "launch.ranks_per_node=8": "there are 4 here",
        "hydra.launcher.devices=5": "the most is 4",
    }.items(),
)
def test_jobs_that_do_not_fit_the_gpus_are_refused(tmp_path, monkeypatch, gpus, capsys, line, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_module.Scheduler, "run", lambda *_: pytest.fail("a job was started"))
    gpus("0,1,2,3")
    assert main(["train", "-m", "optim.lr=1,2,3", *line.split()]) in (3, 4)
    assert words in capsys.readouterr().err


def test_a_second_command_on_the_same_sweep_is_refused(fakes, tmp_path):
    assert fakes("optim.lr=0.1,0.2") == 0
    holder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        about = psutil.Process(holder.pid)
        place = sweep_module.RunLock(tmp_path)._holder.place
        lock = {"host": "here", "place": place, "pid": holder.pid, "since": time.time()}
        lock["started"] = about.create_time() - psutil.boot_time()
        (fakes.folder / "lock.json").write_text(json.dumps(lock))
        with pytest.raises(StackError, match=f"in use by process {holder.pid}"):
            fakes("optim.lr=0.1,0.2")
    finally:
        holder.kill()
        holder.wait()


# docs/sweeps.md

DOCS = (REPOSITORY / "docs/sweeps.md").read_text()
COMMANDS = re.findall(r"^((?:\w+=\S+ )?stack train .*)$", DOCS, re.MULTILINE)


@pytest.mark.usefixtures("salloc")
def test_every_command_of_the_docs_sweeps(fakes, gpus):
    for line in COMMANDS:
        if "sweeper=optuna" in line and importlib.util.find_spec("optuna") is None:
            continue
        setting, _, words = line.rpartition("stack train -m ")
        gpus(setting.strip().partition("=")[2])
        before = len(fakes.began)
        assert fakes(*shlex.split(words)) == 0, line
        assert len(fakes.began) > before, line
    # A sweep with more values ran only the new ones.
    assert [lr for _, lr in fakes.began].count("0.001") == 2 + 1
    assert [lr for _, lr in fakes.began].count("0.01") == 1


def test_the_docs_tell_the_table_and_the_file_as_they_are(fakes):
    assert re.search("^" + " +".join(_TITLES) + "$", DOCS, re.MULTILINE)
    assert fakes("optim.lr=0.1") == 0
    fields = re.search(r"\| field \|.*?\n\n", DOCS, re.DOTALL)
    told = [name for cell in re.findall(r"^\| (`.*?) \|", fields[0], re.MULTILINE) for name in re.findall(r"\w+", cell)]
    [row] = fakes.last.values()
    assert told == list(row)


def test_make_sweep_is_the_same():
    # Without --no-print-directory, a make inside `make test` would also print the folders that it enters and leaves.
    make = subprocess.run(
        ["make", "-n", "--no-print-directory", "sweep", "ARGS=a=1,2"],
        check=True,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert make.stdout.splitlines()[-1].endswith("stack train -m a=1,2")
