"""Compares the parameter and FLOP formulas of every family with the Hugging Face class on the meta device."""

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from stack.config.compose import compose
from stack.config.families import FAMILIES
from stack.config.model_fields import SPECS
from stack.config.model_folder import model_fields
from stack.config.schema import Model
from stack.config.values import Spec
from stack.errors import ConfigError, LayoutError
from stack.models.families import parts_of
from stack.plan.shape import ModelShape, model_shape

#: The numbers differ from each other, so that a formula that mixes up two of them gives a wrong result.
TINY = {
    "vocab_size": 80,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "num_experts": 5,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 14,
}
#: Settings that change a count, in addition to the sizes.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "llama": [{"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 10}],
    "mistral": [{"head_dim": 10}],
    "qwen3": [{"attention_bias": True}, {"head_dim": 10}],
    "gemma2": [{"attention_bias": True}],
    "gemma3_text": [{"attention_bias": True}],
    "olmo2": [{"attention_bias": True}],
    "gpt_neox": [{"attention_bias": False}, {"use_parallel_residual": False}],
    "gpt2": [{"n_inner": 50}],
    "granite": [{"attention_bias": True, "mlp_bias": True}],
    "smollm3": [{"attention_bias": True, "mlp_bias": True}],
    "cohere": [{"use_qk_norm": True}, {"attention_bias": True}],
    "mixtral": [{"head_dim": 10}],
    "qwen3_moe": [{"attention_bias": True}, {"head_dim": 10}],
    "olmoe": [{"attention_bias": True}],
}


def tiny(name: str, **given: Any) -> Model:
    sizes = {key: value for key, value in TINY.items() if key in FAMILIES[name].fields}
    return Model(name, {**sizes, **given})


def hugging_face_config(model: Model) -> transformers.PretrainedConfig:
    fields = model_fields(model)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    # None as in a run; the default id is outside of the tiny vocabulary.
    config.pad_token_id = None
    return config


def on_meta(model: Model) -> transformers.PreTrainedModel:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(hugging_face_config(model))


