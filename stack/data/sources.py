"""Where the text comes from: a stream of documents, and a description of them that is cheap to recompute.

`describe` runs in every start of a driver or rank (through `manifest.locate`): it only lists and stats files.
`documents` runs in `stack data`: it reads them, one at a time.
"""

import difflib
import glob
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stack.config.schema import Data
from stack.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Documents:
    """The documents of a source in their fixed order; every iteration starts again at the first.

    Documents without a character are left out. Iterating raises `DataError` where a file or a record cannot
    be read as text.
    """

    read: Callable[[], Iterator[str]]
    total: int | None
    """How much there is, in `unit`s; None where it is unknown before reading. A hint, for the progress bar."""
    unit: Literal["bytes", "documents"]

    def __iter__(self) -> Iterator[str]:
        return (text for text in self.read() if text)


def describe(cfg: Data) -> dict[str, Any]:
    """What `cfg` selects, as JSON: two descriptions are equal where the documents are (the source's part of the
    fingerprint). Lists and stats files; reads none and asks no hub.

    Files count by name relative to their common folder, size and modification time, so a corpus that moves as a
    whole stays the same. A hub data set counts by its name, subset and split.

    Raises `DataError` where `cfg` names nothing that exists or nothing that can be read.
    """
    if cfg.source == "python_stdlib":
        root, files = _stdlib_files()
        # Neither the place nor the times: the hosts of one run have the same interpreter in other places.
        listing = _listing(files, root, times=False)
        version = f"{platform.python_implementation()} {platform.python_version()}"
        return {"source": cfg.source, "python": version, **listing}
    if cfg.source == "files":
        files = _matched_files(cfg)
        key = {} if all(_kind(file) == ".txt" for file in files) else {"text_key": cfg.text_key}
        return {"source": cfg.source, **key, **_listing(files, _common_folder(files), times=True)}
    name = _dataset_name(cfg)
    description = {"source": cfg.source, "subset": cfg.subset, "split": cfg.split, "text_key": cfg.text_key}
    if not Path(name).is_dir():
        return {**description, "name": name}
    files = [path for path in _walk(Path(name)) if not path.name.startswith("cache-")]
    return {**description, **_listing(files, Path(name), times=True)}


def documents(cfg: Data) -> Documents:
    """The documents that `cfg` selects.

    Order: `python_stdlib` and folders and globs sorted by path, `data.paths` as given, a data set as it is.
    Raises `DataError` as `describe` does, and where the column, the split or the hub is not there.
    """
    if cfg.source == "python_stdlib":
        _, files = _stdlib_files()
        return Documents(lambda: _stdlib_texts(files), sum(file.stat().st_size for file in files), "bytes")
    if cfg.source == "files":
        return _file_documents(cfg)
    from stack.data.hf import dataset_documents  # `datasets` takes a second to import, and locate() needs none of it

    return dataset_documents(cfg, _dataset_name(cfg))


def no_column(key: str, columns: Collection[str], where: str) -> DataError:
    """The error of a `data.text_key` that is missing; `columns` are those that hold text."""
    names = list(columns)
    nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.0)
    fix = f"use data.text_key={nearest[0]}" if nearest else "use data with a column of text"
    return DataError(f"data.text_key={key} is no column of {where} (columns of text: {_some(names)}); {fix}")


def check_text(value: Any, key: str, where: str) -> str:
    """`value` if it is a str, "" if it is None (not a document), else `DataError`."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"data.text_key={key} holds {type(value).__name__} in {where}, not text; use a column of strings"
        )
    return value


def one_line(error: BaseException) -> str:
    """The message of a library's exception, short enough to stand inside ours."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if not text or isinstance(error, KeyError) else text


def _some(names: list[str]) -> str:
    return ", ".join(names[:8] + ["..."] * (len(names) > 8)) or "none"


# Files of every source


