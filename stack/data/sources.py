"""Where the text comes from: a stream of documents, and a description of them that is cheap to recompute.

`describe` runs in every start of a driver or rank (through `manifest.locate`): it only lists and stats files.
`documents` runs in `stack data`: it reads them, one at a time.
"""

import platform
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stack.config.schema import Data
from stack.data import files
from stack.data.documents import Documents
from stack.data.files import PLAIN
from stack.errors import DataError


def describe(cfg: Data) -> dict[str, Any]:
    """What `cfg` selects, as JSON: two descriptions are equal where the documents are (the source's part of the
    fingerprint). Lists and stats files; reads none and asks no hub.

    Files count by name relative to their common folder, size and modification time, so a corpus that moves as a
    whole stays the same. A hub data set counts by its name, subset and split.

    Raises `DataError` where `cfg` names nothing that exists or nothing that can be read.
    """
    if cfg.source == "python_stdlib":
        root, paths = _stdlib_files()
        # Neither the place nor the times: the hosts of one run have the same interpreter in other places.
        listing = files.listing(paths, root, times=False)
        version = f"{platform.python_implementation()} {platform.python_version()}"
        return {"source": cfg.source, "python": version, **listing}
    if cfg.source == "files":
        selected = files.select(cfg).files
        # What each file is follows from its name, and from these two.
        key = {} if all(file.kind in PLAIN for file in selected) else {"text_key": cfg.text_key}
        plain = {"extensions": sorted(cfg.extensions)} if cfg.extensions else {}
        paths = [file.path for file in selected]
        return {"source": cfg.source, **key, **plain, **files.listing(paths, files.common_folder(paths), times=True)}
    name = _dataset_name(cfg)
    description = {"source": cfg.source, "subset": cfg.subset, "split": cfg.split, "text_key": cfg.text_key}
    if not Path(name).is_dir():
        return {**description, "name": name}
    paths = [path for path in _walk(Path(name), f"data.name={name}") if not path.name.startswith("cache-")]
    return {**description, **files.listing(paths, Path(name), times=True)}


def documents(cfg: Data) -> Documents:
    """The documents that `cfg` selects.

    Order: `python_stdlib` and folders and globs sorted by path, `data.paths` as given, a data set as it is.
    Raises `DataError` as `describe` does, and where the column, the split or the hub is not there.
    """
    if cfg.source == "python_stdlib":
        _, paths = _stdlib_files()
        return Documents(lambda: _stdlib_texts(paths), sum(path.stat().st_size for path in paths), "bytes")
    if cfg.source == "files":
        return _file_documents(cfg)
    from stack.data.hf import dataset_documents  # `datasets` takes a second to import, and locate() needs none of it

    return dataset_documents(cfg, _dataset_name(cfg))


def _walk(root: Path, setting: str) -> list[Path]:
    try:
        return files.walk(root, Counter())
    except OSError as error:
        raise DataError(f"{setting}: {error.filename} cannot be listed ({error.strerror}); make it readable") from error


# python_stdlib


def _stdlib_files() -> tuple[Path, list[Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in _walk(root, "data.source=python_stdlib") if path.suffix == ".py"]
    if not paths:
        raise DataError(
            f"data.source=python_stdlib found no *.py under {root} (this Python ships without sources); "
            "use data.source=files data.paths=[FOLDER]"
        )
    return root, paths


def _stdlib_texts(paths: list[Path]) -> Iterator[str]:
    for file in paths:
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


def _file_documents(cfg: Data) -> Documents:
    from stack.data import formats

    selection = files.select(cfg)
    tables = [file for file in selection.files if file.kind == ".parquet"]
    rows = sum(formats.parquet_rows(file.path, cfg.text_key) for file in tables)

    def read() -> Iterator[str]:
        for file in selection.files:
            yield from formats.read(file, cfg.text_key)

    note = selection.note()
    if len(tables) == len(selection.files):
        return Documents(read, rows, "documents", note)
    # Neither rows nor compressed files say beforehand how many bytes of text they are.
    countable = not tables and not any(file.codec for file in selection.files)
    return Documents(
        read, sum(file.path.stat().st_size for file in selection.files) if countable else None, "bytes", note
    )


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
        raise DataError(f"data.name={cfg.name} does not exist; {files.nearest_path(path.absolute())}")
    return cfg.name
