"""Weights & Biases: the real library, offline, against a server of ours, and broken in every way we know."""

import gzip
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from stack.observe.metrics import StepRecord
from stack.observe.wandb import WandbSink

KEY = "a" * 40


def row(step: int, **changed) -> StepRecord:
    values = {
        "step": step,
        "loss": 10 / (step + 2),
        "grad_norm": 1.5,
        "lr": 1e-3,
        "tokens": 16320,
        "tokens_total": 16320 * step,
        "tokens_per_s": 5440.4,
        "step_time_s": 3.0,
        "mfu": None,
        "bubble_fraction": 0.1234,
        "memory_peak_bytes": 3 << 29,
        "skipped_steps": 0,
        "attempt": 1,
        "time": 1000.0 + 3 * step,
    }
    return StepRecord(**{**values, **changed})


@pytest.fixture(autouse=True)
def clean_library(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No key and no setting of the machine's user, and no session left from the test before."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
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


def sink(run_dir: Path, notes: Notes, *, mode: str = "offline", **changed) -> WandbSink:
    (run_dir / "config.yaml").write_text("train:\n  steps: 3\n")
    (run_dir / "plan.json").write_text("{}\n")
    return WandbSink(
        run_dir,
        mode=mode,
        project="stack-test",
        name="quickstart",
        tags=["cpu"],
        config={"train": {"steps": 3}},
        files=[run_dir / "config.yaml", run_dir / "plan.json"],
        note=notes,
        **changed,
    )


def inspect(folder: Path, *options: str) -> str:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(folder)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def history(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in inspect(folder).splitlines()]
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    assert {metric["glob_name"]: metric["step_metric"] for metric in metrics if "glob_name" in metric} == {"*": "step"}
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [{name: value for name, value in item.items() if not name.startswith("_")} for item in items]


def test_two_offline_attempts_are_one_run(tmp_path: Path, notes: Notes) -> None:
    sent = {
        1: [row(1), row(2, loss=float("nan")), row(3, heldout_loss=0.1 + 0.2)],
        2: [row(3, attempt=2, mfu=0.5)],
    }
    for rows in sent.values():
        attempt = sink(tmp_path, notes)
        for record in rows:
            attempt.log(record)
        attempt.finish()

    run_id = (tmp_path / "wandb" / "run_id").read_text().strip()
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert [(folder / f"run-{run_id}.wandb").exists() for folder in folders] == [True, True]
    for folder, rows in zip(folders, sent.values(), strict=True):
        expected = [{name: value for name, value in record.to_dict().items() if value is not None} for record in rows]
        for values in expected:
            values["loss"] = "NaN" if values["loss"] != values["loss"] else values["loss"]
        assert history(folder) == expected
        summary = json.loads(inspect(folder, "--summary"))
        assert (summary["project"], summary["name"], summary["tags"]) == ("stack-test", "quickstart", ["cpu"])
        assert summary["config"] == {"train": {"steps": 3}}
        assert summary["state"] == "finished"
        copied = folder / "files" / "stack" / "config.yaml"
        assert copied.read_text() == "train:\n  steps: 3\n"
        assert not copied.is_symlink()

    assert len(notes) == 2
    command = notes[0].partition("upload it with: ")[2]
    assert command == f"wandb sync {tmp_path}/wandb/offline-run-*"
    # The note's command as a shell runs it.
    wandb = f"{shlex.quote(sys.executable)} -m wandb"
    command = f"{command.replace('wandb', wandb, 1)} --dry-run 2>&1"
    assert (
        "Would sync 2 run(s)" in subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout
    )


def test_nothing_goes_to_standard_output(tmp_path: Path, notes: Notes, capfd: pytest.CaptureFixture[str]) -> None:
    attempt = sink(tmp_path, notes)
    attempt.log(row(1))
    attempt.finish()
    assert capfd.readouterr() == ("", "")


def test_disabled_does_nothing(tmp_path: Path, notes: Notes) -> None:
    attempt = sink(tmp_path, notes, mode="disabled")
    attempt.log(row(1))
    attempt.finish()
    assert notes == []
    assert not (tmp_path / "wandb").exists()
    assert not attempt._thread.is_alive()


@pytest.mark.parametrize(("key", "reason"), [(KEY, "connection refused"), (None, "No API key configured")])
def test_online_without_a_server_or_a_key_goes_on_offline(
    tmp_path: Path, notes: Notes, monkeypatch: pytest.MonkeyPatch, key: str | None, reason: str
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    started = time.monotonic()
    attempt = sink(tmp_path, notes, mode="online", init_timeout_s=1.0)
    attempt.log(row(1))
    assert time.monotonic() - started < 1.0
    attempt.finish()
    assert time.monotonic() - started < 15
    assert len(notes) == 2
    assert notes[0].startswith("W&B goes on offline: ")
    assert reason in notes[0]
    assert "wandb sync" in notes[1]
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert [values["step"] for values in history(folder)] == [1]
    assert not any(KEY.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


class FakeServer(BaseHTTPRequestHandler):
    """As much of the W&B server as one run asks for."""

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.requests.append((self.path, body))
        reply = json.dumps(self._reply(json.loads(body)) if self.path == "/graphql" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    do_GET = do_POST = do_PUT = _answer

    def _reply(self, query: dict) -> dict:
        project = {"id": "p", "name": "stack-test", "entity": {"id": "e", "name": "us"}}
        variables = query["variables"]
        if query["operationName"] == "RunResumeStatus":
            return {"data": {"model": {**project, "bucket": None}}}
        if query["operationName"] == "UpsertBucket":
            bucket = {"id": "b", "name": variables["name"], "displayName": "n", "config": "{}", "project": project}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if query["operationName"] == "CreateRunFiles":
            url = "http://{}:{}/upload/".format(*self.server.server_address)
            files = [{"name": name, "uploadUrl": url + name} for name in variables["files"]]
            return {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
        return {"data": {}}


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeServer) as server:
        server.requests = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_online_uploads_rows_and_files(
    tmp_path: Path, notes: Notes, monkeypatch: pytest.MonkeyPatch, server: ThreadingHTTPServer
) -> None:
    url = "http://{}:{}".format(*server.server_address)
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    attempt = sink(tmp_path, notes, mode="online")
    for step in (1, 2, 3):
        attempt.log(row(step))
    attempt.finish()
    run_id = (tmp_path / "wandb" / "run_id").read_text().strip()
    assert notes == [f"W&B run: {url}/us/stack-test/runs/{run_id}"]
    streamed = [json.loads(body)["files"] for path, body in server.requests if path.endswith("/file_stream") and body]
    lines = [line for files in streamed for line in files.get("wandb-history.jsonl", {}).get("content", [])]
    assert [(json.loads(line)["step"], json.loads(line)["loss"]) for line in lines] == [
        (step, row(step).loss) for step in (1, 2, 3)
    ]
    uploads = dict(server.requests)
    assert uploads["/upload/stack/config.yaml"] == b"train:\n  steps: 3\n"
    assert uploads["/upload/stack/plan.json"] == b"{}\n"


def wait_until(condition, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_error_in_log_turns_the_sink_off_with_one_note(
    tmp_path: Path, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def broken(_run: object, values: dict) -> None:
        calls.append(values["step"])
        raise RuntimeError("no space\nleft on device")

    monkeypatch.setattr("wandb.Run.log", broken)
    attempt = sink(tmp_path, notes)
    attempt.log(row(1))
    wait_until(attempt._failed.is_set)
    wait_until(lambda: not attempt._thread.is_alive())
    for step in (2, 3, 4):
        attempt.log(row(step))
    attempt.finish()
    assert calls == [1]
    assert len(notes) == 1
    assert "W&B stopped: RuntimeError: no space left on device; training is not affected" in notes[0]
    assert str(tmp_path / "metrics.jsonl") in notes[0]


def test_a_missing_file_turns_the_sink_off(tmp_path: Path, notes: Notes) -> None:
    attempt = WandbSink(tmp_path, mode="offline", project="p", config={}, files=[tmp_path / "gone.json"], note=notes)
    attempt.finish()
    assert len(notes) == 1
    assert "FileNotFoundError" in notes[0]


def test_finish_that_hangs_returns_by_the_deadline(
    tmp_path: Path, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = threading.Event()

    def hang(_run: object, **_: object) -> None:
        reached.set()
        threading.Event().wait()

    monkeypatch.setattr("wandb.Run.finish", hang)
    attempt = sink(tmp_path, notes)
    attempt.log(row(1))
    attempt._rows.put(None)
    wait_until(reached.is_set)
    started = time.monotonic()
    attempt.finish(timeout_s=0.3)
    assert time.monotonic() - started < 2
    assert len(notes) == 1
    assert "it did not finish within 0.3 s" in notes[0]
    assert "wandb sync" in notes[0]
    attempt.log(row(2))
    attempt.finish()
    assert len(notes) == 1


def test_rows_that_are_not_taken_are_not_kept_for_ever(
    tmp_path: Path, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stack.observe.wandb._QUEUE_ROWS", 5)
    monkeypatch.setattr(WandbSink, "_work", lambda _: threading.Event().wait())
    attempt = sink(tmp_path, notes)
    for step in range(1, 20):
        attempt.log(row(step))
    attempt.finish()
    assert len(notes) == 1
    assert "it has not taken a row for 5 steps" in notes[0]


RUN_WITH_A_BROKEN_SERVICE = """
import os, signal, sys, time
from pathlib import Path
import psutil
sys.path.insert(0, sys.argv[3])
from test_observe_wandb import Notes, row, sink

notes = Notes()
attempt = sink(Path(sys.argv[1]), notes)
attempt.log(row(1))
while not attempt._rows.empty() or attempt._wandb is None:
    time.sleep(0.01)
(service,) = [child for child in psutil.Process().children() if child.name().startswith("wandb-core")]
service.send_signal(getattr(signal, sys.argv[2]))
for step in range(2, 5000):
    attempt.log(row(step))
attempt.finish(timeout_s=1.0)
assert len(notes) == 1, notes
print(notes[0])
"""


@pytest.mark.parametrize("signal_name", ["SIGSTOP", "SIGKILL"])
def test_a_process_exits_although_the_service_hangs_or_died(tmp_path: Path, signal_name: str) -> None:
    """The library's exit hook would wait for a stopped service for ever, and print a traceback for a dead one."""
    arguments = [str(tmp_path), signal_name, str(Path(__file__).parent)]
    started = time.monotonic()
    command = [sys.executable, "-c", RUN_WITH_A_BROKEN_SERVICE, *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("W&B stopped: ")
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 20
