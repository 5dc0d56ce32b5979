"""Makes a small whole checkpoint without a run, and crafted manifests with impossible content."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from stack.checkpoint import manifest as manifests
from stack.checkpoint.manifest import File, Manifest, Parameter
from stack.disk import checksum
from stack.models.tensorfile import digest

_STATES = ("master", "exp_avg")


def whole_checkpoint(root: Path, step: int) -> Path:
    """Writes a checkpoint with the parameters `w` [2, 3], in two files, and `b` [4], each with two states."""
    folder = manifests.folder_of(root, step)
    folder.mkdir(parents=True)
    parts: list[dict[str, int]] = [{"w": 4}, {"w": 2, "b": 4}]
    files = []
    for rank, part in enumerate(parts):
        path = folder / f"rank-{rank:05d}.safetensors"
        save_file({f"{s}/{name}": np.ones(n, np.float32) for s in _STATES for name, n in part.items()}, path)
        found = digest(path)
        files.append(File(path.name, found.bytes, found.xxh3))
    parameters = {"w": Parameter((2, 3), ((0, 4, 0), (4, 2, 1))), "b": Parameter((4,), ((0, 4, 1),))}
    state = {"step": step, "tokens": 10, "sequences": 2, "skipped_steps": 0}
    manifest = Manifest(
        step, state, step, None, _STATES, {}, None, {}, {}, 1.5, files=tuple(files), parameters=parameters
    )
    (folder / manifests.MANIFEST).write_text(manifest.to_json())
    return folder


def _content(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """A function that changes the content of a manifest and gives it a valid checksum."""

    def craft(path: Path) -> None:
        content = json.loads(path.read_text())
        del content["checksum"]
        change(content)
        path.write_text(json.dumps({**content, "checksum": checksum(content)}, indent=1) + "\n")

    return craft


def _field(name: str, value: Any) -> Callable[[Path], object]:
    return _content(lambda content: content.update({name: value}))


def _file(name: str, value: Any) -> Callable[[Path], object]:
    return _content(lambda content: content["files"][0].update({name: value}))


def _slices(*slices: list[int]) -> Callable[[Path], object]:
    def change(content: dict[str, Any]) -> None:
        content["parameters"][min(content["parameters"])]["slices"] = list(slices)

    return _content(change)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link(path: Path) -> None:
    path.rename(path.parents[1] / "elsewhere")
    path.symlink_to(path.parents[1] / "elsewhere")


def _linked_part(path: Path) -> None:
    part = path.with_name("rank-00000.safetensors")
    part.rename(path.parents[1] / "elsewhere")
    part.symlink_to(path.parents[1] / "elsewhere")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


#: Name of a case -> a function that crafts manifest.json. A load must refuse each of these checkpoints.
CRAFTED: dict[str, Callable[[Path], object]] = {
    "no files": _content(lambda content: content.pop("files")),
    "files are text": _field("files", "rank-00000.safetensors"),
    "another key": _field("extra", 1),
    "list of parameters": _content(lambda content: content.update(parameters=list(content["parameters"]))),
    "parameters are null": _field("parameters", None),
    "brackets": lambda path: path.write_text("[" * 200_000),
    "braces": lambda path: path.write_text('{"a":' * 200_000),
    "deep, yet JSON": lambda path: path.write_text('{"a":' * 900 + "1" + "}" * 900),
    "deep plan": _field("plan", json.loads('{"a":' * 900 + "1" + "}" * 900)),
    "a number of 5,000 digits": lambda path: path.write_text("9" * 5000),
    "empty": lambda path: path.write_bytes(b""),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe"),
    "a list": lambda path: path.write_text("[1]"),
    "absolute path": _file("path", "/etc/passwd"),
    "path outside": _file("path", "../../../../etc/passwd"),
    "path of the folder": _file("path", "."),
    "path of the manifest": _file("path", manifests.MANIFEST),
    "path is a number": _file("path", 5),
    "size is text": _file("bytes", "5"),
    "size is negative": _file("bytes", -5),
    "hash is no hash": _file("xxh3", "\x1b[31m"),
    "step of another": _field("step", 7),
    "step is text": _field("step", "2"),
    "step beyond reason": _field("step", 10**30),
    "state of training is empty": _field("state", {}),
    "scaling is text": _field("scaling", "ab"),
    "no master": _field("states", ["exp_avg"]),
    "states are numbers": _field("states", [1, 2]),
    "slices overlap": _slices([0, 4, 0], [2, 4, 0]),
    "slices lack an end": _slices([0, 1, 0]),
    "slices of no file": _slices([0, 1 << 40, 9]),
    "slices are text": _slices("abc"),  # type: ignore[arg-type]
    "a pipe": _pipe,
    "a link": _link,
    "a link in the place of a file": _linked_part,
    "a folder": _folder,
}
