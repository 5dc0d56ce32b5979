"""Writes parameters into a Hugging Face folder, one unit at a time.

Tensors get the names that they have in published models of the class. A unit is the embedding, a decoder layer, the
norm or the head.
"""

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from stack import disk
from stack.config.families import FAMILIES
from stack.config.model_folder import GENERATION, INDEX, SINGLE, leads_out, local_folder, model_fields
from stack.config.schema import Config
from stack.data import tokenizer as tokenizers
from stack.disk import place, sync, sync_tree
from stack.errors import DataError, UsageError
from stack.models import tensorfile
from stack.models.build import whole_model
from stack.models.families import parts_of
from stack.models.tensorfile import Entry

#: Largest number of bytes of tensors in one file.
MAX_FILE = 5 * 10**9


def export(
    cfg: Config,
    read: Callable[[str], torch.Tensor],
    out: Path,
    *,
    dtype: torch.dtype,
    tokenizer: Path | None,
    progress: Callable[[int, int], None],
    extra: Mapping[str, str] | None = None,
    max_file: int = MAX_FILE,
) -> int:
    """Writes a folder that `AutoModelForCausalLM.from_pretrained` loads.

    The files are written into a folder beside `out` and synced, then the folder is renamed to `out`. Therefore `out`
    is either whole or does not exist.

    Args:
        cfg: config of the run.
        read: returns a parameter of the whole model by its Hugging Face name, fp32 on the CPU. Called once for each
            parameter, unit by unit; the parameters of one unit are released before the next unit is read.
        out: the folder to make.
        dtype: of the written tensors.
        tokenizer: folder whose tokenizer files are copied, or None. The special token ids in config.json are those of
            the model's folder, if `cfg.model.name` is a folder and the run started from its weights or `tokenizer` is
            None. Otherwise they are the tokenizer's.
        progress: called with the bytes of tensors written so far and the bytes of all tensors.
        extra: name -> text of further files.
        max_file: largest number of bytes of tensors in one file; a larger tensor gets a file of its own.

    Returns:
        Bytes of tensors written.

    Raises:
        UsageError: `out` exists and is not empty, or cannot be written, or the disk has too little free space.
        DataError: a file of the tokenizer, or generation_config.json of the model folder, is a link that leads out of
            its folder; or the tokenizer needs Python code of its own.
    """
    model = whole_model(cfg)
    contents = _Contents(model, read, dtype, max_file)
    with _whole_folder(out, contents.total) as folder:
        if tokenizer is not None:
            tokenizers.copy_tokenizer(tokenizer, folder)
        _write_configs(cfg, type(model).__name__, folder, dtype=dtype, tokenizer=tokenizer)
        for name, text in (extra or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        contents.write(folder, lambda done: progress(done, contents.total))
    return contents.total


@dataclass
class _File:
    entries: list[Entry] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries)


class _Contents:
    """Assigns tensors to files, and reads their values one unit at a time while the files are written."""

    def __init__(self, model: Any, read: Callable[[str], torch.Tensor], dtype: torch.dtype, max_file: int):
        self._model, self._read = model, read
        self._unit_of: dict[str, tuple[str, ...]] = {}
        self._unit: tuple[str, ...] = ()
        self._values: dict[str, torch.Tensor] = {}
        self._files = [_File()]
        shapes = dict(model.named_parameters())
        for unit in _units(model):
            for name, tensor in revert_weight_conversion(model, {name: shapes[name] for name in unit}).items():
                self._unit_of[name] = unit
                self._add(Entry(name, dtype, tuple(tensor.shape)), max_file)
        self.total = sum(file.bytes for file in self._files)

    def write(self, folder: Path, progress: Callable[[int], None]) -> None:
        """Writes the files, and an index where there are several."""
        count, before = len(self._files), 0
        index: dict[str, str] = {}
        for number, file in enumerate(self._files, 1):
            name = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            tensorfile.write(
                folder / name,
                file.entries,
                self._value,
                metadata={"format": "pt"},
                progress=lambda done, before=before: progress(before + done),  # type: ignore[misc]
            )
            before += file.bytes
            index |= {entry.name: name for entry in file.entries}
        if count > 1:
            _write_json(folder / INDEX, {"metadata": {"total_size": self.total}, "weight_map": index})

    def _add(self, entry: Entry, max_file: int) -> None:
        last = self._files[-1]
        if last.entries and last.bytes + entry.bytes > max_file:
            self._files.append(last := _File())
        last.entries.append(entry)

    def _value(self, entry: Entry) -> torch.Tensor:
        """The tensor's values. Must be called in the order of the units, since only one unit is held."""
        unit = self._unit_of[entry.name]
        if unit != self._unit:
            self._values = revert_weight_conversion(self._model, {name: self._read(name) for name in unit})
            self._unit = unit
        return self._values.pop(entry.name).to(entry.dtype)


