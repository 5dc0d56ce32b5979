"""The checks of hosts and network among ranks, and the comparison of a layout with one process (`stack doctor`)."""

import json
import os
import socket
import time
from pathlib import Path

import pytest

from stack.config.compose import compose
from stack.plan.layout import make_plan
from stack.plan.miniature import miniature
from stack.train import rundir

_BOUND_S = 3.0


def checked(fault: str) -> str:
    """Called on every rank: the result or error of `check_ranks`, where rank 1 has the fault."""
    import torch

    from stack.errors import StackError
    from stack.health import ranks

    if os.environ["RANK"] == "1":
        if fault == "stuck":
            ranks._ring = lambda *_: time.sleep(600)
        if fault == "corrupt":
            ranks._message = lambda rank: [rank] * ranks._RING
        if fault == "version":
            facts = ranks._facts
            versions = {"torch": "2.12.0"}
            ranks._facts = lambda device: {
                **(own := facts(device)),
                "versions": own["versions"] | versions,
                "host": "b",
            }
    try:
        return str(ranks.check_ranks(torch.device("cpu"), timeout_s=60.0 if fault in ("none", "version") else _BOUND_S))
    except (StackError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def missed() -> str:
    """Called on every rank: the result of `check_ranks`, where rank 1 does not join it."""
    if os.environ["RANK"] == "1":
        time.sleep(3 * _BOUND_S)
        return ""
    return checked("missed")


def test_four_ranks_that_are_well(zygote):
    said = zygote.run_function(checked, ["none"], 4)
    assert len(set(said)) == 1
    assert said[0].startswith("4 ranks on 1 host (gloo): ring ")


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("stuck", "HangError: rank 1 on {host} is cut off: a ring of sends over gloo within 3 s"),
        ("version", "HostError: rank 1 on b has torch 2.12.0, the others "),
    ],
)
def test_the_odd_rank_is_named_by_all(zygote, fault, found):
    said = zygote.run_function(checked, [fault], 4)
    for rank in (0, 2, 3):
        assert said[rank].startswith(found.format(host=socket.gethostname()))


def test_a_rank_that_does_not_come_is_named(zygote):
    said = zygote.run_function(missed, [], 4)
    assert said[0] == "HangError: rank 1 did not join the check of ranks within 3 s"


def test_what_arrives_is_compared_with_what_was_sent(zygote):
    said = zygote.run_function(checked, ["corrupt"], 4)
    assert "gave rank 2 on" in said[0]
    assert "corrupts data" in said[0]


def parity(folder: str, lr_scale: float) -> str:
    """Called on every rank: the result or error of `check`, where every update uses `lr_scale` times the learning
    rate."""
    from stack.config.compose import from_yaml
    from stack.errors import NumericsError
    from stack.parallel.zero import ZeroEngine
    from stack.train.check import check
    from stack.train.rundir import RunDir

    run, step = RunDir(Path(folder)), ZeroEngine.step
    ZeroEngine.step = lambda self, lr: step(self, lr * lr_scale)
    cfg = from_yaml(run.config)
    try:
        check(cfg, make_plan(cfg), run, int(os.environ["RANK"]))
    except NumericsError as error:
        return str(error)
    return json.loads(run.result.read_text())["told"] if os.environ["RANK"] == "0" else ""


def _run(folder: Path, *overrides: str, parity: tuple[str, ...]) -> rundir.RunDir:
    cfg = compose(["launch.ranks_per_node=2", *overrides])
    tiny = miniature(cfg, make_plan(cfg))
    return rundir.create_check(folder, tiny, make_plan(tiny), parity=parity)


@pytest.mark.parametrize(
    ("overrides", "summary"),
    [
        (["parallel.pipeline=1", "parallel.zero=3"], "PP1 x DP2, ZeRO-3, 1f1b"),
        (["model=gpt2_4m", "parallel=zero1_zero_bubble", "activation.checkpoint=none"], "PP2 x DP1, ZeRO-1, zbv"),
        (["model=mixtral_4m", "parallel=zero3_interleaved", "batch.micro_size=1"], "PP2 x DP1, ZeRO-3, interleaved"),
    ],
)
def test_layouts_equal_one_process_in_both_dtypes(zygote, tmp_path, overrides, summary):
    run = _run(tmp_path, *overrides, parity=("fp32", "bf16"))
    assert zygote.run(["--config", str(run.config)], world_size=2) == [0, 0]
    _, fp32, bf16 = json.loads(run.result.read_text())["told"].splitlines()
    assert fp32.startswith(f"parity fp32, {summary}")
    assert bf16.startswith(f"parity bf16, {summary}")
    assert fp32.endswith("allowed 1e-05: ok")
    assert run.done.exists()


@pytest.mark.parametrize("lr_scale", [0.99, 1.01])
def test_an_update_that_is_one_percent_off_is_found(zygote, tmp_path, lr_scale):
    run = _run(tmp_path, parity=("fp32",))
    for said in zygote.run_function(parity, [str(run.path), lr_scale], 2):
        assert "does not train as one process does" in said
        assert "parameters of" in said or "loss of step" in said or "gradient norm of step" in said
    assert not run.done.exists()
