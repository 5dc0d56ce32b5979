"""Reading a checkpoint's files in full, to know that they are what was written."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from stack.checkpoint import manifest as manifests
from stack.checkpoint.manifest import File, Manifest
from stack.errors import CheckpointError
from stack.models.tensorfile import digest


def check_file(folder: Path, manifest: Manifest, file: File) -> None:
    """Whether a file of a checkpoint still has the content that the manifest names, the tensors that the manifest looks
    for there, and no number that is not finite.

    Raises:
        CheckpointError: naming the file, and the tensor.
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
    """Each file of each checkpoint in a folder with its fault, or None where it is whole; the oldest first."""
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
                    # Deleted meanwhile, by the run that keeps newer ones: no fault.
                    break
                fault = str(error)
            yield folder / file.path, fault