def assert_counted(shape: ModelShape, model: transformers.PreTrainedModel) -> None:
    parts = parts_of(model)

    def count(*paths: str) -> int:
        return sum(p.numel() for path in paths for p in model.get_submodule(path).parameters())

    layers = [count(f"{parts.layers}.{index}") for index in range(shape.layers)]
    assert layers == [shape.layer_params] * shape.layers
    assert count(*parts.before) == shape.embedding_params
    assert count(*parts.after) == shape.norm_params
    assert count(parts.head) == shape.head_params
    assert model.num_parameters() == shape.total_params


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("name", "given"), [(name, given) for name in FAMILIES for given in ({}, *VARIANTS.get(name, []))], ids=str
)
def test_a_tiny_model_has_the_parameters_that_were_counted(name: str, given: dict[str, Any], tied: bool) -> None:
    model = tiny(name, tie_word_embeddings=tied, **given)
    assert_counted(model_shape(model), on_meta(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_defaults_of_a_family_have_the_parameters_that_were_counted(name: str) -> None:
    model = Model(name)
    assert_counted(model_shape(model), on_meta(model))


@cache
def config_class(name: str) -> type[transformers.PretrainedConfig]:
    return type(transformers.AutoConfig.for_model(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_the_keys_and_defaults_of_its_class(name: str) -> None:
    cls = config_class(name)
    theirs = {field.name: field.default for field in dataclasses.fields(cls)}
    for key, ours in FAMILIES[name].defaults.items():
        if (name, key) == ("qwen3_moe", "head_dim"):
            continue  # the attention module reads this field, but the config class does not define it
        assert ours == theirs[cls.attribute_map.get(key, key) if key not in theirs else key], key


@pytest.mark.parametrize("name", FAMILIES)
def test_the_class_takes_null_where_it_is_offered_and_every_key_once(name: str) -> None:
    specs = {key: spec for key, spec in FAMILIES[name].fields.items() if isinstance(spec, Spec)}
    on_meta(tiny(name, **{key: None for key, spec in specs.items() if spec.nullable}))
    values = {key: example_of(spec) for key, spec in specs.items() if key not in TINY and not spec.is_list}
    config = hugging_face_config(tiny(name, **values))
    assert {key: getattr(config, key) for key in values} == values


def example_of(spec: Spec) -> Any:
    """A legal value; for a bool the one that is not the default."""
    return not spec.example if spec.kind is bool else spec.example or {int: 4, float: 0.5}[spec.kind]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_number_that_sizes_a_class_is_a_key(name: str) -> None:
    """A size without a key could not be set at all."""
    unused = {"pretraining_tp", "intermediate_size", "decoder_sparse_step", "original_max_position_embeddings"}
    ids = {"pad_token_id", "bos_token_id", "eos_token_id"}
    for field in dataclasses.fields(config_class(name)):
        is_size = type(field.default) is int and field.name not in transformers.PretrainedConfig.__dataclass_fields__
        if is_size and field.name not in ids | unused:
            assert FAMILIES[name].aliases.get(field.name, field.name) in FAMILIES[name].fields, field.name


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_saved_by_transformers_has_the_same_shape(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    hugging_face_config(model).save_pretrained(tmp_path)
    assert model_shape(Model(str(tmp_path))) == model_shape(model)
    wider = Model(str(tmp_path), {"hidden_size": 48})
    assert_counted(model_shape(wider), on_meta(wider))
    folder = ["model=folder", f"model.name={tmp_path}", "data.seq_len=32", "model.attention=eager"]
    assert compose(folder).model.config == {}


def test_the_names_of_gpt2_in_a_folder(tmp_path: Path) -> None:
    names = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "n_ctx": 1024, "vocab_size": 50257}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **names}))
    assert model_shape(Model(str(tmp_path))).total_params == 124_439_808
    smaller = Model(str(tmp_path), {"num_hidden_layers": 2})
    assert_counted(model_shape(smaller), on_meta(smaller))
    with pytest.raises(
        ConfigError, match=r"data.seq_len=2048: longer than .*max_position_embeddings=1024; at most 1024"
    ):
        compose(["model=folder", f"model.name={tmp_path}", "data.seq_len=2048"])


def test_rope_scaling_of_an_old_folder_gives_way(tmp_path: Path) -> None:
    old = {"model_type": "llama", "rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert hugging_face_config(Model(str(tmp_path))).rope_parameters["factor"] == 2.0
    mine = Model(str(tmp_path), {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    assert hugging_face_config(mine).rope_parameters == {"rope_type": "default", "rope_theta": 5e5}


QWEN3 = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 36}
QWEN3_MOE = {"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
#: Published models: (name, family, fields that differ from the defaults, parameters in billions, active parameters in
#: billions).
KNOWN: list[tuple[str, str, dict[str, Any], float, float]] = [
    ("Llama-2-7B", "llama", {}, 6.74, 6.74),
    ("Mistral-7B", "mistral", {}, 7.24, 7.24),
    ("Qwen2.5-7B", "qwen2", {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
     "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}, 7.62, 7.62),
    ("Qwen3-8B", "qwen3", {**QWEN3, "intermediate_size": 12288}, 8.19, 8.19),
    ("Gemma-2-2B", "gemma2", {}, 2.61, 2.61),
    ("Gemma-3-1B", "gemma3_text", {"vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912,
     "num_attention_heads": 4, "num_key_value_heads": 1}, 1.00, 1.00),
    ("Phi-3-mini", "phi3", {}, 3.82, 3.82),
    ("OLMo-2-7B", "olmo2", {"vocab_size": 100352}, 7.30, 7.30),
    ("GPT-NeoX-20B", "gpt_neox", {}, 20.55, 20.55),
    ("Pythia-160M", "gpt_neox", {"vocab_size": 50304, "hidden_size": 768, "intermediate_size": 3072,
     "num_hidden_layers": 12, "num_attention_heads": 12}, 0.162, 0.162),
    ("GPT-2", "gpt2", {}, 0.1244, 0.1244),
    ("GPT-2 XL", "gpt2", {"hidden_size": 1600, "num_hidden_layers": 48, "num_attention_heads": 25}, 1.558, 1.558),
    ("Granite-3.1-8B", "granite", {"vocab_size": 49155, "intermediate_size": 12800, "num_hidden_layers": 40,
     "num_key_value_heads": 8, "tie_word_embeddings": True}, 8.17, 8.17),
    ("SmolLM3-3B", "smollm3", {}, 3.08, 3.08),
    ("Command R", "cohere", {}, 34.98, 34.98),
    ("Mixtral-8x7B", "mixtral", {}, 46.70, 12.88),
    ("Mixtral-8x22B", "mixtral", {"vocab_size": 32768, "hidden_size": 6144, "intermediate_size": 16384,
     "num_hidden_layers": 56, "num_attention_heads": 48}, 140.63, 39.16),
    ("Qwen3-30B-A3B", "qwen3_moe", QWEN3_MOE, 30.53, 3.35),
    ("Qwen3-235B-A22B", "qwen3_moe", {**QWEN3_MOE, "hidden_size": 4096, "num_hidden_layers": 94,
     "num_attention_heads": 64, "moe_intermediate_size": 1536}, 235.09, 22.19),
    ("OLMoE-1B-7B", "olmoe", {"intermediate_size": 1024}, 6.92, 1.28),
]  # fmt: skip


@pytest.mark.parametrize(("_", "family", "given", "total", "active"), KNOWN, ids=[row[0] for row in KNOWN])
def test_published_sizes(_: str, family: str, given: dict[str, Any], total: float, active: float) -> None:
    shape = model_shape(Model(family, given))
    assert shape.total_params / 1e9 == pytest.approx(total, rel=2e-3)
    assert shape.active_params / 1e9 == pytest.approx(active, rel=3e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_flops_are_two_for_each_active_weight_and_the_attention_in_reach(name: str) -> None:
    shape, model = model_shape(tiny(name)), on_meta(tiny(name))
    layer = model.get_submodule(f"{parts_of(model).layers}.0")
    experts = sum(p.numel() for p in layer.parameters() if p.dim() == 3)
    matrices = sum(p.numel() for n, p in layer.named_parameters() if p.dim() == 2 and "norm" not in n)
    active = experts * TINY["num_experts_per_tok"] // TINY["num_experts"]
    assert shape.layer_weights == matrices + active
    assert shape.idle_params == experts - active
    per_token = [shape.layer_flops(length) - 2 * shape.layer_weights for length in (2, 4)]
    assert per_token == [4 * shape.attention_width * reach for reach in (1, 2)]


#: (family, fields, number of the six layers with a sliding window).
WINDOWS = [
    ("mistral", {"sliding_window": 8}, 6),
    ("mistral", {"sliding_window": None}, 0),
    ("mixtral", {"sliding_window": 8}, 6),
    ("phi3", {"sliding_window": 8}, 6),
    ("qwen2", {"sliding_window": 8}, 0),
    ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 4}, 2),
    ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 4}, 2),
    ("qwen3_moe", {"sliding_window": 8, "use_sliding_window": True}, 6),
    ("qwen3_moe", {"sliding_window": 8}, 0),
    ("gemma2", {"sliding_window": 8}, 3),
    ("gemma2", {"sliding_window": 8, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}, 5),
    ("gemma3_text", {"sliding_window": 8}, 5),
    ("smollm3", {"sliding_window": 8, "use_sliding_window": True}, 1),
    ("smollm3", {"sliding_window": 8, "use_sliding_window": True, "no_rope_layers": [0, 1, 1, 0, 1, 1]}, 2),
]


@pytest.mark.parametrize(("name", "given", "windowed"), WINDOWS, ids=str)
def test_windows_are_those_of_the_class_and_shorten_the_attention(
    name: str, given: dict[str, Any], windowed: int
) -> None:
    model = tiny(name, num_hidden_layers=6, **given)
    shape, config = model_shape(model), hugging_face_config(model)
    assert shape.windowed_layers == windowed
    if hasattr(config, "layer_types") and name != "mistral":
        assert config.layer_types.count("sliding_attention") == windowed
    else:
        assert (config.sliding_window is not None) == bool(windowed)
    # The formula counts t + 0.5 keys for token number t: the t tokens before it, and half for the token itself.
    full = [token + 0.5 for token in range(32)]
    reached = [min(reach, 8) for reach in full]
    mean = (windowed * sum(reached) + (6 - windowed) * sum(full)) / (6 * 32)
    attention = shape.layer_flops(32) - 2 * shape.layer_weights
    assert attention == pytest.approx(4 * shape.attention_width * mean)


BAD = [
    ("llama", {"num_attention_heads": 7, "head_dim": 8}, "num_attention_heads=7 does not divide hidden_size=24; use 6"),
    ("gpt2", {"num_attention_heads": 7}, "num_attention_heads=7 does not divide hidden_size=24; use 6"),
    ("qwen2", {"num_key_value_heads": 4}, "num_key_value_heads=4 does not divide num_attention_heads=6; use 3"),
    ("llama", {"head_dim": 5}, "the head dimension 5 is odd and rotary embeddings need pairs; use head_dim=6"),
    ("cohere", {"hidden_size": 30}, "the head dimension 5 is odd and rotary embeddings need pairs; use hidden_size=36"),
    ("mixtral", {"num_experts_per_tok": 6}, "num_experts_per_tok=6 is more than num_local_experts=5; use at most 5"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers=[0] makes some layers dense"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 makes some layers dense"),
    ("gemma2", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for num_hidden_layers=3"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "set sliding_window and use_sliding_window=true"),
]


@pytest.mark.parametrize(("name", "given", "message"), BAD, ids=str)
def test_sizes_that_do_not_fit_are_one_line(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError) as caught:
        model_shape(tiny(name, **given))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_heads_need_not_divide_the_width_where_the_class_allows_it() -> None:
    model = tiny("qwen3", num_attention_heads=7, num_key_value_heads=1, head_dim=8)
    assert_counted(model_shape(model), on_meta(model))


def test_every_spec_is_of_some_family() -> None:
    assert set(SPECS) == {key for family in FAMILIES.values() for key in family.defaults}


def test_a_shape_is_plain_values() -> None:
    for name in FAMILIES:
        json.dumps(dataclasses.asdict(model_shape(tiny(name))))
