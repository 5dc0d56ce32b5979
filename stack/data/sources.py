"""The sources of text: Python's standard library, files, and Hugging Face data sets.

`describe` runs in every start of a driver or rank (through `manifest.locate`), so it only lists and stats files.
`documents` runs in `stack data` and reads the documents, one at a time.
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
    """A description of the documents that `cfg` selects, as JSON: the source's part of the corpus fingerprint.

    Two equal descriptions stand for the same documents. Files are described by their name relative to their common
    folder, size and modification time, so moving all of them together changes nothing. A hub data set is described by
    its name, subset and split. Lists and stats files, opens none, and does not ask the hub.

    Raises `DataError` where `cfg` selects nothing that exists, or nothing that can be read.
    """
    if cfg.source == "python_stdlib":
        root, paths = _stdlib_files()
        # Paths and times are left out: hosts of one run may have the same interpreter in different places.
        listing = files.listing(paths, root, times=False)
        version = f"{platform.python_implementation()} {platform.python_version()}"
        return {"source": cfg.source, "python": version, **listing}
    if cfg.source == "files":
        selected = files.select(cfg).files
        # The documents in a file depend on its name and these two settings.
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

    Order: files of `python_stdlib`, of a folder and of a glob are sorted by path; entries of `data.paths` keep their
    order, and so do the rows of a data set.
    Raises `DataError` as `describe` does, and where the column or split does not exist or the hub cannot be reached.
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
            # A few test modules of the standard library are deliberately in other encodings.
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
    # The bytes of text in Parquet rows and in compressed files are unknown before they are read.
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
