"""What is on the disk to stay, and a checksum by which JSON is known to be what was written."""

import errno
import fcntl
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import IO, Any, Literal


def sync(path: Path) -> None:
    """Brings a file's content, or the names in a folder, to the disk.

    Raises:
        OSError: the disk did not take it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` of each file in a folder and in those below it, and of the folders.

    Raises:
        OSError: the disk did not take it.
    """
    for path in (*folder.rglob("*"), folder):
        sync(path)


def lock(file: IO[Any], *, wait: bool) -> Literal["held", "busy", "none"]:
    """Takes the kernel's lock of an open file (`flock`), which ends with the process, however it ends.

    Args:
        wait: until another process gives it back; else that is "busy".

    Returns:
        "none" where the file system has no such locks: Lustre mounted without them, some NFS and FUSE servers.

    Raises:
        OSError: another fault.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return "busy"
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP):
            return "none"
        raise
    return "held"


def read_regular(path: Path) -> bytes:
    """Content of a regular file. A pipe or a device of that name would block its reader, perhaps for ever.

    Raises:
        OSError: there is none, it is no regular file, or it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text that may have been damaged or crafted.

    Raises:
        ValueError: it is no JSON, has an integer of thousands of digits, or is nested deeper than Python can follow.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def checksum(content: dict[str, Any]) -> str:
    """BLAKE2b of JSON in its shortest form with sorted keys, 32 hexadecimal digits."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.blake2b(text, digest_size=16).hexdigest()
