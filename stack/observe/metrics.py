"""The row of metrics.jsonl, and the computation of model FLOPs utilisation."""

import json
import math
import re
from dataclasses import dataclass, fields
from typing import Any, Self

from stack.config.values import one_line
from stack.disk import parse_json

#: Fields that a row lacks where their value is None.
_OPTIONAL = (
    *("heldout_loss", "router_aux_loss", "loss_scale", "checkpoint_stall_s", "checkpoint_write_s"),
    "stage_busy_s",
)
#: Fields that only optimizer steps have -> their value in the row of step 0. In the file that row lacks them.
_NO_STEP: dict[str, Any] = {
    **dict.fromkeys(("loss", "grad_norm", "lr", "tokens_per_s", "bubble_fraction"), math.nan),
    "step_time_s": 0.0,
    "memory_peak_bytes": 0,
}
#: Values that JSON cannot represent. They are written as strings that `float()` reads, so that every JSON parser can
#: read the file.
_NON_FINITE = ("NaN", "Infinity", "-Infinity")


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """The figures of one optimizer step. Every row has every field, except those at the end with the default None.

    The row of step 0 is an evaluation before the first step (`before_training`).
    """

    step: int
    """Number of finished optimizer steps, this one included; the first step is 1."""
    loss: float
    """Mean cross-entropy in nats over the non-padding target tokens of the global batch."""
    grad_norm: float
    """Global L2 norm of the gradient before clipping."""
    lr: float
    """Learning rate of the update."""
    tokens: int
    """Non-padding target tokens of this step, over all replicas."""
    tokens_total: int
    """Sum of `tokens` from the first step to this one, over all attempts."""
    tokens_per_s: float
    """`tokens` over `step_time_s`."""
    step_time_s: float
    """Wall-clock seconds of the step, without evaluation and saving."""
    mfu: float | None
    """Model FLOPs utilisation: model FLOPs of the step over the peak FLOPs of all devices in the step's time, 0 to 1;
    None where the peak is unknown."""
    bubble_fraction: float
    """Measured idle time of the stages over the step time, 0 to 1, mean over the stages."""
    memory_peak_bytes: int
    """Largest memory of any rank so far: allocated GPU memory, or resident memory on a machine without a GPU."""
    skipped_steps: int
    """Number of steps so far whose update was skipped because of an overflow in fp16."""
    attempt: int
    """Number of the start of this run, from 1; a resume is a new attempt and may repeat steps."""
    time: float
    """End of the step in Unix seconds."""
    heldout_loss: float | None = None
    """Mean cross-entropy in nats over the held-out target tokens; absent in steps without an evaluation."""
    router_aux_loss: float | None = None
    """Auxiliary loss that balances the experts of a mixture, times its coefficient; absent for other models."""
    loss_scale: float | None = None
    """Factor of the loss in fp16 in this step; absent for other dtypes."""
    checkpoint_stall_s: float | None = None
    """Seconds that training waited for the checkpoint of this step; absent where none was saved."""
    checkpoint_write_s: float | None = None
    """Seconds from the beginning of a save until the checkpoint was whole; in the row of the first step after that."""
    stage_busy_s: tuple[float, ...] | None = None
    """Seconds of the step in which each rank of the pipe computed, mean over replicas; absent without a pipeline."""

    @classmethod
    def before_training(cls, heldout_loss: float, *, attempt: int, time: float) -> Self:
        """The row of step 0, which has only the held-out loss of the initial weights, in nats."""
        nothing: dict[str, Any] = {**_NO_STEP, "step": 0, "tokens": 0, "tokens_total": 0, "skipped_steps": 0}
        return cls(**nothing, mfu=None, attempt=attempt, time=time, heldout_loss=heldout_loss)

    def to_dict(self) -> dict[str, Any]:
        """The row as a plain dict in the order of the fields."""
        row = {field.name: getattr(self, field.name) for field in fields(self)}
        absent = {name for name in _OPTIONAL if row[name] is None} | (set() if self.step else set(_NO_STEP))
        return {name: value for name, value in row.items() if name not in absent}

    def to_json(self) -> str:
        """The row as one line of JSON, without a newline. A float that is read back has the same bits."""
        return json.dumps({name: _to_json_value(value) for name, value in self.to_dict().items()}, allow_nan=False)

    @classmethod
    def from_json(cls, line: str | bytes) -> Self:
        """The inverse of `to_json`. Unknown fields are ignored.

        Raises:
            ValueError: the line is no row; the message is for the user.
        """
        try:
            row = parse_json(line)
        except ValueError as error:
            # The parser's message is left out, because it quotes the line.
            raise ValueError("it is not JSON") from error
        if not isinstance(row, dict):
            raise ValueError("it is not a JSON object")
        values: dict[str, Any] = {}
        for field in fields(cls):
            if field.name in row:
                try:
                    values[field.name] = _from_json_value(field.name, field.type, row[field.name])
                except OverflowError as error:
                    raise ValueError(f"its {field.name} is larger than a float") from error
            elif field.name in _NO_STEP and row.get("step") == 0:
                values[field.name] = _NO_STEP[field.name]
            elif field.name not in _OPTIONAL:
                raise ValueError(f"it has no {field.name}")
        return cls(**values)


