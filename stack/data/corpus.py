"""Reads a prepared corpus. A file that is damaged or removed during the run raises `DataError`.

Shards are read with `pread`, not through a memory map: reading a map of a file that was cut kills the process (SIGBUS).
"""

import os
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from stack.data import manifest
from stack.errors import DataError

#: Largest number of open shards; each needs a file descriptor, and a process may often have only 1024.
_OPEN_SHARDS = 256


class Corpus:
    """A prepared corpus (see `stack.data.manifest` for its files)."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = about
        self.vocab_size: int = about["vocab_size"]
        """Rows that a model's embedding needs: one more than the largest token id among those that occur and those of
        the tokenizer's vocabulary. A token added to the vocabulary counts only where it occurs."""
        self.eos_id: int = about["eos_id"]

    @classmethod
    def open(cls, folder: Path) -> "Corpus":
        """Opens the folder that `prepare` or `locate` returned. Raises `DataError` where the corpus is not whole."""
        return cls(folder, manifest.read(folder))

    def split(self, name: str) -> "Split":
        """The split `train` or `heldout`. Raises `ValueError` for any other name."""
        if name not in manifest.SPLITS:
            raise ValueError(f"no split {name!r}; the splits are {' and '.join(manifest.SPLITS)}")
        return Split(self.folder, name, self.manifest)


class Split:
    """The documents of one split as one stream of tokens. Made by `Corpus.split`."""

    def __init__(self, folder: Path, name: str, about: dict[str, Any]) -> None:
        """Raises `DataError` where the split cannot be read."""
        self.name = name
        self.eos_id: int = about["eos_id"]
        self.num_tokens: int = about["splits"][name]["tokens"]
        self.num_documents: int = about["splits"][name]["documents"]
        self._folder, self._vocab_size = folder / name, about["vocab_size"]
        self._dtype = np.dtype(about["dtype"])
        self._shard_tokens: int = about["shard_tokens"]
        self._shard = lru_cache(maxsize=_OPEN_SHARDS)(self._open_shard)
        index = self._folder / "documents.npy"
        try:
            # Kept open, so that `starts` can check the size of the mapped file even if its name now leads to another.
            self._index: IO[bytes] = open(index, "rb")  # noqa: SIM115
            self._starts = np.asarray(np.load(index, mmap_mode="r"))
        except (OSError, ValueError) as error:
            raise self._lost(index, str(error)) from error
        self._index_bytes = os.fstat(self._index.fileno()).st_size

    @property
    def starts(self) -> np.ndarray:
        """int64 [num_documents + 1]: document i is the tokens from starts[i] to starts[i + 1].

        The array is a memory map: get it anew for each use, since only this property checks the file's size.

        Raises:
            DataError: the file was cut. Reading the map of a cut file would kill the process.
        """
        if os.fstat(self._index.fileno()).st_size != self._index_bytes:
            raise self._lost(self._folder / "documents.npy", "it was cut while it was read")
        return self._starts

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream, 0 <= start <= stop <= num_tokens: a copy, int64 [stop - start].

        Raises:
            IndexError: the bounds are outside of the stream.
            DataError: a shard is missing, was cut, cannot be read, or holds ids that no token of the corpus has.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of a {self.name} split of {self.num_tokens}")
        out = np.empty(stop - start, dtype=np.int64)
        done = 0
        while done < len(out):
            shard, offset = divmod(start + done, self._shard_tokens)
            part = self._read_shard(shard, offset, min(len(out) - done, self._shard_tokens - offset))
            out[done : done + len(part)] = part
            done += len(part)
        return out

    def document(self, number: int) -> np.ndarray:
        """Document `number` of the split with its end-of-document token: int64 [tokens]."""
        starts = self.starts
        return self.read(int(starts[number]), int(starts[number + 1]))

    def _read_shard(self, shard: int, offset: int, count: int) -> np.ndarray:
        path, size = self._path(shard), self._dtype.itemsize
        try:
            # No memory map: reading the map of a cut file ends the process with SIGBUS. `pread` is as fast.
            content = os.pread(self._shard(shard).fileno(), count * size, offset * size)
        except OSError as error:
            raise self._lost(path, error.strerror or str(error)) from error
        if len(content) != count * size:
            raise self._lost(path, "it was cut while it was read")
        tokens = np.frombuffer(content, dtype=self._dtype)
        if (largest := int(tokens.max())) >= self._vocab_size:
            raise self._lost(path, f"it holds token id {largest}, and the corpus has {self._vocab_size}")
        return tokens

    def _open_shard(self, number: int) -> IO[bytes]:
        return open(self._path(number), "rb", buffering=0)

    def _path(self, shard: int) -> Path:
        return self._folder / f"tokens-{shard:05d}.bin"

    def _lost(self, path: Path, why: str) -> DataError:
        return DataError(f"{path} is damaged ({why}); remove {self._folder.parent} and {manifest.AGAIN}")
