"""What is on the disk to stay, and a checksum by which JSON is known to be what was written."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


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


def checksum(content: dict[str, Any]) -> str:
    """BLAKE2b of JSON in its shortest form with sorted keys, 32 hexadecimal digits."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.blake2b(text, digest_size=16).hexdigest()
