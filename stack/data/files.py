"""Selects the files that `data.paths` names, finds the format of each, and counts the files that are not read."""

import difflib
import glob
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stack.config.schema import Data
from stack.config.values import printable
from stack.data.documents import one_line, some
from stack.errors import DataError

#: Endings of files that are one document each.
PLAIN = (".txt", ".md", ".rst", ".py", ".tex", ".html")
#: Endings of files of records; the text of each record is in the column `data.text_key`.
KEYED = (".csv", ".jsonl", ".json", ".parquet")
#: Endings of compressed files; the ending before this one names the format inside, as in `.jsonl.gz`.
CODECS = (".gz", ".zst", ".bz2", ".xz")

_KNOWN = f"{', '.join(PLAIN + KEYED)}, each also with {', '.join(CODECS)}"


@dataclass(frozen=True)
class Source:
    """A file to read."""

    path: Path
    kind: str
    """One of `PLAIN` or `KEYED`; `.txt` for an ending of `data.extensions`."""
    codec: str
    """One of `CODECS`, or empty."""


@dataclass
class Selection:
    """The result of `select`."""

    files: list[Source] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    """Reason -> number of files and folders that are left out for it."""

    def note(self) -> str:
        """One line about `unread`; empty where everything is read."""
        if not self.unread:
            return ""
        count = self.unread.total()
        reasons = ", ".join(f"{number} {printable(reason)}" for reason, number in self.unread.most_common())
        ending = any(reason.startswith((".", "without")) for reason in self.unread)
        return f"{count} {'file or folder is' if count == 1 else 'files or folders are'} not read: {reasons}" + (
            " (data.extensions=[.EXT] reads plain text of another ending)" if ending else ""
        )


def select(cfg: Data) -> Selection:
    """The files that `data.paths` and `data.extensions` select. Lists and stats files, but opens none.

    Raises:
        DataError: an entry of `data.paths` does not exist, or leads to no file of a known format.
    """
    if not cfg.paths:
        raise DataError("data.source=files needs data.paths, which is empty; use data.paths=[FOLDER_OR_FILE_OR_GLOB]")
    extensions = [extension.lower() for extension in cfg.extensions]
    selection = Selection()
    seen: dict[tuple[int, int], Path] = {}
    try:
        for item in cfg.paths:
            here = {path: _source(path, extensions) for path in _expand(item, selection.unread)}
            if not any(here.values()):
                _refuse(item, list(here))
            for path, source in here.items():
                # A path that two entries of data.paths name is read once and not reported.
                identity = _identity(path)
                if seen.get(identity, path) != path:
                    selection.unread["read under another name"] += 1
                elif source is None:
                    selection.unread[_ending(path)] += identity not in seen
                elif identity not in seen:
                    selection.files.append(source)
                seen.setdefault(identity, path)
    except OSError as error:
        raise DataError(
            f"data.paths cannot be listed ({one_line(error)}); make it readable, or leave it out"
        ) from error
    return selection


def walk(root: Path, unread: Counter[str]) -> list[Path]:
    """All regular files below `root`, sorted by path, except hidden ones, installed packages and prepared corpora.

    Links are followed. A folder that has several names is read under the first of them, so a circle of links ends.
    `unread` counts what is left out, by reason.

    Raises:
        OSError: a folder cannot be listed.
    """
    found: list[Path] = []
    seen = {_identity(root)}
    folders = [root]
    while folders:
        below = []
        for entry in sorted(os.scandir(folders.pop()), key=lambda entry: entry.name):
            path = Path(entry.path)
            if reason := _left_out(entry, path):
                unread[reason] += 1
            elif not entry.is_dir():
                found.append(path)
            elif _identity(path) in seen:
                unread["read under another name"] += 1
            else:
                seen.add(_identity(path))
                below.append(path)
        folders += reversed(below)
    return sorted(found)


def listing(files: Sequence[Path], base: Path, *, times: bool) -> dict[str, Any]:
    """Number of files, their bytes, and a hash over their names below `base`, sizes and, with `times`, modification
    times, as JSON.

    Raises:
        DataError: a file was removed meanwhile.
    """
    digest = hashlib.blake2b(digest_size=16)
    total = 0
    for file in files:
        try:
            status = file.stat()
        except OSError as error:
            raise DataError(
                f"data: {file} was removed while the files were listed ({error.strerror}); start again when the folder "
                "no longer changes"
            ) from error
        total += status.st_size
        stamp = status.st_mtime_ns if times else 0
        digest.update(
            f"{file.relative_to(base).as_posix()}\0{status.st_size}\0{stamp}\n".encode(errors="surrogateescape")
        )
    return {"files": len(files), "bytes": total, "listing": digest.hexdigest()}


