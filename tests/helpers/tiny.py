"""The tiny model of the tests, with some thousand parameters, and its batches."""

import functools
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

_MIXTURE = {"shape__num_experts_per_tok": 2, "shape__router_aux_loss_coef": 0.1}
#: Settings of each family's tiny model in addition to `SHAPE`, so that all parts in which it differs from Llama are
#: used.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"shape__sliding_window": 6},
    "qwen2": {},
    "qwen3": {"shape__head_dim": 8},
    "gemma2": {
        "model__attention": "eager", "shape__head_dim": 8, "shape__sliding_window": 6,
        "shape__query_pre_attn_scalar": 8,
    },
    "gemma3_text": {"shape__head_dim": 8, "shape__sliding_window": 6},
    "phi3": {},
    "olmo2": {},
    "gpt_neox": {"shape__num_key_value_heads": None},
    "gpt2": {
        "shape__intermediate_size": None, "shape__num_key_value_heads": None,
        "shape__resid_pdrop": 0.0, "shape__embd_pdrop": 0.0, "shape__attn_pdrop": 0.0,
    },
    "granite": {
        "shape__embedding_multiplier": 3.0, "shape__logits_scaling": 0.5,
        "shape__residual_multiplier": 0.5, "shape__attention_multiplier": 0.3,
    },
    "smollm3": {},
    "cohere": {"shape__logit_scale": 1.5},
    "mixtral": {**_MIXTURE, "shape__num_local_experts": 4},
    "qwen3_moe": {**_MIXTURE, "shape__num_experts": 4, "shape__moe_intermediate_size": 24, "shape__head_dim": 8},
    "olmoe": {**_MIXTURE, "shape__num_experts": 4},
}  # fmt: skip


def family_settings(family: str, *, tied: bool) -> dict[str, Any]:
    """Settings of `tiny_config` for the tiny model of a family. `tied` is required, since classes have different
    defaults."""
    return {"model__name": family, "shape__tie_word_embeddings": tied, **FAMILIES[family]}


def tiny_config(**settings: Any) -> Config:
    """The config of the tiny run. A setting is the path of a key with `__` for each dot, e.g. parallel__zero=1."""
    cfg = Config()
    cfg.model.config = dict(SHAPE)
    cfg.data.seq_len, cfg.data.vocab_size, cfg.data.tokenizer = 16, SHAPE["vocab_size"], "bpe"
    cfg.batch.global_size, cfg.batch.micro_size = 8, 1
    cfg.optim.lr, cfg.optim.grad_clip = 3e-3, 0.5
    # About the size of the gradients. With a smaller eps AdamW would hide a wrong scale of the gradients, and amplify
    # rounding where they are nearly 0.
    cfg.optim.eps = 1e-3
    cfg.log.wandb.mode = "disabled"
    for path, value in settings.items():
        section, key = path.split("__", 1)
        if section == "shape":
            if value is None:
                # None removes a key that the family does not have.
                del cfg.model.config[key]
            else:
                cfg.model.config[key] = value
        else:
            *inner, key = key.split("__")
            setattr(functools.reduce(getattr, inner, getattr(cfg, section)), key, value)
    return cfg


def global_batch(cfg: Config, step: int, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, shifted labels and positions of a step, each int64 [global_size, seq_len].

    `kind` is one of: `full`, every position has a target; `padded`, sequences have random lengths; `packed`, documents
    begin at random places, and the last token of a document has no target.
    """
    rng = np.random.default_rng([7, step])
    size, length = cfg.batch.global_size, cfg.data.seq_len
    tokens = rng.integers(0, cfg.model.config["vocab_size"], (size, length + 1))
    ids, labels = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    positions = np.broadcast_to(np.arange(length), ids.shape).copy()
    if kind == "padded":
        for row, kept in enumerate(rng.integers(1, length + 1, size)):
            labels[row, kept:] = -100
            ids[row, kept:] = 0
    elif kind == "packed":
        for row, starts in enumerate(rng.integers(1, length, (size, 2))):
            for start in sorted(starts):
                positions[row, start:] = np.arange(length - start)
                labels[row, start - 1] = -100
    else:
        assert kind == "full"
    return ids, labels, positions


def replica_batch(cfg: Config, step: int, *, replica: int, replicas: int, kind: str) -> Batch:
    """The contiguous part of a replica of the global batch, cut into microbatches."""
    whole = global_batch(cfg, step, kind)
    size = cfg.batch.global_size
    part = slice(replica * size // replicas, (replica + 1) * size // replicas)
    shape = (-1, cfg.batch.micro_size, cfg.data.seq_len)
    ids, labels, positions = (values[part].reshape(shape) for values in whole)
    return Batch(ids, labels, positions, global_target_tokens=int((whole[1] != -100).sum()))
