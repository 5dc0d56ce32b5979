"""Weights & Biases with the real library: offline, with a stand-in for the server, and with many kinds of failures."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml
from matplotlib.figure import Figure

from stack.checkpoint.manifest import File, Manifest, folder_of
from stack.config.compose import compose
from stack.config.schema import Config
from stack.errors import StackError, UsageError
from stack.observe.jsonl import MetricsWriter, read
from stack.observe.metrics import StepRecord
from stack.observe.wandb.session import Facts, Session, run_id
from stack.observe.wandb.sink import WandbSink
from stack.plan.layout import make_plan
from stack.train import rundir, tracking
from stack.train.rundir import RunDir
from tests.helpers.rows import row
from tests.helpers.tiers import in_ci_unless
from tests.helpers.wandb_server import KEY, Run, WandbServer

OURS = ("_", "pictures/")


def values(record: StepRecord) -> dict:
    """The values that W&B must have for a row."""
    found = {name: value for name, value in record.to_dict().items() if value is not None}
    stages = found.pop("stage_busy_s", ())
    return found | {f"stages/{stage}/busy_s": busy_s for stage, busy_s in enumerate(stages)}


@pytest.fixture(autouse=True)
def clean_library(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Removes the API key and settings of the user who runs the tests, and the library's session of the test before."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    forget_library()


def forget_library() -> None:
    """Makes the library forget its service process, as in a new process."""
    from wandb.sdk import wandb_setup

    wandb_setup._singleton = None
    os.environ.pop("WANDB_SERVICE", None)


class Notes(list[str]):
    def __call__(self, text: str) -> None:
        assert threading.current_thread() is threading.main_thread()
        self.append(text)


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture(scope="module")
def config() -> Config:
    return compose(["log.wandb.project=stack-test", "log.wandb.tags=[cpu]", "log.wandb.timeout_s=40"])


class Started:
    """A run directory and its attempts. As in the worker, rows go to metrics.jsonl, and the sink is told about them."""

    def __init__(self, cfg: Config, root: Path, notes: Notes) -> None:
        self.cfg = replace(cfg, run=replace(cfg.run, root=str(root)))
        self.plan, self.corpus, self.notes = make_plan(self.cfg), root, notes
        (root / "tokenizer").mkdir(parents=True)
        self.run: RunDir = None  # type: ignore[assignment]

    def begin(self, mode: str, **changed) -> "Started":
        self.cfg = replace(self.cfg, log=replace(self.cfg.log, wandb=replace(self.cfg.log.wandb, mode=mode, **changed)))
        if self.run is None:
            self.run = rundir.create(self.cfg, self.plan, corpus=self.corpus)
        else:
            rundir.begin_again(self.run, self.cfg, self.plan, corpus=self.corpus)
        rundir.write_json(self.run.ds_config, {"zero_optimization": {"stage": 3}})
        self.writer = MetricsWriter(self.run.metrics)
        self.sink = WandbSink(self.facts, self.cfg.log.wandb, note=self.notes)
        return self

    @property
    def facts(self) -> Facts:
        return tracking.facts(self.run, self.cfg)

    def steps(self, *steps: int, **changed) -> None:
        for step in steps:
            started = self.facts.started
            record = row(step, **{"attempt": self.run.attempt, "time": started + 5 * step, **changed})
            self.writer.write(record)
            self.sink.advance()

    def checkpoint(self, step: int) -> Path:
        folder = folder_of(self.facts.checkpoints, step)
        folder.mkdir(parents=True)
        (folder / "rank-00000.safetensors").write_bytes(b"weights")
        about = Manifest(
            step=step, state={}, updates=step, scaling=None, states=("master",), course={}, heldout_loss=2.5, plan={},
            versions={}, time=0.0, files=(File("rank-00000.safetensors", 7, "0" * 32),), parameters={},
        )  # fmt: skip
        (folder / "manifest.json").write_text(about.to_json())
        return folder

    def finish(self, exit_code: int = 0) -> None:
        Figure(figsize=(0.1, 0.1)).savefig(self.run.curve)
        self.writer.close()
        self.sink.finish(exit_code=exit_code)

    def sync(self) -> int:
        return tracking.sync(self.run, [])

    @property
    def id(self) -> str:
        return (self.run.path / "wandb" / "run_id").read_text().strip()

    @property
    def truth(self) -> list[dict]:
        return [values(record) for record in read(self.run.metrics)]


@pytest.fixture
def started(config: Config, tmp_path: Path, notes: Notes) -> Started:
    return Started(config, tmp_path, notes)


def plain(item: dict) -> dict:
    return {name: value for name, value in item.items() if not name.startswith(OURS)}


def assert_whole(started: Started, server: WandbServer) -> Run:
    """Checks that the server has one run, with every row of metrics.jsonl once, and with the files; returns the run."""
    assert list(server.runs) == [started.id]
    run = server.runs[started.id]
    assert [plain(item) for item in run.history] == started.truth
    assert run.files["stack/config.yaml"] == started.run.config.read_bytes()
    assert {"stack/ds_config.json", "stack/plan.json", "stack/plan.txt"} <= run.files.keys()
    return run


def inspect(folder: Path, *options: str) -> str:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(folder)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def records(folder: Path) -> dict[str, list[dict]]:
    """Type of a record -> the records of this type in an offline folder of W&B."""
    found: dict[str, list[dict]] = {}
    for line in inspect(folder).splitlines():
        record = json.loads(line)
        found.setdefault(record["type"], []).append(record.get(record["type"]))
    return found


def assert_no_service() -> None:
    def alive() -> list[psutil.Process]:
        found = [child for child in psutil.Process().children() if child.name().startswith("wandb-core")]
        return [service for service in found if service.status() != psutil.STATUS_ZOMBIE]

    # A killed process takes a moment to disappear.
    wait_until(lambda: not alive(), 5.0)


def wait_until(condition: Callable[[], object], timeout_s: float = 40.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_offline_attempts_are_one_run(started: Started) -> None:
    started.begin("offline").steps(1)
    started.steps(2, loss=float("nan"))
    started.steps(3, heldout_loss=0.1 + 0.2)
    checkpoint = started.checkpoint(3)
    started.finish()
    started.begin("offline").steps(3, mfu=0.5)
    started.finish()

    folders = sorted((started.run.path / "wandb").glob("offline-run-*"))
    assert [(folder / f"run-{started.id}.wandb").exists() for folder in folders] == [True, True]
    expected = started.truth
    expected[1]["loss"] = "NaN"
    for folder, truth in zip(folders, (expected[:3], expected[3:]), strict=True):
        found = records(folder)
        assert [plain(record["item"]) for record in found["history"]] == truth
        assert found["history"][-1]["item"]["pictures/curve._type"] == "image-file"
        by_glob = {metric.get("glob_name"): metric.get("step_metric") for metric in found["metric"]}
        assert by_glob["*"] == "step"
        summary = json.loads(inspect(folder, "--summary"))
        assert (summary["project"], summary["name"], summary["tags"]) == ("stack-test", started.run.run_id, ["cpu"])
        assert summary["config"]["ds_config"] == {"zero_optimization": {"stage": 3}}
        assert summary["state"] == "finished"
        copied = folder / "files" / "stack" / "config.yaml"
        assert "mode: offline" in copied.read_text()
        assert not copied.is_symlink()
        assert str(checkpoint) in json.dumps(found["artifact"])
    command = f"stack wandb-sync {started.run.path}"
    assert started.notes == [f"W&B run is on disk; upload it with: {command}"] * 2


def test_nothing_goes_to_standard_output(started: Started, capfd: pytest.CaptureFixture[str]) -> None:
    started.begin("offline").steps(1)
    started.finish()
    assert capfd.readouterr() == ("", "")


def test_disabled_does_nothing(started: Started) -> None:
    started.begin("disabled").steps(1)
    started.finish()
    assert started.notes == []
    assert not (started.run.path / "wandb").exists()
    assert not started.sink._thread.is_alive()


@pytest.mark.parametrize(("key", "reason"), [(KEY, "connection refused"), (None, "No API key configured")])
def test_online_without_a_server_or_a_key_goes_on_offline(
    started: Started, monkeypatch: pytest.MonkeyPatch, key: str | None, reason: str
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    before = time.monotonic()
    started.begin("online", timeout_s=8.0).steps(1)
    assert time.monotonic() - before < 2
    started.finish()
    assert time.monotonic() - before < 8 + 3
    assert started.notes[0].startswith("W&B continues offline: ")
    assert reason in started.notes[0]
    assert "stack wandb-sync" in started.notes[1]
    (folder,) = (started.run.path / "wandb").glob("offline-run-*")
    assert [record["item"]["step"] for record in records(folder)["history"]] == [1]
    assert not any(KEY.encode() in file.read_bytes() for file in started.run.path.rglob("*") if file.is_file())


def test_online_sends_rows_files_figures_pictures_and_references(started: Started, server: WandbServer) -> None:
    started.begin("online").steps(1, stage_busy_s=(2.0, 1.0))
    checkpoint = started.checkpoint(1)
    started.steps(2, checkpoint_write_s=0.5, heldout_loss=2.0, stage_busy_s=(2.0, 0.5))
    started.steps(3, heldout_loss=2.25, stage_busy_s=(2.0, 0.0))
    started.finish()

    run = assert_whole(started, server)
    assert started.notes == [f"W&B run: {server.url}/us/stack-test/runs/{started.id}"]
    assert run.exits == [0]
    assert run.config["optim"]["kind"] == "adamw"
    figures = {name: run.summary[name] for name in ("best_heldout_loss", "final_loss", "tokens_seen", "attempts")}
    assert figures == {"best_heldout_loss": 2.0, "final_loss": 2.75, "tokens_seen": 48960, "attempts": 1}
    assert run.summary["goodput"] == pytest.approx(9 / 15)
    assert run.summary["peak_memory_bytes"] == 3 << 29
    assert run.summary["final_checkpoint"] == str(checkpoint)
    table = json.loads(run.files[run.summary["stages"]["path"]])
    assert table["data"] == [[0, 2.0, pytest.approx(2 / 3)], [1, 0.5, pytest.approx(1 / 6)]]
    assert run.files[run.history[-1]["pictures/curve"]["path"]] == started.run.curve.read_bytes()
    [artifact] = [found for found in server.artifacts.values() if found["artifactTypeName"] == "checkpoint"]
    assert {entry["ref"] for entry in artifact["entries"].values()} == {
        (checkpoint / name).as_uri() for name in ("manifest.json", "rank-00000.safetensors")
    }
    assert json.loads(artifact["metadata"])["step"] == 1
    assert not any(body == b"weights" for path, body in server.requests if path.startswith("/upload"))


def test_a_run_that_was_asked_to_end_is_preempted(started: Started) -> None:
    started.begin("offline").steps(1)
    started.finish(exit_code=75)
    found = records(started.run.path / "wandb")
    assert found["preempting"] == [{}]
    assert found["exit"][0]["exit_code"] == 75


def test_attempts_that_never_reached_the_server_come_with_the_next_one(started: Started, server: WandbServer) -> None:
    started.begin("disabled").steps(1, 2, 3)
    started.finish(exit_code=1)
    started.begin("online").steps(2, 3)
    started.finish(exit_code=1)
    started.begin("offline").steps(3, 4)
    started.finish(exit_code=1)
    started.begin("online").steps(4, 5)
    started.finish()
    run = assert_whole(started, server)
    assert [(item["step"], item["attempt"]) for item in run.history] == [
        *[(1, 1), (2, 1), (3, 1), (2, 2), (3, 2), (3, 3), (4, 3), (4, 4), (5, 4)]
    ]
    assert [item["_step"] for item in run.history] == list(range(9))
    assert run.summary["attempts"] == 4
    assert run.config["log"]["wandb"]["mode"] == "online"


@pytest.mark.parametrize(
    ("when", "fault"),
    in_ci_unless(
        lambda case: case == ("middle", 401),
        itertools.product(("start", "middle"), (401, 500, "stall")),
    ),
)
def test_a_server_that_fails_is_made_good_by_sync(
    started: Started, server: WandbServer, fault: int | str, when: str
) -> None:
    if when == "start":
        server.fault = fault
    started.begin("online", timeout_s=8.0).steps(1, 2)
    if when == "middle":
        wait_until(lambda: server.runs and "stack/plan.txt" in server.runs[started.id].files)
        server.fault = fault
    started.steps(3, 4)
    before = time.monotonic()
    started.finish(exit_code=1)
    assert time.monotonic() - before < 8 + 3
    assert_no_service()
    started.begin("disabled").steps(3, 4, 5)
    started.finish()
    rundir.write_json(started.run.done, {})
    forget_library()
    server.fault = None

    assert started.sync() == 0
    run = assert_whole(started, server)
    artifacts, exits = len(server.artifacts), len(run.exits)
    assert run.exits[-1] == 0
    assert run.summary["attempts"] == 2
    assert started.sync() == 0
    assert_whole(started, server)
    assert (len(server.artifacts), len(run.exits)) == (artifacts, exits + 2)


def test_sync_says_what_it_cannot_do(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    started.begin("disabled").finish()
    with pytest.raises(UsageError, match="finished no step"):
        started.sync()
    started.begin("offline", timeout_s=4.0).steps(1)
    started.finish()
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with pytest.raises(StackError, match=r"did not take the run.*check WANDB_API_KEY"):
        started.sync()
    assert_no_service()


@pytest.mark.parametrize(
    ("name", "value"),
    in_ci_unless(
        lambda case: case == ("WANDB_MODE", "disabled"),
        [
            ("WANDB_MODE", "disabled"),
            ("WANDB_MODE", "nonsense"),
            ("WANDB_DISABLED", "true"),
            ("WANDB_X_PRIMARY", "perhaps"),
        ],
    ),
)
def test_sync_without_a_key_is_one_line_whatever_else_the_environment_says(
    started: Started, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    started.begin("disabled", timeout_s=4.0).steps(1)
    started.finish()
    monkeypatch.setenv(name, value)
    with pytest.raises(StackError, match=r"did not take the run \(.*check WANDB_API_KEY"):
        started.sync()
    assert_no_service()


@pytest.mark.ci
def test_sync_ends_although_the_server_hangs(started: Started, server: WandbServer) -> None:
    started.begin("disabled", timeout_s=6.0).steps(1)
    started.finish()
    server.fault = "stall"
    before = time.monotonic()
    with pytest.raises(StackError, match="did not take the run"):
        started.sync()
    assert time.monotonic() - before < 15
    assert_no_service()


@pytest.mark.usefixtures("server")
def test_sync_refuses_a_run_that_holds_other_rows(started: Started) -> None:
    started.begin("online").steps(1, 2)
    started.finish()
    started.run.metrics.write_text(row(1).to_json() + "\n")
    with pytest.raises(StackError, match=r"ends with step 2 of attempt 1, which .*metrics.jsonl does not have"):
        started.sync()
    assert_no_service()


def test_an_export_is_remembered_and_comes_with_sync(started: Started, server: WandbServer, tmp_path: Path) -> None:
    started.begin("disabled").steps(1)
    started.finish()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    for _ in range(2):
        tracking.remember_export(started.run, tmp_path / "model")
    assert started.sync() == 0
    [artifact] = [found for found in server.artifacts.values() if found["artifactTypeName"] == "export"]
    assert [entry["ref"] for entry in artifact["entries"].values()] == [
        (tmp_path / "model" / "model.safetensors").as_uri()
    ]


@pytest.mark.parametrize("content", [b"[", b"[" * 200_000, b"{}", b"[3]", b"\xff", None], ids=range(6))
def test_a_damaged_list_of_exports_costs_a_line(
    started: Started, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    started.begin("disabled")
    if content is None:
        os.mkfifo(started.run.exports)
    else:
        started.run.exports.write_bytes(content)
    tracking.remember_export(started.run, started.run.path)
    assert "the export is whole, but" in capsys.readouterr().out
    told: list[str] = []
    Session(started.facts, started.cfg.log.wandb, note=told.append)._log_exports()
    [line] = told
    assert f"{started.run.exports} cannot be read (" in line


def test_sync_of_a_damaged_run_directory_is_one_line(started: Started) -> None:
    started.begin("disabled").steps(1)
    started.finish()
    for file in (started.run.path / "env.json", started.run.ds_config):
        file.write_text("{")
    assert started.facts.config["ds_config"] is None
    (started.run.path / "wandb").mkdir()
    (started.run.path / "wandb" / "run_id").write_bytes(b"\xff")
    with pytest.raises(StackError, match=r"run_id is damaged \(not text\); delete it to begin a new W&B run"):
        started.sync()
    started.run.metrics.unlink()
    os.mkfifo(started.run.metrics)
    with pytest.raises(UsageError, match="finished no step"):
        started.sync()


def test_an_error_in_log_turns_the_sink_off_with_one_note(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def broken(_run: object, values: dict, **_: object) -> None:
        calls.append(values["step"])
        raise RuntimeError("no space\nleft on device")

    monkeypatch.setattr("wandb.Run.log", broken)
    started.begin("offline").steps(1)
    wait_until(started.sink._failed.is_set)
    wait_until(lambda: not started.sink._thread.is_alive())
    started.steps(2, 3, 4)
    started.finish()
    assert calls == [1]
    assert len(started.notes) == 1
    assert "W&B stopped: RuntimeError: no space left on device; training is not affected" in started.notes[0]
    assert f"upload it with: stack wandb-sync {started.run.path}" in started.notes[0]
    assert_no_service()


def test_finish_that_hangs_returns_by_the_deadline(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = threading.Event()

    def hang(_run: object, **_: object) -> None:
        reached.set()
        threading.Event().wait()

    monkeypatch.setattr("wandb.Run.finish", hang)
    started.begin("offline", timeout_s=3.0).steps(1)
    wait_until(lambda: started.sink._work.rows == 1)
    before = time.monotonic()
    started.finish()
    assert reached.is_set()
    assert time.monotonic() - before < 3 + 3
    assert len(started.notes) == 1
    assert "not finished within log.wandb.timeout_s=3" in started.notes[0]
    started.sink.advance()
    started.sink.finish()
    assert len(started.notes) == 1


RUN_WITH_A_BROKEN_SERVICE = """
import os, signal, sys, time
from pathlib import Path
import psutil
from stack.config.compose import compose
from tests.unit.test_observe_wandb import Notes, Started

