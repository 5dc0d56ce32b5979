"""The row of metrics.jsonl, and the arithmetic of model FLOPs utilisation."""

import json
import math
import re
from dataclasses import dataclass, fields
from typing import Any, Self

from stack.config.values import one_line
from stack.disk import parse_json

#: Fields that rows do without where there is nothing to say.
_OPTIONAL = (
    *("heldout_loss", "router_aux_loss", "loss_scale", "checkpoint_stall_s", "checkpoint_write_s"),
    "stage_busy_s",
)
#: What only an optimizer step has, and the value that stands for it in the row of step 0; in the file it is absent.
_NO_STEP: dict[str, Any] = {
    **dict.fromkeys(("loss", "grad_norm", "lr", "tokens_per_s", "bubble_fraction"), math.nan),
    "step_time_s": 0.0,
    "memory_peak_bytes": 0,
}
#: JSON has no spelling for these, so they are strings of the kind `float()` reads; any JSON parser takes the file.
_NON_FINITE = ("NaN", "Infinity", "-Infinity")


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one optimizer step did. Every field is in every row, save those that may be None at the end.

    The row of step 0 is an evaluation before the first step (`before_training`).
    """

    step: int
    """Optimizer steps finished, this one included; the first step is 1."""
    loss: float
    """Mean cross-entropy in nats over the non-padding target tokens of the global batch."""
    grad_norm: float
    """Global L2 norm of the gradient before clipping."""
    lr: float
    """Learning rate that this step was taken with."""
    tokens: int
    """Non-padding target tokens of this step, over all replicas."""
    tokens_total: int
    """Sum of `tokens` from the first step to this one, over all attempts."""
    tokens_per_s: float
    """`tokens` over `step_time_s`."""
    step_time_s: float
    """Wall-clock seconds of the step, without evaluation and saving."""
    mfu: float | None
    """Model FLOPs over what the devices could have done at their peak, 0 to 1; None where the peak is unknown."""
    bubble_fraction: float
    """Measured idle time of the stages over the step time, 0 to 1, mean over the stages."""
    memory_peak_bytes: int
    """Largest memory of any rank so far: allocated on the GPU, or resident on a machine without one."""
    skipped_steps: int
    """Steps so far whose update was thrown away because it was not finite."""
    attempt: int
    """Number of the start of this run; a resume is a new attempt and may repeat steps."""
    time: float
    """End of the step in Unix seconds."""
    heldout_loss: float | None = None
    """Mean cross-entropy in nats over the held-out tokens; absent from the row of a step that did not evaluate."""
    router_aux_loss: float | None = None
    """What a mixture of experts adds to `loss` to balance its experts; absent for other models."""
    loss_scale: float | None = None
    """What fp16 multiplied the loss by in this step; absent for other dtypes."""
    checkpoint_stall_s: float | None = None
    """Seconds that training waited for the checkpoint of this step; absent where none was saved."""
    checkpoint_write_s: float | None = None
    """Seconds from the beginning of a save to the whole checkpoint; in the row of the first step after it was there."""
    stage_busy_s: tuple[float, ...] | None = None
    """Seconds of the step that each rank of the pipe computed, mean over its replicas; absent without a pipeline."""

    @classmethod
    def before_training(cls, heldout_loss: float, *, attempt: int, time: float) -> Self:
        """The row of step 0: the held-out loss of the first weights, in nats, and no step."""
        nothing: dict[str, Any] = {**_NO_STEP, "step": 0, "tokens": 0, "tokens_total": 0, "skipped_steps": 0}
        return cls(**nothing, mfu=None, attempt=attempt, time=time, heldout_loss=heldout_loss)

    def to_dict(self) -> dict[str, Any]:
        """The row as a plain dict in the order of the fields."""
        row = {field.name: getattr(self, field.name) for field in fields(self)}
        absent = {name for name in _OPTIONAL if row[name] is None} | (set() if self.step else set(_NO_STEP))
        return {name: value for name, value in row.items() if name not in absent}

    def to_json(self) -> str:
        """The row as one line of JSON without its newline; a float reads back with the same bits."""
        return json.dumps({name: _to_json_value(value) for name, value in self.to_dict().items()}, allow_nan=False)

    @classmethod
    def from_json(cls, line: str | bytes) -> Self:
        """The inverse of `to_json`; fields that this version does not know are dropped.

        Raises ValueError, in words for the user, when the line is not a row.
        """
        try:
            row = parse_json(line)
        except ValueError as error:
            # Without the parser's words, which quote the line.
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
    # `type(...) is`, because a bool is an int to isinstance.
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
    # The text of a nested value may be endless.
    return f"a {type(value).__name__}" if isinstance(value, list | dict) else one_line(repr(value))


#: Words of the device's name, and its dense peak FLOP/s by dtype; the first row whose words are all there counts.
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

    `device_name` is what the driver calls it, e.g. "NVIDIA H100 80GB HBM3" (the SXM part). `dtype` is "bf16" or
    "fp16" (tensor cores, as fast in one as in the other on all of these devices) or "fp32" (plain fp32 units: TF32 is
    off, so the tensor cores do nothing).

    Sources, all NVIDIA: H100 Tensor Core GPU Architecture whitepaper (H100 SXM and PCIe), H100, H200 and GH200
    datasheets (with sparsity: half is dense), A100 and L40S datasheets, Blackwell Architecture Technical Brief
    (B200 in HGX). A MIG slice is a part of a device, so its peak is not known here.

    Raises ValueError for another dtype.
    """
    if dtype not in _PEAKS[0][1]:
        raise ValueError(f"dtype={dtype} has no peak in the table; use one of {', '.join(_PEAKS[0][1])}")
    words = frozenset(re.split(r"[\s_-]+", device_name.upper()))
    if "MIG" in words:
        return None
    return next((peaks[dtype] for required, peaks in _PEAKS if required <= words), None)


def mfu(model_flops_per_step: float, step_time_s: float, ranks: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation, 0 to 1; None when `peak` is.

    `model_flops_per_step` counts forward and backward of the whole global batch and no recompute;
    `peak` is one device's FLOP/s.
    """
    if peak is None:
        return None
    return model_flops_per_step / (step_time_s * ranks * peak)
