"""Small tokenizers of many kinds, and texts that they tokenize differently."""

import random
import tempfile
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: As published, with unescaped line feeds.
DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
    "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
WORDS = [
    *("the", "small", "house", "With", "ROOMS", "2025", "77", "a1b2", "don't", "we'LL", "naïve", "e\u0301a", "Straße"),
    *("日本語", "東京に", "привет", "é", "İx", "🙂", "ﬁne", "½x", "x\u0600", "ำa", "n", "``q''", "..", "!", "/", "(x)"),
    *(
        "é\n",
        "é\n",
        "end.\n",
        "end.\n",
        "!\n",
        "<s>",
        "</s>",
        "<sep>",
        "[MASK]",
        "<user>",
        "zebra",
        "x y",
        "x<s>",
        "▁",
        "a▁b",
        "_",
    ),
]
BLANKS = [" ", " ", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n ", "\u00a0", "\u3000", "\x0b", ""]


def texts(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [
        "".join(draw.choice(WORDS) + draw.choice(BLANKS) for _ in range(draw.randrange(1, 60))) for _ in range(count)
    ]


TRAINING = texts(0, 150)


def build(model: str, *, normalizer=None, pre_tokenizer=None, added=(), **fields) -> Tokenizer:
    """A tokenizer learnt from `TRAINING`, with special and added tokens that use each flag."""
    specials = ["<unk>", "<s>", "</s>", "<sep>"]
    if model == "unigram":
        backend = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=250, special_tokens=specials, unk_token="<unk>", show_progress=False, **fields
        )
    elif model == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    elif model == "wordlevel":
        backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
        trainer = trainers.WordLevelTrainer(special_tokens=specials, show_progress=False)
    else:
        backend = Tokenizer(models.BPE(**fields))
        byte_level = "ByteLevel" in repr(pre_tokenizer)
        alphabet = pre.ByteLevel.alphabet() if byte_level else []
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=specials, initial_alphabet=sorted(alphabet), show_progress=False
        )
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
    backend.train_from_iterator(TRAINING, trainer)
    backend.add_special_tokens([AddedToken("[MASK]", lstrip=True, rstrip=True), AddedToken("<sep>", single_word=True)])
    backend.add_tokens([AddedToken("<user>", normalized=True), AddedToken("zebra", rstrip=True), *added])
    return backend


def split(pattern: str, behavior: str = "isolated", *, invert: bool = False) -> pre.PreTokenizer:
    return pre.Split(Regex(pattern), behavior, invert)


