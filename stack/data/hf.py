"""Documents from Hugging Face `datasets`: a hub name, a local folder of data files, or a save_to_disk folder."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stack.config.schema import Data
from stack.data import hub
from stack.data.documents import Documents, no_column, one_line, record_text
from stack.errors import DataError

if TYPE_CHECKING:
    import datasets


def dataset_documents(cfg: Data, name: str) -> Documents:
    """The text column of a data set. `datasets` memory-maps it from its own cache on disk.

    `name` is a hub name or an existing folder. A folder made by `Dataset.save_to_disk` has one split, and `data.split`
    is then ignored.

    Raises:
        DataError: the hub cannot be reached, or there is no such data set, subset, split or column. Iterating raises it
            too, where a row cannot be read.
    """
    where = f"data.name={name}"
    table = _from_disk(cfg, name) if _was_saved_to_disk(name) else _load(cfg, name)
    column = _column(table.features, cfg.text_key, where)
    table = table.select_columns([column])

    def read() -> Iterator[str]:
        import pyarrow

        row = 0
        try:
            for batch in table.iter(batch_size=1024):
                for value in batch[column]:
                    row += 1
                    yield record_text({column: value}, cfg.text_key, f"{where}, row {row}")
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{where}, after row {row}, cannot be read ({one_line(error)}); repair it") from error

    return Documents(read, len(table), "documents")


def _column(features: dict[str, Any], key: str, where: str) -> str:
    """The column that holds `key`: the column `key` itself, or for a path such as `data.text` the column `data`.

    Raises:
        DataError: there is no such column.
    """
    if key in features:
        return key
    node: Any = features
    for name in key.split("."):
        if not isinstance(node, dict) or name not in node:
            raise no_column(key, _texts(features), where)
        node = node[name]
    return key.split(".")[0]


def _texts(features: dict[str, Any], prefix: str = "") -> list[str]:
    """Names of the columns that hold text; nested fields have their path, such as `data.text`."""
    found = []
    for name, kind in features.items():
        if isinstance(kind, dict):
            found += _texts(kind, f"{prefix}{name}.")
        elif getattr(kind, "dtype", "") in ("string", "large_string"):
            found.append(prefix + name)
    return found


def _was_saved_to_disk(name: str) -> bool:
    return any(Path(name, marker).is_file() for marker in ("state.json", "dataset_dict.json"))


def _from_disk(cfg: Data, name: str) -> "datasets.Dataset":
    import datasets

    try:
        loaded = datasets.load_from_disk(name)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"data.name={name} cannot be loaded ({one_line(error)}); save it again") from error
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if cfg.split not in loaded:
        raise DataError(f"data.split={cfg.split} is not in {name}; use data.split={' or '.join(loaded)}")
    return loaded[cfg.split]


def _load(cfg: Data, name: str) -> "datasets.Dataset":
    import datasets
    import huggingface_hub

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    from_cache = not Path(name).is_dir() and not hub.reachable()
    try:
        if not from_cache:
            return datasets.load_dataset(name, cfg.subset, split=cfg.split)
        with hub.offline(datasets.config, huggingface_hub.constants):
            return datasets.load_dataset(name, cfg.subset, split=cfg.split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"data.name={name} is no folder here and no public data set on {hub.endpoint()}; "
            "check the spelling, or log in with `hf auth login` if it is gated"
        ) from error
    except ConnectionError as error:
        raise DataError(
            f"data.name={name} is no folder here, and {hub.endpoint()} cannot be reached; download it where there is "
            "a network and set data.name to that folder, or use data.source=files"
        ) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        setting = f"data.name={name} data.subset={cfg.subset} data.split={cfg.split}"
        raise DataError(f"{setting} cannot be loaded: {one_line(error.__cause__ or error)}") from error
