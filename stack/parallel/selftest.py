"""The self-test for versions of DeepSpeed that the test suite has not run with.

Compares a tiny run of two stages with the same step without DeepSpeed, in a process of its own
(`python -m stack.parallel.selftest`).
"""

import contextlib
import json
import os
import socket
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

from stack import disk
from stack.errors import ConfigError
from stack.interpreter import PYTHON

#: Versions of DeepSpeed that the whole test suite has run with.
TESTED = ("0.19.8",)
TOLERANCE = 1e-5
_TIMEOUT_S = 300
_RUNNING = "STACK_SELFTEST"


def require(version: str, torch_version: str) -> None:
    """Returns at once for a tested version of DeepSpeed. Otherwise runs the self-test; a success is remembered on this
    host for the pair of versions.

    Raises:
        ConfigError: the self-test failed; the message names the missing attribute of DeepSpeed or the wrong number.
    """
    if version in TESTED or _RUNNING in os.environ:
        return
    verdict = _verdict(version, torch_version)
    if verdict["failure"]:
        raise ConfigError(
            f"deepspeed {version} is not one that stack was tested with, and its self-test failed: "
            f"{verdict['failure']}; install deepspeed=={TESTED[-1]}"
        )


def _verdict(version: str, torch_version: str) -> dict[str, Any]:
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "stack"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"selftest-deepspeed-{version}-torch-{torch_version}.json"
    # All ranks of a host come here at the same time; the lock makes one of them run the self-test.
    with open(file.with_suffix(".lock"), "a") as lock:
        disk.lock(lock, wait=True)
        if file.exists():
            return json.loads(file.read_text())
        verdict = {"failure": _run()}
        # A failure is not remembered, because its cause on this host may be temporary.
        if not verdict["failure"]:
            disk.write_whole(file, json.dumps(verdict))
        return verdict


def _run() -> str:
    """Runs the self-test in a process of its own. Returns the error, or an empty string after a success."""
    # One rank on the CPU, independent of the environment that the launcher gave this process.
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **alone, _RUNNING: "1"}
    command = [*PYTHON, "-W", "ignore", "-m", __spec__.name]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"no result within {_TIMEOUT_S} s"
    if done.returncode == 0:
        return ""
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def main() -> None:
    """Runs every policy of ZeRO 1 to 3. An error ends the process, and the last line of its output names the error."""
    from stack.parallel import zero

    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = map(str, probe.getsockname())
    zero.init_distributed(timeout=timedelta(seconds=_TIMEOUT_S))
    for zero_stage, reduce, gather in (
        (3, "step", "step"),
        (3, "microbatch", "microbatch"),
        (2, "step", "step"),
        (2, "microbatch", "step"),
        (1, "step", "step"),
    ):
        _compare(zero_stage, reduce, gather)
    zero.close()


def _compare(zero_stage: int, reduce: str, gather: str) -> None:
    """Compares one step of two stages and two microbatches, with both backwards in a row, with a dense step.

    Raises:
        AssertionError: the loss or an updated parameter differs from the dense model's.
    """
    import torch

    from stack.models.build import build_stages
    from stack.parallel import zero
    from stack.plan.layout import make_plan

    cfg = _tiny(zero_stage, reduce, gather)
    plan, device = make_plan(cfg, 2), torch.device("cpu")
    engines: list[zero.ZeroEngine] = []
    for pipe_rank in range(2):
        mesh, config = _mesh(pipe_rank), zero.config_of(cfg, plan)
        place = (lambda unit, m=mesh, c=config: zero.shard(unit, mesh=m, config=c)) if zero_stage == 3 else None
        own = build_stages(cfg, plan, pipe_rank, device=device, place=place)
        engines.append(zero.ZeroEngine(own, cfg=cfg, mesh=mesh, config=config))
    tokens = torch.arange(2 * 17).mul(7).remainder(64).view(2, 1, 17)
    ids, labels = tokens[..., :-1], tokens[..., 1:]
    positions = torch.arange(16)[None]

    first, last = engines
    with first.accumulate(), last.accumulate():
        passed = []
        for microbatch in range(2):
            sent = first.forward(0, ids[microbatch], positions=positions, labels=labels[microbatch])
            received = sent.detach().requires_grad_()
            loss = last.forward(0, received, positions=positions, labels=labels[microbatch])
            passed.append((sent, received, loss))
        for number, (sent, received, loss) in enumerate(passed):
            last.backward(loss / 32, None, last=number == 1)
            first.backward(sent, received.grad, last=number == 1)
    for engine in engines:
        engine.step(cfg.optim.lr)

    expected_loss, expected = _dense(cfg, ids, positions, labels)
    case = f"ZeRO-{zero_stage} reduce={reduce} gather={gather}"
    found_loss = sum(loss.item() for *_, loss in passed)
    if abs(found_loss - expected_loss) > TOLERANCE * expected_loss:
        raise AssertionError(f"{case}: the loss is {found_loss} and should be {expected_loss}")
    for engine in engines:
        for name, parameter in engine.stages[0].model.named_parameters():
            found = engine.master(parameter)
            difference = (found - expected[name]).abs().max() / expected[name].abs().max()
            if difference > TOLERANCE:
                raise AssertionError(f"{case}: {name} is off by {difference:.1e} after one step")


def _dense(cfg: Any, ids: Any, positions: Any, labels: Any) -> tuple[float, dict[str, Any]]:
    """Loss and updated parameters of the same step without DeepSpeed."""
    import dataclasses

    import torch

    from stack.models.build import build_stages
    from stack.parallel.optimizer import make_optimizer
    from stack.plan.layout import make_plan

    one = dataclasses.replace(cfg, parallel=dataclasses.replace(cfg.parallel, pipeline=1, zero=0, reduce="step"))
    [stage] = build_stages(one, make_plan(one, 1), 0, device=torch.device("cpu"))
    optimizer = make_optimizer(list(stage.parameters()), one, tied=None)
    losses = [stage(ids[number], positions, labels[number]) for number in range(2)]
    (sum(losses) / 32).backward()
    optimizer.step()
    return sum(loss.item() for loss in losses), {name: p.detach() for name, p in stage.model.named_parameters()}


def _tiny(zero_stage: int, reduce: str, gather: str) -> Any:
    from stack.config.schema import Config

    cfg = Config()
    cfg.model.config = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 16,
    }
    cfg.data.seq_len, cfg.data.vocab_size = 16, 64
    cfg.batch.global_size, cfg.batch.micro_size = 2, 1
    cfg.optim.lr, cfg.optim.grad_clip, cfg.optim.eps = 3e-3, 0.0, 1e-3
    cfg.parallel.zero, cfg.parallel.reduce, cfg.parallel.gather = zero_stage, reduce, gather
    return cfg


def _mesh(pipe_rank: int) -> Any:
    """A mesh for one of two stages in the same process; all of its groups consist of this process."""
    import torch
    import torch.distributed as dist

    from stack.parallel.mesh import Mesh

    alone: Any = dist.group.WORLD
    return Mesh(
        rank=0,
        pipe_rank=pipe_rank,
        replica=0,
        pipeline=2,
        replicas=1,
        data_group=alone,
        pipe_group=alone,
        transfer_group=alone,
        tied_group=None,
        host_group=alone,
        disk_group=alone,
        device=torch.device("cpu"),
    )


if __name__ == "__main__":
    main()
