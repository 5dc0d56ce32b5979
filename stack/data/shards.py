"""`stack data`: writes documents into token shards. It may be killed, and several processes may run it at once."""

import errno
import hashlib
import secrets
import shutil
import time
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from stack import __version__
from stack.config.schema import Data
from stack.data import manifest, sources, tokenizer
from stack.data.encoder import Encoder
from stack.data.manifest import locate
from stack.data.progress import LINE_INTERVAL_S, Meter, say
from stack.disk import lock, sync, sync_tree
from stack.errors import DataError

__all__ = ["locate", "prepare", "verify"]

SHARD_BYTES = 256 << 20
#: A document with more characters is encoded in pieces of this size, if the tokenizer allows it: encoding takes about
#: 100 bytes of memory for each token.
PIECE_CHARS = 1 << 20
#: Characters encoded in one call; enough that all threads of the tokenizer have work.
BATCH_CHARS = 2 << 20


def prepare(cfg: Data, *, seed: int, progress: bool = True) -> Path:
    """Makes the corpus that `cfg` asks for, if it does not exist yet, and returns its folder.

    `seed` (>= 0) chooses the held-out documents. A corpus appears under its name only when it is whole; a damaged
    corpus is made again. The process may be killed at any time. Of several processes that prepare the same corpus, one
    works and the others wait. Memory is bounded by the longest document (and about 100 bytes for each of its tokens,
    where it cannot be cut into pieces), a batch of text, the sample for the BPE and 8 bytes for each document.

    Raises `DataError` where the source, the tokenizer or the folder cannot be used, or there are fewer than two
    documents.
    """
    recipe = manifest.made_from(cfg, seed=seed)
    target = manifest.folder_of(cfg, recipe)
    if _is_whole(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target) as alone:
            if not _is_whole(target):
                if alone:
                    _remove_stale(target)
                _make(cfg, recipe, target, progress=progress)
    except OSError as error:
        raise DataError(
            f"data.root={cfg.root} cannot be written ({error.strerror or error}: {error.filename or target}); "
            "free space there, or set data.root to a folder that you may write to"
        ) from error
    return target


def verify(cfg: Data, *, seed: int) -> Path:
    """The folder of the corpus that `cfg` asks for, after comparing every file with its hash in the manifest.

    Raises `DataError` where the corpus is not prepared, or a file has changed; the message names the first such file.
    """
    folder = locate(cfg, seed=seed)
    last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_INTERVAL_S:
            last = time.monotonic()
            say(f"{done / 1e9:,.1f} of {total / 1e9:,.1f} GB compared")

    files = manifest.verify(folder, progress)["files"]
    say(f"{len(files)} files, {sum(file['bytes'] for file in files) / 1e6:,.1f} MB: all are as they were written")
    return folder


def _is_whole(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    try:
        manifest.read(folder)
    except DataError:
        return False
    return True


# One at a time


@contextmanager
def _lock(target: Path) -> Iterator[bool]:
    """Holds the lock of `target` inside a `with` block, and yields whether the file system has locks. Without locks
    several processes may work at once, each in a temporary folder, and the first to finish renames its folder."""
    with open(_lock_path(target), "a") as stream:
        state = lock(stream, wait=False)
        if state == "busy":
            say(f"another process prepares {target}; waiting for it")
            state = lock(stream, wait=True)
        yield state == "held"


def _lock_path(target: Path) -> Path:
    # The lock file is never removed: a process that waits for the lock of a removed file would get a lock that no other
    # process sees.
    return target.with_name(f".{target.name}.lock")


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}")


def _remove_stale(target: Path) -> None:
    """Removes temporary folders of processes that died: those of `target`, whose lock this process holds, and those of
    other corpora whose lock is free."""
    for folder in target.parent.glob(".*.tmp-*"):
        owner = target.with_name(folder.name[1:].rsplit(".tmp-", 1)[0])
        if owner == target:
            shutil.rmtree(folder, ignore_errors=True)
            continue
        try:
            with open(_lock_path(owner), "a") as stream:
                if lock(stream, wait=False) == "held":
                    shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # the lock file belongs to another user


