"""The format of a checkpoint: folder name, manifest, and the checks of both.

    <checkpoints>/step-00000100/
        manifest.json             written last; describes the other files, with sizes and hashes
        rank-00000.safetensors    the parts that rank 0 saved, flattened, under `<state>/<Hugging Face name>`
        ...

A save writes a folder under another name and renames it when it is whole. A folder with this name is therefore whole,
unless it was damaged later. This module does not import torch, because the driver reads manifests before it starts a
process.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from stack.config.schema import Config
from stack.config.values import show
from stack.disk import checksum, parse_json, read_regular
from stack.errors import CheckpointError
from stack.plan.policies import MASTER

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
_FILE = re.compile(r"rank-\d{5,}\.safetensors")
_LINK = "is a link, which may lead out of the checkpoint"
_XXH3 = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class File:
    """One file of a checkpoint."""

    path: str
    """File name inside the checkpoint's folder."""
    bytes: int
    xxh3: str
    """XXH3-128 of the content, in hexadecimal digits."""


@dataclass(frozen=True)
class Parameter:
    """The places of the states of one parameter."""

    shape: tuple[int, ...]
    slices: tuple[tuple[int, int, int], ...]
    """(first element, length, index in `Manifest.files`) of each part of the flattened parameter; the same for every
    state."""


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    step: int
    """Finished optimizer steps."""
    state: dict[str, Any]
    """The fields of `TrainState`, without `attempt`."""
    updates: int
    """Number of AdamW's updates; less than `step` where fp16 skipped some. 0 for SGD."""
    scaling: tuple[float, int] | None
    """(loss scale of fp16, steps since its last overflow); None for other dtypes."""
    states: tuple[str, ...]
    """Names of the tensors that are saved for each parameter: the fp32 master and those of the optimizer."""
    course: dict[str, Any]
    """The settings that may not change on a resume without `checkpoint.allow`: those of the model, and those that
    decide which sequences a step sees."""
    heldout_loss: float | None
    """Held-out loss after this step, in nats; None where it was not evaluated."""
    plan: dict[str, Any]
    """The layout of the run that saved the checkpoint."""
    versions: dict[str, str | None]
    """Name of a package -> its version, or None if it was not installed."""
    time: float
    """When it was saved, in Unix seconds."""
    files: tuple[File, ...]
    parameters: dict[str, Parameter]
    """Hugging Face name -> places of the parameter."""
    format: int = field(default=FORMAT)

    def to_json(self) -> str:
        """The text of manifest.json, with a checksum over its content."""
        content = json.loads(json.dumps(dataclasses.asdict(self)))
        return json.dumps({**content, "checksum": checksum(content)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """The inverse of `to_json`. Checks the checksum, which finds accidental damage, and every value, since a
        crafted manifest may have a valid checksum.

        Raises:
            CheckpointError: the text is damaged, crafted or of a newer format. The message begins with a verb, to
                follow a file name.
        """
        try:
            return cls._parsed(text)
        except RecursionError as error:
            raise CheckpointError("is damaged, it is nested too deep") from error

    @classmethod
    def _parsed(cls, text: bytes) -> Self:
        try:
            content = parse_json(text)
        except ValueError as error:
            raise CheckpointError("is damaged, it is not JSON") from error
        if not isinstance(content, dict):
            raise CheckpointError("is damaged, it is not a manifest")
        stored = content.pop("checksum", None)
        if type(content.get("format")) is int and content["format"] > FORMAT:
            raise CheckpointError(f"has format {content['format']}, and this version reads {FORMAT}; use a newer stack")
        if stored != checksum(content) or content.get("format") != FORMAT:
            raise CheckpointError("is damaged, its checksum does not match")
        manifest = cls(**_checked(content))
        # Also refuses changes that JSON ignores, such as white space: the file must be as written, byte by byte.
        if manifest.to_json().encode() != text:
            raise CheckpointError("is damaged, it is not as it was written")
        return manifest

    def tensors(self, number: int) -> dict[str, int]:
        """Name `<state>/<Hugging Face name>` -> length, for the tensors in the file `files[number]`."""
        return {
            f"{state}/{name}": length
            for name, parameter in self.parameters.items()
            for _, length, file in parameter.slices
            if file == number
            for state in self.states
        }


def _checked(content: dict[str, Any]) -> dict[str, Any]:
    """The fields of a manifest, converted to the types of `Manifest`.

    Raises:
        CheckpointError: a field is missing or unknown, or has an impossible value. The message begins with a verb, to
            follow a file name.
    """
    try:
        if content.keys() != {field.name for field in dataclasses.fields(Manifest)}:
            raise ValueError("its fields are not those of a manifest")
        files = tuple(File(**file) for file in content["files"])
        for file in files:
            # A crafted manifest must not name a file outside the checkpoint's folder.
            if not (_FILE.fullmatch(file.path) and _is_count(file.bytes) and _XXH3.fullmatch(file.xxh3)):
                raise ValueError("a file in it has no name, size or hash of a checkpoint's file")
        if len({file.path for file in files}) < len(files):
            raise ValueError("it names a file twice")
        parameters = {name: _parameter(about, len(files)) for name, about in content["parameters"].items()}
        states, scaling, loss = tuple(content["states"]), content["scaling"], content["heldout_loss"]
        right = (
            all(map(_is_count, (content["step"], content["updates"])))
            and all(isinstance(content[name], dict) for name in ("state", "course", "plan", "versions"))
            and all(isinstance(state, str) for state in states)
            and MASTER in states
            and (scaling is None or (_is_number(scaling[0]) and _is_count(scaling[1]) and len(scaling) == 2))
            and (loss is None or _is_number(loss))
            and _is_number(content["time"])
        )
        if not right:
            raise ValueError("its values are not those of a manifest")
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise CheckpointError("is damaged, its values are not those of a manifest") from error
    except ValueError as error:
        raise CheckpointError(f"is damaged, {error}") from error
    scaling = scaling and tuple(scaling)
    return {**content, "files": files, "parameters": parameters, "states": states, "scaling": scaling}


def _parameter(about: dict[str, Any], files: int) -> Parameter:
    """
    Args:
        about: a value of `parameters` in manifest.json.
        files: number of the files in the manifest.

    Raises:
        ValueError: the slices do not cover the parameter exactly once, or name a file that does not exist.
    """
    found = Parameter(tuple(about["shape"]), tuple(map(tuple, about["slices"])))
    if set(about) != {"shape", "slices"} or not all(map(_is_count, found.shape)):
        raise ValueError("a parameter in it has no shape")
    ends = [0]
    for start, length, file in found.slices:
        fits = _is_count(length) and _is_count(file) and start == ends[-1] and file < files
        ends.append(ends[-1] + length if fits else -1)
    if ends[-1] != math.prod(found.shape) or -1 in ends:
        raise ValueError("the slices of a parameter in it do not make the whole parameter")
    return found


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def root_of(path: str | None, run: Path) -> Path:
    """Folder of a run's checkpoints.

    Args:
        path: `checkpoint.path` of the run.
        run: the run directory.
    """
    return run / "checkpoints" if path is None else Path(path) / run.parent.name / run.name


def folder_of(root: Path, step: int) -> Path:
    """The folder for the checkpoint of a step, whether it exists or not."""
    return root / f"step-{step:08d}"


def steps(root: Path) -> list[int]:
    """Steps of the checkpoints in a folder, the oldest first; empty where the folder does not exist.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{root} cannot be read as a folder of checkpoints: {error.strerror}") from error
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def check_step(step: int | str, there: Sequence[int], *, where: Path) -> None:
    """Checks that the checkpoint of `checkpoint.step` exists; `auto` is always accepted.

    Args:
        step: `checkpoint.step`.
        there: steps of the checkpoints in `where`.
        where: folder of the checkpoints.

    Raises:
        CheckpointError: there is no checkpoint of this step.
    """
    if step != "auto" and step not in there:
        listed = ", ".join(map(str, sorted(there))) or "none"
        raise CheckpointError(f"checkpoint.step={step}: no such checkpoint in {where}; there are {listed}")


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint, after a check of its checksum, its values, and the names and sizes of the files.

    Takes milliseconds, since the contents of the files are not read.

    Raises:
        CheckpointError: the manifest is missing, damaged or of a newer format; or a file is missing, unknown, a link,
            or of another size.
    """
    path = folder / MANIFEST
    try:
        if path.is_symlink():
            raise CheckpointError(_LINK)
        manifest = Manifest.from_json(read_regular(path))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error
    if folder_of(folder.parent, manifest.step) != folder:
        raise CheckpointError(f"{path} belongs to step {manifest.step}")
    for file in manifest.files:
        part = folder / file.path
        if part.is_symlink():
            raise CheckpointError(f"{part} {_LINK}")
        size = part.stat().st_size if part.is_file() else None
        if size != file.bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise CheckpointError(f"{part} {found}, the manifest says {file.bytes} bytes")
    strange = sorted(set(os.listdir(folder)) - {MANIFEST} - {file.path for file in manifest.files})
    if strange:
        raise CheckpointError(f"{folder / strange[0]} is not in the manifest")
    return manifest


def check_same_model(manifest: Manifest, shapes: dict[str, tuple[int, ...]], *, where: Path) -> None:
    """Checks that a checkpoint has exactly the parameters of a model.

    Args:
        manifest: the checkpoint's manifest.
        shapes: Hugging Face name -> shape, of the model.
        where: folder of the checkpoint, for the message.

    Raises:
        CheckpointError: names or shapes differ; the message has the first three.
    """
    saved = {name: parameter.shape for name, parameter in manifest.parameters.items()}
    if saved == shapes:
        return
    names = [name for name in {**shapes, **saved} if saved.get(name) != shapes.get(name)]

    def shown(shape: tuple[int, ...] | None) -> str:
        return "nothing" if shape is None else str(list(shape))

    told = "; ".join(f"{name}: {shown(saved.get(name))} there, {shown(shapes.get(name))} here" for name in names[:3])
    more = f"; and {len(names) - 3} more" if len(names) > 3 else ""
    raise CheckpointError(f"{where} is of another model: {told}{more}; resume with the model settings of its run")


def check_same_course(
    manifest: Manifest, cfg: Config, course: dict[str, Any], states: tuple[str, ...], *, where: Path
) -> None:
    """Checks that a resumed run has the optimizer, the model settings and the batches of the run that saved the
    checkpoint, except for changes that `checkpoint.allow` permits.

    Args:
        manifest: the checkpoint's manifest.
        cfg: config of the resumed run.
        course: `Manifest.course` of the resumed run.
        states: `Manifest.states` of the resumed run.
        where: folder of the checkpoint, for the message.

    Raises:
        CheckpointError: a setting differs; the message names it, and the override that allows the change.
    """
    if lacking := set(states) - set(manifest.states):
        saved = ", ".join(manifest.states)
        raise CheckpointError(
            f"optim.kind={cfg.optim.kind} needs {', '.join(sorted(lacking))}, but {where} holds {saved}; use the optim "
            "settings of its run, or export the weights and start a new run from them with model.init=pretrained"
        )
    for name in {**course, **manifest.course}:
        now, before = course.get(name), manifest.course.get(name)
        group = "batch" if name == "batch.global_size" else "model" if name.startswith("model.") else "data"
        if now != before and group not in cfg.checkpoint.allow:
            # The values of these two settings, a fingerprint and a class name, are not values that a user can set.
            use = {
                "data.source": "the data settings of its run",
                "model.config.model_type": "the model.name of its run",
            }
            raise CheckpointError(
                f"{name}={show(now)} is not the {show(before)} of {where}; "
                f"use {use.get(name, f'{name}={show(before)}')}, "
                f"or add checkpoint.allow={show([*cfg.checkpoint.allow, group])} to go on with another"
            )
