"""Atomic and durable writes, file locks, reserved disk space, and reading JSON that may be damaged or hostile."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal

#: Name of the placeholder file that `reserve` writes, and its size in bytes.
_RESERVED = ".reserved"
_RESERVED_BYTES = 16 << 10


def sync(path: Path) -> None:
    """Calls fsync on a file, or on a folder so that the names in it survive a crash.

    Raises:
        OSError: the disk reported an error.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Calls `sync` for a folder and for every file and folder below it.

    Raises:
        OSError: the disk reported an error.
    """
    for path in (*folder.rglob("*"), folder):
        sync(path)


def lock(file: IO[Any], *, wait: bool) -> Literal["held", "busy", "none"]:
    """Takes an exclusive `flock` on an open file. The kernel releases the lock when the process ends, even by SIGKILL.

    Args:
        file: the open file; closing it releases the lock.
        wait: whether to block until another process releases the lock.

    Returns:
        "held" once this process has the lock; "busy" if another process holds it and `wait` is false; "none" if the
        file system has no such locks (Lustre mounted without them, some NFS and FUSE servers).

    Raises:
        OSError: locking failed for any other reason.
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


def write_whole(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Replaces a file atomically: a reader sees the whole old content or the whole new content, also after a crash.

    The content is written to a draft beside `path`, and the draft is renamed to `path`. The draft's name is random,
    because two processes on different hosts that share a disk may have the same process id.

    Args:
        path: the file to replace or create; its folder must exist.
        content: text is encoded as UTF-8.
        durable: whether to return only after content and name are on the disk (fsync).

    Raises:
        OSError: the file could not be written; `path` is unchanged and the draft is removed.
    """
    with _draft(path, content, durable=durable) as draft:
        draft.replace(path)
    if durable:
        sync(path.parent)


def write_new(path: Path, content: str | bytes) -> bool:
    """Creates a file atomically, as `write_whole` does, unless `path` exists already.

    Returns:
        Whether this call created the file. If several processes call it for one path, exactly one of them gets True.

    Raises:
        OSError: the file could not be written.
    """
    with _draft(path, content) as draft:
        return link_new(draft, path)


def link_new(source: Path, target: Path) -> bool:
    """Creates `target` with the content of `source`: as a hard link, or as a copy if the file system has no links.

    Returns:
        Whether this call created `target`; False if `target` exists already.

    Raises:
        OSError: the file could not be written.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        # A network file system may lose the reply to a link call that succeeded, and repeat the call. `source` then has
        # two links.
        return source.stat().st_nlink > 1
    except OSError:
        # Without hard links, a reader may see a part of the content for a moment.
        try:
            with target.open("xb") as file:
                file.write(source.read_bytes())
        except FileExistsError:
            return False
    return True


def reserve(folder: Path) -> None:
    """Reserves space for one small file in a folder by writing a 16 KiB placeholder. `write_reserved` uses the space
    later, when the disk may be full. Does nothing if the disk is full already."""
    try:
        (folder / _RESERVED).write_bytes(b" " * _RESERVED_BYTES)
    except OSError:
        release(folder)


def write_reserved(path: Path, content: str) -> None:
    """Writes a file into the placeholder that `reserve` left in the same folder, and renames the placeholder to `path`.
    On a file system that overwrites in place no free space is needed. Without a placeholder, or if writing to it
    fails, this is `write_whole`.

    Raises:
        OSError: the file could not be written.
    """
    reserved = path.with_name(_RESERVED)
    try:
        with reserved.open("r+b", buffering=0) as file:
            file.write(content.encode())
            file.truncate()
        reserved.replace(path)
    except OSError:
        write_whole(path, content)


def release(folder: Path) -> None:
    """Removes the placeholder that `reserve` wrote, if there is one."""
    with contextlib.suppress(OSError):
        (folder / _RESERVED).unlink()


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path lies in a folder after all links in both are followed. Neither needs to exist."""
    # Not `Path.resolve`, which raises RuntimeError for a link to itself.
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading. Pipes and devices are refused, because reading them could block for ever.

    Raises:
        OSError: the file does not exist, is not a regular file, or cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(os.dup(descriptor), "rb")
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    finally:
        os.close(descriptor)


def read_regular(path: Path) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: as for `open_regular`, or the file cannot be read.
    """
    with open_regular(path) as file:
        return file.read()


def parse_json(text: str | bytes) -> Any:
    """Parses a JSON text that may be damaged or hostile.

    Raises:
        ValueError: the text is not JSON, has an integer of thousands of digits, or is nested deeper than Python's
            recursion limit.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def checksum(content: dict[str, Any]) -> str:
    """BLAKE2b hash, 32 hexadecimal digits, of a dictionary written as compact JSON with sorted keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def size(count: int) -> str:
    """A number of bytes as text, in the largest decimal unit of which there is at least one, such as 13.4 MB."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count} bytes"


def place() -> str:
    """An identifier of the running kernel and the process-id namespace of this process. A process id is unique within
    one such place only: containers may share a host name and reuse the same process ids. Without /proc: the host name.
    """
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


@contextlib.contextmanager
def _draft(path: Path, content: str | bytes, *, durable: bool = False) -> Iterator[Path]:
    """Writes the content to a draft file beside `path`, and removes the draft at the end unless it was renamed."""
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with draft.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        yield draft
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()