def _make(cfg: Data, recipe: dict[str, Any], target: Path, *, progress: bool) -> None:
    """Writes the corpus into a temporary folder beside `target` and renames it when it is whole."""
    folder = _temporary(target)
    folder.mkdir()
    try:
        _write(cfg, recipe, folder, progress=progress)
        if manifest.made_from(cfg, seed=recipe["seed"]) != recipe:
            raise DataError(
                f"data.source={cfg.source} changed while it was read; wait until it no longer changes, then "
                f"{manifest.AGAIN}"
            )
        sync_tree(folder)
        _publish(folder, target)
        sync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, target: Path) -> None:
    """Renames a whole corpus to `target`, unless a whole one is there already: on a file system without locks another
    process may have finished first. A damaged folder `target` is removed before."""
    while not _is_whole(target):
        if target.exists():
            damaged = _temporary(target)
            target.rename(damaged)
            shutil.rmtree(damaged)
        try:
            folder.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


# Documents to shards


def _write(cfg: Data, recipe: dict[str, Any], folder: Path, *, progress: bool) -> None:
    texts = sources.documents(cfg)
    count = len(list(islice(texts, 2)))
    if count < 2:
        raise DataError(
            f"data.source={cfg.source} has {count} documents with text, and one must be held out; use 2 or more "
            "(a .txt file is one document, each record of a .jsonl file is one)"
        )
    if progress and cfg.tokenizer == "bpe":
        say(f"learning a byte-level BPE of {cfg.vocab_size} entries")
    tokens = tokenizer.load_or_train(cfg, texts, folder / manifest.TOKENIZER)
    dtype = np.dtype("<u2" if tokens.vocab_size <= 1 << 16 else "<u4")
    writers = {name: _SplitWriter(folder / name, dtype) for name in manifest.SPLITS}
    choose = _Chooser(cfg.heldout_fraction, recipe["seed"])
    try:
        with Meter(texts.total, texts.unit, show=progress) as meter:
            _encode(texts, tokens, writers, choose, meter)
    finally:
        for writer in writers.values():
            writer.close()
    if not all(writer.num_documents for writer in writers.values()):
        raise DataError(f"data.tokenizer={cfg.tokenizer} leaves fewer than 2 documents with a token; add documents")
    largest = max(writer.largest_id for writer in writers.values())
    manifest.write(
        folder,
        {
            "format": manifest.FORMAT,
            "fingerprint": manifest.fingerprint(recipe),
            "made_from": recipe,
            "made_by": f"stack {__version__}",
            "vocab_size": max(tokens.ordinary_size, largest + 1),
            "eos_id": tokens.eos_id,
            "begin_ids": tokens.begin,
            "dtype": dtype.str,
            "shard_tokens": SHARD_BYTES // dtype.itemsize,
            "splits": {
                name: {"documents": writer.num_documents, "tokens": writer.num_tokens}
                for name, writer in writers.items()
            },
            "files": _describe_files(folder),
        },
    )
    if progress:
        begins = tokens.hf.convert_ids_to_tokens(list(tokens.begin))
        says = f"every document begins with {' '.join(begins)}, which the tokenizer adds by itself" if begins else ""
        for line in filter(None, (texts.unread, says, tokens.note())):
            say(line)


def _describe_files(folder: Path) -> list[dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        {
            "path": path.relative_to(folder).as_posix(),
            "bytes": path.stat().st_size,
            "blake2b": manifest.hash_file(path),
        }
        for path in files
    ]


