"""Rows of metrics.jsonl, reading and writing the file, and the curve that is drawn from it."""

import dataclasses
import json
import math
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from stack.errors import StackError
from stack.observe.curve import draw
from stack.observe.jsonl import Follower, MetricsWriter, latest, read
from stack.observe.metrics import _PEAKS, StepRecord, mfu, peak_flops


def row(step: int, **changed) -> StepRecord:
    tokens = 64 * 255
    values = {
        "step": step,
        "loss": 3.0 + 5.0 * math.exp(-step / 40),
        "grad_norm": 1.25,
        "lr": 1e-3,
        "tokens": tokens,
        "tokens_total": tokens * step,
        "tokens_per_s": 5000.0,
        "step_time_s": tokens / 5000.0,
        "mfu": None,
        "bubble_fraction": 0.125,
        "memory_peak_bytes": 3 << 30,
        "skipped_steps": 0,
        "attempt": 1,
        "time": 1.7e9 + step,
    }
    return StepRecord(**{**values, **changed})


def some_floats() -> list[float]:
    odd = [0.0, -0.0, 5e-324, -5e-324, sys.float_info.min / 3, sys.float_info.max, 0.1, 1 / 3, 2.0**53 + 1]
    generator = random.Random(0)
    bits = (struct.unpack("<d", generator.randbytes(8))[0] for _ in range(500))
    return odd + [math.nan, math.inf, -math.inf] + [value for value in bits if math.isfinite(value)]


def test_floats_read_back_bit_equal_through_the_file(tmp_path: Path) -> None:
    records = [row(step, loss=value, heldout_loss=value) for step, value in enumerate(some_floats(), 1)]
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        for record in records:
            writer.write(record)
    back = read(tmp_path / "metrics.jsonl")
    assert [record.loss.hex() for record in back] == [record.loss.hex() for record in records]
    assert [record.heldout_loss.hex() for record in back] == [record.heldout_loss.hex() for record in records]


def test_every_line_is_json_that_any_parser_takes() -> None:
    def refuse(literal: str) -> None:
        raise AssertionError(literal)

    line = row(1, loss=math.nan, grad_norm=math.inf, lr=-math.inf).to_json()
    values = json.loads(line, parse_constant=refuse)
    assert (values["loss"], values["grad_norm"], values["lr"]) == ("NaN", "Infinity", "-Infinity")


def test_row_has_the_contracted_fields_and_heldout_only_when_evaluated() -> None:
    always = ["step", "loss", "grad_norm", "lr", "tokens", "tokens_total", "tokens_per_s", "step_time_s", "mfu"]
    always += ["bubble_fraction", "memory_peak_bytes", "skipped_steps", "attempt", "time"]
    assert list(json.loads(row(1).to_json())) == always
    assert list(json.loads(row(1, heldout_loss=2.5).to_json())) == [*always, "heldout_loss"]
    assert StepRecord.from_json(row(1, mfu=None).to_json()) == row(1, mfu=None)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda values: values.pop("lr"), "it has no lr"),
        (lambda values: values.update(step=1.5), "its step is 1.5"),
        (lambda values: values.update(step=True), "its step is True"),
        (lambda values: values.update(loss=None), "its loss is None"),
        (lambda values: values.update(loss="low"), "its loss is 'low'"),
    ],
)
def test_a_wrong_row_says_what_is_wrong(damage, reason: str) -> None:
    values = row(1).to_dict()
    damage(values)
    with pytest.raises(ValueError, match=reason):
        StepRecord.from_json(json.dumps(values))


