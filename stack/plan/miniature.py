"""Makes a tiny version of a run for `stack doctor`: the same layout, with a model of some thousand parameters."""

from dataclasses import replace
from typing import Any

from stack.config.families import FAMILIES
from stack.config.model_folder import model_fields
from stack.config.schema import Config, Data, Kernels, Log, Schedule, Wandb
from stack.plan.layout import Plan

STEPS = 3
_SEQ_LEN = 16
#: Larger than 257, the lower bound of `data.vocab_size`, and a multiple of 64, as kernels prefer.
_VOCAB = 320
#: Sizes of the tiny model, for the fields that its family has. There are several heads and experts, and the widths are
#: all different, so that mixing two of them up would show.
_SIZES: dict[str, Any] = {
    "vocab_size": _VOCAB,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "max_position_embeddings": 64,
    "sliding_window": 6,
    "max_window_layers": 1,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
#: Fields that are set to 0, because two runs would draw different random numbers for them.
_RANDOM = (
    *("attention_dropout", "hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"),
    "router_jitter_noise",
)
#: Fields that list every layer, or depend on the model's size. The tiny model has the family's defaults for them.
_OF_ITS_SIZE = ("layer_types", "no_rope_layers", "rope_parameters", "n_inner", "initializer_range")


def miniature(cfg: Config, plan: Plan) -> Config:
    """A config with the ranks, stages, ZeRO stage, schedule and policies of `cfg`, but a tiny model, tiny batches and
    fp32.

    Features that do not belong to the layout are switched off: compilation, Liger's and flash kernels, 8-bit gathers
    and dropout.

    Args:
        cfg: config of the run.
        plan: its layout.
    """
    family = FAMILIES[model_fields(cfg.model)["model_type"]]
    parallel = cfg.parallel
    # Twice as many microbatches as pipeline ranks, so that every schedule reaches its steady state.
    micro_size = min(cfg.batch.micro_size, 2)
    global_size = micro_size * plan.replicas * 2 * plan.pipeline
    return replace(
        cfg,
        model=replace(
            cfg.model,
            name=model_fields(cfg.model)["model_type"],
            config=_fields(cfg, plan),
            attention="sdpa" if family.sdpa else "eager",
            init="scratch",
        ),
        data=Data(seq_len=_SEQ_LEN, vocab_size=_VOCAB, tokenizer="bpe"),
        parallel=replace(parallel, split="auto", quantized_weights=False),
        batch=replace(cfg.batch, global_size=global_size, micro_size=micro_size),
        precision=replace(cfg.precision, dtype="fp32", compile=False),
        kernels=Kernels(loss=cfg.kernels.loss if cfg.kernels.loss != "liger" else "auto"),
        # With an eps of about the gradients' size, AdamW's update depends on the scale of the gradients, so a wrong
        # scale shows. A tiny eps would also amplify rounding errors.
        optim=replace(cfg.optim, lr=3e-3, eps=1e-3, grad_clip=min(cfg.optim.grad_clip, 0.5)),
        schedule=Schedule(kind="constant", warmup_steps=0),
        train=replace(cfg.train, steps=STEPS, eval_every=0),
        checkpoint=replace(cfg.checkpoint, every=0),
        log=Log(wandb=Wandb(mode="disabled")),
    )


def _fields(cfg: Config, plan: Plan) -> dict[str, Any]:
    """`model.config` of the tiny model: the configured fields, such as ties, biases and activation, with tiny sizes."""
    given = model_fields(cfg.model)
    family = FAMILIES[given["model_type"]]
    before = {**family.defaults, **given}
    kept = {name: value for name, value in given.items() if name in family.fields and name not in _OF_ITS_SIZE}
    # A field that is null, such as an unused sliding window, stays null.
    sizes = {name: size for name, size in _SIZES.items() if name in family.fields and before.get(name) is not None}
    kept |= sizes | {name: 0.0 for name in _RANDOM if name in family.fields}
    if "num_key_value_heads" in family.fields:
        grouped = before["num_key_value_heads"] not in (None, before["num_attention_heads"])
        kept["num_key_value_heads"] = 2 if grouped else 4
    # One layer more than stages, so that the stages are not all equal.
    kept["num_hidden_layers"] = plan.stages + 1
    return kept
