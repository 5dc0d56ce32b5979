"""Makes configs of small corpora, each from one jsonl file."""

import json
from pathlib import Path

from stack.config.schema import Data
from stack.data import manifest

SEED = 7


def corpus(folder: Path, documents: list[str], **fields) -> Data:
    """A config whose source is one jsonl file of `documents`, and whose prepared corpus goes to `folder`/data."""
    raw = folder / "raw"
    raw.mkdir(exist_ok=True)
    (raw / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    settings = {"tokenizer": "bpe", "vocab_size": 270, "heldout_fraction": 0.2, **fields}
    return Data(source="files", paths=[str(raw)], root=str(folder / "data"), **settings)


def stories(count: int) -> list[str]:
    return [f"story {number}: once upon a time, {'and then ' * (number % 7)}the end é" for number in range(count)]


def hashes(folder: Path) -> dict[str, str]:
    return {file["path"]: file["blake2b"] for file in manifest.read(folder)["files"]}
