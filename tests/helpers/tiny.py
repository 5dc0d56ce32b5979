"""A model of some thousand parameters, its batches, and the dense process that every layout must equal."""

from typing import Any

import numpy as np

from stack.config.schema import Config
from stack.data.batches import Batch

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
STEPS = 3


def tiny_config(**settings: Any) -> Config:
    """The tiny run; settings are dotted paths with `__` for the dot, e.g. parallel__zero=1."""
    cfg = Config()
    cfg.model.config = dict(SHAPE)
    cfg.data.seq_len, cfg.data.vocab_size = 16, SHAPE["vocab_size"]
    cfg.batch.global_size, cfg.batch.micro_size = 8, 1
    cfg.optim.lr, cfg.optim.grad_clip = 1e-2, 0.5
    # Near the size of the gradients: AdamW then shows a wrong scale, and does not blow rounding up where they are ~0.
    cfg.optim.eps = 1e-3
    cfg.log.wandb.mode = "disabled"
    for path, value in settings.items():
        section, key = path.split("__")
        if section == "shape":
            cfg.model.config[key] = value
        else:
            setattr(getattr(cfg, section), key, value)
    return cfg


def global_batch(cfg: Config, step: int, *, padded: bool) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and shifted labels [global_size, seq_len] of a step; padded sequences end anywhere."""
    rng = np.random.default_rng([7, step])
    size, length = cfg.batch.global_size, cfg.data.seq_len
    tokens = rng.integers(0, cfg.model.config["vocab_size"], (size, length + 1))
    ids, labels = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    if padded:
        for row, kept in enumerate(rng.integers(1, length + 1, size)):
            labels[row, kept:] = -100
            ids[row, kept:] = 0
    return ids, labels


def replica_batch(cfg: Config, step: int, *, replica: int, replicas: int, padded: bool) -> Batch:
    """A replica's contiguous part of the global batch, cut into microbatches."""
    ids, labels = global_batch(cfg, step, padded=padded)
    part = slice(replica * len(ids) // replicas, (replica + 1) * len(ids) // replicas)
    shape = (-1, cfg.batch.micro_size, cfg.data.seq_len)
    return Batch(
        input_ids=ids[part].reshape(shape),
        labels=labels[part].reshape(shape),
        global_target_tokens=int((labels != -100).sum()),
    )
