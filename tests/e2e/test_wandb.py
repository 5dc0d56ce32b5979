"""A run trains in the same way whatever the W&B server does, and `stack wandb-sync` uploads missing rows later."""

import json
import time

import pytest

from tests.e2e.conftest import as_overrides
from tests.helpers.runs import STACK, Command
from tests.helpers.wandb_server import KEY, WandbServer

TIMEOUT_S = 10
ONLINE = {"log.wandb.mode": "online", "log.wandb.timeout_s": TIMEOUT_S, "log.wandb.project": "stack-test"}
#: Seconds that a run with W&B may take longer than one without, in addition to `TIMEOUT_S`.
SLACK_S = 15


@pytest.fixture(scope="module")
def launch(tiny, tmp_path_factory):
    """`launch(settings, environment)` runs `stack train`, and returns the command and the seconds that it took."""
    commands = []

    def run(settings, environment=None):
        folder = tmp_path_factory.mktemp("wandb")
        overrides = as_overrides({**tiny, "run.root": folder / "runs", "checkpoint.every": 5, **settings})
        began = time.monotonic()
        commands.append(Command([STACK, "train", *overrides], folder, environment))
        assert commands[-1].wait() == 0, commands[-1].stdout + commands[-1].stderr
        return commands[-1], time.monotonic() - began

    yield run
    for command in commands:
        command.kill()


def curve(command):
    return [(record.loss.hex(), record.grad_norm.hex()) for record in command.records()]


@pytest.fixture(scope="module")
def without(launch):
    return launch({"log.wandb.mode": "disabled"})


def sync(command, server):
    done = Command([STACK, "wandb-sync", str(command.run)], command.folder, server.environment)
    assert done.wait() == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def rows(server):
    [run] = server.runs.values()
    return [(row["step"], row["attempt"], row["loss"], row["grad_norm"]) for row in run.history]


def truth(command):
    return [(record.step, record.attempt, record.loss, record.grad_norm) for record in command.records()]


def test_a_run_is_in_wandb_as_it_is_on_disk(launch, without):
    with WandbServer() as server:
        command, _ = launch(ONLINE, server.environment)
        assert curve(command) == curve(without[0])
        assert rows(server) == truth(command)
        [run] = server.runs.values()
        for name in ("config.yaml", "ds_config.json", "plan.json", "plan.txt", "curve.png"):
            assert run.files[f"stack/{name}"] == (command.run / name).read_bytes()
        assert run.config["ds_config"] == command.json("ds_config.json")
        assert run.summary["final_loss"] == command.records()[-1].loss
        assert 0 < run.summary["goodput"] < 1
        assert run.summary["final_checkpoint"] == str(command.run / "checkpoints/step-00000005")
        table = json.loads(run.files[run.summary["stages"]["path"]])["data"]
        assert [stage for stage, _, _ in table] == [0, 1]
        assert all(busy_s > 0 and 0 < share < 1 for _, busy_s, share in table)
        [checkpoint] = [a for a in server.artifacts.values() if a["artifactTypeName"] == "checkpoint"]
        assert all(entry["ref"].startswith("file://") for entry in checkpoint["entries"].values())
        assert sync(command, server) == "5 rows are in W&B, 0 of them new"
        assert rows(server) == truth(command)
    written = (file for file in command.folder.rglob("*") if file.is_file())
    assert not [file for file in written if KEY.encode() in file.read_bytes()]


@pytest.mark.ci
@pytest.mark.parametrize("fault", ["down", "stall", 401, 500])
def test_the_curve_is_the_same_without_a_server_and_sync_makes_it_good(launch, without, fault):
    with WandbServer() as server:
        server.fault = None if fault == "down" else fault
        nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9"} if fault == "down" else {}
        command, took_s = launch(ONLINE, {**server.environment, **nowhere})
        assert curve(command) == curve(without[0])
        assert took_s < without[1] + TIMEOUT_S + SLACK_S
        assert "stack wandb-sync" in (command.run / "notes.txt").read_text()
        server.fault = None
        assert sync(command, server) == "5 rows are in W&B, 5 of them new"
        assert rows(server) == truth(command)
        assert sync(command, server) == "5 rows are in W&B, 0 of them new"
        assert rows(server) == truth(command)