def _encode(
    texts: Iterable[str],
    tokens: Encoder,
    writers: dict[str, "_SplitWriter"],
    choose: "_Chooser",
    meter: Meter,
) -> None:
    dtype = writers["train"].dtype
    begin, end = np.array(tokens.begin, dtype=dtype), np.array([tokens.eos_id], dtype=dtype)
    writer: _SplitWriter | None = None  # the split of the unfinished document; None until its first token
    number = 0
    for batch in _batches(texts, tokens):
        written = ended = 0
        for (_, last), ids in zip(batch, tokens.encode([piece for piece, _ in batch]), strict=True):
            if ids:
                piece = np.array(ids, dtype=dtype)
                # A text that already begins with these tokens, such as a templated chat, gets no second copy.
                if writer is None and not np.array_equal(piece[: len(begin)], begin):
                    piece = np.concatenate([begin, piece])
                writer = writer or writers[choose(number)]
                writer.add(piece)
                written += len(piece)
            if last and writer:
                writer.add(end)
                writer.end_document()
                written, ended, number, writer = written + 1, ended + 1, number + 1, None
        meter.advance(documents=ended, bytes=sum(_utf8_length(piece) for piece, _ in batch), tokens=written)


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _batches(texts: Iterable[str], tokens: Encoder) -> Iterator[list[tuple[str, bool]]]:
    """Lists of (piece of a document, whether it is the document's last), each of about `BATCH_CHARS` characters."""
    batch: list[tuple[str, bool]] = []
    chars = 0
    for text in texts:
        tokens.count_spelled(text)
        left = len(text)
        for piece in tokens.pieces(text, PIECE_CHARS):
            left -= len(piece)
            batch.append((piece, not left))
            chars += len(piece)
            if chars >= BATCH_CHARS:
                yield batch
                batch, chars = [], 0
    if batch:
        yield batch


class _Chooser:
    """Chooses the split of a document by its number and the seed alone, independently of the order of work."""

    def __init__(self, heldout_fraction: float, seed: int) -> None:
        self._seed = seed
        self._threshold = int(heldout_fraction * 2**64)
        # Each split gets one of the first two documents, so that neither split is empty in a small corpus.
        self._first_heldout = min((0, 1), key=self._hash)

    def _hash(self, number: int) -> int:
        digest = hashlib.blake2b(f"{self._seed} {number}".encode(), digest_size=8, person=b"stack held out")
        return int.from_bytes(digest.digest(), "little")

    def __call__(self, number: int) -> str:
        heldout = number == self._first_heldout if number < 2 else self._hash(number) < self._threshold
        return "heldout" if heldout else "train"


class _SplitWriter:
    """Writes the token stream of one split into shards, and the index of its documents."""

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        folder.mkdir()
        self.folder, self.dtype = folder, dtype
        self.num_tokens = 0
        self.largest_id = -1
        self._shard_tokens = SHARD_BYTES // dtype.itemsize
        self._starts = array("q", [0])
        self._shard: IO[bytes] | None = None

    @property
    def num_documents(self) -> int:
        return len(self._starts) - 1

    def add(self, ids: np.ndarray) -> None:
        """Appends tokens, an array [tokens] of at least one."""
        self.largest_id = max(self.largest_id, int(ids.max()))
        while len(ids):
            room = self._shard_tokens - self.num_tokens % self._shard_tokens
            if room == self._shard_tokens:
                self._open_shard()
            assert self._shard is not None
            self._shard.write(ids[:room].tobytes())
            self.num_tokens += min(room, len(ids))
            ids = ids[room:]

    def end_document(self) -> None:
        self._starts.append(self.num_tokens)

    def close(self) -> None:
        """Writes the index and closes the files. May be called after a failed write."""
        if self._shard:
            self._shard.close()
        np.save(self.folder / "documents.npy", np.frombuffer(self._starts, dtype="<i8"))

    def _open_shard(self) -> None:
        if self._shard:
            self._shard.close()
        self._shard = open(self.folder / f"tokens-{self.num_tokens // self._shard_tokens:05d}.bin", "wb")  # noqa: SIM115
