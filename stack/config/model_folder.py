"""Resolves `model.name`: a family, a model folder on this machine, or a model of the Hugging Face hub.

The fields of the model come from its config.json, overridden by `model.config`.
"""

import copy
import json
import re
import shutil
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from stack.config.families import FAMILIES, Family
from stack.config.model_fields import SPECS
from stack.config.rotary import SECTION, rotary_of, without_rotary
from stack.config.schema import Model
from stack.config.values import check_value, closest, one_line, refuse, show
from stack.disk import is_inside, parse_json, read_regular
from stack.errors import ConfigError

#: Names of the weights file of a small model, and of the index that maps tensors to files in a large one.
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

#: How text is generated from the model. An export has it as it is in the folder.
GENERATION = "generation_config.json"

_CONFIG = ("config.json",)
#: File in a run directory's copy of a model folder, with the path of the original. Such a copy has no weights.
_COPIED_FROM = "copied_from.json"
#: Names of the files that are copied: config and tokenizer, without the weights.
_DESCRIBING = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json|"
    r"vocab\.txt|merges\.txt|chat_template\.jinja|.*\.(model|tiktoken)"
)
#: Files to download with the weights. Repositories may hold further copies of the weights in other formats.
_ALL = ("*.json", "model*.safetensors", "tokenizer.model", "merges.txt", "vocab.txt")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
#: Fields that are null in published config.json files even where the class has a number.
_MAY_BE_NULL = ("head_dim", "num_key_value_heads", "sliding_window", "layer_types", "no_rope_layers", "n_inner")
#: Extensions of files that may hold weights in formats that are not read here.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".safetensors")

_OFFER = f"the families are {', '.join(FAMILIES)}, and docs/add-a-family.md adds one"


def base_fields(name: str) -> dict[str, Any]:
    """The config fields of the model that `model.name` names, always including `model_type`.

    For a family they are `model_type` only. For a folder or a hub model they are the fields of its config.json, under
    the names of `Family.fields`.

    Returns:
        A new dictionary, which the caller may modify.

    Raises:
        ConfigError: `name` is neither a family, a folder nor a hub model, its config.json is unreadable or of an
            unknown family, or a number in it is out of bounds.
    """
    if name in FAMILIES:
        return {"model_type": name}
    if "/" not in name and not Path(name).exists():
        meant = closest(name, [*FAMILIES], cutoff=0.7)
        hint = f" (did you mean {meant}?)" if meant else ""
        refuse("model.name", name, f"neither a family nor a folder{hint}; {_OFFER}")
    file = local_folder(name, weights=False) / _CONFIG[0]
    try:
        state = file.stat()
    except OSError as error:
        refuse("model.name", name, f"its config.json cannot be read ({error.strerror}); give a Hugging Face folder")
    return copy.deepcopy(_read_fields(name, file, state.st_mtime_ns, state.st_ino, state.st_size))


def model_fields(model: Model) -> dict[str, Any]:
    """The Hugging Face config fields of the model, including `model_type`: `base_fields` overridden by `model.config`.

    Rotary settings in `model.config` replace all those of the folder, because `stack.config.compose` has merged them.

    Raises:
        ConfigError: as for `base_fields`.
    """
    fields = base_fields(model.name)
    if SECTION in model.config:
        fields = without_rotary(fields)
    return {**fields, **model.config}


def rotary_section(name: str) -> dict[str, Any] | None:
    """The rotary settings of the folder or hub model `name`; None if `name` is a family, or the model has learned
    positions.

    Raises:
        ConfigError: as for `base_fields`.
    """
    fields = base_fields(name)
    family = FAMILIES[fields["model_type"]]
    if name in FAMILIES or not family.rotary:
        return None
    return rotary_of(fields, layer_types=family.rotary_by_layer)


# The modification time, inode and size are part of the cache key, because a folder may be rewritten under its name.
@lru_cache(maxsize=64)
def _read_fields(name: str, file: Path, *_state: int) -> dict[str, Any]:
    try:
        fields = parse_json(read_regular(file))
    except OSError as error:
        refuse("model.name", name, f"its config.json cannot be read ({error.strerror}); give a Hugging Face folder")
    except ValueError as error:
        refuse("model.name", name, f"its config.json is not JSON ({one_line(error)})")
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if not isinstance(kind, str) or kind not in FAMILIES:
        refuse("model.name", name, f"its config.json has model_type {show(kind)}; {_OFFER}")
    family = FAMILIES[kind]
    fields = {family.aliases.get(key, key): value for key, value in fields.items()}
    _check_numbers(name, fields, family)
    return fields


def _check_numbers(name: str, fields: Mapping[str, Any], family: Family) -> None:
    """Checks the fields of a config.json that the planner computes with. The model class checks the others."""
    for key in (SECTION, "rope_scaling"):
        if not isinstance(fields.get(key) or {}, Mapping):
            refuse("model.name", name, f"its config.json has {key}={show(fields[key])}, which is no section")
    for key, spec in family.fields.items():
        value = fields.get(key)
        if isinstance(spec, Mapping):
            continue
        # config.json files have null for fields that the model does not use.
        if value is None and (spec.nullable or SPECS[key].nullable or key in _MAY_BE_NULL or key not in fields):
            continue
        if spec.kind is str and not spec.is_list:
            continue
        try:
            check_value(key, value, spec)
        except ConfigError as error:
            refuse("model.name", name, f"its config.json has {error}")


