"""Finds places to cut a long document, so that the tokens of the pieces together are those of the whole document.

A cut lies between a letter or digit and the space (or line feed) that follows it. Cuts are made only for tokenizers
whose every part is known to handle the two sides of such a cut independently. The parts run in this order:

- Added tokens are found first. None of them may span the cut. None may end with the letter before the cut either,
  because a token with `rstrip` would take up the space after it.
- The normalizer must map each side independently. Unicode's normal forms do so where the right side begins with an
  ASCII character.
- The pre-tokenizer must split at the cut, by rules that do not look back over it. If it does not split there, the model
  must be a BPE without a token that has a space after a letter, so that no merge spans the cut.
- The model sees one pre-token at a time.

With any other tokenizer a document is tokenized whole.
"""

import json
import re
import string
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any

#: Known alternatives of the regular expressions of pre-tokenizers. None matches a letter or digit together with the
#: white space after it, none looks back, and the match before the cut does not depend on the text after the cut.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ALTERNATIVES = {
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", _CONTRACTION, r"'(?i:[sdmt]|ll|ve|re)"),
    *(r"\p{N}", r"\p{N}+", r"\p{N}{1,3}", r" ?\p{N}+", r" ?\p{L}+", r"[0-9][0-9][0-9]"),
    *(_WORD + r"\p{L}+", _WORD + r"[\p{L}\p{M}]+", r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"),
    *(f"{_WORD}{_UPPER}*{_LOWER}+{end}" for end in ("", f"{_CONTRACTION}?")),
    *(f"{_WORD}{_UPPER}+{_LOWER}*{end}" for end in ("", f"{_CONTRACTION}?")),
    *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),
    *(r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", r" ?[\p{P}\p{S}]+[\r\n]*"),
    *(r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
    *(r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", r"\s+"),
}
#: Regular expressions that match white space only. A match begins at the cut or later, or ends before the letter.
_BLANKS = {r" {2,}", r"\s+", r"\s{2,}|[\n\r\t]", r"[\n\r\t]", r"\n"}
_BLANK = "▁"
#: Normalizers that map each character independently, or at least never combine an ASCII character with text before it.
_LOCAL = {"Lowercase", "NFC", "NFD", "NFKC", "NFKD", "StripAccents", "BertNormalizer", "Nmt"}


_ASCII = frozenset(string.ascii_letters + string.digits)


class _Unknown(Exception):
    """A part of the tokenizer is not known to handle the two sides of a cut independently."""


class Cutter:
    """Finds the cuts for one tokenizer."""

    def __init__(
        self, blanks: str, *, not_after: frozenset[str] = frozenset(), only_after: frozenset[str] | None = None
    ) -> None:
        """
        Args:
            blanks: the characters that may follow a cut: " ", " \\n", or "" for a tokenizer without cuts.
            not_after: letters after which there is no cut.
            only_after: if given, the only letters after which there is a cut.
        """
        self.blanks, self._not_after, self._only_after = blanks, not_after, only_after
        self._is_letter = lru_cache(maxsize=1 << 16)(self._may_precede)

    def pieces(self, text: str, longest: int) -> Iterator[str]:
        """The text in pieces of at most `longest` characters. A piece is longer where it contains no cut, and a text
        without cuts is one piece."""
        start = 0
        while len(text) - start > longest and (cut := self._last(text, start, start + longest)):
            yield text[start:cut]
            start = cut
        yield text[start:]

    def _last(self, text: str, start: int, limit: int) -> int:
        """The last cut after `start` and up to `limit`, else the first cut after `limit`; 0 where there is none."""
        cut = max((self._before(text, blank, start, limit) for blank in self.blanks), default=0)
        later = [at for blank in self.blanks if not cut and (at := self._after(text, blank, limit))]
        return cut or min(later, default=0)

    def _before(self, text: str, blank: str, start: int, limit: int) -> int:
        at = text.rfind(blank, start + 1, limit + 1)
        while at > 0 and not self._is_letter(text[at - 1]):
            at = text.rfind(blank, start + 1, at)
        return max(at, 0)

    def _after(self, text: str, blank: str, limit: int) -> int:
        at = text.find(blank, limit)
        while at > 0 and not self._is_letter(text[at - 1]):
            at = text.find(blank, at + 1)
        return max(at, 0)

    def _may_precede(self, letter: str) -> bool:
        if letter in self._not_after or (self._only_after is not None and letter not in self._only_after):
            return False
        # The character must be a letter or digit since Unicode 3.2, so that every library agrees, and no normal form
        # may decompose it. U+0D4E is excluded: it is the only such letter that joins the next character in a grapheme.
        known = unicodedata.ucd_3_2_0.category(letter) in ("Lu", "Ll", "Lo", "Nd") and letter <= "\uffff"
        return known and unicodedata.is_normalized("NFKD", letter) and letter != "\u0d4e"


def cutter(tokenizer: str) -> Cutter:
    """The `Cutter` for the tokenizer whose tokenizer.json has the content `tokenizer`."""
    content: dict[str, Any] = json.loads(tokenizer)
    try:
        return _cutter(content)
    except _Unknown:
        return Cutter("")


def _cutter(content: dict[str, Any]) -> Cutter:
    normalizers = _flat(content["normalizer"], "normalizers")
    blank, blanks = " ", " \n"
    for normalizer in normalizers:
        blank, blanks = _normalized(normalizer, blank, blanks)
    splits, blank, blanks = _pre_tokenized(_flat(content["pre_tokenizer"], "pretokenizers"), blank, blanks)
    if content["model"].get("dropout"):
        raise _Unknown
    not_after = _ends(content["added_tokens"], normalizers)
    if not splits:
        return Cutter(" ", not_after=not_after, only_after=_never_joined(content["model"], normalizers, blank))
    # sentencepiece's normalizer (`Precompiled`) maps whole graphemes. A grapheme always ends between two ASCII
    # characters, hence only ASCII letters before the cut.
    by_grapheme = any(part["type"] == "Precompiled" for part in normalizers)
    return Cutter(blanks, not_after=not_after, only_after=_ASCII if by_grapheme else None)


def _flat(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The members of a `Sequence`, nested ones included; a list of `part` alone for any other type."""
    if part is None:
        return []
    return [inner for each in part[key] for inner in _flat(each, key)] if part["type"] == "Sequence" else [part]


def _normalized(part: dict[str, Any], blank: str, blanks: str) -> tuple[str, str]:
    """The character into which a normalizer turns the space after the cut, and the blanks that may still follow a cut.

    Args:
        part: the normalizer.
        blank: the character that earlier normalizers made of the space.
        blanks: the blanks that may follow a cut so far.

    Raises:
        _Unknown: the normalizer may not map the two sides of a cut independently.
    """
    kind = part["type"]
    if kind in _LOCAL or (kind == "Strip" and not part["strip_left"]):
        return blank, blanks
    if kind == "Precompiled":
        return blank, " "
    if kind != "Replace":
        raise _Unknown
    [(how, pattern)], content = part["pattern"].items(), part["content"]
    if how == "String" and pattern == blank == " " and content == _BLANK:
        return _BLANK, " "
    if how == "Regex" and pattern in _BLANKS and content in (" ", _BLANK):
        return blank, " "
    blank_ones = any(c.isspace() or c == _BLANK for c in pattern + content)
    if how == "Regex" or blank_ones or any(c.isalnum() for c in pattern):
        raise _Unknown
    return blank, blanks


def _pre_tokenized(parts: list[dict[str, Any]], blank: str, blanks: str) -> tuple[bool, str, str]:
    """Whether the pre-tokenizer splits at the cut, the character that it makes of the space after the cut, and the
    blanks that may follow a cut.

    Raises:
        _Unknown: a rule may look across the cut.
    """
    splits = False
    for part in parts:
        kind = part["type"]
        if kind == "Metaspace" and part["replacement"] == _BLANK:
            # Metaspace adds a space to a piece that begins with a line feed, but not to one that begins with a space.
            blanks = blanks if splits else " "
            blank, splits = _BLANK, splits or part.get("split", True)
        elif splits:
            # The text is already split at the cut; later rules split each part further, independently of the others.
            continue
        elif kind == "ByteLevel" and blank == " ":
            blanks = " " if part["add_prefix_space"] else blanks
            blank, splits = "Ġ", part.get("use_regex", True)
        elif kind in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer") and blank == " ":
            splits = True
        elif kind == "Split" and blank == " " and "Regex" in part["pattern"]:
            found = _alternatives(part["pattern"]["Regex"])
            if not found <= _ALTERNATIVES or part["behavior"] not in ("Isolated", "Removed"):
                raise _Unknown
            splits = r"\s+" in found
        elif kind not in ("Digits", "Punctuation") and not (
            # The normalizer has replaced all spaces, so this rule never matches.
            kind == "Split" and blank == _BLANK and part["pattern"] == {"String": " "}
        ):
            raise _Unknown
    return splits, blank, blanks


def _alternatives(pattern: str) -> set[str]:
    """The alternatives of a regular expression at its outermost level."""
    found, depth, in_class = [""], 0, False
    # Some tokenizers write a line feed as the character itself, others as \n.
    for symbol in re.findall(r"\\.|.", pattern.replace("\r", r"\r").replace("\n", r"\n")):
        in_class = (in_class or symbol == "[") and symbol != "]"
        depth += 0 if in_class else (symbol == "(") - (symbol == ")")
        if symbol == "|" and not depth and not in_class:
            found.append("")
        else:
            found[-1] += symbol
    return set(found)


def _ends(added: list[dict[str, Any]], normalizers: list[dict[str, Any]]) -> frozenset[str]:
    """The last letters of the added tokens, in upper and lower case.

    Raises:
        _Unknown: an added token may span a cut, or its match depends on the letter before it.
    """
    for token in added:
        content, normalized = token["content"], token["normalized"] and bool(normalizers)
        reaches = any(
            one.isalnum() and (two.isspace() or (two == _BLANK and normalized)) for one, two in pairwise(content)
        )
        looks_back = token["single_word"] and content[:1].isspace()
        if reaches or looks_back or (normalized and not content.isascii()):
            raise _Unknown
    last = {token["content"][-1] for token in added if token["content"]}
    return frozenset(form for letter in last for form in (letter, letter.lower(), letter.upper()))


def _never_joined(model: dict[str, Any], normalizers: list[dict[str, Any]], blank: str) -> frozenset[str]:
    """The letters that a BPE never merges with a following blank, although both sides of the cut are one pre-token.

    Raises:
        _Unknown: the model is no BPE, or does not work by merges of characters alone.
    """
    others = any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"))
    replaces = all(part["type"] == "Replace" and "String" in part["pattern"] for part in normalizers)
    if model["type"] != "BPE" or others or not replaces or blank not in model["vocab"]:
        raise _Unknown
    joined = {token[at - 1] for token in model["vocab"] for at in range(1, len(token)) if token[at] == blank}
    # Only letters that are tokens themselves count: a BPE splits any other letter into bytes, or into unknown tokens,
    # which it joins. In a byte-level vocabulary ("Ġ") only ASCII letters stand for themselves.
    letters = {token for token in model["vocab"] if len(token) == 1 and (blank != "Ġ" or token in _ASCII)}
    return frozenset(letters - joined)
