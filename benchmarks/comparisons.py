"""The comparisons of `benchmarks.run`. A goal is a ratio of tokens/s; 0 means that the setting has no goal."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One setting of ours, and the ratio to the peer that it should reach.

    cfg: overrides of our config, as `section.key=value`.
    """

    cfg: tuple[str, ...]
    goal: float = 0.0

    @property
    def arguments(self) -> tuple[str, ...]:
        return ("--cfg", *self.cfg)


@dataclass(frozen=True)
class Comparison:
    """Settings of ours against one peer on the same number of ranks.

    peer: module of the peer in `benchmarks.contestants`, then its arguments.
    """

    name: str
    about: str
    ranks: int
    ours: dict[str, Entry]
    peer: tuple[str, ...]


_PP1 = ("parallel.pipeline=1",)
_PP2 = ("parallel.pipeline=2",)
#: The PipelineEngine's split of the small model, set for ours because both must have the same split. Our planner would
#: choose another split with the same cost.
_PP4 = ("parallel.pipeline=4", "parallel.split=[0,3,5,7]")
_ZERO1, _ZERO2, _ZERO3 = (f"parallel.zero={stage}" for stage in (1, 2, 3))
_REDUCE, _GATHER = "parallel.reduce=microbatch", "parallel.gather=microbatch"
_COMPILE = "precision.compile=true"

_PLAIN_ZERO3 = Comparison(
    name="plain_zero3",
    about="pp1 x dp2: our ZeRO-3 against the plain DeepSpeed ZeRO-3 loop.",
    ranks=2,
    ours={
        "zero3": Entry((*_PP1, _ZERO3), goal=1.3),
        "zero3, least memory": Entry((*_PP1, _ZERO3, _REDUCE, _GATHER)),
    },
    peer=("plain_zero3",),
)

_HF_TRAINER = Comparison(
    name="hf_trainer",
    about="pp1 x dp2: our ZeRO-3 against Hugging Face's Trainer with DeepSpeed ZeRO-3 and its sizes on auto.",
    ranks=2,
    ours={"zero3": Entry((*_PP1, _ZERO3), goal=1.3)},
    peer=("hf_trainer",),
)

_HF_TRAINER_TUNED = Comparison(
    name="hf_trainer_tuned",
    about="pp1 x dp2: our ZeRO-3 against Hugging Face's Trainer with the ZeRO-3 settings of the plain loop.",
    ranks=2,
    ours={"zero3": Entry((*_PP1, _ZERO3))},
    peer=("hf_trainer", "--tuned"),
)

_FSDP2 = Comparison(
    name="fsdp2",
    about="pp1 x dp2: our ZeRO-3 against PyTorch's FSDP2, which gathers in each microbatch and reduces once a step.",
    ranks=2,
    ours={
        "zero3": Entry((*_PP1, _ZERO3)),
        "zero3, gather=microbatch": Entry((*_PP1, _ZERO3, _GATHER)),
        "zero3, least memory": Entry((*_PP1, _ZERO3, _REDUCE, _GATHER)),
    },
    peer=("fsdp2",),
)

_PIPELINE_ENGINE_PP2 = Comparison(
    name="pipeline_engine_pp2",
    about="pp2 x dp2: ours against DeepSpeed's PipelineEngine with ZeRO-1, the highest stage that it supports.",
    ranks=4,
    ours={
        "zero1": Entry((*_PP2, _ZERO1)),
        "zero1, compiled": Entry((*_PP2, _ZERO1, _COMPILE), goal=1.1),
        "zero2": Entry((*_PP2, _ZERO2)),
        "zero3": Entry((*_PP2, _ZERO3)),
        "zero3, compiled": Entry((*_PP2, _ZERO3, _COMPILE), goal=1.05),
        "zero3, least memory": Entry((*_PP2, _ZERO3, _REDUCE, _GATHER), goal=0.75),
    },
    peer=("pipeline_engine",),
)

_PIPELINE_ENGINE_PP4 = Comparison(
    name="pipeline_engine_pp4",
    about="pp4: ours against DeepSpeed's PipelineEngine with ZeRO-1.",
    ranks=4,
    ours={
        "zero1": Entry((*_PP4, _ZERO1)),
        "zero1, compiled": Entry((*_PP4, _ZERO1, _COMPILE), goal=1.1),
        "zero3": Entry((*_PP4, _ZERO3)),
        "zero3, compiled": Entry((*_PP4, _ZERO3, _COMPILE), goal=1.05),
        "zero3, least memory": Entry((*_PP4, _ZERO3, _REDUCE, _GATHER), goal=0.75),
    },
    peer=("pipeline_engine", "--stages", "4"),
)

_PIPELINE_ENGINE_COMPILED = Comparison(
    name="pipeline_engine_compiled",
    about="pp2 x dp2: ours against DeepSpeed's PipelineEngine, both with compiled decoder layers.",
    ranks=4,
    ours={
        "zero1, compiled": Entry((*_PP2, _ZERO1, _COMPILE)),
        "zero3, compiled": Entry((*_PP2, _ZERO3, _COMPILE)),
    },
    peer=("pipeline_engine", "--compile"),
)

_ABLATION = Comparison(
    name="ablation",
    about="pp2 x dp2: our ZeRO-3 with one key changed against our ZeRO-3 with defaults.",
    ranks=4,
    ours={
        key: Entry((*_PP2, _ZERO3, key))
        for key in (
            _COMPILE,
            "kernels.loss=logits",
            "optim.fused=false",
            "parallel.overlap=false",
            "activation.checkpoint=full",
            _REDUCE,
            _GATHER,
        )
    }
    | {"gather=microbatch, overlap=false": Entry((*_PP2, _ZERO3, _GATHER, "parallel.overlap=false"))},
    peer=("ours", "--cfg", *_PP2, _ZERO3),
)

_TORCH_PIPELINE = Comparison(
    name="torch_pipeline",
    about="pp2 x dp2: our ZeRO-3 against 1F1B of torch's pipelining over FSDP2, which keeps gathered parameters.",
    ranks=4,
    ours={
        "zero3": Entry((*_PP2, _ZERO3)),
        "zero3, compiled": Entry((*_PP2, _ZERO3, _COMPILE)),
    },
    peer=("torch_pipeline",),
)

_TORCH_PIPELINE_RESHARD = Comparison(
    name="torch_pipeline_reshard",
    about="pp2 x dp2: ours against 1F1B over FSDP2. Both gather in each microbatch; FSDP2 reduces once a step.",
    ranks=4,
    ours={
        "zero3, gather=microbatch": Entry((*_PP2, _ZERO3, _GATHER)),
        "zero3, least memory": Entry((*_PP2, _ZERO3, _REDUCE, _GATHER)),
    },
    peer=("torch_pipeline", "--reshard"),
)

COMPARISONS = {
    comparison.name: comparison
    for comparison in (
        _PLAIN_ZERO3,
        _HF_TRAINER,
        _HF_TRAINER_TUNED,
        _FSDP2,
        _PIPELINE_ENGINE_PP2,
        _PIPELINE_ENGINE_PP4,
        _PIPELINE_ENGINE_COMPILED,
        _ABLATION,
        _TORCH_PIPELINE,
        _TORCH_PIPELINE_RESHARD,
    )
}
