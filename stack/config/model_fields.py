"""What `model.config` accepts, per family.

The names are those of the family's config class in transformers 5, less the ones that pre-training from scratch does
not use. Rotary settings live in `rope_parameters` there; a `rope_theta` beside it would be overruled in silence, so
it is not offered.
"""

import json
from pathlib import Path
from typing import Any

from stack.config.values import Spec, closest, one_line, refuse

ROPE_FIELDS: dict[str, Spec] = {
    "rope_type": Spec(str, "default", choices=("default", "linear", "llama3")),
    "rope_theta": Spec(float, 500000.0, above=0),
    "factor": Spec(float, 8.0, low=1),
    "low_freq_factor": Spec(float, 1.0, above=0),
    "high_freq_factor": Spec(float, 4.0, above=0),
    "original_max_position_embeddings": Spec(int, 8192, low=1),
}

#: Keys that a rope_type needs. Any other key beside them but `rope_theta` is an error: transformers only warns.
_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

LLAMA_FIELDS: dict[str, Spec | dict[str, Spec]] = {
    "vocab_size": Spec(int, 128256, low=2),
    "hidden_size": Spec(int, 4096, low=1),
    "intermediate_size": Spec(int, 14336, low=1),
    "num_hidden_layers": Spec(int, 32, low=1),
    "num_attention_heads": Spec(int, 32, low=1),
    "num_key_value_heads": Spec(int, 8, nullable=True, low=1),
    "head_dim": Spec(int, 128, nullable=True, low=2),
    "max_position_embeddings": Spec(int, 8192, low=1),
    "rope_parameters": dict(ROPE_FIELDS),
    "hidden_act": Spec(str, "silu", choices=("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2")),
    "rms_norm_eps": Spec(float, 1e-5, above=0),
    "attention_bias": Spec(bool, False),
    "attention_dropout": Spec(float, 0.0, low=0, below=1),
    "mlp_bias": Spec(bool, False),
    "tie_word_embeddings": Spec(bool, False),
    "initializer_range": Spec(float, 0.02, above=0, high=1),
}

FAMILIES = ("llama",)


def check_model_name(name: str) -> None:
    """A family, or a folder whose config.json is of one.

    Raises:
        ConfigError: it is neither.
    """
    if name in FAMILIES:
        return
    if "/" not in name and not Path(name).exists():
        meant = closest(name, FAMILIES)
        hint = f"did you mean {meant}?" if meant else f"the families are {', '.join(FAMILIES)}"
        refuse("model.name", name, f"neither a family nor a folder; {hint}")
    try:
        fields = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        refuse("model.name", name, f"its config.json cannot be read ({error.strerror}); give a Hugging Face folder")
    except ValueError as error:
        refuse("model.name", name, f"its config.json is not JSON ({one_line(error)})")
    family = fields.get("model_type") if isinstance(fields, dict) else None
    if family not in FAMILIES:
        refuse("model.name", name, f"its config.json has model_type {family}; use one of {', '.join(FAMILIES)}")


def check_rope(rope: dict[str, Any]) -> None:
    """`model.config.rope_parameters` as a whole; each value is legal by now.

    Raises:
        ConfigError: a key that the rope_type needs is missing, or one is there that it does not read.
    """
    path = "model.config.rope_parameters"
    rope_type = rope.get("rope_type", "default")
    needs = _ROPE_NEEDS[rope_type]
    for key in needs:
        if key not in rope:
            refuse(path, rope, f"rope_type {rope_type} needs {key}; add {path}.{key}={ROPE_FIELDS[key].example:g}")
    for key, value in rope.items():
        if key not in {"rope_type", "rope_theta", *needs}:
            readers = ", ".join(kind for kind, keys in _ROPE_NEEDS.items() if key in keys)
            refuse(f"{path}.{key}", value, f"not read with rope_type {rope_type}, only with {readers}")
    if rope_type == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        low = rope["low_freq_factor"]
        refuse(f"{path}.high_freq_factor", rope["high_freq_factor"], f"must be above low_freq_factor={low:g}")
