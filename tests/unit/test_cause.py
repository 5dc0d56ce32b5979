"""The choice of the error to report in a chain of errors, and the advice when memory runs out."""

import pytest
import torch
import torch.distributed as dist

from stack.config.compose import compose
from stack.errors import DataError, HangError, RankFailure
from stack.health.cause import cause_of, is_collective_timeout, is_out_of_memory
from stack.plan.layout import make_plan
from stack.train import ending
from stack.train.memory import lower_memory

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 10000ms for recv"


def wrapped(inner: BaseException) -> RuntimeError:
    """An error wrapped in the way of torch's pipelining."""
    try:
        try:
            raise inner
        except BaseException as error:
            raise RuntimeError("\n            [Stage 1] failed to run forward:\n            args: ()") from error
    except RuntimeError as outer:
        return outer


def explained(error: Exception, *overrides: str) -> BaseException:
    cfg = compose(overrides)
    return ending.explained(error, cfg, make_plan(cfg))


def test_an_error_of_ours_keeps_its_class_inside_a_wrapper():
    inner = DataError("id 400 is beyond the vocabulary")
    assert explained(wrapped(inner)) is inner


def test_an_error_that_came_up_while_another_was_handled_does_not_hide_it():
    with pytest.raises(OSError, match="closing") as caught:  # noqa: PT012
        try:
            raise DataError("the corpus is gone")
        finally:
            raise OSError("closing failed")
    assert isinstance(explained(caught.value), DataError)


def test_the_wrapper_is_peeled_and_nothing_else_is():
    inner = IndexError("index out of range in self")
    assert explained(wrapped(inner)) is inner
    with pytest.raises(ValueError, match="read") as caught:
        raise ValueError("what the user can read") from KeyError("x")
    assert cause_of(caught.value) is caught.value


def test_a_lost_peer_is_seen_through_the_wrapper():
    assert "Connection closed by peer" in str(explained(wrapped(RuntimeError("Connection closed by peer [1.2.3.4]:5"))))


@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError, RuntimeError])
def test_out_of_memory_is_told_with_what_helps(kind):
    error = wrapped(kind("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    told = explained(error, "batch.micro_size=4", "activation=none")
    assert isinstance(told, RankFailure)
    assert str(told).startswith("out of memory (DefaultCPUAllocator: can't allocate memory")
    for override in ("batch.micro_size=2", "activation.checkpoint=full", "parallel.gather=microbatch"):
        assert override in str(told)


def test_a_real_allocation_that_fails_is_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [(), ("parallel.zero=1",), ("batch.micro_size=1", "activation.checkpoint=full"), ("parallel.zero=0",)],
)
def test_each_piece_of_advice_is_legal_and_new(overrides):
    cfg = compose(overrides)
    plan = make_plan(cfg)
    for override in lower_memory(cfg, plan):
        assert override not in overrides
        kept = [other for other in overrides if other.split("=")[0] != override.split("=")[0]]
        make_plan(compose([*kept, override]), plan.world_size, plan.nodes)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(GLOO),
        RuntimeError("[gloo/transport/tcp/pair.cc:1] Application timeout caused pair closure"),
        dist.DistStoreError("wait timeout after 1000ms, keys: /x"),
        dist.DistBackendError("NCCL operation timed out"),
    ],
)
def test_a_collective_that_waited_too_long_is_a_hang(error):
    assert is_collective_timeout(error)
    told = explained(wrapped(error))
    assert isinstance(told, HangError)
    assert str(told).startswith("another rank did not answer within health.hang_timeout_s: ")


@pytest.mark.parametrize(
    "error", [RuntimeError("request timed out"), TimeoutError("timed out"), OSError("Connection timed out")]
)
def test_another_timeout_is_no_hang(error):
    assert not is_collective_timeout(error)
    assert explained(error) is error


def test_a_wait_for_disks_names_its_own_key():
    assert "within checkpoint.timeout_s: " in str(explained(RuntimeError(GLOO), "checkpoint.timeout_s=10"))
