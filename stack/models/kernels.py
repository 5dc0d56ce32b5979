"""Optional kernels: a loss that is computed inside the head, and Liger's kernels in a model's layers."""

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from stack.config.kernels import liger_parts
from stack.config.schema import Config
from stack.data.batches import IGNORE
from stack.errors import ConfigError, LayoutError
from stack.models.loss import linear_cross_entropy

_INTERPRETER = "TRITON_INTERPRET"


def require(cfg: Config, device: torch.device) -> None:
    """Refuses kernels that this rank's device cannot run (`stack.config.kernels` refuses those a model cannot have).

    Raises:
        ConfigError: liger-kernel is not installed.
        LayoutError: there is no NVIDIA GPU for 8-bit gathers, or none for Liger's kernels while Triton's interpreter is
            off (it is on with TRITON_INTERPRET=1).
    """
    if cfg.parallel.quantized_weights and device.type != "cuda":
        raise LayoutError(
            "parallel.quantized_weights=true on a host without NVIDIA GPUs: DeepSpeed's quantizer has no CPU kernel; "
            "use parallel.quantized_weights=false"
        )
    for part in liger_parts(cfg):
        other = "chunked" if part == "loss" else "torch"
        if importlib.util.find_spec("liger_kernel") is None:
            raise ConfigError(
                f"kernels.{part}=liger: liger-kernel is not installed; use pip install stack[gpu] or "
                f"kernels.{part}={other}"
            )
        if device.type != "cuda" and os.environ.get(_INTERPRETER) != "1":
            raise LayoutError(
                f"kernels.{part}=liger on a host without NVIDIA GPUs: its kernels are written in Triton; use "
                f"kernels.{part}={other}"
            )


def put_in_liger(model: Any, cfg: Config) -> None:
    """Puts Liger's kernels into the layers of a whole model with Liger's own function for the class. The model may be
    on the meta device.

    Liger's function also replaces names in the Python module of the class. This function restores them, except
    `apply_rotary_pos_emb`, which layers look up there: with kernels.rope=liger it stays replaced for every model of the
    class in this process.
    """
    parts = [part for part in liger_parts(cfg) if part != "loss"]
    if not parts:
        return
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type]
    options = {name: name in parts for name in inspect.signature(apply).parameters if name != "model"}
    names = vars(sys.modules[type(model).__module__])
    before = dict(names)
    apply(model=model, **options)
    names.update({name: value for name, value in before.items() if name != "apply_rotary_pos_emb"})


class LossHead:
    """Replaces the forward of a head: computes the sum of the token losses from hidden states, without whole logits.

    The head module itself stays, so the hooks around its call still gather its parameters. Set `labels` (int64
    [micro_size, seq_len]) before each call. The model class returns the sum in the place of its logits, so the class
    must not change its logits after the head.
    """

    def __init__(self, head: Any, kernel: str):
        """
        Args:
            head: a linear module.
            kernel: chunked or liger.
        """
        self._head, self._loss = head, _LOSSES[kernel]
        self.labels: torch.Tensor | None = None
        head.forward = self

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self.labels is not None
        return self._loss(hidden.flatten(0, -2), self._head.weight, self._head.bias, self.labels.flatten())


def _liger(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
    """`linear_cross_entropy` with Liger's kernel; same shapes and dtypes."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    options: dict[str, Any] = {"ignore_index": IGNORE, "reduction": "sum", "accum_dtype": torch.float32}
    # `Function.apply` takes no keyword arguments, so all arguments after the first five are passed in order.
    order = list(inspect.signature(LigerFusedLinearCrossEntropyFunction.forward).parameters.values())[5:]
    given = [options.pop(argument.name, argument.default) for argument in order]
    assert not options
    return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels, bias, *given)[0]


_LOSSES: dict[str, Callable[..., torch.Tensor]] = {"chunked": linear_cross_entropy, "liger": _liger}
