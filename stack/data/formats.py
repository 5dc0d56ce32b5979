"""Reads documents from plain text and from records of CSV, JSON and Parquet, also compressed, one at a time."""

import bz2
import csv
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from stack.data.documents import check_text, no_column, one_line, record_text, undecodable
from stack.data.files import Source
from stack.disk import parse_json
from stack.errors import DataError

if TYPE_CHECKING:
    import pyarrow

#: Largest size in bytes of one document, record or `.json` array after decompression, so that a crafted file cannot
#: exhaust the memory.
MAX_BYTES = 4 << 30


def read(source: Source, key: str) -> Iterator[str]:
    """The documents of one file. `key` is `data.text_key`, the column or field that holds the text of a record.

    Raises:
        DataError: the file or a record in it cannot be read as text; the message names the line, row or element.
    """
    try:
        if source.kind == ".parquet":
            yield from _read_parquet(source.path, key)
            return
        with _open(source) as stream:
            yield from _READERS.get(source.kind, _read_plain)(stream, source.path, key)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(
            f"data.paths has {source.path}, which cannot be read ({one_line(error)}); repair it, or leave it out"
        ) from error


def _open(source: Source) -> IO[bytes]:
    if source.codec == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(source.path), compression="zstd"))
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(source.codec, open)
    return opener(source.path, "rb")


def _whole(stream: IO[bytes], path: Path) -> bytes:
    content = stream.read(MAX_BYTES + 1)
    _check_size(content, path)
    return content


def _lines(stream: IO[bytes], path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers from 1."""
    for number in count(1):
        line = stream.readline(MAX_BYTES + 1)
        if not line:
            return
        _check_size(line, f"{path}:{number}")
        yield number, line


def _check_size(content: bytes, where: Path | str) -> None:
    if len(content) > MAX_BYTES:
        raise DataError(f"data.paths has {where}, which is longer than {MAX_BYTES >> 30} GiB; cut it into documents")


def _read_plain(stream: IO[bytes], path: Path, _key: str) -> Iterator[str]:
    try:
        yield _whole(stream, path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise undecodable(path, error) from error


def _read_csv(stream: IO[bytes], path: Path, key: str) -> Iterator[str]:
    def lines() -> Iterator[str]:
        for number, line in _lines(stream, path):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise undecodable(f"{path}:{number}", error) from error

    # Applies to the whole process; the default of the csv module is 128 KiB.
    csv.field_size_limit(MAX_BYTES)
    rows = csv.reader(lines(), strict=True)
    try:
        header = next(rows, [])
        if key not in header:
            raise no_column(key, header, str(path))
        column = header.index(key)
        for row in rows:
            if row and len(row) != len(header):
                fields = f"a row of {len(row)} fields under a header of {len(header)}"
                raise DataError(f"data.paths has {path}:{rows.line_num}, {fields}; put text with commas in quotes")
            if row:
                yield row[column]
    except csv.Error as error:
        raise DataError(f"data.paths has {path}:{rows.line_num}, which is not CSV ({error}); repair it") from error


def _read_jsonl(stream: IO[bytes], path: Path, key: str) -> Iterator[str]:
    # The `json` builder of `datasets` is not used: it infers one schema for all columns of all files, and fails on a
    # corpus whose metadata columns vary, although only the text is needed.
    for number, line in _lines(stream, path):
        if line.strip():
            where = f"{path}:{number}"
            yield _sound(record_text(_parse(line, where, "write one object a line, or use an array"), key, where))


def _read_json(stream: IO[bytes], path: Path, key: str) -> Iterator[str]:
    """A `.json` file is either one array of objects, which is read whole, or has one object a line like `.jsonl`."""
    buffered: Any = stream if hasattr(stream, "peek") else io.BufferedReader(stream)  # type: ignore[type-var]
    if not buffered.peek(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _read_jsonl(buffered, path, key)
        return
    for number, record in enumerate(_parse(_whole(buffered, path), path, "repair it"), 1):
        yield _sound(record_text(record, key, f"{path}, element {number}"))


def _parse(text: bytes, where: Path | str, fix: str) -> Any:
    try:
        return parse_json(text)
    except UnicodeDecodeError as error:
        raise undecodable(where, error) from error
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        place = f"{where}:{line}" if isinstance(where, Path) else where
        reason = getattr(error, "msg", "it is nested too deep, or an integer in it has thousands of digits")
        raise DataError(f"data.paths has {place}, which is not JSON ({reason}); {fix}") from error


def _sound(text: str) -> str:
    # JSON can escape half a surrogate pair, which tokenizers refuse. It becomes U+FFFD here.
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


_READERS: dict[str, Callable[[IO[bytes], Path, str], Iterator[str]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
}


# Parquet


def parquet_rows(path: Path, key: str) -> int:
    """The number of rows of a Parquet file.

    Raises:
        DataError: the file has no column `key`, or is not Parquet.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as table:
            _column(table.schema_arrow, key, path)
            return table.metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _read_parquet(path: Path, key: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as table:
            column, *below = _column(table.schema_arrow, key, path)
            for batch in table.iter_batches(batch_size=1024, columns=[".".join((column, *below))]):
                values = batch.column(column)
                for value in pyarrow.compute.struct_field(values, below) if below else values:
                    row += 1
                    yield check_text(value.as_py(), key, f"{path}, row {row}")
    except UnicodeDecodeError as error:
        raise undecodable(f"{path}, row {row}", error) from error
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _column(schema: "pyarrow.Schema", key: str, path: Path) -> list[str]:
    """The path of the column `key`: one name, or the names of nested struct fields from the outside in.

    Raises:
        DataError: there is no such column.
    """
    import pyarrow

    columns = {name: [name] for name in schema.names}
    texts: list[str] = []

    def enter(fields: Any, above: list[str]) -> None:
        for field in fields:
            names = [*above, field.name]
            columns.setdefault(".".join(names), names)
            if field.type in (pyarrow.string(), pyarrow.large_string()):
                texts.append(".".join(names))
            if pyarrow.types.is_struct(field.type):
                enter(field.type, names)

    enter(schema, [])
    if key not in columns:
        raise no_column(key, texts, str(path))
    return columns[key]


def _damaged(path: Path, error: BaseException) -> DataError:
    return DataError(
        f"data.paths has {path}, which is no Parquet or damaged ({one_line(error)}); write it again, or leave it out"
    )
