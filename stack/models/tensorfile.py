"""Writes safetensors files as a stream, with one tensor in memory at a time, and hashes the bytes while writing."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

#: Bytes that are hashed and written in one go.
_CHUNK = 16 << 20
_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class Entry:
    """Name, dtype and shape of a tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Digest:
    """Size and hash of a file."""

    bytes: int
    xxh3: str
    """XXH3-128 in hexadecimal digits."""


def write(
    path: Path,
    entries: Sequence[Entry],
    tensor: Callable[[Entry], torch.Tensor],
    *,
    metadata: Mapping[str, str],
    progress: Callable[[int], None] = lambda _: None,
) -> Digest:
    """Writes a safetensors file and syncs it to the disk.

    Args:
        path: the file; an existing one is overwritten.
        entries: the tensors, in the order of the file.
        tensor: returns the values of an entry, on any device. Called once for each entry, in order.
        metadata: text entries of the header.
        progress: called with the bytes of tensors written so far.

    Raises:
        OSError: the file cannot be written or synced.
        ValueError: a tensor has another dtype or shape than its entry.
    """
    hasher, done = xxhash.xxh3_128(), 0
    header = _header(entries, metadata)
    with path.open("wb", buffering=0) as file:

        def put(data: memoryview) -> None:
            hasher.update(data)
            _write_all(file, data)

        def put_tensor(data: memoryview) -> None:
            # A function of its own, so that no local variable keeps the tensor alive while the next one is read.
            nonlocal done
            for start in range(0, len(data), _CHUNK):
                put(data[start : start + _CHUNK])
                done += min(_CHUNK, len(data) - start)
                progress(done)

        put(memoryview(header))
        for entry in entries:
            put_tensor(_bytes_of(entry, tensor(entry)))
        os.fsync(file.fileno())
    return Digest(len(header) + done, hasher.hexdigest())


def digest(path: Path) -> Digest:
    """The digest of an existing file; reads all of it. Raises `OSError` where it cannot be read."""
    hasher, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
            size += len(chunk)
    return Digest(size, hasher.hexdigest())


def _header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """The header of a safetensors file: 8 bytes of length (little-endian), then JSON, padded with spaces so that the
    tensors begin at a multiple of 8 bytes."""
    fields: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for entry in entries:
        end = offset + entry.bytes
        fields[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(entry: Entry, tensor: torch.Tensor) -> memoryview:
    if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
        raise ValueError(f"{entry.name} is {tensor.dtype} {list(tensor.shape)}, not {entry.dtype} {list(entry.shape)}")
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


def _write_all(file: object, data: memoryview) -> None:
    """Writes all of `data`; one unbuffered write may write only a part of it."""
    while data:
        data = data[file.write(data) :]  # type: ignore[attr-defined]
