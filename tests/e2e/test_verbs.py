"""The verbs of `stack` on a finished run, in the order in which a user needs them."""

import math
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from stack.checkpoint import manifest
from stack.observe.jsonl import latest, read
from tests.helpers.runs import STACK, Command

_REPOSITORY = Path(__file__).parents[2]


def stack(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [STACK, *map(str, arguments)]
    return subprocess.run(words, check=False, capture_output=True, text=True, cwd=folder, timeout=120)


def heldout(output: str) -> float:
    found = re.search(r"held-out loss ([\d.]+) nats, perplexity ([\d.]+)", output)
    assert found, output
    assert float(found[2]) == pytest.approx(math.exp(float(found[1])), rel=1e-3)
    return float(found[1])


@pytest.fixture(scope="module")
def run(start_in, tmp_path_factory) -> Path:
    """A finished run of four steps, whose export is in `out(run)`."""
    command: Command = start_in(
        tmp_path_factory.mktemp("verbs"), {"train.steps": 4, "train.eval_every": 2, "checkpoint.every": 2}
    )
    assert command.wait() == 0, command.stdout + command.stderr
    done = stack(command.folder, "export", command.run, command.folder / "out")
    assert done.returncode == 0, done.stderr
    return command.run


def out(run: Path) -> Path:
    return run.parents[2] / "out"


def test_verify_finds_a_fault_and_says_so_with_its_exit_code(run, tmp_path):
    done = stack(tmp_path, "verify", run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == 6
    shard = run / "checkpoints/step-00000002/rank-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = stack(tmp_path, "verify", run)
    shard.write_bytes(content)
    assert done.returncode == 6
    assert "FAULT step-00000002/rank-00001.safetensors" in done.stdout


def test_eval_of_the_run_and_of_its_export_give_the_loss_of_the_last_row(run):
    last = read(run / "metrics.jsonl")[-1].heldout_loss
    for what, change in ((run, []), (out(run), []), (run, ["parallel.pipeline=1", "parallel.zero=1"])):
        done = stack(run, "eval", what, *change, "launch.ranks_per_node=2")
        assert done.returncode == 0, done.stdout + done.stderr
        assert heldout(done.stdout) == pytest.approx(last, rel=1e-5)


def test_transformers_loads_the_export(run):
    model, about = AutoModelForCausalLM.from_pretrained(out(run), output_loading_info=True)
    assert not about["missing_keys"]
    assert not about["unexpected_keys"]
    assert model.dtype == torch.float32
    assert stack(run, "export", run, out(run)).returncode == 2


def test_resume_in_another_layout_goes_on(run, tmp_path):
    assert stack(tmp_path, "resume", run).stderr.endswith("to go on add train.steps=8\n")
    done = stack(tmp_path, "resume", run, "train.steps=6", "parallel.pipeline=1", "parallel.zero=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed from" in done.stdout
    changed = "changed: parallel.pipeline 2 -> 1; parallel.zero 3 -> 2; train.steps 4 -> 6"
    jumps = "the learning rate goes from 3.00e-05 in step 4 to"
    for told in (done.stdout, (run / "notes.txt").read_text()):
        assert changed in told
        assert jumps in told
    rows = latest(read(run / "metrics.jsonl"))
    assert [(row.step, row.attempt) for row in rows] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)]
    assert rows[-1].tokens_total == sum(row.tokens for row in rows)
    refused = stack(tmp_path, "resume", run, "train.steps=8", "batch.global_size=16")
    assert refused.returncode == 6
    assert refused.stderr.count("\n") == 1
    assert "add checkpoint.allow=[batch]" in refused.stderr


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (["checkpoint.path=elsewhere"], 6, "elsewhere"),
        (["checkpoint.step=3"], 6, "checkpoint.step=3: no such checkpoint in"),
        (["model.config.hidden_size=64"], 6, "model.embed_tokens.weight: [300, 32] there, [300, 64] here"),
        (["model.config.rms_norm_eps=0.5"], 6, "add checkpoint.allow=[model]"),
    ],
)
def test_what_resume_refuses_it_leaves_as_it_was(run, tmp_path, change, code, words):
    link = tmp_path / "link"
    link.symlink_to(run)
    before = (run / "config.yaml").read_bytes(), len(list(run.glob("attempts/*")))
    done = stack(tmp_path, "resume", link, "train.steps=100", *change)
    assert done.returncode == code, done.stdout + done.stderr
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert before == ((run / "config.yaml").read_bytes(), len(list(run.glob("attempts/*"))))


