"""Rotary settings: checks `model.config.rope_parameters`, and reads the rotary settings of a folder's config.json.

transformers 5 keeps them in the section `rope_parameters`, transformers 4 in `rope_scaling` and in keys beside it.
`model.config` has the section only, because transformers silently ignores a `rope_theta` beside it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stack.config.values import Spec, refuse

SECTION = "rope_parameters"
#: Keys in which a config.json of transformers 4 may have rotary settings.
_OLD_KEYS = (
    *("rope_scaling", "rope_theta", "rope_local_base_freq"),
    *("rotary_emb_base", "rotary_pct", "partial_rotary_factor"),
)

_FACTOR = Spec(float, 8.0, low=1)
_FACTORS = Spec(float, [1.0], is_list=True, above=0)
_POSITIVE = Spec(float, 1.0, above=0)
ROPE: dict[str, Spec] = {
    "rope_type": Spec(str, "default", choices=("default", "linear", "dynamic", "yarn", "longrope", "llama3")),
    "rope_theta": Spec(float, 500000.0, above=0),
    "factor": _FACTOR,
    "original_max_position_embeddings": Spec(int, 8192, low=1, high=2**31),
    "low_freq_factor": _POSITIVE,
    "high_freq_factor": replace(_POSITIVE, example=4.0),
    "attention_factor": _POSITIVE,
    "beta_fast": replace(_POSITIVE, example=32.0),
    "beta_slow": _POSITIVE,
    "mscale": _POSITIVE,
    "mscale_all_dim": _POSITIVE,
    "truncate": Spec(bool),
    "short_factor": _FACTORS,
    "long_factor": _FACTORS,
}
PARTIAL = {"partial_rotary_factor": Spec(float, 0.25, above=0, high=1)}
#: Settings of Phi-3, whose only scaling is longrope's, by two lists of factors.
PHI_ROPE: dict[str, Spec] = {
    "rope_type": replace(ROPE["rope_type"], choices=("default", "longrope")),
    **{
        key: ROPE[key]
        for key in (
            *("rope_theta", "factor", "original_max_position_embeddings", "attention_factor"),
            *("short_factor", "long_factor"),
        )
    },
    **PARTIAL,
}

_LENGTH = "original_max_position_embeddings"
#: Keys that each rope_type requires (`_NEEDS`) and accepts (`_MAY`). Any other is an error; transformers only warns.
_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", _LENGTH),
    "longrope": ("short_factor", "long_factor", _LENGTH),
    "llama3": ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", _LENGTH),
}
_MAY: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor"),
}
_ALWAYS = ("rope_theta", "partial_rotary_factor", "rope_type")


def _reads(rope_type: str) -> tuple[str, ...]:
    return (*_NEEDS[rope_type], *_MAY.get(rope_type, ()))


def check_rope(rope: Mapping[str, Any], head_dim: int, path: str = f"model.config.{SECTION}") -> None:
    """Checks that rotary settings fit together, and each layer type's section of them if there are such sections.

    Args:
        rope: the settings. Each value has been checked by itself.
        head_dim: width of an attention head.
        path: dotted path of the settings, for messages.

    Raises:
        ConfigError: a key that the rope_type requires is missing, a key is not read with this rope_type, or values do
            not fit together or to `head_dim`.
    """
    sections = {key: value for key, value in rope.items() if isinstance(value, Mapping)}
    for key, section in sections.items():
        check_rope(section, head_dim, f"{path}.{key}")
    if sections:
        return
    rope_type = rope.get("rope_type", "default")
    for key in _NEEDS[rope_type]:
        if key not in rope:
            example = ROPE[key].example
            shown = f"[{example[0]:g},...]" if isinstance(example, list) else f"{example:g}"
            refuse(path, rope, f"rope_type {rope_type} needs {key}; add {path}.{key}={shown}")
    unread = [key for key in rope if key not in (*_ALWAYS, *_reads(rope_type))]
    if unread:
        readers = ", ".join(kind for kind in _NEEDS if unread[0] in _reads(kind))
        drop = " ".join(f"~{path}.{key}" for key in unread)
        refuse(
            f"{path}.{unread[0]}",
            rope[unread[0]],
            f"not read with rope_type {rope_type}, only with {readers}; set {path}.rope_type, or drop it with {drop}",
        )
    if rope_type == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        low = rope["low_freq_factor"]
        refuse(f"{path}.high_freq_factor", rope["high_freq_factor"], f"must be above low_freq_factor={low:g}")
    if rope_type == "longrope":
        rotated = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        for key in ("short_factor", "long_factor"):
            if len(rope[key]) != rotated // 2:
                why = f"needs a number for each pair of the {rotated} rotary dimensions of a head, {rotated // 2}"
                refuse(f"{path}.{key}", rope[key], why)


def rotary_of(fields: Mapping[str, Any], *, layer_types: bool) -> dict[str, Any]:
    """The rotary settings of a config.json, of transformers 4 or 5, as a section `rope_parameters` of transformers 5.

    Settings that the file does not have are left out; the model class has defaults for them.

    Args:
        fields: the content of the config.json.
        layer_types: whether the family has a section for each layer type (Gemma 3).
    """
    given = fields.get("rope_scaling") or fields.get(SECTION) or {}
    if not layer_types:
        beside = {
            "rope_theta": fields.get("rope_theta", fields.get("rotary_emb_base")),
            "partial_rotary_factor": fields.get("partial_rotary_factor", fields.get("rotary_pct")),
        }
        return _section(given, beside, fields)
    nested = {key: value for key, value in given.items() if isinstance(value, Mapping)}
    if given and not nested:
        # transformers 4 applied `rope_scaling` to the layers with full attention only.
        nested = {"full_attention": given}
    theta = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
    sections = {
        key: _section(nested.get(key, {}), {"rope_theta": fields.get(beside)}, fields) for key, beside in theta.items()
    }
    return {key: section for key, section in sections.items() if section}


def without_rotary(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json without its rotary settings, of transformers 4 or 5."""
    return {key: value for key, value in fields.items() if key not in (SECTION, *_OLD_KEYS)}


def _section(given: Mapping[str, Any], beside: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """One section of rotary settings: `given`, completed by `beside`. Keys with null are dropped.

    Args:
        given: the section in the config.json.
        beside: settings from keys beside the section.
        fields: the whole config.json.
    """
    section = {key: value for key, value in {**beside, **given}.items() if value is not None}
    if "type" in section:
        section.setdefault("rope_type", section["type"])
        del section["type"]
    if section.get("rope_type") in ("llama3", "yarn", "longrope"):
        length = fields.get(_LENGTH) or fields.get("max_position_embeddings")
        if length is not None:
            section.setdefault(_LENGTH, length)
    return section
