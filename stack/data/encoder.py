"""Turns documents into token ids with any Hugging Face tokenizer, and decides how special tokens in a text are read."""

import json
import re
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from stack.data.documents import one_line, some
from stack.data.pieces import Cutter, cutter
from stack.errors import DataError

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerBase


class Encoder:
    """A Hugging Face tokenizer for writing shards: encodes pieces of documents and counts special tokens in them."""

    def __init__(self, hf: "PreTrainedTokenizerBase", *, special_tokens: str) -> None:
        """`special_tokens` is `parse` or `text`, as in `data.special_tokens`; `hf` must have an `eos_token`."""
        self.hf, self._parses = hf, special_tokens == "parse"
        vocabulary = hf.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        """One more than the largest token id."""
        self.ordinary_size = 1 + max((vocabulary[t] for t in vocabulary.keys() - hf.get_added_vocab()), default=-1)
        """One more than the largest id of a token that was not added to the vocabulary. A `[PAD]`, for example, is
        often added and occurs in no text."""
        assert isinstance(hf.eos_token_id, int)
        self.eos_id: int = hf.eos_token_id
        """The token that ends every document."""
        self.begin = _begin(hf)
        """The tokens that begin every document; often one beginning-of-sequence token, or none."""
        self._special = _special_tokens(hf)
        longest_first = sorted(self._special, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)), _flags(hf)) if longest_first else None
        self._backend = _backend(hf, hidden=set() if self._parses else self._special) if hf.is_fast else None
        self._cutter = _cutter(hf)
        self._documents_with, self._counts = 0, Counter[str]()

    def pieces(self, text: str, longest: int) -> Iterator[str]:
        """The document in pieces of about `longest` characters. The tokens of the pieces together are those of the
        document. It is a single piece where the tokenizer or the text has no place for such a cut."""
        return self._cutter.pieces(text, longest)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, without the tokens that the tokenizer adds around a text.

        Raises:
            DataError: the tokenizer cannot encode a text.
        """
        try:
            if self._backend is not None:
                return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
            return self.hf(list(texts), add_special_tokens=False, split_special_tokens=not self._parses, verbose=False)[
                "input_ids"
            ]
        except Exception as error:  # the Rust library raises plain Exception
            raise _cannot_encode(error) from error

    def count_spelled(self, text: str) -> None:
        """Counts which special tokens the text of a whole document contains, for `note`."""
        if self._spelled and (found := set(self._spelled.findall(text))):
            self._documents_with += 1
            self._counts.update(sorted(found))

    def note(self) -> str:
        """One line about the documents whose text contains special tokens; empty where there are none."""
        if not self._documents_with:
            return ""
        read = ("as these tokens", "text", "ordinary text") if self._parses else ("as text", "parse", "these tokens")
        documents = f"{self._documents_with:,} document" + ("s spell" if self._documents_with > 1 else " spells")
        which = some([f"{token} ({count:,})" for token, count in self._counts.most_common()])
        return (
            f"{documents} special tokens: {which}; they were read {read[0]} (data.special_tokens={read[1]} reads them "
            f"as {read[2]})"
        )


def _begin(hf: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """The tokens that the tokenizer adds ahead of every text: the beginning-of-sequence token, or none.

    Raises:
        DataError: the tokenizer cannot encode the letter "a", which is used to find out.
    """
    try:
        alone, whole = (hf("a", add_special_tokens=add, verbose=False)["input_ids"] for add in (False, True))
    except Exception as error:  # the Rust library raises plain Exception
        raise _cannot_encode(error) from error
    starts = (at for at in range(len(whole)) if whole[at : at + len(alone)] == alone)
    return tuple(whole[: next(starts, 0)]) if alone else ()


def _cannot_encode(error: Exception) -> DataError:
    return DataError(f"data.tokenizer cannot encode the text ({one_line(error)}); use one that can encode all of it")


def _special_tokens(hf: "PreTrainedTokenizerBase") -> set[str]:
    added = hf.added_tokens_decoder.values()
    return {*hf.all_special_tokens, *(token.content for token in added if token.special)} - {""}


def _flags(hf: "PreTrainedTokenizerBase") -> re.RegexFlag:
    """IGNORECASE where the tokenizer makes the text lower-case before it looks for special tokens, else no flag."""
    normalizer = hf.backend_tokenizer.normalizer if hf.is_fast else None
    normalized = any(token.normalized for token in hf.added_tokens_decoder.values() if token.special)
    lowers = normalizer is not None and normalized and normalizer.normalize_str("A").endswith("a")
    return re.IGNORECASE if lowers else re.NOFLAG


def _backend(hf: "PreTrainedTokenizerBase", *, hidden: set[str]) -> "tokenizers.Tokenizer":
    """The fast tokenizer, or a copy of it in which no text can produce a token of `hidden`.

    The copy renames these tokens to random hexadecimal strings. It would not be enough to stop looking for added
    tokens: the vocabularies of sentencepiece also have `<s>` as an ordinary piece, which a unigram model finds in text.

    Raises:
        DataError: the tokenizer has parts written in Python, which cannot be copied.
    """
    from tokenizers import Tokenizer

    backend = hf.backend_tokenizer
    backend.encode_special_tokens = False
    if hidden:
        names = {token: secrets.token_hex(16) for token in hidden}
        try:
            backend = Tokenizer.from_str(json.dumps(_renamed(json.loads(backend.to_str()), names)))
        except Exception as error:  # the Rust library raises plain Exception
            raise DataError(
                f"data.special_tokens=text does not work with this tokenizer ({one_line(error)}); use parse"
            ) from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _renamed(content: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The content of a tokenizer.json with tokens renamed by `names` (old name -> new name); ids stay the same."""
    model = dict(content["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): number for token, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), *rest] for token, *rest in model["vocab"]]
    if "merges" in model:
        made = ((pair, pair if isinstance(pair, list) else pair.split(" ")) for pair in model["merges"])
        model["merges"] = [pair for pair, parts in made if not {*parts, "".join(parts)} & names.keys()]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    added = [{**token, "content": names.get(token["content"], token["content"])} for token in content["added_tokens"]]
    return {**content, "model": model, "added_tokens": added}


def _cutter(hf: "PreTrainedTokenizerBase") -> Cutter:
    if not hf.is_fast:
        return Cutter("")
    try:
        return cutter(hf.backend_tokenizer.to_str())
    except Exception:  # noqa: BLE001 - the Rust library raises plain Exception for parts written in Python
        return Cutter("")