def test_eval_takes_no_older_checkpoint_in_silence(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    before, newest = manifest.steps(copy / "checkpoints")[-2:]
    shard = manifest.folder_of(copy / "checkpoints", newest) / "rank-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    done = stack(tmp_path, "eval", copy)
    assert done.returncode == 6, done.stdout + done.stderr
    assert f"checkpoint of step {newest} is skipped" in done.stdout
    assert f"the newest whole one: checkpoint.step={before}" in done.stdout


@pytest.mark.parametrize("text", ["", "checkpoint: 3\n", "checkpoint: {path: 5}\n"])
def test_verify_does_not_guess_where_checkpoints_are(run, tmp_path, text):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "config.yaml").write_text(text)
    done = stack(tmp_path, "verify", copy)
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stderr.startswith("ConfigError: ")
    assert done.stderr.count("\n") == 1


def test_an_export_is_evaluated_wherever_it_lies(run, tmp_path):
    place = tmp_path / "ex, a (1) $b{x"
    shutil.copytree(out(run), place)
    done = stack(tmp_path, "eval", place, "launch.ranks_per_node=2")
    assert done.returncode == 0, done.stderr
    assert heldout(done.stdout) == pytest.approx(read(run / "metrics.jsonl")[3].heldout_loss, rel=1e-5)


@pytest.mark.ci
def test_training_goes_on_from_an_export_as_from_any_folder(start_in, run, tmp_path):
    settings = {
        "model.name": out(run),
        "model.init": "pretrained",
        "parallel.pipeline": 1,
        "parallel.zero": 2,
        "train.steps": 1,
        "train.eval_every": 1,
        "optim.lr": 1e-9,
        "checkpoint.every": 0,
    }
    command = start_in(tmp_path, settings)
    assert command.wait() == 0, command.stdout + command.stderr
    [row] = command.records()
    assert row.heldout_loss == pytest.approx(read(run / "metrics.jsonl")[3].heldout_loss, rel=1e-5)
    assert not (command.run / "checkpoints").exists()


@pytest.mark.ci
def test_a_run_at_work_is_left_alone_and_goes_on_after_a_kill(start, tmp_path):
    command = start({"train.steps": 100_000, "schedule.kind": "constant", "checkpoint.every": 20})
    command.wait_for(lambda: list(command.run.glob("checkpoints/step-*")), "a checkpoint")
    done = stack(tmp_path, "resume", command.run)
    assert done.returncode == 2
    assert f"is in use by process {command.process.pid} on host" in done.stderr
    # SIGKILL ends the driver before it can tell the ranks.
    command.send(signal.SIGKILL)
    command.assert_nothing_left(within_s=10)
    steps = command.records()[-1].step
    done = stack(tmp_path, "resume", command.run, f"train.steps={steps + 2}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert latest(command.records())[-1].step == steps + 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["resume"], 2, "stack resume needs a run directory"),
        (["resume", "/nowhere"], 2, "/nowhere is no run directory, it has no config.yaml"),
        (["export", "RUN"], 2, "stack export needs the folder to write to"),
        (["verify", "RUN", "x=1"], 2, "stack verify takes a run directory and nothing else"),
        (["eval", "train.steps=1"], 2, "stack eval needs a run directory"),
        (["eval", "RUN", "checkpoint.step=77"], 6, "checkpoint.step=77"),
        (["eval", "EXPORT", "checkpoint.step=2"], 2, "has one model and one set of weights"),
        (["verify", "x" * 5000], 2, "cannot be looked up"),
        (["plan", 'run.root="~nouser/x"'], 3, "there is no such user here"),
        (["plan", "health.hang_timeout_s=1e300"], 3, "must be at most 1000000.0"),
        (["export", "RUN", "OUT", "checkpoint.step=77"], 6, "checkpoint.step=77: no such checkpoint"),
    ],
)
def test_a_mistake_costs_one_line(run, tmp_path, arguments, code, words):
    places = {"RUN": run, "OUT": tmp_path / "new", "EXPORT": out(run)}
    done = stack(tmp_path, *[places.get(word, word) for word in arguments])
    assert done.returncode == code, done.stderr
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.ci
def test_the_harness_runs_on_the_export(run):
    pytest.importorskip("lm_eval", reason="lm_eval not installed")
    command = ["make", "eval-harness", f"OUT={out(run)}", "ARGS=--limit 2 --device cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=_REPOSITORY, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bits_per_byte" in done.stdout