def byte_level(*before: pre.PreTokenizer) -> pre.PreTokenizer:
    return pre.Sequence([*before, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


def metaspace(scheme: str, *, split: bool = True) -> pre.PreTokenizer:
    return pre.Metaspace(prepend_scheme=scheme, split=split)


def legacy_llama() -> Tokenizer:
    """A BPE over the whole text, with a normalizer that adds a blank at its beginning."""
    blanks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # The BPE is learnt from single words, as sentencepiece does, so that no token has a blank after a letter.
    backend = build("bpe", pre_tokenizer=metaspace("always"), unk_token="<unk>", fuse_unk=True)
    backend.normalizer, backend.pre_tokenizer = blanks, None
    return backend


def gemma(**fields) -> Tokenizer:
    backend = build("bpe", pre_tokenizer=metaspace("never"), unk_token="<unk>", **fields)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre.Split(" ", "merged_with_previous")
    return backend


def llama() -> Tokenizer:
    backend = build("bpe", pre_tokenizer=metaspace("never"), unk_token="<unk>", fuse_unk=True)
    backend.pre_tokenizer = metaspace("first", split=False)
    return backend


def sentencepiece(folder: Path, model_type: str) -> Path:
    """Writes a tokenizer.model without other files; its special tokens are ordinary pieces too."""
    from sentencepiece import SentencePieceTrainer

    # The trainer treats each line as a sentence.
    lines = [" ".join(text.split()) for text in TRAINING]
    with open(folder / "tokenizer.model", "wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=file,
            model_type=model_type,
            vocab_size=500,
            byte_fallback=model_type == "bpe",
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return folder / "tokenizer.model"


def precompiled() -> Tokenizer:
    """A tokenizer with sentencepiece's own normalizer, which maps graphemes, as in T5."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    with tempfile.TemporaryDirectory() as folder:
        model.ParseFromString(sentencepiece(Path(folder), "unigram").read_bytes())
    rules = normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
    normal = [rules, normalizers.Strip(left=False), normalizers.Replace(Regex(" {2,}"), "▁")]
    return build("unigram", normalizer=normalizers.Sequence(normal), pre_tokenizer=metaspace("always"))


#: Name -> (function that makes the tokenizer, whether its documents are cut into pieces).
KINDS: dict[str, tuple[Callable[[], Tokenizer], bool]] = {
    "gpt2": (lambda: build("bpe", pre_tokenizer=pre.ByteLevel(add_prefix_space=False)), True),
    "gpt2 with a space ahead": (lambda: build("bpe", pre_tokenizer=pre.ByteLevel(add_prefix_space=True)), True),
    "gpt4": (lambda: build("bpe", pre_tokenizer=byte_level(split(GPT4))), True),
    "llama3": (lambda: build("bpe", pre_tokenizer=byte_level(split(GPT4)), ignore_merges=True), True),
    "qwen": (lambda: build("bpe", normalizer=normalizers.NFC(), pre_tokenizer=byte_level(split(GPT4))), True),
    "gpt4o": (lambda: build("bpe", pre_tokenizer=byte_level(split(GPT4O, "removed", invert=True))), True),
    "deepseek": (
        lambda: build(
            "bpe",
            pre_tokenizer=byte_level(
                split(r"\p{N}{1,3}"), split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"), split(DEEPSEEK)
            ),
        ),
        True,
    ),
    "digits": (lambda: build("bpe", pre_tokenizer=pre.Sequence([pre.Digits(True), pre.ByteLevel(False)])), True),
    "falcon": (
        lambda: build("bpe", pre_tokenizer=pre.Sequence([pre.Punctuation("contiguous"), pre.ByteLevel(False)])),
        True,
    ),
    "merges over spaces": (lambda: build("bpe", pre_tokenizer=byte_level()), False),
    "unknown rule": (lambda: build("bpe", pre_tokenizer=byte_level(split(r"\w+ \w+|\s+"))), False),
    "rule that looks back": (lambda: build("bpe", pre_tokenizer=byte_level(split(r"(?<= )\w|\s+"))), False),
    "scripts": (lambda: build("unigram", pre_tokenizer=pre.UnicodeScripts()), False),
    "gemma": (gemma, True),
    "gemma by bytes": (lambda: gemma(byte_fallback=True), True),
    "gemma, whole words first": (lambda: gemma(ignore_merges=True), False),
    "llama": (llama, True),
    "llama of old": (legacy_llama, False),
    **{
        f"{model} {scheme}": (lambda model=model, scheme=scheme: build(model, pre_tokenizer=metaspace(scheme)), True)
        for model in ("unigram", "bpe")
        for scheme in ("always", "first", "never")
    },
    "unigram without words": (lambda: build("unigram", pre_tokenizer=metaspace("first", split=False)), False),
    "t5": (
        lambda: build("unigram", pre_tokenizer=pre.Sequence([pre.WhitespaceSplit(), metaspace("first")])),
        True,
    ),
    "sentencepiece's normalizer": (precompiled, True),
    "strips both": (lambda: build("unigram", normalizer=normalizers.Strip(), pre_tokenizer=metaspace("always")), False),
    "bert": (
        lambda: build("wordpiece", normalizer=normalizers.BertNormalizer(), pre_tokenizer=pre.BertPreTokenizer()),
        True,
    ),
    "words": (
        lambda: build("wordlevel", normalizer=normalizers.Lowercase(), pre_tokenizer=pre.Whitespace()),
        True,
    ),
    **{
        f"normal form {form}": (
            lambda form=form: build(
                "bpe", normalizer=getattr(normalizers, form)(), pre_tokenizer=byte_level(split(GPT4))
            ),
            True,
        )
        for form in ("NFC", "NFD", "NFKC", "NFKD")
    },
    "quotes": (
        lambda: build(
            "unigram",
            normalizer=normalizers.Sequence(
                [normalizers.Replace("``", '"'), normalizers.NFKD(), normalizers.Lowercase()]
            ),
            pre_tokenizer=metaspace("always"),
        ),
        True,
    ),
    "replaces letters": (
        lambda: build("bpe", normalizer=normalizers.Replace("e s", "€"), pre_tokenizer=pre.ByteLevel(False)),
        False,
    ),
    "replaces by a rule": (
        lambda: build("bpe", normalizer=normalizers.Replace(Regex("l+ "), "l"), pre_tokenizer=pre.ByteLevel(False)),
        False,
    ),
    "added token over a space": (
        lambda: build("bpe", pre_tokenizer=pre.ByteLevel(False), added=["small house"]),
        False,
    ),
    "added token that begins with a space": (
        lambda: build(
            "bpe", pre_tokenizer=pre.ByteLevel(False), added=["  ", " the", AddedToken("\n\n", normalized=False)]
        ),
        True,
    ),
}