notes = Notes()
started = Started(compose(["log.wandb.timeout_s=4"]), Path(sys.argv[1]), notes).begin("offline")
started.steps(1)
while started.sink._work.rows < 1:
    time.sleep(0.01)
(service,) = [child for child in psutil.Process().children() if child.name().startswith("wandb-core")]
service.send_signal(getattr(signal, sys.argv[2]))
for step in range(2, 2000):
    started.steps(step)
started.finish()
assert len(notes) == 1, notes
print(notes[0])
"""


@pytest.mark.parametrize("signal_name", in_ci_unless(lambda name: name == "SIGKILL", ["SIGSTOP", "SIGKILL"]))
def test_a_process_exits_although_the_service_hangs_or_died(tmp_path: Path, signal_name: str) -> None:
    """The library's own exit hook would wait for ever for a stopped service, and print a traceback for a dead one."""
    before = time.monotonic()
    command = [sys.executable, "-c", RUN_WITH_A_BROKEN_SERVICE, str(tmp_path), signal_name]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("W&B stopped: ")
    assert "Traceback" not in done.stderr
    assert time.monotonic() - before < 30


RUN_ON_A_FULL_DISK = """
import subprocess, sys, time
from pathlib import Path
from stack.config.compose import compose
from stack.observe.jsonl import read
from stack.train import rundir
from tests.unit.test_observe_wandb import Notes, Started

notes = Notes()
started = Started(compose(["log.wandb.timeout_s=8"]), Path(sys.argv[1]), notes)
started.run = rundir.create(started.cfg, started.plan, corpus=started.corpus)
(started.run.path / "wandb").mkdir()
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(started.run.path / "wandb")], check=True)
started.begin("offline")
started.steps(*range(1, 3000))
before = time.monotonic()
started.finish()
assert time.monotonic() - before < 8 + 3
assert len(read(started.run.metrics)) == 2999
print(*notes)
"""


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="mounting a small disk needs root")
@pytest.mark.ci
def test_a_full_disk_under_wandb_stops_wandb_alone(tmp_path: Path) -> None:
    command = ["unshare", "-m", sys.executable, "-c", RUN_ON_A_FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=90)
    if "permission denied" in done.stderr:
        pytest.skip("mounting a small disk is not allowed here")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("W&B stopped: ") == 1
    assert "stack wandb-sync" in done.stdout


