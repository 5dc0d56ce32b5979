"""Files that other processes read or that must survive a crash, and JSON that may have been damaged or crafted."""

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

#: File of `reserve`, in the folder that it holds room for, and its size in bytes.
_RESERVED = ".reserved"
_RESERVED_BYTES = 16 << 10


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


def write_whole(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Writes a file at once: a reader finds the old content or the new one, never a part, and so does a crash.

    The content goes to a draft beside `path`, which is then renamed. The draft's name is random, because two processes
    on different hosts of a shared disk may have the same process id.

    Args:
        durable: return only when content and name are on the disk.

    Raises:
        OSError: the disk did not take it; `path` is as it was, and no draft is left.
    """
    with _draft(path, content, durable=durable) as draft:
        draft.replace(path)
    if durable:
        sync(path.parent)


def write_new(path: Path, content: str | bytes) -> bool:
    """As `write_whole`, unless there is such a file already; returns whether there was none. Of several processes that
    call it for one path, one gets True.

    Raises:
        OSError: the disk did not take it.
    """
    with _draft(path, content) as draft:
        return link_new(draft, path)


def link_new(source: Path, target: Path) -> bool:
    """Gives the content of `source` the name `target` too, at once; returns False where something has that name.

    Raises:
        OSError: the disk did not take it.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        # A file server's answer may get lost, and the call be made a second time.
        return source.stat().st_nlink > 1
    except OSError:
        # Not every file system has links. There a reader may see a part of the content for a moment.
        try:
            with target.open("xb") as file:
                file.write(source.read_bytes())
        except FileExistsError:
            return False
    return True


def reserve(folder: Path) -> None:
    """Takes room on the folder's disk, if there is any, for one small file that `write_reserved` writes when the disk
    may be full."""
    try:
        (folder / _RESERVED).write_bytes(b" " * _RESERVED_BYTES)
    except OSError:
        release(folder)


def write_reserved(path: Path, content: str) -> None:
    """As `write_whole`, into the room that `reserve` took in the same folder, if it did: that needs no free space on
    a disk that overwrites in place. The room is then used up.

    Raises:
        OSError: the disk did not take it.
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
    """Gives the room back that `reserve` took, if it did."""
    with contextlib.suppress(OSError):
        (folder / _RESERVED).unlink()


def open_regular(path: Path) -> BinaryIO:
    """A regular file, to read. A pipe or a device of that name would block its reader, perhaps for ever.

    Raises:
        OSError: there is none, it is no regular file, or it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(os.dup(descriptor), "rb")
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    finally:
        os.close(descriptor)


def read_regular(path: Path) -> bytes:
    """Content of `open_regular`.

    Raises:
        OSError: as `open_regular`, or it cannot be read.
    """
    with open_regular(path) as file:
        return file.read()


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


def size(count: int) -> str:
    """A number of bytes for the user, in the largest decimal unit that leaves a whole number: 13.4 MB."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count} bytes"


def place() -> str:
    """The kernel and the table of processes in which this process's id means something. Containers may share a host's
    name, and process ids of theirs be equal."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


@contextlib.contextmanager
def _draft(path: Path, content: str | bytes, *, durable: bool = False) -> Iterator[Path]:
    """A file with the content beside `path`, gone at the end if it was not renamed."""
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
