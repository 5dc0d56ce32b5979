"""Opens the batches of a run from its prepared corpus: in the driver to refuse bad data early, and in every rank."""

from pathlib import Path
from typing import Any

from stack.config.families import FAMILIES
from stack.config.model_folder import local_folder, model_fields
from stack.config.schema import Config
from stack.data.batches import Batches
from stack.data.corpus import Corpus
from stack.data.manifest import locate
from stack.data.vocabulary import check_choice, check_vocabulary
from stack.errors import DataError
from stack.plan.layout import Plan


def open_batches(cfg: Config, plan: Plan, folder: Path, *, before: int = 0) -> tuple[Batches, Batches]:
    """Training and held-out batches.

    Args:
        cfg: the config.
        plan: the layout.
        folder: folder of the prepared corpus.
        before: sequences used before global batch 0, as in `Batches`.

    Raises:
        DataError: the corpus is damaged or too short, or its vocabulary is larger than the model's or differs from that
            of the pretrained model.
        LayoutError: as `Batches`.
    """
    check_choice(cfg)
    corpus = Corpus.open(folder)
    if cfg.model.init == "pretrained":
        check_vocabulary(folder, local_folder(cfg.model.name, weights=False))
    _check_rows(cfg, plan.shape.vocab, corpus)
    training, heldout = (
        Batches(
            corpus.split(name),
            seq_len=plan.seq_len,
            pack=cfg.data.pack,
            seed=cfg.run.seed,
            global_size=plan.global_size,
            micro_size=plan.micro_size,
            replicas=plan.replicas,
            before=before,
        )
        for name in ("train", "heldout")
    )
    return training, heldout


def sequences_of_epoch(cfg: Config, plan: Plan) -> int | None:
    """Number of training sequences in an epoch; None where the corpus is not prepared or does not fit the model."""
    try:
        training, _ = open_batches(cfg, plan, locate(cfg.data, seed=cfg.data.split_seed))
    except DataError:
        return None
    return training.num_sequences


def _check_rows(cfg: Config, rows: int, corpus: Corpus) -> None:
    """
    Raises:
        DataError: the model has fewer embedding rows than the corpus has token ids.
    """
    if corpus.vocab_size <= rows:
        return
    if cfg.model.init == "scratch":
        raise DataError(
            f"model.config.vocab_size={rows} is smaller than the tokenizer's {corpus.vocab_size}; "
            f"use model.config.vocab_size={corpus.vocab_size}"
        )
    name, size = cfg.model.name, corpus.vocab_size
    raise DataError(
        f"the weights of model.name={name} have {rows} rows, and the corpus made with data.tokenizer="
        f"{cfg.data.tokenizer} needs {size}; save weights with more rows in a new folder, and use that: python -c "
        f"\"from transformers import AutoModelForCausalLM as A; m = A.from_pretrained('{name}'); "
        f"m.resize_token_embeddings({size}); m.save_pretrained('NEW_FOLDER')\""
    )


def course(cfg: Config, folder: Path) -> dict[str, Any]:
    """The settings that may not change on a resume without `checkpoint.allow`: setting -> value. They are those of the
    model and those that decide which sequences a step sees. `data.source` also has the fingerprint of the corpus.

    Args:
        cfg: the config.
        folder: folder of the prepared corpus.
    """
    fields = model_fields(cfg.model)
    family = FAMILIES[fields["model_type"]]
    given = {"model_type": fields["model_type"], **family.defaults, **fields}
    return {
        **{f"model.config.{name}": given.get(name) for name in ("model_type", *family.fields)},
        "data.source": f"{cfg.data.source} ({Corpus.open(folder).manifest['fingerprint']})",
        "data.seq_len": cfg.data.seq_len,
        "data.pack": cfg.data.pack,
        "run.seed": cfg.run.seed,
        "batch.global_size": cfg.batch.global_size,
    }