def test_a_field_of_a_later_version_is_dropped() -> None:
    assert StepRecord.from_json(json.dumps({**row(3).to_dict(), "joules": 7})) == row(3)


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"\0" * 200_000, row(3).to_json().encode()])
def test_a_torn_tail_is_ignored_by_readers_and_cut_by_the_next_writer(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = b"".join(row(step).to_json().encode() + b"\n" for step in (1, 2))
    path.write_bytes(whole + torn)
    assert [record.step for record in read(path)] == [1, 2]
    with MetricsWriter(path) as writer:
        assert path.read_bytes() == whole
        writer.write(row(3, attempt=2))
    assert [(record.step, record.attempt) for record in read(path)] == [(1, 1), (2, 1), (3, 2)]


def test_a_file_that_is_only_a_torn_row_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step"')
    MetricsWriter(path).close()
    assert path.read_bytes() == b""


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{row(1).to_json()}\n{{oops\n{row(3).to_json()}\n")
    with pytest.raises(StackError, match=r"metrics\.jsonl:2 is not a metrics row: it is not JSON"):
        read(path)


def test_a_follower_never_sees_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    assert follower.poll() == []
    seen = []
    with path.open("ab", buffering=0) as file:
        for step in (1, 2, 3):
            line = row(step).to_json().encode() + b"\n"
            for start in range(0, len(line), 7):
                assert [record.step for record in seen] == list(range(1, step))
                file.write(line[start : start + 7])
                seen += follower.poll()
    assert seen == [row(1), row(2), row(3)]
    assert follower.poll() == []


def test_a_follower_outlives_a_crash_and_the_next_writer(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    with MetricsWriter(path) as writer:
        writer.write(row(1))
    with path.open("ab") as file:
        file.write(b'{"step": 2')
    assert follower.poll() == [row(1)]
    with MetricsWriter(path) as writer:
        writer.write(row(2, attempt=2))
        assert follower.poll() == [row(2, attempt=2)]


def test_latest_keeps_the_run_as_it_went_in_the_end() -> None:
    first = [row(step, attempt=1) for step in (1, 2, 3, 4)]
    again = [row(step, attempt=2) for step in (3, 4, 5)]
    assert [(record.step, record.attempt) for record in latest(first + again)] == [
        (1, 1),
        (2, 1),
        (3, 2),
        (4, 2),
        (5, 2),
    ]
    assert latest(first + again[:1]) == [*first[:2], again[0]]


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "fp32", 66.9e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H100 NVL", "bf16", 835.5e12),
        ("NVIDIA H200", "bf16", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA B200", "bf16", 2250e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA H20", "bf16", None),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("cpu", "fp32", None),
    ],
)
def test_peaks_by_the_name_the_driver_gives(name: str, dtype: str, peak: float | None) -> None:
    assert peak_flops(name, dtype) == peak


def test_the_tensor_cores_are_as_fast_in_fp16_as_in_bf16() -> None:
    assert all(peaks["fp16"] == peaks["bf16"] > peaks["fp32"] for _, peaks in _PEAKS)


def test_peak_of_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype=fp8"):
        peak_flops("NVIDIA H200", "fp8")


def test_mfu_is_the_share_of_what_all_ranks_could_do() -> None:
    assert mfu(6e15, 2.0, 4, 1e15) == 0.75
    assert mfu(6e15, 2.0, 4, None) is None


def test_the_curve_is_a_png_of_twice_a_readme_column(tmp_path: Path) -> None:
    records = [row(step, heldout_loss=3.3 if step % 20 == 0 else None) for step in range(1, 101)]
    records += [row(80, attempt=2, loss=math.nan), row(81, attempt=2, heldout_loss=3.2)]
    draw(records, tmp_path / "curve.png", title="quickstart")
    data = (tmp_path / "curve.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1800, 1040)
    assert 20_000 < len(data) < 400_000


def test_a_run_of_one_step_has_a_curve_and_one_of_none_says_so(tmp_path: Path) -> None:
    draw([row(1)], tmp_path / "one.png", title="one")
    assert (tmp_path / "one.png").exists()
    with pytest.raises(StackError, match="finished no step"):
        draw([], tmp_path / "none.png", title="none")


def test_the_room_imports_neither_torch_nor_wandb() -> None:
    modules = ["console", "curve", "jsonl", "metrics", "wandb"]
    code = "import sys\n" + "".join(f"import stack.observe.{module}\n" for module in modules)
    code += "raise SystemExit(len({'torch', 'wandb', 'deepspeed'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_record_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        row(1).loss = 0.0  # type: ignore[misc]


def test_an_evaluation_ahead_of_the_first_step_has_in_the_file_what_it_is_about() -> None:
    first = StepRecord.before_training(7.5, attempt=1, time=1.5)
    values = json.loads(first.to_json())
    assert values == {
        **{"step": 0, "tokens": 0, "tokens_total": 0, "mfu": None, "skipped_steps": 0},
        **{"attempt": 1, "time": 1.5, "heldout_loss": 7.5},
    }
    back = StepRecord.from_json(first.to_json())
    assert math.isnan(back.loss)
    assert back.to_json() == first.to_json()
    # In the row of a step, unlike that of step 0, no field may be missing.
    with pytest.raises(ValueError, match="it has no loss"):
        StepRecord.from_json(json.dumps({**values, "step": 1}))


def test_the_picture_of_a_resumed_run(tmp_path: Path) -> None:
    records = [StepRecord.before_training(8.0, attempt=1, time=1.0), *(row(step) for step in range(1, 61))]
    records += [row(step, attempt=2) for step in range(41, 80)] + [row(step, attempt=3) for step in range(80, 101)]
    for changes in ({}, {2: [], 3: [f"a.b{n} $1 -> 2" for n in range(9)]}):
        draw(records, tmp_path / "curve.png", title="resumed", changes=changes)
        assert (tmp_path / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(StackError, match="finished no step"):
        draw(records[:1], tmp_path / "none.png", title="none")
