"""Reads the files of a checkpoint in full, and compares them with the manifest."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from stack.checkpoint import manifest as manifests
from stack.checkpoint.manifest import File, Manifest
from stack.errors import CheckpointError
from stack.models.tensorfile import digest


def check_file(folder: Path, manifest: Manifest, file: File) -> None:
    """Checks that a file of a checkpoint has the hash and the tensors of the manifest, and only finite numbers.

    Args:
        folder: the checkpoint.
        manifest: its manifest.
        file: an entry of `manifest.files`.

    Raises:
        CheckpointError: the file has a fault; the message names the file, and the tensor with a number that is not
            finite.
        OSError: the file cannot be read.
    """
    path = folder / file.path
    found = digest(path)
    if (found.bytes, found.xxh3) != (file.bytes, file.xxh3):
        raise CheckpointError(f"{path} has changed since it was written: its hash is {found.xxh3}, not {file.xxh3}")
    expected = {name: ("F32", [length]) for name, length in manifest.tensors(manifest.files.index(file)).items()}
    try:
        with safe_open(path, framework="numpy") as tensors:
            there = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - it is no mapping
            if {name: (part.get_dtype(), part.get_shape()) for name, part in there.items()} != expected:
                raise CheckpointError(f"{path} does not hold the tensors that the manifest says")
            for name in there:
                if not np.isfinite(tensors.get_tensor(name)).all():
                    raise CheckpointError(f"{path}: {name} is not finite")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error


def verify(root: Path) -> Iterator[tuple[Path, str | None]]:
    """Pairs of a file and its fault, or None where the file is whole, for all checkpoints in `root`, the oldest
    checkpoint first."""
    for step in manifests.steps(root):
        folder = manifests.folder_of(root, step)
        try:
            manifest = manifests.read(folder)
            yield folder / manifests.MANIFEST, None
        except (CheckpointError, OSError) as error:
            if folder.is_dir():
                yield folder / manifests.MANIFEST, str(error)
            continue
        for file in manifest.files:
            fault = None
            try:
                check_file(folder, manifest, file)
            except (CheckpointError, OSError) as error:
                if not folder.is_dir():
                    # The run has deleted this checkpoint meanwhile, because it keeps newer ones; that is no fault.
                    break
                fault = str(error)
            yield folder / file.path, fault
