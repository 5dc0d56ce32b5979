"""Checks that a corpus was tokenized with the vocabulary of a pretrained model.

The model's embeddings belong to token ids, so they are useless with another vocabulary. The checks read only the files
of the tokenizers, because the driver runs them before any process starts.
"""

from pathlib import Path
from typing import Any

from stack.config.schema import Config
from stack.data.manifest import TOKENIZER
from stack.data.tokenizer import has_tokenizer
from stack.disk import parse_json, read_regular
from stack.errors import DataError

#: token -> id
Vocabulary = dict[str, int]


def check_choice(cfg: Config) -> None:
    """Refuses a tokenizer that cannot be that of the pretrained weights, before a corpus is tokenized with it.

    Raises:
        DataError: with model.init=pretrained, `data.tokenizer` would learn a vocabulary, or names a model folder that
            has no tokenizer.
    """
    name = cfg.model.name
    lacks = Path(name).expanduser().is_dir() and not has_tokenizer(Path(name).expanduser())
    chosen = cfg.data.tokenizer
    if cfg.model.init != "pretrained" or not (chosen == "bpe" or (chosen == name and lacks)):
        return
    why = "learns a new vocabulary, and the weights need their own" if chosen == "bpe" else "holds no tokenizer"
    advice = "FOLDER, the folder of the tokenizer that the weights were trained with" if lacks else name
    raise DataError(
        f"data.tokenizer={chosen} {why} (model.init=pretrained model.name={name}); use data.tokenizer={advice}"
    )


def check_vocabulary(corpus: Path, model: Path) -> None:
    """Compares the tokens of a prepared corpus with those of a model folder, id by id.

    The corpus may add tokens at ids for which the model has no token, and may lack tokens of the model. Nothing is
    compared where one of the two folders has no tokenizer file that can be read here.

    Raises:
        DataError: a token has different ids in the two, or an id has different tokens; or a tokenizer file is damaged.
    """
    theirs, ours = _tokens(model), _tokens(corpus / TOKENIZER)
    if theirs is None or ours is None:
        return
    wanted, (learnt, added) = {**theirs[0], **theirs[1]}, ours
    by_id = {number: token for token, number in wanted.items()}
    for token, number in {**learnt, **added}.items():
        new = token not in wanted and number not in by_id and token not in learnt
        if wanted.get(token) != number and not new:
            there = f"{by_id[number]!r} in the model" if number in by_id else "no token in the model"
            raise DataError(
                f"{corpus} was tokenized with another vocabulary than that of {model}: id {number} is {token!r} in the "
                f"corpus and {there}; use data.tokenizer={model}"
            )


def _tokens(folder: Path) -> tuple[Vocabulary, Vocabulary] | None:
    """A tokenizer's vocabulary and the tokens that were added to it, from tokenizer.json, else vocab.json, else
    tokenizer.model; None where the folder has none of these files.

    Raises:
        DataError: the file is damaged.
    """
    for name, read in (("tokenizer.json", _of_json), ("vocab.json", _of_vocab), ("tokenizer.model", _of_pieces)):
        path = folder / name
        if path.is_file():
            try:
                return read(path)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
                raise DataError(f"{path} is damaged, it is no tokenizer ({error!r}); copy it again") from error
    return None


def _of_json(path: Path) -> tuple[Vocabulary, Vocabulary]:
    content: dict[str, Any] = parse_json(read_regular(path))
    vocabulary = content["model"]["vocab"]
    # A unigram model lists (token, score) in the order of the ids.
    learnt = {token: i for i, (token, _) in enumerate(vocabulary)} if isinstance(vocabulary, list) else vocabulary
    return dict(learnt), {added["content"]: added["id"] for added in content.get("added_tokens") or ()}


def _of_vocab(path: Path) -> tuple[Vocabulary, Vocabulary]:
    """Reads GPT-2's vocab.json, and added_tokens.json where it exists."""
    added = path.with_name("added_tokens.json")
    return dict(parse_json(read_regular(path))), dict(parse_json(read_regular(added))) if added.is_file() else {}


def _of_pieces(path: Path) -> tuple[Vocabulary, Vocabulary]:
    """Reads sentencepiece's tokenizer.model."""
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(path))
    return {pieces.id_to_piece(number): number for number in range(pieces.get_piece_size())}, {}