JOIN_AS_ANOTHER_HOST = """
import sys
from pathlib import Path
from stack.config.compose import from_yaml
from stack.observe.wandb.sink import WandbSink
from stack.train import tracking
from stack.train.rundir import RunDir

run = RunDir(Path(sys.argv[1]))
cfg = from_yaml(run.config)
sink = WandbSink(tracking.facts(run, cfg), cfg.log.wandb, note=print, node=1)
print("started", flush=True)
sys.stdin.readline()
sink.finish()
"""


@pytest.mark.ci
def test_shared_adds_the_system_metrics_of_other_hosts(
    started: Started, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def labels() -> set[str]:
        return {name.partition("/l:")[2] for event in server.runs[started.id].events for name in event} - {""}

    monkeypatch.setenv("WANDB_X_STATS_SAMPLING_INTERVAL", "0.5")
    started.begin("shared").steps(1, 2)
    command = [sys.executable, "-c", JOIN_AS_ANOTHER_HOST, str(started.run.path)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    wait_until(lambda: "node-1" in labels())
    told, _ = other.communicate("\n", timeout=60)
    assert (other.returncode, told) == (0, "started\n")
    started.steps(3)
    started.finish()
    run = assert_whole(started, server)
    assert labels() == {"node-0", "node-1"}
    assert run.exits == [0]
    started.begin("shared").steps(3, 4)
    started.finish()
    assert_whole(started, server)


def test_another_host_does_not_wait_for_a_run_that_never_comes(started: Started) -> None:
    started.begin("disabled")
    sink = WandbSink(started.facts, replace(started.cfg.log.wandb, mode="shared"), note=started.notes, node=1)
    before = time.monotonic()
    sink.finish()
    assert time.monotonic() - before < 10
    assert started.notes == []


def test_a_run_of_an_agent_is_the_run_that_the_agent_named(
    started: Started, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "named1")
    started.begin("online").steps(1)
    started.finish()
    assert started.id == "named1"
    run = assert_whole(started, server)
    assert run.about["sweep"] == "sweep1"


def test_a_run_id_in_the_environment_of_all_runs_names_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "exported")
    assert len({run_id(tmp_path / name) for name in "ab"} - {"exported"}) == 2


def test_what_wandb_writes_is_not_for_everybody_on_the_host(tmp_path: Path) -> None:
    """The library writes the user, the host, the command and its errors into the folder."""
    run_id(tmp_path)
    assert (tmp_path / "wandb").stat().st_mode & 0o007 == 0


@pytest.mark.parametrize(
    ("mode", "environment", "words"),
    [
        ("offline", {}, []),
        ("offline", {"WANDB_MODE": "dryrun"}, []),
        ("online", {"WANDB_MODE": "run"}, []),
        ("disabled", {"WANDB_DISABLED": "true"}, []),
        ("offline", {"WANDB_DISABLED": "false"}, []),
        ("shared", {"WANDB_RUN_ID": "x", "WANDB_SWEEP_ID": "y"}, []),
        ("offline", {"WANDB_MODE": "disabled"}, ["WANDB_MODE=disabled", "set log.wandb.mode=disabled"]),
        ("disabled", {"WANDB_MODE": "online"}, ["WANDB_MODE=online", "set log.wandb.mode=online"]),
        ("online", {"WANDB_MODE": "dryrun"}, ["WANDB_MODE=dryrun", "set log.wandb.mode=offline"]),
        ("online", {"WANDB_MODE": "off"}, ["WANDB_MODE=off", "set log.wandb.mode=disabled"]),
        (
            "online",
            {"WANDB_DISABLED": "1", "WANDB_MODE": "online"},
            ["WANDB_DISABLED=1", "set log.wandb.mode=disabled"],
        ),
        ("offline", {"WANDB_RUN_ID": "exported"}, ["WANDB_RUN_ID=exported"]),
    ],
)
def test_what_the_environment_says_against_the_config_is_told_in_a_line(
    started: Started, monkeypatch: pytest.MonkeyPatch, mode: str, environment: dict[str, str], words: list[str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(WandbSink, "_run", lambda _: None)
    started.begin(mode)
    [line] = started.notes or [""]
    assert bool(line) == bool(words)
    assert all(word in line for word in words)
    if line and "log.wandb.mode" in line:
        # Following the advice of the line removes the line.
        started.notes.clear()
        started.begin(line.rpartition("log.wandb.mode=")[2])
        assert started.notes == []


@pytest.mark.parametrize("mode", in_ci_unless(lambda mode: mode == "disabled", ["disabled", "nonsense"]))
def test_a_mode_in_the_environment_is_passed_over(
    started: Started, server: WandbServer, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    started.begin("online").steps(1)
    started.finish()
    assert_whole(started, server)


def test_the_documented_sweep_gives_overrides() -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    text = (Path(__file__).parents[2] / "docs" / "wandb.md").read_text()
    sweep = yaml.safe_load(text.partition("```yaml")[2].partition("```")[0])
    assert sweep["command"] == ["${env}", "stack", "train", "log=wandb_online", "${args_no_hyphens}"]
    drawn = {"optim.lr": {"value": 0.001}, "batch.global_size": {"value": 16}}
    assert sweep["parameters"].keys() == drawn.keys()
    overrides = create_sweep_command_args({"args": drawn})["args_no_hyphens"]
    assert compose(["log=wandb_online", *overrides]).optim.lr == 0.001


def test_an_evaluation_ahead_of_the_first_step_is_a_point_of_the_held_out_loss_alone():
    sent = Session._values(StepRecord.before_training(7.5, attempt=1, time=1.5))
    figures = {"tokens": 0, "tokens_total": 0, "skipped_steps": 0, "attempt": 1, "time": 1.5}
    assert sent == {"step": 0, "heldout_loss": 7.5, **figures}