def _walk(root: Path) -> list[Path]:
    """All files below `root`, sorted by path, without what is hidden, installed packages and prepared corpora."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _is_skipped(Path(folder, name))]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())  # a link may lead nowhere


def _is_skipped(folder: Path) -> bool:
    if folder.name.startswith(".") or folder.name in ("__pycache__", "site-packages", "dist-packages"):
        return True
    # data.paths=[data] with data.root=data must not read what it has prepared as text.
    return (folder / "manifest.json").is_file() and (folder / "tokenizer").is_dir()


def _listing(files: list[Path], base: Path, *, times: bool) -> dict[str, Any]:
    digest = hashlib.blake2b(digest_size=16)
    total = 0
    for file in files:
        status = file.stat()
        total += status.st_size
        stamp = status.st_mtime_ns if times else 0
        digest.update(
            f"{file.relative_to(base).as_posix()}\0{status.st_size}\0{stamp}\n".encode(errors="surrogateescape")
        )
    return {"files": len(files), "bytes": total, "listing": digest.hexdigest()}


# python_stdlib


def _stdlib_files() -> tuple[Path, list[Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in _walk(root) if path.suffix == ".py"]
    if not files:
        raise DataError(
            f"data.source=python_stdlib found no *.py under {root} (this Python ships without sources); "
            "use data.source=files data.paths=[FOLDER]"
        )
    return root, files


def _stdlib_texts(files: list[Path]) -> Iterator[str]:
    for file in files:
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            # A few test modules are deliberately in other encodings; they are no loss.
            continue
        except OSError as error:
            raise DataError(
                f"data.source=python_stdlib: {file} cannot be read ({error.strerror}); repair it"
            ) from error
        yield text


# files


def _matched_files(cfg: Data) -> list[Path]:
    if not cfg.paths:
        raise DataError("data.source=files needs data.paths, which is empty; use data.paths=[FOLDER_OR_FILE_OR_GLOB]")
    found = dict.fromkeys(file for item in cfg.paths for file in _expand(item))
    return list(found)


def _kind(file: Path) -> str:
    return file.suffix.lower()


def _expand(item: str) -> list[Path]:
    """The files that one entry of `data.paths` stands for, absolute, at least one."""
    path = Path(item).expanduser().absolute()
    if path.is_file():
        if _kind(path) not in SUFFIXES:
            raise DataError(
                f"data.paths has {item}, which is no text file known here; use one of {', '.join(SUFFIXES)}"
            )
        return [path]
    if path.is_dir():
        matches = _walk(path)
    elif glob.has_magic(item):
        matches = sorted(Path(match).absolute() for match in glob.glob(os.path.expanduser(item), recursive=True))
        matches = [match for match in matches if match.is_file()]
        if not matches:
            raise DataError(f"data.paths has {item}, which matches no file; {_nearest_path(path)}")
    else:
        if path.exists():
            raise DataError(
                f"data.paths has {item}, which is neither a file nor a folder; use a file, or copy it to one"
            )
        raise DataError(f"data.paths has {item}, which does not exist; {_nearest_path(path)}")
    files = [match for match in matches if _kind(match) in SUFFIXES]
    if not files:
        raise DataError(
            f"data.paths has {item}, where none of {len(matches)} files ends in {', '.join(SUFFIXES)}; convert them"
        )
    return files


def _nearest_path(path: Path) -> str:
    """Advice: the most similar name in the deepest folder of `path` that exists."""
    missing = path
    while not missing.parent.is_dir():
        missing = missing.parent
    names = sorted(entry.name for entry in missing.parent.iterdir())
    nearest = difflib.get_close_matches(missing.name, names, n=1)
    if nearest:
        return f"the nearest that exists is {missing.parent / nearest[0]}"
    return f"the folder {missing.parent} holds {_some(names)}"


def _common_folder(files: list[Path]) -> Path:
    return Path(os.path.commonpath([file.parent for file in files]))


def _file_documents(cfg: Data) -> Documents:
    files = _matched_files(cfg)
    tables = [file for file in files if _kind(file) == ".parquet"]
    counts = [_parquet_rows(file, cfg.text_key) for file in tables]

    def read() -> Iterator[str]:
        for file in files:
            try:
                yield from _READERS[_kind(file)](file, cfg.text_key)
            except OSError as error:
                raise DataError(
                    f"data.paths has {file}, which cannot be read ({one_line(error)}); repair it, or leave it out"
                ) from error

    if len(tables) == len(files):
        return Documents(read, sum(counts), "documents")
    return Documents(read, None if tables else sum(file.stat().st_size for file in files), "bytes")


def _undecodable(where: Path | str, error: UnicodeDecodeError) -> DataError:
    return DataError(f"data.paths has {where}, which is not UTF-8 (byte {error.start}); convert it, e.g. with iconv")


def _read_txt(file: Path, _key: str) -> Iterator[str]:
    try:
        yield file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _undecodable(file, error) from error


def _read_jsonl(file: Path, key: str) -> Iterator[str]:
    # Not the `json` builder of `datasets`: it infers one schema for all columns of all files and fails on a corpus
    # whose metadata columns vary, though only the text is wanted.
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                record = json.loads(line)
            except UnicodeDecodeError as error:
                raise _undecodable(where, error) from error
            except json.JSONDecodeError as error:
                raise DataError(
                    f"data.paths has {where}, which is not JSON ({error.msg}); write one object a line, or use an array"
                ) from error
            yield _record_text(record, key, where)


def _read_json(file: Path, key: str) -> Iterator[str]:
    """A `.json` file is one array of objects, read whole, or the same as `.jsonl`."""
    with open(file, "rb") as stream:
        is_array = stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    if not is_array:
        yield from _read_jsonl(file, key)
        return
    try:
        records = json.loads(file.read_bytes())
    except UnicodeDecodeError as error:
        raise _undecodable(file, error) from error
    except json.JSONDecodeError as error:
        raise DataError(f"data.paths has {file}:{error.lineno}, which is not JSON ({error.msg}); repair it") from error
    for number, record in enumerate(records, 1):
        yield _record_text(record, key, f"{file}, element {number}")


def _record_text(record: Any, key: str, where: str) -> str:
    if not isinstance(record, dict):
        raise DataError(
            f"data.paths has {where}, a {type(record).__name__}; each record must be an object with {key!r}"
        )
    if key not in record:
        raise no_column(key, [name for name, value in record.items() if isinstance(value, str)], where)
    text = check_text(record[key], key, where)
    # JSON can escape half a surrogate pair, which no encoder of tokens takes.
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _parquet_rows(file: Path, key: str) -> int:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            columns = {field.name: field.type for field in table.schema_arrow}
            if key not in columns:
                texts = (pyarrow.string(), pyarrow.large_string())
                raise no_column(key, [name for name, kind in columns.items() if kind in texts], str(file))
            return table.metadata.num_rows
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"data.paths has {file}, which is not Parquet ({one_line(error)}); write it again") from error


def _read_parquet(file: Path, key: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024, columns=[key]):
                for value in batch.column(0):
                    yield check_text(value.as_py(), key, str(file))
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"data.paths has {file}, which is damaged ({one_line(error)}); write it again") from error


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


# hf


def _dataset_name(cfg: Data) -> str:
    if not cfg.name:
        raise DataError("data.source=hf needs data.name, which is not set; use data.name=NAME_OR_FOLDER")
    path = Path(cfg.name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise DataError(f"data.name={cfg.name} is a file; use data.source=files data.paths=[{cfg.name}]")
    if path.is_absolute() or cfg.name.startswith((".", "~")) or cfg.name.count("/") > 1:
        raise DataError(f"data.name={cfg.name} does not exist; {_nearest_path(path.absolute())}")
    return cfg.name
