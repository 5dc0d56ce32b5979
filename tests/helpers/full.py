"""Simulates a full disk by a limit on the size of files, which needs no root."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def no_room_beyond(size: int) -> Iterator[None]:
    """Inside the `with` block no file of this process grows beyond `size` bytes. A write that fits only in part is done
    in part."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
