"""Where a model family keeps its parts inside its Hugging Face class."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Module paths inside a Hugging Face causal language model class."""

    model_type: str
    """`model_type` of its Hugging Face config."""
    config_class: str
    model_class: str
    """Class names in `transformers`."""
    embedding: str
    layers: str
    norm: str
    head: str
    rotary: str


LLAMA = Family(
    model_type="llama",
    config_class="LlamaConfig",
    model_class="LlamaForCausalLM",
    embedding="model.embed_tokens",
    layers="model.layers",
    norm="model.norm",
    head="lm_head",
    rotary="model.rotary_emb",
)

FAMILIES = {family.model_type: family for family in (LLAMA,)}
