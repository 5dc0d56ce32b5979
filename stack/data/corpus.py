"""A prepared corpus, opened for reading. Whatever happens to its files meanwhile is a `DataError`, never a signal."""

import os
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from stack.data import manifest
from stack.errors import DataError

#: Shards open at a time; each holds a file descriptor, and 1024 of those is a common limit.
_OPEN_SHARDS = 256


class Corpus:
    """A prepared corpus (see `stack.data.manifest` for its files)."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = about
        self.vocab_size: int = about["vocab_size"]
        """Token ids that a model of the corpus needs: more than every one that occurs, and than every one of the
        tokenizer's vocabulary apart from tokens that were added to it and do not occur."""
        self.eos_id: int = about["eos_id"]

    @classmethod
    def open(cls, folder: Path) -> "Corpus":
        """Opens what `prepare` or `locate` returned. Raises `DataError` where it is not whole."""
        return cls(folder, manifest.read(folder))

    def split(self, name: str) -> "Split":
        """`train` or `heldout`."""
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
            # Kept open: its size is asked of this file, whatever has taken its name since.
            self._index: IO[bytes] = open(index, "rb")  # noqa: SIM115
            self._starts = np.asarray(np.load(index, mmap_mode="r"))
        except (OSError, ValueError) as error:
            raise self._lost(index, str(error)) from error
        self._index_bytes = os.fstat(self._index.fileno()).st_size

    @property
    def starts(self) -> np.ndarray:
        """int64 [num_documents + 1]: document i is the tokens from starts[i] to starts[i + 1]. Memory-mapped: not to be
        kept. Raises `DataError` where the file was cut, since a process that reads a map of it would be killed."""
        if os.fstat(self._index.fileno()).st_size != self._index_bytes:
            raise self._lost(self._folder / "documents.npy", "it was cut while it was read")
        return self._starts

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream, 0 <= start <= stop <= num_tokens: a copy, int64 [stop - start].

        Raises:
            DataError: a shard is gone, was cut, cannot be read, or holds ids that no token of the corpus has.
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
            # A map would be as fast, but to read one whose file was cut ends the process with SIGBUS.
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
