"""`model.config.rope_parameters.KEY=VALUE` with a model folder changes this key and keeps the folder's other keys."""

import json
from pathlib import Path
from typing import Any

import pytest

from stack.config.compose import compose, from_yaml, to_yaml
from stack.config.families import FAMILIES
from stack.errors import ConfigError
from stack.models.build import hugging_face_config

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 360,
    "max_position_embeddings": 256,
}
PATH = "model.config.rope_parameters"
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = (f"{PATH}.rope_type=linear", f"{PATH}.factor=4")
#: Name -> (family, fields of the folder's config.json, overrides, expected rope_parameters of the transformers config).
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...], dict[str, Any]]] = {
    "transformers 5": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        LINEAR,
        {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
    ),
    "transformers 4": (
        "llama",
        {"rope_theta": 1e6, "rope_scaling": None},
        LINEAR,
        {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
    ),
    "a theta keeps the scaling": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        (f"{PATH}.rope_theta=1e6",),
        {"rope_type": "llama3", "rope_theta": 1e6, **LLAMA3},
    ),
    "a theta keeps the scaling of transformers 4": (
        "llama",
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        (f"{PATH}.rope_theta=1e6",),
        {"rope_type": "llama3", "rope_theta": 1e6, **LLAMA3},
    ),
    "a section is a set of keys": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        (f"{PATH}={{factor: 16, rope_theta: 1e6}}",),
        {"rope_type": "llama3", "rope_theta": 1e6, **LLAMA3, "factor": 16.0},
    ),
    "keys of another type are dropped": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        (*LINEAR, f"~{PATH}.low_freq_factor", f"~{PATH}.high_freq_factor", f"~{PATH}.original_max_position_embeddings"),
        {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
    ),
    "the folder's whole section is dropped": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}},
        (f"~{PATH}",),
        {"rope_type": "default", "rope_theta": 1e4},
    ),
    "yarn": (
        "qwen2",
        {"rope_theta": 1e6},
        (f"{PATH}.rope_type=yarn", f"{PATH}.factor=4", f"{PATH}.original_max_position_embeddings=64"),
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "dynamic": (
        "llama",
        {"rope_theta": 1e6},
        (f"{PATH}.rope_type=dynamic", f"{PATH}.factor=4"),
        {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 4.0},
    ),
    "gemma 3 of transformers 5": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            }
        },
        (f"{PATH}.full_attention.rope_theta=2e6",),
        {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
    ),
    "gemma 3 of transformers 4": (
        "gemma3_text",
        {
            "rope_theta": 1e6,
            "rope_local_base_freq": 2e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        (f"{PATH}.full_attention.rope_theta=2e6",),
        {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
    ),
    "gpt_neox of transformers 4": (
        "gpt_neox",
        {"rotary_emb_base": 2e4, "rotary_pct": 0.5},
        LINEAR,
        {"rope_type": "linear", "rope_theta": 2e4, "partial_rotary_factor": 0.5, "factor": 4.0},
    ),
    "phi3 of transformers 4": (
        "phi3",
        {
            "rope_theta": 2e4,
            "original_max_position_embeddings": 64,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        },
        (f"{PATH}.rope_theta=3e4",),
        {
            "rope_type": "longrope",
            "rope_theta": 3e4,
            "partial_rotary_factor": 1.0,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 64,
        },
    ),
}


def folder(tmp_path: Path, family: str, fields: dict[str, Any]) -> str:
    sizes = {key: value for key, value in SIZES.items() if key in FAMILIES[family].fields}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **sizes, **fields}))
    return f"model.name={tmp_path}"


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    return str(caught.value)


@pytest.mark.parametrize(("family", "fields", "overrides", "expected"), CASES.values(), ids=CASES)
def test_a_key_is_merged_into_the_folders_section(
    family: str, fields: dict[str, Any], overrides: tuple[str, ...], expected: dict[str, Any], tmp_path: Path
) -> None:
    cfg = compose(["model=folder", folder(tmp_path, family, fields), "data.seq_len=128", *overrides])
    assert hugging_face_config(cfg).rope_parameters == expected
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(cfg))
    assert from_yaml(saved) == cfg
    assert from_yaml(saved, ["train.steps=300"]).model == cfg.model


@pytest.mark.parametrize(("family", "fields", "overrides", "expected"), CASES.values(), ids=CASES)
def test_an_unchanged_folder_is_left_to_transformers(
    family: str, fields: dict[str, Any], overrides: tuple[str, ...], expected: dict[str, Any], tmp_path: Path
) -> None:
    del overrides, expected
    import transformers

    cfg = compose(["model=folder", folder(tmp_path, family, fields), "data.seq_len=128"])
    assert cfg.model.config == {}
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert hugging_face_config(cfg).rope_parameters == theirs


def test_a_resumed_run_takes_single_keys_too(tmp_path: Path) -> None:
    name = folder(tmp_path, "llama", {"rope_theta": 1e6})
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(compose(["model=folder", name])))
    cfg = from_yaml(saved, LINEAR)
    assert cfg.model.config["rope_parameters"] == {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}
    saved.write_text(to_yaml(cfg))
    assert from_yaml(saved, [f"~{PATH}.rope_theta"]).model.config["rope_parameters"] == {
        "rope_type": "linear",
        "factor": 4.0,
    }


def test_the_keys_of_another_type_are_named_with_what_drops_them(tmp_path: Path) -> None:
    name = folder(tmp_path, "llama", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}})
    given = ["model=folder", name, "data.seq_len=128", *LINEAR]
    line = refusal(*given)
    assert line.startswith(f"{PATH}.low_freq_factor=1.0: not read with rope_type linear, only with llama3; ")
    advice = [word for word in line.split() if word.startswith("~")]
    assert len(advice) == 3
    compose([*given, *advice])


def test_a_preset_over_a_folder_is_dropped_first(tmp_path: Path) -> None:
    name = folder(tmp_path, "llama", {"rope_theta": 1e6})
    preset = ["model.config={rope_parameters: {rope_theta: 2e6}}", name, "model.init=scratch"]
    assert compose(["model=folder", *preset]).model.config["rope_parameters"]["rope_theta"] == 2e6
    assert compose(["model=folder", *preset, f"~{PATH}"]).model.config == {}


def test_a_longrope_has_a_factor_for_each_pair_of_a_head(tmp_path: Path) -> None:
    name = folder(tmp_path, "llama", {})
    overrides = [
        *("model=folder", name, "data.seq_len=128", f"{PATH}.rope_type=longrope"),
        f"{PATH}.original_max_position_embeddings=64",
    ]
    right, wrong = "[1,1,1,1,1,1,1,1]", "[1]"
    compose([*overrides, f"{PATH}.short_factor={right}", f"{PATH}.long_factor={right}"])
    line = refusal(*overrides, f"{PATH}.short_factor={right}", f"{PATH}.long_factor={wrong}")
    assert line.endswith("long_factor=[1.0]: needs a number for each pair of the 16 rotary dimensions of a head, 8")


def test_rotary_settings_are_the_only_section() -> None:
    """Another section would need the same merging of keys."""
    sections = {key for family in FAMILIES.values() for key, spec in family.fields.items() if isinstance(spec, dict)}
    assert sections == {"rope_parameters"}
