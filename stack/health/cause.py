"""Finds the error of an exception chain to report. Libraries wrap the error that says what happened into an error that
says only where it happened, such as the `RuntimeError: [Stage 1] failed to run forward:` of torch's pipelining."""

from collections.abc import Iterator

from stack.errors import StackError

#: Words of allocators and of the kernel for memory that has run out.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
    "Cannot allocate memory",
)
#: First words of the message of a rank that gave up waiting for another rank. The waiting rank cannot tell which one.
WAITED = "another rank did not answer within"
_WRAPPERS = ("failed to run forward", "failed to run backward")
#: Parts of the messages of gloo, NCCL and torch's process groups, which do not always raise torch's own error classes.
_DISTRIBUTED = ("gloo/", "c10d", "NCCL", "ProcessGroup", "monitoredBarrier", "Operation timed out!", "Socket Timeout")
_TIMEOUT = ("timed out", "timeout")


def cause_of(error: BaseException) -> BaseException:
    """The error to report: a `StackError` anywhere in the chain, so that its exit code is used; else an error that says
    that memory ran out; else the error itself, or below wrappers the first error that is no wrapper."""
    chain = list(_chain(error))
    for found in chain:
        if isinstance(found, StackError):
            return found
    for found in chain:
        if is_out_of_memory(found):
            return found
    while error.__cause__ is not None and any(words in str(error) for words in _WRAPPERS):
        error = error.__cause__
    return error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the host or of the GPU did not suffice."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(words in str(error) for words in _OUT_OF_MEMORY)


def is_collective_timeout(error: BaseException) -> bool:
    """Whether an error comes from a collective that timed out. gloo raises a plain RuntimeError, so the words of the
    message decide. The timeout of a download or of a lock does not count."""
    words = str(error)
    if not isinstance(error, RuntimeError) or not any(late in words.lower() for late in _TIMEOUT):
        return False
    # torch.distributed.DistError and its subclasses, by name, so that this module need not import torch.
    known = any(kind.__module__ == "torch.distributed" for kind in type(error).__mro__)
    return known or any(source in words for source in _DISTRIBUTED)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, then the error that caused it, and so on."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