def _units(model: Any) -> Iterator[tuple[str, ...]]:
    """Names of the parameters of each unit, in the model's order; tied parameters occur once."""
    layers = f"{parts_of(model).layers}."

    def unit(name: str) -> str:
        return layers + name.removeprefix(layers).partition(".")[0] if name.startswith(layers) else name

    for _, names in groupby((name for name, _ in model.named_parameters()), key=unit):
        yield tuple(names)


def _write_configs(cfg: Config, architecture: str, folder: Path, *, dtype: torch.dtype, tokenizer: Path | None) -> None:
    """Writes config.json and generation_config.json: those of the model's folder, with the fields that the run set."""
    fields = {k: v for k, v in model_fields(cfg.model).items() if k not in ("torch_dtype", "dtype", "auto_map")}
    # Default token ids of a class may exceed this vocabulary, and those of a folder may belong to another tokenizer.
    keeps_ids = cfg.model.name not in FAMILIES and (tokenizer is None or cfg.model.init == "pretrained")
    if not keeps_ids:
        end = tokenizers.load(str(tokenizer)).eos_token_id if tokenizer is not None else None
        fields |= {"bos_token_id": None, "pad_token_id": None, "eos_token_id": end}
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    config.architectures, config.dtype = [architecture], dtype
    config.save_pretrained(folder)
    source = local_folder(cfg.model.name, weights=False)
    published = source / GENERATION
    if keeps_ids and published.is_file():
        if leads_out(published, source):
            raise DataError(f"{published} is a link that leads out of the model's folder; put the file itself there")
        shutil.copyfile(published, folder / GENERATION)
    else:
        transformers.GenerationConfig.from_model_config(config).save_pretrained(folder)


@contextmanager
def _whole_folder(out: Path, need: int) -> Iterator[Path]:
    """A folder beside `out` that is renamed to `out` at the end of the `with` block, or removed after an error.

    Raises:
        UsageError: as `export`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not an empty folder; name a new one")
    # The name contains a hash of this host, because the folder may be shared and process ids are unique on one host
    # only.
    made_by = f"{out.name}.partial-{hashlib.blake2b(place().encode(), digest_size=4).hexdigest()}"
    partial = out.with_name(f"{made_by}-{os.getpid()}")
    for left in out.parent.glob(f"{glob.escape(made_by)}-*"):
        # Removes the folder of an export that was killed on this host.
        pid = left.name.removeprefix(f"{made_by}-")
        if pid.isdecimal() and len(pid) < 10 and (left == partial or not psutil.pid_exists(int(pid))):
            shutil.rmtree(left, ignore_errors=True)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror}); name a folder that can be") from error
    try:
        free = shutil.disk_usage(partial).free
        if free < need:
            raise UsageError(f"{out} needs {disk.size(need)} and its disk has {disk.size(free)}; use another disk")
        yield partial
        sync_tree(partial)
        partial.replace(out)
        sync(out.parent)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise UsageError(f"{out} cannot be written ({error.strerror}); name a folder that can be") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
