"""The tokenizer of a corpus: a byte-level BPE learnt from the corpus, or any Hugging Face tokenizer."""

import hashlib
import heapq
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stack.config.schema import Data
from stack.data import hub
from stack.data.documents import one_line
from stack.data.encoder import Encoder
from stack.disk import is_inside, read_regular
from stack.errors import DataError

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerBase

END_OF_DOCUMENT = "<|endoftext|>"

#: The BPE is learnt from a sample of SAMPLE_CHARS characters out of the first SAMPLE_WINDOW characters, with at most
#: SAMPLE_DOCUMENT characters of one document.
SAMPLE_CHARS = 16 << 20
SAMPLE_WINDOW = 1 << 30
SAMPLE_DOCUMENT = 1 << 18

#: Files that hold a tokenizer's vocabulary, and files with more settings of it. Nothing else of a model folder is read,
#: since the folder may also hold 100 GB of weights.
_VOCABULARY_FILES = re.compile(r"(tokenizer|vocab)\.json|vocab\.txt|.*\.(model|tiktoken)")
_OTHER_FILES = re.compile(r"(tokenizer_config|special_tokens_map|added_tokens|config)\.json|merges\.txt")
#: Files that `save_pretrained` writes for tokenizers of all classes.
_SAVED = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|"
    r"[\w.-]+\.(model|tiktoken)|chat_template\.(jinja|json)|additional_chat_templates/[\w.-]+\.jinja"
)


def describe(cfg: Data) -> dict[str, Any]:
    """A description of the tokenizer that `data.tokenizer` names, as JSON: its part of the corpus fingerprint.

    A folder is described by a hash of its tokenizer files, a hub tokenizer by its name. Imports no library.
    Raises `DataError` where `data.tokenizer` is a path that does not exist or a folder without a tokenizer.
    """
    if cfg.tokenizer == "bpe":
        return {"kind": "bpe", "vocab_size": cfg.vocab_size, "sample_chars": SAMPLE_CHARS}
    folder = Path(cfg.tokenizer).expanduser()
    if not folder.is_dir():
        if folder.is_file() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", cfg.tokenizer):
            raise DataError(f"data.tokenizer={cfg.tokenizer} is not a folder; use a tokenizer folder, a name, or bpe")
        return {"kind": "hub", "name": cfg.tokenizer}
    if not has_tokenizer(folder):
        raise DataError(f"data.tokenizer={cfg.tokenizer} holds no tokenizer.json; save a tokenizer there, or use bpe")
    names = sorted(path.name for path in folder.iterdir())
    files = [folder / name for name in names if _VOCABULARY_FILES.fullmatch(name) or _OTHER_FILES.fullmatch(name)]
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        try:
            content = read_regular(file)
        except OSError as error:
            raise DataError(
                f"data.tokenizer={cfg.tokenizer}: {file.name} cannot be read ({error.strerror}); copy it again"
            ) from error
        digest.update(f"{file.name}\0{len(content)}\0".encode() + content)
    return {"kind": "folder", "content": digest.hexdigest()}


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer's vocabulary file."""
    return any(path.is_file() and _VOCABULARY_FILES.fullmatch(path.name) for path in folder.iterdir())


def load_or_train(cfg: Data, texts: Iterable[str], folder: Path) -> Encoder:
    """The tokenizer that `cfg` asks for, also saved to `folder` for `AutoTokenizer.from_pretrained(folder)`.

    `texts` is read only to learn a BPE, and at most `SAMPLE_WINDOW` characters of it. The same texts give the same BPE.

    Raises:
        DataError: there is too little text for `data.vocab_size`, or the tokenizer cannot be loaded or has no
            end-of-sequence token.
    """
    hf = _train(cfg.vocab_size, sample(texts)) if cfg.tokenizer == "bpe" else load(cfg.tokenizer)
    if hf.eos_token_id is None:
        raise DataError(
            f"data.tokenizer={cfg.tokenizer} has no eos_token to end a document with; set eos_token in its "
            "tokenizer_config.json, or use data.tokenizer=bpe"
        )
    hf.save_pretrained(folder)
    return Encoder(hf, special_tokens=cfg.special_tokens)


def copy_tokenizer(folder: Path, out: Path) -> None:
    """Copies the tokenizer files of a prepared corpus from `folder` to `out`, and no other files of the folder.

    The copy goes into an export, which users give to others. Links out of the folder are refused, because a corpus
    from elsewhere may contain a link to a private file of this user.

    Raises:
        DataError: a tokenizer file is a link that leads out of the folder.
        OSError: the folder does not exist or cannot be copied.
    """
    root = folder.resolve(strict=True)
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not _SAVED.fullmatch(name.as_posix()):
            continue
        if not is_inside(path, root):
            raise DataError(f"{path} is a link that leads out of the tokenizer's folder; put the file itself there")
        if path.is_file():
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, out / name)


def sample(texts: Iterable[str]) -> list[str]:
    """About `SAMPLE_CHARS` characters out of the first `SAMPLE_WINDOW`, in documents chosen by a hash of their number.

    Documents are cut to `SAMPLE_DOCUMENT` characters and stay in the order of `texts`. A small `texts` is taken whole.
    Holds no more than the sample in memory.
    """
    kept: list[tuple[int, int, str]] = []  # a heap whose first entry has the largest hash
    kept_chars = seen_chars = 0
    for number, text in enumerate(texts):
        text = text[:SAMPLE_DOCUMENT]
        priority = int.from_bytes(hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8).digest(), "little")
        heapq.heappush(kept, (-priority, number, text))
        kept_chars += len(text)
        seen_chars += len(text)
        while kept_chars - len(kept[0][2]) >= SAMPLE_CHARS:
            kept_chars -= len(heapq.heappop(kept)[2])
        if seen_chars >= SAMPLE_WINDOW:
            break
    return [text for _, _, text in sorted(kept, key=lambda entry: entry[1])]


def _train(vocab_size: int, texts: list[str]) -> "PreTrainedTokenizerBase":
    from transformers import PreTrainedTokenizerFast

    bpe = _byte_level_bpe(vocab_size, texts)
    if bpe.get_vocab_size() != vocab_size:
        raise DataError(
            f"data.vocab_size={vocab_size} cannot be learnt from {sum(map(len, texts))} characters of text; "
            f"use data.vocab_size={bpe.get_vocab_size()}, or more text"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_DOCUMENT,
        pad_token=END_OF_DOCUMENT,
        clean_up_tokenization_spaces=False,
    )


def _byte_level_bpe(vocab_size: int, texts: list[str]) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    bpe = Backend(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # no merge for a pair that occurs only once
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def load(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder or hub name.

    Raises:
        DataError: the tokenizer cannot be loaded, or needs Python code of its own.
    """
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    is_local = folder.is_dir()
    from_cache = is_local or not hub.reachable()
    try:
        # By default transformers would ask on the terminal whether to run code that comes with a tokenizer.
        return AutoTokenizer.from_pretrained(
            folder if is_local else name, local_files_only=from_cache, trust_remote_code=False
        )
    except Exception as error:  # the Rust library raises plain Exception
        reason, advice = one_line(error), "use a tokenizer folder, or data.tokenizer=bpe"
        if "trust_remote_code" in str(error):
            reason = "it needs Python code of its own, and code that comes with a tokenizer is never run here"
            advice = "save it as a tokenizer.json where you trust it"
        elif not is_local and from_cache:
            reason = f"it is no folder here, it is not in the local cache, and {hub.endpoint()} cannot be reached"
        raise DataError(f"data.tokenizer={name} cannot be loaded: {reason}; {advice}") from error
