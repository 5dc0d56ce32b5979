"""The parity tests can fail: each guard of `parallel/zero.py` that can be left out without a deadlock is left out."""

import pytest

from tests.helpers.layouts import run_layout
from tests.helpers.reference import dense_run
from tests.helpers.tiny import tiny_config


def run_with_fault(fault: str, settings: dict) -> dict:
    """`run_layout` with one guard left out, on this rank."""
    import torch

    from stack.parallel import zero

    with pytest.MonkeyPatch.context() as patch:
        if fault == "flag":
            # Then `backward` takes DeepSpeed's optimizers for others and leaves their flag alone.
            patch.setattr(zero, "ZeROOptimizer", type("Nothing", (), {}))
        if fault in ("mark", "sums"):
            adamw = zero._adamw

            def unguarded(stage, cfg):
                for parameter in stage.parameters():
                    if fault == "mark":
                        parameter.model_parallel = False
                    else:
                        parameter.grad_dtype = parameter.dtype
                return adamw(stage, cfg)

            patch.setattr(zero, "_adamw", unguarded)
            # The engine would notice by itself.
            patch.setattr("stack.parallel.engine._check_dtypes", lambda *_: None)
        if fault == "buffer":
            init = zero.ZeroEngine.__init__

            def unguarded_init(self, *args, **kwargs):
                init(self, *args, **kwargs)
                self.optimizer._gradient_reduction_buffer_dtype = lambda: torch.bfloat16

            patch.setattr(zero.ZeroEngine, "__init__", unguarded_init)
        return run_layout(settings, True)


def test_without_the_flag_a_backward_overwrites_the_one_before(ranks):
    # GPipe runs all its backwards in a row; the two in a row that end a shallow 1F1B happen to add.
    settings = {"parallel__reduce": "microbatch", "parallel__schedule": "gpipe"}
    [expected] = dense_run(tiny_config(), padded=True).norms[:1]
    found = ranks(4).run(run_with_fault, "flag", settings)[0]["steps"][0][1]
    assert found != pytest.approx(expected, rel=1e-2)


def test_without_the_mark_later_stages_are_left_out_of_the_norm(ranks):
    # ZeRO-3's norm is summed by our own code, which counts every parameter; DeepSpeed's is asked at ZeRO-2.
    [expected] = dense_run(tiny_config(), padded=True).norms[:1]
    found = ranks(4).run(run_with_fault, "mark", {"parallel__zero": 2})[0]["steps"][0][1]
    assert found < 0.99 * expected


@pytest.mark.parametrize(("fault", "zero_stage"), [("sums", 3), ("sums", 2), ("buffer", 2)])
def test_bf16_sums_lose_bits_without_fp32(ranks, fault, zero_stage):
    settings = {"precision__dtype": "bf16", "parallel__zero": zero_stage}
    expected = ranks(4).run(run_layout, settings, True)[0]["steps"][0][1]
    found = ranks(4).run(run_with_fault, fault, settings)[0]["steps"][0][1]
    assert found != pytest.approx(expected, rel=1e-5)
