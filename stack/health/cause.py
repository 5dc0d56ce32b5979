"""Which error of a chain to report. Libraries wrap the error that says what happened into one that says only where:
torch's pipelining turns any error of a forward into `RuntimeError: [Stage 1] failed to run forward:`."""

from collections.abc import Iterator

from stack.errors import StackError

#: How allocators and the kernel say that there is no memory left.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
    "Cannot allocate memory",
)
#: How a rank begins to tell that it gave up waiting for another one, which it cannot name.
WAITED = "another rank did not answer within"
_WRAPPERS = ("failed to run forward", "failed to run backward")
#: Parts of the messages of gloo, NCCL and torch's process groups. torch's own classes for them are only some of them.
_DISTRIBUTED = ("gloo/", "c10d", "NCCL", "ProcessGroup", "monitoredBarrier", "Operation timed out!", "Socket Timeout")
_TIMEOUT = ("timed out", "timeout")


def cause_of(error: BaseException) -> BaseException:
    """The error to report: an error of ours anywhere in the chain, so that its exit code counts; else one that says
    that memory ran out; else the error itself, or the first one that is not a mere wrapper."""
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
    """Whether an error is that of a collective which waited for its timeout. gloo raises a plain RuntimeError, so its
    words decide; a timeout of anything else (a download, a lock) is not one."""
    words = str(error)
    if not isinstance(error, RuntimeError) or not any(late in words.lower() for late in _TIMEOUT):
        return False
    # torch.distributed.DistError and its kinds, by name: where torch was not imported there is none.
    known = any(kind.__module__ == "torch.distributed" for kind in type(error).__mro__)
    return known or any(source in words for source in _DISTRIBUTED)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what caused it, what caused that."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
