"""Runs Liger's kernels without a GPU, by Triton's interpreter, which runs the kernels' code on arrays of numpy.

Neither liger-kernel nor Triton is among the test dependencies. In an environment that has both, run
`TRITON_INTERPRET=1 python -m pytest tests/unit/test_kernels.py tests/numerics/test_kernels.py`.
"""

import functools
import importlib.util
import os

import numpy as np
import pytest

from stack.config.families import FAMILIES

_INSTALLED = importlib.util.find_spec("liger_kernel") is not None
needs_liger = pytest.mark.skipif(not _INSTALLED, reason="liger-kernel not installed")
needs_interpreter = pytest.mark.skipif(
    # Triton reads the variable when it is imported.
    not _INSTALLED or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs liger-kernel and TRITON_INTERPRET=1",
)


def interpret(patch: pytest.MonkeyPatch) -> None:
    """Adds to the interpreter what these kernels need: casts of floats, CUDA's rsqrt, and a choice of a configuration
    without timing on a device. When `patch` is undone, the model classes also get back the rotary functions that Liger
    replaces for the whole process."""
    from triton.runtime import autotuner
    from triton.runtime import interpreter as interpreted

    convert, tl = interpreted._implicit_cvt, interpreted.tl

    def with_floats(value):
        if isinstance(value, float):
            return tl.tensor(interpreted.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
        return convert(value)

    patch.setattr(interpreted, "_implicit_cvt", with_floats)
    patch.setattr(autotuner.Autotuner, "_bench", lambda *_, **__: [0.0, 0.0, 0.0])
    rsqrt = functools.partial(tl.rsqrt, _semantic=interpreted.interpreter_semantic)
    patch.setattr("liger_kernel.ops.rms_norm.rsqrt", rsqrt)
    for family in FAMILIES:
        if FAMILIES[family].liger:
            name = family.removesuffix("_text")
            module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
            patch.setattr(module, "apply_rotary_pos_emb", module.apply_rotary_pos_emb)