def is_hub_name(name: str) -> bool:
    """Whether `name` has the form `org/name` of a model on the hub, and neither `name` nor `org` is a local path."""
    return bool(_HUB_NAME.fullmatch(name)) and not Path(name).exists() and not Path(name).parent.exists()


def local_folder(name: str, *, weights: bool) -> Path:
    """The local folder of the model `name`.

    A hub name (`org/name`) is downloaded once. Later calls use the Hugging Face cache without asking the hub again, so
    that every rank uses the same commit.

    Args:
        name: a path or a hub name.
        weights: whether to download the weights and the tokenizer of a hub name too, at the commit of its config.json.

    Returns:
        A path, which may not exist unless `name` is a hub name.

    Raises:
        ConfigError: a hub name is neither in the cache nor can be downloaded.
    """
    folder = Path(name).expanduser()
    if folder.exists() or not _HUB_NAME.fullmatch(name):
        return folder
    folder = _snapshot(name, _CONFIG, revision=None, whole=_has_config)
    # A snapshot's folder is named after its commit.
    return _snapshot(name, _ALL, revision=folder.name, whole=_has_all_weights) if weights else folder


def check_weights(name: str, folder: Path) -> None:
    """Checks that a model folder has weights in safetensors files.

    Args:
        name: the value of `model.name`, for messages.
        folder: the folder that it stands for.

    Raises:
        ConfigError: it has none. The message names weights in other formats, and a command that converts them.
    """
    for file in (SINGLE, INDEX):
        if (folder / file).is_file():
            return
        if (folder / file).exists():
            refuse("model.name", name, f"its {file} is no regular file; copy it again")
    if is_copy(folder):
        original = parse_json(read_regular(folder / _COPIED_FROM))["model.name"]
        refuse(
            "model.name",
            original,
            "it was moved or deleted, and there is no checkpoint to take the weights from; add model.name= and the "
            "folder's new place",
        )
    convert = f'AutoModelForCausalLM.from_pretrained("{name}").save_pretrained(NEW_FOLDER, safe_serialization=True)'
    there = [path.name for path in sorted(folder.iterdir()) if path.suffix in _OTHER_WEIGHTS] if folder.is_dir() else []
    if there:
        shown = there[0] + (f" and {len(there) - 1} more" if there[1:] else "")
        why = f"its folder has no {SINGLE} but {shown}, and stack reads safetensors only"
        refuse("model.name", name, f"{why}; if you trust the author, convert it with {convert}")
    if folder == Path(name).expanduser():
        refuse("model.name", name, f"its folder has no {SINGLE}; give a whole folder, or use model.init=scratch")
    refuse("model.name", name, f"it has no {SINGLE} on the hub; if you trust the author, convert it with {convert}")


def copy_without_weights(name: str, target: Path) -> None:
    """Copies config.json, generation_config.json and the tokenizer of a model. The copy can replace the original where
    only the config fields are needed.

    Args:
        name: path or hub name of the model.
        target: folder for the copy; an existing one is deleted first.

    A `GENERATION` that `leads_out` is left out.

    Raises:
        ConfigError: as for `local_folder`.
        OSError: a file cannot be copied.
    """
    source = local_folder(name, weights=False)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if not _DESCRIBING.fullmatch(file.name) or not file.is_file():
            continue
        # An export from the copy would publish what the link leads to.
        if file.name != GENERATION or not leads_out(file, source):
            shutil.copyfile(file, target / file.name)
    (target / _COPIED_FROM).write_text(json.dumps({"model.name": name}) + "\n", encoding="utf-8")


def leads_out(file: Path, folder: Path) -> bool:
    """Whether a file of a model folder is a link that leads out of it. A snapshot in the Hugging Face cache consists of
    links into the folder `blobs` of its model, which count as the inside."""
    inside = [folder, folder.parents[1] / "blobs"] if folder.absolute().parent.name == "snapshots" else [folder]
    return not any(is_inside(file, place) for place in inside)


def is_copy(folder: Path) -> bool:
    """Whether `copy_without_weights` created the folder."""
    return (folder / _COPIED_FROM).is_file()


def _has_config(folder: Path) -> bool:
    return (folder / _CONFIG[0]).is_file()


def _has_all_weights(folder: Path) -> bool:
    try:
        files = set(parse_json(read_regular(folder / INDEX))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        files = {SINGLE}
    return all((folder / file).is_file() for file in files)


def _snapshot(name: str, patterns: tuple[str, ...], *, revision: str | None, whole: Callable[[Path], bool]) -> Path:
    """The local folder of a hub model. Files are downloaded unless the cached folder is complete.

    Args:
        name: hub name.
        patterns: glob patterns of the files to download.
        revision: a commit; None is the newest one.
        whole: tells whether a cached folder has all required files.

    Raises:
        ConfigError: as for `local_folder`.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    fetch: dict[str, Any] = {"repo_id": name, "revision": revision, "allow_patterns": list(patterns)}
    try:
        # The cached folder may be incomplete, after an interrupted download or a download by another program.
        if whole(cached := Path(snapshot_download(**fetch, local_files_only=True))):
            return cached
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(**fetch))
    except HfHubHTTPError as error:
        why = f"no folder here, and {constants.ENDPOINT} does not give it ({one_line(error)})"
        refuse("model.name", name, f"{why}; check the spelling, or log in with `hf auth login` if it is gated")
    except (OSError, ValueError) as error:
        why = f"no folder here, not whole in the Hugging Face cache, and {constants.ENDPOINT} cannot be reached"
        instead = "download it where there is a network, and give its folder"
        refuse("model.name", name, f"{why} ({one_line(error.__cause__ or error)}); {instead}")
