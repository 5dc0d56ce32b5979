"""Whether a corpus was tokenized with the vocabulary of a pretrained model: its embeddings mean nothing under another.

Reads JSON alone: the driver asks before any process starts.
"""

import json
from pathlib import Path
from typing import Any

from stack.data.manifest import TOKENIZER
from stack.errors import DataError

_FILE = "tokenizer.json"


def check_vocabulary(corpus: Path, model: Path) -> None:
    """Compares the tokens of a prepared corpus with those of a model folder, id by id.

    Tokens that the corpus adds at ids which the model has none for are allowed, as are those of the model that the
    corpus lacks. Where one of the two has no tokenizer.json there is nothing to compare.

    Raises:
        DataError: a token has another id, or an id another token.
    """
    theirs, ours = model / _FILE, corpus / TOKENIZER / _FILE
    if not theirs.is_file() or not ours.is_file():
        return
    wanted, (learnt, added) = {k: v for part in _tokens(theirs) for k, v in part.items()}, _tokens(ours)
    by_id = {number: token for token, number in wanted.items()}
    for token, number in {**learnt, **added}.items():
        new = token not in wanted and number not in by_id and token not in learnt
        if wanted.get(token) != number and not new:
            there = f"{by_id[number]!r} in the model" if number in by_id else "no token in the model"
            raise DataError(
                f"{corpus} was tokenized with another vocabulary than that of {model}: id {number} is {token!r} in the "
                f"corpus and {there}; use data.tokenizer={model}"
            )


def _tokens(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Token -> id: the model's vocabulary, and what was added to it.

    Raises:
        DataError: the file is damaged.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        # A unigram model lists (token, score) in the order of the ids.
        learnt = {token: i for i, (token, _) in enumerate(vocabulary)} if isinstance(vocabulary, list) else vocabulary
        return learnt, {added["content"]: added["id"] for added in content.get("added_tokens") or ()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged, it is no tokenizer ({error!r}); copy it again") from error
