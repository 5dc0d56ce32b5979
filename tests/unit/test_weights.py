"""The stages get the weights of a model folder bit for bit, and a wrong folder is refused with one line."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from stack.config.compose import compose
from stack.errors import CheckpointError, ConfigError
from stack.models import weights
from stack.models.build import build_stages, open_weights
from stack.plan.layout import make_plan
from tests.helpers.tiers import each_in_turn
from tests.helpers.tiny import FAMILIES, family_settings, global_batch, tiny_config

CPU = torch.device("cpu")


def published(folder: Path, family: str = "llama", *, tied: bool = False, shard: str = "1GB") -> Path:
    """A model folder written by transformers, with random values also for norms and biases."""
    cfg = tiny_config(**family_settings(family, tied=tied))
    ids = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = transformers.AutoConfig.for_model(family, **cfg.model.config, **ids)
    config._attn_implementation = cfg.model.attention
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def stages(folder: Path, pipeline: int, family: str = "llama", *, tied: bool = False, empty: bool = False, **settings):
    settings = {**family_settings(family, tied=tied), "kernels__loss": "logits", **settings}
    cfg = tiny_config(**settings, parallel__pipeline=pipeline, parallel__zero=0, model__init="pretrained")
    cfg.model.name, cfg.model.config = str(folder), {}
    plan = make_plan(cfg, pipeline)
    return [stage for rank in range(pipeline) for stage in build_stages(cfg, plan, rank, device=CPU, empty=empty)]


def logits(row, ids, positions):
    hidden = ids
    for stage in row[:-1]:
        hidden = stage(hidden, positions, ids)
    return row[-1].model(**{"input_ids" if row[-1].first else "inputs_embeds": hidden}, position_ids=positions).logits


@pytest.mark.parametrize(("family", "tied"), each_in_turn(FAMILIES, [False, True]))
@torch.no_grad()
def test_stages_hold_what_transformers_loads(family, tied, tmp_path):
    ids, _, positions = map(torch.from_numpy, global_batch(tiny_config(), 0, "full"))
    for shard in ("1GB", "20KB"):
        folder = published(tmp_path / shard, family, tied=tied, shard=shard)
        assert (folder / "model.safetensors.index.json").exists() == (shard != "1GB")
        attention = tiny_config(**family_settings(family, tied=tied)).model.attention
        dense = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention
        )
        expected = dict(dense.named_parameters())
        expected_logits = dense(input_ids=ids, position_ids=positions).logits
        for pipeline in (1, 2):
            row = stages(folder, pipeline, family, tied=tied)
            found = {name: p for stage in row for name, p in stage.model.named_parameters()}
            if tied and pipeline == 2:
                assert torch.equal(found.pop("lm_head.weight"), dense.lm_head.weight)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], value) for name, value in expected.items())
            assert (logits(row, ids, positions) - expected_logits).abs().max() <= 1e-5


def test_half_precision_weights_become_fp32_and_then_the_compute_dtype(tmp_path):
    folder = published(tmp_path)
    file = folder / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    name = "model.layers.2.mlp.up_proj.weight"
    for settings, dtype in (({}, torch.float32), ({"precision__dtype": "bf16"}, torch.bfloat16)):
        [stage] = stages(folder, 1, **settings)
        assert torch.equal(stage.model.get_parameter(name), load_file(file)[name].to(dtype))


class _Spy:
    """Replaces `safe_open`, and records which files are opened and which tensors are read."""

    def __init__(self, opened, read):
        self.opened, self.read = opened, read

    def __call__(self, path, framework):
        self.opened.append(Path(path).name)
        file, read = self._open(path, framework=framework), self.read

        class File:
            keys = file.keys

            def get_tensor(self, name):
                read.append(name)
                return file.get_tensor(name)

        return File()

    _open = staticmethod(weights.safe_open)


def test_a_stage_reads_its_own_tensors_once_and_opens_no_other_file(tmp_path, monkeypatch):
    folder = published(tmp_path, "mixtral", shard="20KB")
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    opened: list[str] = []
    read: list[str] = []
    monkeypatch.setattr(weights, "safe_open", _Spy(opened, read))
    settings = {**family_settings("mixtral", tied=False), "parallel__pipeline": 2, "parallel__zero": 0}
    cfg = tiny_config(**settings, model__init="pretrained")
    cfg.model.name = str(folder)
    plan = make_plan(cfg, 2)
    seen: set[str] = set()
    for rank in range(2):
        opened.clear()
        read.clear()
        build_stages(cfg, plan, rank, device=CPU)
        layers = {f"layers.{index}." for index in plan.layers_of(rank)}
        others = ("embed_tokens",) if rank == 0 else ("model.norm", "lm_head")
        assert sorted(read) == sorted(n for n in where if any(part in n for part in (*layers, *others)))
        assert sorted(opened) == sorted({where[name] for name in read})
        seen |= set(read)
    assert seen == set(where)


def test_nothing_is_read_where_a_checkpoint_brings_the_weights(tmp_path):
    folder = published(tmp_path)
    (folder / "model.safetensors").unlink()
    [stage] = stages(folder, 1, empty=True)
    assert not any(parameter.any() for parameter in stage.model.parameters())


def _rewrite(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def _prefixless(tensors):
    for name in list(tensors):
        tensors[name.removeprefix("model.").removeprefix("transformer.")] = tensors.pop(name)


def _renamed_head(tensors):
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def _both(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def _rotary(tensors):
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)


def _masks(tensors):
    _prefixless(tensors)
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)


@pytest.mark.parametrize(
    ("family", "change"),
    [("llama", _prefixless), ("llama", _renamed_head), ("llama", _both), ("llama", _rotary), ("gpt2", _masks)],
)
def test_older_and_other_writers_are_understood(family, change, tmp_path):
    folder = published(tmp_path, family, tied=True)
    expected = {name: p for s in stages(folder, 1, family, tied=True) for name, p in s.model.named_parameters()}
    _rewrite(folder, change)
    for pipeline in (1, 2):
        for stage in stages(folder, pipeline, family, tied=True):
            for name, parameter in stage.model.named_parameters():
                # A head that is tied to the embedding of another rank has the embedding's values.
                same = "model.embed_tokens.weight" if family == "llama" else "transformer.wte.weight"
                assert torch.equal(parameter, expected[same if name == "lm_head.weight" else name])


def test_experts_that_were_saved_fused_are_read_too(tmp_path):
    folder = published(tmp_path / "apart", "mixtral")
    expected = {name: p for s in stages(folder, 1, "mixtral") for name, p in s.model.named_parameters()}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / "fused" / "model.safetensors")
    [stage] = stages(tmp_path / "fused", 1, "mixtral")
    assert all(torch.equal(parameter, expected[name]) for name, parameter in stage.model.named_parameters())


_UP = "model.layers.1.mlp.up_proj.weight"
_EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"


def _nan(tensors):
    tensors[_UP][0, 3] = float("nan")


def _other_head(tensors):
    _both(tensors)
    tensors["lm_head.weight"][5] += 1


FAULTS = {
    "missing": ("llama", lambda t: t.pop(_UP), rf"lacks {_UP} of LlamaForCausalLM; copy it again"),
    "many missing": ("llama", lambda t: [t.pop(n) for n in list(t) if "up_proj" in n], r"up_proj.weight and 2 more of"),
    "no expert": ("mixtral", lambda t: t.pop(_EXPERT), rf"lacks {_EXPERT} of MixtralForCausalLM"),
    "odd expert": (
        "mixtral",
        lambda t: t.update({_EXPERT: torch.ones(3, 32)}),
        r"model.safetensors: the parts of model.layers.1.mlp.experts.gate_up_proj do not fit together",
    ),
    "shape": (
        "llama",
        lambda t: t.update({_UP: torch.ones(7, 32)}),
        rf"model.safetensors: {_UP} is \[7, 32\], and in this model \[80, 32\]; the file does not fit its own config",
    ),
    "nan": ("llama", _nan, rf"{_UP} has values that are not finite"),
    "leftover": (
        "llama",
        lambda t: t.update({"model.layers.5.x": torch.ones(1), "score.weight": torch.ones(1)}),
        r"holds tensors of no parameter of LlamaForCausalLM: model.layers.5.x, score.weight; give",
    ),
    "quantized": ("llama", lambda t: t.update({_UP: t[_UP].to(torch.int8)}), rf"{_UP} is torch.int8, a quantized"),
    "two heads": ("llama", _other_head, "lm_head.weight differs from model.embed_tokens.weight, but tie_word_emb"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_of_another_content_is_refused(fault, tmp_path):
    family, change, line = FAULTS[fault]
    tied = fault == "two heads"
    folder = published(tmp_path, family, tied=tied)
    _rewrite(folder, change)
    with pytest.raises(CheckpointError, match=line) as caught:
        stages(folder, 2, family, tied=tied)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("llama", "model.embed_tokens.weight", (0,)),
        ("llama", "model.embed_tokens.weight", (384, 32)),
        ("gpt2", "transformer.h.1.mlp.c_fc.weight", (7, 3)),
        ("mixtral", _EXPERT, (3, 32)),
    ],
)
@pytest.mark.parametrize("changed", [False, True])
def test_shapes_are_compared_from_the_headers_alone(family, name, shape, changed, tmp_path, monkeypatch):
    folder = published(tmp_path, family)
    fields = {} if not changed else {"rms_norm_eps" if family != "gpt2" else "layer_norm_epsilon": 1e-4}
    cfg = tiny_config(**family_settings(family, tied=False), model__init="pretrained")
    cfg.model.name, cfg.model.config = str(folder), fields
    open_weights(cfg).check_shapes()
    _rewrite(folder, lambda tensors: tensors.update({name: torch.ones(shape)}))
    found = open_weights(cfg)
    monkeypatch.setattr(weights.Weights, "_tensor", lambda *_: pytest.fail("a tensor was read"))
    remedy = "leave model.config as" if changed else "the file does not fit its own config.json; copy or save it again"
    with pytest.raises(CheckpointError, match=rf"{name} is \[{', '.join(map(str, shape))}\], and in this .*; {remedy}"):
        found.check_shapes()


def test_what_is_no_file_of_weights_is_named(tmp_path):
    folder = published(tmp_path)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes((1 << 60).to_bytes(8, "little") + content[8:])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        stages(folder, 1)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ConfigError, match=r"its model.safetensors is no regular file; copy it again"):
        stages(folder, 1)


def _cut(folder):
    file = next(folder.glob("*00002-of*"))
    file.write_bytes(file.read_bytes()[:-8])
    return rf"{file} is damaged or cut short"


def _delete(folder):
    next(folder.glob("*00002-of*")).unlink()
    return rf"{folder} has no model-00002-of-\d+.safetensors, which model.safetensors.index.json names"


def _empty_index(folder):
    (folder / "model.safetensors.index.json").write_text("{")
    return "index.json is damaged, it is no index of tensors"


def _deep_index(folder):
    (folder / "model.safetensors.index.json").write_text("[" * 200_000)
    return "index.json is damaged, it is no index of tensors"


def _lying_index(folder):
    index = folder / "model.safetensors.index.json"
    files = json.loads(index.read_text())
    files["weight_map"][_UP] = files["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(files))
    return f"{_UP} cannot be read"


@pytest.mark.parametrize("damage", [_cut, _delete, _empty_index, _deep_index, _lying_index])
def test_damaged_files_are_refused(damage, tmp_path):
    folder = published(tmp_path, shard="20KB")
    line = damage(folder)
    with pytest.raises(CheckpointError, match=line):
        stages(folder, 1)


def test_a_folder_without_safetensors_is_refused_and_nothing_unpickled(tmp_path):
    folder = published(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        ConfigError, match=r"has no model.safetensors but pytorch_model.bin, and stack reads safetensors only"
    ):
        stages(folder, 1)
    with pytest.raises(ConfigError, match=r"trust the author, convert it with AutoModelForCausalLM.from_pretrained\("):
        compose(["model=folder", f"model.name={folder}", "model.init=pretrained"])
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ConfigError, match=r"has no model.safetensors; give a whole folder, or use model.init=scratch"):
        compose(["model=folder", f"model.name={folder}", "model.init=pretrained"])


def test_what_weights_cannot_be_is_refused_with_the_config(tmp_path):
    folder = published(tmp_path)
    pretrained = [f"model.name={folder}", "model.init=pretrained", "data.seq_len=16", "optim.lr=1e-5"]
    assert compose(["model=folder", *pretrained]).model.init == "pretrained"
    with pytest.raises(ConfigError, match=r"model.init=pretrained: model.name=llama is a family, and has no weights"):
        compose(["model.init=pretrained"])
    with pytest.raises(ConfigError, match=r"model.config.vocab_size=4096: the weights of .* have 128; drop it"):
        compose(pretrained)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ConfigError, match=r"its weights are quantized; give the folder that they were made from"):
        compose(["model=folder", *pretrained])
