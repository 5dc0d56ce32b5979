"""`stack train` from the command line to the run directory."""

import dataclasses
import json
import math
import re
import subprocess

import pytest

from stack.health.orphan import is_alive
from stack.observe.metrics import StepRecord

PP2_DP2 = {"launch.ranks_per_node": 4, "parallel.pipeline": 2, "parallel.zero": 3, "activation.checkpoint": "full"}
ONE_RANK = {"launch.ranks_per_node": 1, "parallel.pipeline": 1, "parallel.zero": 0, "activation.checkpoint": "none"}
EVALUATED = {"train.eval_every": 2, "train.log_every": 1, "train.eval_sequences": 8}


@pytest.fixture(scope="module")
def pp2_dp2(start_in, tmp_path_factory):
    command = start_in(tmp_path_factory.mktemp("pp2_dp2"), {**PP2_DP2, **EVALUATED})
    assert command.wait() == 0, command.stdout + command.stderr
    return command


def test_a_run_leaves_all_its_files_and_no_process(pp2_dp2):
    pp2_dp2.assert_nothing_left(within_s=1)
    run = pp2_dp2.run

    assert pp2_dp2.json("DONE.json")["step"] == 5
    assert not (run / "FAILED.json").exists()
    for name in (
        "config.yaml",
        "ds_config.json",
        "plan.json",
        "plan.txt",
        "env.json",
        "curve.png",
        "launchers/localhost.log",
    ):
        assert (run / name).stat().st_size > 0, name
    for rank in range(4):
        assert (run / f"ranks/{rank}/log.txt").stat().st_size > 0
        assert (run / f"ranks/{rank}/done.json").exists()
        assert not (run / f"ranks/{rank}/error.json").exists()
    assert list(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert pp2_dp2.json("ds_config.json")["zero_optimization"]["stage"] == 3
    assert (pp2_dp2.json("plan.json")["stages"], pp2_dp2.json("plan.json")["replicas"]) == (2, 2)


def test_metrics_have_every_step_with_every_field(pp2_dp2):
    lines = (pp2_dp2.run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    # The run has no mixture of experts and no fp16, so the fields of these are absent.
    always = {field.name for field in dataclasses.fields(StepRecord)} - {
        "heldout_loss", "router_aux_loss", "loss_scale", "checkpoint_stall_s", "checkpoint_write_s",
    }  # fmt: skip

    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in rows if "heldout_loss" in row] == [2, 4, 5]
    assert [row["step"] for row in rows if "checkpoint_stall_s" in row] == [5]
    for line, row in zip(lines, rows, strict=True):
        assert always <= row.keys() <= always | {"heldout_loss", "checkpoint_stall_s", "checkpoint_write_s"}
        assert StepRecord.from_json(line).to_json() == line
        assert all(math.isfinite(row[name]) and row[name] > 0 for name in ("loss", "grad_norm", "lr", "tokens_per_s"))
        # A document's last token has no target.
        assert 8 * 24 < row["tokens"] <= 8 * 32
        assert row["tokens_total"] == sum(earlier["tokens"] for earlier in rows[: row["step"]])
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_screen_has_the_plan_and_aligned_columns(pp2_dp2):
    lines = pp2_dp2.stdout.splitlines()
    header = next(number for number, line in enumerate(lines) if line.split()[:2] == ["step", "loss"])
    ends = [[cell.end() for cell in re.finditer(r"\S+( \S+)*", line)] for line in lines[header : header + 6]]

    assert all(row == ends[0][: len(row)] and len(row) >= 8 for row in ends)
    assert [line.split()[0] for line in lines[header + 1 : header + 6]] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    assert any(re.match(r"ZeRO stage +3 ", line) for line in lines[:header])
    assert lines[header + 6].startswith("W&B run is on disk; upload it with: stack wandb-sync ")
    assert lines[header + 7 :] == [f"done: {pp2_dp2.run}", f"curve: {pp2_dp2.run / 'curve.png'}"]
    assert "Traceback" not in pp2_dp2.stdout + pp2_dp2.stderr


def test_pp2_dp2_zero3_equals_one_process_without_any_of_it(pp2_dp2, start):
    single = start({**ONE_RANK, **EVALUATED})
    assert single.wait() == 0, single.stdout + single.stderr

    pairs = list(zip(pp2_dp2.records(), single.records(), strict=True))
    worst = {}
    for name in ("loss", "grad_norm", "heldout_loss"):
        values = [(getattr(ours, name), getattr(reference, name)) for ours, reference in pairs]
        worst[name] = max(abs(ours / reference - 1) for ours, reference in values if reference is not None)
    print(f"\npp2 x dp2, ZeRO-3 against one rank, 5 steps, worst relative difference: {worst}")
    assert len(pairs) == 5
    assert max(worst.values()) < 1e-5


@pytest.mark.ci
def test_a_slow_end_of_rank_0_is_no_failure(start):
    command = start()
    rank = command.rank(1)
    wandb = command.find("wandb-core")
    wandb.suspend()  # like an upload that takes long
    command.wait_for(lambda: not is_alive(rank), "the end of rank 1")
    with pytest.raises(subprocess.TimeoutExpired):
        command.wait(2)
    wandb.resume()

    assert command.wait() == 0, command.stdout
    assert command.json("DONE.json")["step"] == 5


@pytest.mark.ci
def test_two_runs_at_once_share_a_root_and_the_making_of_the_corpus(start, tmp_path):
    name = """ü [1] * $x 'q' ;"""
    settings = {**ONE_RANK, "data.root": tmp_path / "data", "run.name": f'"{name}"', "log.wandb.mode": "disabled"}
    commands = [start(settings), start(settings)]

    assert [command.wait() for command in commands] == [0, 0], commands[0].stdout + commands[1].stdout
    runs = list((tmp_path / "runs" / name).iterdir())
    assert len(runs) == 2
    curves = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()] for run in runs]
    assert len(curves[0]) == 5
    assert curves[0] == curves[1]
    assert all((run / "DONE.json").exists() for run in runs)
    assert len(list((tmp_path / "data").glob("files-*"))) == 1
