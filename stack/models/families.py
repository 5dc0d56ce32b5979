"""Describes the modules of each Hugging Face model class that `stack` can split into pipeline stages.

docs/add-a-family.md says how to add a class.
"""

from dataclasses import dataclass

from transformers import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """Names inside a model class. Every stage runs the class's own forward, with stand-ins for the modules of other
    stages. `before`, `layers` and `after` count only where the class has no `base_model_pp_plan`."""

    before: tuple[str, ...] = ("embed_tokens",)
    """Modules of the base model ahead of the decoder layers; the first one embeds the tokens."""
    layers: str = "layers"
    """The module list of the decoder layers."""
    after: tuple[str, ...] = ("norm",)
    """Modules between the decoder layers and the head."""
    added: tuple[str, ...] = ()
    """Modules of `before` whose output the forward adds to the hidden states. Their stand-ins on later stages return
    zero."""
    multipliers: tuple[str, ...] = ()
    """Attributes of the base model by which its forward multiplies the embeddings. They are set to 1 on later
    stages."""


#: By `model_type` of the Hugging Face config.
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma2": Family(),
    "gemma3_text": Family(),
    "phi3": Family(),
    "olmo2": Family(),
    "gpt_neox": Family(),
    "gpt2": Family(before=("wte", "wpe", "drop"), layers="h", after=("ln_f",), added=("wpe",)),
    "granite": Family(multipliers=("embedding_multiplier",)),
    "smollm3": Family(),
    "cohere": Family(),
    "mixtral": Family(),
    "qwen3_moe": Family(),
    "olmoe": Family(),
}


@dataclass(frozen=True)
class Parts:
    """Module paths inside one model, in the order of the forward."""

    before: tuple[str, ...]
    layers: str
    after: tuple[str, ...]
    head: str
    added: tuple[str, ...]

    @property
    def embedding(self) -> str:
        """Path of the token embedding."""
        return self.before[0]


def parts_of(model: PreTrainedModel) -> Parts:
    """The module paths of `model`, from the class's `base_model_pp_plan` or else from `FAMILIES`."""
    family = FAMILIES[model.config.model_type]
    before, layers, after = family.before, family.layers, family.after
    if plan := model.config.base_model_pp_plan:
        names = list(plan)
        cut = names.index("layers")
        before, layers, after = tuple(names[:cut]), "layers", tuple(names[cut + 1 :])

    def inside(name: str) -> str:
        return f"{model.base_model_prefix}.{name}"

    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    return Parts(
        before=tuple(map(inside, before)),
        layers=inside(layers),
        after=tuple(map(inside, after)),
        head=head,
        added=tuple(map(inside, family.added)),
    )
