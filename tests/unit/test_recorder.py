"""The recorder's use of the device name, and of the rank's place on its host."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from stack.config.compose import compose
from stack.config.schema import Config, Precision
from stack.observe.metrics import _PEAKS, peak_flops
from stack.parallel.step import StepResult
from stack.plan.layout import make_plan
from stack.train import recorder, rundir
from stack.train.ranks import Launched, from_environment
from stack.train.recorder import Recorder
from stack.train.rundir import RunDir

DTYPES = next(field.metadata["choices"] for field in fields(Precision) if field.name == "dtype")
DEVICES = [" ".join(["NVIDIA", *words]) for words, _ in _PEAKS]
UNKNOWN = "NVIDIA RTX 9999"


def recorder_of(cfg: Config, run: RunDir | None, launched: Launched) -> Recorder:
    """The recorder of a rank that writes no rows, and therefore needs no engine."""
    return Recorder(cfg, make_plan(cfg), run, None, launched=launched, screen=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*DEVICES, UNKNOWN])
def test_a_rank_with_a_gpu_knows_its_share_of_the_peak_in_every_dtype(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: name)
    cfg = replace(compose(["launch.ranks_per_node=2"]), precision=Precision(dtype=dtype))
    plan = make_plan(cfg)
    step = StepResult(1.0, 1.0, 1000, 1e-3, 0.5, bubble_fraction=0.0, memory_peak_bytes=0, stage_busy_s=(0.1, 0.1))
    share = recorder_of(cfg, None, Launched(rank=1, local_rank=1)).mfu(step)
    peak = peak_flops(name, dtype)
    assert (peak is None) == (name == UNKNOWN)
    assert share == (peak and plan.shape.training_flops(plan.seq_len) * 1000 / (0.5 * 2 * peak))


@pytest.mark.parametrize("named", ["CROSS_RANK", "GROUP_RANK", "SLURM_NODEID"])
def test_a_host_has_one_client_of_wandb_also_where_each_rank_sees_one_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    """DeepSpeed uses LOCAL_RANK as the number of the device, which here is 0 for every rank."""
    clients: list[int] = []
    monkeypatch.setattr(recorder, "WandbSink", lambda *_, node, **__: clients.append(node))
    cfg = compose([f"run.root={tmp_path}", "log=wandb_shared"])
    (tmp_path / "tokenizer").mkdir()
    run = rundir.create(cfg, make_plan(cfg), corpus=tmp_path)
    for rank in range(1, 4):
        about = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "LOCAL_RANK": rank % 2, named: rank // 2}
        for name, value in about.items():
            monkeypatch.setenv(name, str(value))
        launched = from_environment()
        monkeypatch.setenv("LOCAL_RANK", "0")
        recorder_of(cfg, run, launched)
    assert clients == [1]
