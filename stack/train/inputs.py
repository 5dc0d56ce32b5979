"""The batches of a run, from its prepared corpus: opened by the driver to refuse early, and by every rank to train."""

from pathlib import Path

from stack.config.schema import Config
from stack.data.batches import Batches, Corpus
from stack.errors import DataError
from stack.plan.layout import Plan


def open_batches(cfg: Config, plan: Plan, folder: Path) -> tuple[Batches, Batches]:
    """Training and held-out batches.

    Raises:
        DataError: the corpus is damaged, has more tokens in its vocabulary than the model, or is too short.
    """
    corpus = Corpus.open(folder)
    if corpus.vocab_size > plan.shape.vocab:
        raise DataError(
            f"model.config.vocab_size={plan.shape.vocab} is smaller than the tokenizer's {corpus.vocab_size}; "
            f"use model.config.vocab_size={corpus.vocab_size}"
        )
    training, heldout = (
        Batches(
            corpus.split(name),
            seq_len=plan.seq_len,
            pack=cfg.data.pack,
            seed=cfg.run.seed,
            global_size=plan.global_size,
            micro_size=plan.micro_size,
            replicas=plan.replicas,
        )
        for name in ("train", "heldout")
    )
    return training, heldout