def _to_json_value(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _from_json_value(name: str, kind: Any, value: Any) -> int | float | tuple[float, ...] | None:
    if kind == tuple[float, ...] | None:
        if isinstance(value, list) and all(type(part) in (int, float) for part in value):
            return tuple(map(float, value))
        raise ValueError(f"its {name} is {_shown(value)}")
    # `type(...) is` instead of isinstance, because bool is a subclass of int.
    if kind is int:
        if type(value) is int and 0 <= value < 1 << 63:
            return value
    elif value is None:
        if kind is not float:
            return None
    elif type(value) in (int, float) or value in _NON_FINITE:
        return float(value)
    raise ValueError(f"its {name} is {_shown(value)}")


def _shown(value: Any) -> str:
    # The text of a nested value may be very long.
    return f"a {type(value).__name__}" if isinstance(value, list | dict) else one_line(repr(value))


#: (words in the name of a device, dtype -> dense peak in FLOP/s). The first row whose words all occur is used.
_PEAKS: tuple[tuple[frozenset[str], dict[str, float]], ...] = tuple(
    (frozenset(words.split()), {"bf16": bf16, "fp16": bf16, "fp32": fp32})
    for words, bf16, fp32 in (
        ("H100 NVL", 835.5e12, 60.0e12),
        ("H100 PCIE", 756e12, 51.2e12),
        ("H100 HBM3", 989.4e12, 66.9e12),
        ("H100 SXM5", 989.4e12, 66.9e12),
        ("GH200", 989.4e12, 66.9e12),
        ("H200 NVL", 835.5e12, 60.0e12),
        ("H200", 989.4e12, 66.9e12),
        ("B200", 2250e12, 80e12),
        ("A100", 312e12, 19.5e12),
        ("L40S", 362e12, 91.6e12),
    )
)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak of one device in FLOP/s, without structured sparsity; None when the device is not in the table.

    `device_name` is the driver's name, e.g. "NVIDIA H100 80GB HBM3" (the SXM part). `dtype` is "bf16" or "fp16" (tensor
    cores, equally fast for both on all of these devices) or "fp32" (plain fp32 units, since TF32 is off and tensor
    cores are not used).

    Sources, all NVIDIA: H100 Tensor Core GPU Architecture whitepaper (H100 SXM and PCIe), H100, H200 and GH200
    datasheets (figures with sparsity, halved), A100 and L40S datasheets, Blackwell Architecture Technical Brief
    (B200 in HGX). A MIG slice is a part of a device, and its peak is not in the table.

    Raises:
        ValueError: another dtype.
    """
    if dtype not in _PEAKS[0][1]:
        raise ValueError(f"dtype={dtype} has no peak in the table; use one of {', '.join(_PEAKS[0][1])}")
    words = frozenset(re.split(r"[\s_-]+", device_name.upper()))
    if "MIG" in words:
        return None
    return next((peaks[dtype] for required, peaks in _PEAKS if required <= words), None)


def mfu(model_flops_per_step: float, step_time_s: float, ranks: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation (Chowdhery et al. 2022, PaLM), 0 to 1: the model's FLOPs over the peak FLOPs of all
    devices in the same time.

    Args:
        model_flops_per_step: FLOPs of forward and backward of the global batch, without recomputation.
        step_time_s: seconds of the step.
        ranks: number of devices.
        peak: peak of one device in FLOP/s; None gives None.
    """
    if peak is None:
        return None
    return model_flops_per_step / (step_time_s * ranks * peak)