def common_folder(files: Sequence[Path]) -> Path:
    """The deepest folder that holds all of the files."""
    return Path(os.path.commonpath([file.parent for file in files]))


def nearest_path(path: Path) -> str:
    """Advice for a message about a missing `path`: the most similar name in the deepest folder of it that exists."""
    missing = path
    while not missing.parent.is_dir():
        missing = missing.parent
    names = sorted(entry.name for entry in missing.parent.iterdir())
    nearest = difflib.get_close_matches(missing.name, names, n=1)
    if nearest:
        return f"the nearest that exists is {missing.parent / nearest[0]}"
    return f"the folder {missing.parent} holds {some(names)}"


def _source(path: Path, extensions: Sequence[str]) -> Source | None:
    """The file's format by its name; None for an unknown ending."""
    name = path.name.lower()
    codec = next((codec for codec in CODECS if name.endswith(codec)), "")
    inside = name.removesuffix(codec)
    if any(inside.endswith(extension) for extension in extensions):
        return Source(path, ".txt", codec)
    kind = Path(inside).suffix
    # A compressed Parquet file cannot be read as a stream: its index is at the end. Parquet compresses its columns.
    readable = kind in PLAIN + KEYED and not (codec and kind == ".parquet")
    return Source(path, kind, codec) if readable else None


def _ending(path: Path) -> str:
    name = Path(path.name.lower())
    return ("".join(name.suffixes[-2:]) if name.suffix in CODECS else name.suffix) or "without an ending"


def _expand(item: str, unread: Counter[str]) -> list[Path]:
    """The files of one entry of `data.paths`, as absolute paths; the files of a folder are sorted by path."""
    path = Path(item).expanduser().absolute()
    if path.is_file():
        return [path]
    if path.is_dir():
        return walk(path, unread)
    if not glob.has_magic(item):
        if path.exists():
            raise DataError(
                f"data.paths has {item}, which is neither a file nor a folder; use a file, or copy it to one"
            )
        raise DataError(f"data.paths has {item}, which does not exist; {nearest_path(path)}")
    found: list[Path] = []
    for match in _matches(path):
        if match.is_file():
            found.append(match)
        elif match.is_dir():
            # `**` already matches the files in each folder that it matches.
            found += walk(match, unread) if "**" not in item else []
        else:
            unread[_odd(match)] += 1
    if not found:
        raise DataError(f"data.paths has {item}, which matches no file; {nearest_path(path)}")
    return found


def _matches(pattern: Path) -> list[Path]:
    """The paths that a glob matches, sorted. `**` follows no links, since they may form a circle."""
    if "**" not in pattern.parts:
        return sorted(Path(match) for match in glob.glob(str(pattern)))
    fixed = Path(*pattern.parts[: next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))])
    found = fixed.glob(str(pattern.relative_to(fixed)))
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(fixed).parts))


def _refuse(item: str, found: list[Path]) -> None:
    """Raises `DataError` for an entry of `data.paths` whose files, `found`, all have unknown endings."""
    if len(found) == 1 and Path(item).expanduser().absolute() == found[0]:
        ending = _ending(found[0])
        read = f"if it is plain text, use data.extensions=[{ending}]; " if ending.startswith(".") else ""
        raise DataError(f"data.paths has {item}, which is no text file known here; {read}known are {_KNOWN}")
    raise DataError(
        f"data.paths has {item}, where none of {len(found)} files ends in {_KNOWN}; "
        "convert them, or name the ending of plain text in data.extensions=[.EXT]"
    )


def _left_out(entry: os.DirEntry, path: Path) -> str:
    """Why an entry of a folder is left out; empty for a file to read and for a folder to enter."""
    if entry.name.startswith("."):
        return "hidden"
    try:
        is_folder = entry.is_dir()
    except OSError:
        return "dangling"
    if is_folder:
        if entry.name in ("__pycache__", "site-packages", "dist-packages"):
            return f"named {entry.name}"
        # With data.paths=[data] and data.root=data the files of a prepared corpus must not be read as text.
        prepared = (path / "manifest.json").is_file() and (path / "tokenizer").is_dir()
        return "prepared by stack data" if prepared else ""
    return "" if entry.is_file() else _odd(path)


def _odd(path: Path) -> str:
    """The kind of a path that is neither a file nor a folder: FIFO, socket, device, or dangling (a broken link)."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return "dangling"
    kinds = ((stat.S_ISFIFO, "FIFO"), (stat.S_ISSOCK, "socket"))
    return next((kind for is_kind, kind in kinds if is_kind(mode)), "device")


def _identity(folder: Path) -> tuple[int, int]:
    """Device and inode: equal for all names of one file or folder."""
    status = folder.stat()
    return status.st_dev, status.st_ino
