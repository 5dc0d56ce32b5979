"""The format of a prepared corpus: folder name, manifest, and the checks of both.

A prepared corpus, `<data.root>/<source>-<first 12 digits of the fingerprint>/`:

    manifest.json             written last; describes all the rest, with sizes and hashes
    tokenizer/                a Hugging Face tokenizer folder
    train/tokens-00000.bin    token ids, raw little-endian uint16 or uint32; all but the last shard are equally long
    train/documents.npy       int64 [documents + 1]: where each document starts in the split's stream, then its end
    heldout/...               the same for the documents kept out of training

Each split is one stream of tokens. A document ends with the end-of-document token, and may continue in the next shard.
This module imports neither torch nor a Hugging Face library, because every rank calls `locate` at every start.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from stack.config.schema import Data
from stack.data import sources, tokenizer
from stack.disk import checksum, is_inside, parse_json, read_regular, write_whole
from stack.errors import DataError

FORMAT = 2
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
SPLITS = ("train", "heldout")
AGAIN = "run `stack data` with the same overrides"


def made_from(cfg: Data, *, seed: int) -> dict[str, Any]:
    """All settings that the content of a prepared corpus depends on, as JSON. `data.seq_len` and `data.pack` are not
    among them, since batches apply these two when they read the corpus.

    `seed` chooses the held-out documents. Raises `DataError` where the source or the tokenizer does not exist.
    """
    return {
        "format": FORMAT,
        "source": sources.describe(cfg),
        "tokenizer": tokenizer.describe(cfg),
        "special_tokens": cfg.special_tokens,
        "heldout_fraction": cfg.heldout_fraction,
        "seed": seed,
    }


def fingerprint(recipe: dict[str, Any]) -> str:
    """32 hexadecimal digits of BLAKE2b over `recipe`, the result of `made_from`."""
    return checksum(recipe)


def folder_of(cfg: Data, recipe: dict[str, Any]) -> Path:
    """The folder for the corpus made from `recipe`, whether it exists or not."""
    return Path(cfg.root).expanduser() / f"{_label(cfg)}-{fingerprint(recipe)[:12]}"


def locate(cfg: Data, *, seed: int) -> Path:
    """The folder of the prepared corpus that `cfg` and `seed` ask for.

    Takes milliseconds: lists the source, reads the manifest and compares file sizes. `verify` compares hashes. Raises
    `DataError` where the corpus is not prepared or not whole.
    """
    recipe = made_from(cfg, seed=seed)
    folder = folder_of(cfg, recipe)
    if not folder.is_dir():
        raise DataError(
            f"data.root={cfg.root} holds no corpus made from these settings{_nearest(cfg, recipe)}; {AGAIN}"
        )
    read(folder)
    return folder


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared corpus, after a check of its checksum, its values and the sizes of the files.

    Raises `DataError` where the manifest is missing, damaged or of another format, or a file is missing or has
    another size.
    """
    path = folder / MANIFEST
    try:
        manifest = parse_json(read_regular(path))
    except OSError as error:
        raise DataError(f"{folder} is no prepared corpus: {path.name}: {error.strerror}; {AGAIN}") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged, it is not JSON; {AGAIN}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path} is damaged or of another format than {FORMAT}; {AGAIN}")
    if manifest.pop("checksum", None) != checksum(manifest):
        raise DataError(f"{path} is damaged, its checksum does not match; {AGAIN}")
    try:
        # The checksum excludes accidental changes only. A crafted manifest may have a valid one, so values are checked.
        files = [(_inside(folder, file["path"]), file["bytes"], file["blake2b"]) for file in manifest["files"]]
        _check_shape(manifest)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path} is damaged, its content is not that of a corpus ({error!r}); {AGAIN}") from error
    for part, expected, _ in files:
        size = part.stat().st_size if part.is_file() else None
        if size != expected:
            found = "is missing" if size is None else f"has {size} bytes"
            raise DataError(f"{part} {found}, the manifest says {expected} bytes; {AGAIN}")
    return manifest


def verify(folder: Path, progress: Callable[[int, int], None] = lambda *_: None) -> dict[str, Any]:
    """Like `read`, and also compares the hash of every file, which takes seconds for each gigabyte.

    `progress` is called with the bytes read so far and the bytes of all files.

    Raises `DataError` that names the first file whose content has changed.
    """
    manifest = read(folder)
    total, done = sum(file["bytes"] for file in manifest["files"]), 0
    for file in manifest["files"]:
        part = folder / file["path"]
        try:
            found = hash_file(part)
        except OSError as error:
            found = error.strerror or str(error)
        if found != file["blake2b"]:
            raise DataError(f"{part} has changed since it was written; remove {folder} and {AGAIN}")
        done += file["bytes"]
        progress(done, total)
    return manifest


def _inside(folder: Path, name: str) -> Path:
    """The path of a corpus file. Raises `ValueError` where `name`, or a link in its place, leads out of the folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not is_inside(folder / path, folder):
        raise ValueError(f"{name} is outside of the folder")
    return folder / path


def _check_shape(manifest: dict[str, Any]) -> None:
    """Raises `ValueError`, `KeyError`, `TypeError` or `AttributeError` where the manifest has an impossible value."""
    numbers = [manifest[key] for key in ("vocab_size", "eos_id", "shard_tokens")]
    numbers += [manifest["splits"][name][key] for name in SPLITS for key in ("documents", "tokens")]
    if not all(isinstance(number, int) and number >= 0 for number in numbers) or not manifest["shard_tokens"]:
        raise ValueError("a number is negative or no number")
    if manifest["dtype"] not in ("<u2", "<u4") or not isinstance(manifest["made_from"], dict):
        raise ValueError("dtype or made_from is unknown")
    manifest["fingerprint"].lower()


def write(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes `manifest.json`, with a checksum over its own content."""
    text = json.dumps({**manifest, "checksum": checksum(manifest)}, indent=1)
    write_whole(folder / MANIFEST, text + "\n")


def hash_file(path: Path) -> str:
    """BLAKE2b of a file's content, 32 hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _label(cfg: Data) -> str:
    if cfg.source != "hf" or not cfg.name:
        return cfg.source
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(cfg.name).name).strip(".-") or "hf"


def _nearest(cfg: Data, recipe: dict[str, Any]) -> str:
    """A clause for a message: the most similar corpus in `data.root` and the settings in which it differs from
    `recipe`; empty where there is no other corpus."""
    best: tuple[int, str] | None = None
    for path in sorted(Path(cfg.root).expanduser().glob(f"{_label(cfg)}-*/{MANIFEST}")):
        try:
            other = read(path.parent)["made_from"]
        except DataError:
            continue
        differences = _differences(other, recipe)
        if best is None or len(differences) < best[0]:
            best = len(differences), f" ({path.parent.name} differs in {', '.join(differences)})"
    return best[1] if best else ""


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Each key that differs between two nested dicts, with both values; nested keys are joined by dots."""
    found = []
    for key in sorted(there.keys() | here.keys()):
        one, two = there.get(key), here.get(key)
        if isinstance(one, dict) and isinstance(two, dict):
            found += [f"{key}.{name}" for name in _differences(one, two)]
        elif one != two:
            found.append(f"{key}: {one} there, {two} here")
    return found
