"""A stream of documents, and the errors that all sources share for a record without readable text."""

import difflib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stack.config.values import printable
from stack.errors import DataError


@dataclass(frozen=True)
class Documents:
    """The documents of a source in their fixed order; every iteration starts again at the first.

    Empty documents are left out. Iterating raises `DataError` where a file or a record cannot be read as text.
    """

    read: Callable[[], Iterator[str]]
    total: int | None
    """Size of all documents in `unit`s, for the progress bar; None where it is unknown before reading."""
    unit: Literal["bytes", "documents"]
    unread: str = ""
    """One line for the user: which files of the named folders are not read and why; empty where all are read."""

    def __iter__(self) -> Iterator[str]:
        return (text for text in self.read() if text)


def record_text(record: Any, key: str, where: str) -> str:
    """The text of one record, "" where the field or an object above it is null.

    `key` names a field, or a nested field by its path, such as `data.text`. A field whose name is the whole `key`,
    dots included, takes precedence.

    Raises:
        DataError: the record is no object, has no such field, or the field does not hold text.
    """
    if not isinstance(record, dict):
        raise DataError(
            f"data.paths has {where}, a {type(record).__name__}; each record must be an object with {key!r}"
        )
    if key in record:
        return check_text(record[key], key, where)
    value: Any = record
    for name in key.split("."):
        if value is None:
            return ""
        if not isinstance(value, dict) or name not in value:
            raise no_column(key, text_columns(record), where)
        value = value[name]
    return check_text(value, key, where)


def text_columns(record: dict[str, Any], prefix: str = "") -> list[str]:
    """Names of the record's fields that hold text; a nested field has its path, such as `data.text`."""
    found = []
    for name, value in record.items():
        if isinstance(value, str):
            found.append(prefix + name)
        elif isinstance(value, dict):
            found += text_columns(value, f"{prefix}{name}.")
    return found


def check_text(value: Any, key: str, where: str) -> str:
    """`value` if it is a str, "" if it is None (the record is then left out). Raises `DataError` for other types."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"data.text_key={key} holds {type(value).__name__} in {where}, not text; use a column of strings"
        )
    return value


def no_column(key: str, columns: Collection[str], where: str) -> DataError:
    """The error for a `data.text_key` that names no column; `columns` are the columns that hold text."""
    names = list(columns)
    nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.0)
    fix = f"use data.text_key={printable(nearest[0])}" if nearest else "use data with a column of text"
    return DataError(f"data.text_key={key} is no column of {where} (columns of text: {some(names)}); {fix}")


def undecodable(where: Path | str, error: UnicodeDecodeError) -> DataError:
    """The error for text that is not UTF-8."""
    return DataError(f"data.paths has {where}, which is not UTF-8 (byte {error.start}); convert it, e.g. with iconv")


def one_line(error: BaseException) -> str:
    """The message of a library's exception on one line, at most 300 characters, to quote in our own message."""
    text = printable(" ".join(str(error).split())[:300])
    return f"{type(error).__name__}: {text}" if not text or isinstance(error, KeyError) else text


def some(names: list[str]) -> str:
    """The first eight names of a list, for a message; "none" if the list is empty."""
    return ", ".join([printable(name) for name in names[:8]] + ["..."] * (len(names) > 8)) or "none"
